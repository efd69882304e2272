// Enough of a GPU to run visualglm_hf/cuda_source.py's source on a CPU, unchanged but for its PTX helpers.
//
// A thread of a block is a fiber that runs until it waits for others: at a barrier of its block or of its cluster of
// blocks, or for its warp, at an mma or an exchange. Clusters run one after the other. Whoever waits for someone who has
// left, or reads or writes where it may not, is reported: launch() returns an error and `simt::problem` says why.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define VISUALGLM_SIMT
#define __CUDA_ARCH__ 800
#define __global__
#define __launch_bounds__(...)
#define DEVICE static inline
#define threadIdx (simt::current->index)
#define blockIdx (simt::current->block->index)
#define blockDim (simt::block_size)
#define __syncthreads() simt::wait_for_block()

namespace simt {

struct Dim { int x, y, z; };
struct Meeting { int arrived = 0, generation = 0; };  // of those who wait for each other
struct Warp : Meeting {
    uint32_t a[32][4], b[32][2];
    float* d[32];
    float values[2][32];  // exchanged, by turns
};
struct Block : Meeting {
    Dim index;
    std::vector<Warp> warps;
    std::vector<float> memory;  // shared; NaN until it is written
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Dim index;
    Block* block;
    bool is_done;
    Meeting* waits_at;  // or nullptr
    int waits_for;      // a generation of the meeting
    std::vector<std::vector<std::pair<uint32_t, const void*>>> copies;  // to shared memory, in groups
};

static std::vector<Fiber> fibers;
static std::vector<Block> blocks;  // of a cluster
static Meeting cluster;
static Fiber* current;
static Dim block_size;
static ucontext_t scheduler;
static std::function<void()> kernel;
static const char* problem;
static std::vector<std::pair<uintptr_t, size_t>> allowed;  // memory of the "device"; empty: anything goes

static void yield() { swapcontext(&current->context, &scheduler); }

// The last one to come does what is to be done when all are there.
template <typename Action> static void wait_at(Meeting& meeting, int expected, Action action) {
    if (++meeting.arrived == expected) {
        action();
        meeting.arrived = 0;
        meeting.generation++;
        return;
    }
    current->waits_at = &meeting;
    current->waits_for = meeting.generation;
    yield();
}

static void wait_for_block() { wait_at(*current->block, block_size.x, [] {}); }
static void wait_for_cluster() { wait_at(cluster, (int)fibers.size(), [] {}); }

static Warp& current_warp() { return current->block->warps[current->index.x / 32]; }
template <typename Action> static void wait_for_warp(Warp& warp, Action action) { wait_at(warp, 32, action); }

static bool is_blocked(const Fiber& fiber) { return fiber.waits_at && fiber.waits_at->generation == fiber.waits_for; }

static void enter() {
    kernel();
    current->is_done = true;
    yield();
}

static bool can_access(const void* address, size_t bytes) {
    const uintptr_t at = (uintptr_t)address;
    if (at % bytes) problem = "an address that is no multiple of what is read or written there";
    bool is_inside = allowed.empty();
    for (auto& range : allowed) is_inside |= at >= range.first && at + bytes <= range.first + range.second;
    if (!is_inside) problem = "an address outside of the tensors";
    return !problem;
}

static void run_cluster() {
    cluster = Meeting();
    for (Block& block : blocks) {
        block.arrived = 0;
        std::fill(block.memory.begin(), block.memory.end(), NAN);
        block.warps.assign(block_size.x / 32, Warp());
    }
    fibers.resize(blocks.size() * block_size.x);
    for (int i = 0; i < (int)fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(64 * 1024);
        fiber.index = {i % block_size.x, 0, 0};
        fiber.block = &blocks[i / block_size.x];
        fiber.is_done = false;
        fiber.waits_at = nullptr;
        fiber.copies.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (Fiber& fiber : fibers) {
            if (fiber.is_done || is_blocked(fiber)) continue;
            fiber.waits_at = nullptr;
            current = &fiber;
            swapcontext(&scheduler, &fiber.context);
            moved = true;
        }
    }
    for (Fiber& fiber : fibers)
        if (!fiber.is_done) problem = "a thread waits for one that does not come";
}

static bool launch(Dim grid, int threads, size_t memory_bytes, size_t most_memory, int cluster_size,
                   std::function<void()> body) {
    problem = nullptr;
    kernel = std::move(body);
    block_size = {threads, 1, 1};
    if (threads % 32 || threads > 1024 || grid.y > 65535 || memory_bytes > most_memory) problem = "an impossible grid";
    if (cluster_size < 1 || cluster_size > 8 || grid.x % cluster_size) problem = "an impossible cluster";
    blocks.resize(cluster_size);
    for (Block& block : blocks) block.memory.resize((memory_bytes + 15) / 16 * 4);
    for (int y = 0; y < grid.y && !problem; y++)
        for (int x = 0; x < grid.x && !problem; x += cluster_size) {
            for (int rank = 0; rank < cluster_size; rank++) blocks[rank].index = {x + rank, y, 0};
            run_cluster();
        }
    return !problem;
}

// Floating point

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                  : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                 : std::ldexp((float)mantissa, -24);
    return half & 0x8000 ? -value : value;
}

static uint16_t to_half(double value) {  // to nearest, ties to even, as nearbyint does
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    value = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (value >= 65520) return sign | 0x7c00;
    int exponent = value > 0 ? std::ilogb(value) : -15;
    if (exponent < -14) return sign | (uint16_t)std::nearbyint(std::ldexp(value, 24));
    return sign | (uint16_t)((exponent + 14 << 10) + (int)std::nearbyint(std::ldexp(value, 10 - exponent)));
}

static uint16_t to_bfloat16(double value) {
    uint32_t bits = to_bits((float)value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static float widen(bool bf16, uint16_t bits) { return bf16 ? from_bits((uint32_t)bits << 16) : from_half(bits); }
static uint16_t narrow(bool bf16, double value) { return bf16 ? to_bfloat16(value) : to_half(value); }

}  // namespace simt

// The helpers that are PTX on a GPU; Words, u16 and u32 come from the source

struct Words;
DEVICE Words load_once(const void* address);
DEVICE Words load_cached(const void* address, bool is_wanted);
DEVICE uint16_t load_half(const uint16_t* address);
DEVICE void store(void* address, Words v);

DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | (uint64_t)b << 32;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) d |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return d;
}

template <bool BF16> DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int i = 0; i < 32; i += 16)
        d |= (uint32_t)simt::narrow(BF16, (double)simt::widen(BF16, a >> i) * simt::widen(BF16, b >> i) +
                                              simt::widen(BF16, c >> i)) << i;
    return d;
}

DEVICE void start_loads() {}
DEVICE float* shared_memory() { return simt::current->block->memory.data(); }
DEVICE uint32_t cluster_rank() { return simt::current->block - simt::blocks.data(); }
DEVICE uint32_t cluster_size() { return simt::blocks.size(); }
DEVICE void wait_for_cluster() { simt::wait_for_cluster(); }
DEVICE void end_copies();
template <int LEFT> void wait_for_copies();
DEVICE void copy_to_shared(uint32_t offset, const void* address);
DEVICE Words load_shared(uint32_t offset);
DEVICE Words load_shared_of(uint32_t offset, uint32_t rank);
DEVICE void load_shared_pair(uint32_t offset, uint32_t* word);
DEVICE float half_to_float(uint16_t half) { return simt::from_half(half); }
DEVICE float bits_to_float(uint32_t bits) { return simt::from_bits(bits); }

template <bool BF16> DEVICE uint32_t floats_to_pair(float low, float high) {
    return simt::narrow(BF16, low) | (uint32_t)simt::narrow(BF16, high) << 16;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"
static void compute_mma(bool bf16, simt::Warp& warp) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++)
            a[g + (i / 2 % 2 ? 8 : 0)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] =
                simt::widen(bf16, warp.a[lane][i / 2] >> 16 * (i % 2));
        for (int i = 0; i < 4; i++)
            b[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] = simt::widen(bf16, warp.b[lane][i / 2] >> 16 * (i % 2));
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) warp.d[lane][i] += a[row][k] * b[k][column];
        }
}

template <bool BF16> DEVICE void mma(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                     uint32_t b1) {
    const int lane = threadIdx.x % 32;
    simt::Warp& warp = simt::current_warp();
    const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    memcpy(warp.a[lane], a, sizeof a);
    memcpy(warp.b[lane], b, sizeof b);
    warp.d[lane] = d;
    simt::wait_for_warp(warp, [&] { compute_mma(BF16, warp); });
}

DEVICE float from_other_lane(float value, int distance) {
    const int lane = threadIdx.x % 32;
    simt::Warp& warp = simt::current_warp();
    float* values = warp.values[warp.generation % 2];
    values[lane] = value;
    simt::wait_for_warp(warp, [] {});
    return values[lane ^ distance];
}
