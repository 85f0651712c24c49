/* Blocks of 2, 3, 4 and 8 bits on any processor, in float32: vectors of the compiler's own, sixteen lanes wide. */
#ifndef PLAIN_H
#define PLAIN_H
#include "blocks.h"
#include "lanes.h"

/* How codes of a width become numbers; they are `looked_up` where they are no integers. */
typedef struct { int bits, looked_up, swapped, zeros; } Kind;

/* The words of a block, of 8 bits those of the first four codes of each lane and those of the others. */
PLAIN_LANES void plain_words(const uint8_t *codes, int bits, PlainBits words[2]) {
    uint32_t all[2 * LANES], to[2][LANES] = {{0}};
    if (bits == 2) {
        uint16_t halves[LANES];
        memcpy(halves, codes, sizeof halves);
        for (int l = 0; l < LANES; l++) to[0][l] = halves[l];
    } else if (bits == 3) {
        for (int l = 0; l < LANES - 1; l++) memcpy(&to[0][l], codes + 3 * l, sizeof to[0][l]);
        memcpy(&to[0][LANES - 1], codes + 3 * (LANES - 1), 3);
    } else if (bits == 4) {
        memcpy(to[0], codes, sizeof to[0]);
    } else {
        memcpy(all, codes, sizeof all);
        for (int l = 0; l < LANES; l++) to[0][l] = all[2 * l], to[1][l] = all[2 * l + 1];
    }
    memcpy(words, to, sizeof to);
}

/* Scales or zero-points of the lanes of a block. */
PLAIN_LANES Plain plain_lanes(const Quad *quad, const float *from) {
    if (quad->per_block == 1) return plain_all(*from);
    float to[LANES];
    for (int l = 0; l < LANES; l++) to[l] = from[quad->lanes[l]];
    return plain_load(to);
}

/* Where field j lies in its word. */
PLAIN_LANES int plain_shift(Kind is, int j) { return is.swapped ? 4 * (j ^ 1) : is.bits < 8 ? is.bits * j : 8 * (j & 3); }

/* What the codes of a block stand for in a table, field by field. */
PLAIN_LANES void plain_lookups(const float *table, const PlainBits *words, Kind is, Plain to[FIELDS]) {
    uint32_t word[LANES];
    float found[FIELDS][LANES];
    memcpy(word, words, sizeof word);
    for (int l = 0; l < LANES; l++)
        UNROLL
        for (int j = 0; j < FIELDS; j++) found[j][l] = table[word[l] >> plain_shift(is, j) & ((1u << is.bits) - 1)];
    memcpy(to, found, sizeof found);
}

/* What they stand for where they are integers, before scaling, `middle` being their zero. */
PLAIN_LANES void plain_integers(Plain middle, const PlainBits words[2], Kind is, Plain to[FIELDS]) {
    UNROLL
    for (int j = 0; j < FIELDS; j++) {
        PlainBits code = (words[is.bits == 8 && j > 3] >> plain_shift(is, j)) & ((1 << is.bits) - 1);
        to[j] = __builtin_convertvector(code, Plain) - middle;
    }
}

/* One row times at most four tokens. */
PLAIN_LANES void plain_row(const Job *job, const Quad *quad, const Inputs *x, int64_t token, int r, Kind is) {
    int64_t size = LANES * is.bits, blocks = (job->columns + BLOCK - 1) / BLOCK, left = job->tokens - token;
    Plain sum[4] = {{0}}, weight[FIELDS];
    for (int64_t block = 0; block < blocks; block++) {
        uint8_t tail[BLOCK];
        PlainBits words[2];
        int64_t place = scale_place(quad, block);
        plain_words(whole_block(quad->codes[r] + block * size, is.bits, job->stride - block * size, tail), is.bits, words);
        Plain middle = plain_all((float)(1 << (is.bits - 1)));
        if (is.zeros) middle += plain_lanes(quad, quad->zero[r] + place);
        if (is.looked_up) plain_lookups(quad->table[r], words, is, weight);
        else plain_integers(middle, words, is, weight);
        Plain scale = plain_lanes(quad, quad->scale[r] + place);
        for (int t = 0; t < left && t < 4; t++) {
            const float *from = x->values + ((token + t) * blocks + block) * BLOCK;
            Plain part = weight[0] * plain_load(from);
            UNROLL
            for (int j = 1; j < FIELDS; j++) part += weight[j] * plain_load(from + j * LANES);
            sum[t] += part * scale;
        }
    }
    for (int t = 0; t < left && t < 4; t++)
        write_as(job->out, job->dtype, (token + t) * job->rows + quad->row[r], plain_fold(sum[t]));
}

#define PLAIN_CASE(name, ...)                                                                  \
    static void name(const Job *job, const Quad *quad, const Inputs *x, int64_t token) {       \
        for (int r = 0; r < ROWS; r++) plain_row(job, quad, x, token, r, (Kind){__VA_ARGS__}); \
    }
PLAIN_CASE(plain_2, 2, 0, 0, 0)
PLAIN_CASE(plain_3, 3, 0, 0, 0)
PLAIN_CASE(plain_4, 4, 0, 0, 0)
PLAIN_CASE(plain_8, 8, 0, 0, 0)
PLAIN_CASE(plain_2_zeros, 2, 0, 0, 1)
PLAIN_CASE(plain_3_zeros, 3, 0, 0, 1)
PLAIN_CASE(plain_4_zeros, 4, 0, 0, 1)
PLAIN_CASE(plain_8_zeros, 8, 0, 0, 1)
PLAIN_CASE(plain_2_book, 2, 1, 0, 0)
PLAIN_CASE(plain_3_book, 3, 1, 0, 0)
PLAIN_CASE(plain_4_book, 4, 1, 0, 0)
PLAIN_CASE(plain_4_table, 4, 1, 1, 0)

static Way plain_way(const Job *job) {
    static const Kernel integers[2][4] = {{plain_2, plain_3, plain_4, plain_8}, {plain_2_zeros, plain_3_zeros, plain_4_zeros, plain_8_zeros}};
    static const Kernel books[] = {plain_2_book, plain_3_book, plain_4_book};
    Kernel kernel = integers[job->format == ASYMMETRIC][job->bits == 8 ? 3 : job->bits - 2];
    if (job->format == TABLE) kernel = plain_4_table;
    if (job->format == CODEBOOK) kernel = books[job->bits - 2];
    return (Way){kernel, row_scales, fill_tables, NULL, 0, 0};
}
#endif
