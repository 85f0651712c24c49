/* Integers of 2, 3, 4 and 8 bits with AVX-512 VNNI: codes become bytes as they are, 64 products in one instruction.

   An input of 16 bits is two signed bytes, `256 * upper + lower`. Sums of a lane are exact in 32 bits: 8 * 255 * 32639 < 2**31.
   A lane takes its eight codes in two halves of four: those of 4 bits are the even and the odd ones, others the first and the
   last. A packet of inputs has the upper bytes of both halves, the lower bytes of both, and what the middle code makes of the
   eight inputs of each lane, negative. */
#ifndef BYTES_H
#define BYTES_H
#include "vnni.h"

typedef struct { __m512i half[2]; } Halves;

/* Codes of one block; `size` bytes of it are there, 16 * bits unless the row ends within it. */
DEEP Halves code_bytes(const uint8_t *codes, int bits, int64_t size) {
    uint8_t tail[BLOCK];
    codes = whole_block(codes, bits, size, tail);
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    if (bits == 4) {
        __m512i both = _mm512_loadu_si512(codes);
        return (Halves){{_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)}};
    }
    if (bits == 8) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
        return (Halves){{_mm512_permutex2var_epi32(first, even, second), _mm512_permutex2var_epi32(first, odd, second)}};
    }
    __m512i words, places;  /* bits of 64 at which codes begin */
    if (bits == 2) {
        words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)codes));
        places = _mm512_set1_epi64(0x2624222006040200ll);
    } else {
        words = three_spread(codes, size);
        places = _mm512_set1_epi64(0x211e1b1809060300ll);
    }
    __m512i last = _mm512_add_epi8(places, _mm512_set1_epi8((char)(4 * bits)));
    return (Halves){{_mm512_and_si512(_mm512_multishift_epi64_epi8(places, words), mask),
                     _mm512_and_si512(_mm512_multishift_epi64_epi8(last, words), mask)}};
}

/* One block of inputs as a packet. */
DEEP_ENTRY void byte_inputs(const Job *job, const Inputs *x, int64_t token, int64_t block) {
    int64_t input = token * ((job->columns + BLOCK - 1) / BLOCK) + block;
    int8_t upper[BLOCK], lower[BLOCK], *to = x->packets + input * PACKET;
    __m512i whole[FIELDS], sums = _mm512_setzero_si512();
    x->scale[input] = rounded_block(job, token, block, whole);
    UNROLL
    for (int v = 0; v < FIELDS; v++) {
        __m512i top = _mm512_srai_epi32(_mm512_add_epi32(whole[v], _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((__m128i *)(upper + v * LANES), _mm512_cvtepi32_epi8(top));
        _mm_storeu_si128((__m128i *)(lower + v * LANES), _mm512_cvtepi32_epi8(whole[v]));
    }
    const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i of_first = _mm512_set1_epi32(job->bits == 4 ? 0x06040200 : 0x03020100), places[2];  /* in a lane */
    places[0] = _mm512_add_epi32(of_first, _mm512_mullo_epi32(counting, _mm512_set1_epi32(0x08080808)));
    places[1] = _mm512_add_epi8(places[0], _mm512_set1_epi8(job->bits == 4 ? 1 : 4));
    UNROLL
    for (int part = 0; part < 4; part++) {
        const int8_t *of = part < 2 ? upper : lower;
        __m512i found = _mm512_permutex2var_epi8(_mm512_loadu_si512(of), places[part & 1], _mm512_loadu_si512(of + BLOCK / 2));
        _mm512_storeu_si512(to + part * 64, found);
        if (part == 2) sums = _mm512_slli_epi32(sums, 8);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), found);
    }
    __m512i middle = _mm512_set1_epi32(-(1 << (job->bits - 1)));
    _mm512_storeu_si512(to + 256, _mm512_mullo_epi32(sums, middle));
    _mm512_storeu_ps(x->sums + input * LANES, _mm512_cvtepi32_ps(sums));
}

/* The sums of products of one block of a row, less the middle code, with one token. */
DEEP __m512i byte_product(Halves codes, const int8_t *packet) {
    __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.half[0], _mm512_loadu_si512(packet));
    __m512i lower = _mm512_dpbusd_epi32(_mm512_loadu_si512(packet + 256), codes.half[0], _mm512_loadu_si512(packet + 128));
    upper = _mm512_dpbusd_epi32(upper, codes.half[1], _mm512_loadu_si512(packet + 64));
    lower = _mm512_dpbusd_epi32(lower, codes.half[1], _mm512_loadu_si512(packet + 192));
    return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
}

/* One block of some rows and tokens, of which `rest` bytes are there in each row. */
DEEP void byte_block(const Job *job, const Quad *quad, const Inputs *x, int64_t first, int64_t block, int64_t rest,
                     Shape is, __m512i part[ROWS][4]) {
    int64_t blocks = (job->columns + BLOCK - 1) / BLOCK, size = LANES * is.bits;
    Halves codes[ROWS];
    UNROLL
    for (int r = is.begin; r < is.end; r++) {
        const uint8_t *from = quad->codes[r] + block * size;
        codes[r] = code_bytes(from, is.bits, rest);
        _mm_prefetch((const char *)(from + AHEAD), _MM_HINT_NTA);
        if (is.bits == 8) _mm_prefetch((const char *)(from + AHEAD + 64), _MM_HINT_NTA);
    }
    UNROLL
    for (int t = 0; t < is.count; t++)
        UNROLL
        for (int r = is.begin; r < is.end; r++)
            part[r][t] = byte_product(codes[r], x->packets + ((first + t) * blocks + block) * PACKET);
}
#endif
