# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Low-bit matrices: their bytes, and the products with them.

Not here: how to choose the codes, and modules (`quantization.py`).

The format is the original's. A matrix [N, K] of 8 bits is int8 [N, K]; of 4 bits it is int8 [N, ceil(K / 2)], two
signed codes in a byte: the even column in the HIGH four bits, the odd one in the LOW. A value is its code times the
scale of its row, `weight_scale` [N], or of its group of K / n neighbours in the row, `weight_scale` [N, n]. Scales may
be negative. Source: the CUDA kernels of the original, disassembled.

`dequantize` is the reference. Every faster way is reached through `multiply`, one implementation per device of the
operator `visualglm::quantized_matmul`, and tested against the reference: here those with torch's operators, elsewhere
those with kernels of our own, which also serve the one large matrix of half precision that a low-bit model keeps, its
output layer's (`visualglm::half_matmul`).

Shapes: M rows of activations, N outputs, K inputs, G columns of a group.
"""

from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary


NAMESPACE = "visualglm"
SCHEMAS = {
    "quantized_matmul": (
        "(Tensor x, Tensor weight, Tensor weight_scale, int bits, SymInt in_features, bool transposed) -> Tensor"
    ),
    "half_matmul": "(Tensor x, Tensor weight) -> Tensor",
}

CPU_CHUNK = 2**17  # elements dequantized at a time by torch: half a MiB of float32 stays in a core's cache
CPU_KERNEL_CHUNK = 2**20  # by a kernel, which needs no room between: large enough for the product to be fast
DEVICE_CHUNK = 2**26  # elements: few kernel launches, and at most 256 MB
# Columns of a group that torch's int4 operator takes, and rows it packs as a block.
PACKABLE_GROUPS = (256, 128, 64, 32)
PACKED_ROWS, PACKED_BLOCK = 16, 64
# torch's int8 operator reads past the end of a row, or dies, if its length is not such a multiple.
INT8_COLUMNS = 32
# Rows of activations from which float32 beats the packed bfloat16 operators, on CPUs with matrix instructions too.
MANY_ROWS = 16


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack integer codes in [-8, 7], [N, K], into int8 [N, ceil(K / 2)]; an odd last column gets a 0 for company."""
    codes = codes.to(torch.int8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)


def unpack_int4(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Unpack int8 [N, ceil(K / 2)] into int8 codes [N, K]; shifts to the right keep the sign."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(1)[:, :in_features]


def dequantize(
    weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """Compute the matrix [N, K] that the codes stand for: exact in float32, rounded once to anything smaller."""
    codes = unpack_int4(weight, in_features) if bits == 4 else weight
    precise = torch.promote_types(dtype, torch.float32)
    groups = codes.to(precise).unflatten(1, (weight_scale[0].numel(), -1))  # [N, n, G]
    return (groups * weight_scale.to(precise).reshape(len(codes), -1, 1)).flatten(1).to(dtype)


def multiply_by_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bits: int,
    in_features: int,
    transposed: bool,
    to_matrix: Callable[..., torch.Tensor] | None = None,
    chunk: int = DEVICE_CHUNK,
) -> torch.Tensor:
    """The product as in `multiply`, with a few rows of the matrix dequantized at a time, on any device.

    A CPU computes in float32 whatever the activations are, which is both faster and more accurate there. `to_matrix` is
    a device's own `dequantize`, for so many elements at a time.
    """
    on_cpu = x.device.type == "cpu" and to_matrix is None
    compute_dtype = torch.promote_types(x.dtype, torch.float32) if on_cpu else x.dtype
    step = max(1, (CPU_CHUNK if on_cpu else chunk) // max(in_features, 1))
    x_compute = x.to(compute_dtype)
    out = x_compute.new_zeros(x.shape[0], in_features if transposed else weight.shape[0])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        matrix = (to_matrix or dequantize)(weight[rows], weight_scale[rows], bits, in_features, compute_dtype)
        if transposed:
            out.addmm_(x_compute[:, rows], matrix)
        else:
            torch.mm(x_compute, matrix.t(), out=out[:, rows])
    return out.to(x.dtype)


# CPU: torch's packed operators


def packable_group(weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int) -> int | None:
    """The group size under which torch's int4 operator can take the matrix; None if it cannot.

    A group may be cut into several with the same scale, so scales per row fit too.
    """
    if weight.shape[0] % PACKED_ROWS or not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
        return None
    group = in_features // weight_scale[0].numel()
    return next((size for size in PACKABLE_GROUPS if group % size == 0), None)


class PackedMatrices:
    """The int4 matrices of this process as torch's CPU operator reads them, each packed once, when it is first used.

    They take as much memory again as the codes. A matrix is forgotten with its tensor, or when the tensor changes.
    """

    def __init__(self):
        self.matrices = WeakTensorKeyDictionary()

    def get(self, weight: torch.Tensor, weight_scale: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the packed codes, uint8 [N, K / 2], and the scales and zeros, bfloat16 [K / group, N, 2]."""
        state = (group, fingerprint(weight), fingerprint(weight_scale))
        known = self.matrices.get(weight)
        if known is None or known[0] != state:
            known = (state, pack_for_cpu(weight), pack_scales_for_cpu(weight, weight_scale, group))
            self.matrices[weight] = known
        return known[1:]

    def forget(self, weight: torch.Tensor) -> None:
        self.matrices.pop(weight, None)


packed_matrices = PackedMatrices()


def fingerprint(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes when the tensor is written to, or is given other memory."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def pack_for_cpu(weight: torch.Tensor) -> torch.Tensor:
    """Pack the codes for torch's operator, which wants them unsigned: 0 to 15 for -8 to 7.

    Blocks of rows are independent, so that the int32 it packs from is never there as a whole.
    """
    step = max(1, CPU_CHUNK // (2 * weight.shape[1]) // PACKED_BLOCK) * PACKED_BLOCK
    packed = weight.new_empty(weight.shape, dtype=torch.uint8)
    for start in range(0, weight.shape[0], step):
        codes = unpack_int4(weight[start : start + step], 2 * weight.shape[1]).to(torch.int32) + 8
        packed[start : start + step] = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    return packed


def pack_scales_for_cpu(weight: torch.Tensor, weight_scale: torch.Tensor, group: int) -> torch.Tensor:
    """The operator computes (unsigned code - 8) * scale + zero: with zero 0, what the format says."""
    scales = weight_scale.reshape(weight.shape[0], -1)
    scales = scales.repeat_interleave(2 * weight.shape[1] // group // scales.shape[1], dim=1).t().to(torch.bfloat16)
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()


def multiply_on_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bits: int,
    in_features: int,
    transposed: bool,
    to_matrix: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """The product as in `multiply`. bfloat16 goes through torch's packed operators, which round scales to bfloat16.

    float32 and float16 do not: the operators take seconds for them (20.8 s for 64 rows of float32 and 16384 x 4096).
    """
    if x.dtype == torch.bfloat16 and not transposed and 0 < x.shape[0] < MANY_ROWS:
        if bits == 8 and weight_scale.dim() == 1 and in_features % INT8_COLUMNS == 0:
            return torch._weight_int8pack_mm(x.contiguous(), weight.contiguous(), weight_scale.to(x.dtype))
        group = packable_group(weight, weight_scale, in_features) if bits == 4 else None
        if group is not None:
            packed, scales = packed_matrices.get(weight, weight_scale, group)
            return torch._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, scales)
    if to_matrix is None:
        return multiply_by_rows(x, weight, weight_scale, bits, in_features, transposed)
    arguments = (weight, weight_scale, bits, in_features, transposed, to_matrix, CPU_KERNEL_CHUNK)
    return multiply_by_rows(x.float(), *arguments).to(x.dtype)


# The operators


def output_of(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, transposed: bool
) -> torch.Tensor:
    """Shape, dtype and device of the product, for tracing."""
    return x.new_empty(x.shape[0], in_features if transposed else weight.shape[0])


def half_output_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def register_operators() -> torch.library.Library | None:
    """Define the operators, once per process: the same file is imported once for each checkpoint folder."""
    if hasattr(getattr(torch.ops, NAMESPACE), "quantized_matmul"):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    library.impl("quantized_matmul", multiply_by_rows, "CompositeExplicitAutograd")
    library.impl("half_matmul", torch.nn.functional.linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::quantized_matmul", output_of, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::half_matmul", half_output_of, lib=library)
    return library


LIBRARY = register_operators()  # the operators live as long as this object


def register_device(name: str, key: str, implementation: Callable[..., torch.Tensor]) -> None:
    """Give an operator a way of its own on one more kind of device, such as "CUDA", once per process."""
    if LIBRARY is not None:
        LIBRARY.impl(name, implementation, key)


class QuantizedMatmul(torch.autograd.Function):
    """The operator with a gradient to the activations and none to the codes; it is its own backward, transposed."""

    @staticmethod
    def forward(x, weight, weight_scale, bits, in_features, transposed):
        return torch.ops.visualglm.quantized_matmul(x, weight, weight_scale, bits, in_features, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, weight_scale, *ctx.how = inputs
        ctx.save_for_backward(weight, weight_scale)

    @staticmethod
    def backward(ctx, gradient):
        weight, weight_scale = ctx.saved_tensors
        bits, in_features, transposed = ctx.how
        gradient = multiply(gradient, weight, weight_scale, bits, in_features, not transposed)
        return gradient, None, None, None, None, None


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bits: int,
    in_features: int,
    transposed: bool = False,
) -> torch.Tensor:
    """Multiply activations with a low-bit matrix W: `x @ W.T`, or `x @ W` if `transposed`.

    Args:
        x: [M, K], or [M, N] if `transposed`, floating point.
        weight: int8 [N, K] for 8 bits, [N, ceil(K / 2)] for 4.
        weight_scale: [N], or [N, n] for n groups of columns.
        bits: 4 or 8.
        in_features: K.

    Returns:
        [M, N], or [M, K] if `transposed`, of the dtype of `x`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return QuantizedMatmul.apply(x, weight, weight_scale, bits, in_features, transposed)
    return torch.ops.visualglm.quantized_matmul(x, weight, weight_scale, bits, in_features, transposed)


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bits: int,
    in_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a low-bit matrix, [..., K] -> [..., N]; under autocast in its dtype. See `multiply`."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out = multiply(x.reshape(-1, in_features), weight, weight_scale, bits, in_features)
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)


def half_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer with a matrix of half precision, [..., K] -> [..., N], without gradients."""
    out = torch.ops.visualglm.half_matmul(x.reshape(-1, weight.shape[1]), weight).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias
