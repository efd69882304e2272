# SPDX-License-Identifier: Apache-2.0
"""Attention of one query per sequence on a CPU, a decode step's: LLVM code and its launch.

Not here: the compiler and the threads (`cpu_runtime.py`), other attention (transformers).

A decode step reads every key and value once, so memory is the limit again. torch's way takes three to eight times as
long on a processor without instructions for half precision. Here each thread takes one head after the other: scores in
float32, their softmax, and the sum of the values, whose every byte is read once, in order.

Used for keys and values of half precision in evaluation, when llvmlite is installed; else torch does it.

Shapes: B sequences, H heads, T keys, D head dimension.
"""

import ctypes
import math
from functools import partial

import torch
import torch.nn.functional as F

from .cpu_language import (
    F32,
    FLOATS32,
    HALVES,
    Fields,
    Form,
    Kernel,
    exp,
    fma,
    largest_of,
    maximum,
    splat,
    total_of,
    write_kernel,
)
from .cpu_layer import LANES, point_at_states, round_like_original
from .cpu_runtime import FLOATS, CpuKernelUser, Function, Kernels, Stage, Task
from .kernel_choice import KernelError, name_of


NAMESPACE, OPERATOR = "visualglm", "single_query_attention"
SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling) -> Tensor"
MOST_COLUMNS = 128  # of the values at a time; more sums than registers cost less than reading rows in parts
AHEAD = 1024  # bytes that are asked for before they are needed
LINE = 32  # numbers of half precision in 64 bytes, which a processor fetches together
LOWEST = torch.finfo(torch.float32).min  # what a score that is masked falls by
CHECK_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-5}  # relative error of the self-check: weights are rounded


def single_query_attention_naive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """What `single_query_attention_kernel` computes of all heads; see `single_query_attention`."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous()


def single_query_attention_kernel(k: Kernel, task: Fields, half: Form, columns: int) -> None:
    """softmax(q K^T + bias) V of one head of a sequence, with keys and values [T, columns] of half precision."""
    sequence, head = task.chunk // task.sequence_heads, task.chunk % task.sequence_heads
    query, out = (pointer.of(FLOATS32)[task.chunk * columns] for pointer in (task.query, task.out))
    scores = task.scores.of(FLOATS32)[task.chunk * task.scores_stride]
    bias = task.bias.of(FLOATS32)[sequence * task.length]
    keys = task.keys.of(half)[sequence * task.key_sequence_stride + head * task.key_head_stride]
    values = task.values.of(half)[sequence * task.value_sequence_stride + head * task.value_head_stride]

    with k.loop(task.length) as i:
        key, dot = keys[i * columns], k.zero(F32[LANES])
        for column in range(0, columns, LINE):
            key[column].prefetch(AHEAD)
        for column in range(0, columns, LANES):
            dot = fma(key[column].load(LANES), query[column].load(LANES), dot)
        score = k.variable(total_of(dot))
        with k.when(task.bias.is_given()):
            score.set(score.now + bias[i].load())
        scores[i].store(score.now)

    lowest = k.constant(F32[LANES], -math.inf)
    scores[task.length].store(lowest)  # what is read together with the last scores
    largest = k.variable(lowest)
    with k.loop(task.length, LANES) as i:
        largest.set(maximum(largest.now, scores[i].load(LANES)))
    peak, total = largest_of(largest.now), k.variable(k.zero(F32[LANES]))
    with k.loop(task.length, LANES) as i:
        weight = exp(scores[i].load(LANES) - peak)
        scores[i].store(weight)
        total.set(total.now + weight)
    factor = 1.0 / total_of(total.now)
    with k.loop(task.length, LANES) as i:
        scores[i].store(round_like_original(scores[i].load(LANES) * factor, half))

    part = next(part for part in range(MOST_COLUMNS, 0, -LANES) if columns % part == 0)
    with k.loop(columns, part) as first:
        sums = {column: k.variable(k.zero(F32[LANES])) for column in range(0, part, LANES)}
        with k.loop(task.length) as i:
            value, weight = values[i * columns][first], splat(scores[i].load(), LANES)
            for column in range(0, part, LINE):
                value[column].prefetch(AHEAD)
            for column, sum_ in sums.items():
                sum_.set(fma(value[column].load(LANES), weight, sum_.now))
        for column, sum_ in sums.items():
            out[first][column].store(sum_.now)


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
    """Write the code of a kernel for keys and values [T, columns] of this dtype."""
    work = partial(single_query_attention_kernel, half=HALVES[dtype], columns=columns)
    return write_kernel(name, AttentionTask, work, is_apart=False)  # or LLVM unrolls short loops


class AttentionKernels(Kernels):
    """The kernels that attend, one for each dtype and head dimension."""

    def find_kernel(self, dtype: torch.dtype, columns: int) -> Function:
        """The kernel for keys and values of this dtype and head dimension."""
        write = partial(write_attention, dtype=dtype, columns=columns)
        return self.compiled(f"attention_{str(dtype)}_{columns}", write)

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
        """See `single_query_attention`; of arguments without a `states_obstacle`."""
        scaled = query.squeeze(2).float().mul(scaling).contiguous()
        scores, bias, out = self.make_scores(key), self.to_bias(mask), torch.empty_like(scaled)
        stage = self.stage(scaled, out, key.dtype)
        stage.task.attend_to(key, value, bias, scores)
        self.pool.run(*stage)
        return out.to(query.dtype)[:, None]


class CpuAttention(CpuKernelUser):
    """The operator for CPU tensors."""

    kernels_class = AttentionKernels

    def check(self, kernels: AttentionKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0), **FLOATS}
        query, key, value = (torch.randn(2, 3, length, 80, **random) for length in (1, 37, 37))
        mask = torch.rand(2, 1, 1, 37, **random) < 0.8
        for dtype in HALVES:
            halves = [tensor.to(dtype) for tensor in (query, key, value)]
            expected = single_query_attention_naive(*(half.float() for half in halves), mask, 0.3)
            out = kernels.attend(halves[0].float(), *halves[1:], mask, 0.3)
            error = ((out - expected).norm() / expected.norm()).item()
            if not error < CHECK_TOLERANCE[dtype]:
                raise KernelError(f"Attention to {dtype} is off by {error:.2g} of the result.")

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        has_obstacle = states_obstacle(query, key, value, mask) or self.obstacle()
        attend = single_query_attention_naive if has_obstacle else self.kernels.attend
        return attend(query, key, value, mask, scaling)


def states_obstacle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> str | None:
    """Why no kernel attends: it wants rows of keys and values one after the other, and a mask for each sequence."""
    batch, _, queries, columns = query.shape
    shape = (*query.shape[:2], key.shape[2], columns)
    if queries != 1 or query.numel() == 0 or key.numel() == 0:
        return "several queries, or nothing to attend to"
    if columns % LANES:
        return f"heads of {columns} numbers, no multiple of {LANES}"
    if key.dtype not in HALVES or key.dtype != value.dtype:
        return f"{name_of(key.dtype)} keys and {name_of(value.dtype)} values"
    if any(states.shape != shape or states.stride()[2:] != (columns, 1) for states in (key, value)):
        return "keys and values in another layout"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, 1, 1, shape[2])):
        return "a mask that is not boolean, or not for each sequence"
    return None


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
    library.impl(OPERATOR, single_query_attention_naive, "CompositeExplicitAutograd")
    library.impl(OPERATOR, CPU_ATTENTION, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{OPERATOR}", output_of, lib=library)
    return library


CPU_ATTENTION = CpuAttention()
LIBRARY = register_operator()  # the operator lives as long as this object


def query_obstacle(implementation: str, query: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why transformers attends with queries [B, H, S, D]: they are no decode step's on a CPU, without gradients."""
    if implementation != "sdpa":
        return f"{implementation} attention"
    if query.shape[2] != 1:
        return "several queries"
    if query.device.type != "cpu":
        return f"queries on {query.device.type}"
    if query.dtype not in HALVES:
        return f"{name_of(query.dtype)} activations"
    if torch.is_grad_enabled():
        return "gradients"
    return None if mask is None or mask.dtype == torch.bool else "a mask that is not boolean"


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
