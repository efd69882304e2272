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
"""Products with low-bit matrices on NVIDIA GPUs: which kernel is launched for which sizes.

Not here: the kernels (`cuda_source.py`), the compiler and the driver (`cuda_runtime.py`), the format's bytes and the
torch reference (`quantization_kernels.py`), which is also what is used wherever the kernels cannot be.

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix.
"""

import functools
from collections.abc import Callable

import torch

from .cuda_runtime import Driver, Launch, compile_kernels
from .kernel_choice import KernelError, KernelUser, NoKernelsError


# M up to which the fused kernel is used: many rows are better dequantized once, for cuBLAS (on an H200 from 48 rows).
FUSED_ROWS = 32
BLOCK_OUTPUTS = 32  # outputs of a block of the fused kernel
LANE_BITS = 128  # bits of codes that a lane loads at once
MIN_WARPS, MAX_WARPS = 8, 32  # of a block of the fused kernel; registers allow no more at a time
WARP_MEMORY = (8 * (BLOCK_OUTPUTS + 1) + 1) * 4  # bytes of shared memory for the sums of a warp
MAX_BLOCKS = 2**16 - 1  # along the second dimension of a grid
MAX_ELEMENTS = 2**31  # of a matrix, for 32-bit offsets
DEQUANTIZE_THREADS = 256
OLDEST_CAPABILITY = (7, 5)  # Turing: the first with m16n8k8
BFLOAT16_CAPABILITY = (8, 0)
# Relative error of the self-check: the result is rounded to 11 or 8 bits, and a matrix for cuBLAS before that.
CHECK_TOLERANCE = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


class DeviceKernels:
    """The kernels in the memory of one device. Everything runs on torch's current stream and can be captured.

    Raises:
        KernelError, OSError, AttributeError: there is no way to compile or load them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.capability = torch.cuda.get_device_capability(device)
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.dtypes = [torch.float16, *([torch.bfloat16] if self.capability >= BFLOAT16_CAPABILITY else [])]
        self.driver = Driver()
        image = compile_kernels(self.capability)
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # makes the device's context this thread's
            self.context = self.driver.current_context()
            module = self.driver.load_module(image)
            self.functions = {
                name: self.driver.get_function(module, name)
                for dtype in self.dtypes
                for bits in (4, 8)
                for name in (function_name("multiply", bits, dtype), function_name("dequantize", bits, dtype))
            }
        # Found once for each size: at one row, working it out would take longer than the kernel.
        self.find_multiply = functools.lru_cache(maxsize=None)(self.plan_multiply)
        self.find_dequantize = functools.lru_cache(maxsize=None)(self.plan_dequantize)

    def plan_dequantize(self, dtype: torch.dtype, outputs: int, inputs: int, groups: int, bits: int) -> Launch | None:
        """How a matrix of this size is dequantized; None if lanes would load their 16 bytes from two rows or groups."""
        span = LANE_BITS // bits
        fits = dtype in self.dtypes and outputs > 0 and inputs > 0 and inputs % span == 0
        if not fits or (groups > 1 and inputs // groups % span != 0):
            return None
        threads = outputs * inputs // span
        grid = (-(-threads // DEQUANTIZE_THREADS), 1)
        sizes = (outputs, inputs, groups, inputs // groups)
        return Launch(self.functions[function_name("dequantize", bits, dtype)], grid, DEQUANTIZE_THREADS, 0, 3, sizes)

    def plan_multiply(
        self, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int
    ) -> Launch | None:
        """How the fused kernel multiplies so many rows; None if it cannot. It finds a column's group by shifting."""
        width = inputs // groups
        fits = (
            0 < rows <= FUSED_ROWS
            and outputs % BLOCK_OUTPUTS == 0
            and outputs // BLOCK_OUTPUTS <= MAX_BLOCKS
            and outputs * inputs <= MAX_ELEMENTS
            and (groups == 1 or width & (width - 1) == 0)
        )
        if not fits or self.find_dequantize(dtype, outputs, inputs, groups, bits) is None:
            return None
        shift = 31 if groups == 1 else width.bit_length() - 1
        chunk = 4 * LANE_BITS // bits  # columns that a warp takes at a time
        rows_per_block = 8 if groups == 1 else 8 * min(width, chunk) // chunk
        blocks = outputs // BLOCK_OUTPUTS
        # A device full of warps, which hide each other's waiting, even if there are few outputs.
        warps = max(MIN_WARPS, MAX_WARPS >> (-(-blocks // self.processors) - 1).bit_length())
        warps = min(warps, -(-inputs // chunk))
        grid = (-(-rows // rows_per_block), blocks)  # blocks that read the same codes are neighbours
        sizes = (rows, outputs, inputs, groups, shift)
        function = self.functions[function_name("multiply", bits, dtype)]
        return Launch(function, grid, 32 * warps, WARP_MEMORY * warps, 4, sizes)

    def can_dequantize(
        self, dtype: torch.dtype, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int
    ) -> bool:
        """Whether the kernel takes this matrix."""
        sizes = (weight.shape[0], in_features, count_groups(weight_scale), bits)
        return self.find_dequantize(dtype, *sizes) is not None and is_readable(weight, weight_scale)

    def can_multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int
    ) -> bool:
        """Whether the fused kernel takes these."""
        sizes = (x.shape[0], weight.shape[0], in_features, count_groups(weight_scale), bits)
        return (
            self.find_multiply(x.dtype, *sizes) is not None
            and x.data_ptr() % 16 == 0
            and is_readable(weight, weight_scale)
        )

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int
    ) -> torch.Tensor:
        """x [M, K], contiguous, times the matrix, [N, K] of codes: [M, N]. The matrix is read as it is stored."""
        rows, outputs = x.shape[0], weight.shape[0]
        out = x.new_empty(rows, outputs)
        launch = self.find_multiply(x.dtype, rows, outputs, in_features, count_groups(weight_scale), bits)
        launch(self, x, weight, weight_scale, out)
        return out

    def dequantize(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The matrix [N, K], equal to the reference's bit for bit."""
        outputs = weight.shape[0]
        out = weight.new_empty((outputs, in_features), dtype=dtype)
        launch = self.find_dequantize(dtype, outputs, in_features, count_groups(weight_scale), bits)
        launch(self, weight, weight_scale, out)
        return out


def function_name(kind: str, bits: int, dtype: torch.dtype) -> str:
    return f"{kind}_int{bits}_{str(dtype).removeprefix('torch.')}"


def is_readable(weight: torch.Tensor, weight_scale: torch.Tensor) -> bool:
    """Whether a matrix lies as the kernels read it, 16 bytes of codes at a time."""
    return (
        weight_scale.dtype == torch.float16
        and weight.is_contiguous()
        and weight_scale.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def count_groups(weight_scale: torch.Tensor) -> int:
    return 1 if weight_scale.dim() == 1 else weight_scale.shape[1]


class CudaMultiply(KernelUser):
    """`multiply` of quantization_kernels.py for CUDA tensors.

    Args:
        by_rows: the torch way: same arguments, and optionally a function with the arguments of `dequantize`.
    """

    choice, name = "cuda", "CUDA kernels for low-bit weights"

    def __init__(self, by_rows: Callable[..., torch.Tensor]):
        super().__init__()
        self.by_rows = by_rows

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        transposed: bool,
    ) -> torch.Tensor:
        kernels = self.find(x.device)
        if kernels is None:
            return self.by_rows(x, weight, weight_scale, bits, in_features, transposed)
        try:
            return self.multiply(kernels, x, weight, weight_scale, bits, in_features, transposed)
        except KernelError as error:
            self.give_up(x.device, error)
            return self.by_rows(x, weight, weight_scale, bits, in_features, transposed)

    def multiply(
        self,
        kernels: DeviceKernels,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        transposed: bool,
    ) -> torch.Tensor:
        """Fused for a few rows of x; otherwise the matrix is dequantized, for cuBLAS."""
        x = x.contiguous()
        if not transposed and kernels.can_multiply(x, weight, weight_scale, bits, in_features):
            return kernels.multiply(x, weight, weight_scale, bits, in_features)
        fits = kernels.can_dequantize(x.dtype, weight, weight_scale, bits, in_features)
        to_matrix = kernels.dequantize if fits else None
        return self.by_rows(x, weight, weight_scale, bits, in_features, transposed, to_matrix)

    def find(self, device: torch.device) -> DeviceKernels | None:
        """The kernels of a device, or None for the torch way."""
        if device not in self.found and torch.cuda.is_current_stream_capturing():
            return None  # no time to load a module; the next eager call will
        return super().find(device)

    def make(self, device: torch.device) -> DeviceKernels:
        if torch.version.hip:
            raise NoKernelsError("they are for NVIDIA's GPUs")
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            raise NoKernelsError(f"{device} has compute capability {capability}, they need {OLDEST_CAPABILITY}")
        return DeviceKernels(device)

    def check(self, kernels: DeviceKernels) -> None:
        """Compare all kernels with the torch way on a few small problems.

        Raises:
            KernelError: they disagree.
        """
        random = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
        for bits, groups in ((4, 8), (4, 1), (8, 1)):
            codes = torch.randint(-128, 128, (64, 512 * bits // 8), **random).to(torch.int8)
            scale = torch.rand((64, groups) if groups > 1 else (64,), **random).sub(0.5).half()
            for dtype in kernels.dtypes:
                x = torch.randn(3, 512, **random).to(dtype)
                expected = self.by_rows(x.float(), codes, scale, bits, 512, False)
                inputs = [tensor.to(kernels.device) for tensor in (x, codes, scale)]
                fused = kernels.multiply(*inputs, bits, 512)
                dequantized = self.by_rows(*inputs, bits, 512, False, kernels.dequantize)
                for name, out in (("multiply", fused), ("dequantize", dequantized)):
                    error = ((out.float().cpu() - expected).norm() / expected.norm()).item()
                    if not error < CHECK_TOLERANCE[dtype]:
                        raise KernelError(f"{function_name(name, bits, dtype)} is off by {error:.2g} of the result.")
