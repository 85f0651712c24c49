/* What the vector kernels share: four rows at a time, in blocks of 128 codes.

   A block lies in 16 * bits bytes. Of its sixteen lanes, lane l holds codes 8 l .. 8 l + 7 whatever the width, so that field j
   of all lanes is codes j, 8 + j, 16 + j, ...; inputs are laid out in that order once (`spread_inputs`). */
#ifndef BLOCKS_H
#define BLOCKS_H
#include <math.h>
#include "job.h"

enum { PACKET = 320, WORD_PACKET = 256, SCALES_AHEAD = 32 };

typedef struct {
    float *values;                  /* (tokens, columns in whole blocks), code 8 l + j of a block at 16 j + l */
    int8_t *packets;                /* or rounded to integers (vnni.h), PACKET bytes for each block of a token, */
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
    int owners[LANES];                      /* the other way round: which block, of those that sixteen scales cover */
    int64_t covered;                        /* how many those are */
    float *joint[ROWS];                     /* room for the scales of each row times those of the inputs */
} Quad;

/* Where a block of `bits` bits can be read as a whole: in place, or in `tail` where the row ends within it. */
static inline __attribute__((always_inline))
const uint8_t *whole_block(const uint8_t *codes, int bits, int64_t size, uint8_t tail[BLOCK]) {
    if (size >= LANES * bits) return codes;
    memset(tail, 0, BLOCK);
    return memcpy(tail, codes, (size_t)size);
}

/* What one of the integers stands for that the inputs of a block become, and by what those are multiplied: of the largest
   magnitude. Not a number where that is not finite, so that no output hides it. */
static inline float scale_of_inputs(float most, float *inverse) {
    *inverse = 0.0f;
    if (most == 0.0f) return 0.0f;
    if (!(most < INFINITY)) return NAN;
    *inverse = INPUT_MOST / most;
    if (*inverse < INFINITY) return most / INPUT_MOST;
    *inverse = 0x1p127f;  /* inputs that are next to nothing */
    return 0x1p-127f;
}

/* The first scale of a block. */
static inline int64_t scale_place(const Quad *quad, int64_t block) {
    return quad->blocks == 1 ? block * quad->per_block : block / quad->blocks;
}

/* The same, from block to block of a row without dividing. */
typedef struct { int64_t place, seen; } Walk;

static inline void next_block(const Quad *quad, Walk *walk) {
    if (quad->blocks == 1) walk->place += quad->per_block;
    else if (++walk->seen == quad->blocks) walk->seen = 0, walk->place++;
}

/* How the scales of a row are read; as `row_scales`. Null where the kernel reads them. */
typedef void (*Scales)(const Job *, int64_t row, float *to);

/* Tokens from `token` on, at most four, of four rows. */
typedef void (*Kernel)(const Job *, const Quad *, const Inputs *, int64_t token);

/* One block of inputs of 16 bits as the kernel takes them: as integers. */
typedef void (*Packets)(const Job *, const Inputs *, int64_t token, int64_t block);

/* What the codes of a row stand for, in the places of row r of the quad. */
typedef void (*Tables)(const Job *, Quad *, int r);

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

/* How a job is done: with inputs as float32 where there are no `packets`, which have so many bytes and sums for each block. */
typedef struct { Kernel kernel; Scales scales; Tables tables; Packets packets; int64_t bytes, sums; } Way;

/* The same as for the first row. */
static void copy_tables(Quad *quad, int r) {
    memcpy(quad->table[r], quad->table[0], sizeof quad->table[0]);
    memcpy(quad->integers[r], quad->integers[0], sizeof quad->integers[0]);
    quad->step[r] = quad->step[0];
}

static void quad_rows(const Job *job, Quad *quad, const float *scales, int64_t first, int64_t last, int64_t row, Tables tables) {
    int64_t room = job->groups + LANES;
    for (int r = 0; r < ROWS; r++) {  /* past the last row, the last one again */
        int64_t mine = row + r < last ? row + r : last - 1;
        quad->row[r] = mine;
        quad->codes[r] = job->codes + mine * job->stride;
        quad->scale[r] = scales + (mine - first) * room;
        quad->zero[r] = quad->scale[r] + (last - first) * room;
        if (job->format == CODEBOOK) tables(job, quad, r);
    }
}

/* Scales and zero-points of rows [first, last), from `to` on, and the processor told of those that follow. */
static void load_scales(const Job *job, int64_t first, int64_t last, float *to, Scales scales) {
    static const int64_t bytes[] = {4, 2, 2, 1};  /* of a scale, by dtype */
    int64_t groups = job->groups, room = groups + LANES, size = groups * bytes[job->scale_dtype];
    const char *next = (const char *)job->scale + (first + SCALES_AHEAD) * size;
    if (job->group)
        for (int64_t place = 0; place < (last - first) * size; place += 64) __builtin_prefetch(next + place);
    for (int64_t row = first; row < last; row++) {
        if (scales) scales(job, row, to + (row - first) * room);
        if (job->format == ASYMMETRIC) row_zeros(job, row, to + (last - first + row - first) * room);
    }
}

static inline int64_t joint_room(const Job *job) {
    int64_t groups = job->groups, blocks = (job->columns + BLOCK - 1) / BLOCK;
    return (groups > blocks ? groups : blocks) + 2 * LANES;
}

/* Floats that `rows_blocks` needs for so many rows. */
static inline int64_t room_of(const Job *job, int64_t rows) {
    return 2 * rows * (job->groups + LANES) + ROWS * joint_room(job);
}

/* Rows [first, last) of all tokens; `scratch` has `room_of` floats. Few tokens pass over the rows once, and then scales are
   read four rows at a time, so that codes and scales come from memory side by side. */
static inline void rows_blocks(const Job *job, const Inputs *x, int64_t first, int64_t last, float *scratch, const Way *way) {
    Quad quad = {.step = {1.0f, 1.0f, 1.0f, 1.0f}};
    if (job->bits < 8 && job->format != CODEBOOK) {
        fill_tables(job, &quad, 0);
        for (int r = 1; r < ROWS; r++) copy_tables(&quad, r);
    }
    int64_t group = job->groups == 1 ? job->columns + 2 * BLOCK : job->group;  /* one for all: more than there are */
    int64_t height = job->tokens > 4 ? last - first : ROWS;
    quad.per_block = group < BLOCK ? BLOCK / group : 1;
    quad.blocks = group < BLOCK ? 1 : group / BLOCK;
    quad.covered = LANES / quad.per_block;
    for (int r = 0; r < ROWS; r++)
        quad.joint[r] = scratch + 2 * height * (job->groups + LANES) + r * joint_room(job);
    for (int lane = 0; lane < LANES; lane++) {
        quad.lanes[lane] = (int)(lane * quad.per_block / LANES);
        quad.owners[lane] = (int)(lane / quad.per_block);
    }
    for (int64_t top = first; top < last; top += height) {
        int64_t end = top + height < last ? top + height : last;
        load_scales(job, top, end, scratch, way->scales);
        for (int64_t token = 0; token < job->tokens; token += 4)
            for (int64_t row = top; row < end; row += ROWS) {
                quad_rows(job, &quad, scratch, top, end, row, way->tables);
                way->kernel(job, &quad, x, token);
            }
    }
}
#endif
