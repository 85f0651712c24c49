/* Which instructions this processor has: the one place that asks. */
#ifndef PROCESSOR_H
#define PROCESSOR_H

enum { SCALAR = 0, AVX2 = 1, AVX512 = 2, VNNI = 3 };

/* The best there is. */
static inline int best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") ? VNNI : AVX512;
#else
    return SCALAR;
#endif
}

/* The one to use: what was asked for, where there is that, and no more than `most`; below zero asks for the best. */
static inline int level_of(long long wanted, int most) {
    int best = best_level();
    if (best > most) best = most;
    return wanted >= 0 && wanted < best ? (int)wanted : best;
}
#endif
