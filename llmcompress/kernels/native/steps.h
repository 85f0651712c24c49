/* Steps as they are stored, and what a search for one is told. */
#ifndef STEPS_H
#define STEPS_H
#include <math.h>
#include "job.h"

enum { TRIES = 4 };

typedef struct {
    int64_t bits, group, shrinks, scale_dtype;
    const float *shrink;  /* (shrinks,), falling; one: no search */
} Search;

static const uint16_t TINY[] = {0, 0x0080, 0x0400};  /* smallest normal numbers, by dtype */

/* A step in the dtype it is stored in; of a group of zeros it is 1, and none becomes 0 or infinite. */
static inline float as_stored(float step, int64_t dtype) {
    float most = dtype == F32 ? 3.4028234663852886e38f : dtype == BF16 ? 3.3895313892515355e38f : 65504.0f;
    float clamped = step > most ? most : step < -most ? -most : step;
    float found = dtype == F32 ? clamped : dtype == BF16 ? from_bf16(to_bf16(clamped)) : from_f16(to_f16(clamped));
    if (found != 0.0f) return found;
    if (step == 0.0f) return 1.0f;
    return dtype == F32 ? 1.17549435e-38f : dtype == BF16 ? from_bf16(TINY[BF16]) : from_f16(TINY[F16]);
}

/* Whether the error of the largest weight alone, cut off by this step and all smaller ones, is as large as the lowest
   loss: sums of what is not negative are no smaller than their parts, so neither this step nor a smaller one can win.
   Not asked where steps do not fall as ranges shrink, which is so where they are lost to rounding. */
static inline int hopeless(float peak, float step, float half, float matters, float lowest) {
    if (!(peak * (1.0f / step) <= -half)) return 0;
    float nearest = -half * step, apart = nearest - peak;
    return fabsf(nearest) <= fabsf(peak) && apart * apart * matters >= lowest;
}
#endif
