/* Scales, codes and weights of symmetric integers, and codes in words. Bits are those of the torch code beside it
   (compress/grid.py, kernels/reference.py): float32 throughout, nothing contracted, sums in lanes that are then folded. */
#include <math.h>
#include <stdatomic.h>
#include "job.h"
#include "lanes.h"
#include "steps.h"
#include "team.h"

/* Fields have eight bytes each. Everything is contiguous. */
typedef struct {
    int64_t task, rows, columns, group, bits;
    const float *weight;            /* (rows, columns) */
    const float *importance;        /* (columns,), none negative */
    const float *shrink;            /* (shrinks,), falling; one: no search */
    int64_t shrinks;
    void *scale;                    /* (rows, columns / group) of dtype scale_dtype */
    int64_t scale_dtype;
    uint8_t *codes;                 /* (rows, columns) */
    float *restored;                /* (rows, columns) */
    double *sums;                   /* (rows, 2) */
    uint8_t *packed;                /* (rows, stride), stride a multiple of 4 bytes */
    int64_t stride, threads, level;
    void *team;
    double mean, deviation;
} Grid;

enum { STEPS = 0, CODES = 1, WEIGHTS = 2, ERRORS = 3, PACK = 4, UNPACK = 5, MOMENTS = 6, BEYOND = 7, TASKS = 8 };
enum { ROWS_AT_ONCE = 8, FEW = 1 << 16 };

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Counts __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32), aligned(4)));
#define eight(from) __builtin_convertvector(*(const Eight *)(from), Doubles)

#define BODY "grid.h"
#include "levels.h"
#undef BODY

/* Eight codes, a byte each, next to each other, and back. */
static inline uint64_t close_up(uint64_t codes, int64_t bits) {
    uint64_t found = 0, mask = (1u << bits) - 1;
    for (int i = 0; i < 8; i++) found |= (codes >> (8 * i) & mask) << (bits * i);
    return found;
}

static inline uint64_t spread_out(uint64_t dense, int64_t bits) {
    uint64_t found = 0, mask = (1u << bits) - 1;
    for (int i = 0; i < 8; i++) found |= (dense >> (bits * i) & mask) << (8 * i);
    return found;
}

#define PACKED_ROWS(name, target_attribute, CLOSE, SPREAD)                                       \
    target_attribute static int row_pack_##name(const Grid *job, int64_t row) {                  \
        const uint8_t *codes = job->codes + row * job->columns;                                  \
        uint8_t *to = job->packed + row * job->stride, *end = to + job->stride;                  \
        int64_t k = 0;                                                                           \
        uint64_t some;                                                                           \
        for (; k + 8 <= job->columns && end - to >= 8; k += 8, to += job->bits) {                \
            memcpy(&some, codes + k, 8);                                                         \
            some = CLOSE;                                                                        \
            memcpy(to, &some, 8);                                                                \
        }                                                                                        \
        for (; k < job->columns; k += 8) {                                                       \
            int64_t left = job->columns - k < 8 ? job->columns - k : 8;                          \
            int64_t bytes = end - to < job->bits ? end - to : job->bits;                         \
            some = 0;                                                                            \
            memcpy(&some, codes + k, (size_t)left);                                              \
            some = CLOSE;                                                                        \
            memcpy(to, &some, (size_t)bytes);                                                    \
            to += bytes;                                                                         \
        }                                                                                        \
        memset(to, 0, (size_t)(end - to));                                                       \
        return 0;                                                                                \
    }                                                                                            \
    target_attribute static int row_unpack_##name(const Grid *job, int64_t row) {                \
        const uint8_t *from = job->packed + row * job->stride, *end = from + job->stride;        \
        uint8_t *codes = job->codes + row * job->columns;                                        \
        int64_t k = 0;                                                                           \
        uint64_t some;                                                                           \
        for (; k + 8 <= job->columns && end - from >= 8; k += 8, from += job->bits) {            \
            memcpy(&some, from, 8);                                                              \
            some = SPREAD;                                                                       \
            memcpy(codes + k, &some, 8);                                                         \
        }                                                                                        \
        for (; k < job->columns; k += 8, from += job->bits) {                                    \
            some = 0;                                                                            \
            memcpy(&some, from, end - from < job->bits ? (size_t)(end - from) : (size_t)job->bits); \
            some = SPREAD;                                                                       \
            memcpy(codes + k, &some, job->columns - k < 8 ? (size_t)(job->columns - k) : 8);     \
        }                                                                                        \
        return 0;                                                                                \
    }

PACKED_ROWS(plain, , close_up(some, job->bits), spread_out(some, job->bits))
#if defined(__x86_64__)
#define OCTETS (0x0101010101010101u * ((1u << job->bits) - 1))
PACKED_ROWS(bmi, __attribute__((target("bmi2"))), _pext_u64(some, OCTETS), _pdep_u64(some, OCTETS))
#endif

typedef int (*Row)(const Grid *, int64_t);

static Row row_of(const Grid *job) {
    static const Row plain[TASKS] = {row_steps_plain, row_codes_plain, row_weights_plain,
                                     row_errors_plain, row_pack_plain, row_unpack_plain, row_moments_plain, row_beyond_plain};
#if defined(__x86_64__)
    static const Row narrow[TASKS] = {row_steps_narrow, row_codes_narrow, row_weights_narrow,
                                      row_errors_narrow, row_pack_bmi, row_unpack_bmi, row_moments_narrow, row_beyond_narrow};
    static const Row wide[TASKS] = {row_steps_wide, row_codes_wide, row_weights_wide,
                                    row_errors_wide, row_pack_bmi, row_unpack_bmi, row_moments_wide, row_beyond_wide};
    int level = level_of(job->level, AVX512);
    if (level == AVX512) return wide[job->task];
    if (level >= AVX2) return narrow[job->task];
#endif
    return plain[job->task];
}

typedef struct {
    const Grid *job;
    Row row;
    atomic_llong next, strange;
} Rows;

static void grid_rows(void *data) {
    Rows *rows = data;
    for (int64_t first; (first = atomic_fetch_add(&rows->next, ROWS_AT_ONCE)) < rows->job->rows;)
        for (int64_t row = first; row < first + ROWS_AT_ONCE && row < rows->job->rows; row++)
            if (rows->row(rows->job, row)) atomic_store(&rows->strange, 1);
}

/* 0, or 1 where something is not a number; what was written is then to be forgotten. */
int llmcompress_grid(const Grid *job) {
    Rows rows = {.job = job, .row = row_of(job)};
    together(job->team, grid_rows, &rows, job->rows * job->columns < FEW ? 1 : job->threads);
    return (int)atomic_load(&rows.strange);
}
