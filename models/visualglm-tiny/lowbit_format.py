# SPDX-License-Identifier: Apache-2.0
"""The bytes of low-bit matrices, and the plain definition of what they stand for and multiply to.

Not here: how to choose the codes (`quantization.py`), and every faster way (`lowbit_products.py`), which is tested
against these.

The format is the original's. A matrix [N, K] of 8 bits is int8 [N, K]; of 4 bits it is int8 [N, ceil(K / 2)], two
signed codes in a byte: the even column in the HIGH four bits, the odd one in the LOW. A value is its code times the
scale of its row, `weight_scale` [N], or of its group of K / n neighbours in the row, `weight_scale` [N, n]. Scales may
be negative. Source: the CUDA kernels of the original, disassembled.

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row.
"""

import torch


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack integer codes in [-8, 7], [N, K], into int8 [N, ceil(K / 2)]; an odd last column gets a 0 for company."""
    codes = codes.to(torch.int8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)


def unpack_int4(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Unpack int8 [N, ceil(K / 2)] into int8 codes [N, K]; shifts to the right keep the sign."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(1)[:, :in_features]


def count_groups(weight_scale: torch.Tensor | None) -> int:
    """The scales in a row of the matrix, given all, [N] or [N, n]; 0 for a matrix without any."""
    if weight_scale is None:
        return 0
    return 1 if weight_scale.dim() == 1 else weight_scale.shape[1]


def dequantize_naive(
    weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """Compute the matrix [N, K] that the codes stand for: exact in float32, rounded once to anything smaller."""
    weight = weight.detach()  # the codes of a layer refuse to be calculated with
    codes = unpack_int4(weight, in_features) if bits == 4 else weight
    precise = torch.promote_types(dtype, torch.float32)
    groups = codes.to(precise).unflatten(1, (count_groups(weight_scale), -1))  # [N, n, G]
    return (groups * weight_scale.to(precise).reshape(len(codes), -1, 1)).flatten(1).to(dtype)


def multiply_naive(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, form: int | torch.dtype
) -> torch.Tensor:
    """Compute x @ W.T, [M, K] and [N, K] -> [M, N], in float32; of a matrix in so many bits, or of this dtype."""
    if weight_scale is None:
        return x.float() @ weight.float().T
    return x.float() @ dequantize_naive(weight, weight_scale, form, x.shape[1], torch.float32).T
