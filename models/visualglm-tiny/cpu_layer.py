# SPDX-License-Identifier: Apache-2.0
"""What is between the products and the attention of a layer on a CPU: norm, residual, gelu, rotation.

Not here: the order of these (`cpu_decoder.py`). Beside each kernel is its naive twin, in torch. Every result is rounded
where the layers round it, to the same numbers but for the last bit of a norm or a gelu.

Shapes: C hidden size, H heads, D head dimension. A chunk is a row, or a head of a sequence.
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
    Pointer,
    Value,
    absolute,
    exp,
    fma,
    narrow,
    splat,
    square_root,
    total_of,
    where,
    write_kernel,
)
from .cpu_runtime import LANES, Task


KAPPA, BETA = 0.044715, math.sqrt(2 / math.pi)  # of gelu


def round_like_original(value: Value, half: Form) -> Value:
    """What the original, a float16 model, rounds between two operations of one line.

    We do alike in float16, so that near ties are decided alike; bfloat16, which the original did not have, is spared
    its larger error.
    """
    return narrow(value, half) if half is HALVES[torch.float16] else value


def linear_naive(product: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer's output [..., C], of its product in float32 and its bias [C]."""
    return product.to(bias.dtype) + bias


def linear(product: Pointer, bias: Pointer) -> Value:
    """What a linear layer gives: its product, float32, and its bias, each rounded to the bias' half precision."""
    half = bias.form
    return narrow(narrow(product.load(LANES), half) + bias.load(LANES), half)


def point_at_states(task: Task, key: torch.Tensor, value: torch.Tensor) -> None:
    """Tell a task where keys and values [B, H, ...] lie, by its fields of these names; strides are in elements."""
    task.keys, task.values = key.data_ptr(), value.data_ptr()
    task.key_sequence_stride, task.key_head_stride = key.stride()[:2]
    task.value_sequence_stride, task.value_head_stride = value.stride()[:2]


class NormTask(Task):
    """A norm of each row of `x`."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


def norm_naive(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """What `norm_kernel` computes of all rows [..., C]."""
    return F.layer_norm(x.to(bias.dtype), bias.shape, weight, bias, eps).float()


def mean_of(k: Kernel, row: Pointer, columns: int, center: Value, is_squared: bool) -> Value:
    """The mean of a row's deviations from a number, or of their squares."""
    sums = k.variable(k.zero(F32[LANES]))
    with k.loop(columns, LANES) as i:
        deviation = row[i].load(LANES) - center
        sums.set(sums.now + (deviation * deviation if is_squared else deviation))
    return total_of(sums.now) / columns


def norm_kernel(k: Kernel, task: Fields, half: Form, columns: int) -> None:
    """`F.layer_norm` of a row."""
    x, out, first = task.x.of(FLOATS32), task.out.of(FLOATS32), task.chunk * columns
    row = x[first]
    mean = splat(mean_of(k, row, columns, k.zero(F32[LANES]), is_squared=False), LANES)
    variance = mean_of(k, row, columns, mean, is_squared=True)
    factor = 1.0 / square_root(variance + task.eps)
    with k.loop(columns, LANES) as i:
        gamma, beta = (pointer.of(half)[i].load(LANES) for pointer in (task.weight, task.bias))
        out[first + i].store(narrow(fma((x[first + i].load(LANES) - mean) * factor, gamma, beta), half))


class NarrowTask(Task):
    """Rounding to half precision."""

    _fields_ = (("x", ctypes.c_void_p), ("out", ctypes.c_void_p))


def narrow_naive(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `narrow_kernel` computes of all rows."""
    return x.to(dtype).float()


def narrow_kernel(k: Kernel, task: Fields, half: Form, columns: int) -> None:
    """Round a row to half precision."""
    x, out, first = task.x.of(FLOATS32), task.out.of(FLOATS32), task.chunk * columns
    with k.loop(columns, LANES) as i:
        out[first + i].store(narrow(x[first + i].load(LANES), half))


class GeluTask(Task):
    """A linear layer's product and bias, and gelu."""

    _fields_ = (("product", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_void_p))


def gelu_naive(product: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What `gelu_kernel` computes of all rows [..., C]."""
    return F.gelu(linear_naive(product, bias), approximate="tanh").float()


def gelu(x: Value) -> Value:
    """x / (1 + e^-u), u = 2 beta (x + kappa x^3); by way of e^-|u|, which cannot overflow."""
    u = x * (2 * BETA) * fma(x * x, KAPPA, 1.0)
    e = exp(-absolute(u))
    return x * where(u < 0.0, e, 1.0) / (e + 1.0)


def gelu_kernel(k: Kernel, task: Fields, half: Form, columns: int) -> None:
    """gelu of a row of a linear layer."""
    product, out, first = task.product.of(FLOATS32), task.out.of(FLOATS32), task.chunk * columns
    with k.loop(columns, LANES) as i:
        out[first + i].store(narrow(gelu(linear(product[first + i], task.bias.of(half)[i])), half))


class ResidualTask(Task):
    """A linear layer's product and bias, and `alpha` times what went around it."""

    _fields_ = (
        ("product", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("alpha", ctypes.c_float),
    )


def residual_naive(product: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
    """What `residual_kernel` computes of all rows [..., C]."""
    return (x.to(bias.dtype) * alpha + linear_naive(product, bias)).float()


def residual_kernel(k: Kernel, task: Fields, half: Form, columns: int) -> None:
    """A row of a linear layer, and alpha times what went around it."""
    product, x, out = (pointer.of(FLOATS32) for pointer in (task.product, task.x, task.out))
    first = task.chunk * columns
    with k.loop(columns, LANES) as i:
        added = linear(product[first + i], task.bias.of(half)[i])
        out[first + i].store(narrow(narrow(x[first + i].load(LANES) * task.alpha, half) + added, half))


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


def rotate_naive(
    product: torch.Tensor, bias: torch.Tensor, rotary: torch.Tensor, divisor: float, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `rotate_kernel` computes of all heads.

    Args:
        product: [B, H, 3, D], float32.
        bias: [H, 3, D]
        rotary: [2 (cos, sin), B, 2 (position, block position), D / 4]
        divisor, scaling: of the query.

    Returns:
        Query, float32, key and value, of the dtype of the bias, each [B, H, D].
    """
    states = linear_naive(product, bias)
    cos, sin = rotary.to(torch.float16 if bias.dtype == torch.float16 else torch.float32)[:, :, None, None]
    first, second = states[:, :, :2].unflatten(-1, (2, 2, -1)).unbind(-2)  # each [B, H, 2 (query, key), 2, D / 4]
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)
    query, key = rotated.to(bias.dtype).unbind(2)
    return (query / divisor).float() * scaling, key, states[:, :, 2]


def rotated(product: Pointer, bias: Pointer, cos: Value, sin: Value, distance: int) -> tuple[Value, Value]:
    """Numbers of a linear layer and those at a distance, rotated together."""
    half = bias.form
    first, second = linear(product, bias), linear(product[distance], bias[distance])

    def times(value: Value, factor: Value) -> Value:
        return round_like_original(value * factor, half)

    return times(first, cos) - times(second, sin), times(second, cos) + times(first, sin)


def rotate_kernel(k: Kernel, task: Fields, half: Form, columns: int) -> None:
    """Rotate, scale and keep one head of one sequence, of which a product has query, key and value side by side.

    The first half of a head is rotated by the position, the second by the block position. The query is scaled; key and
    value go into the cache. `rotary` has cosines and then sines, each [B, 2, D / 4].
    """
    sequence, head = task.chunk // task.sequence_heads, task.chunk % task.sequence_heads
    product, bias = task.product.of(FLOATS32)[task.chunk * (3 * columns)], task.bias.of(half)[head * (3 * columns)]
    query = task.query.of(FLOATS32)[task.chunk * columns]
    keys = task.keys.of(half)[sequence * task.key_sequence_stride + head * task.key_head_stride]
    values = task.values.of(half)[sequence * task.value_sequence_stride + head * task.value_head_stride]
    cosines = task.rotary.of(FLOATS32)[sequence * (columns // 2)]
    sines, quarter = cosines[task.sines], columns // 4

    def scaled(value: Value) -> Value:
        return narrow(narrow(value, half) / task.divisor, half) * task.scaling

    with k.loop(2) as part, k.loop(quarter, LANES) as i:
        angle, column = part * quarter + i, part * (columns // 2) + i
        cos, sin = cosines[angle].load(LANES), sines[angle].load(LANES)
        for offset, value in zip((0, quarter), rotated(product[column], bias[column], cos, sin, quarter), strict=True):
            query[column][offset].store(scaled(value))
        at = column + columns
        for offset, value in zip((0, quarter), rotated(product[at], bias[at], cos, sin, quarter), strict=True):
            keys[column][offset].store(value)
    with k.loop(columns, LANES) as i:
        at = i + 2 * columns
        values[i].store(linear(product[at], bias[at]))


KERNELS = {
    NormTask: norm_kernel,
    NarrowTask: narrow_kernel,
    GeluTask: gelu_kernel,
    ResidualTask: residual_kernel,
    RotateTask: rotate_kernel,
}


def write_stage(name: str, task_class: type[Task], columns: int, dtype: torch.dtype) -> str:
    """Write the code of a kernel for rows, or heads, of so many columns and half precision of this dtype."""
    return write_kernel(name, task_class, partial(KERNELS[task_class], half=HALVES[dtype], columns=columns))
