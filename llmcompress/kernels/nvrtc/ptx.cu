// What there is a machine instruction for and no word in C++; `tests/kernels/host_ptx.h` says the same in plain C++.
//
// Compiled with: BFLOAT (16-bit floats are bfloat16, else float16); EARLY (the kernel before may still run).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

__device__ __forceinline__ void load16(u32 (&to)[4], const void *from) {  // 16 bytes that nobody needs again
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

#define SHARED_AT_LAUNCH(name) extern __shared__ __align__(16) unsigned char name[]

// Shared memory by its own 32-bit addresses.
__device__ __forceinline__ u32 shared_place(const void *place) { return (u32)__cvta_generic_to_shared(place); }

__device__ __forceinline__ void shared16(u32 (&to)[4], u32 from) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}

__device__ __forceinline__ void shared8(u32 (&to)[2], u32 from) {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from));
}

__device__ __forceinline__ void put16(u32 to, const u32 (&from)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
                 ::"r"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
}

__device__ __forceinline__ void put8(u32 to, const u32 (&from)[2]) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(to), "r"(from[0]), "r"(from[1]) : "memory");
}

__device__ __forceinline__ u32 shared4(u32 from) {
    u32 found;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(from));
    return found;
}

__device__ __forceinline__ u32 shared2(u32 from) {
    u16 found;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(found) : "r"(from));
    return found;
}

__device__ __forceinline__ u32 shared1(u32 from) {
    u32 found;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(found) : "r"(from));
    return found;
}

// 16 bytes on their way to shared memory. Copies that a thread began before a `copies_end` are one group of them.
__device__ __forceinline__ void copy16(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The warp has all groups but its last `LEFT`.
template <int LEFT> __device__ __forceinline__ void copies_are_there() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
    __syncwarp();
}

__device__ __forceinline__ void next_may_start() {
#if EARLY
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_kernels_before() {  // from here on what they wrote can be read
#if EARLY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <u32 MASK> __device__ __forceinline__ u32 chosen(u32 word, u32 others) {  // (word & MASK) | others
    u32 found;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(word), "n"(MASK), "r"(others));
    return found;
}

template <u32 WHICH> __device__ __forceinline__ u32 bytes_of(u32 low, u32 high) {  // four of eight, a nibble for each
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(low), "r"(high), "n"(WHICH));
    return found;
}

__device__ __forceinline__ u32 bytes_by(u32 low, u32 high, u32 which) {  // the same, of which the lowest 16 bits tell
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(low), "r"(high), "r"(which));
    return found;
}

__device__ __forceinline__ u32 times_plus(u32 pair, u32 factor, u32 summand) {  // of two 16-bit floats each, one rounding
    u32 found;
#if BFLOAT
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(pair), "r"(factor), "r"(summand));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(pair), "r"(factor), "r"(summand));
#endif
    return found;
}

__device__ __forceinline__ u32 rounded(float left, float right) {  // two 16-bit floats, `left` in the lower half
    u32 found;
#if BFLOAT
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(right), "f"(left));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(right), "f"(left));
#endif
    return found;
}

__device__ __forceinline__ float from_half(u16 half) {
    float found;
    asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(half));
    return found;
}

// sums (16 rows, 8 tokens) += weights (16, 16) * inputs (16, 8), all spread over the lanes of a warp.
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&weights)[4], u32 low, u32 high) {
#if BFLOAT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(low), "r"(high));
}

// sums (16 rows, 8 columns) += weights (16, 32) unsigned * inputs (32, 8) signed, exactly, spread like those of `multiply`.
__device__ __forceinline__ void multiply_bytes(int (&sums)[4], const u32 (&weights)[4], u32 low, u32 high) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(low), "r"(high));
}

__device__ __forceinline__ int bytes_sum(u32 bytes, int others) { return __dp4a((int)bytes, 0x01010101, others); }  // signed

__device__ __forceinline__ u32 larger_halves(u32 left, u32 right) { return __vmaxu2(left, right); }

__device__ __forceinline__ float inverse(float number) {  // to a bit or two
    float found;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(number));
    return found;
}

// What all of LANES neighbours have, put together; every lane of the warp takes part.
template <int LANES, class Both> __device__ __forceinline__ u32 over_lanes(u32 own, Both both) {
#pragma unroll
    for (int by = 1; by < LANES; by *= 2) own = both(own, __shfl_xor_sync(0xffffffffu, own, by));
    return own;
}
