/* out = x Wᵀ for a weight W that stays as it lies in a file, on CPU. Called through ctypes; knows nothing of torch. */
#include <stdatomic.h>
#include <stdlib.h>
#include <math.h>
#include "job.h"
#include "team.h"
#include "scalar.h"
#include "blocks.h"
#if defined(__x86_64__)
#include "avx512.h"
#include "avx2.h"
#include "vnni.h"
#endif

enum { SCALAR = 0, AVX2 = 1, AVX512 = 2, VNNI = 3 };

/* The best this processor has. */
int llmcompress_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") ? VNNI : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return SCALAR;
}

/* Whether blocks of 128 columns are uniform enough for the vector code. */
static int in_blocks(const Job *job) {
    int64_t bits = job->bits, group = job->group;
    if (job->high_mask || (bits != 2 && bits != 3 && bits != 4 && bits != 8)) return 0;
    if (job->format == CODEBOOK && bits == 8) return 0;
    return groups_of(job) == 1 || group % BLOCK == 0 || group == 8 || group == 16 || group == 32 || group == 64;
}

typedef struct {
    const Job *job;
    int level;
    int64_t step, scratch, length; /* rows at a time; floats a thread needs; columns in whole blocks */
    Inputs x;
    atomic_llong next_row, next_token, failed;
} Work;

/* Inputs of one token as float32; for blocks, padded with zeros and in the order of `Inputs`. */
static void spread_inputs(const Work *work, int64_t token) {
    const Job *job = work->job;
#if defined(__x86_64__)
    if (work->level == VNNI) {
        for (int64_t block = 0; block < work->length / BLOCK; block++) deep_inputs(job, &work->x, token, block);
        return;
    }
#endif
    float *to = work->x.values + token * work->length;
    if (work->level == SCALAR) {
        for (int64_t k = 0; k < job->columns; k++) to[k] = read_as(job->x, job->dtype, token * job->columns + k);
        return;
    }
    memset(to + work->length - BLOCK, 0, BLOCK * sizeof(float));
    for (int64_t k = 0; k < job->columns; k++) {
        int64_t place = k & (BLOCK - 1);
        to[k - place + (place & 7) * LANES + (place >> 3)] = read_as(job->x, job->dtype, token * job->columns + k);
    }
}

static void spread_some(void *data) {
    Work *work = data;
    for (int64_t token; (token = atomic_fetch_add(&work->next_token, 1)) < work->job->tokens;) spread_inputs(work, token);
}

static Kernel kernel_of(const Job *job, int level) {
#if defined(__x86_64__)
    return level == VNNI ? deep_kernel(job) : level == AVX512 ? wide_kernel(job) : narrow_kernel(job);
#else
    (void)job, (void)level;
    return NULL;
#endif
}

static Scales scales_of(const Job *job, int level) {
#if defined(__x86_64__)
    if (level >= AVX512 && job->group && job->scale_dtype == DOUBLE) return wide_scales;
#else
    (void)job, (void)level;
#endif
    return row_scales;
}

static void rows_some(void *data) {
    Work *work = data;
    const Job *job = work->job;
    float *scratch = NULL;
    for (int64_t row; (row = atomic_fetch_add(&work->next_row, work->step)) < job->rows;) {
        int64_t last = row + work->step < job->rows ? row + work->step : job->rows;
        if (!scratch && !(scratch = malloc((size_t)work->scratch * sizeof(float)))) {
            atomic_store(&work->failed, 1);
            return;
        }
        if (work->level == SCALAR) rows_scalar(job, work->x.values, row, last, scratch);
        else rows_blocks(job, &work->x, row, last, scratch, kernel_of(job, work->level), scales_of(job, work->level));
    }
    free(scratch);
}

/* 0, or 1 where memory ran out; `out` is then not complete. */
int llmcompress_linear(const Job *job) {
    Work work = {.job = job};
    int best = llmcompress_level();
    if (best == VNNI && job->dtype == F32) best = AVX512;  /* float32 stays exact */
    work.level = !in_blocks(job) ? SCALAR : job->level >= 0 && job->level < best ? (int)job->level : best;
    int blocked = work.level != SCALAR;
    work.step = blocked ? 128 : 8;
    while (work.step > ROWS && job->rows < work.step * job->threads * 4) work.step /= 2;
    work.length = blocked ? (job->columns + BLOCK - 1) / BLOCK * BLOCK : job->columns;
    work.scratch = blocked ? 2 * work.step * (groups_of(job) + LANES) : 2 * job->columns + LANES;
    int64_t inputs = job->tokens * work.length, blocks = inputs / BLOCK;
    size_t bytes = work.level == VNNI ? (size_t)(inputs * 2 + blocks * (LANES + 1) * 4) : (size_t)inputs * 4;
    char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) return 1;
    float *after = (float *)(memory + inputs * 2);
    work.x = (Inputs){(float *)memory, (int16_t *)memory, after + blocks * LANES, after};
    int64_t threads = job->rows * job->columns * job->tokens < 1 << 17 ? 1 : job->threads;
    together(job->team, spread_some, &work, job->team && job->tokens > 7 ? threads : 1);
    together(job->team, rows_some, &work, threads);
    free(memory);
    return (int)atomic_load(&work.failed);
}
