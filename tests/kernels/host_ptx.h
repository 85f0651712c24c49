// The CUDA C++ kernels on a CPU: a thread for every thread of a block, the instructions of `ptx.cu` in plain C++.
// Compiled together with `codes.cu` and one kernel; `WARPS` as there. Of the copies to shared memory every second one is
// made when it is begun and the others when they are waited for, so that a slot read too early, or filled again before it
// was read, shows in the values. RUN_AHEAD is for kernels whose warps meet nowhere but in `__syncthreads`.

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef long long i64;
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct Index {
    int x, y;
};

using std::max, std::min;
constexpr int THREADS = WARPS * 32;
static thread_local Index threadIdx, blockIdx, gridDim;
static std::barrier<> everyone(THREADS);
static std::barrier<> *warps[WARPS];
static u32 fragments[WARPS][32][6];

inline void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
static std::atomic<long> others;  // how often threads of all warps but the first came to a barrier, or to the end
static thread_local long passed;

// With RUN_AHEAD the first warp goes on when all others have come to the next barrier: what they write early shows.
inline void __syncthreads() {
    if (threadIdx.x >= 32) others++;
    everyone.arrive_and_wait();
    passed++;
#ifdef RUN_AHEAD
    while (threadIdx.x < 32 && others < (passed + 1) * (THREADS - 32)) std::this_thread::yield();
#endif
}

inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
template <class T> T __ldg(const T *place) { return *place; }

inline float __uint_as_float(u32 bits) {
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline u32 __float_as_uint(float number) {
    u32 found;
    std::memcpy(&found, &number, 4);
    return found;
}

inline float number_of(u16 half) {
#if BFLOAT
    return __uint_as_float((u32)half << 16);
#else
    _Float16 found;
    std::memcpy(&found, &half, 2);
    return (float)found;
#endif
}

inline u16 half_of(double number) {
#if BFLOAT
    float single = (float)number;
    u32 bits;
    std::memcpy(&bits, &single, 4);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    _Float16 half = (_Float16)number;
    u16 found;
    std::memcpy(&found, &half, 2);
    return found;
#endif
}

inline float from_half(u16 half) {
    _Float16 found;
    std::memcpy(&found, &half, 2);
    return (float)found;
}

static unsigned char launched[1 << 18];  // shared memory, and its addresses are places in it
#define SHARED_AT_LAUNCH(name) unsigned char *const name = launched
struct Copy {
    u32 to;
    const void *from;
};
static thread_local std::vector<std::vector<Copy>> groups;
static thread_local std::vector<Copy> begun;
static thread_local int copies;

inline u32 shared_place(const void *place) { return (u32)((const unsigned char *)place - launched); }
inline void shared16(u32 (&to)[4], u32 from) { std::memcpy(to, launched + from, 16); }
inline void shared8(u32 (&to)[2], u32 from) { std::memcpy(to, launched + from, 8); }
inline void put16(u32 to, const u32 (&from)[4]) { std::memcpy(launched + to, from, 16); }
inline void put8(u32 to, const u32 (&from)[2]) { std::memcpy(launched + to, from, 8); }
inline u32 shared4(u32 from) {
    u32 found;
    std::memcpy(&found, launched + from, 4);
    return found;
}
inline u32 shared2(u32 from) { return shared4(from) & 0xffff; }
inline u32 shared1(u32 from) { return launched[from]; }

inline void copy16(u32 to, const void *from) {
    if (copies++ % 2)
        std::memcpy(launched + to, from, 16);
    else
        begun.push_back({to, from});
}

inline void copies_end() {
    groups.push_back(begun);
    begun.clear();
}

template <int LEFT> void copies_are_there() {
    while (groups.size() > LEFT) {
        for (const Copy &copy : groups.front()) std::memcpy(launched + copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
    warps[threadIdx.x / 32]->arrive_and_wait();
}

inline void next_may_start() {}
inline void wait_for_kernels_before() {}

inline void load16(u32 (&to)[4], const void *from) { std::memcpy(to, from, 16); }
template <u32 MASK> u32 chosen(u32 word, u32 others) { return (word & MASK) | others; }
inline u32 rounded(float left, float right) { return half_of(left) | (u32)half_of(right) << 16; }

inline u32 bytes_by(u32 low, u32 high, u32 which) {
    const uint64_t all = low | (uint64_t)high << 32;
    u32 found = 0;
    for (int byte = 0; byte < 4; byte++) {
        const u32 chosen = which >> (4 * byte) & 15;
        if (chosen > 7) std::abort();  // repeats a sign
        found |= (u32)(all >> (8 * chosen) & 255) << (8 * byte);
    }
    return found;
}
template <u32 WHICH> u32 bytes_of(u32 low, u32 high) { return bytes_by(low, high, WHICH); }

inline u32 times_plus(u32 pair, u32 factor, u32 summand) {
    u32 found = 0;
    for (int half = 0; half < 32; half += 16)
        found |= (u32)half_of((double)number_of(pair >> half) * number_of(factor >> half) + number_of(summand >> half)) << half;
    return found;
}

inline void multiply(float (&sums)[4], const u32 (&weights)[4], u32 low, u32 high) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, column = lane % 4 * 2;
    u32(&all)[32][6] = fragments[warp];
    const u32 mine[6] = {weights[0], weights[1], weights[2], weights[3], low, high};
    std::memcpy(all[lane], mine, sizeof mine);
    warps[warp]->arrive_and_wait();
    for (int part = 0; part < 4; part++) {
        const int m = row + part / 2 * 8, n = column + part % 2;
        double sum = sums[part];
        for (int k = 0; k < 16; k++) {
            const u32 weight = all[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2], input = all[n * 4 + k % 8 / 2][4 + k / 8];
            sum += (double)number_of(weight >> k % 2 * 16) * number_of(input >> k % 2 * 16);
        }
        sums[part] = (float)sum;
    }
    warps[warp]->arrive_and_wait();
}

// As the PTX ISA has it for 8-bit elements: four columns of a lane side by side, rows and columns 16 apart in the next register.
inline void multiply_bytes(int (&sums)[4], const u32 (&weights)[4], u32 low, u32 high) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, column = lane % 4 * 2;
    u32(&all)[32][6] = fragments[warp];
    const u32 mine[6] = {weights[0], weights[1], weights[2], weights[3], low, high};
    std::memcpy(all[lane], mine, sizeof mine);
    __syncwarp();
    for (int part = 0; part < 4; part++) {
        const int m = row + part / 2 * 8, n = column + part % 2;
        u32 sum = sums[part];
        for (int k = 0; k < 32; k++) {
            const u32 weight = all[m % 8 * 4 + k % 16 / 4][m / 8 + k / 16 * 2], input = all[n * 4 + k % 16 / 4][4 + k / 16];
            sum += (u8)(weight >> k % 4 * 8) * (int8_t)(input >> k % 4 * 8);
        }
        sums[part] = (int)sum;
    }
    __syncwarp();
}

inline int bytes_sum(u32 bytes, int others) {
    for (int byte = 0; byte < 32; byte += 8) others += (int8_t)(bytes >> byte);
    return others;
}
inline u32 larger_halves(u32 left, u32 right) {
    return std::max(left & 0xffff, right & 0xffff) | std::max(left >> 16, right >> 16) << 16;
}
inline float inverse(float number) { return 1 / number; }

template <int LANES, class Both> u32 over_lanes(u32 own, Both both) {
    const int lane = threadIdx.x % 32;
    u32(&all)[32][6] = fragments[threadIdx.x / 32];
    for (int by = 1; by < LANES; by *= 2) {
        all[lane][0] = own;
        __syncwarp();
        own = both(own, all[lane ^ by][0]);
        __syncwarp();
    }
    return own;
}

// Every block in turn, its threads side by side.
template <class Kernel> void run(int columns, int rows, Kernel kernel) {
    std::memset(launched, 0xff, sizeof launched);
    for (auto &warp : warps) warp = new std::barrier<>(32);
    for (int y = 0; y < rows; y++)
        for (int x = 0; x < columns; x++) {
            std::vector<std::thread> threads;
            others = 0;
            for (int thread = 0; thread < THREADS; thread++)
                threads.emplace_back([=] {
                    threadIdx = {thread, 0}, blockIdx = {x, y}, gridDim = {columns, rows};
                    passed = 0;
                    kernel();
                    if (thread >= 32) others += 1 << 20;
                });
            for (auto &thread : threads) thread.join();
        }
    for (auto &warp : warps) delete warp;
}
