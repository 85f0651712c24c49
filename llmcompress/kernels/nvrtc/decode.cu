// Few tokens against a packed weight. A warp takes 16 rows and every WARPS-th block of them; weights are the tall
// operand of m16n8k16 matrix instructions, up to 8 * TILES tokens the narrow one. Codes come from memory straight into
// the registers in which the instruction wants them, a block ahead of their use. Products of a group add up in float32
// and meet its scale there, once. The warps of a thread block share its rows, and add their sums in order at the end:
// equal inputs give equal bits.

struct Sums {
    float products[TILES][4];
#if ZERO
    float inputs[TILES][4];  // sums of inputs, in every row
#endif
};

struct Lane {
    const u16 *x[TILES];  // this lane's tokens and columns; lanes without a token of their own repeat the last one
    int left;             // columns from there to the end of the row
    u32 bank;             // which copy of a pair is its own
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
            weights[part] = pair_of<FIELD>(planes[part], lane.bank);
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

// out[m, n] = sum over k of x[m, k] * weight[n, k]
//   x (M, K) 16-bit floats    words (N, stride) int16    scale (groups, N)    zero (groups, N) uint8
//   table (16,) float32, values of codes    out (M, N)
extern "C" __global__ void __launch_bounds__(WARPS * 32)
decode(const u16 *x, const u16 *words, const void *scale, const u8 *zero, const float *table, u16 *out, int M, int N,
       int K, int stride, int blocks) {
    __shared__ float shared[WARPS][TILES * 8][16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, row = blockIdx.x * 16 + lane / 4;
    Lane own = {{}, K - warp * BLOCK - 8 * quad, (u32)lane};
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
#if TABLE
#pragma unroll
    for (int place = threadIdx.x; place < 256 * 8; place += WARPS * 32) {
        const u32 pair = rounded(__ldg(table + place / 8 % 16), __ldg(table + place / 128));
        ((uint4 *)pairs)[place] = make_uint4(pair, pair, pair, pair);
    }
    __syncthreads();
#endif
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
