# SPDX-License-Identifier: Apache-2.0
"""The CUDA C source of the kernels that multiply up to 64 rows of activations at a time, and nothing else."""

from collections.abc import Iterable
from typing import NamedTuple


STEP = 64  # columns that a warp takes at a time, within one group
TOGETHER = 2  # steps of a warp in a round
STAGES = 3  # rounds that are in shared memory or on their way there
PADDING = 4  # floats between the sums of neighbouring rows, so many that they are in different banks


class TileKernel(NamedTuple):
    """One of the kernels: a warp has 16 outputs `warp_tiles` times, and 8 rows `row_tiles` times."""

    bits: int
    dtype: str
    warp_tiles: int
    row_tiles: int
    threads: int  # of a block, at most

    @property
    def name(self) -> str:
        return f"tiles_int{self.bits}_{self.dtype}_{self.warp_tiles}x{self.row_tiles}"

    @property
    def source(self) -> str:
        is_bfloat16 = "true" if self.dtype == "bfloat16" else "false"
        sizes = f"{self.warp_tiles}, {self.row_tiles}, {self.threads}"
        return f"TILE_KERNEL({self.bits}, {self.dtype}, {is_bfloat16}, {sizes})"


def tile_source(kernels: Iterable[TileKernel]) -> str:
    """The source of some kernels, which follows `HELPERS` of `cuda_source.py`."""
    constants = {"STEP": STEP, "TOGETHER": TOGETHER, "STAGES": STAGES, "PADDING": PADDING}
    defines = [f"#define {name} {value}" for name, value in constants.items()]
    return "\n".join((*defines, TILES, *(kernel.source for kernel in kernels)))


TILES = r"""
// Low-bit matrices times many rows: each weight is read and expanded once for up to 64 of them.
//
// A block has `outputs_of_block` rows of the matrix and ROWS rows of x. Its warps divide the outputs, and the columns,
// 64 of them a warp at a time: a step, which is inside of one group; TOGETHER steps of each warp are a round. Blocks of
// a cluster, where the GPU has clusters, divide the rounds; their sums are added up through each other's shared memory.
//
// Copies to shared memory are under way for STAGES - 1 rounds while one is computed: x for all warps of a block, codes
// for the warp that wants them. PADDING floats are between the sums of neighbouring rows.

#ifndef VISUALGLM_SIMT
// `offset` is one into the block's shared memory.
DEVICE u32 shared_address(u32 offset) {
    u32 address;
    asm("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(address) : "l"(shared_memory()));
    return address + offset;
}

DEVICE void copy_to_shared(u32 offset, const void* address) {  // 16 bytes, by and by
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                 :: "r"(shared_address(offset)), "l"(address) : "memory");
#else
    const Words v = load_once(address);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(shared_address(offset)),
                 "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
#endif
}

DEVICE void end_copies() {  // of a round
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int LEFT> DEVICE void wait_for_copies() {  // but for those of the last LEFT rounds
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
#endif
}

DEVICE Words load_shared(u32 offset) {
    Words v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "r"(shared_address(offset)));
    return v;
}

DEVICE void load_shared_pair(u32 offset, u32* word) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(word[0]), "=r"(word[1]) : "r"(shared_address(offset)));
}

DEVICE u32 cluster_rank() {
    u32 rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

DEVICE u32 cluster_size() {
    u32 size = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
}

DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

DEVICE Words load_shared_of(u32 offset, u32 rank) {  // of the cluster's block with that rank
    u32 address = shared_address(offset);
    Words v;
#if __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "r"(address));
#else
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "r"(address));
#endif
    return v;
}
#endif  // VISUALGLM_SIMT

// 16 codes as pairs of 16-bit floats, in order. See expand.
template <int BITS, bool BF16> DEVICE void expand_in_order(const u32* words, u32 mask, u32* pair) {
    if constexpr (BITS == 8) {
        for (int i = 0; i < 4; i++) expand<8, BF16>(words[i], mask, pair + 2 * i);
    } else {
        const u32 excess = BF16 ? 0x43084308 : 0x64086408, one = BF16 ? 0x3f803f80 : 0x3c003c00;
        for (int i = 0; i < 2; i++) {
            const u32 even = words[i] >> 4;
            pair[4 * i] = permute(even, words[i], 0x0400);
            pair[4 * i + 1] = permute(even, words[i], 0x0501);
            pair[4 * i + 2] = permute(even, words[i], 0x0602);
            pair[4 * i + 3] = permute(even, words[i], 0x0703);
        }
        for (int i = 0; i < 8; i++) pair[i] = fma_pair<BF16>((pair[i] & mask) ^ excess, one, excess | 0x80008000);
    }
}

// Bytes of a step: of a row of the matrix, of the activations of a block, of the codes of a warp.
template <int BITS, int WARP_TILES, int ROW_TILES> struct Bytes {
    static constexpr u32 CODES = STEP * BITS / 8, X = ROW_TILES * 8 * STEP * 2, WARP = WARP_TILES * 16 * CODES;
};

template <int BITS, bool BF16, int WARP_TILES, int ROW_TILES>
DEVICE void accumulate_tiles(u32 codes, u32 x, u32 mask, const u16 (*scale)[2], float (*total)[ROW_TILES][4]) {
    constexpr u32 LANE = 2 * BITS;  // bytes of 16 codes
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 a[WARP_TILES][2][8];
    float factor[WARP_TILES][2];
#pragma unroll
    for (int tile = 0; tile < WARP_TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 place = codes + ((tile * 16 + half * 8 + g) * 4 + t) * LANE;
            if constexpr (BITS == 8) {
                const Words words = load_shared(place);
                expand_in_order<BITS, BF16>(words.word, mask, a[tile][half]);
            } else {
                u32 words[2];
                load_shared_pair(place, words);
                expand_in_order<BITS, BF16>(words, mask, a[tile][half]);
            }
            factor[tile][half] = half_to_float(scale[tile][half]);
        }
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
        const u32 row = x + (row_tile * 8 + g) * STEP * 2;  // a multiple of 8 rows: g says what is swapped
        const int first = 2 * t + (g & 1), second = first ^ 1;
        const Words b[2] = {load_shared(row + first * 16), load_shared(row + second * 16)};
#pragma unroll
        for (int tile = 0; tile < WARP_TILES; tile++) {
            float part[4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++)
                mma<BF16>(part, a[tile][0][2 * i], a[tile][1][2 * i], a[tile][0][2 * i + 1], a[tile][1][2 * i + 1],
                          b[i / 2].word[i % 2 * 2], b[i / 2].word[i % 2 * 2 + 1]);
            for (int i = 0; i < 4; i++) total[tile][row_tile][i] += part[i] * factor[tile][i / 2];
        }
    }
}

// out[m, output] of a cluster's blocks, which divide what is to be added up: 8 outputs a thread.
template <bool BF16> DEVICE void add_tiles(int parts, int rows_of_block, int outputs_of_block, int rows,
                                           int outputs_left, const u16* bias, u16* out, int outputs) {
    const u32 ranks = cluster_size();
    const int width = outputs_of_block / 8, items = rows_of_block * width, row_floats = outputs_of_block + PADDING;
    for (int item = cluster_rank() * blockDim.x + threadIdx.x; item < items; item += ranks * blockDim.x) {
        const int m = item / width, output = item % width * 8;
        if (m >= rows || output >= outputs_left) continue;
        float sum[8] = {};
        for (int part = 0; part < parts; part++)
            for (u32 rank = 0; rank < ranks; rank++) {
                const u32 place = ((part * rows_of_block + m) * row_floats + output) * 4;
                const Words low = load_shared_of(place, rank), high = load_shared_of(place + 16, rank);
                for (int i = 0; i < 4; i++) {
                    sum[i] += bits_to_float(low.word[i]);
                    sum[4 + i] += bits_to_float(high.word[i]);
                }
            }
        if (bias) {
            const Words each = load_cached(bias + output, true);
            for (int i = 0; i < 8; i++) sum[i] += to_float<BF16>((u16)(each.word[i / 2] >> i % 2 * 16));
        }
        Words result;
        for (int i = 0; i < 4; i++) result.word[i] = floats_to_pair<BF16>(sum[2 * i], sum[2 * i + 1]);
        store(out + (size_t)m * outputs + output, result);
    }
}

// out[M, N] = x[M, K] weight[N, K]^T + bias[N], where there is a bias.
//
// Lane 4 g + t has rows g and g + 8 of each of the warp's tiles of 16 outputs, and rows g of x, 8 apart; of both the
// columns 16 t to 16 t + 15 of the step.
//
// inputs is a multiple of STEP, outputs of 8; groups (per row) of STEP << group_shift columns. All is contiguous,
// pointers to x, weight, bias and out are multiples of 16.
template <int BITS, bool BF16, int WARP_TILES, int ROW_TILES>
DEVICE void multiply_tiles(const u16* x, const signed char* weight, const u16* scale, const u16* bias, u16* out,
                           int rows, int outputs, int inputs, int groups, int group_shift, int warps_across) {
    constexpr int ROWS = ROW_TILES * 8, WARP_OUTPUTS = WARP_TILES * 16;
    typedef Bytes<BITS, WARP_TILES, ROW_TILES> B;
    constexpr int PIECES = TOGETHER * B::CODES / 16;  // of a row of the matrix, that a warp copies in a round
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int g = lane / 4, t = lane % 4;
    const int across = warp % warps_across, along = warp / warps_across, warps_along = warps / warps_across;
    const int steps_of_round = warps_along * TOGETHER;
    const u32 all_x = steps_of_round * B::X, stage_bytes = all_x + warps * TOGETHER * B::WARP;
    const u32 own_x = along * TOGETHER * B::X, own_codes = all_x + warp * TOGETHER * B::WARP;
    const int rank = cluster_rank(), ranks = cluster_size();
    const int outputs_of_block = warps_across * WARP_OUTPUTS;
    const int first_row = blockIdx.x / ranks * ROWS, first_output = blockIdx.y * outputs_of_block;
    const int warp_output = first_output + across * WARP_OUTPUTS;
    const int steps = inputs / STEP, rounds = (steps + steps_of_round - 1) / steps_of_round;
    const int begin = rounds * rank / ranks, end = rounds * (rank + 1) / ranks;
    const u32 mask = (BITS == 4 ? 0x000f000f : BF16 ? 0x43004300 : 0x64646464) * blockDim.z;

    // Of a round's x a thread copies the same 8 columns of some rows. Past the end are the last row and the last
    // output, of which nothing is stored there.
    const int piece = threadIdx.x % (steps_of_round * 8), piece_row = threadIdx.x / (steps_of_round * 8);
    const int piece_rows = blockDim.x / (steps_of_round * 8);  // an even number
    const u32 piece_place = piece / 8 * B::X + ((piece % 8) ^ (piece_row & 1)) * 16;
    auto copy = [&](int round, u32 stage) {
        const int step = round * steps_of_round, own_step = step + along * TOGETHER;
        if (step + piece / 8 < steps)
            for (int m = piece_row; m < ROWS; m += piece_rows) {
                const int row = first_row + m < rows ? first_row + m : rows - 1;
                copy_to_shared(stage + piece_place + m * STEP * 2, x + (size_t)row * inputs + step * STEP + piece * 8);
            }
        const int own_piece = lane % PIECES, at = own_piece * 16 / B::CODES;
        const u32 place = stage + own_codes + at * B::WARP + lane / PIECES * B::CODES + own_piece * 16 % B::CODES;
        if (own_step + at < steps)
#pragma unroll
            for (int i = 0; i < WARP_OUTPUTS * PIECES / 32; i++) {
                const int output = warp_output + i * (32 / PIECES) + lane / PIECES;
                const size_t row = output < outputs ? output : outputs - 1;
                copy_to_shared(place + i * (32 / PIECES) * B::CODES,
                               weight + (row * steps + own_step) * B::CODES + own_piece * 16);
            }
    };
    auto load_scales = [&](int round, u16 (*scale_of)[WARP_TILES][2]) {
        const int step = round * steps_of_round + along * TOGETHER;
#pragma unroll
        for (int at = 0; at < TOGETHER; at++) {
            if (round >= end || step + at >= steps) return;
#pragma unroll
            for (int tile = 0; tile < WARP_TILES; tile++)
                for (int half = 0; half < 2; half++) {
                    const int output = warp_output + tile * 16 + half * 8 + g;
                    const int row = output < outputs ? output : outputs - 1;
                    scale_of[at][tile][half] = load_half(scale + (row * groups + (step + at >> group_shift)));
                }
        }
    };

    float total[WARP_TILES][ROW_TILES][4] = {};
    u16 now[TOGETHER][WARP_TILES][2] = {}, next[TOGETHER][WARP_TILES][2] = {};
    for (int i = 0; i < STAGES - 1; i++) {
        if (begin + i < end) copy(begin + i, i * stage_bytes);
        end_copies();
    }
    load_scales(begin, next);
    u32 stage = 0, free_stage = (STAGES - 1) * stage_bytes;
    for (int round = begin; round < end; round++) {
        for (int at = 0; at < TOGETHER; at++)
            for (int tile = 0; tile < WARP_TILES; tile++)
                for (int half = 0; half < 2; half++) now[at][tile][half] = next[at][tile][half];
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // all have copied, and are done with the stage of the round before
        if (round + STAGES - 1 < end) copy(round + STAGES - 1, free_stage);
        end_copies();
        load_scales(round + 1, next);
#pragma unroll
        for (int at = 0; at < TOGETHER; at++)
            if (round * steps_of_round + along * TOGETHER + at < steps)
                accumulate_tiles<BITS, BF16, WARP_TILES, ROW_TILES>(
                    stage + own_codes + at * B::WARP, stage + own_x + at * B::X, mask, now[at], total);
        free_stage = stage;
        stage = stage == (STAGES - 1) * stage_bytes ? 0 : stage + stage_bytes;
    }
    wait_for_copies<0>();
    __syncthreads();
    float* sums = shared_memory() + along * ROWS * (outputs_of_block + PADDING);  // [warps_along][ROWS][outputs]
    for (int tile = 0; tile < WARP_TILES; tile++)
        for (int row_tile = 0; row_tile < ROW_TILES; row_tile++)
            for (int i = 0; i < 4; i++)
                sums[(row_tile * 8 + 2 * t + i % 2) * (outputs_of_block + PADDING) + across * WARP_OUTPUTS + tile * 16 +
                     i / 2 * 8 + g] = total[tile][row_tile][i];
    wait_for_cluster();
    add_tiles<BF16>(warps_along, ROWS, outputs_of_block, rows - first_row, outputs - first_output,
                    bias ? bias + first_output : bias, out + (size_t)first_row * outputs + first_output, outputs);
    wait_for_cluster();  // nobody leaves whose memory is still read
}

#define TILE_KERNEL(BITS, DTYPE, BF16, WARP_TILES, ROW_TILES, THREADS)                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) tiles_int##BITS##_##DTYPE##_##WARP_TILES##x##ROW_TILES(     \
        const u16* x, const signed char* weight, const u16* scale, const u16* bias, u16* out, int rows, int outputs,  \
        int inputs, int groups, int group_shift, int warps_across) {                                                  \
        multiply_tiles<BITS, BF16, WARP_TILES, ROW_TILES>(x, weight, scale, bias, out, rows, outputs, inputs, groups, \
                                                          group_shift, warps_across);                                 \
    }
"""
