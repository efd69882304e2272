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
"""Products with low-bit and half-precision matrices on CPUs: LLVM code, its compilation, its launch.

Not here: the format's bytes and the torch operators (`quantization_kernels.py`), which are also what is used wherever
the kernels cannot be.

The code is compiled for the CPU that runs it, and for the sizes of a matrix when one of these sizes first comes, by
the LLVM inside the Python package llvmlite: `pip install llvmlite` is all there is to install. Without it, nothing
changes. The kernels have to agree with the torch operators on a few small problems before they are used; if they do
not, there is one warning, and the torch operators do the work.

The environment variable VISUALGLM_KERNELS says otherwise: "torch" never uses the kernels, "cpu" makes it an error if
they cannot be used; "auto" is the default.

How it is fast: a decoded token reads every matrix once, so memory is the limit, and the work per byte must hide behind
it. Matrices are read as they are stored, 64 bytes at a time and 8 KiB ahead. For integer codes the activations become
16-bit integers with a scale per 64 columns, which costs no measurable accuracy; sums are exact in 32 bits, and scaled
in float32. Threads take rows of the matrix, a few at a time, from a common supply, without Python.

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix.
"""

import ctypes
import os
import platform
import struct
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import torch


TILE_ROWS = 4  # rows of activations in registers
STEP_BYTES = 64  # of the matrix
AHEAD = 8192  # bytes that are asked for before they are needed
BLOCK = 64  # columns of activations with a common scale
LARGEST_INT16 = 32767
BYTES_PER_SHARE = 2**17  # of the matrix, taken by a thread at once
NEEDED_FEATURES = ("avx2", "f16c", "fma")  # of an x86 processor
X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")  # as platforms call them
CHECK_TOLERANCE = 1e-4  # relative error of the self-check: activations are rounded to 16 bits
CHOICES = ("auto", "cpu", "cuda", "torch")


def indices(count: int, step: int, repeat: int = 1, first: int = 0) -> str:
    """Write the elements that a `shufflevector` takes: every `step`th from `first`, each `repeat` times."""
    return ", ".join(f"i32 {first + index // repeat * step}" for index in range(count))


def llvm_float(value: float) -> str:
    """Write a float32 as LLVM wants it: the bits of the double."""
    return "0x" + struct.pack(">d", torch.tensor(value).item()).hex().upper()


# A kernel: what each thread runs until no rows are left. The fields are those of `Task`.
KERNEL = """
%task = type {{ ptr, ptr, ptr, ptr, i64, i64, i64 }}
declare i64 @llvm.umin.i64(i64, i64)

define void @{name}(ptr %task) {{
start:
  %at.scales = getelementptr %task, ptr %task, i64 0, i32 1
  %at.x = getelementptr %task, ptr %task, i64 0, i32 2
  %at.out = getelementptr %task, ptr %task, i64 0, i32 3
  %at.outputs = getelementptr %task, ptr %task, i64 0, i32 4
  %at.share = getelementptr %task, ptr %task, i64 0, i32 5
  %supply = getelementptr %task, ptr %task, i64 0, i32 6
  %matrix = load ptr, ptr %task
  %scales = load ptr, ptr %at.scales
  %x = load ptr, ptr %at.x
  %out = load ptr, ptr %at.out
  %outputs = load i64, ptr %at.outputs
  %share = load i64, ptr %at.share
  br label %take

take:
  %first = atomicrmw add ptr %supply, i64 %share monotonic
  %is.left = icmp ult i64 %first, %outputs
  br i1 %is.left, label %work, label %end

work:
  %until = add i64 %first, %share
  %last = call i64 @llvm.umin.i64(i64 %until, i64 %outputs)
  call void @multiply(ptr %matrix, ptr %scales, ptr %x, ptr %out, i64 %first, i64 %last, i64 %outputs)
  br label %take

end:
  ret void
}}
"""
# The product of some rows of a matrix with {tile} rows of activations: this loop, and one of the steps below.
LOOP = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)

define internal void @multiply(ptr noalias %matrix, ptr noalias %scales, ptr noalias %x, ptr noalias %out,
                               i64 %first, i64 %last, i64 %outputs) alwaysinline {{
start:
  br label %row

row:
  %r = phi i64 [ %first, %start ], [ %r.next, %store ]
  %row.offset = mul i64 %r, {row_bytes}
  %row.codes = getelementptr i8, ptr %matrix, i64 %row.offset
  %scale.offset = mul i64 %r, {groups}
  %row.scales = getelementptr half, ptr %scales, i64 %scale.offset
  br label %step

step:
  %i = phi i64 [ 0, %row ], [ %i.next, %step ]
{sums}
  %offset = mul i64 %i, {step_bytes}
  %codes = getelementptr i8, ptr %row.codes, i64 %offset
  %ahead = getelementptr i8, ptr %codes, i64 {ahead}
  call void @llvm.prefetch.p0(ptr %ahead, i32 0, i32 2, i32 1)
  %scale = call <16 x float> @scale(ptr %row.scales, i64 %i)
{products}
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, {steps}
  br i1 %more, label %step, label %store

store:
{results}
  %r.next = add i64 %r, 1
  %unfinished = icmp ult i64 %r.next, %last
  br i1 %unfinished, label %row, label %end

end:
  ret void
}}
"""
# The parts of the loop that are there once for each row of activations, #.
SUM = "  %sum.# = phi <16 x float> [ zeroinitializer, %row ], [ %sum.#.next, %step ]"
PRODUCT = """
  %index.# = add i64 %i, {first_step}
  %x.offset.# = mul i64 %index.#, {record_bytes}
  %x.# = getelementptr i8, ptr %x, i64 %x.offset.#
  %sum.#.next = call <16 x float> @step(ptr %codes, ptr %x.#, <16 x float> %scale, <16 x float> %sum.#)"""
RESULT = """
  %total.# = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %sum.#.next)
  %out.row.# = mul i64 %outputs, #
  %out.index.# = add i64 %out.row.#, %r
  %out.# = getelementptr float, ptr %out, i64 %out.index.#
  store float %total.#, ptr %out.#"""

# 32 products of 16-bit integers, summed in pairs: one instruction where there is one (vpmaddwd, vpdpwssd).
DOT = f"""
define internal <16 x i32> @dot(<32 x i16> %a, <32 x i16> %b) alwaysinline {{
  %wide.a = sext <32 x i16> %a to <32 x i32>
  %wide.b = sext <32 x i16> %b to <32 x i32>
  %products = mul nsw <32 x i32> %wide.a, %wide.b
  %even = shufflevector <32 x i32> %products, <32 x i32> poison, <16 x i32> <{indices(16, 2)}>
  %odd = shufflevector <32 x i32> %products, <32 x i32> poison, <16 x i32> <{indices(16, 2, first=1)}>
  %sum = add nsw <16 x i32> %even, %odd
  ret <16 x i32> %sum
}}

define internal <16 x float> @add_scaled(
    <16 x float> %sum, <16 x i32> %dot, <16 x float> %a, <16 x float> %b) alwaysinline {{
  %value = sitofp <16 x i32> %dot to <16 x float>
  %scale = fmul <16 x float> %a, %b
  %product = fmul contract <16 x float> %value, %scale
  %next = fadd contract <16 x float> %sum, %product
  ret <16 x float> %next
}}
"""

# 4 bits: 128 columns. A 16-bit word holds the columns 1, 0, 3, 2 of four, from its low bits up. Codes are made
# unsigned, code + 8, by flipping their highest bit, which takes fewer instructions than keeping the sign; %correction,
# minus 8 times the sum of the activations, is what that adds.
STEP_INT4 = (
    DOT
    + """
define internal <32 x i16> @unsigned(<32 x i16> %words) alwaysinline {
  %code = and <32 x i16> %words, splat (i16 15)
  %flipped = xor <32 x i16> %code, splat (i16 8)
  ret <32 x i16> %flipped
}

define internal <16 x float> @step(ptr %codes, ptr %x, <16 x float> %scale, <16 x float> %sum) alwaysinline {
  %word.0 = load <32 x i16>, ptr %codes, align 1
  %word.1 = lshr <32 x i16> %word.0, splat (i16 4)
  %word.2 = lshr <32 x i16> %word.0, splat (i16 8)
  %word.3 = lshr <32 x i16> %word.0, splat (i16 12)
  %code.0 = call <32 x i16> @unsigned(<32 x i16> %word.0)
  %code.1 = call <32 x i16> @unsigned(<32 x i16> %word.1)
  %code.2 = call <32 x i16> @unsigned(<32 x i16> %word.2)
  %code.3 = call <32 x i16> @unsigned(<32 x i16> %word.3)
  %at.1 = getelementptr i8, ptr %x, i64 64
  %at.2 = getelementptr i8, ptr %x, i64 128
  %at.3 = getelementptr i8, ptr %x, i64 192
  %at.correction = getelementptr i8, ptr %x, i64 256
  %at.scale = getelementptr i8, ptr %x, i64 320
  %x.0 = load <32 x i16>, ptr %at.1, align 4
  %x.1 = load <32 x i16>, ptr %x, align 4
  %x.2 = load <32 x i16>, ptr %at.3, align 4
  %x.3 = load <32 x i16>, ptr %at.2, align 4
  %correction = load <16 x i32>, ptr %at.correction, align 4
  %x.scale = load <16 x float>, ptr %at.scale, align 4
  %dot.0 = call <16 x i32> @dot(<32 x i16> %code.0, <32 x i16> %x.0)
  %dot.1 = call <16 x i32> @dot(<32 x i16> %code.1, <32 x i16> %x.1)
  %dot.2 = call <16 x i32> @dot(<32 x i16> %code.2, <32 x i16> %x.2)
  %dot.3 = call <16 x i32> @dot(<32 x i16> %code.3, <32 x i16> %x.3)
  %total.0 = add <16 x i32> %correction, %dot.0
  %total.1 = add <16 x i32> %total.0, %dot.1
  %total.2 = add <16 x i32> %total.1, %dot.2
  %total.3 = add <16 x i32> %total.2, %dot.3
  %next = call <16 x float> @add_scaled(
      <16 x float> %sum, <16 x i32> %total.3, <16 x float> %scale, <16 x float> %x.scale)
  ret <16 x float> %next
}
"""
)

# 8 bits: 64 columns.
STEP_INT8 = (
    DOT
    + """
define internal <16 x float> @step(ptr %codes, ptr %x, <16 x float> %scale, <16 x float> %sum) alwaysinline {
  %at.codes = getelementptr i8, ptr %codes, i64 32
  %at.x = getelementptr i8, ptr %x, i64 64
  %at.scale = getelementptr i8, ptr %x, i64 128
  %byte.0 = load <32 x i8>, ptr %codes, align 1
  %byte.1 = load <32 x i8>, ptr %at.codes, align 1
  %code.0 = sext <32 x i8> %byte.0 to <32 x i16>
  %code.1 = sext <32 x i8> %byte.1 to <32 x i16>
  %x.0 = load <32 x i16>, ptr %x, align 4
  %x.1 = load <32 x i16>, ptr %at.x, align 4
  %x.scale = load <16 x float>, ptr %at.scale, align 4
  %dot.0 = call <16 x i32> @dot(<32 x i16> %code.0, <32 x i16> %x.0)
  %dot.1 = call <16 x i32> @dot(<32 x i16> %code.1, <32 x i16> %x.1)
  %total = add <16 x i32> %dot.0, %dot.1
  %next = call <16 x float> @add_scaled(
      <16 x float> %sum, <16 x i32> %total, <16 x float> %scale, <16 x float> %x.scale)
  ret <16 x float> %next
}
"""
)

# Half precision: 32 columns of floats, which @widen makes float32.
STEP_HALF = """
define internal <16 x float> @step(ptr %codes, ptr %x, <16 x float> %scale, <16 x float> %sum) alwaysinline {
  %at.codes = getelementptr i8, ptr %codes, i64 32
  %at.x = getelementptr i8, ptr %x, i64 64
  %half.0 = load <16 x i16>, ptr %codes, align 2
  %half.1 = load <16 x i16>, ptr %at.codes, align 2
  %value.0 = call <16 x float> @widen(<16 x i16> %half.0)
  %value.1 = call <16 x float> @widen(<16 x i16> %half.1)
  %x.0 = load <16 x float>, ptr %x, align 4
  %x.1 = load <16 x float>, ptr %at.x, align 4
  %product.0 = fmul contract <16 x float> %value.0, %x.0
  %product.1 = fmul contract <16 x float> %value.1, %x.1
  %both = fadd contract <16 x float> %product.0, %product.1
  %next = fadd <16 x float> %sum, %both
  ret <16 x float> %next
}
"""
WIDEN = {
    torch.float16: """
define internal <16 x float> @widen(<16 x i16> %bits) alwaysinline {
  %half = bitcast <16 x i16> %bits to <16 x half>
  %value = fpext <16 x half> %half to <16 x float>
  ret <16 x float> %value
}
""",
    torch.bfloat16: """
define internal <16 x float> @widen(<16 x i16> %bits) alwaysinline {
  %wide = zext <16 x i16> %bits to <16 x i32>
  %high = shl <16 x i32> %wide, splat (i32 16)
  %value = bitcast <16 x i32> %high to <16 x float>
  ret <16 x float> %value
}
""",
}

# The scales of the matrix in one step: {count} of them, in the 16 lanes of a sum.
SCALE = """
define internal <16 x float> @scale(ptr %scales, i64 %i) alwaysinline {{
  %first = mul i64 %i, {count}
  %index = udiv i64 %first, {steps_per_scale}
  %at = getelementptr half, ptr %scales, i64 %index
  %half = load <{count} x half>, ptr %at, align 2
  %value = fpext <{count} x half> %half to <{count} x float>
  %lanes = shufflevector <{count} x float> %value, <{count} x float> poison, <16 x i32> <{lanes}>
  ret <16 x float> %lanes
}}
"""
NO_SCALE = """
define internal <16 x float> @scale(ptr %scales, i64 %i) alwaysinline {
  ret <16 x float> zeroinitializer
}
"""


# Activations as the steps read them: one record for each step. This loop, and one of the functions @record below.
RECORDS = """
define void @{name}(ptr noalias %x, ptr noalias %records, i64 %count) {{
start:
  br label %record

record:
  %i = phi i64 [ 0, %start ], [ %i.next, %record ]
  %x.offset = mul i64 %i, {x_bytes}
  %record.offset = mul i64 %i, {record_bytes}
  %at.x = getelementptr i8, ptr %x, i64 %x.offset
  %at.record = getelementptr i8, ptr %records, i64 %record.offset
  call void @record(ptr %at.x, ptr %at.record)
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %count
  br i1 %more, label %record, label %end

end:
  ret void
}}
"""
# 64 columns become 16-bit integers and their scale, the largest / 32767. A block of zeros is divided by something;
# infinity and NaN are kept, in the scale.
SPLIT = f"""
declare <64 x float> @llvm.fabs.v64f32(<64 x float>)
declare float @llvm.vector.reduce.fmaximum.v64f32(<64 x float>)
declare float @llvm.maxnum.f32(float, float)
declare <64 x float> @llvm.rint.v64f32(<64 x float>)
declare <64 x i32> @llvm.fptosi.sat.v64i32.v64f32(<64 x float>)

define internal {{ <64 x i16>, float }} @split(ptr %x) alwaysinline {{
  %values = load <64 x float>, ptr %x, align 4
  %sizes = call <64 x float> @llvm.fabs.v64f32(<64 x float> %values)
  %largest = call float @llvm.vector.reduce.fmaximum.v64f32(<64 x float> %sizes)
  %scale = fmul float %largest, {llvm_float(1 / LARGEST_INT16)}
  %divisor = call float @llvm.maxnum.f32(float %scale, float {llvm_float(2.0**-126)})
  %factor = fdiv float 1.0, %divisor
  %first = insertelement <64 x float> poison, float %factor, i64 0
  %factors = shufflevector <64 x float> %first, <64 x float> poison, <64 x i32> zeroinitializer
  %scaled = fmul <64 x float> %values, %factors
  %rounded = call <64 x float> @llvm.rint.v64f32(<64 x float> %scaled)
  %integers = call <64 x i32> @llvm.fptosi.sat.v64i32.v64f32(<64 x float> %rounded)
  %codes = trunc <64 x i32> %integers to <64 x i16>
  %half = insertvalue {{ <64 x i16>, float }} poison, <64 x i16> %codes, 0
  %both = insertvalue {{ <64 x i16>, float }} %half, float %scale, 1
  ret {{ <64 x i16>, float }} %both
}}

define internal <16 x float> @repeat(float %a, float %b) alwaysinline {{
  %first = insertelement <2 x float> poison, float %a, i64 0
  %two = insertelement <2 x float> %first, float %b, i64 1
  %lanes = shufflevector <2 x float> %two, <2 x float> poison, <16 x i32> <{indices(16, 1, 8)}>
  ret <16 x float> %lanes
}}
"""
RECORD_INT4 = (
    SPLIT
    + """
define internal void @record(ptr %x, ptr %record) alwaysinline {{
  %x.b = getelementptr i8, ptr %x, i64 256
  %a = call {{ <64 x i16>, float }} @split(ptr %x)
  %b = call {{ <64 x i16>, float }} @split(ptr %x.b)
  %codes.a = extractvalue {{ <64 x i16>, float }} %a, 0
  %codes.b = extractvalue {{ <64 x i16>, float }} %b, 0
  %scale.a = extractvalue {{ <64 x i16>, float }} %a, 1
  %scale.b = extractvalue {{ <64 x i16>, float }} %b, 1
  %plane.0 = shufflevector <64 x i16> %codes.a, <64 x i16> %codes.b, <32 x i32> <{plane_0}>
  %plane.1 = shufflevector <64 x i16> %codes.a, <64 x i16> %codes.b, <32 x i32> <{plane_1}>
  %plane.2 = shufflevector <64 x i16> %codes.a, <64 x i16> %codes.b, <32 x i32> <{plane_2}>
  %plane.3 = shufflevector <64 x i16> %codes.a, <64 x i16> %codes.b, <32 x i32> <{plane_3}>
  %ones = add <32 x i16> zeroinitializer, splat (i16 -8)
  %sum.0 = call <16 x i32> @dot(<32 x i16> %plane.0, <32 x i16> %ones)
  %sum.1 = call <16 x i32> @dot(<32 x i16> %plane.1, <32 x i16> %ones)
  %sum.2 = call <16 x i32> @dot(<32 x i16> %plane.2, <32 x i16> %ones)
  %sum.3 = call <16 x i32> @dot(<32 x i16> %plane.3, <32 x i16> %ones)
  %sum.01 = add <16 x i32> %sum.0, %sum.1
  %sum.23 = add <16 x i32> %sum.2, %sum.3
  %correction = add <16 x i32> %sum.01, %sum.23
  %scale = call <16 x float> @repeat(float %scale.a, float %scale.b)
  %at.1 = getelementptr i8, ptr %record, i64 64
  %at.2 = getelementptr i8, ptr %record, i64 128
  %at.3 = getelementptr i8, ptr %record, i64 192
  %at.correction = getelementptr i8, ptr %record, i64 256
  %at.scale = getelementptr i8, ptr %record, i64 320
  store <32 x i16> %plane.0, ptr %record, align 4
  store <32 x i16> %plane.1, ptr %at.1, align 4
  store <32 x i16> %plane.2, ptr %at.2, align 4
  store <32 x i16> %plane.3, ptr %at.3, align 4
  store <16 x i32> %correction, ptr %at.correction, align 4
  store <16 x float> %scale, ptr %at.scale, align 4
  ret void
}}
""".format(**{f"plane_{plane}": indices(32, 4, 1, plane) for plane in range(4)})
)
RECORD_INT8 = (
    SPLIT
    + """
define internal void @record(ptr %x, ptr %record) alwaysinline {
  %a = call { <64 x i16>, float } @split(ptr %x)
  %codes = extractvalue { <64 x i16>, float } %a, 0
  %one.scale = extractvalue { <64 x i16>, float } %a, 1
  %scale = call <16 x float> @repeat(float %one.scale, float %one.scale)
  %at.scale = getelementptr i8, ptr %record, i64 128
  store <64 x i16> %codes, ptr %record, align 4
  store <16 x float> %scale, ptr %at.scale, align 4
  ret void
}
"""
)


class KernelError(RuntimeError):
    """The kernels cannot be compiled, or compute something else."""


# Compilation


@dataclass(frozen=True)
class Kind:
    """One of the formats of a matrix.

    Args:
        name: of the kernels.
        step: the LLVM code of a step.
        columns: of the matrix in a step.
        record_bytes: of the activations in a step.
        record: the LLVM code of a record; None if that is simply the activations in float32.
        most_rows: M up to which the kernels are used; for more, torch has better ways.
    """

    name: str
    step: str
    columns: int
    record_bytes: int
    record: str | None
    most_rows: int


KINDS = {
    4: Kind("int4", STEP_INT4, 128, 384, DOT + RECORD_INT4, 16),
    8: Kind("int8", STEP_INT8, 64, 192, RECORD_INT8, 16),
    torch.float16: Kind("float16", STEP_HALF + WIDEN[torch.float16], 32, 128, None, TILE_ROWS),
    torch.bfloat16: Kind("bfloat16", STEP_HALF + WIDEN[torch.bfloat16], 32, 128, None, TILE_ROWS),
}


def write_kernel(name: str, kind: Kind, steps: int, groups: int, tile: int) -> str:
    """Write the LLVM code of a kernel.

    Args:
        name: of the function.
        kind: of the matrix.
        steps: in a row of the matrix.
        groups: scales in a row of the matrix; 0 for none.
        tile: rows of activations.
    """
    rows = range(tile)
    products = [PRODUCT.format(first_step=row * steps, record_bytes=kind.record_bytes) for row in rows]
    loop = LOOP.format(
        row_bytes=steps * STEP_BYTES,
        groups=groups,
        step_bytes=STEP_BYTES,
        ahead=AHEAD,
        steps=steps,
        sums="\n".join(SUM.replace("#", str(row)) for row in rows),
        products="".join(product.replace("#", str(row)) for row, product in enumerate(products)),
        results="".join(RESULT.replace("#", str(row)) for row in rows),
    )
    return kind.step + write_scale(steps, groups) + loop + KERNEL.format(name=name)


def write_records(name: str, kind: Kind) -> str:
    """Write the LLVM code that makes records of activations."""
    return kind.record + RECORDS.format(name=name, x_bytes=4 * kind.columns, record_bytes=kind.record_bytes)


def write_scale(steps: int, groups: int) -> str:
    if groups == 0:
        return NO_SCALE
    count = max(1, groups // steps)
    return SCALE.format(count=count, steps_per_scale=max(1, steps // groups), lanes=indices(16, 1, 16 // count))


def load_llvm():
    """Import LLVM, with what it needs to compile for this processor; None without llvmlite."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def check_processor(features: Mapping[str, bool]) -> None:
    """Raise a `KernelError` if LLVM would have to call functions of a C library for what this processor lacks."""
    machine = platform.machine().lower()
    if machine not in X86 + ARM:
        raise KernelError(f"There are no kernels for {machine} processors.")
    lacks = [name for name in NEEDED_FEATURES if not features.get(name)]
    if machine in X86 and lacks:
        raise KernelError(f"The processor lacks {', '.join(lacks)}.")


class Compiler:
    """LLVM for the processor of this machine. What it has compiled stays until the process ends."""

    def __init__(self, llvm):
        self.llvm = llvm
        check_processor(llvm.get_host_cpu_features())
        self.target = self.make_target()
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self.make_target())  # takes the target

    def make_target(self):
        cpu, features = self.llvm.get_host_cpu_name(), self.llvm.get_host_cpu_features().flatten()
        return self.llvm.Target.from_default_triple().create_target_machine(cpu, features, opt=3)

    def compile(self, name: str, source: str, *arguments: type) -> Callable[..., None]:
        """Compile the function `name` of these ctypes; while it runs, other threads of Python do too."""
        module = self.llvm.parse_assembly(source)
        module.verify()
        passes = self.llvm.create_pass_builder(self.target, self.llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(module, passes)
        self.engine.add_module(module)
        self.engine.finalize_object()
        return ctypes.CFUNCTYPE(None, *arguments)(self.engine.get_function_address(name))


# Launch


class Task(ctypes.Structure):
    """What the threads that compute one product have in common."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("share", ctypes.c_int64),  # rows that a thread takes at once
        ("supply", ctypes.c_int64),  # the first row that no thread has taken
    )


def find_openmp() -> Callable[..., None] | None:
    """Find the function with which torch's own threads, warm and waiting, run a piece of work; Linux has it."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not GNU's OpenMP; Windows does not open None
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


class Crew:
    """Runs a kernel in several threads: those of torch if they can be had, else some of its own."""

    def __init__(self):
        self.openmp = find_openmp()
        self.process = os.getpid()
        self.helpers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="visualglm")

    def run(self, kernel: Callable[..., None], task: Task, threads: int) -> None:
        if threads == 1:
            kernel(ctypes.byref(task))
        elif self.openmp is not None:
            self.openmp(ctypes.cast(kernel, ctypes.c_void_p), ctypes.byref(task), threads, 0)
        else:
            self.run_with_helpers(kernel, task, threads - 1)

    def run_with_helpers(self, kernel: Callable[..., None], task: Task, helpers: int) -> None:
        if self.process != os.getpid():  # a fork has no threads but one
            self.__init__()
        futures = [self.helpers.submit(kernel, ctypes.byref(task)) for _ in range(helpers)]
        kernel(ctypes.byref(task))
        for future in futures:
            if not future.cancel():  # one that has not begun has nothing left to take
                future.result()


class CpuKernels:
    """The kernels, compiled as they are needed.

    Raises:
        KernelError, RuntimeError, AttributeError: LLVM cannot make them, does not know this processor, or is too old.
    """

    def __init__(self, llvm):
        self.compiler = Compiler(llvm)
        self.crew = Crew()
        self.functions: dict[str, Callable[..., None]] = {}
        self.lock = threading.Lock()

    def compiled(self, name: str, write: Callable[..., str], *arguments: type) -> Callable[..., None]:
        """The function that `write` writes when it is told the name, compiled once."""
        if name not in self.functions:
            with self.lock:
                if name not in self.functions:
                    self.functions[name] = self.compiler.compile(name, write(name), *arguments)
        return self.functions[name]

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, kind: Kind):
        """Multiply activations [M, K] with the matrix of N rows: [M, N], of the dtype of `x`. See `fits`."""
        steps = x.shape[1] // kind.columns
        groups = 0 if weight_scale is None else weight_scale[0].numel()
        records = self.make_records(x.float().contiguous(), steps, kind)
        out = torch.empty(x.shape[0], weight.shape[0])
        for first in range(0, x.shape[0], TILE_ROWS):
            tile = records[first : first + TILE_ROWS]
            kernel = self.compiled(
                f"{kind.name}_{steps}_{groups}_{len(tile)}",
                partial(write_kernel, kind=kind, steps=steps, groups=groups, tile=len(tile)),
                ctypes.c_void_p,
            )
            self.launch(kernel, weight, weight_scale, tile, out[first : first + TILE_ROWS])
        return out.to(x.dtype)

    def make_records(self, x: torch.Tensor, steps: int, kind: Kind) -> torch.Tensor:
        """Write activations [M, K], float32, as the kernels read them: [M, steps, bytes of a record]."""
        if kind.record is None:
            return x.view(len(x), steps, -1)
        records = torch.empty(len(x), steps, kind.record_bytes, dtype=torch.uint8)
        write = partial(write_records, kind=kind)
        record = self.compiled(f"{kind.name}_records", write, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        record(x.data_ptr(), records.data_ptr(), len(x) * steps)
        return records

    def launch(
        self,
        kernel: Callable[..., None],
        weight: torch.Tensor,
        weight_scale: torch.Tensor | None,
        records: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        scales = None if weight_scale is None else weight_scale.data_ptr()
        share = max(1, BYTES_PER_SHARE * len(weight) // weight.nbytes)
        task = Task(weight.data_ptr(), scales, records.data_ptr(), out.data_ptr(), len(weight), share)
        self.crew.run(kernel, task, min(torch.get_num_threads(), -(-len(weight) // share)))


def fits(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, kind: Kind) -> bool:
    """Whether there is a kernel for the matrix [N, K], its scales [N] or [N, n], and activations [M, K]."""
    rows, columns = x.shape
    if x.dtype not in (torch.float32, *WIDEN):  # float64 asks for more
        return False
    if not 0 < rows <= kind.most_rows or columns == 0 or columns % kind.columns or weight.shape[0] == 0:
        return False
    if not weight.is_contiguous() or weight_scale is not None and not weight_scale.is_contiguous():
        return False
    if weight_scale is None:
        return True
    steps, groups = columns // kind.columns, weight_scale[0].numel()
    return weight_scale.dtype == torch.float16 and (
        steps % groups == 0 or groups % steps == 0 and 16 % (groups // steps) == 0
    )


class CpuProducts:
    """The operators of quantization_kernels.py for CPU tensors.

    Args:
        multiply: the torch way to do what the method of this name does.
        multiply_half: likewise.
    """

    def __init__(self, multiply: Callable[..., torch.Tensor], multiply_half: Callable[..., torch.Tensor]):
        self.torch_multiply, self.torch_multiply_half = multiply, multiply_half
        self.lock = threading.Lock()

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        transposed: bool,
    ) -> torch.Tensor:
        """See `multiply` in quantization_kernels.py."""
        kernels = None if transposed or not fits(x, weight, weight_scale, KINDS[bits]) else self.kernels
        if kernels is None:
            return self.torch_multiply(x, weight, weight_scale, bits, in_features, transposed)
        return kernels.multiply(x, weight, weight_scale, KINDS[bits])

    def multiply_half(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute x @ weight.T for [M, K] and a matrix [N, K] of half precision."""
        kind = KINDS.get(weight.dtype)
        kernels = None if kind is None or not fits(x, weight, None, kind) else self.kernels
        return self.torch_multiply_half(x, weight) if kernels is None else kernels.multiply(x, weight, None, kind)

    @property
    def kernels(self) -> CpuKernels | None:
        """The kernels, checked when they are first asked for, or None for the torch way."""
        with self.lock:
            return self.checked_kernels

    @cached_property
    def checked_kernels(self) -> CpuKernels | None:
        choice = os.environ.get("VISUALGLM_KERNELS", "auto")
        if choice not in CHOICES:
            raise ValueError(f"VISUALGLM_KERNELS is {choice!r}; it can be {', '.join(CHOICES)}.")
        llvm = None if choice == "torch" else load_llvm()
        if llvm is None and choice == "cpu":
            raise KernelError("The CPU kernels need the package llvmlite. Get it with: pip install llvmlite")
        if llvm is None:
            return None
        try:
            kernels = CpuKernels(llvm)
            self.check(kernels)
        except (OSError, RuntimeError, AttributeError) as error:
            if choice == "cpu":
                raise KernelError(f"The CPU kernels do not work: {error}") from error
            warnings.warn(
                "The CPU kernels for low-bit weights do not work, torch's operators are used instead, which are "
                f"slower. Set VISUALGLM_KERNELS=torch to do without this message. Reason: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return kernels

    def check(self, kernels: CpuKernels) -> None:
        """Compare the kernels with the torch way on a few small problems.

        Raises:
            KernelError: they disagree.
        """
        random = torch.Generator().manual_seed(0)
        x = torch.randn(TILE_ROWS + 1, 512, generator=random)
        expected = {}
        for bits, groups in ((4, 8), (4, 1), (8, 1)):
            codes = torch.randint(-128, 128, (33, 512 * bits // 8), generator=random).to(torch.int8)
            scale = torch.rand((33, groups) if groups > 1 else (33,), generator=random).sub(0.5).half()
            expected[KINDS[bits], groups] = codes, scale, self.torch_multiply(x, codes, scale, bits, 512, False)
        for dtype in WIDEN:
            matrix = torch.randn(33, 512, generator=random).to(dtype)
            expected[KINDS[dtype], 0] = matrix, None, self.torch_multiply_half(x, matrix.float())
        for (kind, groups), (matrix, scale, product) in expected.items():
            error = ((kernels.multiply(x, matrix, scale, kind) - product).norm() / product.norm()).item()
            if not error < CHECK_TOLERANCE:
                raise KernelError(f"{kind.name} with {groups} scales is off by {error:.2g} of the result.")
