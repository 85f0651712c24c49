/* 2, 3, 4 and 8 bits with AVX-512 VNNI and VBMI, for inputs of 16 bits: 32 products in one instruction.

   The inputs of a block of 128 become 16-bit integers times a scale of the block (error 3e-5 of what they are, where bfloat16
   outputs have 2e-3), and tables become integers: what a code stands for where that is one, else 13 bits of it and a scale
   for the row. Sums of a lane then are exact in 32 bits: 8 * 32767 * 8191 < 2**31.
   A register holds 32 words of four codes: field j of word w is code 4 w + j, so that lane l again has codes 8 l .. 8 l + 7. */
#ifndef VNNI_H
#define VNNI_H
#include <immintrin.h>
#include "blocks.h"

#define DEEP static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")))
#define DEEP_ENTRY static __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")))

typedef struct { __m512i low, high; } Quarters;

/* The words of one block; `size` bytes of it are there, 16 * bits unless the row ends within it. */
DEEP Quarters quarter_words(const uint8_t *codes, int bits, int64_t size) {
    Quarters words = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    uint8_t tail[BLOCK];
    codes = whole_block(codes, bits, size, tail);
    if (bits == 4) {
        words.low = _mm512_loadu_si512(codes);
    } else if (bits == 2) {
        words.low = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    } else if (bits == 3) {  /* six bytes, four words of twelve bits, to every 64 bits */
        const __m512i spread = _mm512_set_epi8(
            -1, -1, 47, 46, 45, 44, 43, 42, -1, -1, 41, 40, 39, 38, 37, 36, -1, -1, 35, 34, 33, 32, 31, 30, -1, -1, 29, 28,
            27, 26, 25, 24, -1, -1, 23, 22, 21, 20, 19, 18, -1, -1, 17, 16, 15, 14, 13, 12, -1, -1, 11, 10, 9, 8, 7, 6, -1,
            -1, 5, 4, 3, 2, 1, 0);
        words.low = _mm512_permutexvar_epi8(
            spread, size >= 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi32(0x0fff, codes));
    } else {  /* codes 4 w and 4 w + 1, codes 4 w + 2 and 4 w + 3 */
        const __m512i ones = _mm512_set1_epi16(1);
        const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
                                              30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
        words.low = _mm512_permutex2var_epi16(first, even, second);
        words.high = _mm512_permutex2var_epi16(first, _mm512_or_si512(even, ones), second);
    }
    return words;
}

/* What field j stands for, as an integer; with 8 bits the code itself. A lookup takes the low five bits of a word. */
DEEP __m512i quarter_field(Quarters words, __m512i table, int bits, int swapped, int j) {
    if (bits == 3) {  /* of the eight places that are picked, every second is a word's lower half; the others do not count */
        const __m512i places = _mm512_set1_epi64(0x00240018000c0000ll + 0x0003000300030003ll * j);
        return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(places, words.low), table);
    }
    if (bits < 8) {
        int shift = bits * (swapped ? j ^ 1 : j);
        return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(words.low, (unsigned)shift) : words.low, table);
    }
    __m512i half = j < 2 ? words.low : words.high;
    return j & 1 ? _mm512_srli_epi16(half, 8) : _mm512_and_si512(half, _mm512_set1_epi16(255));
}

DEEP __m512 of_lanes16(const float *from, __m512i lanes, int whole) {
    return whole ? _mm512_set1_ps(*from) : _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(from));
}

/* Sixteen inputs of 16 bits as float32. */
DEEP __m512 sixteen(const uint16_t *from, int64_t dtype) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)from);
    return dtype == F16 ? _mm512_cvtph_ps(bits) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* One block of inputs as integers, in the order of `Inputs`; what lies past the end becomes zeros. */
DEEP_ENTRY void deep_inputs(const Job *job, const Inputs *x, int64_t token, int64_t block) {
    int64_t input = token * ((job->columns + BLOCK - 1) / BLOCK) + block, begin = block * BLOCK;
    const uint16_t *from = (const uint16_t *)job->x + token * job->columns + begin;
    uint16_t tail[BLOCK] = {0};
    if (job->columns - begin < BLOCK) from = memcpy(tail, from, (size_t)(job->columns - begin) * 2);
    __m512 largest = _mm512_setzero_ps();
    for (int v = 0; v < FIELDS; v++) largest = _mm512_max_ps(largest, _mm512_abs_ps(sixteen(from + v * LANES, job->dtype)));
    float most = _mm512_reduce_max_ps(largest);
    __m512 inverse = _mm512_set1_ps(most > 0.0f ? INPUT_MOST / most : 0.0f);
    __m512i dense[4], sums = _mm512_setzero_si512();
    for (int v = 0; v < 4; v++) {
        __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(from + 2 * v * LANES, job->dtype), inverse));
        __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(from + (2 * v + 1) * LANES, job->dtype), inverse));
        dense[v] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
    }
    const __m512i fourth = _mm512_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0,
                                            60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    for (int j = 0; j < 4; j++) {
        __m512i places = _mm512_add_epi16(fourth, _mm512_set1_epi16((int16_t)j));
        __m512i first = _mm512_permutex2var_epi16(dense[0], places, dense[1]);
        __m512i field = _mm512_inserti64x4(first, _mm512_castsi512_si256(_mm512_permutex2var_epi16(dense[2], places, dense[3])), 1);
        _mm512_storeu_si512(x->integers + input * BLOCK + j * 2 * LANES, field);
        sums = _mm512_add_epi32(sums, _mm512_madd_epi16(field, _mm512_set1_epi16(1)));
    }
    _mm512_storeu_ps(x->sums + input * LANES, _mm512_cvtepi32_ps(sums));
    x->scale[input] = most / INPUT_MOST;
}

/* What is the same for every block; `begin` to `end` are places in the quad. */
typedef struct { int bits, swapped, zeros, begin, end, count; } Shape;

/* One block, of which `rest` bytes are there in each row. */
DEEP void deep_block(const Job *job, const Quad *quad, const Inputs *x, int64_t first, int64_t block, int64_t rest,
                     Shape is, __m512 sum[ROWS][4]) {
    int64_t blocks = (job->columns + BLOCK - 1) / BLOCK, size = LANES * is.bits, place = scale_place(quad, block);
    const __m512i lanes = _mm512_loadu_si512(quad->lanes);
    Quarters words[ROWS];
    __m512i part[ROWS][4];
    UNROLL
    for (int r = is.begin; r < is.end; r++) {
        const uint8_t *codes = quad->codes[r] + block * size;
        words[r] = quarter_words(codes, is.bits, rest);
        _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_NTA);
        if (is.bits == 8) _mm_prefetch((const char *)(codes + AHEAD + 64), _MM_HINT_NTA);
        UNROLL
        for (int t = 0; t < is.count; t++) part[r][t] = _mm512_setzero_si512();
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        __m512i weight[ROWS];
        UNROLL
        for (int r = is.begin; r < is.end; r++)
            weight[r] = quarter_field(words[r], _mm512_loadu_si512(quad->integers[r]), is.bits, is.swapped, j);
        UNROLL
        for (int t = 0; t < is.count; t++) {
            __m512i input = _mm512_loadu_si512(x->integers + ((first + t) * blocks + block) * BLOCK + j * 2 * LANES);
            UNROLL
            for (int r = is.begin; r < is.end; r++) part[r][t] = _mm512_dpwssd_epi32(part[r][t], weight[r], input);
        }
    }
    UNROLL
    for (int r = is.begin; r < is.end; r++) {
        __m512 scale = of_lanes16(quad->scale[r] + place, lanes, quad->per_block == 1), zero = _mm512_setzero_ps();
        if (is.zeros) zero = of_lanes16(quad->zero[r] + place, lanes, quad->per_block == 1);
        if (is.bits == 8) zero = _mm512_add_ps(zero, _mm512_set1_ps(128.0f));
        UNROLL
        for (int t = 0; t < is.count; t++) {
            int64_t input = (first + t) * blocks + block;
            __m512 value = _mm512_cvtepi32_ps(part[r][t]);
            if (is.zeros || is.bits == 8) value = _mm512_fnmadd_ps(zero, _mm512_loadu_ps(x->sums + input * LANES), value);
            sum[r][t] = _mm512_fmadd_ps(value, _mm512_mul_ps(scale, _mm512_set1_ps(x->scale[input])), sum[r][t]);
        }
    }
}

DEEP void deep_tokens(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Shape is) {
    int64_t size = LANES * is.bits, full = job->columns / BLOCK;
    __m512 sum[ROWS][4];
    UNROLL
    for (int r = is.begin; r < is.end; r++)
        UNROLL
        for (int t = 0; t < is.count; t++) sum[r][t] = _mm512_setzero_ps();
    int64_t block = 0, safe = is.bits == 3 && full ? full - 1 : full;  /* 64 bytes are read for 48 */
    for (; block < safe; block++) deep_block(job, quad, x, token, block, BLOCK, is, sum);
    if (block < full) deep_block(job, quad, x, token, block, size, is, sum);
    if (full * BLOCK < job->columns) deep_block(job, quad, x, token, full, job->stride - full * size, is, sum);
    UNROLL
    for (int r = is.begin; r < is.end; r++)
        UNROLL
        for (int t = 0; t < is.count; t++)
            write_as(job->out, job->dtype, (token + t) * job->rows + quad->row[r],
                     _mm512_reduce_add_ps(sum[r][t]) * quad->step[r]);
}

/* Four rows share the inputs; one token with 8 bits goes row by row instead, where memory is all that counts. */
DEEP void deep_all(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Shape is) {
    int64_t left = job->tokens - token;
    is.begin = 0, is.end = ROWS;
    if (left >= 4) is.count = 4, deep_tokens(job, quad, x, token, is);
    else if (left >= 2) {
        is.count = 2, deep_tokens(job, quad, x, token, is);
        if (left == 3) is.count = 1, deep_tokens(job, quad, x, token + 2, is);
    }
    else if (is.bits < 8) is.count = 1, deep_tokens(job, quad, x, token, is);
    else
        UNROLL
        for (int r = 0; r < ROWS; r++) is.begin = r, is.end = r + 1, is.count = 1, deep_tokens(job, quad, x, token, is);
}

#define DEEP_CASE(name, bits, swapped, zeros)                                                         \
    DEEP_ENTRY void name(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {          \
        deep_all(job, quad, x, token, (Shape){bits, swapped, zeros, 0, 0, 0});                        \
    }
DEEP_CASE(deep_2, 2, 0, 0)
DEEP_CASE(deep_3, 3, 0, 0)
DEEP_CASE(deep_4, 4, 0, 0)
DEEP_CASE(deep_8, 8, 0, 0)
DEEP_CASE(deep_2_zeros, 2, 0, 1)
DEEP_CASE(deep_3_zeros, 3, 0, 1)
DEEP_CASE(deep_4_zeros, 4, 0, 1)
DEEP_CASE(deep_8_zeros, 8, 0, 1)
DEEP_CASE(deep_4_swapped, 4, 1, 0)

static Kernel deep_kernel(const Job *job) {
    static const Kernel plain[] = {deep_2, deep_3, deep_4, deep_8};
    static const Kernel zeros[] = {deep_2_zeros, deep_3_zeros, deep_4_zeros, deep_8_zeros};
    if (job->format == TABLE) return deep_4_swapped;
    int place = job->bits == 8 ? 3 : (int)job->bits - 2;
    return job->format == ASYMMETRIC ? zeros[place] : plain[place];
}
#endif
