# SPDX-License-Identifier: Apache-2.0
"""What processors multiply integers with: instructions, and the order in which codes and activations have to lie.

Not here: the kernels that multiply many rows (`cpu_many_rows.py`), the language (`cpu_language.py`), and how
instructions are tried that may end a process (`instruction_trial.py`).

Activations are integers of 16 bits. A processor that adds up products of words, two at a time, takes them as they are;
one that adds up products of bytes, four at a time, takes their high bytes first and then their low ones, both signed.
That makes the same sums. Words or bytes, an *element* is what each product takes, a *vector* has a few elements of each
of 16 rows of a matrix.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .cpu_language import I8, I16, I32, WORDS, Kernel, Pointer, TileRegisters, Value, join, write_function
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
    """

    name: str
    element_bytes: int
    add_dot: Callable[[Value, Value, Value], Value] | None
    is_offset: bool = False

    @property
    def has_tiles(self) -> bool:
        return self.add_dot is None

    @property
    def kind(self) -> str:
        """What it multiplies, for the names of functions."""
        return "tiles" if self.has_tiles else {1: "bytes", 2: "words"}[self.element_bytes]

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
ARITHMETICS = {  # by the feature of the processor that has the instruction, the fastest first
    "avx512vnni": Arithmetic("AVX-512 VNNI", 1, add_dot_avx512vnni, True),
    "avxvnni": Arithmetic("AVX-VNNI", 1, add_dot_avxvnni, True),
    "dotprod": Arithmetic("ARM dot products", 1, add_dot_dotprod),
}
ARITHMETIC_OF_WORDS = Arithmetic("words of 16 bits", 2, add_dot_of_words)


def trial_kernel(k: Kernel, memory: Pointer) -> None:
    """Add the products of the bytes [16, 64] in the second KiB and of those [16, 16, 4] in the third to the first."""
    registers = TileRegisters(k)
    registers.shape([(16, 64)] * 3)
    for number in range(3):
        registers.load(number, memory[1024 * number], 64)
    registers.add_dot(0, 1, 2)
    registers.store(0, memory, 64)
    registers.release()


def trial_naive(memory: torch.Tensor) -> torch.Tensor:
    """The uint8 [3, 1024] as they are after `trial_kernel`."""
    total = memory[0].view(torch.int32).view(16, 16)
    a, b = memory[1].view(torch.int8).view(16, 64), memory[2].view(16, 16, 4).transpose(1, 2).reshape(64, 16)
    total = (total + a.int() @ b.int()).view(torch.uint8).view(1, 1024)
    return torch.cat((total, memory[1:]))


def make_trial() -> Trial:
    """What a child process has to compute before AMX is used."""
    memory = (torch.arange(3 * 1024, device="cpu") * 167 % 251).to(torch.uint8).view(3, 1024)
    contents = [bytes(some.flatten().tolist()) for some in (memory, trial_naive(memory))]
    return Trial(AMX.name, write_function("trial", trial_kernel), "trial", *contents, AMX_PERMISSION)


def amx_obstacle(processor: str, features: Mapping[str, bool]) -> str | None:
    """Why a processor of this name and with these features does not multiply with tile registers."""
    if not all(features.get(name) for name in AMX_FEATURES):
        return "the processor has none"
    if platform.system() != "Linux":
        return f"it has not been tried on {platform.system()}"
    obstacle = trial_obstacle(make_trial(), processor, features)
    if obstacle is None and not ask_permission(AMX_PERMISSION):
        return "the system does not permit it"
    return obstacle


def choose_arithmetic(features: Mapping[str, bool], amx_obstacle: str | None) -> Arithmetic:
    """Choose for a processor."""
    if amx_obstacle is None:
        return AMX
    return next((way for name, way in ARITHMETICS.items() if features.get(name)), ARITHMETIC_OF_WORDS)
