# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Products with low-bit matrices on NVIDIA GPUs: one CUDA C source, its compilation, its launch.

Not here: the format's bytes and the torch reference (`quantization_kernels.py`), which is also what is used wherever
the kernels cannot be.

The source is compiled when a device is first used, by the NVRTC that comes with torch, to machine code for that
device. Nothing else is needed: no compiler, no toolkit, no headers. Then the kernels have to agree with the reference
on a few small problems. If anything is off there is one warning, and the torch operators do the work. Importing this
file touches no GPU and no library.

The environment variable VISUALGLM_KERNELS says otherwise: "torch" never uses the kernels, "cuda" turns the warning into
an error; "auto" is the default, and "cpu" is for the kernels of `cpu_products.py`.

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix.
"""

import ctypes
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


# M up to which the fused kernel is used: many rows are better dequantized once, for cuBLAS (on an H200 from 48 rows).
FUSED_ROWS = 32
BLOCK_OUTPUTS = 32  # outputs of a block of the fused kernel
LANE_BITS = 128  # bits of codes that a lane loads at once
MIN_WARPS, MAX_WARPS = 8, 32  # of a block of the fused kernel; registers allow no more at a time
WARP_MEMORY = (8 * (BLOCK_OUTPUTS + 1) + 1) * 4  # bytes of shared memory for the sums of a warp
MAX_BLOCKS = 2**16 - 1  # along the second dimension of a grid
MAX_ELEMENTS = 2**31  # of a matrix, for 32-bit offsets
DEQUANTIZE_THREADS = 256
OLDEST_CAPABILITY = (7, 5)  # Turing: the first with m16n8k8
BFLOAT16_CAPABILITY = (8, 0)
# By major version, the newest first: on Linux, on Windows.
NVRTC_NAMES = {
    13: ("libnvrtc.so.13", "nvrtc64_130_0.dll"),
    12: ("libnvrtc.so.12", "nvrtc64_120_0.dll"),
    11: ("libnvrtc.so.11.2", "nvrtc64_112_0.dll"),
}
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
CHOICES = ("auto", "cpu", "cuda", "torch")
# Relative error of the self-check: the result is rounded to 11 or 8 bits, and a matrix for cuBLAS before that.
CHECK_TOLERANCE = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}

SOURCE = r"""
// Low-bit matrices times half precision. No headers: halves are integers, and what C lacks is PTX.
//
// Codes as in quantization_kernels.py: 8 bits, or 4 with the even column in the high half of the byte.
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
template <bool BF16> DEVICE void add(const float* sums, int warps, int rows_per_block, int rows, u16* out,
                                     int outputs) {
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
        if (place == 0) out[(size_t)m * outputs + output] = (u16)floats_to_pair<BF16>(sum, 0);
    }
}

// out[M, N] = x[M, K] weight[N, K]^T, a block for 32 outputs and some rows of x; its warps divide the columns.
//
// The matrix's rows are rows of the tensor cores' a, rows of x are columns of b; both columns in any order, if it is
// the same. So each lane loads 16 bytes as they are, and the four lanes of a row span 128 columns (8 bits: 64).
// A sum over them must not cross groups, which have scales of their own: if groups are narrower than that, the 8
// columns of b are divided among the groups. Column (group, m) has row m of x, and 0 outside of the group's lanes.
// Codes are exact and scales are applied in float32, so the only rounding is that of the sum and of the result.
//
// inputs is a multiple of 128 / BITS, outputs of 32; groups (per row) of 2^group_shift columns. All is contiguous,
// pointers to x and weight are multiples of 16.
template <int BITS, bool BF16> DEVICE void multiply(const u16* x, const signed char* weight, const u16* scale, u16* out,
                                                    int rows, int outputs, int inputs, int groups, int group_shift) {
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
    add<BF16>(sums, warps, rows_per_block, rows - first_row, first_out, outputs);
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
        const u16* x, const signed char* weight, const u16* scale, u16* out, int rows, int outputs, int inputs,       \
        int groups, int group_shift) {                                                                                \
        multiply<BITS, BF16>(x, weight, scale, out, rows, outputs, inputs, groups, group_shift);                      \
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


class KernelError(RuntimeError):
    """The kernels cannot be compiled, loaded or launched, or compute something else."""


# Compilation


def find_nvrtc() -> Iterator[ctypes.CDLL]:
    """Load one NVRTC after the other, torch's major version first: the one found by name, then those of the wheels.

    A library that torch has loaded already is found by name.
    """
    own = (torch.version.cuda or "").split(".")[0]
    majors = [int(own)] if own else []
    majors += [major for major in NVRTC_NAMES if major not in majors]
    names = [NVRTC_NAMES[major][sys.platform == "win32"] for major in majors if major in NVRTC_NAMES]
    packages = Path(torch.__file__).parents[1]
    folders = [packages / "torch/lib", *sorted(packages.glob("nvidia/*/lib")), *sorted(packages.glob("nvidia/*/bin"))]
    for name in names:
        for folder in (None, *(folder for folder in folders if (folder / name).exists())):
            try:
                yield load_with_builtins(folder, name)
            except OSError:
                continue


def load_with_builtins(folder: Path | None, name: str) -> ctypes.CDLL:
    """Load a library, after the one that NVRTC looks for by name when it compiles, and does not find in a wheel."""
    if folder is None:
        return ctypes.CDLL(name)
    for builtins in sorted(folder.glob("*nvrtc-builtins*")):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(folder / name))


def check_nvrtc(nvrtc: ctypes.CDLL, code: int, program: ctypes.c_void_p) -> None:
    if code == 0:
        return
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    raise KernelError(f"{nvrtc.nvrtcGetErrorString(code).decode()} {log.value.decode(errors='replace')}".strip())


def supported_architectures(nvrtc: ctypes.CDLL) -> list[int]:
    """Compute capabilities that NVRTC has machine code for, such as 80 for 8.0."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    architectures = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(architectures)
    return sorted(architectures)


def compile_with(nvrtc: ctypes.CDLL, capability: tuple[int, int], source: str = SOURCE) -> bytes:
    """Compile to a CUBIN; for a GPU that this NVRTC does not know yet to PTX, which the driver finishes.

    PTX is the exception because a driver refuses it if it is older than NVRTC.
    """
    wanted = capability[0] * 10 + capability[1]
    known = [architecture for architecture in supported_architectures(nvrtc) if architecture <= wanted]
    if not known:
        raise KernelError(f"NVRTC does not know sm_{wanted} nor anything older.")
    kind, get = ("sm", "CUBIN") if known[-1] == wanted else ("compute", "PTX")
    options = [f"--gpu-architecture={kind}_{known[-1]}".encode(), b"--std=c++17"]
    program = ctypes.c_void_p()
    check_nvrtc(
        nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"visualglm.cu", 0, None, None), program
    )
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        check_nvrtc(nvrtc, code, program)
        size = ctypes.c_size_t()
        check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{get}Size")(program, ctypes.byref(size)), program)
        image = ctypes.create_string_buffer(size.value)
        check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{get}")(program, image), program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def compile_kernels(capability: tuple[int, int]) -> bytes:
    """Compile with the first NVRTC that can."""
    reasons = []
    for nvrtc in find_nvrtc():
        try:
            return compile_with(nvrtc, capability)
        except (KernelError, AttributeError) as error:  # an old NVRTC lacks functions
            reasons.append(str(error))
    raise KernelError("; ".join(reasons) or "NVRTC, which comes with torch for CUDA, was not found.")


# Launch


def load_driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


class Driver:
    """The functions of CUDA's driver that are needed here, with errors as exceptions."""

    def __init__(self):
        self.library = load_driver()
        self.launch_kernel = self.library.cuLaunchKernel  # with types, or each call works them out
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self.launch_kernel.argtypes = (pointer, *[number] * 7, pointer, pointer, pointer)

    def check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise KernelError(f"CUDA error {code}: {(text.value or b'unknown').decode()}")

    def current_context(self) -> ctypes.c_void_p:
        context = ctypes.c_void_p()
        self.check(self.library.cuCtxGetCurrent(ctypes.byref(context)))
        return context

    def load_module(self, image: bytes) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        self.check(self.library.cuModuleLoadData(ctypes.byref(module), image))
        return module

    def get_function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self.check(self.library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        return function

    def launch(self, context: ctypes.c_void_p, *call) -> None:
        code = self.launch_kernel(*call)
        if code == INVALID_CONTEXT:  # a thread whose first work on the device this is
            self.check(self.library.cuCtxSetCurrent(context))
            code = self.launch_kernel(*call)
        self.check(code)


class Launch:
    """A kernel and all that stays the same from call to call: how often it runs, and its sizes.

    Args:
        function: of the driver.
        grid: blocks, in two dimensions.
        threads, memory: of a block; bytes of shared memory.
        tensors: how many pointers the kernel takes.
        sizes: what it takes after them, as 32-bit integers.
    """

    def __init__(
        self, function: ctypes.c_void_p, grid: tuple[int, int], threads: int, memory: int, tensors: int, sizes: tuple
    ):
        self.call = (function, *grid, 1, threads, 1, 1, memory)
        self.pointers = [ctypes.c_void_p() for _ in range(tensors)]
        self.sizes = [ctypes.c_int(size) for size in sizes]
        addresses = [ctypes.addressof(value) for value in (*self.pointers, *self.sizes)]
        self.arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self.lock = threading.Lock()  # several threads may generate; the driver reads the arguments before it returns

    def __call__(self, kernels: "DeviceKernels", *tensors: torch.Tensor) -> None:
        """Start it on torch's current stream."""
        with torch.cuda.device(kernels.device), self.lock:
            for pointer, tensor in zip(self.pointers, tensors, strict=True):
                pointer.value = tensor.data_ptr()
            stream = torch.cuda.current_stream(kernels.device).cuda_stream
            kernels.driver.launch(kernels.context, *self.call, stream, self.arguments, None)


class DeviceKernels:
    """The kernels in the memory of one device. Everything runs on torch's current stream and can be captured.

    Raises:
        KernelError, OSError, AttributeError: there is no way to compile or load them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.capability = torch.cuda.get_device_capability(device)
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.dtypes = [torch.float16, *([torch.bfloat16] if self.capability >= BFLOAT16_CAPABILITY else [])]
        self.driver = Driver()
        image = compile_kernels(self.capability)
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # makes the device's context this thread's
            self.context = self.driver.current_context()
            module = self.driver.load_module(image)
            self.functions = {
                name: self.driver.get_function(module, name)
                for dtype in self.dtypes
                for bits in (4, 8)
                for name in (function_name("multiply", bits, dtype), function_name("dequantize", bits, dtype))
            }
        # Found once for each size: at one row, working it out would take longer than the kernel.
        self.find_multiply = functools.lru_cache(maxsize=None)(self.plan_multiply)
        self.find_dequantize = functools.lru_cache(maxsize=None)(self.plan_dequantize)

    def plan_dequantize(self, dtype: torch.dtype, outputs: int, inputs: int, groups: int, bits: int) -> Launch | None:
        """How a matrix of this size is dequantized; None if lanes would load their 16 bytes from two rows or groups."""
        span = LANE_BITS // bits
        fits = dtype in self.dtypes and outputs > 0 and inputs > 0 and inputs % span == 0
        if not fits or (groups > 1 and inputs // groups % span != 0):
            return None
        threads = outputs * inputs // span
        grid = (-(-threads // DEQUANTIZE_THREADS), 1)
        sizes = (outputs, inputs, groups, inputs // groups)
        return Launch(self.functions[function_name("dequantize", bits, dtype)], grid, DEQUANTIZE_THREADS, 0, 3, sizes)

    def plan_multiply(
        self, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int
    ) -> Launch | None:
        """How the fused kernel multiplies so many rows; None if it cannot. It finds a column's group by shifting."""
        width = inputs // groups
        fits = (
            0 < rows <= FUSED_ROWS
            and outputs % BLOCK_OUTPUTS == 0
            and outputs // BLOCK_OUTPUTS <= MAX_BLOCKS
            and outputs * inputs <= MAX_ELEMENTS
            and (groups == 1 or width & (width - 1) == 0)
        )
        if not fits or self.find_dequantize(dtype, outputs, inputs, groups, bits) is None:
            return None
        shift = 31 if groups == 1 else width.bit_length() - 1
        chunk = 4 * LANE_BITS // bits  # columns that a warp takes at a time
        rows_per_block = 8 if groups == 1 else 8 * min(width, chunk) // chunk
        blocks = outputs // BLOCK_OUTPUTS
        # A device full of warps, which hide each other's waiting, even if there are few outputs.
        warps = max(MIN_WARPS, MAX_WARPS >> (-(-blocks // self.processors) - 1).bit_length())
        warps = min(warps, -(-inputs // chunk))
        grid = (-(-rows // rows_per_block), blocks)  # blocks that read the same codes are neighbours
        sizes = (rows, outputs, inputs, groups, shift)
        function = self.functions[function_name("multiply", bits, dtype)]
        return Launch(function, grid, 32 * warps, WARP_MEMORY * warps, 4, sizes)

    def can_dequantize(
        self, dtype: torch.dtype, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int
    ) -> bool:
        """Whether the kernel takes this matrix."""
        sizes = (weight.shape[0], in_features, count_groups(weight_scale), bits)
        return self.find_dequantize(dtype, *sizes) is not None and is_readable(weight, weight_scale)

    def can_multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int
    ) -> bool:
        """Whether the fused kernel takes these."""
        sizes = (x.shape[0], weight.shape[0], in_features, count_groups(weight_scale), bits)
        return (
            self.find_multiply(x.dtype, *sizes) is not None
            and x.data_ptr() % 16 == 0
            and is_readable(weight, weight_scale)
        )

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int
    ) -> torch.Tensor:
        """x [M, K], contiguous, times the matrix, [N, K] of codes: [M, N]. The matrix is read as it is stored."""
        rows, outputs = x.shape[0], weight.shape[0]
        out = x.new_empty(rows, outputs)
        launch = self.find_multiply(x.dtype, rows, outputs, in_features, count_groups(weight_scale), bits)
        launch(self, x, weight, weight_scale, out)
        return out

    def dequantize(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The matrix [N, K], equal to the reference's bit for bit."""
        outputs = weight.shape[0]
        out = weight.new_empty((outputs, in_features), dtype=dtype)
        launch = self.find_dequantize(dtype, outputs, in_features, count_groups(weight_scale), bits)
        launch(self, weight, weight_scale, out)
        return out


def function_name(kind: str, bits: int, dtype: torch.dtype) -> str:
    return f"{kind}_int{bits}_{str(dtype).removeprefix('torch.')}"


def is_readable(weight: torch.Tensor, weight_scale: torch.Tensor) -> bool:
    """Whether a matrix lies as the kernels read it, 16 bytes of codes at a time."""
    return (
        weight_scale.dtype == torch.float16
        and weight.is_contiguous()
        and weight_scale.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def count_groups(weight_scale: torch.Tensor) -> int:
    return 1 if weight_scale.dim() == 1 else weight_scale.shape[1]


# The operator


class CudaMultiply:
    """`multiply` of quantization_kernels.py for CUDA tensors.

    Args:
        by_rows: the torch way: same arguments, and optionally a function with the arguments of `dequantize`.
    """

    def __init__(self, by_rows: Callable[..., torch.Tensor]):
        self.by_rows = by_rows
        self.kernels: dict[torch.device, DeviceKernels | None] = {}  # None: not on this device
        self.lock = threading.Lock()
        self.has_warned = False

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        transposed: bool,
    ) -> torch.Tensor:
        kernels = self.kernels_of(x.device)
        if kernels is None:
            return self.by_rows(x, weight, weight_scale, bits, in_features, transposed)
        try:
            return self.multiply(kernels, x, weight, weight_scale, bits, in_features, transposed)
        except KernelError as error:
            self.give_up(x.device, error)
            return self.by_rows(x, weight, weight_scale, bits, in_features, transposed)

    def multiply(
        self,
        kernels: DeviceKernels,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        transposed: bool,
    ) -> torch.Tensor:
        """Fused for a few rows of x; otherwise the matrix is dequantized, for cuBLAS."""
        x = x.contiguous()
        if not transposed and kernels.can_multiply(x, weight, weight_scale, bits, in_features):
            return kernels.multiply(x, weight, weight_scale, bits, in_features)
        fits = kernels.can_dequantize(x.dtype, weight, weight_scale, bits, in_features)
        to_matrix = kernels.dequantize if fits else None
        return self.by_rows(x, weight, weight_scale, bits, in_features, transposed, to_matrix)

    def kernels_of(self, device: torch.device) -> DeviceKernels | None:
        """The kernels of a device, compiled and checked when it is first asked for, or None for the torch way."""
        if device in self.kernels:
            return self.kernels[device]
        choice = os.environ.get("VISUALGLM_KERNELS", "auto")
        if choice not in CHOICES:
            raise ValueError(f"VISUALGLM_KERNELS is {choice!r}; it can be {', '.join(CHOICES)}.")
        if torch.cuda.is_current_stream_capturing():  # no time to load a module; the next eager call will
            return None
        with self.lock:
            if device not in self.kernels:
                self.kernels[device] = None if choice == "torch" else self.prepare(device)
        return self.kernels[device]

    def prepare(self, device: torch.device) -> DeviceKernels | None:
        if torch.version.hip or torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
            return None
        try:
            kernels = DeviceKernels(device)
            self.self_check(kernels)
        except (OSError, AttributeError, RuntimeError) as error:
            self.give_up(device, error)
            return None
        return kernels

    def give_up(self, device: torch.device, error: Exception) -> None:
        """Use the torch operators on this device from now on, and say so once."""
        if os.environ.get("VISUALGLM_KERNELS") == "cuda":
            raise KernelError(f"The CUDA kernels do not work on {device}: {error}") from error
        self.kernels[device] = None
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"The CUDA kernels for low-bit weights do not work on {device}, torch's operators are used instead, "
                f"which are slower. Set VISUALGLM_KERNELS=torch to do without this message. Reason: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def self_check(self, kernels: DeviceKernels) -> None:
        """Compare all kernels with the torch way on a few small problems.

        Raises:
            KernelError: they disagree.
        """
        random = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
        for bits, groups in ((4, 8), (4, 1), (8, 1)):
            codes = torch.randint(-128, 128, (64, 512 * bits // 8), **random).to(torch.int8)
            scale = torch.rand((64, groups) if groups > 1 else (64,), **random).sub(0.5).half()
            for dtype in kernels.dtypes:
                x = torch.randn(3, 512, **random).to(dtype)
                expected = self.by_rows(x.float(), codes, scale, bits, 512, False)
                inputs = [tensor.to(kernels.device) for tensor in (x, codes, scale)]
                fused = kernels.multiply(*inputs, bits, 512)
                dequantized = self.by_rows(*inputs, bits, 512, False, kernels.dequantize)
                for name, out in (("multiply", fused), ("dequantize", dequantized)):
                    error = ((out.float().cpu() - expected).norm() / expected.norm()).item()
                    if not error < CHECK_TOLERANCE[dtype]:
                        raise KernelError(f"{function_name(name, bits, dtype)} is off by {error:.2g} of the result.")
