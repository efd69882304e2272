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
"""Attention of one query per sequence on a CPU, a decode step's: LLVM code and its launch.

Not here: the compiler and the threads (`cpu_kernels.py`), other attention (transformers).

A decode step reads every key and value once, so memory is the limit again. torch's way takes three to eight times as
long on a processor without instructions for half precision. Here each thread takes one head after the other: scores in
float32, their softmax, and the sum of the values, whose every byte is read once, in order.

Used for keys and values of half precision in evaluation, when llvmlite is installed; else torch does it.

Shapes: B sequences, H heads, T keys, D head dimension.
"""

import ctypes
from functools import partial

import torch
import torch.nn.functional as F

from .cpu_kernels import (
    FLOATS,
    KINDS,
    LANES,
    WIDEN,
    Function,
    KernelError,
    Kernels,
    KernelUser,
    Stage,
    Task,
    point_at_states,
    write_functions,
    write_kernel,
)


NAMESPACE, OPERATOR = "visualglm", "single_query_attention"
SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling) -> Tensor"
MOST_COLUMNS = 128  # of the values at a time; more sums than registers cost less than reading rows in parts
AHEAD = 1024  # bytes that are asked for before they are needed
LINE = 32  # numbers of half precision in 64 bytes, which a processor fetches together
LOWEST = torch.finfo(torch.float32).min  # what a score that is masked falls by
CHECK_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-5}  # relative error of the self-check: weights are rounded

# What a thread does with a head; {steps} times 16 columns.
ATTEND = """
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare <16 x float> @llvm.maxnum.v16f32(<16 x float>, <16 x float>)

declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define internal void @ask(ptr %row, i64 %column) alwaysinline {{
  %at = getelementptr i16, ptr %row, i64 %column
  %ahead = getelementptr i8, ptr %at, i64 {ahead}
  call void @llvm.prefetch.p0(ptr %ahead, i32 0, i32 3, i32 1)
  ret void
}}

define internal void @work(ptr %query, ptr %out, i64 %sequence.heads, ptr %keys, ptr %values, ptr %bias, ptr %scores,
                           i64 %length, i64 %scores.stride, i64 %key.sequence.stride, i64 %key.head.stride,
                           i64 %value.sequence.stride, i64 %value.head.stride, i64 %head) alwaysinline {{
work:
  %sequence = udiv i64 %head, %sequence.heads
  %head.of.sequence = urem i64 %head, %sequence.heads
  %query.offset = mul i64 %head, {columns}
  %head.query = getelementptr float, ptr %query, i64 %query.offset
  %head.out = getelementptr float, ptr %out, i64 %query.offset
  %scores.offset = mul i64 %head, %scores.stride
  %head.scores = getelementptr float, ptr %scores, i64 %scores.offset
  %key.sequence.offset = mul i64 %sequence, %key.sequence.stride
  %key.head.offset = mul i64 %head.of.sequence, %key.head.stride
  %key.offset = add i64 %key.sequence.offset, %key.head.offset
  %head.keys = getelementptr i16, ptr %keys, i64 %key.offset
  %value.sequence.offset = mul i64 %sequence, %value.sequence.stride
  %value.head.offset = mul i64 %head.of.sequence, %value.head.stride
  %value.offset = add i64 %value.sequence.offset, %value.head.offset
  %head.values = getelementptr i16, ptr %values, i64 %value.offset
  %bias.offset = mul i64 %sequence, %length
  %sequence.bias = getelementptr float, ptr %bias, i64 %bias.offset
  %has.bias = icmp ne ptr %bias, null
  br label %score

score:
  %t = phi i64 [ 0, %work ], [ %t.next, %scored ]
  %key.row = mul i64 %t, {columns}
  %key = getelementptr i16, ptr %head.keys, i64 %key.row
{products}
  %dot = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %dot.{steps})
  br i1 %has.bias, label %biased, label %scored

biased:
  %at.bias = getelementptr float, ptr %sequence.bias, i64 %t
  %one.bias = load float, ptr %at.bias, align 4
  %moved = fadd float %dot, %one.bias
  br label %scored

scored:
  %value.of.score = phi float [ %dot, %score ], [ %moved, %biased ]
  %at.score = getelementptr float, ptr %head.scores, i64 %t
  store float %value.of.score, ptr %at.score, align 4
  %t.next = add i64 %t, 1
  %more.keys = icmp ult i64 %t.next, %length
  br i1 %more.keys, label %score, label %fill

fill:
  %nothing = call <16 x float> @splat(float 0xFFF0000000000000)
  call void @store(ptr %head.scores, i64 %length, <16 x float> %nothing)
  br label %find

find:
  %f = phi i64 [ 0, %fill ], [ %f.next, %find ]
  %largest = phi <16 x float> [ %nothing, %fill ], [ %largest.next, %find ]
  %some = call <16 x float> @load(ptr %head.scores, i64 %f)
  %largest.next = call <16 x float> @llvm.maxnum.v16f32(<16 x float> %largest, <16 x float> %some)
  %f.next = add i64 %f, 16
  %more.to.find = icmp ult i64 %f.next, %length
  br i1 %more.to.find, label %find, label %found

found:
  %peak = call float @llvm.vector.reduce.fmax.v16f32(<16 x float> %largest.next)
  %peaks = call <16 x float> @splat(float %peak)
  br label %exponentiate

exponentiate:
  %e = phi i64 [ 0, %found ], [ %e.next, %exponentiate ]
  %total = phi <16 x float> [ zeroinitializer, %found ], [ %total.next, %exponentiate ]
  %old = call <16 x float> @load(ptr %head.scores, i64 %e)
  %below = fsub <16 x float> %old, %peaks
  %weight = call <16 x float> @exp(<16 x float> %below)
  call void @store(ptr %head.scores, i64 %e, <16 x float> %weight)
  %total.next = fadd <16 x float> %total, %weight
  %e.next = add i64 %e, 16
  %more.to.weigh = icmp ult i64 %e.next, %length
  br i1 %more.to.weigh, label %exponentiate, label %weighed

weighed:
  %sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %total.next)
  %one.factor = fdiv float 1.0, %sum
  %factor = call <16 x float> @splat(float %one.factor)
  br label %normalise

normalise:
  %n = phi i64 [ 0, %weighed ], [ %n.next, %normalise ]
  %some.weights = call <16 x float> @load(ptr %head.scores, i64 %n)
  %normal = fmul <16 x float> %some.weights, %factor
  %rounded = call <16 x float> @round_like_original(<16 x float> %normal)
  call void @store(ptr %head.scores, i64 %n, <16 x float> %rounded)
  %n.next = add i64 %n, 16
  %more.to.normalise = icmp ult i64 %n.next, %length
  br i1 %more.to.normalise, label %normalise, label %part

part:
  %column = phi i64 [ 0, %normalise ], [ %column.next, %summed ]
  br label %add

add:
  %a = phi i64 [ 0, %part ], [ %a.next, %add ]
{sums}
  %value.row = mul i64 %a, {columns}
  %value = getelementptr i16, ptr %head.values, i64 %value.row
  %at.weight = getelementptr float, ptr %head.scores, i64 %a
  %one.weight = load float, ptr %at.weight, align 4
  %weights = call <16 x float> @splat(float %one.weight)
{additions}
  %a.next = add i64 %a, 1
  %more.values = icmp ult i64 %a.next, %length
  br i1 %more.values, label %add, label %summed

summed:
{results}
  %column.next = add i64 %column, {part}
  %more.columns = icmp ult i64 %column.next, {columns}
  br i1 %more.columns, label %part, label %end

end:
  ret void
}}
"""
# The parts of the loops that are there for each 16 columns, {c}, and for each line of memory.
ASK_KEY = """
  call void @ask(ptr %key, i64 {first})"""
PRODUCT = """
  %key.{c} = call <16 x float> @load_half(ptr %key, i64 {first})
  %query.{c} = call <16 x float> @load(ptr %head.query, i64 {first})
  %dot.{next} = call <16 x float> @llvm.fma.v16f32(
      <16 x float> %key.{c}, <16 x float> %query.{c}, <16 x float> {dot})"""
SUM = "  %sum.{c} = phi <16 x float> [ zeroinitializer, %part ], [ %sum.{c}.next, %add ]"
ASK_VALUE = """
  %line.{c} = add i64 %column, {first}
  call void @ask(ptr %value, i64 %line.{c})"""
ADDITION = """
  %column.{c} = add i64 %column, {first}
  %value.{c} = call <16 x float> @load_half(ptr %value, i64 %column.{c})
  %sum.{c}.next = call <16 x float> @llvm.fma.v16f32(
      <16 x float> %value.{c}, <16 x float> %weights, <16 x float> %sum.{c})"""
RESULT = """
  call void @store(ptr %head.out, i64 %column.{c}, <16 x float> %sum.{c}.next)"""


class AttentionTask(Task):
    """Addresses and sizes of an attention; a share is a head of a sequence. Strides are in elements."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("sequence_heads", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("scores_stride", ctypes.c_int64),
        ("key_sequence_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_sequence_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
    )

    def attend_to(
        self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scores: torch.Tensor
    ) -> None:
        """Take keys and values [B, H, T, D], a bias [B, T], and room as `make_scores` makes it for at least T."""
        point_at_states(self, key, value)
        self.scores, self.bias = scores.data_ptr(), None if bias is None else bias.data_ptr()
        self.length, self.scores_stride = key.shape[2], scores.shape[1]


def write_attention(name: str, dtype: torch.dtype, columns: int) -> str:
    """Write the LLVM code of a kernel for keys and values [T, columns] of this dtype."""
    part = next(part for part in range(MOST_COLUMNS, 0, -LANES) if columns % part == 0)

    def write(text: str, count: int, step: int = LANES) -> list[str]:
        return [
            text.format(c=c, first=c * step, next=c + 1, dot=f"%dot.{c}" if c else "zeroinitializer")
            for c in range(-(-count // step))
        ]

    return (
        write_kernel(name, AttentionTask)
        + write_functions(dtype)
        + ATTEND.format(
            columns=columns,
            part=part,
            steps=columns // LANES,
            ahead=AHEAD,
            products="".join(write(ASK_KEY, columns, LINE) + write(PRODUCT, columns)),
            sums="\n".join(write(SUM, part)),
            additions="".join(write(ASK_VALUE, part, LINE) + write(ADDITION, part)),
            results="".join(write(RESULT, part)),
        )
    )


class AttentionKernels(Kernels):
    """The kernels that attend, one for each dtype and head dimension."""

    def find_kernel(self, dtype: torch.dtype, columns: int) -> Function:
        """The kernel for keys and values of this dtype and head dimension."""
        write = partial(write_attention, dtype=dtype, columns=columns)
        return self.compiled(f"attention_{KINDS[dtype].name}_{columns}", write)

    def stage(self, query: torch.Tensor, out: torch.Tensor, dtype: torch.dtype) -> Stage:
        """Plan attention, of which the keys and values are not known yet; see `AttentionTask.attend_to`.

        Args:
            query: [B, H, D], float32, scaled.
            out: likewise, for the result.
            dtype: of the keys and values.
        """
        batch, heads, columns = query.shape
        task = AttentionTask(batch * heads, 0, query.data_ptr(), out.data_ptr(), heads)
        return Stage(self.find_kernel(dtype, columns), task, min(torch.get_num_threads(), batch * heads))

    @staticmethod
    def make_scores(key: torch.Tensor) -> torch.Tensor:
        """Room for the scores of keys [B, H, T, D], of which the last are read together with what follows."""
        batch, heads, length, _ = key.shape
        return torch.empty(batch * heads, length + LANES, **FLOATS)

    @staticmethod
    def to_bias(mask: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the scores under a mask [B, 1, 1, T], float32 [B, T]."""
        return None if mask is None else mask.new_zeros(mask.shape, **FLOATS).masked_fill_(~mask, LOWEST)[:, 0, 0]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """See `single_query_attention`; the arguments are those that `fits`."""
        scaled = query.squeeze(2).float().mul(scaling).contiguous()
        scores, bias, out = self.make_scores(key), self.to_bias(mask), torch.empty_like(scaled)
        stage = self.stage(scaled, out, key.dtype)
        stage.task.attend_to(key, value, bias, scores)
        self.crew.run(*stage)
        return out.to(query.dtype)[:, None]


def attend_with_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """See `single_query_attention`."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous()


class CpuAttention(KernelUser):
    """The operator for CPU tensors."""

    kernels_class = AttentionKernels

    def check(self, kernels: AttentionKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0), **FLOATS}
        query, key, value = (torch.randn(2, 3, length, 80, **random) for length in (1, 37, 37))
        mask = torch.rand(2, 1, 1, 37, **random) < 0.8
        for dtype in WIDEN:
            halves = [tensor.to(dtype) for tensor in (query, key, value)]
            expected = attend_with_torch(*(half.float() for half in halves), mask, 0.3)
            out = kernels.attend(halves[0].float(), *halves[1:], mask, 0.3)
            error = ((out - expected).norm() / expected.norm()).item()
            if not error < CHECK_TOLERANCE[dtype]:
                raise KernelError(f"Attention to {dtype} is off by {error:.2g} of the result.")

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        kernels = self.kernels if fits(query, key, value, mask) else None
        attend = attend_with_torch if kernels is None else kernels.attend
        return attend(query, key, value, mask, scaling)


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether there is a kernel for these: rows of keys and values one after the other, a mask for each sequence."""
    batch, _, queries, columns = query.shape
    shape = (*query.shape[:2], key.shape[2], columns)
    return (
        queries == 1
        and columns % LANES == 0
        and query.numel() > 0
        and key.numel() > 0
        and all(
            states.dtype in WIDEN and states.shape == shape and states.stride()[2:] == (columns, 1)
            for states in (key, value)
        )
        and key.dtype == value.dtype
        and (mask is None or (mask.dtype == torch.bool and mask.shape == (batch, 1, 1, shape[2])))
    )


def output_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Shape, dtype and device of the result, for tracing."""
    batch, heads, queries, columns = query.shape
    return query.new_empty(batch, queries, heads, columns)


def register_operator() -> torch.library.Library | None:
    """Define the operator, once per process: the same file is imported once for each checkpoint folder."""
    if hasattr(getattr(torch.ops, NAMESPACE), OPERATOR):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(OPERATOR + SCHEMA, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    library.impl(OPERATOR, attend_with_torch, "CompositeExplicitAutograd")
    library.impl(OPERATOR, CPU_ATTENTION, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{OPERATOR}", output_of, lib=library)
    return library


CPU_ATTENTION = CpuAttention()
LIBRARY = register_operator()  # the operator lives as long as this object


def is_single_query(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether queries [B, H, S, D] are a decode step's on a CPU, in half precision and without gradients."""
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and query.dtype in WIDEN
        and not torch.is_grad_enabled()
        and (mask is None or mask.dtype == torch.bool)
    )


def single_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Compute softmax(scaling q k^T) v for one query of each head.

    Args:
        query: [B, H, 1, D]
        key: [B, H, T, D], as are the values.
        mask: [B, 1, 1, T], True for keys that are seen; None for all.
        scaling: of the scores.

    Returns:
        [B, 1, H, D], of the dtype of `query`.
    """
    return torch.ops.visualglm.single_query_attention(query, key, value, mask, scaling)
