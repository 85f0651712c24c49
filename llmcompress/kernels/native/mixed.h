/* Columns of two widths. A row has the codes of its narrow columns and, apart, those of its high ones, each in the order of columns.
   Inputs are brought into the same order, so that both are straight lines, in which the columns of a group lie side by side. */
#ifndef MIXED_H
#define MIXED_H
#include <stdlib.h>
#include "processor.h"
#include "scalar.h"

#define ANYWHERE static inline __attribute__((always_inline))

enum { IN_BYTE = 4, AT_ONCE = 8 };

/* What is the same for all rows. `ends`: where each group ends among the narrow columns, and among the high ones; `codes`: what a
   byte of codes of 2 and 4 bits stands for, for either width. */
typedef struct {
    int64_t narrow, *ends;
    float codes[2][256 * IN_BYTE];
} Mixed;

static int is_high(const Job *job, int64_t column) { return job->high_mask[column >> 3] >> (column & 7) & 1; }

/* Or null, where there is no memory. Whoever asks frees it. */
static Mixed *mixed_of(const Job *job) {
    Mixed *to = malloc(sizeof(Mixed) + (size_t)job->groups * 2 * sizeof(int64_t));
    if (!to) return NULL;
    int64_t count[2] = {0, 0};
    to->ends = (int64_t *)(to + 1);
    for (int64_t column = 0; column < job->columns; column++) {
        count[is_high(job, column)]++;
        int64_t group = job->group ? column / job->group : 0;
        to->ends[2 * group] = count[0], to->ends[2 * group + 1] = count[1];
    }
    to->narrow = count[0];
    for (int high = 0; high < 2; high++) {
        int bits = (int)job->bits + high * HIGH_BITS, each = bits == 2 || bits == 4 ? 8 / bits : 0;
        for (int place = 0; place < 256 * each; place++)
            to->codes[high][place] = (float)((place / each >> bits * (place % each)) & ((1 << bits) - 1)) - (float)(1 << (bits - 1));
    }
    return to;
}

/* Inputs of one token in that order; high ones a quarter, as their codes are. */
static void mixed_inputs(const Job *job, const Mixed *mixed, int64_t token, float *to) {
    float *next[2] = {to, to + mixed->narrow};
    for (int64_t column = 0; column < job->columns; column++) {
        int high = is_high(job, column);
        *next[high]++ = read_as(job->x, job->dtype, token * job->columns + column) * (high ? 0.25f : 1.0f);
    }
}

/* `count` codes, less the middle one; `bytes` has what a byte of 2 or 4 bits stands for. */
ANYWHERE void unpack_line(const uint8_t *from, int64_t bits, int64_t count, const float *bytes, float *to) {
    int64_t done = 0, mask = (1 << bits) - 1, middle = 1 << (bits - 1);
    if (bits == 2)
        for (; done + 4 <= count; done += 4) memcpy(to + done, bytes + *from++ * 4, 4 * sizeof(float));
    else if (bits == 4)
        for (; done + 2 <= count; done += 2) memcpy(to + done, bytes + *from++ * 2, 2 * sizeof(float));
    else
        for (; done + AT_ONCE <= count; done += AT_ONCE, from += bits) {
            uint64_t word = 0;
            for (int64_t byte = 0; byte < bits; byte++) word |= (uint64_t)from[byte] << 8 * byte;
            for (int64_t place = 0; place < AT_ONCE; place++) to[done + place] = (float)((int64_t)(word >> bits * place) & mask) - (float)middle;
        }
    for (int64_t place = 0; done < count; done++, place++) to[done] = (float)code_at(from, bits, place) - (float)middle;
}

ANYWHERE void rows_anywhere(const Job *job, const Mixed *mixed, const float *x, int64_t first, int64_t last, float *scratch) {
    float *weights = scratch, *scale = scratch + job->columns;
    int64_t narrow = mixed->narrow;
    for (int64_t row = first; row < last; row++) {
        row_scales(job, row, scale);
        unpack_line(job->codes + row * job->stride, job->bits, narrow, mixed->codes[0], weights);
        unpack_line(job->high_codes + row * job->high_stride, job->bits + HIGH_BITS, job->columns - narrow, mixed->codes[1], weights + narrow);
        for (int64_t token = 0; token < job->tokens; token++) {
            const float *inputs = x + token * job->columns;
            float sum = 0.0f;
            int64_t low = 0, high = narrow;
            for (int64_t group = 0; group < job->groups; group++) {
                int64_t low_end = mixed->ends[2 * group], high_end = narrow + mixed->ends[2 * group + 1];
                sum += scale[group] * (dot(weights + low, inputs + low, low_end - low) + dot(weights + high, inputs + high, high_end - high));
                low = low_end, high = high_end;
            }
            write_as(job->out, job->dtype, token * job->rows + row, sum);
        }
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void rows_avx2(const Job *job, const Mixed *mixed, const float *x, int64_t first, int64_t last,
                                                      float *scratch) {
    rows_anywhere(job, mixed, x, first, last, scratch);
}
#endif

/* Rows [first, last), as `rows_scalar`; `x` is what `mixed_inputs` made. The same bits at every level. */
static void rows_mixed(const Job *job, const Mixed *mixed, const float *x, int64_t first, int64_t last, float *scratch) {
#if defined(__x86_64__)
    if (level_of(job->level, AVX2) == AVX2) {
        rows_avx2(job, mixed, x, first, last, scratch);
        return;
    }
#endif
    rows_anywhere(job, mixed, x, first, last, scratch);
}
#endif
