/* AVX-512 VNNI and VBMI, for inputs of 16 bits: what codes looked up in a table (words.h) and codes that are integers
   (bytes.h) have in common.

   The inputs of a block of 128 become integers of 16 bits times a scale of the block (error 3e-5 of what they are, where bfloat16
   outputs have 2e-3). Products are summed in integers within a lane, which is exact, and lanes become float32 block by block. */
#ifndef VNNI_H
#define VNNI_H
#include <immintrin.h>
#include "avx512.h"

#define DEEP static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")))
#define DEEP_ENTRY static __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")))

/* What is the same for every block. `words`: codes are looked up; `swapped`: the first code of a byte lies in its upper half;
   `zeros`: there are zero-points; `begin` to `end` are places in the quad, `count` is tokens at a time. */
typedef struct { int bits, words, swapped, zeros, begin, end, count; } Shape;

DEEP __m512 of_lanes16(const float *from, __m512i lanes, int whole) {
    return whole ? _mm512_set1_ps(*from) : _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(from));
}

/* Six bytes of the 48 of a block of three bits to every 64 bits. */
DEEP __m512i three_spread(const uint8_t *codes, int64_t size) {
    const __m512i spread = _mm512_set_epi8(
        -1, -1, 47, 46, 45, 44, 43, 42, -1, -1, 41, 40, 39, 38, 37, 36, -1, -1, 35, 34, 33, 32, 31, 30, -1, -1, 29, 28,
        27, 26, 25, 24, -1, -1, 23, 22, 21, 20, 19, 18, -1, -1, 17, 16, 15, 14, 13, 12, -1, -1, 11, 10, 9, 8, 7, 6, -1,
        -1, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_epi8(spread, size >= 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi32(0x0fff, codes));
}

/* Sixteen inputs of 16 bits as float32. */
DEEP __m512 sixteen(const uint16_t *from, int64_t dtype) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)from);
    return dtype == F16 ? _mm512_cvtph_ps(bits) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* One block of inputs as integers, sixteen at a time, zeros past the end; returns what one of them stands for. */
DEEP float rounded_block(const Job *job, int64_t token, int64_t block, __m512i to[FIELDS]) {
    int64_t begin = block * BLOCK;
    const uint16_t *from = (const uint16_t *)job->x + token * job->columns + begin;
    uint16_t tail[BLOCK] = {0};
    if (job->columns - begin < BLOCK) from = memcpy(tail, from, (size_t)(job->columns - begin) * 2);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);  /* bits in the order of sizes, those of NaN last */
    __m512i largest = _mm512_setzero_si512();
    UNROLL
    for (int v = 0; v < FIELDS; v++)
        largest = _mm512_max_epi32(largest, _mm512_and_si512(magnitude, _mm512_castps_si512(sixteen(from + v * LANES, job->dtype))));
    int32_t bits = _mm512_reduce_max_epi32(largest);
    float most, inverse;
    memcpy(&most, &bits, sizeof most);
    float scale = scale_of_inputs(most, &inverse);
    UNROLL
    for (int v = 0; v < FIELDS; v++) to[v] = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(from + v * LANES, job->dtype), _mm512_set1_ps(inverse)));
    return scale;
}
#endif
