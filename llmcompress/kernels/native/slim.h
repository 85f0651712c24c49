/* AVX2, with or without AVX-VNNI, for inputs of 16 bits (slim.c). */
#ifndef SLIM_H
#define SLIM_H
#include "blocks.h"

/* In how many vectors of sums a block is kept apart, or 0 where its groups are too narrow for these kernels. */
static inline int slim_parts(const Job *job) {
    if (job->format == CODEBOOK) return 2;
    int64_t group = job->groups == 1 ? BLOCK : job->group;
    int64_t least = job->bits == 2 ? 16 : job->bits == 8 || job->format == TABLE ? 32 : 8;
    if (group < least) return 0;
    if (job->format == TABLE) return 2;
    return job->bits == 2 || group >= BLOCK ? 1 : job->bits == 8 ? 4 : 2;
}

/* Its kernels for a job; `dots`: with the products of AVX-VNNI, where the compiler knows them. */
Way slim_way(const Job *job, int dots) __attribute__((visibility("hidden")));
#endif
