/* Rows of blocks times inputs of 16 bits with AVX2: the kernels of slim_rows.h, without and with AVX-VNNI. */
#if defined(__x86_64__)
#include "slim_inputs.h"

#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define DOTS 0
#include "slim_rows.h"
#undef NAME
#undef TARGET
#undef DOTS
#if __GNUC__ >= 11 || __clang_major__ >= 12
#define HAVE_DOTS
#define NAME(name) name##_dots
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define DOTS 1
#include "slim_rows.h"
#endif

Way slim_way(const Job *job, int dots) {
    Way way = {kernel_avx2(job), narrow_scales, slim_tables, inputs_avx2, SLIM_PACKET, SLIM_SUMS};
#ifdef HAVE_DOTS
    if (dots) way.kernel = kernel_dots(job), way.packets = inputs_dots;
#else
    (void)dots;
#endif
    return way;
}
#endif
