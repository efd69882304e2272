# SPDX-License-Identifier: Apache-2.0
"""Choosing the codes and scales of low-bit matrices: the plain definition, with torch's operators, on any device.

Not here: the format's bytes (`lowbit_format.py`), the kernels that choose the same codes and scales to the bit on a CPU
(`cpu_quantizing.py`), and what is asked of a matrix before (`quantization.py`).

Every operation is IEEE's, in float32, in an order that is written down. So codes and scales are the same on every
processor, and are those of all releases on x86, where torch adds in this order.

Shapes: N rows, K columns, G columns of a group, n = K / G groups of a row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .lowbit_format import pack_int4


LARGEST_CODE = {4: 7, 8: 127}  # of a row with one scale
# The largest weight of a group becomes code -7 to -10, of which -8 is the least there is: clipping it a little pays.
DIVISORS = (7.0, 7.6, 8.2, 9.0, 10.0)
GROUP_CODES = (-8, 7)  # the least and the largest of a group
SMALLEST_SCALE = 2.0**-24  # of float16
SUM_LANES = 8  # sums that run side by side
ORDERED = 512  # columns from which torch adds in yet another order; such groups are left to it


def quantize_naive(weight: torch.Tensor, bits: int, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of a matrix [N, K]; a group size of None is one scale per row.

    Returns:
        The codes as they are stored, and the scales, float16, [N, n] or [N]. They are not finite if the weights are
        not, or are too large.
    """
    if group_size is not None:
        return search_naive(weight, group_size)
    scale = choose_row_scales(peak_naive(weight), bits)
    return round_naive(weight, scale, bits), scale


# One scale per row: the original's rounding


def peak_naive(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each row [N, K] -> [N]; NaN if there is one."""
    return weight.abs().amax(dim=1)


def choose_row_scales(peak: torch.Tensor, bits: int) -> torch.Tensor:
    """Choose scales, float16 [N], as the original did, in the weight's own dtype, where the original was right.

    It was not where the rounded scale came out too small for the row, whose largest codes then overflowed, or 0.
    """
    largest = LARGEST_CODE[bits]
    scale = (peak / largest).half()
    scale = torch.where(peak > 0, scale.clamp(min=SMALLEST_SCALE), scale)
    is_too_small = (peak / nonzero(scale)).round() > largest
    return torch.where(is_too_small, next_half(scale), scale)


def round_naive(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round rows [N, K] to the codes of their scales [N], as they are stored; quotients of float16 are float16."""
    largest = LARGEST_CODE[bits]
    codes = (weight / nonzero(scale)[:, None]).round().clamp(-largest, largest)
    return pack_int4(codes) if bits == 4 else codes.to(torch.int8)


def next_half(scale: torch.Tensor) -> torch.Tensor:
    """The next larger float16 of a positive one; torch's `nextafter` does not take float16 everywhere."""
    return (scale.view(torch.int16) + 1).view(torch.float16)


def nonzero(divisor: torch.Tensor) -> torch.Tensor:
    """1 where the divisor is 0: an all-zero row or group has scale 0 and codes 0."""
    return torch.where(divisor == 0, 1, divisor)


# One scale per group: a search


def search_naive(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find scales [N, n] for the groups of rows [N, K], and the codes as they are stored; see `search_scales`."""
    groups = weight.float().unflatten(1, (-1, group_size))
    scale = search_scales(groups)
    return pack_int4(round_to_codes(groups, scale).flatten(1)), scale.squeeze(-1).half()


def search_scales(groups: torch.Tensor, costs: torch.Tensor | None = None) -> torch.Tensor:
    """Find the scale of each group, positive or negative, with the smallest squared error of a few candidates.

    Each candidate maps the group's largest weight, the first of equals, to a number near the smallest code, -8; is
    refitted once to the codes it leads to, by least squares; and is rounded to float16 before the final codes are
    chosen. Five candidates are as good as thirty-six.

    Args:
        groups: [..., G], float32.
        costs: [G], float32, of a unit of squared error of each column; None for 1.

    Returns:
        [..., 1], float32 numbers that are float16's.
    """
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_error = torch.full_like(peak, torch.inf)
    best_scale = torch.zeros_like(peak)
    for divisor in DIVISORS:
        # A tensor on the device: torch multiplies by the reciprocal of a number on some.
        codes = round_to_codes(groups, peak / peak.new_full((), -divisor))
        norm = weigh(codes.square(), costs).sum(-1, keepdim=True)  # without costs exact in any order
        scale = (add_in_order(weigh(groups * codes, costs)) / nonzero(norm)).half().float()
        codes = round_to_codes(groups, scale)
        error = add_in_order(weigh((groups - codes * scale).square(), costs))
        is_better = ~(error >= best_error)  # NaN is better, so that it is found
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
    return best_scale


def weigh(numbers: torch.Tensor, costs: torch.Tensor | None) -> torch.Tensor:
    return numbers if costs is None else numbers * costs


def round_to_codes(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (groups / nonzero(scale)).round_().clamp_(*GROUP_CODES)


def add_in_order(numbers: torch.Tensor) -> torch.Tensor:
    """Add up [..., G] -> [..., 1]: column k goes to lane k % 8, each lane is added by `fold`, then lane after lane."""
    columns = numbers.shape[-1]
    if columns % SUM_LANES or columns >= ORDERED or numbers.device.type == "cpu" and torch_adds_in_order(columns):
        return numbers.sum(-1, keepdim=True)
    return add_lanes(numbers)


@functools.cache
def torch_adds_in_order(columns: int) -> bool:
    """Whether this CPU's torch adds so many columns in the same order, and in one operation; asked, not guessed."""
    numbers = torch.randn(
        256, columns, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    return torch.equal(numbers.sum(-1, keepdim=True), add_lanes(numbers))


def add_lanes(numbers: torch.Tensor) -> torch.Tensor:
    lanes = fold(numbers.unflatten(-1, (-1, SUM_LANES)).unbind(-2))
    total = torch.zeros_like(lanes[..., :1])
    for lane in lanes.split(1, dim=-1):
        total = total + lane
    return total


def fold(terms: Sequence[Any]) -> Any:
    """Add up tensors, or values of a kernel: in four sums that take turns, and end together; what is left goes first.

    That is torch's order on a CPU, for fewer than `ORDERED` columns.
    """
    whole = len(terms) // 4 * 4
    sums = list(terms[:4]) if whole else []
    for index in range(4, whole):
        sums[index % 4] = sums[index % 4] + terms[index]
    for term in terms[whole:]:
        sums[:1] = [sums[0] + term] if sums else [term]
    total = sums[0]
    for number in sums[1:]:
        total = total + number
    return total
