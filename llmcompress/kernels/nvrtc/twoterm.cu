// Few tokens against a packed weight of integers, exactly. Codes become bytes as they are; inputs are rounded to integers
// of 16 bits, one scale to 128 columns or to a smaller group, and these are two signed bytes, 256 * upper + lower. Weights
// are the tall operand of m16n8k32 matrix instructions, both bytes of 4 tokens the 8 columns of the narrow one. Sums of
// products are exact; a weight's scale and the inputs' meet them in float32.
//
// A *part* is the columns of a block that share both scales, a *step* the 32 columns of one matrix instruction, and the
// order of columns within is free: it is that of codes in words, and inputs are brought into it. Each warp makes bytes of
// the inputs of its own blocks, once its first codes are on their way, and keeps them for all rows.
//

constexpr int NARROW = 4;                                  // tokens
constexpr int LARGEST = 32639;                             // 256 * 127 + 127
constexpr int MOST_IN_PART = 128;                          // columns: 128 * 255 * LARGEST is less than 2**31
constexpr int BESIDE = 8 / LANES;                          // fields in a byte
constexpr bool FOURTH = BITS == 3;                         // planes hold another one
constexpr int IN_PART = IN_GROUP * WORDS > MOST_IN_PART ? MOST_IN_PART / WORDS : IN_GROUP;  // fields
constexpr int PARTS = FIELDS / IN_PART;
constexpr bool APART = IN_PART % (2 * BESIDE) != 0;        // the bytes of a word lie in different parts
constexpr int STEPS = BLOCK / 32, IN_STEPS = IN_PART * WORDS / 32;  // of a block, of a part
constexpr int KNOWN = BLOCK * 2;                           // where the parts of a token's block have scale and sum
constexpr int INPUT = KNOWN + (PARTS * 8 + 15) / 16 * 16;  // bytes of a token's block
constexpr bool SHIFTED = ZERO && GROUP != 0;               // zero-points meet sums as integers

// What is multiplied in a step, in units of which code: `words[run][plane]`, of either row word `half` and the next but one
// half, by the bits of `position`. Where bytes lie apart words are those of `apart`.
template <int STEP> struct Step {
    static constexpr int FIELD = STEP / RUNS, PAIR = STEP / 2;
    static constexpr int RUN = APART ? STEP % RUNS : PAIR % RUNS;
    static constexpr int PLANE = APART ? FIELD / (2 * BESIDE) : PAIR / (BESIDE * RUNS);
    static constexpr int POSITION = APART ? FIELD % BESIDE : PAIR / RUNS % BESIDE;
    static constexpr int HALF = APART ? FIELD / BESIDE % 2 : STEP % 2;
    static constexpr int SHIFT = LANES * POSITION + (FOURTH && PLANE == PLANES);
    static constexpr u32 MASK = ((1u << BITS) - 1) * 0x01010101u << SHIFT;
};

template <int PART> struct Part {  // of which positions its sums are, and how far up its codes lie
    static constexpr int FIELD = PART * IN_PART;
    static constexpr int FROM = IN_PART < BESIDE ? FIELD % BESIDE : 0;
    static constexpr int TO = FROM + (IN_PART < BESIDE ? IN_PART : BESIDE);
    static constexpr int RAISED = FOURTH && FIELD / (2 * BESIDE) == PLANES;
};

struct Codes {
    u32 words[RUNS][PLANES + FOURTH][2][4];
};

struct Sums {
    int of[BESIDE][4];  // of either row upper and lower, by position
};

struct Lane {  // of a block: the bytes of its column of the narrow operand, what is known of its token's parts
    u32 inputs, known;
    int left, number;  // columns from the block's first one to the end of the row
};

struct Place {  // of a block that is there
    u32 slot, column, rows[2];
};

// Words with bytes of one half of the fields, four words' in each, where parts want them apart.
__device__ __forceinline__ Codes codes_of(const Block &held) {
    Codes found;
#pragma unroll
    for (int number = 0; number < RUNS * PLANES * 2 * 4; number++) {
        const int run = number / (PLANES * 8), plane = number / 8 % PLANES, row = number / 4 % 2, word = number % 4;
        found.words[run][plane][row][word] = held.words[run][plane][row][word];
    }
#pragma unroll
    for (int number = 0; number < RUNS * 2 * 4 * FOURTH; number++) {  // one bit higher than needs be
        const int run = number / 8, row = number / 4 % 2, word = number % 4;
        const u32 low = held.words[run][0][row][word], middle = held.words[run][1 % PLANES][row][word];
        const u32 high = chosen<0x88888888u>(held.words[run][2 % PLANES][row][word], 0);
        found.words[run][PLANES][row][word] = chosen<0x22222222u>(low >> 2, chosen<0x44444444u>(middle >> 1, high));
    }
#pragma unroll
    for (int number = 0; number < RUNS * (PLANES + FOURTH) * 2 * APART; number++) {
        u32(&words)[4] = found.words[number / ((PLANES + FOURTH) * 2)][number / 2 % (PLANES + FOURTH)][number % 2];
        const u32 left = bytes_of<0x7531>(words[0], words[1]), right = bytes_of<0x7531>(words[2], words[3]);
        words[0] = bytes_of<0x6420>(words[0], words[1]), words[1] = bytes_of<0x6420>(words[2], words[3]);
        words[2] = left, words[3] = right;
    }
    return found;
}

struct Totals {  // of either row; and of the inputs, for zero-points of rows
    float rows[2], inputs;
};

// total += scale * (products - zero-point * inputs), for one part.
template <int PART>
__device__ __forceinline__ void settle(Totals &total, const Sums &sums, const Lane &lane, const Given &given, const Place &place) {
    constexpr int COLUMN = PART * IN_PART * WORDS;
    if (!EVEN && COLUMN >= lane.left) return;
    Scales scales = {{1, 1}, {0, 0}};
    if (SCALES)
        scales = scales_in(place.slot, PART * IN_PART / IN_GROUP, lane.number);
    else if (GROUP != 0)
        scales = scales_at(given, place.column + COLUMN, place.rows);
    u32 known[2];
    shared8(known, lane.known + PART * 8);
    const float unit = __uint_as_float(known[0]);
#pragma unroll
    for (int low = 0; low < 2; low++) {
        u32 found = -(SHIFTED ? scales.zero[low] * known[1] : known[1]);
#pragma unroll
        for (int position = Part<PART>::FROM; position < Part<PART>::TO; position++) {
            const int(&of)[4] = sums.of[position];
            found += (256u * of[2 * low] + of[2 * low + 1]) << (8 - BITS - LANES * position - Part<PART>::RAISED);
        }
        total.rows[low] += scales.scale[low] * unit * (int)found;
    }
    if (ZERO && !SHIFTED) total.inputs += unit * (int)known[1];
}

template <int STEP>
__device__ __forceinline__ void steps(Totals &total, Sums &sums, u32 (&bytes)[4], const Codes &codes, const Lane &lane,
                                      const Given &given, const Place &place) {
    if constexpr (STEP < STEPS) {
        using This = Step<STEP>;
        if (STEP % IN_STEPS == 0) sums = {};
        if (STEP % 2 == 0) shared16(bytes, lane.inputs + STEP / 2 * 128);
        u32 weights[4];
#pragma unroll
        for (int part = 0; part < 4; part++)  // row, row + 8, and the same of the next four columns
            weights[part] = codes.words[This::RUN][This::PLANE][part % 2][2 * This::HALF + part / 2] & This::MASK;
        multiply_bytes(sums.of[This::POSITION], weights, bytes[STEP % 2 * 2], bytes[STEP % 2 * 2 + 1]);
        if constexpr ((STEP + 1) % IN_STEPS == 0) settle<STEP / IN_STEPS>(total, sums, lane, given, place);
        steps<STEP + 1>(total, sums, bytes, codes, lane, given, place);
    }
}

// Inputs as bytes. A lane takes the same 8 columns of two steps, and so 4 lanes all of both.
constexpr int UNITS = BLOCK / 16, AT_ONCE = 2;
constexpr int SECOND = APART ? 32 : BESIDE * WORDS;  // from a column of the first step to that of the second
constexpr int IN_LANES = IN_STEPS > 1 ? IN_STEPS * 2 : 4;  // of which a part's columns are

__device__ __forceinline__ int first_column(int pair) {
    if (APART) return 64 * pair;
    return (2 * BESIDE * (pair / (BESIDE * RUNS)) + pair / RUNS % BESIDE) * WORDS + 32 * (pair % RUNS);
}

struct Unit {
    uint4 halves[2];  // the inputs
    u32 to;           // its block's bytes
};

__device__ __forceinline__ u32 largest(const uint4 &inputs) {  // magnitude, as a 16-bit float; of what is none, the most
    constexpr u32 SIGNLESS = 0x7fff7fffu;
    const u32 left = larger_halves(inputs.x & SIGNLESS, inputs.y & SIGNLESS);
    const u32 both = larger_halves(left, larger_halves(inputs.z & SIGNLESS, inputs.w & SIGNLESS));
    return max(both & 0xffff, both >> 16);
}

// Eight inputs as integers and 128 more, two to a word: their upper bytes then are upper ones, their lower ones are too, but
// for the sign.
__device__ __forceinline__ void integers(const uint4 &inputs, float inverse, u32 (&to)[8]) {
    constexpr float ROUND = 12582912 + 128;  // 1.5 * 2**23: what is added to it is rounded, and lies in its lowest bits
    const u32 words[4] = {inputs.x, inputs.y, inputs.z, inputs.w};
#pragma unroll
    for (int place = 0; place < 8; place++)
        to[place] = __float_as_uint((place % 2 ? upper(words[place / 2]) : lower(words[place / 2])) * inverse + ROUND);
}

// The bytes of two steps for one lane of the matrix instruction; returns the sums of either's integers.
__device__ __forceinline__ void put(u32 to, const u32 (&first)[8], const u32 (&second)[8], u32 (&sums)[2]) {
    u32 high[4], low[4];
#pragma unroll
    for (int word = 0; word < 4; word++) {
        const u32(&of)[8] = word / 2 ? second : first;
        const int pair = 2 * word, four = word % 2 * 4;
        const u32 left = APART ? bytes_of<0x5410>(of[four], of[four + 1]) : bytes_of<0x5410>(first[pair], second[pair]);
        const u32 right = APART ? bytes_of<0x5410>(of[four + 2], of[four + 3])
                                : bytes_of<0x5410>(first[pair + 1], second[pair + 1]);
        high[word] = bytes_of<0x7531>(left, right), low[word] = bytes_of<0x6420>(left, right) ^ 0x80808080u;
        sums[word / 2] += 256u * bytes_sum(high[word], 0) + bytes_sum(low[word], 0);
    }
    put16(to, high), put16(to + 64, low);
}

__device__ __forceinline__ void as_bytes(const Unit &unit, int number, bool there) {
    constexpr int SCALES_HERE = IN_STEPS > 1 ? 1 : 2;  // the two steps are of one part, or of two
    u32 most[2] = {largest(unit.halves[0]), largest(unit.halves[1])}, made[2][8], sums[2] = {};
    if (SCALES_HERE == 1) most[0] = most[1] = max(most[0], most[1]);
    float units[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        units[half] = half < SCALES_HERE ? lower(over_lanes<IN_LANES>(most[half], [](u32 a, u32 b) { return max(a, b); })) : units[0];
        integers(unit.halves[half], inverse(units[half]) * LARGEST, made[half]);
    }
    if (there) put(unit.to + number / 4 * 128 + number % 4 * 16, made[0], made[1], sums);
    if (SCALES_HERE == 1) sums[0] += sums[1];
#pragma unroll
    for (int half = 0; half < SCALES_HERE; half++) {
        const u32 sum = over_lanes<IN_LANES>(sums[half], [](u32 a, u32 b) { return a + b; });
        const u32 known[2] = {__float_as_uint(units[half] * (1.0f / LARGEST / (1 << (8 - BITS)))), SHIFTED ? sum : 128 * sum};
        const int part = IN_STEPS > 1 ? number / IN_LANES : number / 4 * 2 + half;
        if (there && number % IN_LANES == 0) put8(unit.to + KNOWN + part * 8, known);
    }
}

// Of a warp's own blocks and all tokens, so many at once that it waits for memory seldom.
__device__ __forceinline__ void make_bytes(const u16 *x, u32 to, u32 span, const Given &given, int M, int warp, int lane) {
    const int units = (given.blocks - warp + WARPS - 1) / WARPS * UNITS;
    for (int first = 0, token = 0; first < units;) {
        Unit held[AT_ONCE];
        int number[AT_ONCE];
#pragma unroll
        for (int turn = 0; turn < AT_ONCE; turn++) {
            number[turn] = first + lane;
            if (first >= units) continue;
            const int block = warp + number[turn] / UNITS * WARPS, within = number[turn] % UNITS;
            const int column = block * BLOCK + first_column(within / 4) + within % 4 * 8;
            held[turn] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}, to + token * span + block * INPUT};
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (number[turn] < units && (EVEN || column + half * SECOND < given.K))
                    held[turn].halves[half] = *(const uint4 *)(x + (i64)token * given.K + column + half * SECOND);
            if (++token == M) token = 0, first += 32;
        }
#pragma unroll
        for (int turn = 0; turn < AT_ONCE; turn++)
            if (number[turn] - lane < units) as_bytes(held[turn], number[turn] % UNITS, number[turn] < units);
    }
    __syncwarp();
}

constexpr int RESIDENT = 24;  // warps that a processor's registers shall have room for

// out[m, n] = sum over k of x[m, k] * weight[n, k]
//   x (M, K) 16-bit floats    words (N, stride) int16    scale (groups, N)    zero (groups, N) uint8
//   out (M, N)    at launch: WARPS * SLOTS * SLOT + M * (blocks * INPUT + 16) bytes of shared memory
// Thread blocks take every gridDim.x-th tile of 16 rows.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS)
twoterm(const u16 *x, const u16 *words, const void *scale, const u8 *zero, const float *, u16 *out, int M, int N, int K,
        int stride, int blocks) {
    SHARED_AT_LAUNCH(slots);
    __shared__ float shared[2][WARPS][NARROW][16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
    const Given given = {words, scale, zero, N, K, stride, blocks};
    Ring ring = first_blocks(shared_place(slots), given, blockIdx.x * 16, warp, lane);
    next_may_start();
    wait_for_kernels_before();
    const u32 bytes = shared_place(slots) + WARPS * SLOTS * SLOT, span = blocks * INPUT + 16;  // no bank for all tokens
    make_bytes(x, bytes, span, given, M, warp, lane);
    const u32 own = bytes + warp * INPUT;
    const Lane begin = {own + min(lane / 8, M - 1) * span + lane / 4 % 2 * 64 + quad * 16,
                        own + min(quad, M - 1) * span + KNOWN, K - warp * BLOCK, lane};
    int turn = 0;
    for (int first = blockIdx.x * 16; first < N; first += gridDim.x * 16, turn ^= 1) {
        Lane at = begin;
        Place place = {0, (u32)warp * BLOCK, {(u32)min(first + lane / 4, N - 1), (u32)min(first + lane / 4 + 8, N - 1)}};
        Totals total = {};
        for (int block = warp; block < blocks; block += WARPS) {
            Block held;
            place.slot = next_block(ring, held, given, warp, lane);
            Sums sums;
            u32 operand[4];
            steps<0>(total, sums, operand, codes_of(held), at, given, place);
            at.inputs += WARPS * INPUT, at.known += WARPS * INPUT, at.left -= WARPS * BLOCK;
            place.column += WARPS * BLOCK;
        }
        const Scales row = GROUP == 0 ? scales_at(given, 0, place.rows) : Scales{{1, 1}, {0, 0}};
#pragma unroll
        for (int low = 0; low < 2; low++) {
            if (ZERO && !SHIFTED) total.rows[low] -= ((int)row.zero[low] - 128) * (1.0f / 128) * total.inputs;
            shared[turn][warp][quad][lane / 4 + 8 * low] = row.scale[low] * total.rows[low];
        }
        add_up(shared[turn], out, first, M, N);
    }
}
