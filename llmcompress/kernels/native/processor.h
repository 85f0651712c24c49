/* Which instructions this processor has: the one place that asks. */
#ifndef PROCESSOR_H
#define PROCESSOR_H

#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum { SCALAR = 0, AVX2 = 1, AVX2_VNNI = 2, AVX512 = 3, VNNI = 4 };

#if defined(__x86_64__)
/* Conversions of 16-bit floats, which every processor with AVX2 is expected to have. */
static inline int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}

/* AVX-VNNI: products of bytes in 256 bits, also where there is no AVX-512. Compilers know its name only since GCC 11. */
static inline int has_avx_vnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

/* The best there is. */
static inline int best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2") ||
        !has_f16c())
        return SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return has_avx_vnni() ? AVX2_VNNI : AVX2;
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") ? VNNI : AVX512;
#else
    return SCALAR;
#endif
}

/* The one to use: what was asked for, where there is that, and no more than `most`; below zero asks for the best. */
static inline int level_of(long long wanted, int most) {
    int best = best_level();
    if (best > most) best = most;
    if (wanted >= 0 && wanted < best) best = (int)wanted;
#if defined(__x86_64__)
    if (best == AVX2_VNNI && !has_avx_vnni()) return AVX2;
#endif
    return best;
}
#endif
