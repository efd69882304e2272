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
the kernels cannot be; and the kernels of `cpu_attention.py` and `cpu_decoder.py`, which are compiled and launched here.

The code is compiled for the CPU that runs it, and for the sizes of a matrix when one of these sizes first comes, by
the LLVM inside the Python package llvmlite: `pip install llvmlite` is all there is to install. Without it, nothing
changes. The kernels have to agree with the torch operators on a few small problems before they are used; if they do
not, there is one warning, and the torch operators do the work.

The environment variable VISUALGLM_KERNELS says otherwise: "torch" never uses the kernels, "cpu" makes it an error if
they cannot be used; "auto" is the default.

How it is fast: a decoded token reads every matrix once, so memory is the limit, and the work per byte must hide behind
it. Matrices are read as they are stored, from the first byte to the last: processors fetch ahead of a thread that reads
one row after the other, and not of one that reads several at a time, which halves the speed on some. For integer codes
the activations become 16-bit integers with a scale per 64 columns, which costs no measurable accuracy; sums are exact
in 32 bits, and scaled in float32. Threads take rows of the matrix, a few at a time, from a common supply, without
Python. For more activations than that pays for, the matrix is written out in float32, for torch to multiply.

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix. A step is 64
bytes of a row; a cell is what has a scale of the matrix and one of the activations in common, some columns of a step.
"""

import ctypes
import math
import os
import platform
import struct
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch


TILE_ROWS = 4  # rows of activations in registers
MOST_STEPS = 4  # at a time; 1, 2, 4 or 8
STEP_BYTES = 64  # of the matrix
AHEAD = 3072  # bytes that are asked for before they are needed
LANES = 16  # of a sum: a step adds to each of them
BLOCK = 64  # columns of activations with a common scale
LARGEST_CODE = 127 * 256 + 127  # of an activation
ROUND = 1.5 * 2**23  # of float32, whose neighbours are integers
LOG2_E = math.log2(math.e)
LN_2 = (0.693359375, -2.12194440e-4)  # in two parts, of which the first times any exponent is exact
LEAST = -87.0  # e to the power of less is no normal float32
FACTORS = tuple(1 / math.factorial(power) for power in range(7))  # of the powers of x in e^x, for |x| < 0.35
BYTES_PER_THREAD = 2**17  # of the matrix at least: less is not worth another thread
MOST_BYTES_PER_SHARE = 2**20  # taken by a thread at once; the longer it reads on, the better processors fetch ahead
SHARES_PER_THREAD = 4  # at least, so that none waits long for the last one
NEEDED_FEATURES = ("avx2", "f16c", "fma")  # of an x86 processor
X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")  # as platforms call them
CHECK_TOLERANCE = 1e-4  # relative error of the self-check: activations are rounded to 16 bits
CHOICES = ("auto", "cpu", "cuda", "torch")
FLOATS = {"dtype": torch.float32, "device": "cpu"}  # what kernels work with, whatever torch's defaults are


def indices(count: int, step: int, repeat: int = 1, first: int = 0) -> str:
    """Write the elements that a `shufflevector` takes: every `step`th from `first`, each `repeat` times."""
    return ", ".join(f"i32 {first + index // repeat * step}" for index in range(count))


def interleaved(count: int) -> str:
    """Write the elements that a `shufflevector` takes: those of two vectors in turns."""
    return ", ".join(f"i32 {index}, i32 {index + count}" for index in range(count))


def llvm_float(value: float) -> str:
    """Write a float32 as LLVM wants it: the bits of the double."""
    return "0x" + struct.pack(">d", torch.tensor(value, **FLOATS).item()).hex().upper()


# A kernel: what each thread runs until no shares are left. The fields are those of a `Task`; the function @work gets
# those that the kind of task has besides, and the number of a share.
KERNEL = """
%task = type {{ i64, i64, {types} }}

define void @{name}(ptr %task) {{
start:
  %supply = getelementptr %task, ptr %task, i64 0, i32 1
  %shares = load i64, ptr %task
{fields}
  br label %take

take:
  %share = atomicrmw add ptr %supply, i64 1 monotonic
  %is.left = icmp ult i64 %share, %shares
  br i1 %is.left, label %work, label %end

work:
  call void @work({arguments}, i64 %share)
  br label %take

end:
  ret void
}}
"""
FIELD = """
  %at.{index} = getelementptr %task, ptr %task, i64 0, i32 {index}
  %field.{index} = load {type}, ptr %at.{index}"""
FIELD_TYPES = {ctypes.c_void_p: "ptr", ctypes.c_int64: "i64", ctypes.c_float: "float"}

# A product: a share is some rows of the matrix.
MULTIPLY_SHARE = """
declare i64 @llvm.umin.i64(i64, i64)

define internal void @work(ptr %matrix, ptr %scales, ptr %x, ptr %x.scales, ptr %x.corrections, ptr %out, i64 %outputs,
                           i64 %rows, i64 %share) alwaysinline {
  %first = mul i64 %share, %rows
  %until = add i64 %first, %rows
  %last = call i64 @llvm.umin.i64(i64 %until, i64 %outputs)
  call void @multiply(ptr %matrix, ptr %scales, ptr %x, ptr %x.scales, ptr %x.corrections, ptr %out,
                      i64 %first, i64 %last, i64 %outputs)
  ret void
}
"""
# The product of some rows of a matrix with some rows of activations: this loop, and one of the steps below, {unroll} at
# a time.
LOOP = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
{reductions}

define internal void @multiply(ptr noalias %matrix, ptr noalias %scales, ptr noalias %x, ptr noalias %x.scales,
                               ptr noalias %x.corrections, ptr noalias %out, i64 %first, i64 %last, i64 %outputs)
    alwaysinline {{
start:
  %cells = alloca [{tile} x [{cells} x float]], align 64
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
{products}
  %i.next = add i64 %i, {unroll}
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
REDUCTION = "declare float @llvm.vector.reduce.fadd.v{width}f32(float, <{width} x float>)"
# The parts of the loop that are there for each row of activations, {t}, and for each step, {u}.
SUM = "  %sum.{t}.0 = phi <16 x float> [ zeroinitializer, %row ], [ %sum.{t}.{unroll}, %step ]"
STEP = """
  %index.{u} = add i64 %i, {u}
  %offset.{u} = mul i64 %index.{u}, {step_bytes}
  %codes.{u} = getelementptr i8, ptr %row.codes, i64 %offset.{u}
  %ahead.{u} = getelementptr i8, ptr %codes.{u}, i64 {ahead}
  call void @llvm.prefetch.p0(ptr %ahead.{u}, i32 0, i32 3, i32 1)"""
PRODUCT = """
  %x.index.{u}.{t} = add i64 %index.{u}, {first_step}
  %x.offset.{u}.{t} = mul i64 %x.index.{u}.{t}, {x_bytes}
  %x.{u}.{t} = getelementptr i8, ptr %x, i64 %x.offset.{u}.{t}
  %at.scale.{u}.{t} = getelementptr float, ptr %cells, i64 {cell}
  %scale.{u}.{t} = call <16 x float> @lanes(ptr %at.scale.{u}.{t})
  %sum.{t}.{next} = call <16 x float> @step(
      ptr %codes.{u}, ptr %x.{u}.{t}, <16 x float> %scale.{u}.{t}, <16 x float> %sum.{t}.{u})"""
RESULT = """
  %total.{t} = call reassoc float @llvm.vector.reduce.fadd.v16f32(float {start}, <16 x float> %sum.{t}.{unroll})
  %out.row.{t} = mul i64 %outputs, {t}
  %out.index.{t} = add i64 %out.row.{t}, %r
  %out.{t} = getelementptr float, ptr %out, i64 %out.index.{t}
  store float %total.{t}, ptr %out.{t}"""
# The scales of all cells in the steps that are done at a time, of the matrix times of the activations. They go through
# memory, which the assembly of no instructions makes sure of: a number is loaded into all lanes for nothing, but moving
# it there from another lane takes an instruction.
CELLS_OF_MATRIX = """
  %some.scales = call <{count} x float> @scales(ptr %row.scales, i64 %i)
  %matrix.scales = shufflevector <{count} x float> %some.scales, <{count} x float> poison, <{cells} x i32> <{repeated}>
  %cell = mul i64 %i, {cells_per_step}"""
CELLS = """
  %cell.{t} = add i64 %cell, {first_cell}
  %at.x.scales.{t} = getelementptr float, ptr %x.scales, i64 %cell.{t}
  %x.scales.{t} = load <{cells} x float>, ptr %at.x.scales.{t}, align 4
  %scales.{t} = fmul <{cells} x float> %matrix.scales, %x.scales.{t}
  %at.cells.{t} = getelementptr float, ptr %cells, i64 {first}
  store <{cells} x float> %scales.{t}, ptr %at.cells.{t}, align 4"""
CELLS_IN_MEMORY = """
  call void asm sideeffect "", "r,~{{memory}}"(ptr %cells)"""
# Codes that were made unsigned, code + 8, add 8 times the activations, which is taken off for each cell as a whole.
CORRECTION_SUM = "  %correction.{t} = phi <{cells} x float> [ zeroinitializer, %row ], [ %correction.{t}.next, %step ]"
CORRECTION = """
  %at.x.corrections.{t} = getelementptr float, ptr %x.corrections, i64 %cell.{t}
  %x.corrections.{t} = load <{cells} x float>, ptr %at.x.corrections.{t}, align 4
  %corrections.{t} = fmul contract <{cells} x float> %matrix.scales, %x.corrections.{t}
  %correction.{t}.next = fadd contract <{cells} x float> %correction.{t}, %corrections.{t}"""
CORRECTION_RESULT = """
  %correction.total.{t} = call reassoc float @llvm.vector.reduce.fadd.v{cells}f32(
      float 0.0, <{cells} x float> %correction.{t}.next)"""

# The matrix itself, in float32, for as many activations that multiplying costs more than writing it out: this loop
# takes the place of the other one, and one of the functions @values below that of a step.
MATRIX_LOOP = """
define internal void @multiply(ptr noalias %matrix, ptr noalias %scales, ptr %x, ptr %x.scales, ptr %x.corrections,
                               ptr noalias %out, i64 %first, i64 %last, i64 %outputs) alwaysinline {{
start:
  br label %row

row:
  %r = phi i64 [ %first, %start ], [ %r.next, %row.end ]
  %scale.offset = mul i64 %r, {groups}
  %row.scales = getelementptr half, ptr %scales, i64 %scale.offset
  %row.first = mul i64 %r, {steps}
  br label %step

step:
  %i = phi i64 [ 0, %row ], [ %i.next, %step ]
  %index = add i64 %row.first, %i
  %offset = mul i64 %index, {step_bytes}
  %codes = getelementptr i8, ptr %matrix, i64 %offset
  %some.scales = call <{count} x float> @scales(ptr %row.scales, i64 %i)
  %scale = shufflevector <{count} x float> %some.scales, <{count} x float> poison, <{columns} x i32> <{lanes}>
  %values = call <{columns} x float> @values(ptr %codes)
  %scaled = fmul <{columns} x float> %values, %scale
  %out.index = mul i64 %index, {columns}
  %at.out = getelementptr float, ptr %out, i64 %out.index
  store <{columns} x float> %scaled, ptr %at.out, align 4
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, {steps}
  br i1 %more, label %step, label %row.end

row.end:
  %r.next = add i64 %r, 1
  %unfinished = icmp ult i64 %r.next, %last
  br i1 %unfinished, label %row, label %end

end:
  ret void
}}
"""
VALUES_INT4 = f"""
define internal <128 x float> @values(ptr %codes) alwaysinline {{
  %bytes = load <64 x i8>, ptr %codes, align 1
  %even = ashr <64 x i8> %bytes, splat (i8 4)
  %shifted = shl <64 x i8> %bytes, splat (i8 4)
  %odd = ashr <64 x i8> %shifted, splat (i8 4)
  %both = shufflevector <64 x i8> %even, <64 x i8> %odd, <128 x i32> <{interleaved(64)}>
  %values = sitofp <128 x i8> %both to <128 x float>
  ret <128 x float> %values
}}
"""
VALUES_INT8 = """
define internal <64 x float> @values(ptr %codes) alwaysinline {
  %bytes = load <64 x i8>, ptr %codes, align 1
  %values = sitofp <64 x i8> %bytes to <64 x float>
  ret <64 x float> %values
}
"""

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
"""
ADD_SCALED = """
define internal <16 x float> @add_scaled(<16 x float> %sum, <16 x i32> %dot, <16 x float> %scale) alwaysinline {
  %value = sitofp <16 x i32> %dot to <16 x float>
  %product = fmul contract <16 x float> %value, %scale
  %next = fadd contract <16 x float> %sum, %product
  ret <16 x float> %next
}
"""

# 4 bits: 128 columns. A 16-bit word holds the columns 1, 0, 3, 2 of four, from its low bits up. Codes are made
# unsigned, code + 8, by flipping their highest bit, which takes fewer instructions than keeping the sign.
STEP_INT4 = (
    DOT
    + ADD_SCALED
    + """
define internal <16 x float> @step(ptr %codes, ptr %x, <16 x float> %scale, <16 x float> %sum) alwaysinline {
  %words = load <32 x i16>, ptr %codes, align 1
  %word.0 = xor <32 x i16> %words, splat (i16 34952)
  %word.1 = lshr <32 x i16> %word.0, splat (i16 4)
  %word.2 = lshr <32 x i16> %word.0, splat (i16 8)
  %code.0 = and <32 x i16> %word.0, splat (i16 15)
  %code.1 = and <32 x i16> %word.1, splat (i16 15)
  %code.2 = and <32 x i16> %word.2, splat (i16 15)
  %code.3 = lshr <32 x i16> %word.0, splat (i16 12)
  %at.1 = getelementptr i8, ptr %x, i64 64
  %at.2 = getelementptr i8, ptr %x, i64 128
  %at.3 = getelementptr i8, ptr %x, i64 192
  %x.0 = load <32 x i16>, ptr %at.1, align 4
  %x.1 = load <32 x i16>, ptr %x, align 4
  %x.2 = load <32 x i16>, ptr %at.3, align 4
  %x.3 = load <32 x i16>, ptr %at.2, align 4
  %dot.0 = call <16 x i32> @dot(<32 x i16> %code.0, <32 x i16> %x.0)
  %dot.1 = call <16 x i32> @dot(<32 x i16> %code.1, <32 x i16> %x.1)
  %dot.2 = call <16 x i32> @dot(<32 x i16> %code.2, <32 x i16> %x.2)
  %dot.3 = call <16 x i32> @dot(<32 x i16> %code.3, <32 x i16> %x.3)
  %total.1 = add <16 x i32> %dot.0, %dot.1
  %total.2 = add <16 x i32> %dot.2, %dot.3
  %total = add <16 x i32> %total.1, %total.2
  %next = call <16 x float> @add_scaled(<16 x float> %sum, <16 x i32> %total, <16 x float> %scale)
  ret <16 x float> %next
}
"""
)

# The same sums in fewer instructions, where a processor adds up products of unsigned and signed bytes: activations are
# split into their high and their low byte. A byte of codes holds a column in its low bits, and the one before it above.
STEP_INT4_BYTES = (
    ADD_SCALED
    + """
define internal <16 x float> @step(ptr %codes, ptr %x, <16 x float> %scale, <16 x float> %sum) alwaysinline {
  %bytes = load <64 x i8>, ptr %codes, align 1
  %odd.code = and <64 x i8> %bytes, splat (i8 15)
  %even.code = lshr <64 x i8> %bytes, splat (i8 4)
  %odd = xor <64 x i8> %odd.code, splat (i8 8)
  %even = xor <64 x i8> %even.code, splat (i8 8)
  %at.1 = getelementptr i8, ptr %x, i64 64
  %at.2 = getelementptr i8, ptr %x, i64 128
  %at.3 = getelementptr i8, ptr %x, i64 192
  %x.odd.high = load <64 x i8>, ptr %x, align 4
  %x.even.high = load <64 x i8>, ptr %at.1, align 4
  %x.odd.low = load <64 x i8>, ptr %at.2, align 4
  %x.even.low = load <64 x i8>, ptr %at.3, align 4
  %high.0 = call <16 x i32> @add_dot(<16 x i32> zeroinitializer, <64 x i8> %odd, <64 x i8> %x.odd.high)
  %high.1 = call <16 x i32> @add_dot(<16 x i32> %high.0, <64 x i8> %even, <64 x i8> %x.even.high)
  %high = shl <16 x i32> %high.1, splat (i32 8)
  %low.0 = call <16 x i32> @add_dot(<16 x i32> %high, <64 x i8> %odd, <64 x i8> %x.odd.low)
  %total = call <16 x i32> @add_dot(<16 x i32> %low.0, <64 x i8> %even, <64 x i8> %x.even.low)
  %next = call <16 x float> @add_scaled(<16 x float> %sum, <16 x i32> %total, <16 x float> %scale)
  ret <16 x float> %next
}
"""
)
# Products of unsigned and signed bytes, summed in fours, by the feature of the processor that computes them.
BYTE_DOTS = {
    "avx512vnni": """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)

define internal <16 x i32> @add_dot(<16 x i32> %sum, <64 x i8> %a, <64 x i8> %b) alwaysinline {
  %fours.a = bitcast <64 x i8> %a to <16 x i32>
  %fours.b = bitcast <64 x i8> %b to <16 x i32>
  %next = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %sum, <16 x i32> %fours.a, <16 x i32> %fours.b)
  ret <16 x i32> %next
}
""",
    "avxvnni": f"""
declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <8 x i32>, <8 x i32>)

define internal <16 x i32> @add_dot(<16 x i32> %sum, <64 x i8> %a, <64 x i8> %b) alwaysinline {{
  %fours.a = bitcast <64 x i8> %a to <16 x i32>
  %fours.b = bitcast <64 x i8> %b to <16 x i32>
  %sum.0 = shufflevector <16 x i32> %sum, <16 x i32> poison, <8 x i32> <{indices(8, 1)}>
  %sum.1 = shufflevector <16 x i32> %sum, <16 x i32> poison, <8 x i32> <{indices(8, 1, first=8)}>
  %a.0 = shufflevector <16 x i32> %fours.a, <16 x i32> poison, <8 x i32> <{indices(8, 1)}>
  %a.1 = shufflevector <16 x i32> %fours.a, <16 x i32> poison, <8 x i32> <{indices(8, 1, first=8)}>
  %b.0 = shufflevector <16 x i32> %fours.b, <16 x i32> poison, <8 x i32> <{indices(8, 1)}>
  %b.1 = shufflevector <16 x i32> %fours.b, <16 x i32> poison, <8 x i32> <{indices(8, 1, first=8)}>
  %next.0 = call <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32> %sum.0, <8 x i32> %a.0, <8 x i32> %b.0)
  %next.1 = call <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32> %sum.1, <8 x i32> %a.1, <8 x i32> %b.1)
  %next = shufflevector <8 x i32> %next.0, <8 x i32> %next.1, <16 x i32> <{indices(16, 1)}>
  ret <16 x i32> %next
}}
""",
}

# 8 bits: 64 columns.
STEP_INT8 = (
    DOT
    + ADD_SCALED
    + """
define internal <16 x float> @step(ptr %codes, ptr %x, <16 x float> %scale, <16 x float> %sum) alwaysinline {
  %at.codes = getelementptr i8, ptr %codes, i64 32
  %at.x = getelementptr i8, ptr %x, i64 64
  %byte.0 = load <32 x i8>, ptr %codes, align 1
  %byte.1 = load <32 x i8>, ptr %at.codes, align 1
  %code.0 = sext <32 x i8> %byte.0 to <32 x i16>
  %code.1 = sext <32 x i8> %byte.1 to <32 x i16>
  %x.0 = load <32 x i16>, ptr %x, align 4
  %x.1 = load <32 x i16>, ptr %at.x, align 4
  %dot.0 = call <16 x i32> @dot(<32 x i16> %code.0, <32 x i16> %x.0)
  %dot.1 = call <16 x i32> @dot(<32 x i16> %code.1, <32 x i16> %x.1)
  %total = add <16 x i32> %dot.0, %dot.1
  %next = call <16 x float> @add_scaled(<16 x float> %sum, <16 x i32> %total, <16 x float> %scale)
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

# The nearest number of half precision, of ties the even one; NaN stays NaN.
TO_HALF = {
    torch.float16: """
define internal <16 x i16> @to_half(<16 x float> %value) alwaysinline {
  %half = fptrunc <16 x float> %value to <16 x half>
  %bits = bitcast <16 x half> %half to <16 x i16>
  ret <16 x i16> %bits
}
""",
    torch.bfloat16: """
define internal <16 x i16> @to_half(<16 x float> %value) alwaysinline {
  %bits = bitcast <16 x float> %value to <16 x i32>
  %high = lshr <16 x i32> %bits, splat (i32 16)
  %odd = and <16 x i32> %high, splat (i32 1)
  %almost.half = add <16 x i32> %odd, splat (i32 32767)
  %sum = add <16 x i32> %bits, %almost.half
  %rounded = lshr <16 x i32> %sum, splat (i32 16)
  %quiet = or <16 x i32> %high, splat (i32 64)
  %is.nan = fcmp uno <16 x float> %value, zeroinitializer
  %chosen = select <16 x i1> %is.nan, <16 x i32> %quiet, <16 x i32> %rounded
  %half = trunc <16 x i32> %chosen to <16 x i16>
  ret <16 x i16> %half
}
""",
}
# What the original, a float16 model, rounds between two operations of one line. We do alike in float16, so that near
# ties are decided alike; bfloat16, which the original did not have, is spared its larger error.
ROUND_LIKE_ORIGINAL = {
    torch.float16: """
define internal <16 x float> @round_like_original(<16 x float> %value) alwaysinline {
  %rounded = call <16 x float> @narrow(<16 x float> %value)
  ret <16 x float> %rounded
}
""",
    torch.bfloat16: """
define internal <16 x float> @round_like_original(<16 x float> %value) alwaysinline {
  ret <16 x float> %value
}
""",
}
FUNCTIONS = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)

define internal <16 x float> @narrow(<16 x float> %value) alwaysinline {{
  %half = call <16 x i16> @to_half(<16 x float> %value)
  %rounded = call <16 x float> @widen(<16 x i16> %half)
  ret <16 x float> %rounded
}}

define internal <16 x float> @splat(float %value) alwaysinline {{
  %first = insertelement <16 x float> poison, float %value, i64 0
  %all = shufflevector <16 x float> %first, <16 x float> poison, <16 x i32> zeroinitializer
  ret <16 x float> %all
}}

define internal <16 x float> @load(ptr %row, i64 %column) alwaysinline {{
  %at = getelementptr float, ptr %row, i64 %column
  %value = load <16 x float>, ptr %at, align 4
  ret <16 x float> %value
}}

define internal void @store(ptr %row, i64 %column, <16 x float> %value) alwaysinline {{
  %at = getelementptr float, ptr %row, i64 %column
  store <16 x float> %value, ptr %at, align 4
  ret void
}}

define internal <16 x float> @load_half(ptr %row, i64 %column) alwaysinline {{
  %at = getelementptr i16, ptr %row, i64 %column
  %half = load <16 x i16>, ptr %at, align 2
  %value = call <16 x float> @widen(<16 x i16> %half)
  ret <16 x float> %value
}}

define internal void @store_half(ptr %row, i64 %column, <16 x float> %value) alwaysinline {{
  %half = call <16 x i16> @to_half(<16 x float> %value)
  %at = getelementptr i16, ptr %row, i64 %column
  store <16 x i16> %half, ptr %at, align 2
  ret void
}}

; e^x for x <= 0, as 2^n times a polynomial; NaN stays NaN
define internal <16 x float> @exp(<16 x float> %x) alwaysinline {{
  %least = call <16 x float> @splat(float {least})
  %is.less = fcmp olt <16 x float> %x, %least
  %clamped = select <16 x i1> %is.less, <16 x float> %least, <16 x float> %x
  %log2.e = call <16 x float> @splat(float {log2_e})
  %round = call <16 x float> @splat(float {round})
  %shifted = call <16 x float> @llvm.fma.v16f32(<16 x float> %clamped, <16 x float> %log2.e, <16 x float> %round)
  %n = fsub <16 x float> %shifted, %round
  %minus.n = fneg <16 x float> %n
  %ln.2 = call <16 x float> @splat(float {ln_2})
  %ln.2.rest = call <16 x float> @splat(float {ln_2_rest})
  %nearly = call <16 x float> @llvm.fma.v16f32(<16 x float> %minus.n, <16 x float> %ln.2, <16 x float> %clamped)
  %f = call <16 x float> @llvm.fma.v16f32(<16 x float> %minus.n, <16 x float> %ln.2.rest, <16 x float> %nearly)
{polynomial}
  %exponent = bitcast <16 x float> %shifted to <16 x i32>
  %bits = bitcast <16 x float> %power.0 to <16 x i32>
  %raised = shl <16 x i32> %exponent, splat (i32 23)
  %sum = add <16 x i32> %bits, %raised
  %result = bitcast <16 x i32> %sum to <16 x float>
  ret <16 x float> %result
}}
"""
FACTOR = """
  %factor.{power} = call <16 x float> @splat(float {factor})
  %power.{power} = call <16 x float> @llvm.fma.v16f32(
      <16 x float> {higher}, <16 x float> %f, <16 x float> %factor.{power})"""

# The {count} scales of the matrix in the steps that are done at a time.
SCALES_FUNCTION = """
define internal <{count} x float> @scales(ptr %scales, i64 %i) alwaysinline {{
  %first = mul i64 %i, {per_step}
  %index = udiv i64 %first, {steps_per_scale}
  %at = getelementptr half, ptr %scales, i64 %index
  %half = load <{count} x half>, ptr %at, align 2
  %value = fpext <{count} x half> %half to <{count} x float>
  ret <{count} x float> %value
}}
"""
# The scales of a step's cells, each in the {width} lanes of the sum that belong to it.
LANES_FUNCTION = """
define internal <16 x float> @lanes(ptr %cells) alwaysinline {{
{loads}
{joins}
  ret <16 x float> %lanes.16.0
}}
"""
LOAD_LANES = """
  %at.{c} = getelementptr float, ptr %cells, i64 {c}
  %scale.{c} = load float, ptr %at.{c}, align 4
  %first.{c} = insertelement <{width} x float> poison, float %scale.{c}, i64 0
  %lanes.{width}.{c} = shufflevector <{width} x float> %first.{c}, <{width} x float> poison,
                                     <{width} x i32> zeroinitializer"""
JOIN_LANES = """
  %lanes.{double}.{c} = shufflevector <{width} x float> %lanes.{width}.{a}, <{width} x float> %lanes.{width}.{b},
                                      <{double} x i32> <{all}>"""
NO_LANES = """
define internal <16 x float> @lanes(ptr %cells) alwaysinline {
  ret <16 x float> zeroinitializer
}
"""


# Activations as the steps read them: 16-bit codes, and for each cell its scale and, where the codes of the matrix are
# made unsigned, a correction. This loop, and one of the functions @record below; a share is a row.
RECORDS = """
define internal void @work(ptr noalias %x, ptr noalias %codes, ptr noalias %scales, ptr noalias %corrections, i64 %row)
    alwaysinline {{
start:
  %row.start = mul i64 %row, {steps}
  %row.end = add i64 %row.start, {steps}
  br label %record

record:
  %i = phi i64 [ %row.start, %start ], [ %i.next, %record ]
  %first = mul i64 %i, {columns}
  %at.x = getelementptr float, ptr %x, i64 %first
  %codes.offset = mul i64 %i, {x_bytes}
  %at.codes = getelementptr i8, ptr %codes, i64 %codes.offset
  %recorded = call {{ <{blocks} x float>, <16 x i32> }} @record(ptr %at.x, ptr %at.codes)
  %block.scales = extractvalue {{ <{blocks} x float>, <16 x i32> }} %recorded, 0
  %cell.scales = shufflevector <{blocks} x float> %block.scales, <{blocks} x float> poison, <{cells} x i32> <{repeated}>
  %cell = mul i64 %i, {cells}
  %at.scales = getelementptr float, ptr %scales, i64 %cell
  store <{cells} x float> %cell.scales, ptr %at.scales, align 4
{corrections}
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %row.end
  br i1 %more, label %record, label %end

end:
  ret void
}}
"""
# 64 columns become 16-bit integers and their scale, the largest / LARGEST_CODE. A block of zeros is divided by
# something; infinity and NaN are kept, in the scale. Sizes are compared as integers, of which NaN is the largest. ROUND
# added to a number leaves its nearest integer in the last bits.
SPLIT = f"""
declare i32 @llvm.vector.reduce.umax.v64i32(<64 x i32>)
declare float @llvm.maxnum.f32(float, float)
declare <64 x float> @llvm.fma.v64f32(<64 x float>, <64 x float>, <64 x float>)

define internal {{ <64 x i16>, float }} @split(ptr %x) alwaysinline {{
  %values = load <64 x float>, ptr %x, align 4
  %bits = bitcast <64 x float> %values to <64 x i32>
  %sizes = and <64 x i32> %bits, splat (i32 {2**31 - 1})
  %largest.bits = call i32 @llvm.vector.reduce.umax.v64i32(<64 x i32> %sizes)
  %largest = bitcast i32 %largest.bits to float
  %scale = fmul float %largest, {llvm_float(1 / LARGEST_CODE)}
  %divisor = call float @llvm.maxnum.f32(float %scale, float {llvm_float(2.0**-126)})
  %factor = fdiv float 1.0, %divisor
  %first = insertelement <64 x float> poison, float %factor, i64 0
  %factors = shufflevector <64 x float> %first, <64 x float> poison, <64 x i32> zeroinitializer
  %rounded = call <64 x float> @llvm.fma.v64f32(
      <64 x float> %values, <64 x float> %factors, <64 x float> splat (float {llvm_float(ROUND)}))
  %integers = bitcast <64 x float> %rounded to <64 x i32>
  %codes = trunc <64 x i32> %integers to <64 x i16>
  %half = insertvalue {{ <64 x i16>, float }} poison, <64 x i16> %codes, 0
  %both = insertvalue {{ <64 x i16>, float }} %half, float %scale, 1
  ret {{ <64 x i16>, float }} %both
}}
"""
# The {cells} corrections of a step, minus 8 times its activations. {folding} adds up the sums of eight columns.
RECORD_CORRECTIONS = """
  %sums.16 = extractvalue {{ <{blocks} x float>, <16 x i32> }} %recorded, 1
{folding}
  %values = sitofp <{cells} x i32> %sums.{cells} to <{cells} x float>
  %factors = fmul <{cells} x float> %cell.scales, splat (float -8.0)
  %cell.corrections = fmul <{cells} x float> %values, %factors
  %at.corrections = getelementptr float, ptr %corrections, i64 %cell
  store <{cells} x float> %cell.corrections, ptr %at.corrections, align 4"""
FOLD = """
  %even.{half} = shufflevector <{count} x i32> %sums.{count}, <{count} x i32> poison, <{half} x i32> <{evens}>
  %odd.{half} = shufflevector <{count} x i32> %sums.{count}, <{count} x i32> poison, <{half} x i32> <{odds}>
  %sums.{half} = add <{half} x i32> %even.{half}, %odd.{half}"""
# 128 columns: two blocks. Plane k has the columns k, k + 4, k + 8, …; all planes make the sums of every eight columns.
SPLIT_INT4 = (
    SPLIT
    + DOT
    + f"""
define internal {{ <128 x i16>, <2 x float> }} @split_both(ptr %x) alwaysinline {{
  %x.b = getelementptr i8, ptr %x, i64 256
  %a = call {{ <64 x i16>, float }} @split(ptr %x)
  %b = call {{ <64 x i16>, float }} @split(ptr %x.b)
  %codes.a = extractvalue {{ <64 x i16>, float }} %a, 0
  %codes.b = extractvalue {{ <64 x i16>, float }} %b, 0
  %scale.a = extractvalue {{ <64 x i16>, float }} %a, 1
  %scale.b = extractvalue {{ <64 x i16>, float }} %b, 1
  %codes = shufflevector <64 x i16> %codes.a, <64 x i16> %codes.b, <128 x i32> <{indices(128, 1)}>
  %scale = insertelement <2 x float> poison, float %scale.a, i64 0
  %scales = insertelement <2 x float> %scale, float %scale.b, i64 1
  %half = insertvalue {{ <128 x i16>, <2 x float> }} poison, <128 x i16> %codes, 0
  %both = insertvalue {{ <128 x i16>, <2 x float> }} %half, <2 x float> %scales, 1
  ret {{ <128 x i16>, <2 x float> }} %both
}}

define internal <32 x i16> @plane(<128 x i16> %codes, i64 %k) alwaysinline {{
  %fours = bitcast <128 x i16> %codes to <32 x i64>
  %bits = mul i64 %k, 16
  %first = insertelement <32 x i64> poison, i64 %bits, i64 0
  %shift = shufflevector <32 x i64> %first, <32 x i64> poison, <32 x i32> zeroinitializer
  %shifted = lshr <32 x i64> %fours, %shift
  %plane = trunc <32 x i64> %shifted to <32 x i16>
  ret <32 x i16> %plane
}}

define internal {{ <2 x float>, <16 x i32> }} @with_sums(<2 x float> %scales, <128 x i16> %codes) alwaysinline {{
  %sum.0 = add <16 x i32> zeroinitializer, zeroinitializer
"""
    + "".join(
        f"""
  %plane.{k} = call <32 x i16> @plane(<128 x i16> %codes, i64 {k})
  %pairs.{k} = call <16 x i32> @dot(<32 x i16> %plane.{k}, <32 x i16> splat (i16 1))
  %sum.{k + 1} = add <16 x i32> %sum.{k}, %pairs.{k}"""
        for k in range(4)
    )
    + """
  %half = insertvalue { <2 x float>, <16 x i32> } poison, <2 x float> %scales, 0
  %both = insertvalue { <2 x float>, <16 x i32> } %half, <16 x i32> %sum.4, 1
  ret { <2 x float>, <16 x i32> } %both
}
"""
)
RECORD_INT4 = (
    SPLIT_INT4
    + """
define internal { <2 x float>, <16 x i32> } @record(ptr %x, ptr %record) alwaysinline {
  %both = call { <128 x i16>, <2 x float> } @split_both(ptr %x)
  %codes = extractvalue { <128 x i16>, <2 x float> } %both, 0
  %scales = extractvalue { <128 x i16>, <2 x float> } %both, 1
"""
    + "".join(
        f"""
  %at.{k} = getelementptr i8, ptr %record, i64 {64 * k}
  %plane.{k} = call <32 x i16> @plane(<128 x i16> %codes, i64 {k})
  store <32 x i16> %plane.{k}, ptr %at.{k}, align 4"""
        for k in range(4)
    )
    + """
  %result = call { <2 x float>, <16 x i32> } @with_sums(<2 x float> %scales, <128 x i16> %codes)
  ret { <2 x float>, <16 x i32> } %result
}
"""
)
# x = 256 high + low, both signed, which is why LARGEST_CODE is a little less than 16 bits could hold.
RECORD_INT4_BYTES = (
    SPLIT_INT4
    + """
define internal { <2 x float>, <16 x i32> } @record(ptr %x, ptr %record) alwaysinline {
  %both = call { <128 x i16>, <2 x float> } @split_both(ptr %x)
  %codes = extractvalue { <128 x i16>, <2 x float> } %both, 0
  %scales = extractvalue { <128 x i16>, <2 x float> } %both, 1
  %twos = bitcast <128 x i16> %codes to <64 x i32>
  %high.halves = lshr <64 x i32> %twos, splat (i32 16)
  %odd = trunc <64 x i32> %high.halves to <64 x i16>
  %even = trunc <64 x i32> %twos to <64 x i16>
  %odd.low = trunc <64 x i16> %odd to <64 x i8>
  %even.low = trunc <64 x i16> %even to <64 x i8>
  %odd.rounded = add <64 x i16> %odd, splat (i16 128)
  %even.rounded = add <64 x i16> %even, splat (i16 128)
  %odd.shifted = ashr <64 x i16> %odd.rounded, splat (i16 8)
  %even.shifted = ashr <64 x i16> %even.rounded, splat (i16 8)
  %odd.high = trunc <64 x i16> %odd.shifted to <64 x i8>
  %even.high = trunc <64 x i16> %even.shifted to <64 x i8>
  %at.1 = getelementptr i8, ptr %record, i64 64
  %at.2 = getelementptr i8, ptr %record, i64 128
  %at.3 = getelementptr i8, ptr %record, i64 192
  store <64 x i8> %odd.high, ptr %record, align 4
  store <64 x i8> %even.high, ptr %at.1, align 4
  store <64 x i8> %odd.low, ptr %at.2, align 4
  store <64 x i8> %even.low, ptr %at.3, align 4
  %result = call { <2 x float>, <16 x i32> } @with_sums(<2 x float> %scales, <128 x i16> %codes)
  ret { <2 x float>, <16 x i32> } %result
}
"""
)
RECORD_INT8 = (
    SPLIT
    + """
define internal { <1 x float>, <16 x i32> } @record(ptr %x, ptr %record) alwaysinline {
  %a = call { <64 x i16>, float } @split(ptr %x)
  %codes = extractvalue { <64 x i16>, float } %a, 0
  %scale = extractvalue { <64 x i16>, float } %a, 1
  store <64 x i16> %codes, ptr %record, align 4
  %scales = insertelement <1 x float> poison, float %scale, i64 0
  %result = insertvalue { <1 x float>, <16 x i32> } poison, <1 x float> %scales, 0
  ret { <1 x float>, <16 x i32> } %result
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
        x_bytes: of the activations in a step.
        record: the LLVM code of a record; None if that is simply the activations in float32.
        most_rows: M up to which the kernels are used; for more, torch has better ways.
        values: the LLVM code of the matrix in a step, without its scales; None if it has none.
        is_offset: whether a step multiplies with 8 more than the codes.
    """

    name: str
    step: str
    columns: int
    x_bytes: int
    record: str | None
    most_rows: int
    values: str | None
    is_offset: bool

    @property
    def blocks(self) -> int:
        """Blocks of activations in a step."""
        return self.columns // BLOCK


KINDS = {
    4: Kind("int4", STEP_INT4, 128, 256, RECORD_INT4, 16, VALUES_INT4, True),
    8: Kind("int8", STEP_INT8, 64, 128, RECORD_INT8, 16, VALUES_INT8, False),
    torch.float16: Kind("float16", STEP_HALF + WIDEN[torch.float16], 32, 128, None, TILE_ROWS, None, False),
    torch.bfloat16: Kind("bfloat16", STEP_HALF + WIDEN[torch.bfloat16], 32, 128, None, TILE_ROWS, None, False),
}


def choose_kinds(features: Mapping[str, bool]) -> dict[int | torch.dtype, Kind]:
    """Choose the kinds of kernels for a processor, by bits or dtype of the matrix."""
    kinds = dict(KINDS)
    for feature, dot in BYTE_DOTS.items():
        if features.get(feature):
            step = dot + STEP_INT4_BYTES
            kinds[4] = replace(KINDS[4], name=f"int4_{feature}", step=step, record=RECORD_INT4_BYTES)
            break
    return kinds


def write_kernel(name: str, task_class: type["Task"]) -> str:
    """Write the LLVM code of a kernel but for its function @work."""
    types = [FIELD_TYPES[kind] for _, kind in task_class._fields_]
    fields = dict(enumerate(types, start=len(Task._fields_)))
    return KERNEL.format(
        name=name,
        types=", ".join(types),
        fields="".join(FIELD.format(index=index, type=kind) for index, kind in fields.items()),
        arguments=", ".join(f"{kind} %field.{index}" for index, kind in fields.items()),
    )


def write_functions(dtype: torch.dtype) -> str:
    """Write the LLVM code of functions of 16 numbers that kernels share, for half precision of this dtype."""
    polynomial, higher = "", f"splat (float {llvm_float(FACTORS[-1])})"
    for power in reversed(range(len(FACTORS) - 1)):
        polynomial += FACTOR.format(power=power, factor=llvm_float(FACTORS[power]), higher=higher)
        higher = f"%power.{power}"
    functions = FUNCTIONS.format(
        least=llvm_float(LEAST),
        log2_e=llvm_float(LOG2_E),
        round=llvm_float(ROUND),
        ln_2=llvm_float(LN_2[0]),
        ln_2_rest=llvm_float(LN_2[1]),
        polynomial=polynomial,
    )
    return WIDEN[dtype] + TO_HALF[dtype] + ROUND_LIKE_ORIGINAL[dtype] + functions


def write_product(name: str, kind: Kind, steps: int, groups: int, tile: int) -> str:
    """Write the LLVM code of a kernel that multiplies.

    Args:
        name: of the function.
        kind: of the matrix.
        steps: in a row of the matrix.
        groups: scales in a row of the matrix; 0 for none.
        tile: rows of activations.
    """
    scaling = Scaling(kind, steps, groups)
    unroll = scaling.choose_unroll()
    cells_per_step, cells, count = scaling.cells_per_step, unroll * scaling.cells_per_step, scaling.count(unroll)
    sizes = {
        "tile": tile,
        "unroll": unroll,
        "steps": steps,
        "groups": groups,
        "count": count,
        "cells": cells,
        "cells_per_step": cells_per_step,
        "repeated": indices(cells, 1, cells // count),
        "row_bytes": steps * STEP_BYTES,
        "step_bytes": STEP_BYTES,
        "x_bytes": kind.x_bytes,
        "ahead": AHEAD,
    }
    tiles = [
        {
            "t": t,
            "first_step": t * steps,
            "first_cell": t * steps * cells_per_step,
            "first": t * cells,
            "start": f"%correction.total.{t}" if kind.is_offset else "0.0",
        }
        for t in range(tile)
    ]

    def write(*parts: str, **more: int | str) -> list[str]:
        return [part.format(**sizes, **more) for part in parts]

    def write_tiles(*parts: str) -> list[str]:
        return [text for one in tiles for text in write(*parts, **one)]

    corrections = [CORRECTION] if kind.is_offset else []
    products = []
    if groups:
        products += [*write(CELLS_OF_MATRIX), *write_tiles(CELLS, *corrections), *write(CELLS_IN_MEMORY)]
    for u in range(unroll):
        products += write(STEP, u=u)
        for one in tiles:
            products += write(PRODUCT, u=u, next=u + 1, cell=one["first"] + u * cells_per_step, **one)
    loop = LOOP.format(
        **sizes,
        reductions="\n".join(REDUCTION.format(width=width) for width in sorted({LANES, cells})),
        sums="\n".join(write_tiles(SUM, *([CORRECTION_SUM] if corrections else []))),
        products="".join(products),
        results="".join(write_tiles(*([CORRECTION_RESULT] if corrections else []), RESULT)),
    )
    return write_kernel(name, ProductTask) + MULTIPLY_SHARE + kind.step + scaling.write(unroll) + loop


def write_matrix(name: str, kind: Kind, steps: int, groups: int) -> str:
    """Write the LLVM code of a kernel that writes a matrix out; see `write_product`."""
    scaling = Scaling(kind, steps, groups)
    count = scaling.count(1)
    loop = MATRIX_LOOP.format(
        steps=steps,
        groups=groups,
        step_bytes=STEP_BYTES,
        columns=kind.columns,
        count=count,
        lanes=indices(kind.columns, 1, kind.columns // count),
    )
    return write_kernel(name, ProductTask) + MULTIPLY_SHARE + kind.values + scaling.write(1) + loop


@dataclass(frozen=True)
class Scaling:
    """Which scales the steps through a row of a matrix need: `groups` in all `steps`, 0 for none."""

    kind: Kind
    steps: int
    groups: int

    @property
    def per_step(self) -> int:
        return max(1, self.groups // self.steps)

    @property
    def steps_per_scale(self) -> int:
        return max(1, self.steps // max(1, self.groups))

    @property
    def cells_per_step(self) -> int:
        return max(self.kind.blocks, self.per_step)

    def choose_unroll(self) -> int:
        """Choose how many steps to do at a time: a part of a row that has whole scales, or is in one."""
        fitting = [
            unroll
            for unroll in (1, 2, 4, 8)
            if unroll <= MOST_STEPS
            and self.steps % unroll == 0
            and (unroll % self.steps_per_scale == 0 or self.steps_per_scale % unroll == 0)
        ]
        return fitting[-1]

    def count(self, unroll: int) -> int:
        """The scales in this many steps."""
        return max(1, self.per_step * unroll // self.steps_per_scale)

    def write(self, unroll: int) -> str:
        """Write the functions @scales and @lanes."""
        if self.groups == 0:
            return NO_LANES
        sizes = {"per_step": self.per_step, "steps_per_scale": self.steps_per_scale, "count": self.count(unroll)}
        return SCALES_FUNCTION.format(**sizes) + write_lanes(self.cells_per_step)


def write_lanes(cells: int) -> str:
    """Write the function @lanes for so many cells in a step."""
    width = LANES // cells
    loads, joins = "".join(LOAD_LANES.format(c=c, width=width) for c in range(cells)), ""
    while width < LANES:
        for c in range(LANES // width // 2):
            all_of_both = indices(2 * width, 1)
            joins += JOIN_LANES.format(c=c, a=2 * c, b=2 * c + 1, width=width, double=2 * width, all=all_of_both)
        width *= 2
    return LANES_FUNCTION.format(loads=loads, joins=joins)


def write_records(name: str, kind: Kind, steps: int, cells: int) -> str:
    """Write the LLVM code of a kernel that makes records of activations: `steps` in a row, `cells` in a step."""
    folding, count = "", LANES
    while count > cells:
        half = count // 2
        folding += FOLD.format(count=count, half=half, evens=indices(half, 2), odds=indices(half, 2, first=1))
        count = half
    corrections = RECORD_CORRECTIONS.format(folding=folding, blocks=kind.blocks, cells=cells)
    loop = RECORDS.format(
        steps=steps,
        columns=kind.columns,
        x_bytes=kind.x_bytes,
        blocks=kind.blocks,
        cells=cells,
        repeated=indices(cells, 1, cells // kind.blocks),
        corrections=corrections if kind.is_offset else "",
    )
    return write_kernel(name, RecordTask) + kind.record + loop


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
    """LLVM for one processor. What it has compiled stays until the process ends.

    Args:
        llvm: as `load_llvm` returns it.
        processor: its name, as LLVM has it; of this machine by default.
        features: what it can do and what not, by LLVM's names.
    """

    def __init__(self, llvm, processor: str | None = None, features: Mapping[str, bool] | None = None):
        self.llvm = llvm
        self.processor = processor or llvm.get_host_cpu_name()
        self.features = features or llvm.get_host_cpu_features()
        check_processor(self.features)
        self.target = self.make_target()
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self.make_target())  # takes the target

    def make_target(self):
        features = ",".join(("+" if has else "-") + name for name, has in self.features.items())
        return self.llvm.Target.from_default_triple().create_target_machine(self.processor, features, opt=3)

    def compile(self, name: str, source: str) -> "Function":
        """Compile the function `name` of a task; while it runs, other threads of Python do too."""
        module = self.llvm.parse_assembly(source)
        module.verify()
        passes = self.llvm.create_pass_builder(self.target, self.llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(module, passes)
        self.engine.add_module(module)
        self.engine.finalize_object()
        address = self.engine.get_function_address(name)
        return Function(address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address))


# Launch


class Function(NamedTuple):
    """Compiled code."""

    address: int
    call: Callable[..., None]


class Tile(NamedTuple):
    """Some rows of activations, which a kernel takes together; bytes that come before theirs."""

    kernel: Function
    x: int
    cells: int
    out: int


class Task(ctypes.Structure):
    """What the threads that run a kernel have in common; each kernel's has more."""

    _fields_ = (
        ("shares", ctypes.c_int64),
        ("supply", ctypes.c_int64),  # the first share that no thread has taken
    )


def point_at_states(task: Task, key: torch.Tensor, value: torch.Tensor) -> None:
    """Tell a task where keys and values [B, H, ...] lie, by its fields of these names; strides are in elements."""
    task.keys, task.values = key.data_ptr(), value.data_ptr()
    task.key_sequence_stride, task.key_head_stride = key.stride()[:2]
    task.value_sequence_stride, task.value_head_stride = value.stride()[:2]


class ProductTask(Task):
    """Addresses of a matrix and its scales, of activations and what is known of them, and of the result."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_scales", ctypes.c_void_p),
        ("x_corrections", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("rows", ctypes.c_int64),  # of the matrix in a share
    )


class RecordTask(Task):
    """Addresses of activations in float32, and of their records; a share is a row."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("corrections", ctypes.c_void_p),
    )


class Stage(NamedTuple):
    """A kernel, what it works on, and how many threads are worth it."""

    kernel: Function
    task: Task
    threads: int


class Plan(NamedTuple):
    """How activations [M, K] and a matrix [N, K] of some form are multiplied."""

    rows: int  # M
    record: Function | None  # None for activations that are read as they are
    x_bytes: int  # of the codes in all rows of the activations
    cells_bytes: int  # of the scales of their cells, and of the corrections
    tiles: tuple[Tile, ...]

    @property
    def record_bytes(self) -> int:
        return 0 if self.record is None else self.x_bytes + 2 * self.cells_bytes

    def stages(
        self, x: int, records: int, weight: torch.Tensor, weight_scale: torch.Tensor | None, out: int
    ) -> list[Stage]:
        """List what is to be done, one after the other.

        Args:
            x: the address of the activations, float32.
            records: the address of `record_bytes` bytes.
            weight, weight_scale: the matrix.
            out: the address of the result, float32 [M, N].
        """
        stages, at_scales, at_corrections = [], 0, 0
        if self.record is not None:
            at_scales = records + self.x_bytes
            at_corrections = at_scales + self.cells_bytes
            stages.append(Stage(self.record, RecordTask(self.rows, 0, x, records, at_scales, at_corrections), 1))
            x = records
        outputs = weight.shape[0]
        threads, shares, rows = divide(outputs, weight.nbytes)
        matrix = (weight.data_ptr(), None if weight_scale is None else weight_scale.data_ptr())
        for kernel, x_bytes, cells_bytes, out_bytes in self.tiles:
            activations = (x + x_bytes, at_scales + cells_bytes, at_corrections + cells_bytes)
            sizes = (outputs, rows)
            task = ProductTask(shares, 0, *matrix, *activations, out + out_bytes, *sizes)
            stages.append(Stage(kernel, task, threads))
        return stages


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

    def run(self, kernel: Function, task: ctypes.Structure, threads: int) -> None:
        if threads == 1:
            kernel.call(ctypes.byref(task))
        elif self.openmp is not None:
            self.openmp(kernel.address, ctypes.byref(task), threads, 0)
        else:
            self.run_with_helpers(kernel, task, threads - 1)

    def run_with_helpers(self, kernel: Function, task: ctypes.Structure, helpers: int) -> None:
        if self.process != os.getpid():  # a fork has no threads but one
            self.__init__()
        futures = [self.helpers.submit(kernel.call, ctypes.byref(task)) for _ in range(helpers)]
        kernel.call(ctypes.byref(task))
        for future in futures:
            if not future.cancel():  # one that has not begun has nothing left to take
                future.result()


class Kernels:
    """Kernels, compiled as they are needed, and the threads that run them.

    Raises:
        KernelError, RuntimeError, AttributeError: LLVM cannot make them, does not know this processor, or is too old.
    """

    def __init__(self, llvm):
        self.compiler = Compiler(llvm)
        self.crew = Crew()
        self.functions: dict[str, Function] = {}
        self.lock = threading.Lock()

    def compiled(self, name: str, write: Callable[..., str]) -> Function:
        """The function that `write` writes when it is told the name, compiled once."""
        if name not in self.functions:
            with self.lock:
                if name not in self.functions:
                    self.functions[name] = self.compiler.compile(name, write(name))
        return self.functions[name]


class CpuKernels(Kernels):
    """The kernels that multiply with matrices."""

    def __init__(self, llvm):
        super().__init__(llvm)
        self.kinds = choose_kinds(self.compiler.features)
        self.plans: dict[tuple, Plan] = {}

    def make_plan(self, form: int | torch.dtype, rows: int, columns: int, outputs: int, groups: int) -> Plan:
        """Plan a product of `rows` rows of activations with a matrix; see `multiply`."""
        kind = self.kinds[form]
        steps = columns // kind.columns
        cells = Scaling(kind, steps, groups).cells_per_step
        cells_bytes = steps * cells * torch.float32.itemsize  # of a row
        tiles = []
        for first in range(0, rows, TILE_ROWS):
            tile = min(TILE_ROWS, rows - first)
            write = partial(write_product, kind=kind, steps=steps, groups=groups, tile=tile)
            kernel = self.compiled(f"{kind.name}_{steps}_{groups}_{tile}", write)
            before = (steps * kind.x_bytes, cells_bytes, outputs * torch.float32.itemsize)
            tiles.append(Tile(kernel, *(first * row_bytes for row_bytes in before)))
        record = None
        if kind.record is not None:
            write = partial(write_records, kind=kind, steps=steps, cells=cells)
            record = self.compiled(f"{kind.name}_{steps}_{cells}_records", write)
        return Plan(rows, record, rows * steps * kind.x_bytes, rows * cells_bytes, tuple(tiles))

    def find_plan(
        self, form: int | torch.dtype, rows: int, columns: int, weight: torch.Tensor, weight_scale: torch.Tensor | None
    ) -> Plan:
        """The plan of a product of activations [rows, columns] with a matrix, made once; see `multiply`."""
        key = (form, rows, columns, weight.shape[0], count_groups(weight_scale))
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self.make_plan(*key)
        return plan

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, form: int | torch.dtype
    ) -> torch.Tensor:
        """Multiply activations [M, K] with a matrix of N rows in this many bits, or of this dtype; see `fits`.

        Returns:
            [M, N], of the dtype of `x`.
        """
        plan = self.find_plan(form, *x.shape, weight, weight_scale)
        values = x.float().contiguous()
        records = torch.empty(plan.record_bytes, dtype=torch.uint8, device="cpu")
        out = torch.empty(x.shape[0], weight.shape[0], **FLOATS)
        for stage in plan.stages(values.data_ptr(), records.data_ptr(), weight, weight_scale, out.data_ptr()):
            self.crew.run(*stage)
        return out.to(x.dtype)

    def dequantize(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Compute the matrix [N, K] that the codes stand for; see `is_regular`."""
        kind = self.kinds[bits]
        steps, groups, rows = in_features // kind.columns, count_groups(weight_scale), len(weight)
        write = partial(write_matrix, kind=kind, steps=steps, groups=groups)
        kernel = self.compiled(f"{kind.name}_{steps}_{groups}_matrix", write)
        out = torch.empty(rows, in_features, **FLOATS)
        threads, shares, share = divide(rows, out.nbytes)
        matrix = (weight.data_ptr(), weight_scale.data_ptr())
        task = ProductTask(shares, 0, *matrix, None, None, None, out.data_ptr(), rows, share)
        self.crew.run(kernel, task, threads)
        return out.to(dtype)


def divide(rows: int, nbytes: int) -> tuple[int, int, int]:
    """Divide the rows of a matrix of so many bytes: among how many threads, in how many shares, of how many rows."""
    threads = min(torch.get_num_threads(), -(-nbytes // BYTES_PER_THREAD))
    share = min(MOST_BYTES_PER_SHARE * rows // nbytes, rows // (threads * SHARES_PER_THREAD))
    share = max(1, share)
    return threads, -(-rows // share), share


def count_groups(weight_scale: torch.Tensor | None) -> int:
    """The scales in a row of the matrix, given all, [N] or [N, n]; 0 without any."""
    if weight_scale is None:
        return 0
    return 1 if weight_scale.dim() == 1 else weight_scale.shape[1]


def fits(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, kind: Kind) -> bool:
    """Whether there is a kernel for the matrix [N, K], its scales [N] or [N, n], and activations [M, K]."""
    return has_few_rows(x, kind) and is_regular(weight, weight_scale, x.shape[1], kind)


def has_few_rows(x: torch.Tensor, kind: Kind) -> bool:
    """Whether a kernel may take the activations; float64 asks for more than it gives."""
    return x.dtype in (torch.float32, *WIDEN) and 0 < x.shape[0] <= kind.most_rows


def is_regular(weight: torch.Tensor, weight_scale: torch.Tensor | None, columns: int, kind: Kind) -> bool:
    """Whether the kernels can read the matrix: whole steps, and whole scales in a step or whole steps in a scale."""
    if columns == 0 or columns % kind.columns or weight.shape[0] == 0 or not weight.is_contiguous():
        return False
    if weight_scale is None:
        return True
    if weight_scale.dtype != torch.float16 or not weight_scale.is_contiguous():
        return False
    steps, groups = columns // kind.columns, count_groups(weight_scale)
    return steps % groups == 0 or groups % steps == 0 and 16 % (groups // steps) == 0


class KernelUser(ABC):
    """What has a fast way with kernels, which are made and checked when they are first asked for, and a torch way."""

    kernels_class: type[Kernels]

    def __init__(self):
        self.lock = threading.Lock()

    @abstractmethod
    def check(self, kernels: Any) -> None:
        """Compare the kernels with the torch way on a few small problems.

        Raises:
            KernelError: they disagree.
        """

    @property
    def kernels(self) -> Any | None:
        """The kernels, or None for the torch way."""
        with self.lock:
            return self.checked_kernels

    @cached_property
    def checked_kernels(self) -> Any | None:
        choice = os.environ.get("VISUALGLM_KERNELS", "auto")
        if choice not in CHOICES:
            raise ValueError(f"VISUALGLM_KERNELS is {choice!r}; it can be {', '.join(CHOICES)}.")
        llvm = None if choice == "torch" else load_llvm()
        if llvm is None and choice == "cpu":
            raise KernelError("The CPU kernels need the package llvmlite. Get it with: pip install llvmlite")
        if llvm is None:
            return None
        try:
            kernels = self.kernels_class(llvm)
            self.check(kernels)
            return kernels
        except (OSError, RuntimeError, AttributeError) as error:
            if choice == "cpu":
                raise KernelError(f"The CPU kernels do not work: {error}") from error
            warnings.warn(
                "The CPU kernels do not work, torch's operators are used instead, which are slower. Set "
                f"VISUALGLM_KERNELS=torch to do without this message. Reason: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


class CpuProducts(KernelUser):
    """The operators of quantization_kernels.py for CPU tensors.

    Args:
        multiply: the torch way to do what the method of this name does. It takes a function that dequantizes, too, for
            when there are too many activations for a kernel.
        multiply_half: likewise.
    """

    kernels_class = CpuKernels

    def __init__(self, multiply: Callable[..., torch.Tensor], multiply_half: Callable[..., torch.Tensor]):
        super().__init__()
        self.torch_multiply, self.torch_multiply_half = multiply, multiply_half

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
        kind = KINDS[bits]
        kernels = None
        if x.dtype != torch.float64 and is_regular(weight, weight_scale, in_features, kind):
            kernels = self.kernels
        if kernels is None:
            return self.torch_multiply(x, weight, weight_scale, bits, in_features, transposed)
        if not transposed and has_few_rows(x, kind):
            return kernels.multiply(x, weight, weight_scale, bits)
        return self.torch_multiply(x, weight, weight_scale, bits, in_features, transposed, kernels.dequantize)

    def multiply_half(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute x @ weight.T for [M, K] and a matrix [N, K] of half precision."""
        kind = KINDS.get(weight.dtype)
        kernels = None if kind is None or not fits(x, weight, None, kind) else self.kernels
        return (
            self.torch_multiply_half(x, weight) if kernels is None else kernels.multiply(x, weight, None, weight.dtype)
        )

    def check(self, kernels: CpuKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
        floats = {**random, **FLOATS}
        x = torch.randn(TILE_ROWS + 1, 512, **floats)
        expected = {}
        for bits, groups in ((4, 8), (4, 1), (8, 1)):
            codes = torch.randint(-128, 128, (33, 512 * bits // 8), **random).to(torch.int8)
            scale = torch.rand((33, groups) if groups > 1 else (33,), **floats).sub(0.5).half()
            expected[bits, groups] = codes, scale, self.torch_multiply(x, codes, scale, bits, 512, False)
            matrix = self.torch_multiply(torch.eye(512, **FLOATS), codes, scale, bits, 512, False).T
            if not torch.equal(kernels.dequantize(codes, scale, bits, 512, torch.float32), matrix):
                raise KernelError(f"{kernels.kinds[bits].name} with {groups} scales is another matrix.")
        for dtype in WIDEN:
            matrix = torch.randn(33, 512, **floats).to(dtype)
            expected[dtype, 0] = matrix, None, self.torch_multiply_half(x, matrix.float())
        for (form, groups), (matrix, scale, product) in expected.items():
            error = ((kernels.multiply(x, matrix, scale, form) - product).norm() / product.norm()).item()
            if not error < CHECK_TOLERANCE:
                raise KernelError(
                    f"{kernels.kinds[form].name} with {groups} scales is off by {error:.2g} of the result."
                )
