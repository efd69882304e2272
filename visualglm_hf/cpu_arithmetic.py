# SPDX-License-Identifier: Apache-2.0
"""What processors multiply integers with: instructions, and the order in which codes and activations have to lie.

Not here: the kernels that multiply many rows (`cpu_many_rows.py`), the language (`cpu_language.py`), and how
instructions are tried that may end a process (`instruction_trial.py`).

Activations are integers of 16 bits. A processor that adds up products of words, two at a time, takes them as they are;
one that adds up products of bytes, four at a time, takes their high bytes first and then their low ones, both signed.
That makes the same sums. Words or bytes, an *element* is what each product takes, a *vector* has a few elements of each
of 16 rows of a matrix. Matrix instructions multiply several rows of activations by several of a matrix; they have to
show on each machine that they work, and that they are faster.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .cpu_language import (
    ARM,
    I8,
    I16,
    I32,
    WORDS,
    Form,
    Kernel,
    Pointer,
    TileRegisters,
    Value,
    join,
    shuffle,
    write_function,
)
from .cpu_products import GROUP, add_dot_avx512vnni, add_dot_avxvnni, dot
from .cpu_runtime import LANES
from .instruction_trial import Trial, ask_permission, trial_obstacle


OFFSETS = {4: 0x88888888, 8: 0x80808080}  # the highest bits of the codes in 32 bits
LOW_HALVES = 0x0F0F0F0F


def add_dot_of_words(total: Value, a: Value, b: Value) -> Value:
    """Add products of signed words, summed in pairs."""
    return total + dot(a.bits(I16[2 * LANES]), b.bits(I16[2 * LANES]))


def add_dot_dotprod(total: Value, a: Value, b: Value) -> Value:
    """Add products of signed bytes, summed in fours, on ARM."""
    name, parts = "llvm.aarch64.neon.sdot.v4i32.v16i8", []
    for first in range(0, LANES, 4):
        part, *operands = (value.take(range(first, first + 4)) for value in (total, a, b))
        parts.append(total.kernel.call(I32[4], name, part, *(operand.bits(I8[16]) for operand in operands)))
    return join(join(*parts[:2]), join(*parts[2:]))


def add_products_i8mm(totals: Value, a: Value, b: Value) -> Value:
    """Add the four products of two rows [2, 8] of signed bytes with two others to sums [2, 2], on ARM."""
    return totals.kernel.call(I32[4], "llvm.aarch64.neon.smmla.v4i32.v16i8", totals, a.bits(I8[16]), b.bits(I8[16]))


@dataclass(frozen=True)
class Arithmetic:
    """How a processor multiplies.

    Args:
        name: of what it does it with.
        element_bytes: 2 for words, 1 for bytes.
        add_dot: writes how the products of a vector of the matrix and one of activations are added to 16 sums, all of
            32 bits; None for a processor that multiplies with tile registers.
        is_offset: whether the elements of the matrix are unsigned: 8, or 128, more than the codes. That adds as many
            times the activations, which is taken off for each cell as a whole.
        is_paired: whether `add_dot` takes 8 columns of two rows of activations and of two of the matrix instead, and
            adds to four sums; a vector and the next one then have 8 columns of 8 rows each.
    """

    name: str
    element_bytes: int
    add_dot: Callable[[Value, Value, Value], Value] | None
    is_offset: bool = False
    is_paired: bool = False

    @property
    def has_tiles(self) -> bool:
        return self.add_dot is None

    @property
    def kind(self) -> str:
        """What it multiplies, for the names of functions."""
        if self.has_tiles or self.is_paired:
            return "tiles" if self.has_tiles else "pairs"
        return {1: "bytes", 2: "words"}[self.element_bytes]

    @property
    def columns(self) -> int:
        """Of each row in a vector."""
        return 4 // self.element_bytes

    @property
    def parts(self) -> range:
        """Where the words of a group of activations begin, or their high bytes and their low ones."""
        return range(0, 2 * GROUP, self.element_bytes * GROUP)

    def unpack(self, fours: Value, bits: int) -> list[Value]:
        """The vectors of codes that 32 bits of each row have."""
        width = 8 * self.element_bytes
        if self.is_offset:
            unsigned = fours ^ OFFSETS[bits]
            return [unsigned & LOW_HALVES, (unsigned >> 4) & LOW_HALVES] if bits == 4 else [unsigned]
        elements = fours.bits((I16 if width == 16 else I8)[LANES * 32 // width])
        kept = width - bits
        planes = [(elements << (kept - low)).shift_signed(kept) for low in range(0, width, bits)]
        return [plane.bits(I32[LANES]) for plane in planes]

    def arrange(self, vectors: list[Value]) -> list[Value]:
        """Vectors of codes, of which each has the next columns of 16 rows, as they are multiplied."""
        if not self.is_paired:
            return vectors
        both = [place for lane in range(LANES) for place in (lane, lane + LANES)]
        twos = zip(vectors[::2], vectors[1::2], strict=True)
        return [shuffle(*two, half) for two in twos for half in (both[:LANES], both[LANES:])]

    def order(self, bits: int) -> list[int]:
        """The columns of a group in the order of the elements of its vectors; of 4 bits, the high half comes first."""
        width = 8 * self.element_bytes
        places = [first + low for low in range(0, width, bits) for first in range(0, 32, width)]
        within = [place // bits ^ (bits == 4) for place in places]
        return [first + column for first in range(0, GROUP, 32 // bits) for column in within]

    def store(self, x: Value, at: Pointer, bits: int) -> None:
        """Store a group of activations, 64 words, for codes of so many bits."""
        words = x.take(self.order(bits))
        if self.element_bytes == 2:
            at.of(WORDS).store(words)
        else:
            for part, element in zip(self.parts, ((words + 128).shift_signed(8), words), strict=True):
                at[part].store(element.to(I8))


AMX = Arithmetic("AMX", 1, None, True)
AMX_FEATURES = ("amx-tile", "amx-int8", "avx512bw")
AMX_PERMISSION = (158, 0x1023, 18)  # arch_prctl, ARCH_REQ_XCOMP_PERM, of the state of the tile registers
I8MM = Arithmetic("ARM matrix products", 1, add_products_i8mm, is_paired=True)
ARITHMETICS = {  # by the feature of the processor that has the instruction, the fastest first
    "avx512vnni": Arithmetic("AVX-512 VNNI", 1, add_dot_avx512vnni, True),
    "avxvnni": Arithmetic("AVX-VNNI", 1, add_dot_avxvnni, True),
    "dotprod": Arithmetic("ARM dot products", 1, add_dot_dotprod),
}
ARITHMETIC_OF_WORDS = Arithmetic("words of 16 bits", 2, add_dot_of_words)


def choose_arithmetic(features: Mapping[str, bool]) -> Arithmetic:
    """Choose for a processor, without matrix instructions."""
    return next((way for name, way in ARITHMETICS.items() if features.get(name)), ARITHMETIC_OF_WORDS)


@dataclass(frozen=True)
class Blocking:
    """What a processor's registers hold: the sums of `vectors` x 16 rows of the matrix and `rows` of activations."""

    vectors: int
    rows: int

    @property
    def outputs(self) -> int:
        return self.vectors * LANES


def choose_blocking(features: Mapping[str, bool], arithmetic: Arithmetic) -> Blocking:
    """Choose for a processor: one with AVX-512 has 32 registers of 16 lanes, others the room of 8 or so."""
    if arithmetic.has_tiles:
        return Blocking(2, 16)
    return Blocking(4, 6) if features.get("avx512bw") else Blocking(1, 6)


class Tiling(NamedTuple):
    """The rows of activations as tiles: `large` ones of `rows`, then those of one row less, `count` in all."""

    rows: int
    large: int
    count: int


def choose_tiling(rows: int, most: int) -> Tiling:
    """Choose the fewest tiles that hold so many rows, of sizes as equal as can be."""
    count = -(-rows // most)
    size = -(-rows // count)
    return Tiling(size, rows - count * (size - 1), count)


# Matrix instructions: not used before they were tried in a child process, and are faster here


class MatrixInstructions(NamedTuple):
    """Those of this kind of processor, and why they are not used; None if nothing is known against them."""

    arithmetic: Arithmetic
    obstacle: str | None


def find_matrix_instructions(processor: str, features: Mapping[str, bool]) -> MatrixInstructions:
    """Find those of a processor of this name and with these features, and try them."""
    if platform.machine().lower() in ARM:
        return MatrixInstructions(I8MM, i8mm_obstacle(processor, features))
    return MatrixInstructions(AMX, amx_obstacle(processor, features))


def amx_trial_kernel(k: Kernel, memory: Pointer) -> None:
    """Add the products of the bytes [16, 64] in the second KiB and of those [16, 16, 4] in the third to the first."""
    registers = TileRegisters(k)
    registers.shape([(16, 64)] * 3)
    for number in range(3):
        registers.load(number, memory[1024 * number], 64)
    registers.add_dot(0, 1, 2)
    registers.store(0, memory, 64)
    registers.release()


def amx_trial_naive(memory: torch.Tensor) -> torch.Tensor:
    """The uint8 [3, 1024] as they are after `amx_trial_kernel`."""
    total = memory[0].view(torch.int32).view(16, 16)
    a, b = memory[1].view(torch.int8).view(16, 64), memory[2].view(16, 16, 4).transpose(1, 2).reshape(64, 16)
    total = (total + a.int() @ b.int()).view(torch.uint8).view(1, 1024)
    return torch.cat((total, memory[1:]))


def i8mm_trial_kernel(k: Kernel, memory: Pointer) -> None:
    """Add the products of the bytes [2, 8] in the second 16 and of those in the third to the first."""
    totals, a, b = (memory[16 * number].of(Form(I32)) for number in range(3))
    totals.store(add_products_i8mm(totals.load(4), a.load(4), b.load(4)))


def i8mm_trial_naive(memory: torch.Tensor) -> torch.Tensor:
    """The uint8 [3, 16] as they are after `i8mm_trial_kernel`."""
    a, b = (some.view(torch.int8).view(2, 8).int() for some in memory[1:])
    total = (memory[0].view(torch.int32).view(2, 2) + a @ b.T).view(torch.uint8).view(1, 16)
    return torch.cat((total, memory[1:]))


def make_amx_trial() -> Trial:
    """What a child process has to compute before AMX is used."""
    return make_trial(AMX, amx_trial_kernel, amx_trial_naive, 1024, AMX_PERMISSION)


def make_i8mm_trial() -> Trial:
    """What a child process has to compute before ARM's matrix products are used."""
    return make_trial(I8MM, i8mm_trial_kernel, i8mm_trial_naive, 16)


def make_trial(
    arithmetic: Arithmetic, kernel: Callable, naive: Callable, size: int, permission: tuple[int, ...] = ()
) -> Trial:
    """What a kernel of a trial has to compute, as its naive twin does, with three parts of memory of this size."""
    memory = (torch.arange(3 * size, device="cpu") * 167 % 251).to(torch.uint8).view(3, size)
    contents = [bytes(some.flatten().tolist()) for some in (memory, naive(memory))]
    return Trial(arithmetic.name, write_function("trial", kernel), "trial", *contents, permission)


def amx_obstacle(processor: str, features: Mapping[str, bool]) -> str | None:
    """Why a processor of this name and with these features does not multiply with tile registers."""
    if not all(features.get(name) for name in AMX_FEATURES):
        return "the processor has none"
    if platform.system() != "Linux":
        return f"it has not been tried on {platform.system()}"
    obstacle = trial_obstacle(make_amx_trial(), processor, features)
    if obstacle is None and not ask_permission(AMX_PERMISSION):
        return "the system does not permit it"
    return obstacle


def i8mm_obstacle(processor: str, features: Mapping[str, bool]) -> str | None:
    """Why a processor of this name and with these features does not multiply pairs of rows."""
    return trial_obstacle(make_i8mm_trial(), processor, features) if features.get("i8mm") else "the processor has none"
