/* A tile of rows, rounded with feedback and then descended, for one kind of lanes: V, DO, NAME, TARGET as in grid.h, and

   ACROSS     vectors side by side in a product, as many as there are registers for

   A column of the tile is TILE numbers next to each other, one of each row, so rows never meet: what a row becomes depends
   neither on the rows beside it nor on who works on them. */
#include "search.h"

/* Four columns of `to` for `across` vectors of rows: += sum over k of panel[k] moves[k]. */
TARGET static inline __attribute__((always_inline)) void NAME(four)(
    float *to, const float *panel, const float *moves, int64_t count, const int across) {
    V sum[4][ACROSS], move[ACROSS];
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int v = 0; v < across; v++) sum[i][v] = DO(load)(to + i * TILE + v * LANES);
    }
    for (int64_t k = 0; k < count; k++) {
        UNROLL
        for (int v = 0; v < across; v++) move[v] = DO(load)(moves + k * TILE + v * LANES);
        UNROLL
        for (int i = 0; i < 4; i++) {
            V factor = DO(all)(panel[k * LANES + i]);
            UNROLL
            for (int v = 0; v < across; v++) sum[i][v] = DO(fma)(factor, move[v], sum[i][v]);
        }
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int v = 0; v < across; v++) DO(store)(to + i * TILE + v * LANES, sum[i][v]);
    }
}

/* Columns `from` to `end` of `to` += matrix[0:count, from:end]^T moves[0:count]; up to three more columns get zero added. */
TARGET static void NAME(add)(const Tile *tile, float *to, const float *matrix, int64_t count, int64_t from, int64_t end) {
    int64_t stride = tile->job->columns;
    for (int64_t c = from; c < end; c += LANES) {
        int64_t width = end - c < LANES ? end - c : LANES;
        for (int64_t k = 0; k < count; k++) DO(store)(tile->panel + k * LANES, NAME(part)(matrix + k * stride + c, width));
        for (int64_t i = 0; i < width; i += 4) {
            float *at = to + (c + i) * TILE;
            const float *panel = tile->panel + i, *moves = tile->moves;
            int64_t v = 0;
            for (; v + ACROSS * LANES <= tile->wide; v += ACROSS * LANES) NAME(four)(at + v, panel, moves + v, count, ACROSS);
            for (; v < tile->wide; v += LANES) NAME(four)(at + v, panel, moves + v, count, 1);
        }
    }
}

/* Columns `from` to `end` of `to` += row[from:end] move, of the column just rounded. */
TARGET static inline void NAME(correct)(const Tile *tile, float *to, const float *row, const float *move, int64_t from, int64_t end) {
    for (int64_t c = from; c < end; c++) {
        V factor = DO(all)(row[c]);
        for (int64_t v = 0; v < tile->wide; v += LANES) {
            float *at = to + c * TILE + v;
            DO(store)(at, DO(fma)(factor, DO(load)(move + v), DO(load)(at)));
        }
    }
}

/* Steps of the group whose first column is the next, from its weights as corrected so far. */
TARGET static int NAME(enter)(Tile *tile, int64_t start) {
    const Columns *job = tile->job;
    int64_t place = job->order[start] / job->group, groups = job->columns / job->group;
    float *importance = tile->gathered, *weight = tile->gathered + job->group;
    Search search = {job->bits, job->group, job->shrinks, job->scale_dtype, job->shrink};
    for (int64_t k = 0; k < job->group; k++) importance[k] = job->importance[job->order[start + k]];
    for (int64_t r = 0; r < tile->count; r++) {
        float peak;
        for (int64_t k = 0; k < job->group; k++) weight[k] = tile->left[(start + k) * TILE + r];
        float step = NAME(step_of)(&search, weight, importance, &peak);
        if (peak != peak) return 1;
        tile->steps[place * TILE + r] = step;
        write_as(job->scale, job->scale_dtype, (tile->row + r) * groups + place, step);
    }
    return 0;
}

/* Round one column; `move` becomes what it has to add to others, for each unit of the factor. */
TARGET static inline int NAME(round_one)(Tile *tile, int64_t column, float *move) {
    const Columns *job = tile->job;
    int64_t at = job->order[column];
    float half = (float)(1 << (job->bits - 1));
    V least = DO(all)(-half), most = DO(all)(half - 1.0f), middle = DO(all)(half);
    V diagonal = DO(all)(job->upper[column * job->columns + column]);
    int strange = 0;
    for (int64_t v = 0; v < tile->wide; v += LANES) {
        V x = DO(load)(tile->left + column * TILE + v), step = DO(load)(tile->steps + at / job->group * TILE + v);
        V steps = DO(div)(x, step);
        strange |= DO(strange)(steps);
        V code = DO(round)(DO(below)(DO(above)(steps, least), most));
        DO(bytes)(tile->codes + at * TILE + v, DO(add)(code, middle));
        DO(store)(move + v, DO(div)(DO(sub)(DO(mul)(code, step), x), diagonal));
    }
    return strange;
}

/* Rounding with feedback, blocked twice: columns of an inner block one by one, everything further at once. */
TARGET static int NAME(feedback)(Tile *tile) {
    const Columns *job = tile->job;
    int64_t columns = job->columns, stop;
    int strange = 0;
    for (int64_t start = 0; start < columns && !strange; start = stop) {
        stop = start + BLOCK < columns ? start + BLOCK : columns;
        if (job->shrinks) {
            int64_t end = (start / job->group + 1) * job->group;
            if (end < stop) stop = end;
            if (start % job->group == 0) strange |= NAME(enter)(tile, start);
        }
        float *moves = tile->moves;
        for (int64_t inner = start, end; inner < stop; inner = end) {
            end = inner + LANES < stop ? inner + LANES : stop;
            for (int64_t column = inner; column < end; column++) {
                strange |= NAME(round_one)(tile, column, moves + (column - start) * TILE);
                NAME(correct)(tile, tile->left, job->upper + column * columns, moves + (column - start) * TILE, column + 1, end);
            }
            tile->moves = moves + (inner - start) * TILE;
            NAME(add)(tile, tile->left, job->upper + inner * columns, end - inner, end, stop);
        }
        tile->moves = moves;
        NAME(add)(tile, tile->left, job->upper + start * columns, stop - start, stop, columns);
    }
    return strange;
}

/* `moves` of columns `start` to `stop` become codes less half their number, each times `by`, or one where it is null. */
TARGET static void NAME(levels)(const Tile *tile, int64_t start, int64_t stop, const float *by) {
    V middle = DO(all)((float)(1 << (tile->job->bits - 1)));
    for (int64_t v = 0; v < tile->wide; v += LANES) {
        V factor = by ? DO(load)(by + v) : DO(all)(1.0f);
        for (int64_t c = start; c < stop; c++)
            DO(store)(tile->moves + (c - start) * TILE + v,
                      DO(mul)(DO(sub)(DO(of_bytes)(tile->codes + c * TILE + v), middle), factor));
    }
}

/* The gradient `(Q - W) M` into `left`. */
TARGET static void NAME(begin)(const Tile *tile) {
    const Columns *job = tile->job;
    memset(tile->left, 0, (size_t)(job->columns + LANES) * TILE * sizeof(float));
    for (int64_t start = 0, stop; start < job->columns; start = stop) {
        stop = start + BLOCK < job->columns ? start + BLOCK : job->columns;
        for (int64_t c = start; c < stop; c++) {
            float *move = tile->moves + (c - start) * TILE;
            NAME(levels)(&(Tile){.job = job, .wide = tile->wide, .codes = tile->codes, .moves = move}, c, c + 1, tile->steps + c / job->group * TILE);
            for (int64_t r = 0; r < tile->count; r++) move[r] -= job->weight[(tile->row + r) * job->columns + c];
        }
        NAME(add)(tile, tile->left, job->metric + start * job->columns, stop - start, 0, job->columns);
    }
}

/* The best code of one column, all others held; `move` becomes what that changes. Returns 1 where a code changed, or 2. */
TARGET static inline int NAME(settle)(Tile *tile, int64_t column, const float *gradient, float *move) {
    const Columns *job = tile->job;
    const float *steps = tile->steps + column / job->group * TILE;
    V zero = DO(all)(0.0f), top = DO(all)((float)((1 << job->bits) - 1));
    V diagonal = DO(all)(job->metric[column * job->columns + column]);
    int found = 0;
    for (int64_t v = 0; v < tile->wide; v += LANES) {
        uint8_t *codes = tile->codes + column * TILE + v;
        V old = DO(of_bytes)(codes), step = DO(load)(steps + v);
        V wanted = DO(sub)(old, DO(div)(DO(load)(gradient + v), DO(mul)(diagonal, step)));
        if (DO(strange)(wanted)) return 2;
        V code = DO(round)(DO(below)(DO(above)(wanted, zero), top));
        found |= DO(same)(code, old) != 0xffff;
        DO(bytes)(codes, code);
        DO(store)(move + v, DO(mul)(DO(sub)(code, old), step));
    }
    return found;
}

/* One pass over the columns. Returns as `settle`. */
TARGET static int NAME(sweep_codes)(Tile *tile) {
    const Columns *job = tile->job;
    int64_t columns = job->columns;
    int found = 0;
    for (int64_t start = 0, stop; start < columns && !(found & 2); start = stop) {
        int changed = 0;
        float *moves = tile->moves, *local = tile->local;
        stop = start + BLOCK < columns ? start + BLOCK : columns;
        memcpy(local, tile->left + start * TILE, (size_t)(stop - start) * TILE * sizeof(float));
        for (int64_t inner = start, end; inner < stop; inner = end) {
            end = inner + LANES < stop ? inner + LANES : stop;
            for (int64_t c = inner; c < end; c++) {
                float *move = moves + (c - start) * TILE;
                int one = NAME(settle)(tile, c, local + (c - start) * TILE, move);
                changed |= one;
                if (one & 1) NAME(correct)(tile, local, job->metric + c * columns + start, move, c + 1 - start, end - start);
            }
            tile->moves = moves + (inner - start) * TILE;
            NAME(add)(tile, local, job->metric + inner * columns + start, end - inner, end - start, stop - start);
        }
        tile->moves = moves;
        if (changed) NAME(add)(tile, tile->left, job->metric + start * columns, stop - start, 0, columns);
        found |= changed;
    }
    return found;
}

/* Of each row the parabola of its loss in one group's step: half its curvature, and its slope. */
TARGET static void NAME(parabola)(const Tile *tile, int64_t first, int64_t last, float *curve, float *slope) {
    const Columns *job = tile->job;
    V middle = DO(all)((float)(1 << (job->bits - 1)));
    memset(curve, 0, TILE * sizeof(float)), memset(slope, 0, TILE * sizeof(float));
    for (int64_t start = first, stop; start < last; start = stop) {
        stop = start + BLOCK < last ? start + BLOCK : last;
        memset(tile->local, 0, (size_t)(BLOCK + LANES) * TILE * sizeof(float));
        for (int64_t from = first, to; from < last; from = to) {
            to = from + BLOCK < last ? from + BLOCK : last;
            NAME(levels)(tile, from, to, NULL);
            NAME(add)(tile, tile->local, job->metric + from * job->columns + start, to - from, 0, stop - start);
        }
        for (int64_t v = 0; v < tile->wide; v += LANES) {
            V high = DO(load)(curve + v), low = DO(load)(slope + v);
            for (int64_t c = start; c < stop; c++) {
                V level = DO(sub)(DO(of_bytes)(tile->codes + c * TILE + v), middle);
                high = DO(fma)(level, DO(load)(tile->local + (c - start) * TILE + v), high);
                low = DO(fma)(level, DO(load)(tile->left + c * TILE + v), low);
            }
            DO(store)(curve + v, high), DO(store)(slope + v, low);
        }
    }
}

/* One pass over the groups. Returns 1 where a step changed. */
TARGET static int NAME(sweep_steps)(Tile *tile) {
    const Columns *job = tile->job;
    float curve[TILE], slope[TILE], move[TILE];
    int found = 0;
    for (int64_t first = 0; first < job->columns; first += job->group) {
        int64_t last = first + job->group;
        float *steps = tile->steps + first / job->group * TILE;
        NAME(parabola)(tile, first, last, curve, slope);
        if (!better_steps(tile, steps, curve, slope, move)) continue;
        found = 1;
        for (int64_t start = first, stop; start < last; start = stop) {
            stop = start + BLOCK < last ? start + BLOCK : last;
            NAME(levels)(tile, start, stop, move);
            NAME(add)(tile, tile->left, job->metric + start * job->columns, stop - start, 0, job->columns);
        }
    }
    return found;
}

/* All that is asked for, of one tile. Returns whether something is not a number. */
TARGET static int NAME(tile)(Tile *tile) {
    if (tile->job->upper && NAME(feedback)(tile)) return 1;
    if (!tile->job->metric) return 0;
    NAME(begin)(tile);
    for (int64_t k = 0; k < tile->job->sweeps; k++) {
        int codes = NAME(sweep_codes)(tile);
        if (codes & 2) return 1;
        if (!NAME(sweep_steps)(tile) && !codes) break;
    }
    return 0;
}
