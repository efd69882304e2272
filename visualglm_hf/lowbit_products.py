# SPDX-License-Identifier: Apache-2.0
"""Products with low-bit matrices: torch's ways, the operators, and the one place that chooses a way.

Not here: the bytes (`lowbit_format.py`), kernels (`cpu_products.py`, `cpu_several_rows.py`, `cpu_many_rows.py`,
`cuda_products.py`), modules (`quantization.py`).

Each kind of device has its ways to compute a product, the fastest first, in `WAYS`. Each tells its obstacle, if it has
any, and the first without one is taken: by the operator `visualglm::quantized_matmul`, which has an implementation for
each kind of device, and by whoever asks which way a product would go. The one large matrix of half precision that a
low-bit model keeps, its output layer's, has an operator (`visualglm::half_matmul`) and ways as well.

Shapes: M rows of activations, N outputs, K inputs, G columns of a group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .cpu_language import HALVES
from .cpu_many_rows import many_rows_obstacle, multiply_many_rows
from .cpu_products import CPU_PRODUCTS, KINDS, activations_obstacle, matrix_obstacle
from .cpu_several_rows import multiply_several_rows, several_rows_obstacle
from .cuda_products import CUDA_PRODUCTS, can_add, reading_obstacle
from .kernel_choice import KernelError, name_of
from .lowbit_format import count_groups, dequantize_naive, unpack_int4


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


class Product(NamedTuple):
    """What decides how a product is computed: everything but the activations' numbers."""

    dtype: torch.dtype  # of the activations
    rows: int  # M
    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    form: int | torch.dtype  # of the matrix: its bits, or its dtype
    in_features: int  # K
    transposed: bool = False
    address: int = 0  # of the activations

    @property
    def arguments(self) -> tuple:
        """What `multiply` takes besides the activations."""
        return self[2:7]


class Way(NamedTuple):
    """One of the ways to compute a product.

    Args:
        name: as people call it.
        obstacle: says what keeps a product from it; None if nothing does.
        multiply: computes the product, of the activations and all the rest; on a GPU of a bias, too, if there is one.
    """

    name: str
    obstacle: Callable[[Product], str | None]
    multiply: Callable[..., torch.Tensor]


Tell = Callable[[str, str], None]  # takes the name of a way that a product does not go, and its obstacle


def choose_way(ways: tuple[Way, ...], product: Product, tell: Tell | None = None) -> Way:
    """Choose the first way without an obstacle, which the last one never has; `tell` hears of those before."""
    for way in ways:
        obstacle = way.obstacle(product)
        if obstacle is None:
            break
        if tell is not None:
            tell(way.name, obstacle)
    return way


def no_obstacle(product: Product) -> None:
    """Nothing keeps a product from this way."""


# torch's way on any device


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
    a device's own `dequantize_naive`, for so many elements at a time.
    """
    on_cpu = x.device.type == "cpu" and to_matrix is None
    compute_dtype = torch.promote_types(x.dtype, torch.float32) if on_cpu else x.dtype
    step = max(1, (CPU_CHUNK if on_cpu else chunk) // max(in_features, 1))
    x_compute = x.to(compute_dtype)
    out = x_compute.new_zeros(x.shape[0], in_features) if transposed else x_compute.new_empty(x.shape[0], len(weight))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        matrix = (to_matrix or dequantize_naive)(weight[rows], weight_scale[rows], bits, in_features, compute_dtype)
        if transposed:
            out.addmm_(x_compute[:, rows], matrix)
        else:
            torch.mm(x_compute, matrix.t(), out=out[:, rows])
    return out.to(x.dtype)


def multiply_plainly(x: torch.Tensor, product: Product, bias: torch.Tensor | None = None) -> torch.Tensor:
    return multiply_flat(x, product, bias)


def multiply_flat(
    x: torch.Tensor, product: Product, bias: torch.Tensor | None, to_matrix: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """`multiply_by_rows` for activations of any number of dimensions, and a bias."""
    out = multiply_by_rows(x.reshape(-1, x.shape[-1]), *product.arguments, to_matrix)
    return add_bias(out.view(*x.shape[:-1], out.shape[-1]), bias)


def add_bias(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return out if bias is None else out + bias.to(out.dtype)


ANYWHERE = Way("torch, a few rows of the matrix at a time", no_obstacle, multiply_plainly)


# On a CPU: torch's packed operators


def find_packable_group(weight_scale: torch.Tensor, in_features: int) -> int | None:
    """The group size under which torch's int4 operator can take a matrix with these scales; None if it cannot.

    A group may be cut into several with the same scale, so scales per row fit too.
    """
    group = in_features // count_groups(weight_scale)
    return next((size for size in PACKABLE_GROUPS if group % size == 0), None)


def packed_obstacle(product: Product) -> str | None:
    """Why torch's packed operators do not multiply. They round scales to bfloat16.

    For other dtypes than bfloat16 they take seconds (20.8 s for 64 rows of float32 and 16384 x 4096).
    """
    if product.dtype != torch.bfloat16:
        return f"{name_of(product.dtype)} activations"
    if product.transposed:
        return "a product for gradients"
    if not 0 < product.rows < MANY_ROWS:
        return f"{product.rows} rows of activations, not 1 to {MANY_ROWS - 1}"
    return packed_int8_obstacle(product) if product.form == 8 else packed_int4_obstacle(product)


def packed_int8_obstacle(product: Product) -> str | None:
    if product.weight_scale.dim() != 1:
        return "8 bits with groups"
    if product.in_features % INT8_COLUMNS:
        return f"{product.in_features} columns, no multiple of {INT8_COLUMNS}"
    return None


def packed_int4_obstacle(product: Product) -> str | None:
    if product.weight.shape[0] % PACKED_ROWS:
        return f"a matrix of {product.weight.shape[0]} rows, no multiple of {PACKED_ROWS}"
    if not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} has none for 4 bits"
    if find_packable_group(product.weight_scale, product.in_features) is None:
        return f"groups that are no multiple of {PACKABLE_GROUPS[-1]} columns"
    return None


def multiply_packed(x: torch.Tensor, product: Product) -> torch.Tensor:
    weight, weight_scale = product.weight, product.weight_scale
    if product.form == 8:
        return torch._weight_int8pack_mm(x.contiguous(), weight.contiguous(), weight_scale.to(x.dtype))
    group = find_packable_group(weight_scale, product.in_features)
    packed, scales = packed_matrices.get(weight, weight_scale, group)
    return torch._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, scales)


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


# On a CPU: our kernels


def cpu_kernel_obstacle(product: Product) -> str | None:
    if product.transposed:
        return "a product for gradients"
    if product.form not in KINDS:
        return f"{name_of(product.form)} weights"
    if takes_several_rows(product):
        return f"{product.rows} rows of activations, which are faster together"
    return activations_obstacle(product.dtype, product.rows) or cpu_matrix_obstacle(product)


def cpu_matrix_obstacle(product: Product) -> str | None:
    """Why our kernels do not even read the matrix."""
    kind = KINDS[product.form]
    return matrix_obstacle(product.weight, product.weight_scale, product.in_features, kind) or CPU_PRODUCTS.obstacle()


def multiply_with_cpu_kernel(x: torch.Tensor, product: Product) -> torch.Tensor:
    return CPU_PRODUCTS.kernels.multiply(x, product.weight, product.weight_scale, product.form)


def takes_several_rows(product: Product) -> bool:
    """Whether the product is one for the kernels for several rows, which are the fastest where there are any."""
    if product.transposed or product.weight_scale is None:
        return False
    matrix = (product.weight, product.weight_scale, product.in_features, product.form)
    return several_rows_obstacle(product.dtype, product.rows, *matrix) is None


def cpu_many_rows_obstacle(product: Product) -> str | None:
    if product.transposed:
        return "a product for gradients"
    if takes_several_rows(product):
        return None
    matrix = (product.weight, product.weight_scale, product.in_features, product.form)
    return many_rows_obstacle(product.dtype, product.rows, *matrix)


def multiply_many_rows_on_cpu(x: torch.Tensor, product: Product) -> torch.Tensor:
    multiply = multiply_several_rows if takes_several_rows(product) else multiply_many_rows
    return multiply(x, product.weight, product.weight_scale, product.form)


def cpu_dequantize_obstacle(product: Product) -> str | None:
    return "float64 activations" if product.dtype == torch.float64 else cpu_matrix_obstacle(product)


def multiply_dequantized_on_cpu(x: torch.Tensor, product: Product) -> torch.Tensor:
    to_matrix = CPU_PRODUCTS.kernels.dequantize
    return multiply_by_rows(x.float(), *product.arguments, to_matrix, CPU_KERNEL_CHUNK).to(x.dtype)


# On an NVIDIA GPU


def cuda_sizes(product: Product) -> tuple[int, int, int, int]:
    """Outputs, inputs, scales in a row, and bits."""
    return product.weight.shape[0], product.in_features, count_groups(product.weight_scale), product.form


def cuda_kernel_obstacle(product: Product) -> str | None:
    """Why the fused kernel does not multiply."""
    if product.transposed:
        return "a product for gradients"
    kernels = CUDA_PRODUCTS.find(product.weight.device)
    if kernels is None:
        return CUDA_PRODUCTS.obstacle(product.weight.device)
    obstacle = kernels.multiply_obstacle(product.dtype, product.rows, *cuda_sizes(product))
    if obstacle is None and product.address % 16:
        return "activations that are not at a multiple of 16 bytes"
    return obstacle or reading_obstacle(product.weight, product.weight_scale)


def multiply_with_cuda_kernel(x: torch.Tensor, product: Product, bias: torch.Tensor | None = None) -> torch.Tensor:
    kernels = CUDA_PRODUCTS.loaded(x.device)
    matrix = (product.weight, product.weight_scale, product.form, product.in_features)
    if can_add(bias, x.dtype):
        return kernels.multiply(x, *matrix, bias)
    return add_bias(kernels.multiply(x, *matrix), bias)


def cuda_dequantize_obstacle(product: Product) -> str | None:
    kernels = CUDA_PRODUCTS.find(product.weight.device)
    if kernels is None:
        return CUDA_PRODUCTS.obstacle(product.weight.device)
    return kernels.dequantize_obstacle(product.dtype, *cuda_sizes(product)) or reading_obstacle(
        product.weight, product.weight_scale
    )


def multiply_dequantized_on_cuda(x: torch.Tensor, product: Product, bias: torch.Tensor | None = None) -> torch.Tensor:
    to_matrix = CUDA_PRODUCTS.loaded(x.device).dequantize
    if product.transposed or len(product.weight) * product.in_features > DEVICE_CHUNK:
        return multiply_flat(x, product, bias, to_matrix)
    matrix = to_matrix(product.weight, product.weight_scale, product.form, product.in_features, x.dtype)
    return torch.nn.functional.linear(x, matrix, None if bias is None else bias.to(x.dtype))


# The choice


WAYS = {  # by the type of the device, the fastest first
    "cpu": (
        Way("our kernel", cpu_kernel_obstacle, multiply_with_cpu_kernel),
        Way("our kernel for many rows", cpu_many_rows_obstacle, multiply_many_rows_on_cpu),
        Way("torch's packed operator", packed_obstacle, multiply_packed),
        Way("torch, with the matrix of our kernel", cpu_dequantize_obstacle, multiply_dequantized_on_cpu),
        ANYWHERE,
    ),
    "cuda": (
        Way("our kernel", cuda_kernel_obstacle, multiply_with_cuda_kernel),
        Way("torch, with the matrix of our kernel", cuda_dequantize_obstacle, multiply_dequantized_on_cuda),
        ANYWHERE,
    ),
}


def choose_lowbit_way(product: Product, tell: Tell | None = None) -> Way:
    """Choose the way of `multiply`."""
    return choose_way(WAYS.get(product.weight.device.type, (ANYWHERE,)), product, tell)


def half_obstacle(dtype: torch.dtype, weight: torch.Tensor) -> str | None:
    """Why a linear layer with this matrix is left to torch, however many rows of activations there are."""
    if weight.device.type != "cpu":
        return f"weights on {weight.device.type}"
    if dtype not in HALVES:
        return f"{name_of(dtype)} activations"
    if weight.dtype != dtype:
        return f"{name_of(weight.dtype)} weights and {name_of(dtype)} activations"
    if type(weight) is not torch.nn.Parameter:
        return "weights that are no plain parameter"
    return "gradients" if torch.is_grad_enabled() else None


def multiply_half_with_torch(x: torch.Tensor, product: Product) -> torch.Tensor:
    return torch.nn.functional.linear(x, product.weight)


HALF_WAYS = (
    Way("our kernel", cpu_kernel_obstacle, multiply_with_cpu_kernel),
    Way("torch", no_obstacle, multiply_half_with_torch),
)


def choose_half_way(product: Product, tell: Tell | None = None) -> Way:
    """Choose the way of a linear layer that asks `half_obstacle` first."""
    obstacle = half_obstacle(product.dtype, product.weight)
    if obstacle is None:
        return choose_way(HALF_WAYS, product, tell)
    if tell is not None:
        tell(HALF_WAYS[0].name, obstacle)
    return HALF_WAYS[-1]


def multiply_on_cpu(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, transposed: bool
) -> torch.Tensor:
    """See `multiply`."""
    product = Product(x.dtype, x.shape[0], weight, weight_scale, bits, in_features, transposed)
    return choose_way(WAYS["cpu"], product).multiply(x, product)


def multiply_half_on_cpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x @ weight.T for [M, K] and a matrix [N, K] of half precision."""
    product = Product(x.dtype, x.shape[0], weight, None, weight.dtype, x.shape[1])
    return choose_way(HALF_WAYS, product).multiply(x, product)


def multiply_on_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bits: int,
    in_features: int,
    transposed: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `multiply`; x may have more dimensions here. A kernel that the driver does not launch is the last one that it
    is asked for.
    """
    x = x.contiguous()
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    product = Product(x.dtype, rows, weight, weight_scale, bits, in_features, transposed, x.data_ptr())
    way = choose_way(WAYS["cuda"], product)
    try:
        return way.multiply(x, product, bias)
    except KernelError as error:
        CUDA_PRODUCTS.give_up(x.device, error)
        return multiply_plainly(x, product, bias)


def multiply_straight(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bits: int,
    in_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias on a GPU: as `multiply_on_cuda` chose it for such a product before, if the kernel was chosen."""
    kernels = CUDA_PRODUCTS.found.get(x.device)
    if kernels is not None and x.is_contiguous():
        try:
            out = kernels.multiply_again(x, weight, weight_scale, bits, in_features, bias)
        except KernelError as error:
            CUDA_PRODUCTS.give_up(x.device, error)
            out = None
        if out is not None:
            return out
    return multiply_on_cuda(x, weight, weight_scale, bits, in_features, False, bias)


def is_watched(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether somebody has to see the operator: a tracer, a mode, a transform, or a kind of tensor."""
    return (
        type(x) is not torch.Tensor
        or type(weight).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def goes_straight(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product on a GPU needs no operator, which takes the host longer than all the rest of it."""
    if not weight.is_cuda or x.get_device() != weight.get_device() or is_watched(x, weight):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


# The operators


def output_of(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, transposed: bool
) -> torch.Tensor:
    """Shape, dtype and device of the product, for tracing."""
    return x.new_empty(x.shape[0], in_features if transposed else weight.shape[0])


def half_output_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# Of an operator, by torch's dispatch key.
IMPLEMENTATIONS = (
    ("quantized_matmul", "CompositeExplicitAutograd", multiply_by_rows),
    ("quantized_matmul", "CPU", multiply_on_cpu),
    ("quantized_matmul", "CUDA", multiply_on_cuda),
    ("half_matmul", "CompositeExplicitAutograd", torch.nn.functional.linear),
    ("half_matmul", "CPU", multiply_half_on_cpu),
)


def register_operators() -> torch.library.Library | None:
    """Define the operators, once per process: the same file is imported once for each checkpoint folder."""
    if hasattr(getattr(torch.ops, NAMESPACE), "quantized_matmul"):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    for name, key, implementation in IMPLEMENTATIONS:
        library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::quantized_matmul", output_of, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::half_matmul", half_output_of, lib=library)
    return library


LIBRARY = register_operators()  # the operators live as long as this object


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
    if x.is_cuda and not torch.compiler.is_compiling():
        with torch._C.DisableTorchFunctionSubclass():  # the codes', which is Python and refuses what is not done here
            if goes_straight(x, weight, bias):
                return multiply_straight(x, weight, weight_scale, bits, in_features, bias)
    out = multiply(x.reshape(-1, in_features), weight, weight_scale, bits, in_features)
    out = out.view(*x.shape[:-1], out.shape[-1])
    if bias is not None and not torch.is_grad_enabled():
        return out.add_(bias.to(out.dtype))  # a prompt's is large, and memory that is new takes longer than the sum
    return add_bias(out, bias)


def half_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer with a matrix that has no `half_obstacle`, [..., K] -> [..., N]."""
    out = torch.ops.visualglm.half_matmul(x.reshape(-1, weight.shape[1]), weight).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias
