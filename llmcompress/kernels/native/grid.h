/* The rows of a `Grid` for one kind of lanes. Included once for each, with

   V          sixteen float32 lanes
   DO(name)   an operation on them (lanes.h)
   NAME(name) what a function is called here
   TARGET     the instructions it may use */

#include "search.h"

/* Steps of one row. Returns whether a weight is not a number. */
TARGET static int NAME(row_steps)(const Grid *job, int64_t row) {
    int64_t groups = job->columns / job->group;
    const float *weight = job->weight + row * job->columns;
    Search search = {job->bits, job->group, job->shrinks, job->scale_dtype, job->shrink};
    for (int64_t g = 0; g < groups; g++) {
        float peak, step = NAME(step_of)(&search, weight + g * job->group, job->importance + g * job->group, &peak);
        if (peak != peak) return 1;
        write_as(job->scale, job->scale_dtype, row * groups + g, step);
    }
    return 0;
}

/* Codes of one row, nearest to its weights. Returns whether one is not a number of steps. */
TARGET static int NAME(row_codes)(const Grid *job, int64_t row) {
    int64_t groups = job->columns / job->group;
    float half = (float)(1 << (job->bits - 1));
    V least = DO(all)(-half), most = DO(all)(half - 1.0f), middle = DO(all)(half);
    int strange = 0;
    for (int64_t g = 0; g < groups; g++) {
        V step = DO(all)(read_as(job->scale, job->scale_dtype, row * groups + g));
        const float *weight = job->weight + row * job->columns + g * job->group;
        uint8_t *codes = job->codes + row * job->columns + g * job->group;
        for (int64_t k = 0; k < job->group; k += LANES) {
            uint8_t rest[LANES];
            int64_t count = job->group - k;
            V steps = DO(div)(NAME(part)(weight + k, count), step);
            strange |= DO(strange)(steps);
            V code = DO(add)(DO(round)(DO(below)(DO(above)(steps, least), most)), middle);
            DO(bytes)(count < LANES ? rest : codes + k, code);
            if (count < LANES) memcpy(codes + k, rest, (size_t)count);
        }
    }
    return strange;
}

/* Weights of one row from its codes. */
TARGET static int NAME(row_weights)(const Grid *job, int64_t row) {
    int64_t groups = job->columns / job->group;
    V middle = DO(all)((float)(1 << (job->bits - 1)));
    for (int64_t g = 0; g < groups; g++) {
        V step = DO(all)(read_as(job->scale, job->scale_dtype, row * groups + g));
        const uint8_t *codes = job->codes + row * job->columns + g * job->group;
        float *weight = job->restored + row * job->columns + g * job->group;
        for (int64_t k = 0; k < job->group; k += LANES) {
            uint8_t some[LANES] = {0};
            float rest[LANES];
            int64_t count = job->group - k;
            if (count < LANES) memcpy(some, codes + k, (size_t)count);
            V found = DO(mul)(DO(sub)(DO(of_bytes)(count < LANES ? some : codes + k), middle), step);
            DO(store)(count < LANES ? rest : weight + k, found);
            if (count < LANES) memcpy(weight + k, rest, (size_t)count * sizeof(float));
        }
    }
    return 0;
}

/* Squared error of a row's codes, and square of the row: float32 lanes inside a group, float64 from there on. */
TARGET static int NAME(row_errors)(const Grid *job, int64_t row) {
    int64_t groups = job->columns / job->group;
    V middle = DO(all)((float)(1 << (job->bits - 1)));
    double error = 0, whole = 0;
    for (int64_t g = 0; g < groups; g++) {
        V step = DO(all)(read_as(job->scale, job->scale_dtype, row * groups + g)), apart = DO(all)(0.0f), own = apart;
        const float *weight = job->weight + row * job->columns + g * job->group;
        const uint8_t *codes = job->codes + row * job->columns + g * job->group;
        for (int64_t k = 0; k < job->group; k += LANES) {
            int64_t count = job->group - k;
            V wanted = NAME(part)(weight + k, count), found;
            if (count >= LANES) {
                found = DO(mul)(DO(sub)(DO(of_bytes)(codes + k), middle), step);
            } else {
                float rest[LANES] = {0}, half = (float)(1 << (job->bits - 1));
                for (int64_t i = 0; i < count; i++)
                    rest[i] = ((float)codes[k + i] - half) * read_as(job->scale, job->scale_dtype, row * groups + g);
                found = DO(load)(rest);
            }
            V off = DO(sub)(found, wanted);
            apart = DO(add)(apart, DO(mul)(off, off));
            own = DO(add)(own, DO(mul)(wanted, wanted));
        }
        error += (double)DO(fold)(apart), whole += (double)DO(fold)(own);
    }
    job->sums[2 * row] = error, job->sums[2 * row + 1] = whole;
    return 0;
}

/* Mean of a row, and the sum of squares about it, in float64: eight sums that are added at the end. */
TARGET static int NAME(row_moments)(const Grid *job, int64_t row) {
    const float *weight = job->weight + row * job->columns;
    int64_t whole = job->columns / 8 * 8;
    Doubles sum = {0}, squares = {0};
    double mean = 0, square = 0;
    for (int64_t k = 0; k < whole; k += 8) sum += eight(weight + k);
    for (int i = 0; i < 8; i++) mean += sum[i];
    for (int64_t k = whole; k < job->columns; k++) mean += (double)weight[k];
    mean /= (double)job->columns;
    for (int64_t k = 0; k < whole; k += 8) {
        Doubles apart = eight(weight + k) - mean;
        squares += apart * apart;
    }
    for (int i = 0; i < 8; i++) square += squares[i];
    for (int64_t k = whole; k < job->columns; k++) square += ((double)weight[k] - mean) * ((double)weight[k] - mean);
    job->sums[2 * row] = mean, job->sums[2 * row + 1] = square;
    return 0;
}

/* How many weights of a row lie further above the mean than the deviation, and how many further below. */
TARGET static int NAME(row_beyond)(const Grid *job, int64_t row) {
    const float *weight = job->weight + row * job->columns;
    int64_t whole = job->columns / 8 * 8, above = 0, below = 0;
    Counts high = {0}, low = {0};
    for (int64_t k = 0; k < whole; k += 8) {
        Doubles apart = eight(weight + k) - job->mean;
        high += apart > job->deviation, low += apart < -job->deviation;  /* what is true is -1 */
    }
    for (int i = 0; i < 8; i++) above -= high[i], below -= low[i];
    for (int64_t k = whole; k < job->columns; k++) {
        double apart = (double)weight[k] - job->mean;
        above += apart > job->deviation, below += apart < -job->deviation;
    }
    job->sums[2 * row] = (double)above, job->sums[2 * row + 1] = (double)below;
    return 0;
}
