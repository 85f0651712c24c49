/* Codes of 2, 3 and 4 bits that are looked up in a table, with AVX-512 VNNI: 32 products in one instruction.

   Tables become integers: what a code stands for where that is one, else 13 bits of it, and a scale for the row. Sums of a lane are exact in 32 bits:
   8 * 32639 * 8191 < 2**31. A register holds 32 words of four codes: field j of word w is code 4 w + j, so that lane l has
   codes 8 l .. 8 l + 7. A packet of inputs has those of field j, two for a lane, from byte 64 j on. */
#ifndef WORDS_H
#define WORDS_H
#include "vnni.h"

/* The words of one block; `size` bytes of it are there, 16 * bits unless the row ends within it. */
DEEP __m512i block_of_words(const uint8_t *codes, int bits, int64_t size) {
    uint8_t tail[BLOCK];
    codes = whole_block(codes, bits, size, tail);
    if (bits == 4) return _mm512_loadu_si512(codes);
    if (bits == 2) return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    return three_spread(codes, size);
}

/* What field j stands for, as an integer. A lookup takes the low five bits of a word. */
DEEP __m512i word_field(__m512i words, __m512i table, int bits, int swapped, int j) {
    if (bits == 3) {  /* of the eight places that are picked, every second is a word's lower half; the others do not count */
        const __m512i places = _mm512_set1_epi64(0x00240018000c0000ll + 0x0003000300030003ll * j);
        return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(places, words), table);
    }
    int shift = bits * (swapped ? j ^ 1 : j);
    return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(words, (unsigned)shift) : words, table);
}

/* One block of inputs, in the order of the fields. */
DEEP_ENTRY void word_inputs(const Job *job, const Inputs *x, int64_t token, int64_t block) {
    int64_t input = token * ((job->columns + BLOCK - 1) / BLOCK) + block;
    __m512i whole[FIELDS], dense[4], sums = _mm512_setzero_si512();
    x->scale[input] = rounded_block(job, token, block, whole);
    UNROLL
    for (int v = 0; v < 4; v++) {
        __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(whole[2 * v]));
        dense[v] = _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(whole[2 * v + 1]), 1);
    }
    const __m512i fourth = _mm512_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0,
                                            60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    UNROLL
    for (int j = 0; j < 4; j++) {
        __m512i places = _mm512_add_epi16(fourth, _mm512_set1_epi16((int16_t)j));
        __m512i first = _mm512_permutex2var_epi16(dense[0], places, dense[1]);
        __m512i second = _mm512_permutex2var_epi16(dense[2], places, dense[3]);
        __m512i field = _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1);
        _mm512_storeu_si512(x->packets + input * WORD_PACKET + j * 64, field);
        sums = _mm512_add_epi32(sums, _mm512_madd_epi16(field, _mm512_set1_epi16(1)));
    }
    _mm512_storeu_ps(x->sums + input * LANES, _mm512_cvtepi32_ps(sums));
}

/* The sums of products of one block of a row with one token. */
DEEP __m512i word_product(__m512i words, __m512i table, const int8_t *packet, Shape is) {
    __m512i part[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    UNROLL
    for (int j = 0; j < 4; j++)
        part[j & 1] = _mm512_dpwssd_epi32(part[j & 1], word_field(words, table, is.bits, is.swapped, j),
                                          _mm512_loadu_si512(packet + j * 64));
    return _mm512_add_epi32(part[0], part[1]);
}

/* One block of some rows and tokens, of which `rest` bytes are there in each row. */
DEEP void word_block(const Job *job, const Quad *quad, const Inputs *x, int64_t first, int64_t block, int64_t rest,
                     Shape is, __m512i part[ROWS][4]) {
    int64_t blocks = (job->columns + BLOCK - 1) / BLOCK, size = LANES * is.bits;
    __m512i words[ROWS];
    UNROLL
    for (int r = is.begin; r < is.end; r++) {
        const uint8_t *codes = quad->codes[r] + block * size;
        words[r] = block_of_words(codes, is.bits, rest);
        _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_NTA);
        UNROLL
        for (int t = 0; t < is.count; t++) part[r][t] = _mm512_setzero_si512();
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        __m512i weight[ROWS];
        UNROLL
        for (int r = is.begin; r < is.end; r++)
            weight[r] = word_field(words[r], _mm512_loadu_si512(quad->integers[r]), is.bits, is.swapped, j);
        UNROLL
        for (int t = 0; t < is.count; t++) {
            __m512i input = _mm512_loadu_si512(x->packets + ((first + t) * blocks + block) * WORD_PACKET + j * 64);
            UNROLL
            for (int r = is.begin; r < is.end; r++) part[r][t] = _mm512_dpwssd_epi32(part[r][t], weight[r], input);
        }
    }
}
#endif
