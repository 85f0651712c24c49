/* The step of a group that loses least, for one kind of lanes: V, DO, NAME and TARGET as in grid.h. */

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
TARGET static inline void NAME(losses)(const Search *job, const float *weight, const float *importance, const float *step, float *loss) {
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
TARGET static inline float NAME(step_of)(const Search *job, const float *weight, const float *importance, float *largest) {
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
