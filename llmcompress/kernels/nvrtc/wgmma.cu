// Compute capability 9.0: matrix instructions of four warps, copies that arrive later, and shared memory by address.
// `tests/kernels/host_wgmma.h` says the same in plain C++. Encodings as in the PTX ISA: "Asynchronous Warpgroup Level
// Matrix Instructions" (fragments of m64nNk16, matrix descriptor, 128-byte swizzling of a K-major matrix).

typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_memory() {  // where it begins: the swizzle wants a multiple of 1024
    SHARED_AT_LAUNCH(memory);
    return (shared_place(memory) + 1023) & ~1023u;
}

// 16 bytes of which `size`, 0 or 16, are read and the others are zeros.
__device__ __forceinline__ void copy16(u32 to, const void *from, u32 size) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(size) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

template <int LEFT> __device__ __forceinline__ void await_copies() {  // all groups of this thread but the last LEFT
    asm volatile("cp.async.wait_group %0;" : : "n"(LEFT) : "memory");
}

// What this thread wrote to shared memory, copies included, can be read by matrix instructions.
__device__ __forceinline__ void show_writes() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// Four matrices of 8 by 16 bytes: lane n has 4 bytes of row n / 4 of each and names row n % 8 of the (n / 8)th.
__device__ __forceinline__ void load_matrices(u32 &a, u32 &b, u32 &c, u32 &d, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(from) : "memory");
}

// The same way back, transposed: row i of what is stored has column i of all 16-bit rows that the lanes hold.
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 : : "r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 from) {
    uint4 found;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w) : "r"(from) : "memory");
    return found;
}

__device__ __forceinline__ u32 constant_at(u32 from) {  // that nobody writes any more
    u32 found;
    asm("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(from));
    return found;
}

__device__ __forceinline__ void store_four(u32 to, u32 word) {  // copies, side by side
    asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" : : "r"(to), "r"(word) : "memory");
}

__device__ __forceinline__ u32 halves(float left, float right) {  // float16 whatever the type of the inputs
    u32 found;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(right), "f"(left));
    return found;
}

// Registers written before are those that the next instructions see.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

template <int LEFT> __device__ __forceinline__ void await_products() {  // all groups of this warpgroup but the last LEFT
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(LEFT) : "memory");
}

__device__ __forceinline__ void hold(u32 &word) { asm volatile("" : "+r"(word) : : "memory"); }  // not to be reused before

// Rows of 128 bytes in the 128-byte swizzle, eight of them in 1024 bytes.
__device__ __forceinline__ u64 described(u32 address) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | address >> 4; }

#define FOUR(n) "+f"(sums[n]), "+f"(sums[n + 1]), "+f"(sums[n + 2]), "+f"(sums[n + 3])
#define SIXTEEN(n) FOUR(n), FOUR(n + 4), FOUR(n + 8), FOUR(n + 12)

// sums (64 rows, 128 tokens) += weights (64, 16), in registers, * inputs (16, 128), in shared memory: begun here.
__device__ __forceinline__ void begin_product(float (&sums)[64], const u32 (&weights)[4], u64 inputs) {
    asm volatile(
#if BFLOAT
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
#else
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
#endif
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        "{%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(inputs));
}
