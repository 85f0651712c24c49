/* Vectors of 256 bits, as kernels for AVX2 share them. */
#ifndef LANES256_H
#define LANES256_H
#include <immintrin.h>
#include "job.h"

#define SLIM static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define SLIM_ENTRY static __attribute__((target("avx2,fma,f16c")))

SLIM __m256i load256(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
SLIM void store256(void *to, __m256i value) { _mm256_storeu_si256((__m256i *)to, value); }

/* Eight numbers of 16 bits as float32. */
SLIM __m256 eight(const uint16_t *from, int64_t dtype) {
    __m128i bits = _mm_loadu_si128((const __m128i *)from);
    return dtype == F16 ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

SLIM float sum_of(__m256 lanes) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* The table of a row that has one for itself, repeated to sixteen. */
SLIM void read_book(const Job *job, int64_t row, __m256 *first, __m256 *second) {
    const uint16_t *from = (const uint16_t *)job->table + (row << job->bits);
    __m128i low, high;
    if (job->bits == 2) {
        int64_t four;
        memcpy(&four, from, sizeof four);
        low = high = _mm_set1_epi64x(four);
    } else {
        low = _mm_loadu_si128((const __m128i *)from);
        high = job->bits == 4 ? _mm_loadu_si128((const __m128i *)(from + 8)) : low;
    }
    *first = _mm256_cvtph_ps(low), *second = _mm256_cvtph_ps(high);
}

/* Scales of a row as float32, as `row_scales`. */
SLIM_ENTRY void narrow_scales(const Job *job, int64_t row, float *to) {
    int64_t g = 0, first = row * job->groups;
    if (job->scale_dtype == F32 || job->scale_dtype == DOUBLE || !job->group) {
        row_scales(job, row, to);
        return;
    }
    const uint16_t *from = (const uint16_t *)job->scale + first;
    for (; g + 8 <= job->groups; g += 8) _mm256_storeu_ps(to + g, eight(from + g, job->scale_dtype));
    for (; g < job->groups; g++) to[g] = read_as(from, job->scale_dtype, g);
    memset(to + job->groups, 0, LANES * sizeof(float));
}
#endif
