/* What the vector kernels share: four rows at a time, in blocks of 128 codes.

   A block lies in 16 * bits bytes. Of its sixteen lanes, lane l holds codes 8 l .. 8 l + 7 whatever the width, so that field j
   of all lanes is codes j, 8 + j, 16 + j, ...; inputs are laid out in that order once (`spread_inputs`). */
#ifndef BLOCKS_H
#define BLOCKS_H
#include "job.h"

typedef struct {
    float *values;                  /* (tokens, columns in whole blocks), code 8 l + j of a block at 16 j + l */
    int16_t *integers;              /* or the same in integers, code 8 l + 4 h + j at 32 j + 2 l + h, */
    float *scale, *sums;            /* with a scale for each block, and their sum in each lane of a block */
} Inputs;

typedef struct {
    const float *scale[ROWS], *zero[ROWS];  /* of each row, by group */
    const uint8_t *codes[ROWS];
    float table[ROWS][LANES];               /* what a code stands for, repeated to sixteen; not for 8 bits */
    int16_t integers[ROWS][2 * LANES];      /* the same times `step`, repeated to thirty-two */
    float step[ROWS];
    int64_t row[ROWS];
    int64_t per_block, blocks;              /* scales of a block; blocks of a scale, at least 1 */
    int lanes[LANES];                       /* which scale of those of a block a lane takes */
} Quad;

/* Where a block of `bits` bits can be read as a whole: in place, or in `tail` where the row ends within it. */
static inline __attribute__((always_inline))
const uint8_t *whole_block(const uint8_t *codes, int bits, int64_t size, uint8_t tail[BLOCK]) {
    if (size >= LANES * bits) return codes;
    memset(tail, 0, BLOCK);
    return memcpy(tail, codes, (size_t)size);
}

/* The first scale of a block. */
static inline int64_t scale_place(const Quad *quad, int64_t block) {
    return quad->blocks == 1 ? block * quad->per_block : block / quad->blocks;
}

/* How the scales of a row are read; as `row_scales`. */
typedef void (*Scales)(const Job *, int64_t row, float *to);

/* Tokens from `token` on, at most four, of four rows. */
typedef void (*Kernel)(const Job *, const Quad *, const Inputs *, int64_t token);

/* What the codes of a row stand for, in the places of row r of the quad. */
static void fill_tables(const Job *job, Quad *quad, int r) {
    float *table = quad->table[r], largest = 0.0f;
    int mask = (1 << job->bits) - 1;
    row_table(job, quad->row[r], table);
    for (int entry = 0; entry < LANES; entry++) {
        table[entry] = table[entry & mask];
        float size = table[entry] < 0 ? -table[entry] : table[entry];
        if (size > largest) largest = size;
    }
    int exact = job->format == INT || job->format == ASYMMETRIC || largest == 0.0f;
    float inverse = exact ? 1.0f : TABLE_MOST / largest;
    quad->step[r] = exact ? 1.0f : largest / TABLE_MOST;
    for (int entry = 0; entry < LANES; entry++) {
        float value = table[entry] * inverse;
        quad->integers[r][entry] = (int16_t)(value < 0 ? value - 0.5f : value + 0.5f);
    }
    memcpy(quad->integers[r] + LANES, quad->integers[r], LANES * sizeof(int16_t));
}

static void quad_rows(const Job *job, Quad *quad, const float *scales, int64_t first, int64_t last, int64_t row) {
    int64_t room = groups_of(job) + LANES;
    for (int r = 0; r < ROWS; r++) {  /* past the last row, the last one again */
        int64_t mine = row + r < last ? row + r : last - 1;
        quad->row[r] = mine;
        quad->codes[r] = job->codes + mine * job->stride;
        quad->scale[r] = scales + (mine - first) * room;
        quad->zero[r] = quad->scale[r] + (last - first) * room;
        if (job->format == CODEBOOK) fill_tables(job, quad, r);
    }
}

/* Rows [first, last) of all tokens; `scratch` has room for the scales and the zero-points of as many rows. */
static void rows_blocks(const Job *job, const Inputs *x, int64_t first, int64_t last, float *scratch, Kernel kernel,
                        Scales scales) {
    int64_t room = groups_of(job) + LANES;
    for (int64_t row = first; row < last; row++) {
        scales(job, row, scratch + (row - first) * room);
        if (job->format == ASYMMETRIC) row_zeros(job, row, scratch + (last - first + row - first) * room);
    }
    Quad quad = {.step = {1.0f, 1.0f, 1.0f, 1.0f}};
    if (job->bits < 8 && job->format != CODEBOOK)
        for (int r = 0; r < ROWS; r++) fill_tables(job, &quad, r);
    int64_t group = groups_of(job) == 1 ? job->columns + 2 * BLOCK : job->group;  /* one for all: more than there are */
    quad.per_block = group < BLOCK ? BLOCK / group : 1;
    quad.blocks = group < BLOCK ? 1 : group / BLOCK;
    for (int lane = 0; lane < LANES; lane++) quad.lanes[lane] = (int)(lane * quad.per_block / LANES);
    for (int64_t token = 0; token < job->tokens; token += 4)
        for (int64_t row = first; row < last; row += ROWS) {
            quad_rows(job, &quad, scratch, first, last, row);
            kernel(job, &quad, x, token);
        }
}
#endif
