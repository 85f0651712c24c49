/* 2, 3, 4 and 8 bits with AVX2: the sixteen lanes of a block in two halves of eight. */
#ifndef AVX2_H
#define AVX2_H
#include "blocks.h"
#include "lanes256.h"

#define NARROW static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define NARROW_ENTRY static __attribute__((target("avx2,fma,f16c")))

typedef struct { __m256i low, high; } Half;

/* The words of one half of a block; `size` bytes of the block are there. */
NARROW Half half_words(const uint8_t *codes, int bits, int64_t size, int half) {
    Half words = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    uint8_t tail[BLOCK + 32];
    if (size < LANES * bits + 4) {  /* with three bits, four bytes more are read than used */
        memset(tail, 0, sizeof tail);
        memcpy(tail, codes, (size_t)(size < LANES * bits ? size : LANES * bits));
        codes = tail;
    }
    codes += half * 8 * bits;
    if (bits == 4) {
        words.low = _mm256_loadu_si256((const __m256i *)codes);
    } else if (bits == 2) {
        words.low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)codes));
    } else if (bits == 3) {
        const __m256i spread = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
        __m256i dense = _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(codes + 12)),
                                         _mm_loadu_si128((const __m128i *)codes));
        words.low = _mm256_shuffle_epi8(dense, spread);
    } else {
        const __m256i apart = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
        __m256i first = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)codes), apart);
        __m256i second = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(codes + 32)), apart);
        words.low = _mm256_permute2x128_si256(first, second, 0x20);
        words.high = _mm256_permute2x128_si256(first, second, 0x31);
    }
    return words;
}

/* What field j stands for, before scaling; a lookup takes the low three bits of a lane. */
NARROW __m256 half_field(Half words, __m256 low, __m256 high, int bits, int swapped, int j) {
    int shift = swapped ? 4 * (j ^ 1) : bits < 8 ? bits * j : 8 * (j & 3);
    __m256i moved = _mm256_srli_epi32(bits == 8 && j > 3 ? words.high : words.low, shift);
    if (bits < 4) return _mm256_permutevar8x32_ps(low, moved);
    if (bits == 4) {
        __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(words.low, 28 - shift));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, moved), _mm256_permutevar8x32_ps(high, moved), fourth);
    }
    __m256 code = _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(255)));
    return _mm256_sub_ps(code, _mm256_set1_ps(128.0f));
}

/* Two rows, from `pair` on, times `count` tokens. */
NARROW void pair_tokens(const Job *job, const Quad *quad, const Inputs *x, int64_t token, int pair, int bits, int swapped,
                        int zeros, int count) {
    int64_t blocks = (job->columns + BLOCK - 1) / BLOCK, size = LANES * bits;
    __m256 sum[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()}, {_mm256_setzero_ps(), _mm256_setzero_ps()}};
    for (int64_t step = 0; step < 2 * blocks; step++) {
        int64_t block = step / 2, half = step % 2, place = scale_place(quad, block);
        const float *from = x->values + token * blocks * BLOCK + block * BLOCK + half * 8;
        __m256i lanes = _mm256_loadu_si256((const __m256i *)(quad->lanes + half * 8));
        UNROLL
        for (int r = 0; r < 2; r++) {
            const float *scales = quad->scale[pair + r] + place, *points = quad->zero[pair + r] + place;
            Half words = half_words(quad->codes[pair + r] + block * size, bits, job->stride - block * size, (int)half);
            __m256 low = _mm256_loadu_ps(quad->table[pair + r]), high = _mm256_loadu_ps(quad->table[pair + r] + 8);
            __m256 scale = _mm256_i32gather_ps(scales, lanes, 4), part[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            __m256 zero = zeros ? _mm256_i32gather_ps(points, lanes, 4) : _mm256_setzero_ps();
            UNROLL
            for (int j = 0; j < FIELDS; j++) {
                __m256 weight = half_field(words, low, high, bits, swapped, j);
                if (zeros) weight = _mm256_sub_ps(weight, zero);
                UNROLL
                for (int t = 0; t < count; t++)
                    part[t] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(from + t * blocks * BLOCK + j * LANES), part[t]);
            }
            UNROLL
            for (int t = 0; t < count; t++) sum[r][t] = _mm256_fmadd_ps(part[t], scale, sum[r][t]);
        }
    }
    UNROLL
    for (int r = 0; r < 2; r++)
        UNROLL
        for (int t = 0; t < count; t++)
            write_as(job->out, job->dtype, (token + t) * job->rows + quad->row[pair + r], sum_of(sum[r][t]));
}

NARROW void quad_narrow(const Job *job, const Quad *quad, const Inputs *x, int64_t token, int bits, int swapped, int zeros) {
    int64_t end = token + 4 < job->tokens ? token + 4 : job->tokens;
    for (; token + 1 < end; token += 2)
        UNROLL
        for (int pair = 0; pair < ROWS; pair += 2) pair_tokens(job, quad, x, token, pair, bits, swapped, zeros, 2);
    if (token < end)
        UNROLL
        for (int pair = 0; pair < ROWS; pair += 2) pair_tokens(job, quad, x, token, pair, bits, swapped, zeros, 1);
}

#define NARROW_CASE(name, bits, swapped, zeros)                                                    \
    NARROW_ENTRY void name(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {      \
        quad_narrow(job, quad, x, token, bits, swapped, zeros);                                    \
    }
NARROW_CASE(narrow_2, 2, 0, 0)
NARROW_CASE(narrow_3, 3, 0, 0)
NARROW_CASE(narrow_4, 4, 0, 0)
NARROW_CASE(narrow_8, 8, 0, 0)
NARROW_CASE(narrow_2_zeros, 2, 0, 1)
NARROW_CASE(narrow_3_zeros, 3, 0, 1)
NARROW_CASE(narrow_4_zeros, 4, 0, 1)
NARROW_CASE(narrow_8_zeros, 8, 0, 1)
NARROW_CASE(narrow_4_swapped, 4, 1, 0)

static Kernel narrow_kernel(const Job *job) {
    static const Kernel plain[] = {narrow_2, narrow_3, narrow_4, narrow_8};
    static const Kernel zeros[] = {narrow_2_zeros, narrow_3_zeros, narrow_4_zeros, narrow_8_zeros};
    if (job->format == TABLE) return narrow_4_swapped;
    int place = job->bits == 8 ? 3 : (int)job->bits - 2;
    return job->format == ASYMMETRIC ? zeros[place] : plain[place];
}
#endif
