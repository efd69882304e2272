# SPDX-License-Identifier: Apache-2.0
"""Products with low-bit matrices on NVIDIA GPUs: which kernel is launched for which sizes.

Not here: the kernels (`cuda_source.py`), the compiler and the driver (`cuda_runtime.py`), the format's bytes and the
naive twins of the kernels (`lowbit_format.py`), and when they are used (`lowbit_products.py`).

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix.
"""

import functools

import torch

from .cuda_runtime import Driver, Launch, compile_kernels
from .kernel_choice import KernelError, KernelUser, NoKernelsError, name_of
from .lowbit_format import count_groups, dequantize_naive, multiply_naive


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
# Relative error of the self-check: results are rounded to 11 or 8 bits.
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
        self.dequantize_obstacle = functools.lru_cache(maxsize=None)(self.find_dequantize_obstacle)
        self.multiply_obstacle = functools.lru_cache(maxsize=None)(self.find_multiply_obstacle)
        self.find_dequantize = functools.lru_cache(maxsize=None)(self.plan_dequantize)
        self.find_multiply = functools.lru_cache(maxsize=None)(self.plan_multiply)

    def find_dequantize_obstacle(
        self, dtype: torch.dtype, outputs: int, inputs: int, groups: int, bits: int
    ) -> str | None:
        """Why a matrix of this size cannot be dequantized: lanes would load their 16 bytes from two rows or groups."""
        span = LANE_BITS // bits
        if dtype not in self.dtypes:
            return f"{name_of(dtype)} activations on a GPU of compute capability {self.capability}"
        if outputs == 0 or inputs == 0 or inputs % span:
            return f"a matrix [{outputs}, {inputs}], whose columns are no multiple of {span}"
        if groups > 1 and inputs // groups % span:
            return f"groups of {inputs // groups} columns, no multiple of {span}"
        return None

    def find_multiply_obstacle(
        self, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int
    ) -> str | None:
        """Why the fused kernel cannot multiply so many rows. It finds a column's group by shifting."""
        width = inputs // groups
        if not 0 < rows <= FUSED_ROWS:
            return f"{rows} rows of activations, not 1 to {FUSED_ROWS}"
        if outputs % BLOCK_OUTPUTS:
            return f"a matrix [{outputs}, {inputs}], whose rows are no multiple of {BLOCK_OUTPUTS}"
        if outputs // BLOCK_OUTPUTS > MAX_BLOCKS or outputs * inputs > MAX_ELEMENTS:
            return f"a matrix [{outputs}, {inputs}], which is too large"
        if groups > 1 and width & (width - 1):
            return f"groups of {width} columns, no power of two"
        return self.dequantize_obstacle(dtype, outputs, inputs, groups, bits)

    def plan_dequantize(self, dtype: torch.dtype, outputs: int, inputs: int, groups: int, bits: int) -> Launch:
        """How a matrix of this size is dequantized."""
        threads = outputs * inputs * bits // LANE_BITS
        grid = (-(-threads // DEQUANTIZE_THREADS), 1)
        sizes = (outputs, inputs, groups, inputs // groups)
        return Launch(self.functions[function_name("dequantize", bits, dtype)], grid, DEQUANTIZE_THREADS, 0, 3, sizes)

    def plan_multiply(self, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int) -> Launch:
        """How the fused kernel multiplies so many rows."""
        width = inputs // groups
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
    return f"{kind}_int{bits}_{name_of(dtype)}"


def reading_obstacle(weight: torch.Tensor, weight_scale: torch.Tensor) -> str | None:
    """Why the kernels cannot read a matrix where it lies, 16 bytes of codes at a time."""
    if weight_scale.dtype != torch.float16 or not weight_scale.is_contiguous():
        return "scales that are not float16 and contiguous"
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        return "a matrix that is not contiguous, or not at a multiple of 16 bytes"
    return None


class CudaProducts(KernelUser):
    """What multiplies with low-bit matrices on NVIDIA GPUs."""

    choice, name = "cuda", "CUDA kernels for low-bit weights"

    def find(self, device: torch.device) -> DeviceKernels | None:
        if self.is_too_early(device):
            return None
        return super().find(device)

    def obstacle(self, device: torch.device) -> str | None:
        return "a graph is being captured" if self.is_too_early(device) else super().obstacle(device)

    def is_too_early(self, device: torch.device) -> bool:
        """Whether there is no time to load a module now; the next eager call will."""
        return device not in self.found and torch.cuda.is_current_stream_capturing()

    def loaded(self, device: torch.device) -> DeviceKernels:
        """The kernels of a device that had no obstacle; a `KernelError` if another thread has given them up since."""
        kernels = self.found[device]
        if kernels is None:
            raise KernelError(self.reasons[device])
        return kernels

    def make(self, device: torch.device) -> DeviceKernels:
        if torch.version.hip:
            raise NoKernelsError("they are for NVIDIA's GPUs")
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            raise NoKernelsError(f"{device} has compute capability {capability}, they need {OLDEST_CAPABILITY}")
        return DeviceKernels(device)

    def check(self, kernels: DeviceKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
        for bits, groups in ((4, 8), (4, 1), (8, 1)):
            codes = torch.randint(-128, 128, (64, 512 * bits // 8), **random).to(torch.int8)
            scale = torch.rand((64, groups) if groups > 1 else (64,), **random).sub(0.5).half()
            matrix = dequantize_naive(codes, scale, bits, 512, torch.float32)
            for dtype in kernels.dtypes:
                x = torch.randn(3, 512, **random).to(dtype)
                inputs = [tensor.to(kernels.device) for tensor in (x, codes, scale)]
                pairs = {
                    "multiply": (kernels.multiply(*inputs, bits, 512), multiply_naive(x, codes, scale, bits)),
                    "dequantize": (kernels.dequantize(*inputs[1:], bits, 512, dtype), matrix),
                }
                for name, (out, expected) in pairs.items():
                    error = ((out.float().cpu() - expected).norm() / expected.norm()).item()
                    if not error < CHECK_TOLERANCE[dtype]:
                        raise KernelError(f"{function_name(name, bits, dtype)} is off by {error:.2g} of the result.")


CUDA_PRODUCTS = CudaProducts()
