/* Rounding with feedback (compress/feedback.py) and coordinate descent (compress/descent.py) for symmetric integers: a tile
   of rows at a time, which stays in a core's cache from its weights to its codes. Sums are float32, in an order of their
   own, so single codes differ from those of torch where two are nearly as good. */
#include <stdatomic.h>
#include <stdlib.h>
#include "job.h"
#include "lanes.h"
#include "steps.h"
#include "team.h"

enum { TILE = 64 };

/* Fields have eight bytes each. Everything is contiguous. */
typedef struct {
    int64_t rows, columns, group, bits;
    const float *weight;        /* (rows, columns) */
    const int64_t *order;       /* (columns,): which column comes next */
    const float *upper;         /* (columns, columns), in that order; null: codes and scales are given */
    const float *metric;        /* (columns, columns), symmetric; null: no descent */
    int64_t sweeps;
    const float *importance;    /* (columns,), none negative */
    const float *shrink;        /* (shrinks,), falling */
    int64_t shrinks;            /* 0: scales are given; otherwise groups follow whole on one another */
    void *scale;                /* (rows, columns / group) of dtype scale_dtype */
    int64_t scale_dtype;
    uint8_t *codes;             /* (rows, columns) */
    int64_t threads, level;
    void *team;
} Columns;

typedef struct {
    const Columns *job;
    int64_t row, count, wide;   /* its first row, how many there are, and so many lanes; those past the end are zero */
    float *left;                /* (columns + LANES, TILE): of the weight, in their order; then the gradient, as they lie */
    float *moves, *local;       /* (BLOCK, TILE), (BLOCK + LANES, TILE) */
    float *panel;               /* (BLOCK, LANES) of a matrix */
    float *steps;               /* (groups, TILE) */
    float *gathered;            /* (2, group) */
    uint8_t *codes;             /* (columns, TILE), as they lie */
} Tile;

/* The best stored step of every row where it lowers the loss; `move` becomes what it changes. Returns whether any did. */
static int better_steps(const Tile *tile, float *steps, const float *curve, const float *slope, float *move) {
    int found = 0;
    for (int64_t r = 0; r < tile->wide; r++) {
        float high = curve[r] < 1e-30f ? 1e-30f : curve[r];
        float step = as_stored(steps[r] - slope[r] / high, tile->job->scale_dtype), apart = step - steps[r];
        move[r] = (2.0f * slope[r] + apart * curve[r]) * apart < 0.0f ? apart : 0.0f;
        if (move[r] != 0.0f && r < tile->count) steps[r] = step, found = 1;
        else move[r] = 0.0f;
    }
    return found;
}

#define BODY "columns.h"
#include "levels.h"
#undef BODY

static void open_tile(Tile *tile) {
    const Columns *job = tile->job;
    int64_t groups = job->columns / job->group;
    if (job->upper) {
        memset(tile->left, 0, (size_t)(job->columns + LANES) * TILE * sizeof(float));
        for (int64_t r = 0; r < tile->count; r++)
            for (int64_t k = 0; k < job->columns; k++)
                tile->left[k * TILE + r] = job->weight[(tile->row + r) * job->columns + job->order[k]];
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t r = 0; r < TILE; r++)
            tile->steps[g * TILE + r] = r < tile->count && !(job->upper && job->shrinks)
                                            ? read_as(job->scale, job->scale_dtype, (tile->row + r) * groups + g) : 1.0f;
    memset(tile->codes, 1 << (job->bits - 1), (size_t)job->columns * TILE);
    for (int64_t r = 0; r < tile->count && !job->upper; r++)
        for (int64_t c = 0; c < job->columns; c++) tile->codes[c * TILE + r] = job->codes[(tile->row + r) * job->columns + c];
}

static void close_tile(const Tile *tile) {
    const Columns *job = tile->job;
    int64_t groups = job->columns / job->group;
    for (int64_t r = 0; r < tile->count; r++)
        for (int64_t c = 0; c < job->columns; c++) job->codes[(tile->row + r) * job->columns + c] = tile->codes[c * TILE + r];
    for (int64_t r = 0; r < tile->count && job->metric; r++)
        for (int64_t g = 0; g < groups; g++)
            write_as(job->scale, job->scale_dtype, (tile->row + r) * groups + g, tile->steps[g * TILE + r]);
}

static int whole_tile(Tile *tile) {
#if defined(__x86_64__)
    int level = level_of(tile->job->level, AVX512);
    if (level == AVX512) return tile_wide(tile);
    if (level >= AVX2) return tile_narrow(tile);
#endif
    return tile_plain(tile);
}

typedef struct {
    const Columns *job;
    atomic_llong next, failed;
} Tiles;

static void all_tiles(void *data) {
    Tiles *tiles = data;
    const Columns *job = tiles->job;
    Tile tile = {.job = job};
    size_t columns = (size_t)job->columns, groups = columns / (size_t)job->group, row = TILE * sizeof(float);
    size_t floats = (columns + LANES) * row + BLOCK * row + (BLOCK + LANES) * row + groups * row + BLOCK * LANES * sizeof(float) +
                    2 * (size_t)job->group * sizeof(float);
    char *room = aligned_alloc(64, (floats + columns * TILE + 63) / 64 * 64);
    if (!room) {
        atomic_store(&tiles->failed, 1);
        return;
    }
    tile.left = (float *)room;
    tile.moves = tile.left + (columns + LANES) * TILE;
    tile.local = tile.moves + BLOCK * TILE;
    tile.panel = tile.local + (BLOCK + LANES) * TILE;
    tile.steps = tile.panel + BLOCK * LANES;
    tile.gathered = tile.steps + groups * TILE;
    tile.codes = (uint8_t *)(tile.gathered + 2 * job->group);
    for (int64_t first; (first = atomic_fetch_add(&tiles->next, TILE)) < job->rows && !atomic_load(&tiles->failed);) {
        tile.row = first, tile.count = job->rows - first < TILE ? job->rows - first : TILE;
        tile.wide = (tile.count + LANES - 1) / LANES * LANES;
        open_tile(&tile);
        if (whole_tile(&tile)) atomic_store(&tiles->failed, 1);
        else close_tile(&tile);
    }
    free(room);
}

/* 0, or 1 where something is not a number or there is no room; what was written is then to be forgotten. Also 1 where the
   best there is are plain lanes: torch is faster. */
int llmcompress_columns(const Columns *job) {
    Tiles tiles = {.job = job};
    if (job->level < 0 && best_level() == SCALAR) return 1;
    together(job->team, all_tiles, &tiles, job->rows > TILE ? job->threads : 1);
    return (int)atomic_load(&tiles.failed);
}
