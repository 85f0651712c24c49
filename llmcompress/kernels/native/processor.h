/* Which instructions this processor has: the one place that asks. */
#ifndef PROCESSOR_H
#define PROCESSOR_H

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdatomic.h>
#endif

enum { SCALAR = 0, AVX2 = 1, AVX2_VNNI = 2, AVX512 = 3, VNNI = 4 };

#if defined(__x86_64__)
/* What GCC has names for only since 11 is asked for by hand, once: in a virtual machine each question takes microseconds. */
enum { F16C = 1, AVX_VNNI = 2, ASKED = 4 };

static inline int asked(void) {
    static atomic_int answer;
    int known = atomic_load_explicit(&answer, memory_order_relaxed);
    unsigned a, b, c, d;
    if (known) return known;
    known = ASKED;
    if (__get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1) known |= F16C;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1) known |= AVX_VNNI;
    atomic_store_explicit(&answer, known, memory_order_relaxed);
    return known;
}
#endif

/* The best there is. */
static inline int best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2") ||
        !(asked() & F16C))
        return SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return asked() & AVX_VNNI ? AVX2_VNNI : AVX2;
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
    if (best == AVX2_VNNI && !(asked() & AVX_VNNI)) return AVX2;
#endif
    return best;
}
#endif
