/* out = x Wᵀ for a weight W that stays as it lies in a file, on CPU. Called through ctypes; knows nothing of torch. */
#include <stdatomic.h>
#include <stdlib.h>
#include <math.h>
#include "job.h"
#include "processor.h"
#include "regions.h"
#include "team.h"
#include "scalar.h"
#include "mixed.h"
#include "plain.h"
#if defined(__x86_64__)
#include "avx512.h"
#include "avx2.h"
#include "deep.h"
#include "slim.h"
#endif

/* The best this processor has, for tests. */
int llmcompress_level(void) { return best_level(); }

/* Whether blocks of 128 columns are uniform enough for the vector code. */
static int in_blocks(const Job *job) {
    int64_t bits = job->bits, group = job->group;
    if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) return 0;
    if (job->high_mask || (bits != 2 && bits != 3 && bits != 4 && bits != 8)) return 0;
    if (job->format == CODEBOOK && bits == 8) return 0;
    return job->groups == 1 || group % BLOCK == 0 || group == 8 || group == 16 || group == 32 || group == 64;
}

typedef struct {
    const Job *job;
    Way way;  /* no kernel: row by row, in plain C */
    Mixed *mixed;  /* or null, where all columns have one width */
    int64_t step, scratch, length; /* rows at a time; floats a thread needs; columns in whole blocks */
    Inputs x;
    Regions *rows;
    atomic_llong next_token, failed;
} Work;

/* Inputs of one token as float32; for blocks, padded with zeros and in the order of `Inputs`. */
static void spread_inputs(const Work *work, int64_t token) {
    const Job *job = work->job;
    if (work->way.packets) {
        for (int64_t block = 0; block < work->length / BLOCK; block++) work->way.packets(job, &work->x, token, block);
        return;
    }
    float *to = work->x.values + token * work->length;
    if (work->mixed) {
        mixed_inputs(job, work->mixed, token, to);
        return;
    }
    if (!work->way.kernel) {
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

/* How a job is done with the instructions there are. Inputs of float32 stay exact. */
static Way way_of(const Job *job) {
    if (!in_blocks(job)) return (Way){0};
#if defined(__x86_64__)
    int level = level_of(job->level, job->dtype == F32 ? AVX512 : VNNI);
    if (level == VNNI) return deep_way(job);
    int bytes = job->bits == 8 && job->tokens < 4;  /* which AVX2 multiplies as integers in less time than AVX-512 alone looks up */
    if (level == AVX512 && !(bytes && job->dtype != F32 && slim_parts(job)))
        return (Way){wide_kernel(job), job->group ? wide_scales : row_scales, wide_tables, NULL, 0, 0};
    if (level >= AVX2 && job->dtype != F32 && slim_parts(job)) return slim_way(job, level == AVX2_VNNI);
    if (level >= AVX2) return (Way){narrow_kernel(job), narrow_scales, narrow_tables, NULL, 0, 0};
#endif
    return plain_way(job);
}

static void rows_some(void *data) {
    Work *work = data;
    const Job *job = work->job;
    float *scratch = NULL;
    Span span = first_span(work->rows);
    while (next_span(work->rows, work->step, &span)) {
        if (!scratch && !(scratch = malloc((size_t)work->scratch * sizeof(float)))) {
            atomic_store(&work->failed, 1);
            return;
        }
        if (work->mixed) rows_mixed(job, work->mixed, work->x.values, span.first, span.last, scratch);
        else if (!work->way.kernel) rows_scalar(job, work->x.values, span.first, span.last, scratch);
        else rows_blocks(job, &work->x, span.first, span.last, scratch, &work->way);
    }
    free(scratch);
}

/* Room for the inputs as this level wants them, in `x`; or null. */
static char *room_for_inputs(const Work *work, Inputs *x) {
    int64_t inputs = work->job->tokens * work->length, blocks = inputs / BLOCK;
    int64_t packets = blocks * work->way.bytes, sums = blocks * work->way.sums * (int64_t)sizeof(float);
    int64_t bytes = work->way.packets ? packets + sums + (blocks + LANES) * (int64_t)sizeof(float) : inputs * (int64_t)sizeof(float);
    char *memory = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    if (memory) *x = (Inputs){(float *)memory, (int8_t *)memory, (float *)(memory + packets + sums), (float *)(memory + packets)};
    return memory;
}

/* 0, or 1 where memory ran out; `out` is then not complete. */
int llmcompress_linear(const Job *job) {
    Regions rows;
    Work work = {.job = job, .rows = &rows, .way = way_of(job)};
    int blocked = work.way.kernel != NULL;
    work.step = blocked ? 128 : 8;
    work.length = blocked ? (job->columns + BLOCK - 1) / BLOCK * BLOCK : job->columns;
    work.scratch = blocked ? room_of(job, work.step) : 2 * job->columns + LANES;
    if (job->high_mask && !(work.mixed = mixed_of(job))) return 1;
    char *memory = room_for_inputs(&work, &work.x);
    if (!memory) {
        free(work.mixed);
        return 1;
    }
    int64_t threads = job->rows * job->columns * job->tokens < 1 << 17 ? 1 : job->threads;
    together(job->team, spread_some, &work, job->team && job->tokens > 7 ? threads : 1);
    set_regions(&rows, job->rows, threads, ROWS);
    together(job->team, rows_some, &work, threads);
    free(memory);
    free(work.mixed);
    return (int)atomic_load(&work.failed);
}
