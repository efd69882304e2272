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
"""A decode step of all layers in one call, on a CPU, in half precision.

Not here: the products (`cpu_kernels.py`), attention (`cpu_attention.py`), and the layers themselves, which say what is
to be computed and do it wherever this cannot (`modeling_visualglm.py`).

Around the products of a step is little work, but it takes some dozen calls of torch for each layer, and each product is
one from Python: memory, the limit of a step, waits for them a sixth of the time. Here a step is a program: a list of
stages, through which the threads go together, without Python.

Every result is rounded where the layers round it, to the same numbers but for the last bit of a norm or a gelu.

Shapes: B sequences, C hidden size, H heads, D head dimension, T keys.
"""

import ctypes
import math
import os
import platform
import threading
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers.cache_utils import Cache
from transformers.configuration_utils import PretrainedConfig

from .cpu_kernels import (
    ARM,
    FIELD_TYPES,
    FLOATS,
    KINDS,
    LANES,
    WIDEN,
    CpuKernels,
    KernelError,
    Kernels,
    KernelUser,
    Plan,
    Stage,
    Task,
    is_regular,
    llvm_float,
    point_at_states,
    write_functions,
    write_kernel,
)
from .growing_cache import GrowingCache


CHECK_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative error of the self-check: a few last bits
SPINS = 4096  # of a thread that waits, before it gives its processor to another

# The program: each thread works on one stage after the other, and waits at each until all that took a share are done.
# A thread counts itself before it takes and after it has worked. Once no shares are left, whoever works on one has been
# counted, which the fences make sure of; so when nobody is counted, the stage is done. Threads that are late find
# nothing left, and nobody waits for those that never come.
PROGRAM = """
%stage = type {{ ptr, ptr, i64 }}
%program = type {{ ptr, i64, ptr }}
{declare_pause}

define void @{name}(ptr %program) {{
start:
  %at.count = getelementptr %program, ptr %program, i64 0, i32 1
  %at.give.way = getelementptr %program, ptr %program, i64 0, i32 2
  %stages = load ptr, ptr %program
  %count = load i64, ptr %at.count
  %give.way = load ptr, ptr %at.give.way
  br label %stage

stage:
  %s = phi i64 [ 0, %start ], [ %s.next, %done ]
  %at.kernel = getelementptr %stage, ptr %stages, i64 %s
  %at.task = getelementptr %stage, ptr %stages, i64 %s, i32 1
  %at.active = getelementptr %stage, ptr %stages, i64 %s, i32 2
  %kernel = load ptr, ptr %at.kernel
  %task = load ptr, ptr %at.task
  %before = atomicrmw add ptr %at.active, i64 1 monotonic
  fence seq_cst
  call void %kernel(ptr %task)
  fence seq_cst
  %after = atomicrmw sub ptr %at.active, i64 1 release
  br label %look

look:
  %spins = phi i64 [ 0, %stage ], [ %spins.next, %wait ], [ 0, %give ]
  %active = load atomic i64, ptr %at.active acquire, align 8
  %is.done = icmp eq i64 %active, 0
  br i1 %is.done, label %done, label %wait.or.give

wait.or.give:
  %is.long = icmp uge i64 %spins, {spins}
  br i1 %is.long, label %give, label %wait

wait:
  {pause}
  %spins.next = add i64 %spins, 1
  br label %look

give:
  %result = call i32 %give.way()
  br label %look

done:
  %s.next = add i64 %s, 1
  %more = icmp ult i64 %s.next, %count
  br i1 %more, label %stage, label %end

end:
  ret void
}}
"""
PAUSE_X86 = ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()")
PAUSE_ARM = ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)")

# What stands between the products. Each kernel is one of these functions; a share is a row, {columns} wide.
# `linear` is what a linear layer gives: its product, float32, and its bias, each rounded.
LINEAR = """
define internal <16 x float> @linear(ptr %product, i64 %index, ptr %bias, i64 %column) alwaysinline {
  %sum = call <16 x float> @load(ptr %product, i64 %index)
  %rounded = call <16 x float> @narrow(<16 x float> %sum)
  %some.bias = call <16 x float> @load_half(ptr %bias, i64 %column)
  %biased = fadd <16 x float> %rounded, %some.bias
  %result = call <16 x float> @narrow(<16 x float> %biased)
  ret <16 x float> %result
}
"""
COLUMNS = """
declare <16 x float> @llvm.fabs.v16f32(<16 x float>)

define internal void @work({parameters}, i64 %share) alwaysinline {{
start:
  %first = mul i64 %share, {columns}
{before}
  br label %loop

loop:
  %i = phi i64 [ 0, %start ], [ %i.next, %loop ]
  %index = add i64 %first, %i
{body}
  call void @store(ptr %out, i64 %index, <16 x float> %result)
  %i.next = add i64 %i, 16
  %more = icmp ult i64 %i.next, {columns}
  br i1 %more, label %loop, label %end

end:
  ret void
}}
"""
NARROW = """
  %value = call <16 x float> @load(ptr %x, i64 %index)
  %result = call <16 x float> @narrow(<16 x float> %value)"""
ADD_RESIDUAL = """
  %linear = call <16 x float> @linear(ptr %product, i64 %index, ptr %bias, i64 %i)
  %value = call <16 x float> @load(ptr %x, i64 %index)
  %alphas = call <16 x float> @splat(float %alpha)
  %scaled = fmul <16 x float> %value, %alphas
  %residual = call <16 x float> @narrow(<16 x float> %scaled)
  %sum = fadd <16 x float> %residual, %linear
  %result = call <16 x float> @narrow(<16 x float> %sum)"""
# gelu(x) = x / (1 + e^-u), u = 2 beta (x + kappa x^3); by way of e^-|u|, which cannot overflow.
KAPPA, BETA = 0.044715, math.sqrt(2 / math.pi)
GELU = f"""
  %x = call <16 x float> @linear(ptr %product, i64 %index, ptr %bias, i64 %i)
  %square = fmul <16 x float> %x, %x
  %cubic = call <16 x float> @llvm.fma.v16f32(
      <16 x float> %square, <16 x float> splat (float {llvm_float(KAPPA)}), <16 x float> splat (float 1.0))
  %scaled = fmul <16 x float> %x, splat (float {llvm_float(2 * BETA)})
  %u = fmul <16 x float> %scaled, %cubic
  %size = call <16 x float> @llvm.fabs.v16f32(<16 x float> %u)
  %minus = fneg <16 x float> %size
  %e = call <16 x float> @exp(<16 x float> %minus)
  %one.and.e = fadd <16 x float> %e, splat (float 1.0)
  %is.negative = fcmp olt <16 x float> %u, zeroinitializer
  %above = select <16 x i1> %is.negative, <16 x float> %e, <16 x float> splat (float 1.0)
  %product.of.x = fmul <16 x float> %x, %above
  %gelu = fdiv <16 x float> %product.of.x, %one.and.e
  %result = call <16 x float> @narrow(<16 x float> %gelu)"""
MEAN = """
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.sqrt.f32(float)

define internal float @mean(ptr %row, <16 x float> %center, i1 %squared) alwaysinline {{
start:
  br label %loop

loop:
  %i = phi i64 [ 0, %start ], [ %i.next, %loop ]
  %sums = phi <16 x float> [ zeroinitializer, %start ], [ %sums.next, %loop ]
  %value = call <16 x float> @load(ptr %row, i64 %i)
  %deviation = fsub <16 x float> %value, %center
  %square = fmul <16 x float> %deviation, %deviation
  %term = select i1 %squared, <16 x float> %square, <16 x float> %deviation
  %sums.next = fadd <16 x float> %sums, %term
  %i.next = add i64 %i, 16
  %more = icmp ult i64 %i.next, {columns}
  br i1 %more, label %loop, label %end

end:
  %sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %sums.next)
  %mean = fdiv float %sum, {columns}.0
  ret float %mean
}}
"""
# Before the columns of a row, and for each of them.
MOMENTS = """
  %row = getelementptr float, ptr %x, i64 %first
  %mean = call float @mean(ptr %row, <16 x float> zeroinitializer, i1 false)
  %means = call <16 x float> @splat(float %mean)
  %variance = call float @mean(ptr %row, <16 x float> %means, i1 true)
  %stable = fadd float %variance, %eps
  %deviation = call float @llvm.sqrt.f32(float %stable)
  %factor = fdiv float 1.0, %deviation
  %factors = call <16 x float> @splat(float %factor)"""
NORM = """
  %value = call <16 x float> @load(ptr %x, i64 %index)
  %centered = fsub <16 x float> %value, %means
  %normal = fmul <16 x float> %centered, %factors
  %gamma = call <16 x float> @load_half(ptr %weight, i64 %i)
  %beta = call <16 x float> @load_half(ptr %bias, i64 %i)
  %scaled = call <16 x float> @llvm.fma.v16f32(<16 x float> %normal, <16 x float> %gamma, <16 x float> %beta)
  %result = call <16 x float> @narrow(<16 x float> %scaled)"""
# One head of one sequence, of which the product has queries, keys and values side by side: queries and keys are
# rotated, the first half of a head by the position, the second by the block position; queries are scaled; keys and
# values go into the cache. `rotary` has cosines and then sines, each [B, 2, D / 4]. {half} is D / 2, {quarter} D / 4.
ROTATE = """
define internal {{ <16 x float>, <16 x float> }} @rotated(ptr %product, ptr %bias, i64 %index, i64 %column,
    <16 x float> %cos, <16 x float> %sin) alwaysinline {{
  %second.index = add i64 %index, {quarter}
  %second.column = add i64 %column, {quarter}
  %first = call <16 x float> @linear(ptr %product, i64 %index, ptr %bias, i64 %column)
  %second = call <16 x float> @linear(ptr %product, i64 %second.index, ptr %bias, i64 %second.column)
  %a.cos = call <16 x float> @product(<16 x float> %first, <16 x float> %cos)
  %b.sin = call <16 x float> @product(<16 x float> %second, <16 x float> %sin)
  %b.cos = call <16 x float> @product(<16 x float> %second, <16 x float> %cos)
  %a.sin = call <16 x float> @product(<16 x float> %first, <16 x float> %sin)
  %a = fsub <16 x float> %a.cos, %b.sin
  %b = fadd <16 x float> %b.cos, %a.sin
  %half = insertvalue {{ <16 x float>, <16 x float> }} poison, <16 x float> %a, 0
  %both = insertvalue {{ <16 x float>, <16 x float> }} %half, <16 x float> %b, 1
  ret {{ <16 x float>, <16 x float> }} %both
}}

define internal <16 x float> @product(<16 x float> %value, <16 x float> %factor) alwaysinline {{
  %product = fmul <16 x float> %value, %factor
  %rounded = call <16 x float> @round_like_original(<16 x float> %product)
  ret <16 x float> %rounded
}}

define internal <16 x float> @scaled(<16 x float> %value, float %divisor, float %scaling) alwaysinline {{
  %rounded = call <16 x float> @narrow(<16 x float> %value)
  %divisors = call <16 x float> @splat(float %divisor)
  %small = fdiv <16 x float> %rounded, %divisors
  %rounded.small = call <16 x float> @narrow(<16 x float> %small)
  %scalings = call <16 x float> @splat(float %scaling)
  %large = fmul <16 x float> %rounded.small, %scalings
  ret <16 x float> %large
}}

define internal void @work(ptr noalias %product, ptr noalias %bias, ptr noalias %rotary, ptr noalias %query,
    i64 %sequence.heads, i64 %sines, float %divisor, float %scaling, ptr noalias %keys, ptr noalias %values,
    i64 %key.sequence.stride, i64 %key.head.stride, i64 %value.sequence.stride, i64 %value.head.stride, i64 %share)
    alwaysinline {{
start:
  %sequence = udiv i64 %share, %sequence.heads
  %head = urem i64 %share, %sequence.heads
  %query.first = mul i64 %share, {columns}
  %product.first = mul i64 %share, {three_columns}
  %bias.first = mul i64 %head, {three_columns}
  %key.sequence = mul i64 %sequence, %key.sequence.stride
  %key.head = mul i64 %head, %key.head.stride
  %key.first = add i64 %key.sequence, %key.head
  %value.sequence = mul i64 %sequence, %value.sequence.stride
  %value.head = mul i64 %head, %value.head.stride
  %value.first = add i64 %value.sequence, %value.head
  %cos.first = mul i64 %sequence, {half}
  %sin.first = add i64 %cos.first, %sines
  br label %part

part:
  %p = phi i64 [ 0, %start ], [ %p.next, %part.end ]
  %column.first = mul i64 %p, {half}
  %angle.first = mul i64 %p, {quarter}
  br label %rotate

rotate:
  %i = phi i64 [ 0, %part ], [ %i.next, %rotate ]
  %angle = add i64 %angle.first, %i
  %cos.index = add i64 %cos.first, %angle
  %sin.index = add i64 %sin.first, %angle
  %cos = call <16 x float> @load(ptr %rotary, i64 %cos.index)
  %sin = call <16 x float> @load(ptr %rotary, i64 %sin.index)
  %column = add i64 %column.first, %i
  %other.column = add i64 %column, {quarter}
  %q.index = add i64 %product.first, %column
  %q.bias = add i64 %bias.first, %column
  %q = call {{ <16 x float>, <16 x float> }} @rotated(ptr %product, ptr %bias, i64 %q.index, i64 %q.bias,
                                                    <16 x float> %cos, <16 x float> %sin)
  %q.a = extractvalue {{ <16 x float>, <16 x float> }} %q, 0
  %q.b = extractvalue {{ <16 x float>, <16 x float> }} %q, 1
  %q.a.scaled = call <16 x float> @scaled(<16 x float> %q.a, float %divisor, float %scaling)
  %q.b.scaled = call <16 x float> @scaled(<16 x float> %q.b, float %divisor, float %scaling)
  %query.a = add i64 %query.first, %column
  %query.b = add i64 %query.first, %other.column
  call void @store(ptr %query, i64 %query.a, <16 x float> %q.a.scaled)
  call void @store(ptr %query, i64 %query.b, <16 x float> %q.b.scaled)
  %k.index = add i64 %q.index, {columns}
  %k.bias = add i64 %q.bias, {columns}
  %k = call {{ <16 x float>, <16 x float> }} @rotated(ptr %product, ptr %bias, i64 %k.index, i64 %k.bias,
                                                    <16 x float> %cos, <16 x float> %sin)
  %k.a = extractvalue {{ <16 x float>, <16 x float> }} %k, 0
  %k.b = extractvalue {{ <16 x float>, <16 x float> }} %k, 1
  %key.a = add i64 %key.first, %column
  %key.b = add i64 %key.first, %other.column
  call void @store_half(ptr %keys, i64 %key.a, <16 x float> %k.a)
  call void @store_half(ptr %keys, i64 %key.b, <16 x float> %k.b)
  %i.next = add i64 %i, 16
  %more = icmp ult i64 %i.next, {quarter}
  br i1 %more, label %rotate, label %part.end

part.end:
  %p.next = add i64 %p, 1
  %more.parts = icmp ult i64 %p.next, 2
  br i1 %more.parts, label %part, label %copy

copy:
  %c = phi i64 [ 0, %part.end ], [ %c.next, %copy ]
  %v.column = add i64 %c, {two_columns}
  %v.index = add i64 %product.first, %v.column
  %v.bias = add i64 %bias.first, %v.column
  %v = call <16 x float> @linear(ptr %product, i64 %v.index, ptr %bias, i64 %v.bias)
  %value.index = add i64 %value.first, %c
  call void @store_half(ptr %values, i64 %value.index, <16 x float> %v)
  %c.next = add i64 %c, 16
  %more.values = icmp ult i64 %c.next, {columns}
  br i1 %more.values, label %copy, label %end

end:
  ret void
}}
"""


class NormTask(Task):
    """A norm of each row of `x`."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


class NarrowTask(Task):
    """Rounding to half precision."""

    _fields_ = (("x", ctypes.c_void_p), ("out", ctypes.c_void_p))


class GeluTask(Task):
    """A linear layer's product and bias, and gelu."""

    _fields_ = (("product", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_void_p))


class ResidualTask(Task):
    """A linear layer's product and bias, and `alpha` times what went around it."""

    _fields_ = (
        ("product", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("alpha", ctypes.c_float),
    )


class RotateTask(Task):
    """Queries, keys and values of a head. Strides are in elements; `rotary` has so many elements before its sines."""

    _fields_ = (
        ("product", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rotary", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("sequence_heads", ctypes.c_int64),
        ("sines", ctypes.c_int64),
        ("divisor", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_sequence_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_sequence_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
    )

    def write_to(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take keys and values [B, H, T, D] whose last token is to be written."""
        point_at_states(self, key[:, :, -1], value[:, :, -1])


# Of COLUMNS; rotation has a loop of its own.
BODIES = {NormTask: NORM, NarrowTask: NARROW, GeluTask: GELU, ResidualTask: ADD_RESIDUAL}
BEFORE = {NormTask: MOMENTS}
WORK = {RotateTask: ROTATE}


def write_stage(name: str, task_class: type[Task], columns: int, dtype: torch.dtype) -> str:
    """Write the LLVM code of a kernel for rows, or heads, of so many columns and half precision of this dtype."""
    sizes = {"columns": columns, "two_columns": 2 * columns, "three_columns": 3 * columns}
    sizes |= {"half": columns // 2, "quarter": columns // 4}
    if task_class in BODIES:
        types = FIELD_TYPES | {ctypes.c_void_p: "ptr noalias"}
        parameters = ", ".join(f"{types[kind]} %{field}" for field, kind in task_class._fields_)
        parts = {"parameters": parameters, "before": BEFORE.get(task_class, ""), "body": BODIES[task_class]}
        work = (MEAN if task_class in BEFORE else "").format(**sizes) + COLUMNS.format(**parts, **sizes)
    else:
        work = WORK[task_class].format(**sizes)
    return write_kernel(name, task_class) + write_functions(dtype) + LINEAR + work


def write_program(name: str, machine: str) -> str:
    """Write the LLVM code that runs a `Program` on such a machine."""
    declare_pause, pause = PAUSE_ARM if machine.lower() in ARM else PAUSE_X86
    return PROGRAM.format(name=name, declare_pause=declare_pause, pause=pause, spins=SPINS)


class ProgramStage(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("task", ctypes.c_void_p),
        ("active", ctypes.c_int64),  # threads that may be at work on it
    )


class Program(ctypes.Structure):
    """Stages that are run one after the other, and how a thread lets others go first."""

    _fields_ = (("stages", ctypes.c_void_p), ("count", ctypes.c_int64), ("give_way", ctypes.c_void_p))


def find_give_way() -> Callable[[], int]:
    """Find the system's function with which a thread lets others go first."""
    return ctypes.CDLL(None).sched_yield if os.name == "posix" else ctypes.WinDLL("kernel32").SwitchToThread


class StepKernels(Kernels):
    """The kernels between the products, and the one that runs all stages."""

    def __init__(self, llvm):
        super().__init__(llvm)
        self.give_way = ctypes.cast(find_give_way(), ctypes.c_void_p).value
        self.program = self.compiled("program", partial(write_program, machine=platform.machine()))

    def stage(self, dtype: torch.dtype, columns: int, task: Task) -> Stage:
        """Plan a task for rows, or heads, of so many columns, with parameters of half precision."""
        kind = type(task)
        name = f"{kind.__name__}_{KINDS[dtype].name}_{columns}"
        write = partial(write_stage, task_class=kind, columns=columns, dtype=dtype)
        return Stage(self.compiled(name, write), task, task.shares)


# A step


class Linear(NamedTuple):
    """The state of a linear layer; `form` is the bits of its weights, or their dtype."""

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    form: int | torch.dtype

    @classmethod
    def read(cls, module: nn.Linear) -> "Linear":
        is_half = type(module) is nn.Linear
        weight, bias = module.weight, module.bias
        return cls(weight, None, bias, weight.dtype) if is_half else cls(weight, module.weight_scale, bias, module.bits)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] * (8 // self.form if self.has_low_bits else 1)

    @property
    def has_low_bits(self) -> bool:
        return isinstance(self.form, int)

    def fits(self, batch: int, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for so many rows of activations of this dtype."""
        kind = KINDS.get(self.form)
        return (
            kind is not None
            and batch <= kind.most_rows
            and (self.has_low_bits or self.form == dtype and type(self.weight) is nn.Parameter)
            and is_regular(self.weight, self.weight_scale, self.in_features, kind)
        )


class Norm(NamedTuple):
    """The state of a norm."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def read(cls, module: nn.LayerNorm) -> "Norm":
        return cls(module.weight, module.bias)


class Layer(NamedTuple):
    """The state of a layer, the first of which has number 1."""

    number: int
    input_norm: Norm
    query_key_value: Linear
    dense: Linear
    middle_norm: Norm
    dense_h_to_4h: Linear
    dense_4h_to_h: Linear

    @classmethod
    def read(cls, block: nn.Module) -> "Layer":
        attention, mlp = block.attention, block.mlp
        return cls(
            attention.layer_idx + 1,
            Norm.read(block.input_layernorm),
            Linear.read(attention.query_key_value),
            Linear.read(attention.dense),
            Norm.read(block.post_attention_layernorm),
            Linear.read(mlp.dense_h_to_4h),
            Linear.read(mlp.dense_4h_to_h),
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.query_key_value, self.dense, self.dense_h_to_4h, self.dense_4h_to_h


class Part(NamedTuple):
    """The state of some layers, one after the other, and the numbers that they have in common."""

    layers: tuple[Layer, ...]
    num_heads: int
    alpha: float
    eps: float

    @classmethod
    def read(cls, blocks: Iterable[nn.Module], config: PretrainedConfig) -> "Part":
        """Read plain `VisualGLMBlock`s."""
        layers = tuple(Layer.read(block) for block in blocks)
        return cls(layers, config.num_attention_heads, config.residual_alpha, config.layer_norm_eps)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].dense.weight.shape[0]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def linears(self) -> list[Linear]:
        return [linear for layer in self.layers for linear in layer.linears]

    @property
    def halves(self) -> list[torch.Tensor | None]:
        """What has to be of half precision whatever the matrices are: norms and biases."""
        norms = [half for layer in self.layers for half in (*layer.input_norm, *layer.middle_norm)]
        return norms + [linear.bias for linear in self.linears]

    def state(self) -> list[Any]:
        """What a program relies on: where everything lies, in which form, and the numbers."""
        linears = self.linears
        tensors = [tensor for linear in linears for tensor in linear[:2]] + self.halves
        places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return [*places, *(linear.form for linear in linears), *(layer.number for layer in self.layers), *self[1:]]

    def fits(self, batch: int, dtype: torch.dtype) -> bool:
        """Whether a program can do what the layers do with so many sequences in this dtype."""
        halves = self.halves
        return (
            all(half is not None and half.dtype == dtype and half.is_contiguous() for half in halves)
            and all(half.device.type == "cpu" for half in halves)
            and all(linear.fits(batch, dtype) for linear in self.linears)
            and self.head_dim % (4 * LANES) == 0
        )


class StepProgram:
    """A decode step of B sequences through layers that fit, whose tensors it does not keep.

    Args:
        kernels, products, attention: the kernels of the stages.
        part: whose tensors are where they are now when the program is run.
        batch: B.
        dtype: of activations, keys and values.
    """

    def __init__(
        self,
        kernels: StepKernels,
        products: CpuKernels,
        attention: Any,
        part: Part,
        batch: int,
        dtype: torch.dtype,
    ):
        self.kernels, self.products, self.attention = kernels, products, attention
        self.batch, self.dtype, self.alpha, self.eps = batch, dtype, part.alpha, part.eps
        self.lock = threading.Lock()
        widest = max(linear.weight.shape[0] for linear in part.linears)
        record_bytes = max(self.plan(linear).record_bytes for linear in part.linears)
        heads = (batch, part.num_heads, part.head_dim)
        with torch.inference_mode(False):  # or no other mode may write here
            self.hidden, self.normed, self.narrowed = torch.empty(3, batch, part.hidden_size, **FLOATS)
            self.product, self.activated = torch.empty(2, batch, widest, **FLOATS)
            self.query, self.attended = torch.empty(2, *heads, **FLOATS)
            self.rotary = torch.empty(2, batch, 2, part.head_dim // 4, **FLOATS)
            self.records = torch.empty(record_bytes, dtype=torch.uint8, device="cpu")
        self.stages: list[Stage] = []
        self.rotations: list[RotateTask] = []
        self.attentions: list[Any] = []
        for layer in part.layers:
            self.add_layer(layer)
        entries = ((stage.kernel.address, ctypes.addressof(stage.task), 0) for stage in self.stages)
        self.entries = (ProgramStage * len(self.stages))(*entries)
        self.program = Program(ctypes.addressof(self.entries), len(self.stages), kernels.give_way)

    def plan(self, linear: Linear) -> Plan:
        return self.products.find_plan(linear.form, self.batch, linear.in_features, linear.weight, linear.weight_scale)

    def add_layer(self, layer: Layer) -> None:
        self.add_norm(layer.input_norm)
        self.add_product(self.normed, layer.query_key_value)
        self.add_attention(layer.query_key_value.bias, layer.number)
        self.add_product(self.narrowed, layer.dense)
        self.add_residual(layer.dense.bias)
        self.add_norm(layer.middle_norm)
        self.add_product(self.normed, layer.dense_h_to_4h)
        self.add_gelu(layer.dense_h_to_4h.bias)
        self.add_product(self.activated, layer.dense_4h_to_h)
        self.add_residual(layer.dense_4h_to_h.bias)

    def add_product(self, x: torch.Tensor, linear: Linear) -> None:
        addresses = addresses_of(x, self.records)
        self.stages += self.plan(linear).stages(*addresses, linear.weight, linear.weight_scale, self.product.data_ptr())

    def add(self, task: Task, columns: int) -> None:
        self.stages.append(self.kernels.stage(self.dtype, columns, task))

    def add_norm(self, norm: Norm) -> None:
        addresses = addresses_of(self.hidden, *norm, self.normed)
        self.add(NormTask(self.batch, 0, *addresses, self.eps), len(norm.bias))

    def add_attention(self, bias: torch.Tensor, number: int) -> None:
        """Add rotation and attention of the layer of this number."""
        _, heads, columns = self.query.shape
        addresses = addresses_of(self.product, bias, self.rotary, self.query)
        numbers = (heads, self.rotary[0].numel(), columns**0.5 * number, number)
        self.rotations.append(RotateTask(self.batch * heads, 0, *addresses, *numbers))
        self.add(self.rotations[-1], columns)
        attention = self.attention.stage(self.query, self.attended, self.dtype)
        self.attentions.append(attention.task)
        self.stages.append(attention)
        self.add(NarrowTask(self.batch, 0, *addresses_of(self.attended, self.narrowed)), heads * columns)

    def add_residual(self, bias: torch.Tensor) -> None:
        addresses = addresses_of(self.product, bias, self.normed, self.hidden)
        self.add(ResidualTask(self.batch, 0, *addresses, self.alpha), len(bias))

    def add_gelu(self, bias: torch.Tensor) -> None:
        self.add(GeluTask(self.batch, 0, *addresses_of(self.product, bias, self.activated)), len(bias))

    def run(
        self,
        hidden_states: torch.Tensor,
        rotary: torch.Tensor,
        states: list[tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute a step.

        Args:
            hidden_states: [B, 1, C]
            rotary: as `compute_rotary` returns it.
            states: keys and values of each layer, [B, H, T, D], the last of which are to be written.
            attention_mask: [B, 1, 1, T], True for keys that are seen; None for all.

        Returns:
            [B, 1, C]
        """
        bias = self.attention.to_bias(attention_mask)
        with self.lock:
            self.hidden.copy_(hidden_states[:, 0])
            self.rotary.copy_(rotary[:, :, 0, 0, 0])
            scores = self.attention.make_scores(states[0][0])
            for rotation, attention, (key, value) in zip(self.rotations, self.attentions, states, strict=True):
                rotation.write_to(key, value)
                attention.attend_to(key, value, bias, scores)
            for stage in self.stages:
                stage.task.supply = 0
            self.kernels.crew.run(self.kernels.program, self.program, torch.get_num_threads())
            return self.hidden.to(self.dtype)[:, None]


def addresses_of(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


class CpuDecoder(KernelUser):
    """Decode steps of decoders, as programs where they can be."""

    kernels_class = StepKernels

    def __init__(
        self,
        products: KernelUser,
        attention: KernelUser,
        plain: Collection[type[nn.Module]],
        make_example: Callable[[], nn.Module],
    ):
        """
        Args:
            products, attention: whose kernels are used.
            plain: the modules whose work a program does.
            make_example: makes a small `VisualGLMTextModel`, for the self-check.
        """
        super().__init__()
        self.products, self.attention, self.plain = products, attention, plain
        self.known = frozenset(identify(kind) for kind in plain)
        self.make_example = make_example
        self.programs: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()

    def step(
        self,
        model: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: torch.Tensor,
        cache: Cache | None,
        **kwargs,
    ) -> torch.Tensor | None:
        """Compute what the layers of a `VisualGLMTextModel` do, as far as possible by programs.

        Args:
            model: the decoder.
            hidden_states: [B, S, C]
            attention_mask: [B, 1, S, T], True for keys that are seen; None for all.
            rotary: as `compute_rotary` returns it.
            cache: of what came before; it gets longer.
            kwargs: what layers are told that have to be asked themselves.

        Returns:
            [B, S, C]; None, and nothing is done, if programs can do nothing.
        """
        config = model.config
        if config._attn_implementation != "sdpa" or not is_step(config, hidden_states, attention_mask, cache):
            return None
        parts = self.divide(model, len(hidden_states), hidden_states.dtype)
        if not any(program for _, program in parts):
            return None
        for blocks, program in parts:
            if program is None:
                for block in blocks:
                    hidden_states = block(hidden_states, attention_mask, rotary, cache, **kwargs)
            else:
                states = [cache.layers[block.attention.layer_idx].lengthen() for block in blocks]
                hidden_states = program.run(hidden_states, rotary, states, attention_mask)
        return hidden_states

    def divide(
        self, model: nn.Module, batch: int, dtype: torch.dtype
    ) -> list[tuple[list[nn.Module], StepProgram | None]]:
        """Divide the layers into those that one program does, and those that have to be asked themselves."""
        if has_global_hooks():
            return []
        parts = []
        for are_plain, group in groupby(model.layers, self.are_plain):
            blocks = list(group)
            parts.append((blocks, self.find_program(model, blocks, batch, dtype) if are_plain else None))
        return parts

    def find_program(
        self, model: nn.Module, blocks: list[nn.Module], batch: int, dtype: torch.dtype
    ) -> StepProgram | None:
        """The program for plain layers of a model as they are now, made once; None if there is none."""
        part = Part.read(blocks, model.config)
        state, programs = part.state(), self.programs.setdefault(model, {})
        key = (part.layers[0].number, len(blocks), batch, dtype, torch.get_num_threads())
        known, program = programs.get(key, (None, None))
        if known != state:
            program = self.make_program(part, batch, dtype)
            programs[key] = state, program
        return program

    def are_plain(self, block: nn.Module) -> bool:
        """Whether a layer and all its parts are."""
        return all(self.is_plain(module) for module in block.modules())

    def is_plain(self, module: nn.Module) -> bool:
        """Whether a module computes what its class says, and nobody listens."""
        state = vars(module)
        has_hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
        return identify(type(module)) in self.known and "forward" not in state and not has_hooks

    def make_program(self, part: Part, batch: int, dtype: torch.dtype) -> StepProgram | None:
        users = (self.products, self.attention, self)
        if not part.fits(batch, dtype) or any(user.kernels is None for user in users):
            return None
        return self.write_program(self.kernels, part, batch, dtype)

    def write_program(self, kernels: StepKernels, part: Part, batch: int, dtype: torch.dtype) -> StepProgram:
        return StepProgram(kernels, self.products.kernels, self.attention.kernels, part, batch, dtype)

    def check(self, kernels: StepKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0), **FLOATS}
        batch, length = 2, 5
        for dtype in WIDEN:
            model = self.make_example().to(dtype)
            part = Part.read(model.layers, model.config)
            states = (2, batch, part.num_heads, length, part.head_dim)
            caches = [GrowingCache(model.config) for _ in range(2)]
            for layer_idx in range(len(model.layers)):
                key, value = torch.randn(states, **random).to(dtype)
                for cache in caches:
                    cache.update(key, value, layer_idx)
            hidden_states = torch.randn(batch, 1, part.hidden_size, **random).to(dtype)
            rotary = torch.rand(2, batch, 1, 1, 1, 2, part.head_dim // 4, **random)
            rotary = rotary.half() if dtype == torch.float16 else rotary  # as `compute_rotary` has it
            mask = torch.rand(batch, 1, 1, length + 1, **random) < 0.8
            expected = model.run_layers(hidden_states, mask, rotary, caches[0])
            program = self.write_program(kernels, part, batch, dtype)
            out = program.run(hidden_states, rotary, [layer.lengthen() for layer in caches[1].layers], mask)
            pairs = [(out, expected)]
            for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
                pairs += [(ours.keys, theirs.keys), (ours.values, theirs.values)]
            error = max(((ours - theirs).float().norm() / theirs.float().norm()).item() for ours, theirs in pairs)
            if not error < CHECK_TOLERANCE[dtype]:
                raise KernelError(f"A decode step in {dtype} is off by {error:.2g} of the result.")


def identify(kind: type) -> type | tuple[str, str]:
    """A class of torch; of a class of ours, what its copies have in common, of which each checkpoint folder has one."""
    return kind if kind.__module__.startswith("torch.") else (kind.__name__, kind.__module__.rpartition(".")[2])


def has_global_hooks() -> bool:
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


def is_step(
    config: PretrainedConfig, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
) -> bool:
    """Whether these are a decode step's in half precision, of which a CPU is to compute the numbers and no more."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(hidden_states) is torch.Tensor
        and hidden_states.shape[1] == 1
        and hidden_states.device.type == "cpu"
        and hidden_states.dtype in WIDEN
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and identify(type(cache)) == identify(GrowingCache)
        and continues(cache, config, hidden_states, attention_mask)
    )


def continues(
    cache: GrowingCache, config: PretrainedConfig, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether the cache holds what the hidden states [B, 1, C] and the mask, of one more token, fit to."""
    batch, length = len(hidden_states), cache.get_seq_length()
    shape = (batch, config.num_attention_heads, length, config.head_dim)
    return cache.holds(config.num_hidden_layers, shape, hidden_states.dtype) and (
        attention_mask is None
        or (attention_mask.dtype == torch.bool and attention_mask.shape == (batch, 1, 1, length + 1))
    )
