/* BODY, once for each kind of lanes that this compiler can make. */
#define V Plain
#define DO(name) plain_##name
#define NAME(name) name##_plain
#define TARGET
#define ACROSS 1  /* vectors side by side in a product, as many as there are registers for */
#include BODY
#undef V
#undef DO
#undef NAME
#undef TARGET
#undef ACROSS
#if defined(__x86_64__)
#define V Narrow
#define DO(name) narrow_##name
#define NAME(name) name##_narrow
#define TARGET __attribute__((target("avx2,fma")))
#define ACROSS 1
#include BODY
#undef V
#undef DO
#undef NAME
#undef TARGET
#undef ACROSS
#define V Wide
#define DO(name) wide_##name
#define NAME(name) name##_wide
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define ACROSS 4
#include BODY
#undef V
#undef DO
#undef NAME
#undef TARGET
#undef ACROSS
#endif
