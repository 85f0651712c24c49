// Blocks of a packed weight on their way to shared memory. A warp takes 16 rows and every WARPS-th block of them, and has
// SLOTS places: while it uses one block the next SLOTS - 1, each with its scales, are there or coming. Had they registers
// for a target, the assembler would wait for the last load with the first. The warps of a thread block share its rows, and
// their sums are added in order: equal inputs give equal bits.
//
// Compiled with, beside what `codes.cu` says: SLOTS; WHOLE (rows are whole tiles of 16, and scales and zero-points lie at
// multiples of 16 bytes).

constexpr int SCALES = GROUP != 0 && WHOLE ? GROUPS * SCALE_BYTES : 0;  // copies of 16 bytes, for 16 rows
constexpr int ZEROS = GROUP != 0 && WHOLE && ZERO ? GROUPS : 0;
constexpr int SLOT = LOADS * 512 + (SCALES + ZEROS) * 16;  // bytes

struct Given {
    const u16 *words;
    const void *scale;
    const u8 *zero;
    int N, K, stride, blocks;

    __device__ __forceinline__ u32 group_at(u32 column) const { return column / (GROUP ? GROUP : 1) * (u32)N; }
};

struct Coming {  // the next block to bring: this lane's words in either row, the first of 16 rows, which block
    const u16 *words[2];
    int first, block;
};

__device__ __forceinline__ Coming first_block(const Given &given, int first, int warp, int lane) {
    Coming found = {{}, first, warp};
#pragma unroll
    for (int low = 0; low < 2; low++)
        found.words[low] = given.words + (i64)min(first + lane / 4 + 8 * low, given.N - 1) * given.stride +
                           warp * PLANES * WORDS + 8 * (lane % 4);
    return found;
}

// Begins to bring a block into a slot: each lane what it needs itself, and some of them scales and zero-points.
// `slot` has the lane's share of each 512 bytes. Then the next block: of these rows, or the first of those to follow.
__device__ __forceinline__ void bring(u32 slot, Coming &coming, const Given &given, int warp, int lane) {
    if (coming.first < given.N && coming.block < given.blocks) {
#pragma unroll
        for (int load = 0; load < LOADS; load++)
            copy16(slot + load * 512, place_of(load, coming.words[0], coming.words[1]));
#pragma unroll
        for (int first = 0; first < SCALES + ZEROS; first += 32) {
            const int copy = first + lane, part = copy < SCALES ? copy / SCALE_BYTES : copy - SCALES;
            const u32 column = coming.block * BLOCK + part * IN_GROUP * WORDS;
            if (copy >= SCALES + ZEROS || (!EVEN && column >= given.K)) continue;
            const u32 place = given.group_at(column) + coming.first;
            const u8 *from = (const u8 *)given.scale + (i64)place * SCALE_BYTES + copy % SCALE_BYTES * 16;
            copy16(slot + (LOADS + first / 32) * 512, copy < SCALES ? from : given.zero + place);
        }
        coming.block += WARPS;
        coming.words[0] += WARPS * PLANES * WORDS, coming.words[1] += WARPS * PLANES * WORDS;
        if (coming.block >= given.blocks) coming = first_block(given, coming.first + gridDim.x * 16, warp, lane);
    }
    copies_end();
}

struct Ring {  // the slots of a warp: the first and the last, the one of the next block, and the one before it
    u32 slots, last, used, free;
    Coming coming;
};

// Begins with the first blocks of 16 rows; `place` is the memory of all warps, WARPS * SLOTS * SLOT bytes.
__device__ __forceinline__ Ring first_blocks(u32 place, const Given &given, int first, int warp, int lane) {
    const u32 slots = place + warp * SLOTS * SLOT, last = slots + (SLOTS - 1) * SLOT;
    Ring ring = {slots, last, slots, last, first_block(given, first, warp, lane)};
#pragma unroll
    for (int slot = 0; slot < SLOTS - 1; slot++) bring(slots + slot * SLOT + lane * 16, ring.coming, given, warp, lane);
    return ring;
}

// Waits for the warp's next block, begins to bring another, and gives this lane's words. Returns the block's slot.
__device__ __forceinline__ u32 next_block(Ring &ring, Block &held, const Given &given, int warp, int lane) {
    const u32 slot = ring.used;
    copies_are_there<SLOTS - 2>();
    bring(ring.free + lane * 16, ring.coming, given, warp, lane);
#pragma unroll
    for (int load = 0; load < LOADS; load++)
        shared16(held.words[load / 2 / PLANES][load / 2 % PLANES][load % 2], slot + lane * 16 + load * 512);
    ring.free = slot, ring.used = slot == ring.last ? ring.slots : slot + SLOT;
    return slot;
}

struct Scales {  // of a group, for rows `lane / 4` and `lane / 4 + 8`
    float scale[2];
    u32 zero[2];
};

__device__ __forceinline__ Scales scales_in(u32 slot, int part, int lane) {
    Scales found;
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const u32 own = slot + LOADS * 512, row = lane / 4 + 8 * low;
        const u32 place = own + (part * 16 + row) * SCALE_BYTES;
        found.scale[low] = scale_of(SCALE_BYTES == 4 ? shared4(place) : shared2(place));
#if ZERO
        found.zero[low] = shared1(own + (SCALES + part) * 16 + row);
#endif
    }
    return found;
}

__device__ __forceinline__ Scales scales_at(const Given &given, u32 column, const u32 (&rows)[2]) {
    Scales found;
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const u32 place = given.group_at(column) + rows[low];
        found.scale[low] = scale_at(given.scale, place);
#if ZERO
        found.zero[low] = given.zero[place];
#endif
    }
    return found;
}

// Of 16 rows, once every warp has put its sums there: theirs in order, and out with them.
template <int TOKENS>
__device__ __forceinline__ void add_up(const float (&sums)[WARPS][TOKENS][16], u16 *out, int first, int M, int N) {
    __syncthreads();
    for (int at = threadIdx.x; at < TOKENS * 16; at += WARPS * 32) {
        const int token = at / 16, column = first + at % 16;
        float sum = 0;
#pragma unroll
        for (int part = 0; part < WARPS; part++) sum += sums[part][token][at % 16];
        if (token < M && column < N) out[(i64)token * N + column] = (u16)rounded(sum, 0);
    }
}
