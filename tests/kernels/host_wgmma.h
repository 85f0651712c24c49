// The instructions of `wgmma.cu` in plain C++, as the PTX ISA has them, and no sooner than it promises: copies arrive
// when they are waited for, matrix instructions see only what a proxy fence showed them, and run when they are waited
// for, with what is in their registers and in shared memory then. A place that a copy is on its way to holds poison.

#include "host_ptx.h"

#include <deque>

typedef uint64_t u64;

constexpr int SHARED = 227 << 10, GROUP_THREADS = 128;
constexpr u8 POISON = 0xff;

struct Written {
    u32 at, size;
};
struct Arrival {
    u32 to, size;
    const void *from;
};
struct Product {
    float *sums;
    const u32 *weights;
    u64 inputs;
};

static u8 memory[SHARED], shown[SHARED];  // what threads see, and what matrix instructions see
static thread_local std::vector<Written> unseen;
static thread_local std::vector<Arrival> arrivals;
static thread_local std::deque<std::vector<Arrival>> arrival_groups;
static thread_local bool fenced;
static std::vector<Product> products[THREADS];
static std::deque<std::vector<Product>> product_groups[THREADS];
static std::barrier<> *warpgroups[THREADS / GROUP_THREADS];
static u32 addresses[WARPS][32];

inline void check(bool holds, const char *what) {
    if (!holds) std::fprintf(stderr, "%s\n", what), std::abort();
}
inline u8 *place(u32 at, u32 size) {
    check(at % size == 0 && at + size <= SHARED, "shared memory: out of bounds, or not aligned");
    return memory + at;
}
inline void write(u32 at, const void *from, u32 size) {
    std::memcpy(place(at, size), from, size);
    unseen.push_back({at, size});
}

inline u32 shared_memory() { return 1024; }
inline void copy16(u32 to, const void *from, u32 size) {
    std::memset(place(to, 16), POISON, 16);
    std::memset(shown + to, POISON, 16);
    arrivals.push_back({to, size, from});
}
inline void commit_copies() {
    arrival_groups.push_back(arrivals);
    arrivals.clear();
}
template <int LEFT> void await_copies() {
    for (; arrival_groups.size() > LEFT; arrival_groups.pop_front())
        for (const Arrival &copy : arrival_groups.front()) {
            u8 found[16] = {};
            std::memcpy(found, copy.from, copy.size);
            write(copy.to, found, 16);
        }
}
inline void show_writes() {
    for (const Written &one : unseen) std::memcpy(shown + one.at, memory + one.at, one.size);
    unseen.clear();
}

inline void load_matrices(u32 &a, u32 &b, u32 &c, u32 &d, u32 from) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 *found[4] = {&a, &b, &c, &d};
    addresses[warp][lane] = from;
    warps[warp]->arrive_and_wait();
    for (int matrix = 0; matrix < 4; matrix++)
        std::memcpy(found[matrix], place(addresses[warp][8 * matrix + lane / 4], 16) + 4 * (lane % 4), 4);
    warps[warp]->arrive_and_wait();
}
inline void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 held[4] = {a, b, c, d};
    addresses[warp][lane] = to;
    warps[warp]->arrive_and_wait();
    for (int matrix = 0; matrix < 4; matrix++)
        for (int half = 0; half < 2; half++) {  // row lane / 4, columns 2 * (lane % 4) and the next
            const u16 value = held[matrix] >> 16 * half;
            place(addresses[warp][8 * matrix + 2 * (lane % 4) + half], 16);
            write(addresses[warp][8 * matrix + 2 * (lane % 4) + half] + 2 * (lane / 4), &value, 2);
        }
    warps[warp]->arrive_and_wait();
}
inline uint4 load_shared(u32 from) {
    uint4 found;
    std::memcpy(&found, place(from, 16), 16);
    return found;
}
inline u32 constant_at(u32 from) {
    u32 found;
    std::memcpy(&found, place(from, 4), 4);
    return found;
}
inline void store_four(u32 to, u32 word) {
    const u32 all[4] = {word, word, word, word};
    write(to, all, 16);
}
inline u32 halves(float left, float right) {
    const _Float16 both[2] = {(_Float16)left, (_Float16)right};
    u32 found;
    std::memcpy(&found, both, 4);
    return found;
}

inline u64 described(u32 address) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | address >> 4; }
inline void hold(u32 &) {}
inline void begin_products() { fenced = true; }
inline void begin_product(float (&sums)[64], const u32 (&weights)[4], u64 inputs) {
    check(fenced, "a product without a fence of registers");
    products[threadIdx.x].push_back({sums, weights, inputs});
}
inline void commit_products() {
    product_groups[threadIdx.x].push_back(products[threadIdx.x]);
    products[threadIdx.x].clear();
    fenced = false;
}

inline u16 input_at(u64 described, int token, int k) {  // of a K-major matrix, where its descriptor says
    check(described >> 62 == 1 && (described >> 49 & 7) == 0, "not the 128-byte swizzle");
    const u32 start = (described & 0x3fff) << 4, stride = (described >> 32 & 0x3fff) << 4;
    u32 at = start + token / 8 * stride + token % 8 * 128 + 2 * k;
    at ^= (at >> 7 & 7) << 4;
    u16 found;
    std::memcpy(&found, shown + at, 2);
    return found;
}
inline void execute(const std::vector<const Product *> &lanes, const Product &own) {  // of the lanes of a warp
    const int lane = threadIdx.x % 32, row = lane / 4;
    float rows[2][16], inputs[16];
    for (int m = 0; m < 2; m++)
        for (int k = 0; k < 16; k++) {
            const u32 pair = lanes[row * 4 + k % 8 / 2]->weights[m + k / 8 * 2];
            rows[m][k] = number_of((u16)(pair >> k % 2 * 16));
        }
    for (int column = 0; column < 32; column++) {
        const int token = column / 2 * 8 + lane % 4 * 2 + column % 2;
        for (int k = 0; k < 16; k++) inputs[k] = number_of(input_at(own.inputs, token, k));
        for (int m = 0; m < 2; m++) {
            float &sum = own.sums[column / 2 * 4 + m * 2 + column % 2];
            double found = sum;
            for (int k = 0; k < 16; k++) found += (double)rows[m][k] * inputs[k];
            sum = (float)found;
        }
    }
}
template <int LEFT> void await_products() {
    const int thread = threadIdx.x, warp = thread / 32;
    std::barrier<> &all = *warpgroups[thread / GROUP_THREADS];
    all.arrive_and_wait();
    const size_t groups = product_groups[thread].size(), ready = groups > LEFT ? groups - LEFT : 0;
    for (size_t group = 0; group < ready; group++)
        for (size_t one = 0; one < product_groups[thread][group].size(); one++) {
            std::vector<const Product *> lanes;
            for (int lane = 0; lane < 32; lane++) lanes.push_back(&product_groups[warp * 32 + lane][group][one]);
            execute(lanes, product_groups[thread][group][one]);
        }
    all.arrive_and_wait();
    product_groups[thread].erase(product_groups[thread].begin(), product_groups[thread].begin() + ready);
}

// As `run`, with shared memory that holds nothing.
template <class Kernel> void run_warpgroups(int columns, int rows, Kernel kernel) {
    for (auto &one : warpgroups) one = new std::barrier<>(GROUP_THREADS);
    run(columns, rows, [=] {
        if (threadIdx.x == 0) std::memset(memory, POISON, SHARED), std::memset(shown, POISON, SHARED);
        __syncthreads();
        kernel();
    });
    for (auto &one : warpgroups) delete one;
}
