# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with low-bit and half-precision matrices on a CPU: kernels, and how they are launched.

Not here: products of many rows (`cpu_many_rows.py`), the language (`cpu_language.py`), the compiler and the threads
(`cpu_runtime.py`), the format's bytes and the naive twins of the kernels (`lowbit_format.py`), and when they are used
(`lowbit_products.py`).

How it is fast: a decoded token reads every matrix once, so memory is the limit, and the work per byte must hide behind
it. Matrices are read as they are stored, from the first byte to the last: processors fetch ahead of a thread that reads
one row after the other, and not of one that reads several at a time, which halves the speed on some. For integer codes
the activations are quantized to 16 bits with a scale per 64 columns, which costs no measurable accuracy; sums are exact
in 32 bits, and scaled in float32. Threads take rows of the matrix, a chunk at a time, without Python. For gradients,
the matrix is written out in float32, some rows at a time, for torch to multiply.

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix. A line is 64
bytes of a row; a cell is what has a scale of the matrix and one of the activations in common, some columns of a line.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from .cpu_language import (
    F32,
    FLOATS32,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    ROUND,
    WORDS,
    Fields,
    Form,
    Kernel,
    Pointer,
    Value,
    fma,
    join,
    largest_of,
    maximum,
    minimum,
    multiply_add,
    shuffle,
    splat,
    total_of,
    write_kernel,
)
from .cpu_runtime import FLOATS, LANES, CpuKernelUser, Function, Kernels, Stage, Task
from .kernel_choice import KernelError, name_of
from .lowbit_format import count_groups, dequantize_naive, multiply_naive


FEW_ROWS = 4  # of activations, whose sums registers hold; many are multiplied faster elsewhere
MOST_LINES = 4  # at a time; 1, 2, 4 or 8
LINE_BYTES = 64  # of the matrix
AHEAD = 3072  # bytes that are asked for before they are needed
AHEAD_ONCE = 4096  # where they are asked for to be read once
NEAR_BYTES = 2**15  # of activations that stay in the nearest cache, beside what is read of the matrix
GROUP = 64  # columns of activations with a common scale
LARGEST_CODE = 127 * 256 + 127  # of an activation
SMALLEST_NORMAL = 2.0**-126  # of float32
BYTES_PER_THREAD = 2**17  # of the matrix at least: less is not worth another thread
MOST_BYTES_PER_CHUNK = 2**20  # taken by a thread at once; the longer it reads on, the better processors fetch ahead
CHUNKS_PER_THREAD = 4  # at least, so that none waits long for the last one
CHECK_TOLERANCE = 2e-5  # relative error of the self-check: near ties of 16 bits may be rounded the other way
FLOAT16 = HALVES[torch.float16]
ACTIVATIONS = (torch.float32, *HALVES)  # that the kernels take


# A line of the matrix times a line of activations


def dot(a: Value, b: Value) -> Value:
    """Products of 16-bit integers, added up in pairs: one instruction where there is one (vpmaddwd, vpdpwssd)."""
    products = a.to(I32) * b.to(I32)
    return products.take(range(0, a.type.lanes, 2)) + products.take(range(1, a.type.lanes, 2))


def add_line_int4(codes: Pointer, x: Pointer, scale: Value, total: Value) -> Value:
    """Add the products of 128 columns.

    A 16-bit word holds the columns 1, 0, 3, 2 of four, from its low bits up. Codes are made unsigned, code + 8, by
    flipping their highest bit, which takes fewer instructions than keeping the sign.
    """
    words = codes.load(64).bits(I16[32]) ^ 0x8888
    planes = (words & 15, (words >> 4) & 15, (words >> 8) & 15, words >> 12)
    a, b, c, d = (
        dot(plane, x.of(WORDS)[32 * column].load(32)) for plane, column in zip(planes, (1, 0, 3, 2), strict=True)
    )
    return multiply_add(((a + b) + (c + d)).to(F32), scale, total)


def add_line_int4_bytes(codes: Pointer, x: Pointer, scale: Value, total: Value, add_dot: Callable) -> Value:
    """Add the same products in fewer instructions, where a processor adds up those of unsigned and signed bytes.

    Activations are split into their high and their low byte. A byte of codes holds a column in its low bits, and the
    one before it above.
    """
    both = codes.load(64)
    odd, even = (code ^ 8 for code in (both & 15, both >> 4))
    odd_high, even_high, odd_low, even_low = (x[64 * part].load(64) for part in range(4))
    high = add_dot(add_dot(codes.kernel.zero(I32[LANES]), odd, odd_high), even, even_high)
    return multiply_add(add_dot(add_dot(high << 8, odd, odd_low), even, even_low).to(F32), scale, total)


def add_dot_avx512vnni(total: Value, a: Value, b: Value) -> Value:
    """Add products of unsigned and signed bytes, summed in fours."""
    name = "llvm.x86.avx512.vpdpbusd.512"
    return total.kernel.call(total.type, name, total, a.bits(total.type), b.bits(total.type))


def add_dot_avxvnni(total: Value, a: Value, b: Value) -> Value:
    """Add products of unsigned and signed bytes, summed in fours."""
    name, operands = "llvm.x86.avx512.vpdpbusd.256", (total, a.bits(total.type), b.bits(total.type))
    low, high = (
        total.kernel.call(I32[8], name, *(operand.take(range(first, first + 8)) for operand in operands))
        for first in (0, 8)
    )
    return join(low, high)


def add_line_int8(codes: Pointer, x: Pointer, scale: Value, total: Value) -> Value:
    """Add the products of 64 columns."""
    a, b = (dot(codes[first].load(32).to(I16), x.of(WORDS)[first].load(32)) for first in (0, 32))
    return multiply_add((a + b).to(F32), scale, total)


def add_line_half(codes: Pointer, x: Pointer, scale: Value, total: Value, half: Form) -> Value:
    """Add the products of 32 columns of half precision with floats; there is no scale."""
    (a, x_a), (b, x_b) = (
        (codes.of(half)[first].load(LANES), x.of(FLOATS32)[first].load(LANES)) for first in (0, LANES)
    )
    return total + multiply_add(a, x_a, b * x_b)


# The numbers of a line, without their scales


def values_int4(codes: Pointer) -> Value:
    both = codes.load(64)
    even, odd = both.shift_signed(4), (both << 4).shift_signed(4)
    return shuffle(even, odd, (column for pair in zip(range(64), range(64, 128), strict=True) for column in pair))


def values_int8(codes: Pointer) -> Value:
    return codes.load(64)


# Activations as the lines read them


def quantize_group(x: Pointer) -> tuple[Value, Value]:
    """64 columns as 16-bit integers, and their scale, the largest / LARGEST_CODE.

    A group of zeros is divided by something; infinity and NaN are kept, in the scale. Sizes are compared as integers,
    of which NaN is the largest. ROUND added to a number leaves its nearest integer in the last bits.
    """
    values = x.load(GROUP)
    sizes = values.bits(I32[GROUP]) & 0x7FFFFFFF
    scale = largest_of(sizes).bits(F32) * (1 / LARGEST_CODE)
    rounded = fma(values, splat(1.0 / maximum(scale, SMALLEST_NORMAL), GROUP), ROUND)
    return rounded.bits(I32[GROUP]).to(I16), scale


def quantize_both_groups(x: Pointer) -> tuple[Value, Value]:
    """128 columns as 16-bit integers, and their two scales."""
    (a, scale_a), (b, scale_b) = quantize_group(x), quantize_group(x[GROUP])
    return join(a, b), join(scale_a, scale_b)


def planes_of(codes: Value) -> list[Value]:
    """The columns k, k + 4, k + 8, ... of 128, for each k below 4."""
    fours = codes.bits(I64[32])
    return [(fours >> 16 * plane).to(I16) for plane in range(4)]


def sums_of(codes: Value) -> Value:
    """The sums of every eight of 128 columns."""
    ones, total = codes.kernel.constant(I16[32], 1), codes.kernel.zero(I32[LANES])
    for plane in planes_of(codes):
        total = total + dot(plane, ones)
    return total


def quantize_line_int4(x: Pointer, out: Pointer) -> tuple[Value, Value]:
    """Write 128 columns as `add_line_int4` reads them; their scales, and the sums of every eight."""
    codes, scales = quantize_both_groups(x)
    for plane, column in enumerate(planes_of(codes)):
        out.of(WORDS)[32 * plane].store(column)
    return scales, sums_of(codes)


def quantize_line_int4_bytes(x: Pointer, out: Pointer) -> tuple[Value, Value]:
    """Write 128 columns as `add_line_int4_bytes` reads them; their scales, and the sums of every eight.

    A code is 256 high + low, both signed, which is why LARGEST_CODE is a little less than 16 bits could hold.
    """
    codes, scales = quantize_both_groups(x)
    twos = codes.bits(I32[64])
    columns = ((twos >> 16).to(I16), twos.to(I16))  # odd and even ones
    high_bytes = [(column + 128).shift_signed(8).to(I8) for column in columns]
    for part, values in enumerate([*high_bytes, *(column.to(I8) for column in columns)]):
        out[64 * part].store(values)
    return scales, sums_of(codes)


def quantize_line_int8(x: Pointer, out: Pointer) -> tuple[Value, None]:
    """Write 64 columns as `add_line_int8` reads them; their scale."""
    codes, scale = quantize_group(x)
    out.of(WORDS).store(codes)
    return splat(scale, 1), None


@dataclass(frozen=True)
class Kind:
    """One of the formats of a matrix.

    Args:
        name: of the kernels.
        add_line: writes how a line is multiplied and added to what came before.
        columns: of the matrix in a line.
        x_bytes: of the activations in a line.
        quantize_line: writes how a line of activations is quantized; None if they stay float32.
        values: writes how the matrix in a line is read, without its scales; None if it has none.
        is_offset: whether a line multiplies with 8 more than the codes. That adds 8 times the activations, which is
            taken off for each cell as a whole.
        is_read_once: whether what is read ahead is not to push out of the cache what is read again, the activations.
        has_wide_moves: whether one instruction moves 16 floats to any lanes.
    """

    name: str
    add_line: Callable[..., Value]
    columns: int
    x_bytes: int
    quantize_line: Callable[..., tuple] | None
    values: Callable[..., Value] | None
    is_offset: bool
    is_read_once: bool = False
    has_wide_moves: bool = False

    @property
    def groups(self) -> int:
        """Groups of activations in a line."""
        return self.columns // GROUP


KINDS = {
    4: Kind("int4", add_line_int4, 128, 256, quantize_line_int4, values_int4, True),
    8: Kind("int8", add_line_int8, 64, 128, quantize_line_int8, values_int8, False),
    **{
        dtype: Kind(str(dtype), partial(add_line_half, half=half), 32, 128, None, None, False)
        for dtype, half in HALVES.items()
    },
}
# By the feature of the processor that has the instruction.
BYTE_DOTS = {"avx512vnni": add_dot_avx512vnni, "avxvnni": add_dot_avxvnni}
# Features of the processors, AMD's with AVX-512, on which it was measured that asking for memory to be read once is
# faster, of 4 bits and half precision; what others make of such a request differs.
READING_ONCE = ("avx512vnni", "sse4a")


def choose_kinds(features: Mapping[str, bool]) -> dict[int | torch.dtype, Kind]:
    """Choose the kinds of kernels for a processor, by bits or dtype of the matrix."""
    kinds = dict(KINDS)
    for feature, add_dot in BYTE_DOTS.items():
        if features.get(feature):
            add_line = partial(add_line_int4_bytes, add_dot=add_dot)
            name = f"int4_{feature}"
            kinds[4] = replace(KINDS[4], name=name, add_line=add_line, quantize_line=quantize_line_int4_bytes)
            break
    reads_once, has_wide_moves = all(map(features.get, READING_ONCE)), bool(features.get("avx512f"))
    return {
        form: kind if form == 8 else replace(kind, is_read_once=reads_once, has_wide_moves=has_wide_moves)
        for form, kind in kinds.items()
    }


@dataclass(frozen=True)
class Scaling:
    """Which scales the lines of a row of a matrix need: `groups` in all `lines`, 0 for none."""

    kind: Kind
    lines: int
    groups: int

    @property
    def per_line(self) -> int:
        return max(1, self.groups // self.lines)

    @property
    def lines_per_scale(self) -> int:
        return max(1, self.lines // max(1, self.groups))

    @property
    def cells_per_line(self) -> int:
        return max(self.kind.groups, self.per_line)

    def choose_unroll(self) -> int:
        """Choose how many lines to do at a time: a part of a row that has whole scales, or is in one."""
        fitting = [
            unroll
            for unroll in (1, 2, 4, 8)
            if unroll <= MOST_LINES
            and self.lines % unroll == 0
            and (unroll % self.lines_per_scale == 0 or self.lines_per_scale % unroll == 0)
        ]
        return fitting[-1]

    def read(self, row_scales: Pointer, line: Value, unroll: int, count: int) -> Value:
        """The scales of `unroll` lines of a row, each repeated so that they are `count` in all."""
        scales = max(1, self.per_line * unroll // self.lines_per_scale)
        first = line * self.per_line // self.lines_per_scale
        return repeat(row_scales[first].load(scales), count)


def repeat(vector: Value, count: int) -> Value:
    """Repeat each lane, so that they are `count` in all."""
    return vector.take(lane // (count // vector.type.lanes) for lane in range(count))


def spread(cells: Pointer, count: int) -> Value:
    """The scales of a line's cells, in memory, each in the lanes of the sum that belong to it."""
    vectors = [splat(cells[cell].load(), LANES // count) for cell in range(count)]
    while len(vectors) > 1:
        vectors = [join(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


# Kernels


def rows_of(task: Fields) -> tuple[Value, Value]:
    """The first of the rows of the matrix in a chunk, and the one after the last."""
    first = task.chunk * task.rows
    return first, minimum(first + task.rows, task.outputs)


def multiply_kernel(k: Kernel, task: Fields, kind: Kind, lines: int, groups: int, rows: int) -> None:
    """Some rows of a matrix times `rows` rows of activations.

    The scales of all cells in the lines that are done at a time, of the matrix times of the activations, go through
    memory: a number is loaded into all lanes for nothing, but moving it there from another lane takes an instruction.
    Where one instruction moves all lanes, they stay in registers: loads are what such a processor has too few of.
    Neither that nor reading once was faster where activations are not near.
    """
    scaling = Scaling(kind, lines, groups)
    unroll, per_line = scaling.choose_unroll(), scaling.cells_per_line
    if rows * lines * kind.x_bytes > NEAR_BYTES:
        kind = replace(kind, is_read_once=False, has_wide_moves=False)
    cells = unroll * per_line
    x_scales, x_corrections = task.x_scales.of(FLOATS32), task.x_corrections.of(FLOATS32)
    room = k.room(rows * cells, FLOATS32)
    first_row, end = rows_of(task)
    with k.loop(end, start=first_row) as row:
        codes, row_scales = task.matrix[row * (lines * LINE_BYTES)], task.scales.of(FLOAT16)[row * groups]
        totals = [k.variable(k.zero(F32[LANES])) for _ in range(rows)]
        corrections = [k.variable(k.zero(F32[cells])) for _ in range(rows if kind.is_offset else 0)]
        with k.loop(lines, unroll) as i:
            if groups:
                scales, cell = scaling.read(row_scales, i, unroll, cells), i * per_line
                products = []
                for t in range(rows):
                    at = cell + t * lines * per_line
                    products.append(scales * x_scales[at].load(cells))
                    if kind.is_offset:
                        correction = multiply_add(scales, x_corrections[at].load(cells), corrections[t].now)
                        corrections[t].set(correction)
                if not kind.has_wide_moves:
                    for t, product in enumerate(products):
                        room[t * cells].store(product)
                    k.remember(room)
            for line in range(unroll):
                line_codes = codes[(i + line) * LINE_BYTES]
                line_codes.prefetch(AHEAD_ONCE if kind.is_read_once else AHEAD, is_kept=not kind.is_read_once)
                for t, total in enumerate(totals):
                    x = task.x[(i + line + t * lines) * kind.x_bytes]
                    if not groups:
                        scale = k.zero(F32[LANES])
                    elif kind.has_wide_moves:
                        scale = products[t].take(line * per_line + lane * per_line // LANES for lane in range(LANES))
                    else:
                        scale = spread(room[t * cells + line * per_line], per_line)
                    total.set(kind.add_line(line_codes, x, scale, total.now))
        for t, total in enumerate(totals):
            start = total_of(corrections[t].now) if kind.is_offset else None
            task.out.of(FLOATS32)[task.outputs * t + row].store(total_of(total.now, start))


def dequantize_kernel(k: Kernel, task: Fields, kind: Kind, lines: int, groups: int) -> None:
    """Some rows of the matrix itself, in float32."""
    scaling = Scaling(kind, lines, groups)
    first, end = rows_of(task)
    with k.loop(end, start=first) as row:
        row_scales, first_line = task.scales.of(FLOAT16)[row * groups], row * lines
        with k.loop(lines) as i:
            line = first_line + i
            scales = scaling.read(row_scales, i, 1, kind.columns)
            values = kind.values(task.matrix[line * LINE_BYTES]).to(F32)
            task.out.of(FLOATS32)[line * kind.columns].store(values * scales)


def quantize_naive(x: torch.Tensor) -> torch.Tensor:
    """The numbers [M, K] that the codes and scales of `quantize_kernel` stand for."""
    groups = x.unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / LARGEST_CODE
    return ((groups / scales.clamp(min=SMALLEST_NORMAL)).round() * scales).flatten(1)


def quantize_kernel(k: Kernel, task: Fields, kind: Kind, lines: int, cells: int) -> None:
    """A row of activations: their codes, and for each cell its scale and, if there is to be one, its correction."""
    first = task.chunk * lines
    with k.loop(first + lines, start=first) as i:
        line_scales, sums = kind.quantize_line(task.x.of(FLOATS32)[i * kind.columns], task.codes[i * kind.x_bytes])
        scales = repeat(line_scales, cells)
        task.scales.of(FLOATS32)[i * cells].store(scales)
        if kind.is_offset:
            while sums.type.lanes > cells:
                sums = sums.take(range(0, sums.type.lanes, 2)) + sums.take(range(1, sums.type.lanes, 2))
            task.corrections.of(FLOATS32)[i * cells].store(sums.to(F32) * (scales * -8.0))


def write_product(name: str, kind: Kind, lines: int, groups: int, rows: int) -> str:
    """Write the code of a kernel that multiplies.

    Args:
        name: of the function.
        kind: of the matrix.
        lines: in a row of the matrix.
        groups: scales in a row of the matrix; 0 for none.
        rows: of activations.
    """
    work = partial(multiply_kernel, kind=kind, lines=lines, groups=groups, rows=rows)
    return write_kernel(name, ProductTask, work)


def write_matrix(name: str, kind: Kind, lines: int, groups: int) -> str:
    """Write the code of a kernel that writes a matrix out; see `write_product`."""
    return write_kernel(name, ProductTask, partial(dequantize_kernel, kind=kind, lines=lines, groups=groups))


def write_quantization(name: str, kind: Kind, lines: int, cells: int) -> str:
    """Write the code of a kernel that quantizes activations: `lines` in a row, `cells` in a line."""
    return write_kernel(name, QuantizeTask, partial(quantize_kernel, kind=kind, lines=lines, cells=cells))


# Launch


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
        ("rows", ctypes.c_int64),  # of the matrix in a chunk
    )


class QuantizeTask(Task):
    """Addresses of activations in float32, and of their codes; a chunk is a row."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("corrections", ctypes.c_void_p),
    )


class Plan(NamedTuple):
    """How activations [M, K] and a matrix [N, K] of some form are multiplied."""

    rows: int  # M
    quantize: Function | None  # None for activations that are read as they are
    multiply: Function
    x_bytes: int  # of the codes in all rows of the activations
    cells_bytes: int  # of the scales of their cells, and of the corrections

    @property
    def quantized_bytes(self) -> int:
        return 0 if self.quantize is None else self.x_bytes + 2 * self.cells_bytes

    def stages(
        self, x: int, quantized: int, weight: torch.Tensor, weight_scale: torch.Tensor | None, out: int
    ) -> list[Stage]:
        """List what is to be done, one after the other.

        Args:
            x: the address of the activations, float32.
            quantized: the address of `quantized_bytes` bytes.
            weight, weight_scale: the matrix.
            out: the address of the result, float32 [M, N].
        """
        stages, at_scales, at_corrections = [], 0, 0
        if self.quantize is not None:
            at_scales = quantized + self.x_bytes
            at_corrections = at_scales + self.cells_bytes
            stages.append(Stage(self.quantize, QuantizeTask(self.rows, 0, x, quantized, at_scales, at_corrections), 1))
            x = quantized
        outputs = weight.shape[0]
        threads, chunks, rows = divide(outputs, weight.nbytes)
        matrix = (weight.data_ptr(), None if weight_scale is None else weight_scale.data_ptr())
        task = ProductTask(chunks, 0, *matrix, x, at_scales, at_corrections, out, outputs, rows)
        return [*stages, Stage(self.multiply, task, threads)]


class CpuKernels(Kernels):
    """The kernels that multiply with matrices."""

    def __init__(self, llvm):
        super().__init__(llvm)
        self.kinds = choose_kinds(self.compiler.features)
        self.plans: dict[tuple, Plan] = {}

    def make_plan(self, form: int | torch.dtype, rows: int, columns: int, outputs: int, groups: int) -> Plan:
        """Plan a product of `rows` rows of activations with a matrix; see `multiply`."""
        kind = self.kinds[form]
        lines = columns // kind.columns
        cells = Scaling(kind, lines, groups).cells_per_line
        write = partial(write_product, kind=kind, lines=lines, groups=groups, rows=rows)
        multiply = self.compiled(f"{kind.name}_{lines}_{groups}_{rows}", write)
        quantize = None
        if kind.quantize_line is not None:
            write = partial(write_quantization, kind=kind, lines=lines, cells=cells)
            quantize = self.compiled(f"{kind.name}_{lines}_{cells}_quantization", write)
        cells_bytes = lines * cells * torch.float32.itemsize  # of a row
        return Plan(rows, quantize, multiply, rows * lines * kind.x_bytes, rows * cells_bytes)

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
        """Multiply activations [M, K] with a matrix of N rows in this many bits, or of this dtype.

        Returns:
            [M, N], of the dtype of `x`.
        """
        plan = self.find_plan(form, *x.shape, weight, weight_scale)
        values = x.float().contiguous()
        quantized = torch.empty(plan.quantized_bytes, dtype=torch.uint8, device="cpu")
        out = torch.empty(x.shape[0], weight.shape[0], **FLOATS)
        for stage in plan.stages(values.data_ptr(), quantized.data_ptr(), weight, weight_scale, out.data_ptr()):
            self.pool.run(*stage)
        return out.to(x.dtype)

    def dequantize(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Compute the matrix [N, K] that the codes stand for; see `matrix_obstacle`."""
        kind = self.kinds[bits]
        lines, groups, rows = in_features // kind.columns, count_groups(weight_scale), len(weight)
        write = partial(write_matrix, kind=kind, lines=lines, groups=groups)
        kernel = self.compiled(f"{kind.name}_{lines}_{groups}_matrix", write)
        out = torch.empty(rows, in_features, **FLOATS)
        threads, chunks, chunk = divide(rows, out.nbytes)
        matrix = (weight.data_ptr(), weight_scale.data_ptr())
        task = ProductTask(chunks, 0, *matrix, None, None, None, out.data_ptr(), rows, chunk)
        self.pool.run(kernel, task, threads)
        return out.to(dtype)


def divide(rows: int, nbytes: int) -> tuple[int, int, int]:
    """Divide the rows of a matrix of so many bytes: among how many threads, in how many chunks, of how many rows."""
    threads = min(torch.get_num_threads(), -(-nbytes // BYTES_PER_THREAD))
    chunk = min(MOST_BYTES_PER_CHUNK * rows // nbytes, rows // (threads * CHUNKS_PER_THREAD))
    chunk = max(1, chunk)
    return threads, -(-rows // chunk), chunk


def activations_obstacle(dtype: torch.dtype, rows: int) -> str | None:
    """Why no kernel multiplies with activations [M, K]; float64 asks for more than they give."""
    if dtype not in ACTIVATIONS:
        return f"{name_of(dtype)} activations"
    if not 0 < rows <= FEW_ROWS:
        return f"{rows} rows of activations, not 1 to {FEW_ROWS}"
    return None


def storage_obstacle(weight: torch.Tensor, weight_scale: torch.Tensor | None, columns: int, kind: Kind) -> str | None:
    """Why kernels cannot read a matrix, whatever its groups are: it has to have whole lines."""
    if columns == 0 or columns % kind.columns or weight.shape[0] == 0:
        return f"a matrix [{weight.shape[0]}, {columns}], whose columns are no multiple of {kind.columns}"
    if not weight.is_contiguous():
        return "a matrix that is not contiguous"
    if weight_scale is not None and (weight_scale.dtype != torch.float16 or not weight_scale.is_contiguous()):
        return "scales that are not float16 and contiguous"
    return None


def matrix_obstacle(weight: torch.Tensor, weight_scale: torch.Tensor | None, columns: int, kind: Kind) -> str | None:
    """Why the kernels cannot read a matrix: whole lines, and whole scales in a line or whole lines in a scale."""
    obstacle = storage_obstacle(weight, weight_scale, columns, kind)
    if obstacle is not None or weight_scale is None:
        return obstacle
    lines, groups = columns // kind.columns, count_groups(weight_scale)
    if lines % groups and (groups % lines or 16 % (groups // lines)):
        return f"groups of {columns // groups} columns"
    return None


class CpuProducts(CpuKernelUser):
    """What multiplies with matrices on a CPU."""

    kernels_class = CpuKernels

    def check(self, kernels: CpuKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
        floats = {**random, **FLOATS}
        x = torch.randn(FEW_ROWS, 512, **floats)
        matrices = [(torch.randn(33, 512, **floats).to(dtype), None, dtype) for dtype in HALVES]
        for bits, groups in ((4, 8), (4, 1), (8, 1)):
            codes = torch.randint(-128, 128, (33, 512 * bits // 8), **random).to(torch.int8)
            scale = torch.rand((33, groups) if groups > 1 else (33,), **floats).sub(0.5).half()
            matrices.append((codes, scale, bits))
            problem = (codes, scale, bits, 512, torch.float32)
            if not torch.equal(kernels.dequantize(*problem), dequantize_naive(*problem)):
                raise KernelError(f"{kernels.kinds[bits].name} with {groups} scales is another matrix.")
        for matrix, scale, form in matrices:
            expected = multiply_naive(x if scale is None else quantize_naive(x), matrix, scale, form)
            error = ((kernels.multiply(x, matrix, scale, form) - expected).norm() / expected.norm()).item()
            if not error < CHECK_TOLERANCE:
                name, groups = kernels.kinds[form].name, count_groups(scale)
                raise KernelError(f"{name} with {groups} scales is off by {error:.2g} of the result.")


CPU_PRODUCTS = CpuProducts()
