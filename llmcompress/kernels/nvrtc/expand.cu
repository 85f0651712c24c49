// Rows of a packed weight as 16-bit floats, for a matrix product of many tokens.

struct Strip {
    u32 rows[2], first, N, K;
    const float *table;  // the lane's own, every 32nd is its next value
};

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
                const float middle = middle_of(zero[place]);
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
                    const float left = (lower(found) - middle) * factor, right = (upper(found) - middle) * factor;
#endif
                    made[pair] = rounded(left, right);
                }
                *(uint4 *)(out + (i64)(strip.rows[low] - strip.first) * strip.K + column) =
                    make_uint4(made[0], made[1], made[2], made[3]);
            }
        spread<FIELD + 1>(held, scale, zero, out, strip, k);
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
