# SPDX-License-Identifier: Apache-2.0
"""Choosing the codes and scales of low-bit matrices on a CPU: kernels, and how they are launched.

Not here: the language they are written in (`cpu_language.py`), the compiler and the threads (`cpu_runtime.py`), and the
naive twins of the kernels, to which they are equal to the bit (`lowbit_codes.py`).

How it is fast: torch does each of a hundred operations of the search on its own, and its threads wait for each other
after each. Here sixteen groups go through all of it together, one in a lane, so that nothing is added across lanes.
They are read in the dtype that they have, and stay in the nearest cache. Threads take a chunk of groups at a time, and
wait for each other at the end of a matrix alone: a busy neighbour costs its share.

Shapes: N rows, K columns, G columns of a group, n = K / G groups of a row. A block is LANES groups.
"""

import ctypes
import math
from collections.abc import Callable
from functools import partial

import torch

from .cpu_language import (
    F32,
    FLOATS32,
    HALVES,
    I8,
    I16,
    I32,
    ROUND,
    Fields,
    Form,
    Kernel,
    Pointer,
    Value,
    absolute,
    clamp,
    largest_of,
    minimum,
    narrow,
    splat,
    transpose,
    where,
    write_kernel,
)
from .cpu_products import divide
from .cpu_runtime import FLOATS, LANES, CpuKernelUser, Function, Kernels, Task, make_empty
from .kernel_choice import KernelError, name_of
from .lowbit_codes import (
    DIVISORS,
    GROUP_CODES,
    LARGEST_CODE,
    ORDERED,
    SUM_LANES,
    choose_row_scales,
    fold,
    nonzero,
    quantize_naive,
)


FORMS = {torch.float32: FLOATS32, **HALVES}  # of weights
FLOAT16 = HALVES[torch.float16]
FEW_WEIGHTS = 2**18  # of a matrix, which torch quantizes sooner than kernels are compiled; surely more than a block
WIDTHS = (64, 32, 16)  # columns that are rounded at a time


# Codes


def divide_by(weights: Value, scale: Value) -> Value:
    """Quotients; of a scale that is 0, the weights."""
    return weights / where(scale.compare("oeq", "eq", 0.0), 1.0, scale)


def shift_to_codes(quotients: Value, least: int, largest: int) -> Value:
    """The nearest codes, of ties the even one, plus ROUND: the last bits are the code, as an integer."""
    return clamp(quotients, least, largest) + ROUND


def store_codes(shifted: Value, at: Pointer, bits: int) -> None:
    """Write codes as they are stored."""
    codes = shifted.bits(I32[shifted.type.lanes]).to(I8)
    if bits == 4:
        pairs = codes.bits(I16[codes.type.lanes // 2])  # the even column in the low byte
        codes = ((pairs << 4) & 0xF0 | (pairs >> 8) & 15).to(I8)
    at.store(codes)


def width_of(columns: int) -> int:
    """How many columns of a row, or of a group, to round at a time."""
    return next(width for width in WIDTHS if columns % width == 0)


# The search


class SearchTask(Task):
    """Addresses of a matrix, of its codes and scales; how many groups it has, in blocks, of which a chunk has some."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("blocks_in_chunk", ctypes.c_int64),
    )


def search_kernel(k: Kernel, task: Fields, form: Form, columns: int) -> None:
    """Some blocks of groups of so many columns; the last block may have groups of the one before, and writes them too.

    For that, the sixteen groups are turned in memory: a vector for each column, with a lane for each group.
    """
    turned, best = k.room(columns * LANES, FLOATS32), k.room(LANES, FLOATS32)
    first = task.chunk * task.blocks_in_chunk
    with k.loop(minimum(first + task.blocks_in_chunk, task.blocks), start=first) as block:
        group = minimum(block * LANES, task.groups - LANES)
        weights = task.weight.of(form)[group * columns]
        turn(k, weights, turned, columns)
        scales = find_scales(k, turned, columns)
        task.scales.of(FLOAT16)[group].store(scales)
        best.store(scales)
        k.remember(best)
        codes = task.codes[group * (columns // 2)]
        width = width_of(columns)
        with k.loop(LANES) as lane:
            scale = splat(best[lane].load(), width)
            for column in range(0, columns, width):
                values = weights[lane * columns + column].load(width)
                at = codes[lane * (columns // 2) + column // 2]
                store_codes(shift_to_codes(divide_by(values, scale), *GROUP_CODES), at, 4)


def turn(k: Kernel, weights: Pointer, turned: Pointer, columns: int) -> None:
    """Write sixteen groups, one after the other, as vectors with a lane for each."""
    with k.loop(columns, LANES) as column:
        rows = [weights[column + group * columns].load(LANES) for group in range(LANES)]
        for index, vector in enumerate(transpose(rows)):
            turned[(column + index) * LANES].store(vector)
    k.remember(turned)


def find_scales(k: Kernel, turned: Pointer, columns: int) -> Value:
    """The best scales of sixteen groups; as `search_scales`, operation by operation."""

    def weights_of(column: Value) -> Value:
        return turned[column * LANES].load(LANES)

    peak = find_peaks(k, weights_of, columns)
    best_error, best_scale = k.variable(k.constant(F32[LANES], math.inf)), k.variable(k.zero(F32[LANES]))
    divisors = k.room(len(DIVISORS), FLOATS32)
    for index, divisor in enumerate(DIVISORS):
        divisors[index].store(k.constant(F32, -divisor))
    k.remember(divisors)
    with k.loop(len(DIVISORS)) as index:
        scale = refit(k, weights_of, columns, peak / divisors[index].load())
        error = error_of(k, weights_of, columns, scale)
        is_better = error.compare("ult", "", best_error.now)  # or NaN
        best_error.set(where(is_better, error, best_error.now))
        best_scale.set(where(is_better, scale, best_scale.now))
    return best_scale.now


def find_peaks(k: Kernel, weights_of: Callable[[Value], Value], columns: int) -> Value:
    """The first of the largest weights of each group, with its sign."""
    peak, size = k.variable(k.zero(F32[LANES])), k.variable(k.zero(F32[LANES]))
    with k.loop(columns) as column:
        weights = weights_of(column)
        is_larger = size.now < absolute(weights)
        peak.set(where(is_larger, weights, peak.now))
        size.set(where(is_larger, absolute(weights), size.now))
    return peak.now


def refit(k: Kernel, weights_of: Callable[[Value], Value], columns: int, scale: Value) -> Value:
    """The float16 scale that fits best to the codes to which a scale leads."""
    norm = k.variable(k.zero(F32[LANES]))

    def products(column: Value) -> Value:
        weights = weights_of(column)
        codes = shift_to_codes(divide_by(weights, scale), *GROUP_CODES) - ROUND
        norm.set(norm.now + codes * codes)  # integers: exact in any order
        return weights * codes

    return narrow(divide_by(add_in_order(k, products, columns), norm.now), FLOAT16)


def error_of(k: Kernel, weights_of: Callable[[Value], Value], columns: int, scale: Value) -> Value:
    """The squared error of the codes of a scale."""

    def squares(column: Value) -> Value:
        weights = weights_of(column)
        codes = shift_to_codes(divide_by(weights, scale), *GROUP_CODES) - ROUND
        error = weights - codes * scale
        return error * error

    return add_in_order(k, squares, columns)


def add_in_order(k: Kernel, numbers_of: Callable[[Value], Value], columns: int) -> Value:
    """Add up numbers of columns as `lowbit_codes` does, whose lanes are every eighth column."""
    total = k.variable(k.zero(F32[LANES]))
    with k.loop(SUM_LANES) as lane:
        total.set(total.now + fold([numbers_of(lane + column) for column in range(0, columns, SUM_LANES)]))
    return total.now


# One scale per row


class PeakTask(Task):
    """Addresses of a matrix and of the largest magnitude in each row, float32."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("peaks", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("rows_in_chunk", ctypes.c_int64),
    )


def peak_kernel(k: Kernel, task: Fields, form: Form, columns: int) -> None:
    """The largest magnitude in each of some rows. Sizes are compared as integers, of which NaN is the largest."""
    first, width = task.chunk * task.rows_in_chunk, width_of(columns)
    with k.loop(minimum(first + task.rows_in_chunk, task.rows), start=first) as row:
        largest = k.variable(k.zero(I32[width]))
        with k.loop(columns, width) as column:
            sizes = task.weight.of(form)[row * columns + column].load(width).bits(I32[width]) & 0x7FFFFFFF
            largest.set(where(largest.now < sizes, sizes, largest.now))
        task.peaks.of(FLOATS32)[row].store(largest_of(largest.now).bits(F32))


class RoundTask(Task):
    """Addresses of a matrix, of the scales of its rows, float32, and of its codes."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("rows_in_chunk", ctypes.c_int64),
    )


def round_kernel(k: Kernel, task: Fields, form: Form, columns: int, bits: int) -> None:
    """The codes of some rows; quotients of float16 are float16, as the original's."""
    first, width, largest = task.chunk * task.rows_in_chunk, width_of(columns), LARGEST_CODE[bits]
    with k.loop(minimum(first + task.rows_in_chunk, task.rows), start=first) as row:
        scale = splat(task.scales.of(FLOATS32)[row].load(), width)
        with k.loop(columns, width) as column:
            at = row * columns + column
            quotients = task.weight.of(form)[at].load(width) / scale
            if form is FLOAT16:
                quotients = narrow(quotients, FLOAT16)
            codes = task.codes[at // 2 if bits == 4 else at]
            store_codes(shift_to_codes(quotients, -largest, largest), codes, bits)


# Launch


class QuantizingKernels(Kernels):
    """The kernels that choose codes and scales."""

    def quantize(self, weight: torch.Tensor, bits: int, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a matrix as `quantize_naive` does, if it has a block of groups; see `weight_obstacle`."""
        rows, columns = weight.shape
        codes = make_empty(rows, columns * bits // 8, dtype=torch.int8)
        if group_size is None:
            scales = choose_row_scales(self.find_peaks(weight), bits)
            self.round(weight, nonzero(scales).float(), codes, bits)
            return codes, scales
        scales = torch.empty(rows, columns // group_size, dtype=torch.float16, device="cpu")
        groups = scales.numel()
        blocks = -(-groups // LANES)
        threads, chunks, blocks_in_chunk = divide(blocks, weight.nbytes)
        addresses = (tensor.data_ptr() for tensor in (weight, codes, scales))
        kernel = self.kernel(search_kernel, SearchTask, weight.dtype, columns=group_size)
        self.pool.run(kernel, SearchTask(chunks, 0, *addresses, groups, blocks, blocks_in_chunk), threads)
        return codes, scales

    def find_peaks(self, weight: torch.Tensor) -> torch.Tensor:
        """The largest magnitude in each row, in the weight's dtype."""
        rows, columns = weight.shape
        peaks = torch.empty(rows, **FLOATS)
        threads, chunks, rows_in_chunk = divide(rows, weight.nbytes)
        kernel = self.kernel(peak_kernel, PeakTask, weight.dtype, columns=columns)
        self.pool.run(kernel, PeakTask(chunks, 0, weight.data_ptr(), peaks.data_ptr(), rows, rows_in_chunk), threads)
        return peaks.to(weight.dtype)

    def round(self, weight: torch.Tensor, divisors: torch.Tensor, codes: torch.Tensor, bits: int) -> None:
        """Write the codes of rows that are divided by so much, float32."""
        rows, columns = weight.shape
        threads, chunks, rows_in_chunk = divide(rows, weight.nbytes)
        addresses = (tensor.data_ptr() for tensor in (weight, divisors, codes))
        kernel = self.kernel(round_kernel, RoundTask, weight.dtype, columns=columns, bits=bits)
        self.pool.run(kernel, RoundTask(chunks, 0, *addresses, rows, rows_in_chunk), threads)

    def kernel(self, work: Callable, task_class: type[Task], dtype: torch.dtype, **sizes: int) -> Function:
        """A kernel for weights of a dtype, compiled once."""
        name = "_".join((work.__name__, name_of(dtype), *map(str, sizes.values())))
        return self.compiled(name, partial(write_quantizing, work=work, task_class=task_class, dtype=dtype, **sizes))


def write_quantizing(name: str, work: Callable, task_class: type[Task], dtype: torch.dtype, **sizes: int) -> str:
    """Write the code of a kernel for weights of a dtype."""
    return write_kernel(name, task_class, partial(work, form=FORMS[dtype], **sizes))


def weight_obstacle(weight: torch.Tensor, group_size: int | None) -> str | None:
    """Why no kernel quantizes a matrix [N, K]."""
    if weight.device.type != "cpu":
        return f"a matrix on {weight.device}"
    if weight.dtype not in FORMS:
        return f"{name_of(weight.dtype)} weights"
    if not weight.is_contiguous():
        return "a matrix that is not contiguous"
    columns = group_size or weight.shape[1]
    if columns % LANES or group_size and columns >= ORDERED:
        return f"{'groups' if group_size else 'rows'} of {columns} columns"
    if weight.numel() < FEW_WEIGHTS:
        return f"fewer than {FEW_WEIGHTS:,} weights"
    return None


class CpuQuantizing(CpuKernelUser):
    """What quantizes matrices on a CPU."""

    kernels_class = QuantizingKernels

    def check(self, kernels: QuantizingKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0)}
        weight = torch.randn(21, 192, **random, **FLOATS) * torch.randn(21, 192, **random, **FLOATS).exp()
        weight[3], weight[5, :64] = 0.0, 1e-7
        for dtype in FORMS:
            for bits, group_size in ((4, 64), (4, None), (8, None)):
                problem = (weight.to(dtype), bits, group_size)
                if not all(map(torch.equal, kernels.quantize(*problem), quantize_naive(*problem))):
                    scales = "row" if group_size is None else f"{group_size} columns"
                    raise KernelError(f"{bits} bits, one scale per {scales}, of {name_of(dtype)} are other codes.")


CPU_QUANTIZING = CpuQuantizing()


def quantizing_obstacle(weight: torch.Tensor, group_size: int | None) -> str | None:
    """Why codes and scales of a matrix [N, K] are chosen by torch's operators, which is slow; None if by kernels."""
    return weight_obstacle(weight, group_size) or CPU_QUANTIZING.obstacle()
