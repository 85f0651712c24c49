// Few tokens against a packed weight. A warp takes 16 rows and every WARPS-th block of them; weights are the tall
// operand of m16n8k16 matrix instructions, up to 8 * TILES tokens the narrow one. Codes come from memory straight into
// the registers in which the instruction wants them: the planar order of `triton/bits.py` puts pairs of neighbours
// side by side. Products of a group add up in float32 and meet its scale there, once. The warps of a thread block
// share its rows, and add their sums in order at the end: equal inputs give equal bits.
//
// Compiled with: BITS, WORDS, FIELDS, PLANES (the order), GROUP (0: the row), ZERO, TABLE, EVEN (blocks are
// whole), TILES, WARPS, BFLOAT (bfloat16 inputs, else float16), SCALE (0 float32, 1 bfloat16, 2 float16).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

constexpr int RUNS = WORDS / 32;                        // 16-byte loads of a row and plane that cover a block
constexpr int BLOCK = FIELDS * WORDS;                   // codes of a row in a block
constexpr int IN_GROUP = GROUP == 0 || GROUP >= BLOCK ? FIELDS : GROUP / WORDS;  // fields that share a scale
constexpr int GROUPS = FIELDS / IN_GROUP;               // of a block
constexpr int MANTISSA = BFLOAT ? 7 : 10;
constexpr u32 BASE = BFLOAT ? 0x43004300u : 0x64006400u;  // 128 or 1024: a code fits into its mantissa
constexpr int LANES = BITS == 3 ? 4 : BITS;             // bits from one field of a word to the next
constexpr int PLACES = (MANTISSA - BITS) / LANES + 1;   // fields that fit into a mantissa side by side

struct Block {  // what one lane holds of a block: rows `lane / 4` and `lane / 4 + 8`
    u32 words[RUNS][PLANES][2][4];
};

__device__ __forceinline__ void load16(u32 (&to)[4], const void *from) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

__device__ __forceinline__ float scale_at(const void *scale, u32 place) {
#if SCALE == 0
    return __ldg((const float *)scale + place);
#elif SCALE == 1
    return __uint_as_float((u32)__ldg((const u16 *)scale + place) << 16);
#else
    float found;
    asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(__ldg((const u16 *)scale + place)));
    return found;
#endif
}

__device__ constexpr u32 twice(u32 half) { return half | half << 16; }

__device__ constexpr u32 whole(int number) {  // a small integer in the type of the inputs, twice
    int power = 0;
    while (number >> power > 1) power++;
    return twice(((BFLOAT ? 127 : 15) + power) << MANTISSA | (((u32)number << MANTISSA >> power) & ((1u << MANTISSA) - 1)));
}

__device__ constexpr u32 half_to_the(int power) { return twice(((BFLOAT ? 127 : 15) - power) << MANTISSA); }

// (base + code * 2**SHIFT) / 2**SHIFT - base / 2**SHIFT - CENTRE, two at a time, exact here.
template <int SHIFT, int CENTRE> __device__ __forceinline__ u32 centred(u32 pair) {
    constexpr u32 minus = whole((1 << MANTISSA >> SHIFT) + CENTRE) | 0x80008000u;
    u32 found;
#if BFLOAT
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(pair), "r"(half_to_the(SHIFT)), "r"(minus));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(pair), "r"(half_to_the(SHIFT)), "r"(minus));
#endif
    return found;
}

template <u32 MASK> __device__ __forceinline__ u32 chosen(u32 word, u32 others) {  // (word & MASK) | others
    u32 found;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(word), "n"(MASK), "r"(others));
    return found;
}

__device__ __forceinline__ u32 rounded(float left, float right) {  // two numbers in the type of the inputs
    u32 found;
#if BFLOAT
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(right), "f"(left));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(right), "f"(left));
#endif
    return found;
}

template <int BY> __device__ __forceinline__ u32 moved(u32 word) { return BY >= 0 ? word >> BY : word << -BY; }

// Two neighbouring codes of one field, less the centre, in the type of the inputs.
template <int FIELD> __device__ __forceinline__ u32 pair_of(const u32 *planes, u32 table) {
#if TABLE
    const u32 word = planes[0];
    u32 found;
    const u32 place = chosen<0x7f80>(moved<8 * FIELD - 7>(planes[0]), table);
    asm("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(place));
    return found;
#elif BITS == 8 && BFLOAT
    u32 low, high;  // 2**23 + code, as float32
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(low) : "r"(planes[0]), "r"(0x4B000000u), "n"(0x7650 + FIELD));
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(planes[0]), "r"(0x4B000000u), "n"(0x7652 + FIELD));
    return rounded(__uint_as_float(low) - 8388736.0f, __uint_as_float(high) - 8388736.0f);
#elif BITS == 8
    u32 word;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(planes[0]), "r"(0x64646464u), "n"(0x4240 + FIELD * 0x101));
    return centred<0, 128>(word);
#else
    constexpr int CENTRE = 1 << (BITS - 1);
    if constexpr (BITS == 3 && FIELD >= 12) {  // the highest bits of three nibbles are one code
        constexpr int TOP = 4 * (FIELD % 4) + 3;
        u32 word = chosen<0x00010001u>(moved<TOP>(planes[0]), BASE);
        word = chosen<0x00020002u>(moved<TOP - 1>(planes[1]), word);
        return centred<0, CENTRE>(chosen<0x00040004u>(moved<TOP - 2>(planes[2]), word));
    } else {
        constexpr int NUMBER = BITS == 3 ? FIELD % 4 : FIELD, SHIFT = NUMBER % PLACES * LANES;
        constexpr u32 MASK = twice(((1u << BITS) - 1) << SHIFT);
        const u32 word = planes[BITS == 3 ? FIELD / 4 : 0];
        return centred<SHIFT, CENTRE>(chosen<MASK>(moved<(NUMBER - NUMBER % PLACES) * LANES>(word), BASE));
    }
#endif
}

__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&weights)[4], u32 low, u32 high) {
#if BFLOAT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(low), "r"(high));
}

struct Sums {
    float products[TILES][4];
#if ZERO
    float inputs[TILES][4];  // sums of inputs, in every row
#endif
};

struct Lane {
    const u16 *x[TILES];  // this lane's tokens and columns; lanes without a token of their own repeat the last one
    int left;             // columns from there to the end of the row
    u32 table;
};

template <int OFFSET> __device__ __forceinline__ void inputs_at(u32 (&to)[TILES][4], const Lane &lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        uint4 found = {0, 0, 0, 0};
        if (EVEN || OFFSET < lane.left) found = __ldg((const uint4 *)(lane.x[tile] + OFFSET));
        to[tile][0] = found.x, to[tile][1] = found.y, to[tile][2] = found.z, to[tile][3] = found.w;
    }
}

template <int FIELD, int RUN>
__device__ __forceinline__ void field(Sums &sums, const Block &held, const Lane &lane) {
    u32 inputs[TILES][4];
    inputs_at<FIELD * WORDS + 32 * RUN>(inputs, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 weights[4], planes[4][PLANES];
#pragma unroll
        for (int part = 0; part < 4; part++) {  // row, row + 8, and the same of the next pair
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
                planes[part][plane] = held.words[RUN][plane][part % 2][2 * half + part / 2];
            weights[part] = pair_of<FIELD>(planes[part], lane.table);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            multiply(sums.products[tile], weights, inputs[tile][2 * half], inputs[tile][2 * half + 1]);
#if ZERO
            const u32 ones[4] = {half_to_the(0), half_to_the(0), half_to_the(0), half_to_the(0)};
            multiply(sums.inputs[tile], ones, inputs[tile][2 * half], inputs[tile][2 * half + 1]);
#endif
        }
    }
}

template <int FIELD, int END>
__device__ __forceinline__ void fields(Sums &sums, const Block &held, const Lane &lane) {
    if constexpr (FIELD < END) {
        field<FIELD, 0>(sums, held, lane);
        if constexpr (RUNS > 1) field<FIELD, RUNS - 1>(sums, held, lane);
        fields<FIELD + 1, END>(sums, held, lane);
    }
}

__device__ __forceinline__ void clear(Sums &sums) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int part = 0; part < 4; part++) {
            sums.products[tile][part] = 0;
#if ZERO
            sums.inputs[tile][part] = 0;
#endif
        }
}

struct Weights {
    const void *scale;
    const u8 *zero;
    u32 rows[2], N;  // of this lane
};

// total += scale * (products - zero-point * inputs), for one group.
__device__ __forceinline__ void settle(float (&total)[TILES][4], const Sums &sums, const Weights &weights, u32 group) {
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const u32 place = group * weights.N + weights.rows[low];
        const float scale = scale_at(weights.scale, place);
#if ZERO
        const float middle = __ldg(weights.zero + place) * (1.0f / (1 << (8 - BITS))) - (1 << (BITS - 1));
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int part = 2 * low; part < 2 * low + 2; part++) {
                float found = sums.products[tile][part];
#if ZERO
                found -= middle * sums.inputs[tile][part];
#endif
                total[tile][part] += scale * found;
            }
    }
}

template <int PART>
__device__ __forceinline__ void parts(float (&total)[TILES][4], Sums &sums, const Block &held, const Lane &lane,
                                      const Weights &weights, int block) {
    if constexpr (PART < GROUPS) {
        if (GROUP != 0) clear(sums);
        fields<PART * IN_GROUP, (PART + 1) * IN_GROUP>(sums, held, lane);
        if (GROUP != 0 && (EVEN || PART * IN_GROUP * WORDS < lane.left))
            settle(total, sums, weights, (u32)(block * BLOCK + PART * IN_GROUP * WORDS) / (GROUP ? GROUP : 1));
        parts<PART + 1>(total, sums, held, lane, weights, block);
    }
}

__device__ __forceinline__ void fetch(Block &to, const u16 *low, const u16 *high) {
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++)
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            load16(to.words[run][plane][0], low + plane * WORDS + 32 * run);
            load16(to.words[run][plane][1], high + plane * WORDS + 32 * run);
        }
}

struct Strip {
    u32 rows[2], first, N, K;
    const float *table;  // the lane's own, every 32nd is its next value
};

__device__ __forceinline__ float upper(u32 pair) {  // of two 16-bit floats
#if BFLOAT
    return __uint_as_float(pair & 0xffff0000u);
#else
    float found;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(found) : "r"(pair));
    return found;
#endif
}

// Eight codes of either row and one field, for every field from FIELD on, as weights at their places in `out`.
template <int FIELD>
__device__ __forceinline__ void spread(const Block &held, const void *scale, const u8 *zero, u16 *out,
                                       const Strip &strip, u32 k) {
    if constexpr (FIELD < FIELDS) {
        const u32 group = GROUP == 0 ? 0 : (k + FIELD * WORDS) / (GROUP ? GROUP : 1);
#pragma unroll
        for (int low = 0; low < 2; low++)
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                const u32 column = k + FIELD * WORDS + 32 * run;
                if (column >= strip.K) continue;
                const u32 place = group * strip.N + strip.rows[low];
                const float factor = scale_at(scale, place);
#if ZERO
                const float middle = __ldg(zero + place) * (1.0f / (1 << (8 - BITS))) - (1 << (BITS - 1));
#else
                const float middle = 0;
#endif
                u32 made[4];
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    u32 planes[PLANES];
#pragma unroll
                    for (int plane = 0; plane < PLANES; plane++) planes[plane] = held.words[run][plane][low][pair];
#if TABLE  // in float32: a table's value is rounded once, with its scale
                    const u32 byte = planes[0] >> (8 * FIELD);
                    const float left = strip.table[byte % 16 * 32] * factor, right = strip.table[byte / 16 % 16 * 32] * factor;
#else
                    const u32 found = pair_of<FIELD>(planes, 0);
                    const float left = (upper(found << 16) - middle) * factor, right = (upper(found) - middle) * factor;
#endif
                    made[pair] = rounded(left, right);
                }
                *(uint4 *)(out + (i64)(strip.rows[low] - strip.first) * strip.K + column) =
                    make_uint4(made[0], made[1], made[2], made[3]);
            }
        spread<FIELD + 1>(held, scale, zero, out, strip, k);
    }
}

// out[m, n] = sum over k of x[m, k] * weight[n, k]
//   x (M, K) 16-bit floats    words (N, stride) int16    scale (groups, N)    zero (groups, N) uint8
//   table (16,) float32, values of codes    out (M, N)
extern "C" __global__ void __launch_bounds__(WARPS * 32)
decode(const u16 *x, const u16 *words, const void *scale, const u8 *zero, const float *table, u16 *out, int M, int N,
       int K, int stride, int blocks) {
    __shared__ float shared[WARPS][TILES * 8][16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, row = blockIdx.x * 16 + lane / 4;
#if TABLE
    __shared__ u32 pairs[256 * 32];  // every pair of codes for every lane, so that no two lanes meet in a bank
    for (int place = threadIdx.x; place < 256 * 32; place += WARPS * 32)
        pairs[place] = rounded(table[place / 32 % 16], table[place / 512]);
    __syncthreads();
    const u32 at = (u32)__cvta_generic_to_shared(pairs) + 4 * lane;
#else
    const u32 at = 0;
#endif
    Lane own = {{}, K - warp * BLOCK - 8 * quad, at};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        own.x[tile] = x + (i64)min(8 * tile + lane / 4, M - 1) * K + warp * BLOCK + 8 * quad;
    const Weights weights = {scale, zero, {(u32)min(row, N - 1), (u32)min(row + 8, N - 1)}, (u32)N};
    const u16 *low = words + (i64)weights.rows[0] * stride + warp * PLANES * WORDS + 8 * quad;
    const u16 *high = words + (i64)weights.rows[1] * stride + warp * PLANES * WORDS + 8 * quad;
    float total[TILES][4] = {};
    Sums sums;
    clear(sums);
    Block held, next;
    if (warp < blocks) fetch(held, low, high);
    for (int block = warp; block < blocks; block += WARPS) {
        low += WARPS * PLANES * WORDS, high += WARPS * PLANES * WORDS;
        if (block + WARPS < blocks) fetch(next, low, high);
        parts<0>(total, sums, held, own, weights, block);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) own.x[tile] += WARPS * BLOCK;
        own.left -= WARPS * BLOCK;
        held = next;
    }
    if (GROUP == 0) settle(total, sums, weights, 0);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int part = 0; part < 4; part++)
            shared[warp][tile * 8 + 2 * quad + part % 2][lane / 4 + 8 * (part / 2)] = total[tile][part];
    __syncthreads();
    for (int place = threadIdx.x; place < TILES * 8 * 16; place += WARPS * 32) {
        const int token = place / 16, column = blockIdx.x * 16 + place % 16;
        float sum = 0;
#pragma unroll
        for (int part = 0; part < WARPS; part++) sum += shared[part][token][place % 16];
        if (token < M && column < N) out[(i64)token * N + column] = (u16)rounded(sum, 0);
    }
}

// Rows `first ... last - 1` of the weight in the type of the inputs, out (last - first, K): a warp for every 16 rows
// and block.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
expand(const u16 *words, const void *scale, const u8 *zero, const float *table, u16 *out, int first, int last, int N,
       int K, int stride, int blocks) {
    const int lane = threadIdx.x % 32, block = blockIdx.y * WARPS + threadIdx.x / 32, quad = lane % 4;
    const int row = first + blockIdx.x * 16 + lane / 4;
    const float *own = nullptr;
#if TABLE
    __shared__ float values[16 * 32];
    for (int place = threadIdx.x; place < 16 * 32; place += WARPS * 32) values[place] = table[place / 32];
    __syncthreads();
    own = values + lane;
#endif
    if (block >= blocks) return;
    const u32 rows[2] = {(u32)min(row, last - 1), (u32)min(row + 8, last - 1)};
    Block held;
    fetch(held, words + (i64)rows[0] * stride + block * PLANES * WORDS + 8 * quad,
          words + (i64)rows[1] * stride + block * PLANES * WORDS + 8 * quad);
    spread<0>(held, scale, zero, out, {{rows[0], rows[1]}, (u32)first, (u32)N, (u32)K, own}, block * BLOCK + 8 * quad);
}
