// Many tokens against a packed weight, on compute capability 9.0. A thread block takes ROWS rows of the weight and
// TOKENS tokens; a warpgroup has 64 of the rows. Weights are the tall operand of the matrix instructions and come from
// registers, in which their codes become 16-bit floats with the scale in them, rounded once; inputs are the narrow one
// and come from shared memory, 64 columns (a slice) at a time, STAGES slices deep. While the instructions of one slice
// run, the next slice's weights are unpacked into the other half of `weights`, and slices further on are on their way.
//
// The words of a block wait in shared memory too, each warp's own 16 rows, and come from there in the order in which
// the instructions want them: lane n has pair n % 4 of eight neighbouring codes of row n / 4 (and of row n / 4 + 8).
//
// Values of a table are looked up two at a time, as float16: in float32 the look-ups would take more of shared memory's
// time than the matrix instructions leave.
//
// Compiled with, beside those of `codes.cu`: ROWS (16 * WARPS), TOKENS, STAGES.

constexpr int SLICE = 64, SLICE_BYTES = 2 * SLICE * TOKENS;
constexpr int SLICES = BLOCK / SLICE, PARTS = SLICE / WORDS;          // slices of a block, fields of a slice
constexpr int AHEAD = STAGES - 2;                                     // one stage is read, one may still be read
constexpr int SETS = IN_GROUP < PARTS ? PARTS : 1;                    // scales of a row in a slice
constexpr int CHUNKS = PLANES * WORDS / 8, PITCH = 16 * CHUNKS + 16;  // of 16 bytes in a row's block; bytes between rows
constexpr int BUFFERS = AHEAD / SLICES + 1;                           // blocks of words in shared memory
constexpr int BANDS = TOKENS / 128, OUT_PITCH = 2 * ROWS + 16;
constexpr u32 WORDS_AT = STAGES * SLICE_BYTES, TABLE_AT = WORDS_AT + BUFFERS * ROWS * PITCH;
constexpr bool PACKED = !TABLE && SCALE == (BFLOAT ? 1 : 2);          // scales have the type of the inputs
constexpr u32 SHARED_BYTES = TABLE_AT + (TABLE ? 256 * 32 * 4 : 0);   // from a multiple of 1024 on
static_assert(SLICES % 2 == 0 && ROWS == 16 * WARPS && BANDS * 128 == TOKENS, "tiles that nobody planned");
static_assert(TOKENS * OUT_PITCH <= STAGES * SLICE_BYTES, "results find no room where inputs were");

struct Source {
    const u16 *x, *words;
    const void *scale;
    const u8 *zero;
    int M, N, K, stride, blocks;
};

struct Thread {
    u32 memory;                    // where shared memory begins
    u32 row;                       // of the weight: it needs the scales of this one and the eighth after it
    u32 words;                     // its 16 bytes in a block of words, to be written and to be read
    u32 lane;
};

struct Stream {  // of inputs and words to shared memory
    const u16 *x, *words;     // this thread's place in the next slice, and in the next block of its row
    int left, tokens;         // columns from there to the end of the row, tokens from its own to the end
    u32 to, slice;            // its place in a slice in shared memory, and where the next slice begins
    u32 buffer;               // of a block of words, the next
};

struct Raw {
    float scale[SETS][2];
    u32 zero[SETS][2];
};

struct Factors {  // two 16-bit floats each, or one float32 where the type of the scales is not that of the inputs
    u32 scale[SETS][2], middle[SETS][2];
};

struct Running {
    float sums[BANDS][64];
    u32 weights[2][4][4];         // of this slice and the next: four instructions, four registers
    u32 words[CHUNKS][2];         // of the block: eight codes of every field, rows n / 4 and n / 4 + 8
    Factors factors;
    Raw coming;                   // scales of the slice after the one that is unpacked next
    u32 from, buffer;             // the slice in shared memory that is multiplied next, the words that are read next
};

__device__ __forceinline__ u32 next_stage(u32 stage) { return stage + SLICE_BYTES == WORDS_AT ? 0 : stage + SLICE_BYTES; }

__device__ __forceinline__ void send_inputs(Stream &stream, const Source &source, u32 memory) {
    constexpr int STEP = 4 * WARPS, COPIES = (TOKENS + STEP - 1) / STEP;  // of all threads, eight to a token
    const u16 *from = stream.x;
#pragma unroll
    for (int copy = 0; copy < COPIES; copy++, from += (i64)STEP * source.K) {
        if (TOKENS % STEP && copy * STEP + threadIdx.x / 8 >= TOKENS) continue;
        const bool there = copy * STEP < stream.tokens && (EVEN || stream.left > 0);
        copy16(memory + stream.slice + stream.to + copy * STEP * 2 * SLICE, from, there ? 16 : 0);
    }
    stream.x += SLICE, stream.left -= SLICE;
    stream.slice = next_stage(stream.slice);
}

__device__ __forceinline__ void send_words(Stream &stream, const Source &source, const Thread &own, int block) {
    const u32 to = own.memory + WORDS_AT + stream.buffer * ROWS * PITCH + own.words;
    if (block < source.blocks)
#pragma unroll
        for (int copy = 0; copy < CHUNKS / 2; copy++) copy16(to + copy * 32, stream.words + copy * 16, 16);
    stream.words += PLANES * WORDS;
    stream.buffer = stream.buffer + 1 == BUFFERS ? 0 : stream.buffer + 1;
}

__device__ __forceinline__ void take_words(Running &running, const Thread &own) {
    const u32 from = own.memory + WORDS_AT + running.buffer * ROWS * PITCH + own.words;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2)
        load_matrices(running.words[chunk][0], running.words[chunk][1], running.words[chunk + 1][0],
                      running.words[chunk + 1][1], from + chunk * 16);
    running.buffer = running.buffer + 1 == BUFFERS ? 0 : running.buffer + 1;
}

// Begins to read the scales of slice SLICE_ of a block, where others hold from there on.
template <int SLICE_>
__device__ __forceinline__ void ask_for_scales(Running &running, const Source &source, const Thread &own, int block) {
    if (SLICE_ * PARTS % IN_GROUP) return;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        const int group = GROUP ? (block * BLOCK + (SLICE_ * PARTS + set) * WORDS) / (GROUP ? GROUP : 1) : 0;
        const u32 last = GROUP ? source.K / (GROUP ? GROUP : 1) - 1 : 0;
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const u32 at = min((u32)group, last) * source.N + min(own.row + 8 * low, (u32)source.N - 1);
            running.coming.scale[set][low] = scale_at(source.scale, at);
#if ZERO
            running.coming.zero[set][low] = __ldg(source.zero + at);
#endif
        }
    }
}

template <int SLICE_> __device__ __forceinline__ void take_scales(Running &running) {
    if (SLICE_ * PARTS % IN_GROUP) return;
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const float scale = running.coming.scale[set][low];
            running.factors.scale[set][low] = PACKED ? rounded(scale, scale) : __float_as_uint(scale);
#if ZERO
            const float middle = middle_of(running.coming.zero[set][low]);
            running.factors.middle[set][low] = PACKED ? rounded(-middle, -middle) : __float_as_uint(middle);
#endif
        }
}

// Two neighbouring weights of one field.
template <int FIELD>
__device__ __forceinline__ u32 weights_of(const u32 (&planes)[PLANES], u32 scale, u32 middle, const Thread &own) {
#if TABLE
    const u32 pair = constant_at(chosen<0x7f80>(moved<8 * FIELD - 7>(planes[0]), 4 * own.lane) + own.memory + TABLE_AT);
    return rounded(from_half((u16)pair) * __uint_as_float(scale), from_half(pair >> 16) * __uint_as_float(scale));
#else
    u32 pair = pair_of<FIELD>(planes, 0);
    if constexpr (PACKED) {
        if (ZERO) pair = times_plus(pair, half_to_the(0), middle);
        return times_plus(pair, scale, 0x80008000u);
    }
    const float factor = __uint_as_float(scale), zero = ZERO ? __uint_as_float(middle) : 0;
    return rounded((lower(pair) - zero) * factor, (upper(pair) - zero) * factor);
#endif
}

// The weights of instruction STEP of slice SLICE_ of the block in registers.
template <int SLICE_, int STEP> __device__ __forceinline__ void unpack_step(Running &running, const Thread &own) {
    constexpr int PART = STEP * PARTS / 4, FIELD = SLICE_ * PARTS + PART, PAIR = STEP - PART * 4 / PARTS;
    const Factors &factors = running.factors;
#pragma unroll
    for (int part = 0; part < 4; part++) {  // row, row + 8, and the same of the next eight codes
        u32 planes[PLANES];
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++)
            planes[plane] = running.words[plane * (WORDS / 8) + 2 * PAIR + part / 2][part % 2];
        constexpr int SET = SETS > 1 ? PART : 0;
        running.weights[SLICE_ % 2][STEP][part] =
            weights_of<FIELD>(planes, factors.scale[SET][part % 2], factors.middle[SET][part % 2], own);
    }
}

template <int SLICE_>
__device__ __forceinline__ void unpack(Running &running, const Source &source, const Thread &own, int block) {
    constexpr int NEXT = (SLICE_ + 1) % SLICES;
    if (SLICE_ == 0) take_words(running, own);
    if (GROUP != 0) take_scales<SLICE_>(running);
    if (GROUP != 0) ask_for_scales<NEXT>(running, source, own, block + (SLICE_ + 1) / SLICES);
    unpack_step<SLICE_, 0>(running, own);
    unpack_step<SLICE_, 1>(running, own);
    unpack_step<SLICE_, 2>(running, own);
    unpack_step<SLICE_, 3>(running, own);
}

__device__ __forceinline__ void multiply_slice(Running &running, const u32 (&weights)[4][4], u32 memory) {
    const u64 inputs = described(memory + running.from);
    begin_products();
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int tile = 0; tile < BANDS; tile++)  // 32 bytes further in the row, 128 rows further down
            begin_product(running.sums[tile], weights[step], inputs + 2 * step + 1024 * tile);
    commit_products();
    running.from = next_stage(running.from);
}

// Slice SLICE_ of a block and those after it.
template <int SLICE_>
__device__ __forceinline__ void slices(Running &running, Stream &stream, const Source &source, const Thread &own,
                                       int block) {
    if constexpr (SLICE_ < SLICES) {
        await_copies<AHEAD - 1>();
        show_writes();
        __syncthreads();
        multiply_slice(running, running.weights[SLICE_ % 2], own.memory);
        if (block * SLICES + SLICE_ + AHEAD < source.blocks * SLICES) send_inputs(stream, source, own.memory);
        if (SLICE_ == 0) send_words(stream, source, own, block + BUFFERS);
        commit_copies();
        await_products<1>();
#pragma unroll
        for (int word = 0; word < 16; word++) hold(running.weights[1 - SLICE_ % 2][word / 4][word % 4]);
        unpack<(SLICE_ + 1) % SLICES>(running, source, own, block + (SLICE_ + 1) / SLICES);
        slices<SLICE_ + 1>(running, stream, source, own, block);
    }
}

// Sums of all warps through shared memory, so that a token's rows are written side by side.
__device__ __forceinline__ void finish(const Running &running, const Source &source, u32 memory, u16 *out) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8;
    const u32 to = memory + (lane % 8 + 8 * (matrix / 2)) * OUT_PITCH + 2 * (16 * warp + 8 * (matrix % 2));
#pragma unroll
    for (int tile = 0; tile < BANDS; tile++)
#pragma unroll
        for (int eight = 0; eight < 16; eight += 2) {
            const float *sums = running.sums[tile] + 4 * eight;
            store_transposed(to + (128 * tile + 8 * eight) * OUT_PITCH, rounded(sums[0], sums[1]), rounded(sums[2], sums[3]),
                             rounded(sums[4], sums[5]), rounded(sums[6], sums[7]));
        }
    __syncthreads();
    const int begin = blockIdx.y * ROWS, first = blockIdx.x * TOKENS;
    for (int chunk = threadIdx.x; chunk < TOKENS * ROWS / 8; chunk += 32 * WARPS) {
        const int token = chunk / (ROWS / 8), row = begin + chunk % (ROWS / 8) * 8;
        if (first + token >= source.M) break;
        const uint4 found = load_shared(memory + token * OUT_PITCH + 2 * (row - begin));
        u16 *target = out + (i64)(first + token) * source.N + row;
        if (source.N % 8 == 0) {
            if (row < source.N) *(uint4 *)target = found;
            continue;
        }
        const u32 pairs[4] = {found.x, found.y, found.z, found.w};
#pragma unroll
        for (int one = 0; one < 8; one++)
            if (row + one < source.N) target[one] = (u16)(pairs[one / 2] >> 16 * (one % 2));
    }
}

// out[m, n] = sum over k of x[m, k] * weight[n, k]; tensors as in `decode.cu`
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
prefill(const u16 *x, const u16 *words, const void *scale, const u8 *zero, const float *table, u16 *out, int M, int N,
        int K, int stride, int blocks) {
    const Source source = {x, words, scale, zero, M, N, K, stride, blocks};
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, begin = blockIdx.y * ROWS + 16 * warp;
    const int line = thread / 8, part = thread % 8, token = blockIdx.x * TOKENS;
    const int mine = 16 * warp + lane % 16, half = lane / 16;  // a row, and every second 16 bytes of its words
    const Thread own = {shared_memory(), (u32)begin + lane / 4, (u32)(mine * PITCH + half * 16), (u32)lane};
    Stream stream = {x + (i64)min(token + line, M - 1) * K + 8 * part,
                     words + (i64)min(begin + lane % 16, N - 1) * stride + 8 * half,
                     K - 8 * part, M - token - line, (u32)(line * 2 * SLICE + (part ^ line % 8) * 16), 0, 0};
    Running running = {};
#pragma unroll
    for (int slice = 0; slice < AHEAD; slice++) {
        if (slice < blocks * SLICES) send_inputs(stream, source, own.memory);
#pragma unroll
        for (int block = 0; slice == 0 && block < BUFFERS; block++) send_words(stream, source, own, block);
        commit_copies();
    }
#if TABLE  // a copy of each pair of values for each lane: none meet in a bank
    for (int four = thread; four < 256 * 8; four += 32 * WARPS)
        store_four(own.memory + TABLE_AT + four * 16, halves(__ldg(table + four / 8 % 16), __ldg(table + four / 128)));
#endif
    ask_for_scales<0>(running, source, own, 0);
    if (GROUP == 0) take_scales<0>(running);
    await_copies<AHEAD - 1>();
    __syncthreads();
    unpack<0>(running, source, own, 0);
    int block = 0;
    do  // there is one, and a way around the loop would have the compiler wait for every instruction
        slices<0>(running, stream, source, own, block);
    while (++block < blocks);
    await_products<0>();
    await_copies<0>();
    __syncthreads();
    finish(running, source, own.memory, out);
}
