# SPDX-License-Identifier: Apache-2.0
"""Products of several rows of activations, a decode step's of a few sequences, with low-bit matrices on a CPU.

Not here: products of one row (`cpu_products.py`) and of many (`cpu_many_rows.py`), whose tasks, tiles and sums these
are, and when which of them is used (`lowbit_products.py`).

How it is fast: with so few rows, unpacking columns into memory for all of them takes as long as multiplying them, and
nothing is read meanwhile. Here a thread takes 16 rows of the matrix, one line of theirs after the other. A line is
transposed, and its codes are unpacked in registers, right before they are multiplied with all rows of a tile: with the
high and the low bytes at once, for which the sums of a tile have a register each. Meanwhile the memory that the thread
will take next is asked for, in the order in which it lies, a little at a time: processors drop requests if there are
many at once.

The sums are those of the kernels for many rows, to the bit.
"""

from dataclasses import dataclass
from functools import partial

import torch

from .cpu_arithmetic import Arithmetic, Blocking, choose_arithmetic
from .cpu_language import (
    F16,
    F32,
    FLOATS32,
    I16,
    I32,
    WORDS,
    Fields,
    Form,
    Kernel,
    Pointer,
    Value,
    fma,
    minimum,
    splat,
    transpose,
    vector_of,
    where,
    write_kernel,
)
from .cpu_many_rows import (
    FORMS,
    GROUP_BYTES,
    INTEGERS32,
    LINE_BYTES,
    CpuManyRows,
    ManyRowsKernels,
    ManyRowsPlan,
    ManyRowsTask,
    Room,
    Shape,
    Tile,
    find_kernels,
    many_rows_naive,
    many_rows_obstacle,
)
from .cpu_products import CPU_PRODUCTS
from .cpu_runtime import LANES


TILE_ROWS = 12  # of activations: their sums take 24 of 32 registers
LEAST_ROWS = 2  # one row is multiplied faster without transposing lines
MOST_ROWS = 2 * TILE_ROWS  # more are multiplied faster with columns that are unpacked once for all of them
MEASURED_ON = ("avx512vnni", "sse4a")  # features of the processors, AMD's with AVX-512, on which that was measured
LINE_SCALES = LINE_BYTES // 2


@dataclass(frozen=True)
class LineShape(Shape):
    """What the code of a kernel for several rows depends on."""

    @property
    def name(self) -> str:
        return f"several_{super().name}"

    def room_bytes(self, rows: int, columns: int) -> int:
        """Memory that a thread needs for a line, the scales of all columns, and the sums of so many rows."""
        return LANES * LINE_BYTES + LANES * (columns // self.cell + rows) * 4


def room_at(start: Pointer, rows: Value) -> Room:
    """What a thread remembers: a transposed line of 16 rows of the matrix, the sums of all rows, and all scales."""
    line = start.of(INTEGERS32)
    sums = line[LANES * LINE_BYTES // 4].of(FLOATS32)
    return Room(line, sums[rows * LANES], sums)


def rows_of_chunk(task: Fields) -> list[Value]:
    """The numbers of a chunk's rows; those that the matrix does not have are its last one once more."""
    return [minimum(task.chunk * LANES + lane, task.outputs - 1) for lane in range(LANES)]


def row_ahead(task: Fields) -> Value:
    """The first row of what is likely to be this thread's next chunk."""
    return minimum((task.chunk + task.room_count) * LANES, task.outputs - 1)


def transpose_line(rows: list[Pointer]) -> list[Value]:
    """A line of 16 rows as 16 vectors, each of which has the next 32 bits of every row."""
    return transpose([row.of(INTEGERS32).load(LANES) for row in rows])


def unpack_scales(k: Kernel, task: Fields, room: Room) -> None:
    """Unpack the scales of a chunk: a line at a time where each cell has its own, else each for all of its cells."""
    rows = [task.scales.of(WORDS)[row * task.groups] for row in rows_of_chunk(task)]
    ahead = task.scales.of(WORDS)[row_ahead(task) * task.groups]
    in_lines = where(task.cells_per_scale < 2, task.groups // LINE_SCALES * LINE_SCALES, 0)
    with k.when(k.integer(0) < in_lines), k.loop(in_lines, LINE_SCALES) as first:
        for line in range(LANES):
            ahead[first * LANES + line * LINE_SCALES].prefetch(0)
        twos = transpose_line([row[first] for row in rows])
        halves = [half.to(I16) for two in twos for half in (two, two >> 16)]
        for number, half in enumerate(halves):
            room.scales[(first + number) * LANES].store(half.bits(F16[LANES]).to(F32))
    with k.when(in_lines < task.groups), k.loop(task.groups, start=in_lines) as number:
        scale = vector_of(row[number].load() for row in rows).bits(F16[LANES]).to(F32)
        with k.loop(task.cells_per_scale) as cell:
            room.scales[(number * task.cells_per_scale + cell) * LANES].store(scale)


def add_cell(k: Kernel, shape: Shape, line: Pointer, tile: Tile, cell: Value, ahead: Pointer) -> list[Value]:
    """The sums of a cell in the transposed line for each row of a tile, exact."""
    arithmetic, columns = shape.arithmetic, 32 // shape.bits  # of a row of the matrix in a vector
    group, within = cell // shape.cells, cell % shape.cells
    totals = [[k.variable(k.zero(I32[LANES])) for _ in range(tile.rows)] for _ in arithmetic.parts]
    if arithmetic.is_offset:
        for row, total in enumerate(totals[-1]):
            correction = tile.corrections[(group * tile.rows + row) * shape.cells + within].load()
            total.set(splat(correction, LANES))
    with k.loop(shape.cell // columns) as i:
        number = cell * (shape.cell // columns) + i
        ahead[number * LINE_BYTES].prefetch(0)
        x = tile.x[group * (tile.rows * GROUP_BYTES) + (within * shape.cell + i * columns) * arithmetic.element_bytes]
        for step, codes in enumerate(arithmetic.unpack(line[number * LANES].load(LANES), shape.bits)):
            for part, sums in zip(arithmetic.parts, totals, strict=True):
                for row, total in enumerate(sums):
                    some = x[row * GROUP_BYTES + part + step * 4].of(INTEGERS32).load()
                    total.set(arithmetic.add_dot(total.now, codes, splat(some, LANES)))
    high, *low = ([total.now for total in sums] for sums in totals)
    return [(a << 8) + b for a, b in zip(high, *low, strict=True)] if low else high


def multiply_line(k: Kernel, shape: Shape, room: Room, tile: Tile, scales: Pointer, ahead: Pointer) -> None:
    """Add the products of the transposed line with a tile of activations to the sums; `scales` are the line's."""
    with k.loop(shape.columns // shape.cell) as cell:
        totals = add_cell(k, shape, room.weights, tile, cell, ahead)
        scale = scales[cell * LANES].load(LANES)
        for row, total in enumerate(totals):
            x_scale = splat(tile.scales[cell // shape.cells * tile.rows + row].load(), LANES)
            so_far = tile.sums[row * LANES]
            so_far.store(fma(total.to(F32), scale * x_scale, so_far.load(LANES)))
        k.remember(tile.sums)  # registers are for the totals


def several_rows_naive(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Compute x @ W.T, [M, K] and [N, K] -> [M, N], in float32, as with many rows."""
    return many_rows_naive(x, weight, weight_scale, bits)


def several_rows_kernel(k: Kernel, task: Fields, shape: Shape, form: Form) -> None:
    """16 rows of the matrix times all rows of activations."""
    small, row_bytes, cells = shape.rows - 1, task.lines * LINE_BYTES, shape.columns // shape.cell
    rows = task.tiles * small + task.large_tiles
    room = room_at(task.room, rows)
    matrix = [task.matrix[row * row_bytes] for row in rows_of_chunk(task)]
    ahead = task.matrix[row_ahead(task) * row_bytes]
    unpack_scales(k, task, room)
    with k.loop(rows) as row:
        room.sums[row * LANES].store(k.zero(F32[LANES]))
    with k.loop(task.lines) as line:
        for number, column in enumerate(transpose_line([row[line * LINE_BYTES] for row in matrix])):
            room.weights[number * LANES].store(column)
        of_line = room.scales[line * (cells * LANES)], ahead[line * (LANES * LINE_BYTES)]
        with k.loop(task.large_tiles) as i:
            multiply_line(k, shape, room, Tile.at(task, shape, room, shape.rows, i * shape.rows, line), *of_line)
        if small:
            with k.when(task.large_tiles < task.tiles), k.loop(task.tiles, start=task.large_tiles) as i:
                first = i * small + task.large_tiles
                multiply_line(k, shape, room, Tile.at(task, shape, room, small, first, line), *of_line)
    out = task.out.of(form)[task.chunk * LANES]
    with k.loop(rows) as row:
        out[row * task.pitch].store(room.sums[row * LANES].load(LANES))


def write_several_rows(name: str, shape: Shape, dtype: torch.dtype) -> str:
    """Write the code of a kernel that multiplies, with a result of this dtype."""
    return write_kernel(name, ManyRowsTask, partial(several_rows_kernel, shape=shape, form=FORMS[dtype]))


# Launch


class SeveralRowsKernels(ManyRowsKernels):
    """The kernels that multiply several rows of activations of this dtype with matrices of this format."""

    shape_class = LineShape
    write = staticmethod(write_several_rows)

    def use(self, arithmetic: Arithmetic) -> None:
        """Multiply with these instructions from now on, if they are no matrix instructions."""
        is_plain = not (arithmetic.has_tiles or arithmetic.is_paired)
        self.arithmetic = arithmetic if is_plain else choose_arithmetic(self.features)
        self.blocking = Blocking(1, TILE_ROWS)


class CpuSeveralRows(CpuManyRows):
    """What multiplies several rows of activations on a CPU."""

    name = "CPU kernels for several rows"
    kernels_class = SeveralRowsKernels


CPU_SEVERAL_ROWS = CpuSeveralRows()


def several_rows_obstacle(
    dtype: torch.dtype, rows: int, weight: torch.Tensor, weight_scale: torch.Tensor, columns: int, bits: int
) -> str | None:
    """Why these kernels do not multiply activations [M, K] of this dtype with a matrix, or not faster than others."""
    if not LEAST_ROWS <= rows <= MOST_ROWS:
        return f"{rows} rows of activations, not {LEAST_ROWS} to {MOST_ROWS}"
    if CPU_PRODUCTS.kernels is None:
        return CPU_PRODUCTS.obstacle()
    if not all(map(CPU_PRODUCTS.kernels.compiler.features.get, MEASURED_ON)):
        return "a processor that they were not measured on"
    return many_rows_obstacle(dtype, rows, weight, weight_scale, columns, bits, CPU_SEVERAL_ROWS)


def plan_several_rows(rows: int, weight_scale: torch.Tensor, columns: int, bits: int) -> ManyRowsPlan:
    """Plan a product of float32 activations [rows, columns] with a matrix that has no obstacle."""
    return find_kernels(bits, columns, weight_scale, torch.float32, CPU_SEVERAL_ROWS).make_plan(rows, columns)


def multiply_several_rows(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiply activations [M, K] with a matrix of N rows that has no obstacle; return [M, N], of the dtype of `x`."""
    return find_kernels(bits, x.shape[1], weight_scale, x.dtype, CPU_SEVERAL_ROWS).multiply(x, weight, weight_scale)
