/* What one call is about, and how a stored row is turned into numbers. Every field of a job has eight bytes, so that the
   caller can lay it out without a compiler. Codes, scales and zero-points are read where they lie, in the layout of the
   file (kernels/stored.py). */
#ifndef JOB_H
#define JOB_H
#include <stdint.h>
#include <string.h>

/* Small loops of fixed length, over things that must stay in registers. */
#define UNROLL _Pragma("GCC unroll 8")

enum { INT = 0, ASYMMETRIC = 1, TABLE = 2, CODEBOOK = 3 };  /* formats; TABLE is nf4 and fp4 */
enum { F32 = 0, BF16 = 1, F16 = 2, DOUBLE = 3 };            /* dtypes; DOUBLE: 8-bit codes of scales */
enum { BLOCK = 128, LANES = 16, FIELDS = 8, ROWS = 4, HIGH_BITS = 2, TABLE_MOST = 8191,
       INPUT_MOST = 32639, AHEAD = 8192 /* bytes between what is read and what is asked for */ };

typedef struct {
    int64_t rows, columns, tokens;
    int64_t format, bits, group, groups;  /* group 0: one scale of 1.0 for everything; groups of a row, at least 1 */
    int64_t stride;                   /* bytes of a row of codes */
    const uint8_t *codes;
    const void *scale;                /* of dtype scale_dtype, (rows, groups) */
    int64_t scale_dtype;
    const uint8_t *zero;              /* ASYMMETRIC: (rows, groups), in steps of 2**(bits - 8) codes */
    const void *table;                /* TABLE: float32 (16,); CODEBOOK: float16 (rows, 2**bits) */
    const float *nested_map, *nested_absmax, *nested_offset;  /* DOUBLE: (256,), one for each 256 scales, one */
    const uint8_t *high_mask, *high_codes;    /* columns with HIGH_BITS bits more, and their codes; or null */
    int64_t high_stride;
    const void *x;                    /* (tokens, columns) of dtype dtype */
    void *out;                        /* (tokens, rows) of dtype dtype */
    int64_t dtype, threads, level;
    void *team;                       /* GOMP_parallel of the caller's process, or null */
} Job;

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(wide >> 16 | 64);  /* NaN stays NaN */
    return (uint16_t)((wide + 0x7fffu + (wide >> 16 & 1)) >> 16);
}

static inline float from_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, wide;
    float value;
    if (rest >= 0x7c00) {
        wide = sign | 0x7f800000u | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        wide = sign | (rest + (112 << 10)) << 13;
    } else {  /* a multiple of 2**-24 */
        value = (float)rest * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_f16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint32_t sign = wide >> 16 & 0x8000, rest = wide & 0x7fffffff;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000u) {  /* below 2**-14: let the adder round to multiples of 2**-24 */
        float magnitude;
        memcpy(&magnitude, &rest, 4);
        magnitude += 0.5f;
        memcpy(&wide, &magnitude, 4);
        return (uint16_t)(sign | (wide - 0x3f000000u));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - (112u << 23)) >> 13);
}

static inline float read_as(const void *from, int64_t dtype, int64_t place) {
    if (dtype == F32) return ((const float *)from)[place];
    uint16_t bits = ((const uint16_t *)from)[place];
    return dtype == BF16 ? from_bf16(bits) : from_f16(bits);
}

static inline void write_as(void *to, int64_t dtype, int64_t place, float value) {
    if (dtype == F32) ((float *)to)[place] = value;
    else ((uint16_t *)to)[place] = dtype == BF16 ? to_bf16(value) : to_f16(value);
}

/* Scales of one row; `to` has room for LANES more, which become zero so that what lies past the end adds nothing. */
static inline void row_scales(const Job *job, int64_t row, float *to) {
    int64_t groups = job->groups, base = row * groups;
    if (!job->group) to[0] = 1.0f;
    else if (job->scale_dtype == DOUBLE) {
        const uint8_t *codes = (const uint8_t *)job->scale + base;
        float offset = *job->nested_offset;
        for (int64_t g = 0; g < groups; g++)
            to[g] = job->nested_map[codes[g]] * job->nested_absmax[(base + g) >> 8] + offset;
    } else if (job->scale_dtype == BF16) {
        const uint16_t *from = (const uint16_t *)job->scale + base;
        for (int64_t g = 0; g < groups; g++) to[g] = from_bf16(from[g]);
    } else if (job->scale_dtype == F32) {
        memcpy(to, (const float *)job->scale + base, (size_t)groups * sizeof(float));
    } else {
        const uint16_t *from = (const uint16_t *)job->scale + base;
        for (int64_t g = 0; g < groups; g++) to[g] = from_f16(from[g]);
    }
    memset(to + groups, 0, LANES * sizeof(float));
}

/* Zero-points of one row in codes, less the middle code. */
static inline void row_zeros(const Job *job, int64_t row, float *to) {
    int64_t groups = job->groups;
    float step = 1.0f / (float)(1 << (8 - job->bits)), middle = (float)(1 << (job->bits - 1));
    for (int64_t g = 0; g < groups; g++) to[g] = (float)job->zero[row * groups + g] * step - middle;
    memset(to + groups, 0, LANES * sizeof(float));
}

/* What the codes of one row stand for before scaling, `2**bits` values. */
static inline void row_table(const Job *job, int64_t row, float *to) {
    int count = 1 << job->bits;
    for (int code = 0; code < count; code++) {
        if (job->format == TABLE) to[code] = ((const float *)job->table)[code];
        else if (job->format == CODEBOOK) to[code] = from_f16(((const uint16_t *)job->table)[row * count + code]);
        else to[code] = (float)(code - count / 2);
    }
}
#endif
