/* Sixteen float32 lanes with AVX-512, AVX2 and plain C: the same operations in the same order, so the same bits.

   `below` and `above` keep a NaN, as torch's clamp does. `fold` adds the upper half of the lanes to the lower, four times. */
#ifndef LANES_H
#define LANES_H
#include <stdint.h>
#include <string.h>
#include "processor.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define WIDE_LANES static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
typedef __m512 Wide;
WIDE_LANES Wide wide_load(const float *from) { return _mm512_loadu_ps(from); }
WIDE_LANES void wide_store(float *to, Wide x) { _mm512_storeu_ps(to, x); }
WIDE_LANES Wide wide_all(float x) { return _mm512_set1_ps(x); }
WIDE_LANES Wide wide_add(Wide x, Wide y) { return _mm512_add_ps(x, y); }
WIDE_LANES Wide wide_sub(Wide x, Wide y) { return _mm512_sub_ps(x, y); }
WIDE_LANES Wide wide_mul(Wide x, Wide y) { return _mm512_mul_ps(x, y); }
WIDE_LANES Wide wide_fma(Wide x, Wide y, Wide z) { return _mm512_fmadd_ps(x, y, z); }
WIDE_LANES Wide wide_div(Wide x, Wide y) { return _mm512_div_ps(x, y); }
WIDE_LANES Wide wide_below(Wide x, Wide most) { return _mm512_min_ps(most, x); }
WIDE_LANES Wide wide_above(Wide x, Wide least) { return _mm512_max_ps(least, x); }
WIDE_LANES Wide wide_abs(Wide x) { return _mm512_abs_ps(x); }
WIDE_LANES Wide wide_round(Wide x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
WIDE_LANES int wide_strange(Wide x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
WIDE_LANES unsigned wide_same(Wide x, Wide y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
WIDE_LANES void wide_bytes(uint8_t *to, Wide x) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }
WIDE_LANES Wide wide_of_bytes(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
WIDE_LANES float half_fold(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
WIDE_LANES float wide_fold(Wide x) {
    return half_fold(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
WIDE_LANES float wide_most(Wide x) { return _mm512_reduce_max_ps(x); }

#define NARROW_LANES static inline __attribute__((always_inline, target("avx2,fma")))
typedef struct { __m256 low, high; } Narrow;
#define BOTH(call_low, call_high) ((Narrow){call_low, call_high})
NARROW_LANES Narrow narrow_load(const float *from) { return BOTH(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)); }
NARROW_LANES void narrow_store(float *to, Narrow x) { _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + 8, x.high); }
NARROW_LANES Narrow narrow_all(float x) { return BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
NARROW_LANES Narrow narrow_add(Narrow x, Narrow y) { return BOTH(_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)); }
NARROW_LANES Narrow narrow_sub(Narrow x, Narrow y) { return BOTH(_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)); }
NARROW_LANES Narrow narrow_mul(Narrow x, Narrow y) { return BOTH(_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)); }
NARROW_LANES Narrow narrow_fma(Narrow x, Narrow y, Narrow z) {
    return BOTH(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
NARROW_LANES Narrow narrow_div(Narrow x, Narrow y) { return BOTH(_mm256_div_ps(x.low, y.low), _mm256_div_ps(x.high, y.high)); }
NARROW_LANES Narrow narrow_below(Narrow x, Narrow y) { return BOTH(_mm256_min_ps(y.low, x.low), _mm256_min_ps(y.high, x.high)); }
NARROW_LANES Narrow narrow_above(Narrow x, Narrow y) { return BOTH(_mm256_max_ps(y.low, x.low), _mm256_max_ps(y.high, x.high)); }
NARROW_LANES Narrow narrow_abs(Narrow x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return BOTH(_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high));
}
NARROW_LANES Narrow narrow_round(Narrow x) { return BOTH(_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)); }
NARROW_LANES int narrow_strange(Narrow x) {
    __m256 any = _mm256_or_ps(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q), _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q));
    return _mm256_movemask_ps(any) != 0;
}
NARROW_LANES unsigned narrow_same(Narrow x, Narrow y) {
    int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, _CMP_EQ_OQ));
    return (unsigned)low | (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, _CMP_EQ_OQ)) << 8;
}
NARROW_LANES void narrow_bytes(uint8_t *to, Narrow x) {
    __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
    both = _mm256_permute4x64_epi64(both, 0xd8);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
}
NARROW_LANES Narrow narrow_of_bytes(const uint8_t *from) {
    __m128i all = _mm_loadu_si128((const __m128i *)from);
    return BOTH(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))));
}
NARROW_LANES float narrow_fold(Narrow x) {
    __m256 half = _mm256_add_ps(x.low, x.high);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
NARROW_LANES float narrow_most(Narrow x) {
    __m256 half = _mm256_max_ps(x.low, x.high);
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
#undef BOTH
#endif

/* Vectors of the compiler's own: whatever instructions the processor has for four lanes, or one. */
#define PLAIN_LANES static inline __attribute__((always_inline))
typedef float Plain __attribute__((vector_size(64)));
typedef int32_t PlainBits __attribute__((vector_size(64)));
PLAIN_LANES Plain plain_load(const float *from) {
    Plain x;
    memcpy(&x, from, sizeof x);
    return x;
}
PLAIN_LANES void plain_store(float *to, Plain x) { memcpy(to, &x, sizeof x); }
PLAIN_LANES Plain plain_all(float x) { return (Plain){0} + x; }
PLAIN_LANES Plain plain_add(Plain x, Plain y) { return x + y; }
PLAIN_LANES Plain plain_sub(Plain x, Plain y) { return x - y; }
PLAIN_LANES Plain plain_mul(Plain x, Plain y) { return x * y; }
PLAIN_LANES Plain plain_fma(Plain x, Plain y, Plain z) { return x * y + z; }
PLAIN_LANES Plain plain_div(Plain x, Plain y) { return x / y; }
PLAIN_LANES Plain plain_choose(PlainBits which, Plain x, Plain y) {
    return (Plain)((which & (PlainBits)x) | (~which & (PlainBits)y));
}
PLAIN_LANES Plain plain_below(Plain x, Plain most) { return plain_choose((PlainBits)(x > most), most, x); }
PLAIN_LANES Plain plain_above(Plain x, Plain least) { return plain_choose((PlainBits)(x < least), least, x); }
PLAIN_LANES Plain plain_abs(Plain x) { return (Plain)((PlainBits)x & 0x7fffffff); }
/* Of what is between -2**22 and 2**22: the adder rounds, to even. */
PLAIN_LANES Plain plain_round(Plain x) { return (x + 12582912.0f) - 12582912.0f; }
PLAIN_LANES int plain_strange(Plain x) {
    int found = 0;
    for (int i = 0; i < 16; i++) found |= x[i] != x[i];
    return found;
}
PLAIN_LANES unsigned plain_same(Plain x, Plain y) {
    unsigned found = 0;
    for (int i = 0; i < 16; i++) found |= (unsigned)(x[i] == y[i]) << i;
    return found;
}
PLAIN_LANES void plain_bytes(uint8_t *to, Plain x) {
    for (int i = 0; i < 16; i++) to[i] = (uint8_t)(int32_t)x[i];
}
PLAIN_LANES Plain plain_of_bytes(const uint8_t *from) {
    Plain x;
    for (int i = 0; i < 16; i++) x[i] = (float)from[i];
    return x;
}
PLAIN_LANES float plain_fold(Plain x) {
    float lane[16];
    plain_store(lane, x);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}
PLAIN_LANES float plain_most(Plain x) {
    float most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}
#endif
