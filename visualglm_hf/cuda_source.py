# SPDX-License-Identifier: Apache-2.0
"""The CUDA C source of the kernels for low-bit matrices and a few rows, and of what all kernels share; nothing else."""

HELPERS = r"""
// Low-bit matrices times half precision. No headers: halves are integers, and what C lacks is PTX.
//
// Codes as in lowbit_format.py: 8 bits, or 4 with the even column in the high half of the byte.
// A "pair" is two 16-bit floats in 32 bits. BF16: bfloat16 (sm_80 and later), else float16.

typedef unsigned short u16;
typedef unsigned int u32;
struct Words { u32 word[4]; };

#define TILES 2       // of 16 outputs
#define MAX_WARPS 32  // per block: registers for 1024 threads
#define OUTPUTS (TILES * 16)  // of a block
#define SUMS (8 * (OUTPUTS + 1) + 1)  // floats of a warp, so many that neighbours are in different banks

#ifndef VISUALGLM_SIMT  // what the CPU tests replace
#define DEVICE static __device__ __forceinline__

DEVICE float* shared_memory() {
    extern __shared__ float memory[];
    return memory;
}

// Loads are not to be moved past this: the assembler would start them when they are needed, to save registers.
DEVICE void start_loads() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

DEVICE Words load_once(const void* address) {
    Words v;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(address));
    return v;
}

DEVICE Words load_cached(const void* address, bool is_wanted) {  // else 0
    Words v = {};
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
                 : "l"(address), "r"((u32)is_wanted));
    return v;
}

DEVICE float from_other_lane(float value, int distance) {
    float other;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(other) : "f"(value), "r"(distance));
    return other;
}

DEVICE u16 load_half(const u16* address) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
}

DEVICE void store(void* address, Words v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
        :: "l"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
}

// Bytes of a (0 to 3) and b (4 to 7), the selector's lowest four bits saying which comes first.
DEVICE u32 permute(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

template <bool BF16> DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (BF16) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE float half_to_float(u16 half) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(half));
    return d;
}

DEVICE float bits_to_float(u32 bits) {
    float d;
    asm("mov.b32 %0, %1;" : "=f"(d) : "r"(bits));
    return d;
}

template <bool BF16> DEVICE u32 floats_to_pair(float low, float high) {
    u32 d;
    if constexpr (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("{.reg .b16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
             : "=r"(d) : "f"(low), "f"(high));
    return d;
}

// d[16 x 8] += a[16 x 16] b[16 x 8] by all lanes of a warp. Of lane 4 g + t: a0, a2 are columns of row g, a1, a3 of
// row g + 8; b0, b1 are rows of column g; d0, d1 are columns 2 t and 2 t + 1 of row g, d2, d3 of row g + 8.
template <bool BF16> DEVICE void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a2), "r"(a3), "r"(b1));
#else
    if constexpr (BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
#endif  // VISUALGLM_SIMT

template <bool BF16> DEVICE float to_float(u16 half) {
    if constexpr (BF16) return bits_to_float((u32)half << 16);
    return half_to_float(half);
}

// Codes as exact 16-bit floats, without conversion instructions, which are slow: a code, made unsigned by flipping its
// sign bit, becomes the last bits of 1024 (float16) or 128 (bfloat16), from which the excess is subtracted.
// Of 8 codes of 4 bits come the pairs (1, 5), (0, 4), (3, 7), (2, 6); of 4 codes of 8 bits (0, 1), (2, 3).
template <int BITS, bool BF16> DEVICE void expand(u32 word, u32 mask, u32* pair) {
    const u32 one = BF16 ? 0x3f803f80 : 0x3c003c00;
    if constexpr (BITS == 4) {
        const u32 excess = BF16 ? 0x43084308 : 0x64086408;  // 136; 1032
        for (int i = 0; i < 4; i++)
            pair[i] = fma_pair<BF16>((word >> 4 * i & mask) ^ excess, one, excess | 0x80008000);
    } else if constexpr (BF16) {  // 8 bits are one too many for the last bits of 128: the sign bit makes it 256
        for (int i = 0; i < 2; i++) {
            const u32 codes = permute(word, 0, i ? 0x4342 : 0x4140);
            pair[i] = fma_pair<true>((codes & 0x00800080) | mask, 0xbf80bf80, (codes & 0x007f007f) | mask);
        }
    } else {
        for (int i = 0; i < 2; i++)
            pair[i] = fma_pair<false>(permute(word ^ 0x80808080, mask, i ? 0x4342 : 0x4140), one, 0xe480e480);
    }
}

// A constant of expand's. An instruction holds one constant only, and the compiler would load the other one before
// each; it does not know that blockDim.z is 1.
template <int BITS, bool BF16> DEVICE u32 expand_mask() {
    return (BITS == 4 ? 0x000f000f : BF16 ? 0x43004300 : 0x64646464) * blockDim.z;
}

"""

FEW_ROWS = r"""
// Activations in the order of expand's pairs: those that belong to the codes of word i.
template <int BITS> DEVICE void arrange(const Words* x, int i, u32* pair) {
    if constexpr (BITS == 4) {
        pair[0] = permute(x[i].word[0], x[i].word[2], 0x7632);
        pair[1] = permute(x[i].word[0], x[i].word[2], 0x5410);
        pair[2] = permute(x[i].word[1], x[i].word[3], 0x7632);
        pair[3] = permute(x[i].word[1], x[i].word[3], 0x5410);
    } else {
        pair[0] = x[i / 2].word[i % 2 * 2];
        pair[1] = x[i / 2].word[i % 2 * 2 + 1];
    }
}

// What a lane multiplies with at a time: 16 bytes of each of its rows of the matrix, the rows' scales there, and the
// activations. Rows are 8 apart, from `row` on. Without a row of x (-1), and in columns past the end, activations are
// 0, whatever the codes.
template <int SPAN> struct Operands { Words codes[TILES][2]; u16 scale[TILES][2]; Words x[SPAN / 8]; };

template <int BITS> DEVICE Operands<128 / BITS> load(const u16* x, const signed char* weight, const u16* scale,
                                                     int x_row, u32 row, int column, int inputs, int groups,
                                                     int group_shift) {
    constexpr int SPAN = 128 / BITS;
    const int inside = column < inputs ? column : inputs - SPAN;
    Operands<SPAN> now;
    for (int tile = 0; tile < TILES; tile++)
        for (int half = 0; half < 2; half++, row += 8) {
            now.codes[tile][half] = load_once(weight + ((row * inputs + inside) / SPAN * 16));
            now.scale[tile][half] = load_half(scale + (row * groups + (inside >> group_shift)));
        }
    for (int i = 0; i < SPAN / 8; i++)
        now.x[i] = load_cached(x + (x_row * inputs + inside + 8 * i), x_row >= 0 && column == inside);
    start_loads();
    return now;
}

template <int BITS, bool BF16> DEVICE void accumulate(const Operands<128 / BITS>& now, u32 mask, float (*total)[4]) {
    constexpr int PAIRS = 16 / BITS;  // in a word of codes
    float part[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 b[PAIRS], low[PAIRS], high[PAIRS];
        arrange<BITS>(now.x, i, b);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            expand<BITS, BF16>(now.codes[tile][0].word[i], mask, low);
            expand<BITS, BF16>(now.codes[tile][1].word[i], mask, high);
            for (int p = 0; p < PAIRS; p += 2)
                mma<BF16>(part[tile], low[p], high[p], low[p + 1], high[p + 1], b[p], b[p + 1]);
        }
    }
    for (int tile = 0; tile < TILES; tile++)
        for (int i = 0; i < 4; i++) total[tile][i] += part[tile][i] * half_to_float(now.scale[tile][i / 2]);
}

// out[m, output] for a block's rows of x, of which `rows` are left: add up what its warps have, and what is in columns
// of b for the same row. Neighbouring threads share a sum if there are more of them than sums.
template <bool BF16> DEVICE void add(const float* sums, int warps, int rows_per_block, int rows, const u16* bias,
                                     u16* out, int outputs) {
    const int results = (rows < rows_per_block ? rows : rows_per_block) * OUTPUTS;
    const int parts = 8 / rows_per_block, shift = parts == 1 ? 0 : parts == 2 ? 1 : 2;
    int sharers = 32;
    while (sharers > 1 && sharers * results > blockDim.x) sharers /= 2;
    const int place = threadIdx.x & (sharers - 1);
    for (int i = threadIdx.x / sharers; i < results; i += blockDim.x / sharers) {
        const int m = i / OUTPUTS, output = i % OUTPUTS;
        float sum = 0;
        for (int j = place; j < warps << shift; j += sharers)
            sum += sums[(j >> shift) * SUMS + (m + (j & (parts - 1)) * rows_per_block) * (OUTPUTS + 1) + output];
        for (int distance = sharers / 2; distance > 0; distance /= 2) sum += from_other_lane(sum, distance);
        if (place != 0) continue;
        if (bias) sum += to_float<BF16>(load_half(bias + output));
        out[(size_t)m * outputs + output] = (u16)floats_to_pair<BF16>(sum, 0);
    }
}

// out[M, N] = x[M, K] weight[N, K]^T + bias[N], where there is a bias: a block for 32 outputs and some rows of x; its
// warps divide the columns.
//
// The matrix's rows are rows of the tensor cores' a, rows of x are columns of b; both columns in any order, if it is
// the same. So each lane loads 16 bytes as they are, and the four lanes of a row span 128 columns (8 bits: 64).
// A sum over them must not cross groups, which have scales of their own: if groups are narrower than that, the 8
// columns of b are divided among the groups. Column (group, m) has row m of x, and 0 outside of the group's lanes.
// Codes are exact and scales are applied in float32, so the only rounding is that of the sum and of the result. The
// bias is added before the result is rounded.
//
// inputs is a multiple of 128 / BITS, outputs of 32; groups (per row) of 2^group_shift columns. All is contiguous,
// pointers to x and weight are multiples of 16.
template <int BITS, bool BF16> DEVICE void multiply(const u16* x, const signed char* weight, const u16* scale,
                                                    const u16* bias, u16* out, int rows, int outputs, int inputs,
                                                    int groups, int group_shift) {
    constexpr int SPAN = 128 / BITS;  // columns of a lane at a time
    float* sums = shared_memory();  // [warps][8][33], and one after each warp's
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int g = lane / 4, t = lane % 4;
    const int lanes_per_group = groups == 1 || SPAN << 2 <= 1 << group_shift ? 4 : (1 << group_shift) / SPAN;
    const int rows_per_block = 2 * lanes_per_group;
    const int first_row = blockIdx.x * rows_per_block, first_output = blockIdx.y * OUTPUTS;
    const bool has_x = first_row + g % rows_per_block < rows && g / rows_per_block == t / lanes_per_group;
    const int x_row = has_x ? first_row + g % rows_per_block : -1;

    float total[TILES][4] = {};
    const u32 mask = expand_mask<BITS, BF16>();
    for (int start = warp * 4 * SPAN; start < inputs; start += warps * 4 * SPAN)
        accumulate<BITS, BF16>(load<BITS>(x, weight, scale, x_row, first_output + g, start + t * SPAN, inputs,
                                          groups, group_shift), mask, total);

    for (int tile = 0; tile < TILES; tile++)
        for (int i = 0; i < 4; i++)
            sums[warp * SUMS + (2 * t + i % 2) * (OUTPUTS + 1) + tile * 16 + i / 2 * 8 + g] = total[tile][i];
    __syncthreads();
    u16* first_out = out + ((size_t)first_row * outputs + first_output);
    add<BF16>(sums, warps, rows_per_block, rows - first_row, bias ? bias + first_output : bias, first_out, outputs);
}

template <bool BF16> DEVICE u32 scale_pair(u32 pair, u16 scale) {  // rounded once
    if constexpr (!BF16) return fma_pair<false>(pair, scale * 0x10001u, 0x80008000);
    const float factor = half_to_float(scale);
    return floats_to_pair<BF16>(bits_to_float(pair << 16) * factor, bits_to_float(pair & 0xffff0000) * factor);
}

// out[N, K] = codes times scales, a thread for 16 bytes of codes; width = K / groups.
template <int BITS, bool BF16> DEVICE void dequantize(const signed char* weight, const u16* scale, u16* out,
                                                      int outputs, int inputs, int groups, int width) {
    constexpr int SPAN = 128 / BITS;
    const int spans = inputs / SPAN;
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (size_t)outputs * spans) return;
    const size_t row = index / spans;
    const int column = (int)(index % spans) * SPAN;
    const Words codes = load_once(weight + index * 16);
    const u16 factor = load_half(scale + row * groups + column / width);
    u32 pairs[SPAN / 2], flat[SPAN / 2];
    const u32 mask = expand_mask<BITS, BF16>();
    for (int i = 0; i < 4; i++) expand<BITS, BF16>(codes.word[i], mask, pairs + i * SPAN / 8);
    for (int i = 0; i < SPAN / 2; i++) pairs[i] = scale_pair<BF16>(pairs[i], factor);
    for (int i = 0; i < SPAN / 2; i++) flat[i] = pairs[i];
    if constexpr (BITS == 4)  // back from (1, 5), (0, 4), (3, 7), (2, 6)
        for (int i = 0; i < SPAN / 2; i += 4) {
            flat[i] = permute(pairs[i + 1], pairs[i], 0x5410);
            flat[i + 1] = permute(pairs[i + 3], pairs[i + 2], 0x5410);
            flat[i + 2] = permute(pairs[i + 1], pairs[i], 0x7632);
            flat[i + 3] = permute(pairs[i + 3], pairs[i + 2], 0x7632);
        }
    for (int i = 0; i < SPAN / 8; i++)
        store(out + row * inputs + column + 8 * i,
              Words{{flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3]}});
}

#define KERNELS(BITS, DTYPE, BF16)                                                                                    \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32) multiply_int##BITS##_##DTYPE(                        \
        const u16* x, const signed char* weight, const u16* scale, const u16* bias, u16* out, int rows, int outputs,  \
        int inputs, int groups, int group_shift) {                                                                    \
        multiply<BITS, BF16>(x, weight, scale, bias, out, rows, outputs, inputs, groups, group_shift);                \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) dequantize_int##BITS##_##DTYPE(                                 \
        const signed char* weight, const u16* scale, u16* out, int outputs, int inputs, int groups, int width) {      \
        dequantize<BITS, BF16>(weight, scale, out, outputs, inputs, groups, width);                                   \
    }

KERNELS(4, float16, false)
KERNELS(8, float16, false)
#if __CUDA_ARCH__ >= 800
KERNELS(4, bfloat16, true)
KERNELS(8, bfloat16, true)
#endif
"""

SOURCE = HELPERS + FEW_ROWS
