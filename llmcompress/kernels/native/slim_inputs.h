/* AVX2 for inputs of 16 bits: how inputs become integers, and in which order.

   The inputs of a block of 128 become integers of 16 bits times a scale of the block, as in vnni.h. Codes of 2, 3 and 4 bits
   become four vectors of bytes, in the order that takes fewest instructions (`in_order`); a packet of inputs has the same order.
   Bytes are multiplied with inputs as two signed bytes, `256 * upper + lower`; codes of 8 bits, and what is looked up in
   a table, are words and multiplied with inputs as they are. */
#ifndef SLIM_INPUTS_H
#define SLIM_INPUTS_H
#include "lanes256.h"
#include "slim.h"

/* A packet: 128 inputs in 256 bytes, then what the middle code makes of them, in as many vectors as a block has sums. */
enum { HALF = 32, SLIM_PARTS = 4, SLIM_PACKET = 256 + 32 * SLIM_PARTS, SLIM_SUMS = 8 * SLIM_PARTS };

/* What is the same for every block. `table`: codes are looked up; `words`: they are multiplied as words; `zeros`: there are
   zero-points; `parts`: vectors of sums that a block is kept apart in, so that no lane has codes of two groups; `count`: tokens
   at a time. */
typedef struct { int bits, table, words, zeros, parts, count; } Form;

typedef struct { __m256i v[4]; } Four;

/* The bits of magnitudes, in the order of their size; those of NaN come last. */
SLIM __m256i magnitude(__m256 value) {
    return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

SLIM float most_of(__m256i bits) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}

/* One block of inputs as integers, zeros past the end; returns what one of them stands for. */
SLIM float rounded_words(const Job *job, int64_t token, int64_t block, int16_t to[BLOCK]) {
    int64_t begin = block * BLOCK;
    const uint16_t *from = (const uint16_t *)job->x + token * job->columns + begin;
    uint16_t tail[BLOCK] = {0};
    if (job->columns - begin < BLOCK) from = memcpy(tail, from, (size_t)(job->columns - begin) * 2);
    __m256i largest = _mm256_setzero_si256();
    for (int k = 0; k < BLOCK; k += 8) largest = _mm256_max_epi32(largest, magnitude(eight(from + k, job->dtype)));
    float inverse, scale = scale_of_inputs(most_of(largest), &inverse);
    __m256 by = _mm256_set1_ps(inverse);
    for (int k = 0; k < BLOCK; k += LANES) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(eight(from + k, job->dtype), by));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(eight(from + k + 8, job->dtype), by));
        store256(to + k, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    return scale;
}

/* The even and the odd ones of 64 bytes. */
SLIM void split_bytes(__m256i first, __m256i second, __m256i *even, __m256i *odd) {
    const __m256i low = _mm256_set1_epi16(255);
    __m256i evens = _mm256_packus_epi16(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
    __m256i odds = _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
    *even = _mm256_permute4x64_epi64(evens, 0xd8), *odd = _mm256_permute4x64_epi64(odds, 0xd8);
}

/* Bytes of a block in the order of the vectors of its codes: every fourth for 2 bits; else the even ones of the first half, its
   odd ones, and so the second; 8 bits as they lie. */
SLIM Four in_order(const Four *bytes, int64_t bits) {
    Four half = *bytes, to;
    if (bits == 8) return half;
    split_bytes(bytes->v[0], bytes->v[1], &half.v[0], &half.v[1]);
    split_bytes(bytes->v[2], bytes->v[3], &half.v[2], &half.v[3]);
    if (bits != 2) return half;
    split_bytes(half.v[0], half.v[2], &to.v[0], &to.v[2]);
    split_bytes(half.v[1], half.v[3], &to.v[1], &to.v[3]);
    return to;
}

/* Upper and lower bytes of 128 words; lower ones are `signed` where the upper ones make up for it. */
SLIM void bytes_of(const int16_t words[BLOCK], int is_signed, Four *upper, Four *lower) {
    const __m256i low = _mm256_set1_epi16(255), half = _mm256_set1_epi16(is_signed ? 128 : 0);
    UNROLL
    for (int i = 0; i < 4; i++) {
        __m256i first = load256(words + 32 * i), second = load256(words + 32 * i + LANES);
        __m256i lows = _mm256_packus_epi16(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
        first = _mm256_srai_epi16(_mm256_add_epi16(first, half), 8), second = _mm256_srai_epi16(_mm256_add_epi16(second, half), 8);
        upper->v[i] = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8);
        lower->v[i] = _mm256_permute4x64_epi64(lows, 0xd8);
    }
}

/* The even and the odd ones of 32 words. */
SLIM void split_words(__m256i first, __m256i second, __m256i *even, __m256i *odd) {
    __m256i evens = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_slli_epi32(first, 16), 16),
                                       _mm256_srai_epi32(_mm256_slli_epi32(second, 16), 16));
    __m256i odds = _mm256_packs_epi32(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16));
    *even = _mm256_permute4x64_epi64(evens, 0xd8), *odd = _mm256_permute4x64_epi64(odds, 0xd8);
}

/* For 8 bits: of every 32 words the even ones, then the odd ones. */
SLIM void pairs_of(const int16_t words[BLOCK], int8_t *to) {
    for (int i = 0; i < 4; i++) {
        __m256i even, odd;
        split_words(load256(words + 32 * i), load256(words + 32 * i + LANES), &even, &odd);
        store256(to + 64 * i, even), store256(to + 64 * i + HALF, odd);
    }
}

/* For 3 bits: of every 64 words each fourth, from the first, the second, the third and the last on. */
SLIM void fourths_of(const int16_t words[BLOCK], int8_t *to) {
    for (int h = 0; h < 2; h++) {
        __m256i even[2], odd[2], found[4];
        for (int i = 0; i < 2; i++) {
            const int16_t *from = words + 64 * h + 32 * i;
            split_words(load256(from), load256(from + LANES), &even[i], &odd[i]);
        }
        split_words(even[0], even[1], &found[0], &found[2]);
        split_words(odd[0], odd[1], &found[1], &found[3]);
        for (int j = 0; j < 4; j++) store256(to + 128 * h + HALF * j, found[j]);
    }
}

/* As `fill_tables`, of a row that has a table for itself; integers alone. */
SLIM_ENTRY void slim_tables(const Job *job, Quad *quad, int r) {
    __m256 first, second;
    read_book(job, quad->row[r], &first, &second);
    float most = most_of(_mm256_max_epi32(magnitude(first), magnitude(second)));
    __m256 by = _mm256_set1_ps(most == 0.0f ? 0.0f : TABLE_MOST / most);
    __m256i integers = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(first, by)), _mm256_cvtps_epi32(_mm256_mul_ps(second, by)));
    store256(quad->integers[r], _mm256_permute4x64_epi64(integers, 0xd8));
    quad->step[r] = most / TABLE_MOST;
}

/* What is the same for all blocks of a row. `apart`: scales of one vector of sums; `lanes`: which of them each lane takes. */
typedef struct { const float *scale, *zero; __m256i tables[2], lanes; int64_t blocks, per_block, apart; } SlimRow;

SLIM SlimRow slim_row(const Quad *quad, int r, int64_t blocks, Form is) {
    int64_t apart = quad->per_block / is.parts;
    SlimRow row = {quad->scale[r], quad->zero[r], {_mm256_setzero_si256(), _mm256_setzero_si256()}, _mm256_setzero_si256(), blocks,
                   quad->per_block, apart};
    if (apart > 1) row.lanes = _mm256_srlv_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(apart == 2 ? 2 : apart == 4));
    if (is.table) {
        __m256i low = _mm256_and_si256(load256(quad->integers[r]), _mm256_set1_epi16(255));
        __m256i high = _mm256_srli_epi16(load256(quad->integers[r]), 8);
        row.tables[0] = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), 0xd8);
        row.tables[1] = _mm256_permute4x64_epi64(_mm256_packus_epi16(high, high), 0xd8);
    }
    return row;
}

/* Scales or zero-points of sums number `p` of a block whose own begin at `from`. */
SLIM __m256 of_part(const SlimRow *row, const float *from, int p, int parts) {
    if (row->apart < 2) return _mm256_broadcast_ss(from + p * row->per_block / parts);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + p * row->apart), row->lanes);
}
#endif
