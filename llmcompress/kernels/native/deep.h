/* Rows of blocks with AVX-512 VNNI: four side by side for several tokens; for one token one row after the other, so that
   memory is read in one straight line, which is what prefetchers and pages are made for. */
#ifndef DEEP_H
#define DEEP_H
#include "words.h"
#include "bytes.h"

/* Whether rows of one token take their scales from the weight itself, not from scratch. */
static int reads_own_scales(const Job *job) { return job->group && job->group <= BLOCK; }

/* One block, of which `rest` bytes are there in each row. */
DEEP void deep_block(const Job *job, const Quad *quad, const Inputs *x, int64_t first, int64_t block, int64_t rest,
                     Shape is, __m512 sum[ROWS][4]) {
    int64_t blocks = (job->columns + BLOCK - 1) / BLOCK, place = scale_place(quad, block);
    const __m512i lanes = _mm512_loadu_si512(quad->lanes);
    __m512i part[ROWS][4];
    if (is.words) word_block(job, quad, x, first, block, rest, is, part);
    else byte_block(job, quad, x, first, block, rest, is, part);
    UNROLL
    for (int r = is.begin; r < is.end; r++) {
        __m512 scale = of_lanes16(quad->scale[r] + place, lanes, quad->per_block == 1), zero = _mm512_setzero_ps();
        if (is.zeros) zero = of_lanes16(quad->zero[r] + place, lanes, quad->per_block == 1);
        UNROLL
        for (int t = 0; t < is.count; t++) {
            int64_t input = (first + t) * blocks + block;
            __m512 value = _mm512_cvtepi32_ps(part[r][t]);
            if (is.zeros) value = _mm512_fnmadd_ps(zero, _mm512_loadu_ps(x->sums + input * LANES), value);
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

/* The scales of row `r` times those of one token's blocks: as many as there are in a block, or one for each block. */
DEEP void joint_scales(const Job *job, const Quad *quad, int r, const float *of_blocks, int64_t blocks) {
    float *to = quad->joint[r];
    if (!reads_own_scales(job)) {
        const float *scale = quad->scale[r];
        Walk walk = {0};
        for (int64_t block = 0; block < blocks && job->groups > 1; block++, next_block(quad, &walk))
            to[block] = scale[walk.place] * of_blocks[block];
        for (int64_t block = 0; block < blocks && job->groups == 1; block += LANES)
            _mm512_storeu_ps(to + block, _mm512_mul_ps(_mm512_set1_ps(*scale), _mm512_loadu_ps(of_blocks + block)));
        return;
    }
    const __m512i owners = _mm512_loadu_si512(quad->owners);
    for (int64_t g = 0; g < job->groups; g += LANES, of_blocks += quad->covered) {
        __m512 inputs = _mm512_permutexvar_ps(owners, _mm512_loadu_ps(of_blocks));
        _mm512_storeu_ps(to + g, _mm512_mul_ps(inputs, sixteen_scales(job, quad->row[r], g)));
    }
    _mm512_storeu_ps(to + job->groups, _mm512_setzero_ps());
}

/* What is the same for all blocks of a row. */
typedef struct { const float *zero, *sums, *joint; __m512i table, lanes; int64_t per_block, blocks; } Row;

/* Scales or zero-points of the lanes of a block, `per_block` of them: 1, 2, or with ANY as many as the row says. */
enum { ANY = 0 };
DEEP __m512 of_block(const Row *row, const float *from, int64_t block, int per_block) {
    if (per_block == 1) return _mm512_set1_ps(from[block]);
    if (per_block == 2) {
        double pair;
        memcpy(&pair, from + 2 * block, sizeof pair);
        return _mm512_permutexvar_ps(row->lanes, _mm512_castpd_ps(_mm512_set1_pd(pair)));
    }
    return _mm512_permutexvar_ps(row->lanes, _mm512_loadu_ps(from + block * row->per_block));
}

/* One block of one row times one token, added to `sum`; `rest` bytes of it are there. */
DEEP __m512 row_block(const Row *row, const uint8_t *codes, const int8_t *packet, int64_t block, int64_t rest, Shape is,
                      __m512 sum) {
    __m512i part = is.words ? word_product(block_of_words(codes, is.bits, rest), row->table, packet, is)
                            : byte_product(code_bytes(codes, is.bits, rest), packet);
    __m512 value = _mm512_cvtepi32_ps(part);
    if (is.zeros) {
        __m512 zero = of_block(row, row->zero, row->blocks == 1 ? block : block / row->blocks, is.count);
        value = _mm512_fnmadd_ps(zero, _mm512_loadu_ps(row->sums + block * LANES), value);
    }
    return _mm512_fmadd_ps(value, of_block(row, row->joint, block, is.count), sum);
}

/* One row times one token, in lanes; here `count` of the shape is scales in a block, as `of_block` takes it. */
DEEP __m512 deep_row(const Job *job, const Quad *quad, const Inputs *x, int64_t token, int r, Shape is) {
    int64_t size = LANES * is.bits, full = job->columns / BLOCK, blocks = (job->columns + BLOCK - 1) / BLOCK;
    int64_t block = 0, safe = is.bits == 3 && full ? full - 1 : full;  /* 64 bytes are read for 48 */
    const uint8_t *codes = quad->codes[r];
    int64_t step = is.words ? WORD_PACKET : PACKET;
    const int8_t *packet = x->packets + token * blocks * step;
    Row row = {quad->zero[r], x->sums + token * blocks * LANES, quad->joint[r], _mm512_loadu_si512(quad->integers[r]),
               _mm512_loadu_si512(quad->lanes), quad->per_block, quad->blocks};
    __m512 sum = _mm512_setzero_ps();
    _Pragma("GCC unroll 2")
    for (; block < safe; block++, codes += size, packet += step) {
        _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_NTA);
        if (is.bits == 8) _mm_prefetch((const char *)(codes + AHEAD + 64), _MM_HINT_NTA);
        sum = row_block(&row, codes, packet, block, BLOCK, is, sum);
    }
    for (; block < blocks; block++, codes += size, packet += step)
        sum = row_block(&row, codes, packet, block, block < full ? size : job->stride - full * size, is, sum);
    return sum;
}

/* The sums of the lanes of four rows. */
DEEP __m128 four_sums(const __m512 rows[ROWS]) {
    __m256 half[ROWS];
    UNROLL
    for (int r = 0; r < ROWS; r++)
        half[r] = _mm256_add_ps(_mm512_castps512_ps256(rows[r]), _mm512_extractf32x8_ps(rows[r], 1));
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* All rows times one token, one after the other. */
DEEP void deep_rows(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Shape is) {
    int64_t blocks = (job->columns + BLOCK - 1) / BLOCK;
    __m512 sum[ROWS];
    float found[ROWS];
    for (int r = 0; r < ROWS; r++) joint_scales(job, quad, r, x->scale + token * blocks, blocks);
    for (int r = 0; r < ROWS; r++) sum[r] = deep_row(job, quad, x, token, r, is);
    _mm_storeu_ps(found, _mm_mul_ps(four_sums(sum), _mm_loadu_ps(quad->step)));
    for (int r = 0; r < ROWS; r++) write_as(job->out, job->dtype, token * job->rows + quad->row[r], found[r]);
}

DEEP void deep_last(const Job *job, const Quad *quad, const Inputs *x, int64_t last, Shape is) {
    if (quad->per_block == 1) is.count = 1, deep_rows(job, quad, x, last, is);
    else if (quad->per_block == 2) is.count = 2, deep_rows(job, quad, x, last, is);
    else is.count = ANY, deep_rows(job, quad, x, last, is);
}

DEEP void deep_all(const Job *job, const Quad *quad, const Inputs *x, int64_t token, Shape is) {
    int64_t left = job->tokens - token, last = job->tokens - 1;
    is.begin = 0, is.end = ROWS;
    if (left >= 4 && is.words) is.count = 4, deep_tokens(job, quad, x, token, is);
    else if (left >= 2) is.count = 2, deep_tokens(job, quad, x, token, is);
    if (left != 1 && left != 3) return;
    if (is.words && !is.swapped && job->format == CODEBOOK) {  /* each row has a table, and waits for it */
        is.count = 1, deep_tokens(job, quad, x, last, is);
        return;
    }
    deep_last(job, quad, x, last, is);
}

#define DEEP_CASE(name, ...)                                                                          \
    DEEP_ENTRY void name(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {          \
        deep_all(job, quad, x, token, (Shape){__VA_ARGS__, 0, 0, 0});                                 \
    }
DEEP_CASE(byte_2, 2, 0, 0, 0)
DEEP_CASE(byte_3, 3, 0, 0, 0)
DEEP_CASE(byte_4, 4, 0, 0, 0)
DEEP_CASE(byte_2_zeros, 2, 0, 0, 1)
DEEP_CASE(byte_3_zeros, 3, 0, 0, 1)
DEEP_CASE(byte_4_zeros, 4, 0, 0, 1)
DEEP_CASE(word_2, 2, 1, 0, 0)
DEEP_CASE(word_3, 3, 1, 0, 0)
DEEP_CASE(word_4, 4, 1, 0, 0)
DEEP_CASE(word_2_zeros, 2, 1, 0, 1)
DEEP_CASE(word_3_zeros, 3, 1, 0, 1)
DEEP_CASE(word_4_zeros, 4, 1, 0, 1)
DEEP_CASE(word_4_swapped, 4, 1, 1, 0)

/* 8 bits: four tokens, two, and one in functions of their own, or registers are given out badly; two are quicker with two rows
   at a time. */
#define DEEP_ALONE DEEP_ENTRY __attribute__((noinline))
#define DEEP_CASE_8(name, zeros)                                                                    \
    DEEP_ALONE void name##_4(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {    \
        deep_tokens(job, quad, x, token, (Shape){8, 0, 0, zeros, 0, ROWS, 4});                      \
    }                                                                                               \
    DEEP_ALONE void name##_2(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {    \
        deep_tokens(job, quad, x, token, (Shape){8, 0, 0, zeros, 0, ROWS / 2, 2});                  \
        deep_tokens(job, quad, x, token, (Shape){8, 0, 0, zeros, ROWS / 2, ROWS, 2});               \
    }                                                                                               \
    DEEP_ALONE void name##_1(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {    \
        deep_last(job, quad, x, token, (Shape){8, 0, 0, zeros, 0, ROWS, 0});                        \
    }                                                                                               \
    static void name(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {            \
        int64_t left = job->tokens - token;                                                         \
        if (left >= 4) name##_4(job, quad, x, token);                                               \
        else if (left >= 2) name##_2(job, quad, x, token);                                          \
        if (left == 1 || left == 3) name##_1(job, quad, x, job->tokens - 1);                        \
    }
DEEP_CASE_8(byte_8, 0)
DEEP_CASE_8(byte_8_zeros, 1)

/* Whether codes are looked up: where they are no integers, and for four tokens and more, which share what was looked up. */
static int in_words(const Job *job) {
    return job->format == TABLE || job->format == CODEBOOK || (job->bits < 8 && job->tokens >= 4);
}

static Kernel deep_kernel(const Job *job) {
    static const Kernel bytes[2][4] = {{byte_2, byte_3, byte_4, byte_8}, {byte_2_zeros, byte_3_zeros, byte_4_zeros, byte_8_zeros}};
    static const Kernel words[2][3] = {{word_2, word_3, word_4}, {word_2_zeros, word_3_zeros, word_4_zeros}};
    if (job->format == TABLE) return word_4_swapped;
    int place = job->bits == 8 ? 3 : (int)job->bits - 2, zeros = job->format == ASYMMETRIC;
    return in_words(job) ? words[zeros][place] : bytes[zeros][place];
}

/* One block of inputs, as the kernel takes them. */
DEEP_ENTRY void deep_inputs(const Job *job, const Inputs *x, int64_t token, int64_t block) {
    if (in_words(job)) word_inputs(job, x, token, block);
    else byte_inputs(job, x, token, block);
}

static Way deep_way(const Job *job) {
    Scales scales = job->tokens == 1 && reads_own_scales(job) ? NULL : job->group ? wide_scales : row_scales;
    return (Way){deep_kernel(job), scales, wide_tables, deep_inputs, PACKET, LANES};
}
#endif
