// Few tokens against a packed weight. Weights are the tall operand of m16n8k16 matrix instructions, up to 8 * TILES
// tokens the narrow one. Products of a group add up in float32 and meet its scale there, once.
//
// Compiled with, beside what `codes.cu` and `ring.cu` say: TILES.

struct Sums {  // two of each, so that a matrix instruction does not wait for the last one; with TABLE of two fields
    float products[2][TILES][4];
#if ZERO
    float inputs[2][TILES][4];  // sums of inputs, in every row
#endif
};

struct Lane {
    const u16 *x[TILES];  // this lane's tokens and columns; lanes without a token of their own repeat the last one
    int left;             // columns from there to the end of the row
    u32 number;           // and which copy of a pair is its own
#if TABLE
    Values values;
#endif
};

template <int OFFSET> __device__ __forceinline__ void inputs_at(u32 (&to)[TILES][4], const Lane &lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        uint4 found = {0, 0, 0, 0};
        if (EVEN || OFFSET < lane.left) found = *(const uint4 *)(lane.x[tile] + OFFSET);
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
            weights[part] = pair_of<FIELD>(planes[part], lane.number);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            multiply(sums.products[half][tile], weights, inputs[tile][2 * half], inputs[tile][2 * half + 1]);
#if ZERO
            const u32 ones[4] = {half_to_the(0), half_to_the(0), half_to_the(0), half_to_the(0)};
            multiply(sums.inputs[half][tile], ones, inputs[tile][2 * half], inputs[tile][2 * half + 1]);
#endif
        }
    }
}

#if TABLE
// Two fields, whose codes lie side by side. Half of all values come from shared memory and half from byte permutations:
// either alone is slower than the memory of an H200.
template <int FIELD, int RUN>
__device__ __forceinline__ void two_fields(Sums &sums, const Block &held, const Lane &lane) {
    u32 inputs[2][TILES][4];
    inputs_at<FIELD * WORDS + 32 * RUN>(inputs[0], lane);
    inputs_at<(FIELD + 1) * WORDS + 32 * RUN>(inputs[1], lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 weights[2][4];
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const u32 word = held.words[RUN][0][part % 2][2 * half + part / 2];
            if constexpr (FIELD == 0)
                low_pairs(word, lane.values, weights[0][part], weights[1][part]);
            else
                weights[0][part] = pair_of<FIELD>(&word, lane.number), weights[1][part] = pair_of<FIELD + 1>(&word, lane.number);
        }
#pragma unroll
        for (int next = 0; next < 2; next++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                multiply(sums.products[next][tile], weights[next], inputs[next][tile][2 * half], inputs[next][tile][2 * half + 1]);
    }
}
#endif

constexpr int STEP = TABLE ? 2 : 1;  // fields at once

template <int FIELD, int END>
__device__ __forceinline__ void fields(Sums &sums, const Block &held, const Lane &lane) {
    if constexpr (FIELD < END) {
#if TABLE
        two_fields<FIELD, 0>(sums, held, lane);
        if constexpr (RUNS > 1) two_fields<FIELD, RUNS - 1>(sums, held, lane);
#else
        field<FIELD, 0>(sums, held, lane);
        if constexpr (RUNS > 1) field<FIELD, RUNS - 1>(sums, held, lane);
#endif
        fields<FIELD + STEP, END>(sums, held, lane);
    }
}

__device__ __forceinline__ void clear(Sums &sums) {
#pragma unroll
    for (int place = 0; place < 2 * TILES * 4; place++) {
        sums.products[place / (TILES * 4)][place / 4 % TILES][place % 4] = 0;
#if ZERO
        sums.inputs[place / (TILES * 4)][place / 4 % TILES][place % 4] = 0;
#endif
    }
}

struct Place {  // of a block that is there: its slot and first column, and the lane's rows
    u32 slot, column, rows[2];
};

constexpr int BOTH = 2;

// total += scale * (products - zero-point * inputs), for one group; its sums are both, or those of one field.
template <int WHICH = BOTH>
__device__ __forceinline__ void settle(float (&total)[TILES][4], const Sums &sums, const Scales &scales) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int part = 0; part < 4; part++) {
            float found = sums.products[WHICH % BOTH][tile][part];
            if (WHICH == BOTH) found += sums.products[1][tile][part];
#if ZERO
            found -= middle_of(scales.zero[part / 2]) * (sums.inputs[0][tile][part] + sums.inputs[1][tile][part]);
#endif
            total[tile][part] += scales.scale[part / 2] * found;
        }
}

template <int PART, int WHICH>
__device__ __forceinline__ void settle_part(float (&total)[TILES][4], const Sums &sums, const Lane &lane,
                                            const Given &given, const Place &place) {
    constexpr int COLUMN = PART * IN_GROUP * WORDS;
    if (GROUP == 0 || (!EVEN && COLUMN >= lane.left)) return;  // beyond the row nobody brought scales
    settle<WHICH>(total, sums, SCALES ? scales_in(place.slot, PART, lane.number) : scales_at(given, place.column + COLUMN, place.rows));
}

template <int PART>
__device__ __forceinline__ void parts(float (&total)[TILES][4], Sums &sums, const Block &held, const Lane &lane,
                                      const Given &given, const Place &place) {
    if constexpr (PART < GROUPS) {
        constexpr int TOGETHER = IN_GROUP < STEP ? STEP : 1;  // groups
        if (GROUP != 0) clear(sums);
        fields<PART * IN_GROUP, (PART + TOGETHER) * IN_GROUP>(sums, held, lane);
        settle_part<PART, TOGETHER == 1 ? BOTH : 0>(total, sums, lane, given, place);
        if constexpr (TOGETHER > 1) settle_part<PART + 1, 1>(total, sums, lane, given, place);
        parts<PART + TOGETHER>(total, sums, held, lane, given, place);
    }
}

// Warps that a processor's registers shall have room for, as many as spill next to nothing.
constexpr int RESIDENT = TILES > 1 ? (ZERO ? 12 : 16) : TABLE || ZERO ? 16 : 24;

// out[m, n] = sum over k of x[m, k] * weight[n, k]
//   x (M, K) 16-bit floats    words (N, stride) int16    scale (groups, N)    zero (groups, N) uint8
//   table (16,) float32, values of codes    out (M, N)    at launch: WARPS * SLOTS * SLOT bytes of shared memory
// Thread blocks take every gridDim.x-th tile of 16 rows.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS)
decode(const u16 *x, const u16 *words, const void *scale, const u8 *zero, const float *table, u16 *out, int M, int N,
       int K, int stride, int blocks) {
    SHARED_AT_LAUNCH(slots);
    __shared__ float shared[WARPS][TILES * 8][16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    const Given given = {words, scale, zero, N, K, stride, blocks};
    Ring ring = first_blocks(shared_place(slots), given, blockIdx.x * 16, warp, lane);
    next_may_start();
#if TABLE
#pragma unroll
    for (int place = threadIdx.x; place < 256 * 8; place += WARPS * 32) {
        const u32 pair = rounded(table[place / 8 % 16], table[place / 128]);
        ((uint4 *)pairs)[place] = make_uint4(pair, pair, pair, pair);
    }
    __syncthreads();
#endif
    wait_for_kernels_before();
    Lane own = {{}, 0, (u32)lane};
#if TABLE
    own.values = values_of(table);
#endif
    for (int first = blockIdx.x * 16; first < N; first += gridDim.x * 16) {
        own.left = K - warp * BLOCK - 8 * quad;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            own.x[tile] = x + (i64)min(8 * tile + lane / 4, M - 1) * K + warp * BLOCK + 8 * quad;
        Place place = {0, (u32)warp * BLOCK, {(u32)min(first + lane / 4, N - 1), (u32)min(first + lane / 4 + 8, N - 1)}};
        float total[TILES][4] = {};
        Sums sums;
        clear(sums);
        for (int block = warp; block < blocks; block += WARPS) {
            Block held;
            place.slot = next_block(ring, held, given, warp, lane);
            parts<0>(total, sums, held, own, given, place);
            place.column += WARPS * BLOCK, own.left -= WARPS * BLOCK;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) own.x[tile] += WARPS * BLOCK;
        }
        if (GROUP == 0) settle(total, sums, scales_at(given, 0, place.rows));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int part = 0; part < 4; part++)
                shared[warp][tile * 8 + 2 * quad + part % 2][lane / 4 + 8 * (part / 2)] = total[tile][part];
        add_up(shared, out, first, M, N);
        if (first + gridDim.x * 16 < N) __syncthreads();
    }
}
