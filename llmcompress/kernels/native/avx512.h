/* 2, 3, 4 and 8 bits with AVX-512: sixteen lanes look sixteen codes up in one instruction.

   Codes stay as they are in the file. A lookup takes the low four bits of a lane, and tables are repeated to sixteen: what
   stands above a code of two or three bits then makes no difference. */
#ifndef AVX512_H
#define AVX512_H
#include <immintrin.h>
#include "blocks.h"

#define WIDE static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define WIDE_ENTRY static __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))

typedef struct { __m512i low, high; } Words;

/* The words of one block; `size` bytes of it are there, 16 * bits unless the row ends within it. */
WIDE Words block_words(const uint8_t *codes, int bits, int64_t size) {
    Words words = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    uint8_t tail[BLOCK];
    codes = whole_block(codes, bits, size, tail);
    if (bits == 4) {
        words.low = _mm512_loadu_si512(codes);
    } else if (bits == 2) {
        words.low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)codes));
    } else if (bits == 3) {  /* three bytes to a lane */
        const __m512i places = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
        const __m512i spread = _mm512_broadcast_i32x4(
            _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
        __m512i dense = _mm512_maskz_loadu_epi32(0x0fff, codes);
        words.low = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(places, dense), spread);
    } else {  /* four codes of a lane in either half */
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
        words.low = _mm512_permutex2var_epi32(first, even, second);
        words.high = _mm512_permutex2var_epi32(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), second);
    }
    return words;
}

/* What field j stands for, before scaling. `swapped`: the first code of a byte lies in its upper half. */
WIDE __m512 field(Words words, __m512 table, int bits, int swapped, int j) {
    if (bits < 8)
        return _mm512_permutexvar_ps(_mm512_srli_epi32(words.low, (unsigned)(bits * (swapped ? j ^ 1 : j))), table);
    __m512i half = j < 4 ? words.low : words.high;
    __m512i code = _mm512_and_si512(_mm512_srli_epi32(half, (unsigned)(8 * (j & 3))), _mm512_set1_epi32(255));
    return _mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(128.0f));
}

/* Scales or zero-points of the lanes of a block, of the few that begin at `from`. */
WIDE __m512 of_lanes(const float *from, __m512i lanes) {
    return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(from));
}

/* Sixteen scales that are 8-bit codes, from number `place` of the weight on; zero where they are not `there`. */
WIDE __m512 nested_scales(const Job *job, int64_t place, __mmask16 there) {
    const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, (const uint8_t *)job->scale + place));
    int64_t first = place >> 8, inside = place & 255;
    __m512i block = _mm512_srli_epi32(_mm512_add_epi32(counting, _mm512_set1_epi32((int)inside)), 8);
    __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, code, job->nested_map, 4);
    __m512 largest = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, block, job->nested_absmax + first, 4);
    return _mm512_maskz_mov_ps(there, _mm512_add_ps(_mm512_mul_ps(value, largest), _mm512_set1_ps(*job->nested_offset)));
}

/* Scales `g` to `g + 15` of one row, zero past its last one. */
WIDE __m512 sixteen_scales(const Job *job, int64_t row, int64_t g) {
    int64_t place = row * job->groups + g, left = job->groups - g;
    __mmask16 there = left < LANES ? (__mmask16)((1u << left) - 1) : 0xffff;
    if (job->scale_dtype == DOUBLE) return nested_scales(job, place, there);
    if (job->scale_dtype == F32) return _mm512_maskz_loadu_ps(there, (const float *)job->scale + place);
    __m256i bits = _mm256_maskz_loadu_epi16(there, (const uint16_t *)job->scale + place);
    if (job->scale_dtype == F16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* As `row_scales`, where there are groups. */
WIDE_ENTRY void wide_scales(const Job *job, int64_t row, float *to) {
    for (int64_t g = 0; g < job->groups; g += LANES) _mm512_storeu_ps(to + g, sixteen_scales(job, row, g));
    memset(to + job->groups, 0, LANES * sizeof(float));
}

/* As `fill_tables`, of a row that has a table for itself. */
WIDE_ENTRY void wide_tables(const Job *job, Quad *quad, int r) {
    const uint16_t *from = (const uint16_t *)job->table + (quad->row[r] << job->bits);
    __m256i halves;
    if (job->bits == 4) halves = _mm256_loadu_si256((const __m256i *)from);
    else if (job->bits == 3) halves = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
    else {
        int64_t four;
        memcpy(&four, from, sizeof four);
        halves = _mm256_set1_epi64x(four);
    }
    __m512 table = _mm512_cvtph_ps(halves);
    float most = _mm512_reduce_max_ps(_mm512_abs_ps(table)), inverse = most == 0.0f ? 0.0f : TABLE_MOST / most;
    __m256i integers = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(table, _mm512_set1_ps(inverse))));
    _mm512_storeu_ps(quad->table[r], table);
    _mm512_storeu_si512(quad->integers[r], _mm512_broadcast_i64x4(integers));
    quad->step[r] = most / TABLE_MOST;
}

/* Four rows times `count` tokens. One token: scale after the sum over a block; more: scale the weights, once for all. */
WIDE void quad_tokens(const Job *job, const Quad *quad, const Inputs *x, int64_t token, int bits, int swapped, int zeros,
                      int count) {
    int64_t blocks = (job->columns + BLOCK - 1) / BLOCK, size = LANES * bits;
    const __m512i lanes = _mm512_loadu_si512(quad->lanes);
    __m512 sum[ROWS][4], table[ROWS];
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        table[r] = _mm512_loadu_ps(quad->table[r]);
        UNROLL
        for (int t = 0; t < count; t++) sum[r][t] = _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < blocks; block++) {
        const float *from = x->values + token * blocks * BLOCK + block * BLOCK;
        int64_t rest = job->stride - block * size, place = scale_place(quad, block);
        Words words[ROWS];
        __m512 scale[ROWS], zero[ROWS], part[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            words[r] = block_words(quad->codes[r] + block * size, bits, rest);
            scale[r] = of_lanes(quad->scale[r] + place, lanes);
            if (zeros) zero[r] = of_lanes(quad->zero[r] + place, lanes);
            part[r] = _mm512_setzero_ps();
            _mm_prefetch((const char *)(quad->codes[r] + block * size + AHEAD), _MM_HINT_NTA);
            if (bits == 8) _mm_prefetch((const char *)(quad->codes[r] + block * size + AHEAD + 64), _MM_HINT_NTA);
        }
        UNROLL
        for (int j = 0; j < FIELDS; j++) {
            __m512 weight[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                weight[r] = field(words[r], table[r], bits, swapped, j);
                if (zeros) weight[r] = _mm512_sub_ps(weight[r], zero[r]);
                if (count > 1) weight[r] = _mm512_mul_ps(weight[r], scale[r]);
            }
            UNROLL
            for (int t = 0; t < count; t++) {
                __m512 input = _mm512_loadu_ps(from + t * blocks * BLOCK + j * LANES);
                UNROLL
                for (int r = 0; r < ROWS; r++) {
                    if (count == 1) part[r] = _mm512_fmadd_ps(weight[r], input, part[r]);
                    else sum[r][t] = _mm512_fmadd_ps(weight[r], input, sum[r][t]);
                }
            }
        }
        if (count == 1)
            UNROLL
            for (int r = 0; r < ROWS; r++) sum[r][0] = _mm512_fmadd_ps(part[r], scale[r], sum[r][0]);
    }
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int t = 0; t < count; t++)
            write_as(job->out, job->dtype, (token + t) * job->rows + quad->row[r], _mm512_reduce_add_ps(sum[r][t]));
}

WIDE void quad_all(const Job *job, const Quad *quad, const Inputs *x, int64_t token, int bits, int swapped, int zeros) {
    int64_t left = job->tokens - token;
    if (left >= 4) quad_tokens(job, quad, x, token, bits, swapped, zeros, 4);
    else if (left >= 2) {
        quad_tokens(job, quad, x, token, bits, swapped, zeros, 2);
        if (left == 3) quad_tokens(job, quad, x, token + 2, bits, swapped, zeros, 1);
    }
    else quad_tokens(job, quad, x, token, bits, swapped, zeros, 1);
}

#define WIDE_CASE(name, bits, swapped, zeros)                                                      \
    WIDE_ENTRY void name(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {        \
        quad_all(job, quad, x, token, bits, swapped, zeros);                                       \
    }
WIDE_CASE(wide_2, 2, 0, 0)
WIDE_CASE(wide_3, 3, 0, 0)
WIDE_CASE(wide_4, 4, 0, 0)
WIDE_CASE(wide_8, 8, 0, 0)
WIDE_CASE(wide_2_zeros, 2, 0, 1)
WIDE_CASE(wide_3_zeros, 3, 0, 1)
WIDE_CASE(wide_4_zeros, 4, 0, 1)
WIDE_CASE(wide_8_zeros, 8, 0, 1)
WIDE_CASE(wide_4_swapped, 4, 1, 0)

static Kernel wide_kernel(const Job *job) {
    static const Kernel plain[] = {wide_2, wide_3, wide_4, wide_8};
    static const Kernel zeros[] = {wide_2_zeros, wide_3_zeros, wide_4_zeros, wide_8_zeros};
    if (job->format == TABLE) return wide_4_swapped;
    int place = job->bits == 8 ? 3 : (int)job->bits - 2;
    return job->format == ASYMMETRIC ? zeros[place] : plain[place];
}
#endif
