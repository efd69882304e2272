# SPDX-License-Identifier: Apache-2.0
"""Products of many rows of activations with low-bit matrices on a CPU, from the codes as they are stored.

Not here: products of a few rows (`cpu_products.py`), the language (`cpu_language.py`), the compiler and the threads
(`cpu_runtime.py`), and when which of them is used (`lowbit_products.py`).

How it is fast: with many rows arithmetic is the limit, so each code is unpacked once for all of them. A thread takes a
few rows of the matrix, 16 in the lanes of each vector, unpacks a part of their columns into memory that its core's
cache holds, and multiplies that with one tile of activations after the other. The sums of a tile stay in registers
until the scale changes. Activations are integers of 16 bits with a scale per 64 columns, as for a few rows; sums are
exact in 32 bits, scaled in float32 and added up from the first column to the last, whatever instructions a processor
has (`cpu_arithmetic.py`): so all processors compute the same bits, and no row depends on those beside it.

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix. A line is 64
bytes of a row; a cell is the columns that have a scale of the matrix and one of the activations in common.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from .cpu_arithmetic import (
    Arithmetic,
    Blocking,
    MatrixInstructions,
    Tiling,
    choose_arithmetic,
    choose_blocking,
    choose_tiling,
    find_matrix_instructions,
)
from .cpu_language import (
    BYTES,
    F16,
    F32,
    FLOATS32,
    HALVES,
    I32,
    INTEGERS,
    WORDS,
    Fields,
    Form,
    Kernel,
    Pointer,
    TileRegisters,
    Value,
    fma,
    join,
    minimum,
    splat,
    total_of,
    transpose,
    vector_of,
    where,
    write_kernel,
)
from .cpu_products import (
    ACTIVATIONS,
    GROUP,
    KINDS,
    LARGEST_CODE,
    SMALLEST_NORMAL,
    quantize_group,
    storage_obstacle,
)
from .cpu_runtime import FLOATS, LANES, CpuKernelUser, Function, Kernels, Stage, Task
from .kernel_choice import KernelError, name_of
from .lowbit_format import count_groups, unpack_int4


LINE_BYTES = 64  # of the matrix
GROUP_BYTES = 2 * GROUP  # of activations
VECTOR_BYTES = 64  # of 16 lanes
MOST_STEPS = 2  # vectors of columns at a time, 1 or 2: for more, LLVM runs out of registers
PART_COLUMNS = 4096  # of the matrix that are unpacked at a time
MOST_BYTES = 2**22  # of quantized activations at a time: columns are unpacked once for them, and caches hold them
CELLS = (64, 32, 16, 8)  # columns that a cell can have
MOST_OUTPUTS = 64  # of any blocking
AHEAD = 256  # bytes of a row that are asked for before they are needed
INTEGERS32 = Form(I32)
FORMS = {torch.float32: FLOATS32, **HALVES}  # of the activations and of the result
MEASURED_ROWS, MEASURED_MATRIX, MEASURED_TIMES = 64, (1024, 4096), 5  # some milliseconds
CHECK_TOLERANCE = 1e-3  # relative error of the self-check: the same bits are expected, but for a tie of half precision


@dataclass(frozen=True)
class Shape:
    """What the code of a kernel depends on.

    Args:
        bits: of the matrix.
        cell: columns that have a scale of the matrix in common, or a part of them.
        arithmetic, blocking: of the processor.
        rows: of activations in a large tile; there are tiles of one row less, too, if that is any.
    """

    bits: int
    cell: int
    arithmetic: Arithmetic
    blocking: Blocking
    rows: int

    @property
    def name(self) -> str:
        return f"int{self.bits}_{self.cell}_{self.blocking.vectors}x{self.rows}_{self.arithmetic.kind}"

    @property
    def columns(self) -> int:
        """In a line."""
        return LINE_BYTES * 8 // self.bits

    @property
    def part_lines(self) -> int:
        """Lines that are unpacked at a time."""
        return PART_COLUMNS // self.columns

    @property
    def cells(self) -> int:
        """In a group."""
        return GROUP // self.cell

    @property
    def group_vectors(self) -> int:
        """In a group of columns of 16 rows of the matrix."""
        return GROUP // self.arithmetic.columns

    @property
    def weight_bytes(self) -> int:
        return self.blocking.outputs * PART_COLUMNS * self.arithmetic.element_bytes

    @property
    def scale_bytes(self) -> int:
        return self.blocking.outputs * PART_COLUMNS // self.cell * 4

    def room_bytes(self, rows: int, columns: int) -> int:
        """Memory that a thread needs for the unpacked columns, their scales, and the sums of so many rows."""
        return self.weight_bytes + self.scale_bytes + self.blocking.outputs * rows * 4


class ManyRowsTask(Task):
    """Addresses of a matrix and its scales, of quantized activations and their scales, and of the result.

    `rooms` are what the threads remember, of which `next_room` is the first that no thread has taken.
    """

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_scales", ctypes.c_void_p),
        ("x_corrections", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rooms", ctypes.c_void_p),
        ("room_bytes", ctypes.c_int64),
        ("room_count", ctypes.c_int64),
        ("next_room", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("pitch", ctypes.c_int64),  # numbers in a row of the result
        ("lines", ctypes.c_int64),  # in a row of the matrix
        ("groups", ctypes.c_int64),  # scales in a row of the matrix
        ("cells_per_scale", ctypes.c_int64),
        ("large_tiles", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
    )

    def restart(self) -> None:
        super().restart()
        self.next_room = 0


class QuantizeRowsTask(Task):
    """Addresses of activations, and of their codes and scales; a chunk is a tile."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("corrections", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("rows", ctypes.c_int64),  # in a large tile
        ("large_tiles", ctypes.c_int64),
    )


# Kernels


def find_tile(tile: Value, rows: Value, large: Value) -> tuple[Value, Value]:
    """The first row of a tile, and how many it has; see `Tiling`."""
    return tile * (rows - 1) + minimum(tile, large), where(tile < large, rows, rows - 1)


def quantize_rows_naive(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes [M, K / 64, 64] of activations [M, K] and their scales [M, K / 64], both in float32."""
    groups = x.float().unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1) * (1 / LARGEST_CODE)
    factors = 1 / scales.clamp(min=SMALLEST_NORMAL)[..., None]
    return (groups.double() * factors).round().float(), scales  # rounded once


def quantize_rows_kernel(k: Kernel, task: Fields, shape: Shape, form: Form) -> None:
    """The rows of a tile: of each group in turn, its 64 columns and its scale in all rows, and what is taken off."""
    first, rows = find_tile(task.chunk, task.rows, task.large_tiles)
    groups = task.columns // GROUP
    with k.loop(groups) as group, k.loop(rows) as row:
        x, scale = quantize_group(task.x.of(form)[(first + row) * task.columns + group * GROUP])
        at = first * groups + group * rows + row
        shape.arithmetic.store(x, task.codes[at * GROUP_BYTES], shape.bits)
        task.scales.of(FLOATS32)[at].store(scale)
        if shape.arithmetic.is_offset:
            for cell in range(shape.cells):
                total = total_of(x.take(range(cell * shape.cell, (cell + 1) * shape.cell)).to(I32))
                task.corrections.of(INTEGERS32)[at * shape.cells + cell].store(total * -(2 ** (shape.bits - 1)))


class Room(NamedTuple):
    """What a thread remembers: the unpacked columns of a part of the matrix, their scales, and the sums of all rows."""

    weights: Pointer
    scales: Pointer
    sums: Pointer

    @classmethod
    def at(cls, start: Pointer, shape: Shape) -> "Room":
        scales = start[shape.weight_bytes]
        return cls(start.of(INTEGERS32), scales.of(FLOATS32), scales[shape.scale_bytes].of(FLOATS32))


def unpack_part(k: Kernel, task: Fields, shape: Shape, room: Room, first_line: Value, end: Value) -> None:
    """Unpack some lines of the rows of a chunk; rows that the matrix does not have are its last one once more."""
    vectors, cells, row_bytes = shape.blocking.vectors, shape.columns // shape.cell, task.lines * LINE_BYTES
    with k.loop(vectors) as vector:
        first = task.chunk * shape.blocking.outputs + vector * LANES
        rows = [minimum(first + lane, task.outputs - 1) for lane in range(LANES)]
        matrix = [task.matrix[row * row_bytes] for row in rows]
        scales = [task.scales.of(WORDS)[row * task.groups] for row in rows]
        with k.loop(end, start=first_line) as line:
            at = line - first_line
            for row in matrix:
                row[line * LINE_BYTES].prefetch(AHEAD)
                row[line * LINE_BYTES + row_bytes * LANES].prefetch(0)
            fours = transpose([row[line * LINE_BYTES].of(INTEGERS32).load(LANES) for row in matrix])
            unpacked = [codes for four in fours for codes in shape.arithmetic.unpack(four, shape.bits)]
            unpacked = shape.arithmetic.arrange(unpacked)
            weights = room.weights[(at * (len(unpacked) * vectors) + vector) * LANES]
            for number, codes in enumerate(unpacked):
                weights[number * vectors * LANES].store(codes)
            for cell in range(cells):
                scale = (line * cells + cell) // task.cells_per_scale
                halves = vector_of(row[scale].load() for row in scales)
                room.scales[((at * cells + cell) * vectors + vector) * LANES].store(halves.bits(F16[LANES]).to(F32))


class Tile(NamedTuple):
    """Some rows of activations, and their sums so far, at the part of the columns that is unpacked."""

    rows: int
    x: Pointer
    scales: Pointer
    corrections: Pointer
    sums: Pointer

    @classmethod
    def at(cls, task: Fields, shape: Shape, room: Room, rows: int, first_row: Value, first_line: Value) -> "Tile":
        per_line = shape.columns // GROUP
        before = first_row * (task.lines * per_line) + first_line * (per_line * rows)  # groups of activations
        scales, corrections = task.x_scales.of(FLOATS32), task.x_corrections.of(INTEGERS32)
        sums = room.sums[first_row * shape.blocking.outputs]
        return cls(rows, task.x[before * GROUP_BYTES], scales[before], corrections[before * shape.cells], sums)

    def correction(self, shape: Shape, group: Value, cell: int, row: int) -> Value:
        """What is taken off the sums of a row in a cell."""
        return self.corrections[(group * self.rows + row) * shape.cells + cell].load()


Totals = Callable[[int, int], Value]  # the sums of a row of activations with a vector of rows of the matrix


def add_cell(k: Kernel, shape: Shape, room: Room, tile: Tile, group: Value, cell: int) -> Totals:
    """The sums of a cell, exact."""
    arithmetic, vectors, steps = shape.arithmetic, shape.blocking.vectors, shape.cell // shape.arithmetic.columns
    totals = [[k.variable(k.zero(I32[LANES])) for _ in range(vectors)] for _ in range(tile.rows)]
    for part in arithmetic.parts:
        for row in range(tile.rows if part else 0):
            correction = tile.correction(shape, group, cell, row) if arithmetic.is_offset else 0
            for total in totals[row]:
                total.set((total.now << 8) + correction)
        unroll = min(MOST_STEPS, steps)
        with k.loop(steps, unroll) as i:
            for step in (i + (cell * steps + number) for number in range(unroll)):
                weights = room.weights[(group * shape.group_vectors + step) * (vectors * LANES)]
                columns = [weights[vector * LANES].load(LANES) for vector in range(vectors)]
                for row in range(tile.rows):
                    x = tile.x[(group * tile.rows + row) * GROUP_BYTES + step * 4 + part].of(INTEGERS32).load()
                    for total, column in zip(totals[row], columns, strict=True):
                        total.set(arithmetic.add_dot(total.now, column, splat(x, LANES)))
    return lambda row, vector: totals[row][vector].now


def add_cell_in_pairs(k: Kernel, shape: Shape, room: Room, tile: Tile, group: Value, cell: int) -> Totals:
    """The same sums, of two rows of activations and two of the matrix at a time; an odd row is its own other one."""
    arithmetic, vectors, steps = shape.arithmetic, shape.blocking.vectors, shape.cell // shape.arithmetic.columns
    pairs = [(row, min(row + 1, tile.rows - 1)) for row in range(0, tile.rows, 2)]
    totals = [[k.variable(k.zero(I32[4])) for _ in range(vectors * LANES // 2)] for _ in pairs]
    for part in arithmetic.parts:
        for total in (total for pair in totals if part for total in pair):
            total.set(total.now << 8)
        with k.loop((cell + 1) * steps, 2, cell * steps) as step:
            weights = room.weights[(group * shape.group_vectors + step) * (vectors * LANES)]
            halves = [weights[(half * vectors + vector) * LANES] for vector in range(vectors) for half in (0, 1)]
            columns = [half[two].load(4) for half in halves for two in range(0, LANES, 4)]
            for pair, rows in zip(totals, pairs, strict=True):
                eights = (tile.x[(group * tile.rows + row) * GROUP_BYTES + step * 4 + part] for row in rows)
                x = join(*(eight.of(INTEGERS).load() for eight in eights))
                for total, column in zip(pair, columns, strict=True):
                    total.set(arithmetic.add_dot(total.now, x, column))

    def total_of_row(row: int, vector: int) -> Value:
        first = row % 2 * 2
        twos = [total.now.take((first, first + 1)) for total in totals[row // 2][vector * 8 : vector * 8 + 8]]
        while len(twos) > 1:
            twos = [join(*two) for two in zip(twos[::2], twos[1::2], strict=True)]
        return twos[0]

    return total_of_row


# Tile registers: the sums of the high bytes with two vectors, of the low bytes with two, these bytes, those vectors.
HIGH_SUMS, LOW_SUMS, HIGH_BYTES, LOW_BYTES, VECTORS = (0, 1), (2, 3), 4, 5, (6, 7)
TILE_BYTES = LANES * VECTOR_BYTES


def shape_tiles(shape: Shape, rows: int) -> list[tuple[int, int]]:
    """The rows and bytes of the tile registers."""
    return [(rows, VECTOR_BYTES)] * 4 + [(rows, shape.cell)] * 2 + [(shape.cell // 4, VECTOR_BYTES)] * 2


def add_cell_with_tiles(
    registers: TileRegisters, shape: Shape, room: Room, sums: Pointer, tile: Tile, group: Value, cell: int
) -> Totals:
    """The same sums by matrix instructions, through memory for four registers."""
    vectors = shape.blocking.vectors
    x = tile.x[group * (tile.rows * GROUP_BYTES) + cell * shape.cell]
    weights = room.weights[(group * shape.group_vectors + cell * shape.cell // 4) * (vectors * LANES)]
    for number, part in zip((HIGH_BYTES, LOW_BYTES), shape.arithmetic.parts, strict=True):
        registers.load(number, x[part], GROUP_BYTES)
    for vector, number in enumerate(VECTORS):
        registers.load(number, weights[vector * LANES], vectors * VECTOR_BYTES)
    for totals, number in ((HIGH_SUMS, HIGH_BYTES), (LOW_SUMS, LOW_BYTES)):
        for total, vector in zip(totals, VECTORS, strict=True):
            registers.clear(total)
            registers.add_dot(total, number, vector)
            registers.store(total, sums[total * TILE_BYTES], VECTOR_BYTES)

    def total_of_both(row: int, vector: int) -> Value:
        high, low = (
            sums[number * TILE_BYTES + row * VECTOR_BYTES].of(INTEGERS32).load(LANES)
            for number in (HIGH_SUMS[vector], LOW_SUMS[vector])
        )
        return (high << 8) + low + tile.correction(shape, group, cell, row)

    return total_of_both


def multiply_tile(k: Kernel, shape: Shape, room: Room, tile: Tile, groups: Value) -> None:
    """Add the products of so many groups of unpacked columns with a tile of activations to the sums."""
    outputs, add_sums = shape.blocking.outputs, add_cell_in_pairs if shape.arithmetic.is_paired else add_cell
    add = partial(add_sums, k, shape, room)
    if shape.arithmetic.has_tiles:
        registers = TileRegisters(k)
        registers.shape(shape_tiles(shape, tile.rows))
        add = partial(add_cell_with_tiles, registers, shape, room, k.room(4 * TILE_BYTES, BYTES))
    with k.loop(groups) as group:
        for cell in range(shape.cells):
            total = add(tile, group, cell)
            at = room.scales[(group * shape.cells + cell) * outputs]
            scales = [at[first].load(LANES) for first in range(0, outputs, LANES)]
            for row in range(tile.rows):
                x_scale = splat(tile.scales[group * tile.rows + row].load(), LANES)
                for vector, scale in enumerate(scales):
                    so_far = tile.sums[row * outputs + vector * LANES]
                    so_far.store(fma(total(row, vector).to(F32), scale * x_scale, so_far.load(LANES)))
            k.remember(tile.sums)  # registers are for the totals
    if shape.arithmetic.has_tiles:
        registers.release()


def many_rows_naive(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Compute x @ W.T, [M, K] and [N, K] -> [M, N], in float32, cell after cell as the kernel does."""
    cell = find_cell(x.shape[1] // count_groups(weight_scale))
    cells = x.shape[1] // cell
    codes, scales = quantize_rows_naive(x)
    x_cells, x_scales = codes.reshape(len(x), cells, cell), scales.repeat_interleave(GROUP // cell, 1)
    matrix = (unpack_int4(weight, x.shape[1]) if bits == 4 else weight).float().reshape(-1, cells, cell)
    matrix_scales = weight_scale.float().reshape(len(weight), -1)
    matrix_scales = matrix_scales.repeat_interleave(cells // matrix_scales.shape[1], 1)
    total = torch.zeros(len(x), len(weight), **FLOATS)
    for i in range(cells):
        sums = (x_cells[:, i].double() @ matrix[:, i].double().T).float()
        total = torch.addcmul(total.double(), sums.double(), torch.outer(x_scales[:, i], matrix_scales[:, i]).double())
        total = total.float()  # rounded once
    return total


def many_rows_kernel(k: Kernel, task: Fields, shape: Shape, form: Form) -> None:
    """Some rows of the matrix times all rows of activations."""
    room, outputs, small = Room.at(task.room, shape), shape.blocking.outputs, shape.rows - 1
    rows = task.tiles * small + task.large_tiles
    with k.loop(rows * shape.blocking.vectors) as i:
        room.sums[i * LANES].store(k.zero(F32[LANES]))
    with k.loop(task.lines, shape.part_lines) as line:
        end = minimum(line + shape.part_lines, task.lines)
        groups = (end - line) * (shape.columns // GROUP)
        unpack_part(k, task, shape, room, line, end)
        with k.loop(task.large_tiles) as i:
            multiply_tile(k, shape, room, Tile.at(task, shape, room, shape.rows, i * shape.rows, line), groups)
        if small:
            with k.when(task.large_tiles < task.tiles), k.loop(task.tiles, start=task.large_tiles) as i:
                first = i * small + task.large_tiles
                multiply_tile(k, shape, room, Tile.at(task, shape, room, small, first, line), groups)
    out = task.out.of(form)[task.chunk * outputs]
    with k.loop(rows) as row:
        for first in range(0, outputs, LANES):
            out[row * task.pitch + first].store(room.sums[row * outputs + first].load(LANES))


def write_many_rows(name: str, shape: Shape, dtype: torch.dtype) -> str:
    """Write the code of a kernel that multiplies, with a result of this dtype."""
    return write_kernel(name, ManyRowsTask, partial(many_rows_kernel, shape=shape, form=FORMS[dtype]))


def write_row_quantization(name: str, shape: Shape, dtype: torch.dtype) -> str:
    """Write the code of a kernel that quantizes activations of this dtype."""
    return write_kernel(name, QuantizeRowsTask, partial(quantize_rows_kernel, shape=shape, form=FORMS[dtype]))


# Launch


class ManyRowsPlan(NamedTuple):
    """How activations [M, K] and a matrix [N, K] of some format are multiplied."""

    shape: Shape
    tiling: Tiling
    quantize: Function
    multiply: Function
    rows: int  # M, of at most MOST_BYTES
    columns: int  # K
    threads: int  # at most

    @property
    def code_bytes(self) -> int:
        return self.rows * self.columns * 2

    @property
    def scale_bytes(self) -> int:
        return self.rows * self.columns // GROUP * 4

    @property
    def correction_bytes(self) -> int:
        return self.rows * self.columns // self.shape.cell * 4 if self.shape.arithmetic.is_offset else 0

    @property
    def quantized_bytes(self) -> int:
        """Of what is known of the activations, and of what the threads remember."""
        room_bytes = self.threads * self.shape.room_bytes(self.rows, self.columns)
        return self.code_bytes + self.scale_bytes + self.correction_bytes + room_bytes

    def stages(
        self, x: int, quantized: int, weight: torch.Tensor, weight_scale: torch.Tensor, out: int, pitch: int = 0
    ) -> list[Stage]:
        """List what is to be done, one after the other.

        Args:
            x: the address of the activations.
            quantized: the address of `quantized_bytes` bytes.
            weight, weight_scale: the matrix.
            out: the address of the result, [M, pitch].
            pitch: a multiple of the outputs in a chunk, at least N, which it is by default.
        """
        pitch = pitch or len(weight)
        scales = quantized + self.code_bytes
        corrections = scales + self.scale_bytes
        rooms = corrections + self.correction_bytes
        groups, rows, large, tiles = count_groups(weight_scale), *self.tiling
        quantize = QuantizeRowsTask(tiles, 0, x, quantized, scales, corrections, self.columns, rows, large)
        addresses = (weight.data_ptr(), weight_scale.data_ptr(), quantized, scales, corrections, out)
        room = (rooms, self.shape.room_bytes(self.rows, self.columns), self.threads, 0)
        sizes = (len(weight), pitch, self.columns // self.shape.columns)
        scaling = (groups, self.columns // groups // self.shape.cell)
        product = ManyRowsTask(
            pitch // self.shape.blocking.outputs, 0, *addresses, *room, *sizes, *scaling, large, tiles
        )
        return [Stage(self.quantize, quantize, self.threads), Stage(self.multiply, product, self.threads)]


class ManyRowsKernels(Kernels):
    """The kernels that multiply many rows of activations of this dtype with matrices of this format.

    Args:
        bits: of the matrices.
        cell: columns, of which the groups of the matrices are multiples.
        dtype: of the activations and the result.
    """

    shape_class = Shape
    write = staticmethod(write_many_rows)

    def __init__(self, llvm, bits: int, cell: int, dtype: torch.dtype):
        super().__init__(llvm)
        self.features = self.compiler.features
        self.matrix_instructions = find_matrix_instructions(self.compiler.processor, self.features)
        untried = self.matrix_instructions.obstacle is not None
        self.use(choose_arithmetic(self.features) if untried else self.matrix_instructions.arithmetic)
        self.bits, self.cell, self.dtype = bits, cell, dtype

    def use(self, arithmetic: Arithmetic) -> None:
        """Multiply with these instructions from now on."""
        self.arithmetic, self.blocking = arithmetic, choose_blocking(self.features, arithmetic)

    def drop_matrix_instructions_unless_faster(self) -> None:
        """Go on without matrix instructions if they are not faster here: where they are, nobody has measured."""
        matrix, plain = self.arithmetic, choose_arithmetic(self.features)
        with_matrix, without = self.measure(matrix), self.measure(plain)
        is_faster = with_matrix < without
        if not is_faster:
            obstacle = f"it took {1000 * with_matrix:.1f} ms where {plain.name} took {1000 * without:.1f}"
            self.matrix_instructions = self.matrix_instructions._replace(obstacle=obstacle)
        self.use(matrix if is_faster else plain)

    def measure(self, arithmetic: Arithmetic) -> float:
        """Seconds of a product of a short prompt with these instructions, the shortest of a few."""
        self.use(arithmetic)
        outputs, columns = MEASURED_MATRIX
        x = torch.ones(MEASURED_ROWS, columns, dtype=self.dtype, device="cpu")
        codes = torch.zeros(outputs, columns * self.bits // 8, dtype=torch.int8, device="cpu")
        scale = torch.ones(outputs, columns // self.cell, dtype=torch.float16, device="cpu")
        self.multiply(x, codes, scale)
        seconds = []
        for _ in range(MEASURED_TIMES):
            start = time.perf_counter()
            self.multiply(x, codes, scale)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def make_plan(self, rows: int, columns: int) -> ManyRowsPlan:
        """Plan a product of activations [rows, columns]."""
        tiling = choose_tiling(rows, self.blocking.rows)
        shape = self.shape_class(self.bits, self.cell, self.arithmetic, self.blocking, tiling.rows)
        multiply = self.compiled(shape.name, partial(self.write, shape=shape, dtype=self.dtype))
        quantize = self.compiled(
            f"quantize_{self.arithmetic.kind}", partial(write_row_quantization, shape=shape, dtype=self.dtype)
        )
        return ManyRowsPlan(shape, tiling, quantize, multiply, rows, columns, torch.get_num_threads())

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        """Multiply activations [M, K] with a matrix of N rows; return [M, N]."""
        outputs = len(weight)
        pitch = -(-outputs // self.blocking.outputs) * self.blocking.outputs
        out = torch.empty(len(x), pitch, dtype=self.dtype, device="cpu")
        pieces = min(len(x), -(-2 * x.numel() // MOST_BYTES))
        for some, of_some in zip(x.contiguous().chunk(pieces), out.chunk(pieces), strict=True):
            plan = self.make_plan(*some.shape)
            quantized = torch.empty(plan.quantized_bytes, dtype=torch.uint8, device="cpu")
            addresses = (some.data_ptr(), quantized.data_ptr())
            for stage in plan.stages(*addresses, weight, weight_scale, of_some.data_ptr(), pitch):
                self.pool.run(*stage)
        return out[:, :outputs].contiguous()


def find_cell(group: int) -> int | None:
    """The columns of a cell, for groups of the matrix of so many columns; None if the kernels cannot have them."""
    return next((cell for cell in CELLS if group % cell == 0), None)


def many_rows_obstacle(
    dtype: torch.dtype,
    rows: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    columns: int,
    bits: int,
    user: CpuKernelUser | None = None,
) -> str | None:
    """Why no kernel, of another user if one is given, multiplies activations [M, K] of this dtype with a matrix."""
    if dtype not in ACTIVATIONS:
        return f"{name_of(dtype)} activations"
    if rows == 0:
        return "no rows of activations"
    obstacle = storage_obstacle(weight, weight_scale, columns, KINDS[bits])
    if obstacle is not None:
        return obstacle
    group = columns // count_groups(weight_scale)
    if find_cell(group) is None:
        return f"groups of {group} columns"
    return (user or CPU_MANY_ROWS).obstacle((bits, find_cell(group), dtype))


def find_kernels(
    bits: int, columns: int, weight_scale: torch.Tensor, dtype: torch.dtype, user: CpuKernelUser | None = None
) -> ManyRowsKernels:
    """The kernels for activations of this dtype and a matrix that has no obstacle; see `many_rows_obstacle`."""
    return (user or CPU_MANY_ROWS).find((bits, find_cell(columns // count_groups(weight_scale)), dtype))


def plan_many_rows(rows: int, weight_scale: torch.Tensor, columns: int, bits: int) -> ManyRowsPlan:
    """Plan a product of float32 activations [rows, columns] with a matrix that has no obstacle."""
    return find_kernels(bits, columns, weight_scale, torch.float32).make_plan(rows, columns)


def multiply_many_rows(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiply activations [M, K] with a matrix of N rows that has no obstacle; return [M, N], of the dtype of `x`."""
    return find_kernels(bits, x.shape[1], weight_scale, x.dtype).multiply(x, weight, weight_scale)


class CpuManyRows(CpuKernelUser):
    """What multiplies many rows of activations on a CPU: its kernels, by bits, cell and dtype of the activations.

    They are made and checked when they are first needed, so that a first prompt does not wait for those of others.
    """

    name = "CPU kernels for many rows"
    kernels_class = ManyRowsKernels

    def check(self, kernels: ManyRowsKernels) -> None:
        bits, cell, random = kernels.bits, kernels.cell, {"generator": torch.Generator("cpu").manual_seed(0)}
        rows, columns = 2 * kernels.blocking.rows - 1, PART_COLUMNS + 128  # tiles of both sizes, two parts
        x = torch.randn(rows, columns, **random, **FLOATS).to(kernels.dtype)
        codes = torch.randint(-128, 128, (33, columns * bits // 8), **random, device="cpu").to(torch.int8)
        scale = torch.rand(33, columns // cell, **random, **FLOATS).sub(0.5).half()
        expected = many_rows_naive(x, codes, scale, bits).to(kernels.dtype).float()
        error = ((kernels.multiply(x, codes, scale).float() - expected).norm() / expected.norm()).item()
        if not error < CHECK_TOLERANCE:
            raise KernelError(f"int{bits} of many rows with groups of {cell} is off by {error:.2g} of the result.")
        if kernels.arithmetic is kernels.matrix_instructions.arithmetic:
            kernels.drop_matrix_instructions_unless_faster()


CPU_MANY_ROWS = CpuManyRows()


def find_instructions() -> tuple[str, MatrixInstructions] | None:
    """What the kernels that have been made multiply with, and the processor's own; None if none have been made."""
    kernels = next((kernels for kernels in CPU_MANY_ROWS.found.values() if kernels is not None), None)
    return kernels and (kernels.arithmetic.name, kernels.matrix_instructions)
