/* The rows of a `Grid` for one kind of lanes. Included once for each, with

   V          sixteen float32 lanes
   DO(name)   an operation on them (lanes.h)
   NAME(name) what a function is called here
   TARGET     the instructions it may use */

/* `count` weights from `from`, the lanes behind them zero. */
TARGET static inline V NAME(part)(const float *from, int64_t count) {
    if (count >= LANES) return DO(load)(from);
    float all[LANES] = {0};
    memcpy(all, from, (size_t)count * sizeof(float));
    return DO(load)(all);
}

/* The first weight of the largest magnitude, and its place; not a number where one weight is none. */
TARGET static inline float NAME(largest)(const float *weight, int64_t size, int64_t *place) {
    V most = DO(all)(0.0f);
    int strange = 0;
    for (int64_t k = 0; k < size; k += LANES) {
        V x = DO(abs)(NAME(part)(weight + k, size - k));
        strange |= DO(strange)(x);
        most = DO(above)(x, most);
    }
    *place = 0;
    if (strange) return NAN;
    V wanted = DO(all)(DO(most)(most));
    for (int64_t k = 0; k < size; k += LANES) {
        unsigned found = DO(same)(DO(abs)(NAME(part)(weight + k, size - k)), wanted);
        if (found) {
            *place = k + __builtin_ctz(found);
            break;
        }
    }
    return weight[*place];
}

/* Squared error of a group on a grid of this step, each times its importance. */
TARGET static inline V NAME(square)(V weight, V step, V inverse, V least, V most) {
    V code = DO(round)(DO(below)(DO(above)(DO(mul)(weight, inverse), least), most));
    V apart = DO(sub)(DO(mul)(code, step), weight);
    return DO(mul)(apart, apart);
}

/* What a group loses under each of TRIES steps. */
TARGET static inline void NAME(losses)(const Grid *job, const float *weight, const float *importance, const float *step, float *loss) {
    float half = (float)(1 << (job->bits - 1));
    V least = DO(all)(-half), most = DO(all)(half - 1.0f), wide[TRIES], inverse[TRIES], sum[TRIES];
    UNROLL
    for (int t = 0; t < TRIES; t++) wide[t] = DO(all)(step[t]), inverse[t] = DO(all)(1.0f / step[t]), sum[t] = DO(all)(0.0f);
    int64_t k = 0, size = job->group;
    for (; k + LANES <= size; k += LANES) {
        V some = DO(load)(weight + k), matters = DO(load)(importance + k);
        UNROLL
        for (int t = 0; t < TRIES; t++)
            sum[t] = DO(add)(sum[t], DO(mul)(NAME(square)(some, wide[t], inverse[t], least, most), matters));
    }
    for (int t = 0; t < TRIES && k < size; t++) {
        float rest[LANES];
        DO(store)(rest, NAME(square)(NAME(part)(weight + k, size - k), wide[t], inverse[t], least, most));
        for (int64_t i = 0; i < LANES; i++) rest[i] = k + i < size ? rest[i] * importance[k + i] : 0.0f;
        sum[t] = DO(add)(sum[t], DO(load)(rest));
    }
    UNROLL
    for (int t = 0; t < TRIES; t++) loss[t] = DO(fold)(sum[t]);
}

/* The stored step of one group that loses least; `*largest` becomes its largest weight. */
TARGET static inline float NAME(step_of)(const Grid *job, const float *weight, const float *importance, float *largest) {
    int64_t place;
    float half = (float)(1 << (job->bits - 1)), peak = NAME(largest)(weight, job->group, &place), full = -peak / half;
    float best = as_stored(full, job->scale_dtype), lowest = INFINITY, step[TRIES], loss[TRIES];
    *largest = peak;
    if (job->shrinks < 2 || peak != peak) return best;
    int falls = fabsf(as_stored(full * job->shrink[job->shrinks - 1], job->scale_dtype)) <= fabsf(best);
    for (int64_t k = 0; k < job->shrinks; k += TRIES) {
        for (int t = 0; t < TRIES; t++) {  /* past the end the last one again, which cannot be better than itself */
            int64_t at = k + t < job->shrinks ? k + t : job->shrinks - 1;
            step[t] = as_stored(full * job->shrink[at], job->scale_dtype);
        }
        if (falls && hopeless(peak, step[0], half, importance[place], lowest)) break;
        NAME(losses)(job, weight, importance, step, loss);
        for (int t = 0; t < TRIES; t++)
            if (loss[t] < lowest) lowest = loss[t], best = step[t];
    }
    return best;
}

/* Steps of one row. Returns whether a weight is not a number. */
TARGET static int NAME(row_steps)(const Grid *job, int64_t row) {
    int64_t groups = job->columns / job->group;
    const float *weight = job->weight + row * job->columns;
    for (int64_t g = 0; g < groups; g++) {
        float peak, step = NAME(step_of)(job, weight + g * job->group, job->importance + g * job->group, &peak);
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
