/* 2, 3, 4 and 8 bits with AVX2 in float32, exact to rounding: the sixteen lanes of a block in two halves of eight. */
#ifndef AVX2_H
#define AVX2_H
#include "blocks.h"
#include "lanes256.h"

#define NARROW static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define NARROW_ENTRY static __attribute__((target("avx2,fma,f16c")))

typedef struct { __m256i low, high; } Half;

/* How codes become numbers: `looked_up`, of 4 bits; those of 2 and 3 bits always are, those of 8 never. */
typedef struct { int bits, looked_up, swapped, zeros, count; } Look;

/* The words of one half of a block. */
NARROW Half half_words(const uint8_t *codes, int bits, int half) {
    Half words = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    codes += half * 8 * bits;
    if (bits == 4) {
        words.low = _mm256_loadu_si256((const __m256i *)codes);
    } else if (bits == 2) {
        words.low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)codes));
    } else if (bits == 3) {
        const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                                4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
        __m256i dense = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)codes)),
                                                _mm_loadu_si128((const __m128i *)(codes + 8)), 1);
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

/* What field j stands for, before scaling and less `zero`; a lookup takes the low three bits of a lane. */
NARROW __m256 half_field(Half words, const __m256 table[2], __m256 zero, Look is, int j) {
    int shift = is.swapped ? 4 * (j ^ 1) : is.bits < 8 ? is.bits * j : 8 * (j & 3);
    __m256i moved = _mm256_srli_epi32(is.bits == 8 && j > 3 ? words.high : words.low, shift);
    if (is.bits == 8 || (is.bits == 4 && !is.looked_up)) {
        __m256i code = _mm256_and_si256(moved, _mm256_set1_epi32((1 << is.bits) - 1));
        return _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero);
    }
    __m256 found = _mm256_permutevar8x32_ps(table[0], moved);
    if (is.bits == 4) {
        __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(words.low, 28 - shift));
        found = _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(table[1], moved), fourth);
    }
    return is.zeros ? _mm256_sub_ps(found, zero) : found;
}

/* Scales or zero-points of the lanes of half a block, whose own begin at `from`; `lanes`: which each lane takes of them. */
NARROW __m256 of_half(const Quad *quad, const float *from, int half, __m256i lanes) {
    if (quad->per_block == 1) return _mm256_broadcast_ss(from);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + half * quad->per_block / 2), lanes);
}

/* One block of row `r` times some tokens, added to `sum`; its scales begin at `place`. */
NARROW void narrow_block(const Quad *quad, int r, const uint8_t *codes, const float *x, int64_t step, int64_t place, Look is,
                         __m256 sum[4]) {
    const __m256 table[2] = {_mm256_loadu_ps(quad->table[r]), _mm256_loadu_ps(quad->table[r] + 8)};
    const __m256i lanes = _mm256_loadu_si256((const __m256i *)quad->lanes);
    UNROLL
    for (int half = 0; half < 2; half++) {
        Half words = half_words(codes, is.bits, half);
        __m256 part[4], zero = _mm256_set1_ps((is.bits == 4 && !is.looked_up) || is.bits == 8 ? (float)(1 << (is.bits - 1)) : 0.0f);
        if (is.zeros) zero = _mm256_add_ps(zero, of_half(quad, quad->zero[r] + place, half, lanes));
        UNROLL
        for (int j = 0; j < FIELDS; j++) {
            __m256 weight = half_field(words, table, zero, is, j);
            UNROLL
            for (int t = 0; t < is.count; t++) {
                __m256 input = _mm256_loadu_ps(x + t * step + j * LANES + half * 8);
                part[t] = j ? _mm256_fmadd_ps(weight, input, part[t]) : _mm256_mul_ps(weight, input);
            }
        }
        __m256 scale = of_half(quad, quad->scale[r] + place, half, lanes);
        UNROLL
        for (int t = 0; t < is.count; t++) sum[t] = _mm256_fmadd_ps(part[t], scale, sum[t]);
    }
}

/* Four rows times some tokens, one row after the other. */
NARROW void narrow_tokens(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Look is) {
    int64_t size = LANES * is.bits, blocks = (job->columns + BLOCK - 1) / BLOCK, step = blocks * BLOCK;
    for (int r = 0; r < ROWS; r++) {
        __m256 sum[4];
        Walk walk = {0};
        UNROLL
        for (int t = 0; t < is.count; t++) sum[t] = _mm256_setzero_ps();
        for (int64_t block = 0; block < blocks; block++, next_block(quad, &walk)) {
            uint8_t tail[BLOCK];
            const uint8_t *codes = whole_block(quad->codes[r] + block * size, is.bits, job->stride - block * size, tail);
            _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_NTA);
            if (is.bits == 8) _mm_prefetch((const char *)(codes + AHEAD + 64), _MM_HINT_NTA);
            narrow_block(quad, r, codes, x->values + token * step + block * BLOCK, step, walk.place, is, sum);
        }
        UNROLL
        for (int t = 0; t < is.count; t++) write_as(job->out, job->dtype, (token + t) * job->rows + quad->row[r], sum_of(sum[t]));
    }
}

NARROW void quad_narrow(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Look is) {
    int64_t left = job->tokens - token;
    if (left >= 4) is.count = 4, narrow_tokens(job, quad, x, token, is);
    else if (left >= 2) is.count = 2, narrow_tokens(job, quad, x, token, is);
    if (left == 1 || left == 3) is.count = 1, narrow_tokens(job, quad, x, job->tokens - 1, is);
}

/* As `fill_tables`, of a row that has a table for itself; float32 alone. */
NARROW_ENTRY void narrow_tables(const Job *job, Quad *quad, int r) {
    __m256 first, second;
    read_book(job, quad->row[r], &first, &second);
    _mm256_storeu_ps(quad->table[r], first), _mm256_storeu_ps(quad->table[r] + 8, second);
}

#define NARROW_CASE(name, ...)                                                                     \
    NARROW_ENTRY void name(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {      \
        quad_narrow(job, quad, x, token, (Look){__VA_ARGS__, 0});                                   \
    }
NARROW_CASE(narrow_2, 2, 1, 0, 0)
NARROW_CASE(narrow_3, 3, 1, 0, 0)
NARROW_CASE(narrow_4, 4, 0, 0, 0)
NARROW_CASE(narrow_8, 8, 0, 0, 0)
NARROW_CASE(narrow_2_zeros, 2, 1, 0, 1)
NARROW_CASE(narrow_3_zeros, 3, 1, 0, 1)
NARROW_CASE(narrow_4_zeros, 4, 0, 0, 1)
NARROW_CASE(narrow_8_zeros, 8, 0, 0, 1)
NARROW_CASE(narrow_4_book, 4, 1, 0, 0)
NARROW_CASE(narrow_4_table, 4, 1, 1, 0)

static Kernel narrow_kernel(const Job *job) {
    static const Kernel plain[] = {narrow_2, narrow_3, narrow_4, narrow_8};
    static const Kernel zeros[] = {narrow_2_zeros, narrow_3_zeros, narrow_4_zeros, narrow_8_zeros};
    if (job->format == TABLE) return narrow_4_table;
    if (job->format == CODEBOOK && job->bits == 4) return narrow_4_book;
    int place = job->bits == 8 ? 3 : (int)job->bits - 2;
    return job->format == ASYMMETRIC ? zeros[place] : plain[place];
}
#endif
