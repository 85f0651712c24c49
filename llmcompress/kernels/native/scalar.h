/* Any format of one width, on any processor: a row is unpacked to float32 and multiplied with each token. */
#ifndef SCALAR_H
#define SCALAR_H
#include "job.h"

static inline unsigned code_at(const uint8_t *row, int64_t bits, int64_t place) {
    int64_t bit = place * bits;
    unsigned low = row[bit >> 3], shift = bit & 7;
    if (shift + bits > 8) low |= (unsigned)row[(bit >> 3) + 1] << 8;  /* the last code ends where the row does */
    return low >> shift & ((1u << bits) - 1);
}

static void unpack_row(const Job *job, int64_t row, const float *scale, float *to) {
    float table[256], step = 1.0f / (float)(1 << (8 - job->bits));
    const uint8_t *codes = job->codes + row * job->stride;
    int64_t groups = job->groups, group = -1, left = 0;
    row_table(job, row, table);
    float zero = 0.0f;
    for (int64_t column = 0; column < job->columns; column++) {
        if (left-- == 0) {
            group++;
            left = (job->group ? job->group : job->columns) - 1;
            if (job->format == ASYMMETRIC)
                zero = (float)job->zero[row * groups + group] * step - (float)(1 << (job->bits - 1));
        }
        if (job->format == TABLE) {  /* the first of a pair lies in the upper half */
            uint8_t pair = codes[column >> 1];
            to[column] = table[column & 1 ? pair & 15 : pair >> 4] * scale[group];
        } else {
            to[column] = (table[code_at(codes, job->bits, column)] - zero) * scale[group];
        }
    }
}

static inline __attribute__((always_inline)) float dot(const float *left, const float *right, int64_t count) {
    float parts[LANES] = {0};
    int64_t place = 0;
    for (; place + LANES <= count; place += LANES)
        for (int lane = 0; lane < LANES; lane++) parts[lane] += left[place + lane] * right[place + lane];
    float sum = 0.0f;
    for (; place < count; place++) sum += left[place] * right[place];
    for (int lane = 0; lane < LANES; lane++) sum += parts[lane];
    return sum;
}

/* Rows [first, last); `x` is float32 (tokens, columns); `scratch` has room for two rows and LANES more. */
static void rows_scalar(const Job *job, const float *x, int64_t first, int64_t last, float *scratch) {
    float *weights = scratch, *scale = scratch + job->columns;
    for (int64_t row = first; row < last; row++) {
        row_scales(job, row, scale);
        unpack_row(job, row, scale, weights);
        for (int64_t token = 0; token < job->tokens; token++)
            write_as(job->out, job->dtype, token * job->rows + row,
                     dot(weights, x + token * job->columns, job->columns));
    }
}
#endif
