// The planar codes of a weight, for what is compiled together with this: types, the order, and how a pair of codes
// becomes a pair of numbers. `triton/bits.py` has the order: two int16 words side by side hold pairs of neighbours, one
// pair of each field, so that a lane that reads 16 bytes of a row has four pairs of every field.
//
// Compiled with: BITS, WORDS, FIELDS, PLANES (the order), GROUP (0: the row), ZERO, TABLE, EVEN (blocks are whole),
// BFLOAT (bfloat16 inputs, else float16), SCALE (0 float32, 1 bfloat16, 2 float16); WARPS of a thread block.

constexpr int RUNS = WORDS / 32;                        // 16-byte loads of a row and plane that cover a block
constexpr int BLOCK = FIELDS * WORDS;                   // codes of a row in a block
constexpr int IN_GROUP = GROUP == 0 || GROUP >= BLOCK ? FIELDS : GROUP / WORDS;  // fields that share a scale
constexpr int GROUPS = FIELDS / IN_GROUP;               // of a block
constexpr int MANTISSA = BFLOAT ? 7 : 10;
constexpr u32 BASE = BFLOAT ? 0x43004300u : 0x64006400u;  // 128 or 1024: a code fits into its mantissa
constexpr int LANES = BITS == 3 ? 4 : BITS;             // bits from one field of a word to the next
constexpr int PLACES = (MANTISSA - BITS) / LANES + 1;   // fields that fit into a mantissa side by side
constexpr int LOADS = RUNS * PLANES * 2;                // 16-byte loads of one lane for a block of two rows

struct Block {  // what one lane holds of a block: rows `lane / 4` and `lane / 4 + 8`
    u32 words[RUNS][PLANES][2][4];
};

constexpr int SCALE_BYTES = SCALE == 0 ? 4 : 2;

__device__ __forceinline__ float scale_of(u32 bits) {
#if SCALE == 0
    return __uint_as_float(bits);
#elif SCALE == 1
    return __uint_as_float(bits << 16);
#else
    return from_half((u16)bits);
#endif
}

__device__ __forceinline__ float scale_at(const void *scale, u32 place) {
#if SCALE == 0
    return ((const float *)scale)[place];
#else
    return scale_of(((const u16 *)scale)[place]);
#endif
}

#if ZERO
__device__ __forceinline__ float middle_of(u32 zero) {  // a zero-point less the centre of codes
    return zero * (1.0f / (1 << (8 - BITS))) - (1 << (BITS - 1));
}
#endif

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
    return times_plus(pair, half_to_the(SHIFT), minus);
}

__device__ __forceinline__ float lower(u32 pair) {  // of two 16-bit floats
#if BFLOAT
    return __uint_as_float(pair << 16);
#else
    return from_half((u16)pair);
#endif
}

__device__ __forceinline__ float upper(u32 pair) {
#if BFLOAT
    return __uint_as_float(pair & 0xffff0000u);
#else
    return from_half(pair >> 16);
#endif
}

template <int BY> __device__ __forceinline__ u32 moved(u32 word) { return BY >= 0 ? word >> BY : word << -BY; }

#if TABLE
__shared__ __align__(16) u32 pairs[256 * 32];  // of the values of two codes, a copy for each lane: none meet in a bank

struct Values {  // of all codes: their low bytes, then their high ones
    u32 bytes[2][4];
};

__device__ __forceinline__ Values values_of(const float *table) {
    Values found;
#pragma unroll
    for (int four = 0; four < 4; four++) {
        const u32 left = rounded(table[4 * four], table[4 * four + 1]), right = rounded(table[4 * four + 2], table[4 * four + 3]);
        found.bytes[0][four] = bytes_of<0x6420>(left, right), found.bytes[1][four] = bytes_of<0x7531>(left, right);
    }
    return found;
}

// Of fields 0 and 1, without shared memory: a permutation of bytes finds four codes of three bits among eight values,
// a third one chooses between two of them by the highest bits.
__device__ __forceinline__ void low_pairs(u32 word, const Values &values, u32 &first, u32 &second) {
    const u32 codes = word & 0x77777777u, half = chosen<0x44444444u>(word >> 1, 0x32103210u);
    u32 bytes[2];
#pragma unroll
    for (int high = 0; high < 2; high++) {
        const u32(&all)[4] = values.bytes[high];
        bytes[high] = bytes_by(bytes_by(all[0], all[1], codes), bytes_by(all[2], all[3], codes), half);
    }
    first = bytes_of<0x5140>(bytes[0], bytes[1]), second = bytes_of<0x7362>(bytes[0], bytes[1]);
}
#endif

// Two neighbouring codes of one field, less the centre, in the type of the inputs.
template <int FIELD> __device__ __forceinline__ u32 pair_of(const u32 *planes, u32 bank) {
#if TABLE
    const u32 word = planes[0];
    return pairs[chosen<0x1fe0>(moved<8 * FIELD - 5>(planes[0]), bank)];
#elif BITS == 8 && BFLOAT
    const u32 low = bytes_of<0x7650 + FIELD>(planes[0], 0x4B000000u);  // 2**23 + code, as float32
    const u32 high = bytes_of<0x7652 + FIELD>(planes[0], 0x4B000000u);
    return rounded(__uint_as_float(low) - 8388736.0f, __uint_as_float(high) - 8388736.0f);
#elif BITS == 8
    return centred<0, 128>(bytes_of<0x4240 + FIELD * 0x101>(planes[0], 0x64646464u));
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

__device__ __forceinline__ const u16 *place_of(int load, const u16 *low, const u16 *high) {
    return (load % 2 ? high : low) + load / 2 % PLANES * WORDS + load / 2 / PLANES * 32;
}

__device__ __forceinline__ void fetch(Block &to, const u16 *low, const u16 *high) {
#pragma unroll
    for (int load = 0; load < LOADS; load++)
        load16(to.words[load / 2 / PLANES][load / 2 % PLANES][load % 2], place_of(load, low, high));
}
