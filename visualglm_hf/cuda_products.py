# SPDX-License-Identifier: Apache-2.0
"""Products with low-bit matrices on NVIDIA GPUs: which kernel is launched for which sizes.

Not here: the kernels (`cuda_source.py`, `cuda_tiles.py`), the compiler and the driver (`cuda_runtime.py`), the
format's bytes and the naive twins of the kernels (`lowbit_format.py`), and when they are used (`lowbit_products.py`).

Shapes: M rows of activations, N outputs, K inputs, n groups of K / n neighbours in a row of the matrix.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch

from .cuda_runtime import Driver, Launch, compile_kernels
from .cuda_source import HELPERS, SOURCE
from .cuda_tiles import PADDING, STAGES, STEP, TOGETHER, TileKernel, tile_source
from .kernel_choice import KernelError, KernelUser, NoKernelsError, name_of
from .lowbit_format import count_groups, dequantize_naive, multiply_naive


# M up to which a kernel reads the codes where no tiles are planned: many rows are better dequantized once, for cuBLAS
# (on an H200 from 48 rows).
FUSED_ROWS = 32
BLOCK_OUTPUTS = 32  # outputs of a block of the kernel for a few rows
LANE_BITS = 128  # bits of codes that a lane loads at once
MIN_WARPS, MAX_WARPS = 8, 32  # of a block of the kernel for a few rows; registers allow no more at a time
WARP_MEMORY = (8 * (BLOCK_OUTPUTS + 1) + 1) * 4  # bytes of shared memory for the sums of a warp
MAX_BLOCKS = 2**16 - 1  # along the second dimension of a grid
MAX_ELEMENTS = 2**31  # of a matrix, for 32-bit offsets
DEQUANTIZE_THREADS = 256
WARP_TILES = 2  # of 16 outputs, that a warp of the tile kernel has
MOST_WARPS = 8  # of its blocks; registers allow no more with 64 rows
OLDEST_CAPABILITY = (7, 5)  # Turing: the first with m16n8k8
BFLOAT16_CAPABILITY = (8, 0)


class Tiles(NamedTuple):
    """How the tile kernel divides a product.

    Args:
        row_tiles: a block has 8 rows of x so many times.
        across, along: warps of a block: so many divide its outputs, and so many its columns.
        clusters: how many blocks may divide the columns once more, of which the one that takes the least time is taken.
        most_load: pieces of a product that are 64 outputs wide and as many rows high, for each processor, at most.
    """

    row_tiles: int
    across: int
    along: int
    clusters: tuple[int, ...]
    most_load: float = math.inf

    @property
    def rows(self) -> int:
        return 8 * self.row_tiles

    @property
    def outputs(self) -> int:
        return 16 * WARP_TILES * self.across

    @property
    def warps(self) -> int:
        return self.across * self.along

    def kernel(self, bits: int, dtype: torch.dtype) -> TileKernel:
        return TileKernel(bits, name_of(dtype), WARP_TILES, self.row_tiles, 32 * MOST_WARPS)

    def memory(self, bits: int) -> int:
        """Bytes of shared memory: of all stages, and later of the sums in their place."""
        stage = self.along * TOGETHER * STEP * (2 * self.rows + self.outputs * bits // 8)
        return max(STAGES * stage, self.along * self.rows * (self.outputs + PADDING) * 4)

    def choose_cluster(self, blocks: int, processors: int) -> int:
        """How many blocks divide the columns of each of these: as many as take the least time.

        A processor's time grows with its blocks, but for the first few, until it has `MOST_WARPS`.
        """
        free = MOST_WARPS // self.warps
        return min(self.clusters, key=lambda size: max(-(-blocks * size // processors), free) / size)


class TileChoice(NamedTuple):
    """For which products the tile kernel is the fastest way, and with which tiles.

    Args:
        first_rows: from so many rows,
        last_rows: to so many, by bits.
        tiles: those for few rows first, and of those for as many rows the ones for few outputs.
    """

    first_rows: int
    last_rows: dict[int, int]
    tiles: tuple[Tiles, ...]

    def find(self, rows: int, outputs: int, processors: int) -> Tiles:
        most_rows = min(rows, self.tiles[-1].rows)
        return next(
            tiles
            for tiles in self.tiles
            if most_rows <= tiles.rows and -(-rows // tiles.rows) * outputs <= tiles.most_load * 64 * processors
        )


# By compute capability: only what was measured there (docs/benchmarks.md).
TILE_CHOICES = {
    (9, 0): TileChoice(
        first_rows=9,
        last_rows={4: 256, 8: 128},
        tiles=(
            Tiles(2, 1, 8, clusters=(1,), most_load=1),
            Tiles(2, 2, 2, clusters=(1, 2)),
            Tiles(4, 2, 4, clusters=(2,), most_load=1),
            Tiles(4, 2, 2, clusters=(1, 2)),
            Tiles(8, 2, 2, clusters=(2,), most_load=0.5),
            Tiles(8, 4, 2, clusters=(2,), most_load=1),
            Tiles(8, 4, 1, clusters=(1, 2)),
        ),
    )
}
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
        self.choice = TILE_CHOICES.get(self.capability)
        self.driver = Driver()
        image = compile_kernels(self.capability, SOURCE)
        names = [
            function_name(kind, bits, dtype)
            for kind in ("multiply", "dequantize")
            for bits in (4, 8)
            for dtype in self.dtypes
        ]
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # makes the device's context this thread's
            self.context = self.driver.current_context()
            self.functions = self.load(image, names)
        # Found once for each size: at one row, working it out would take longer than the kernel.
        self.dequantize_obstacle = functools.lru_cache(maxsize=None)(self.find_dequantize_obstacle)
        self.size_obstacle = functools.lru_cache(maxsize=None)(self.find_size_obstacle)
        self.find_dequantize = functools.lru_cache(maxsize=None)(self.plan_dequantize)
        self.launches: dict[tuple, Launch] = {}  # of products, by what `multiply_obstacle` takes

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

    def multiply_obstacle(
        self, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int
    ) -> str | None:
        """Why no kernel multiplies so many rows with the codes."""
        if (dtype, rows, outputs, inputs, groups, bits) in self.launches:
            return None
        obstacle = self.size_obstacle(dtype, rows, outputs, inputs, groups, bits)
        if obstacle is None and torch.cuda.is_current_stream_capturing():
            tiles = self.find_tiles(rows, outputs, inputs, groups, bits)
            if tiles is not None and tiles.kernel(bits, dtype).name not in self.functions:
                return "a graph is being captured"  # no time to load a module
        return obstacle

    def find_size_obstacle(
        self, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int
    ) -> str | None:
        """Why no kernel can multiply so many rows with the codes. They find a column's group by shifting."""
        width = inputs // groups
        most = FUSED_ROWS if self.choice is None else max(FUSED_ROWS, self.choice.last_rows[bits])
        if not 0 < rows <= most:
            return f"{rows} rows of activations, not 1 to {most}"
        if outputs % BLOCK_OUTPUTS:
            return f"a matrix [{outputs}, {inputs}], whose rows are no multiple of {BLOCK_OUTPUTS}"
        if outputs // BLOCK_OUTPUTS > MAX_BLOCKS or outputs * inputs > MAX_ELEMENTS:
            return f"a matrix [{outputs}, {inputs}], which is too large"
        if groups > 1 and width & (width - 1):
            return f"groups of {width} columns, no power of two"
        if rows > FUSED_ROWS and inputs // groups % STEP:
            return f"{rows} rows of activations, and groups that are no multiple of {STEP} columns"
        return self.dequantize_obstacle(dtype, outputs, inputs, groups, bits)

    def find_tiles(self, rows: int, outputs: int, inputs: int, groups: int, bits: int) -> Tiles | None:
        """The tiles of a product without an obstacle; None for the kernel for a few rows."""
        if self.choice is None or not self.choice.first_rows <= rows <= self.choice.last_rows[bits]:
            return None
        return None if inputs // groups % STEP else self.choice.find(rows, outputs, self.processors)

    def load(self, image: bytes, names: list[str]) -> dict[str, ctypes.c_void_p]:
        module = self.driver.load_module(image)
        return {name: self.driver.get_function(module, name) for name in names}

    def tile_function(self, tiles: Tiles, bits: int, dtype: torch.dtype) -> ctypes.c_void_p:
        """The tile kernel of a format, compiled with those for other numbers of rows when it is first needed."""
        name = tiles.kernel(bits, dtype).name
        if name not in self.functions:
            kernels = dict.fromkeys(each.kernel(bits, dtype) for each in self.choice.tiles)
            image = compile_kernels(self.capability, HELPERS + tile_source(kernels))
            with torch.cuda.device(self.device):
                self.functions.update(self.load(image, [each.name for each in kernels]))
            for each in self.choice.tiles:
                check_multiply(self, bits, 8, dtype, each.rows + 1, each)
        return self.functions[name]

    def plan_dequantize(self, dtype: torch.dtype, outputs: int, inputs: int, groups: int, bits: int) -> Launch:
        """How a matrix of this size is dequantized."""
        threads = outputs * inputs * bits // LANE_BITS
        grid = (-(-threads // DEQUANTIZE_THREADS), 1)
        sizes = (outputs, inputs, groups, inputs // groups)
        function = self.functions[function_name("dequantize", bits, dtype)]
        return Launch(self.driver, function, grid, DEQUANTIZE_THREADS, 0, 3, sizes)

    def plan_multiply(self, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int) -> Launch:
        """How a kernel multiplies so many rows with the codes."""
        tiles = self.find_tiles(rows, outputs, inputs, groups, bits)
        if tiles is not None:
            return self.plan_tiles(tiles, dtype, rows, outputs, inputs, groups, bits)
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
        return Launch(self.driver, function, grid, 32 * warps, WARP_MEMORY * warps, 5, sizes)

    def plan_tiles(
        self, tiles: Tiles, dtype: torch.dtype, rows: int, outputs: int, inputs: int, groups: int, bits: int
    ) -> Launch:
        """How the tile kernel multiplies so many rows."""
        shift = 31 if groups == 1 else (inputs // groups // STEP).bit_length() - 1
        row_blocks, blocks = -(-rows // tiles.rows), -(-outputs // tiles.outputs)
        cluster = tiles.choose_cluster(row_blocks * blocks, self.processors)
        grid = (cluster * row_blocks, blocks)  # blocks that read the same codes are neighbours
        sizes = (rows, outputs, inputs, groups, shift, tiles.across)
        function = self.tile_function(tiles, bits, dtype)
        return Launch(self.driver, function, grid, 32 * tiles.warps, tiles.memory(bits), 5, sizes, cluster)

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., K], contiguous, times the matrix, [N, K] of codes, and the bias: [..., N]."""
        sizes = sizes_of(x, weight, weight_scale, bits, in_features)
        launch = self.launches.get(sizes)
        if launch is None:
            launch = self.launches[sizes] = self.plan_multiply(*sizes)
        return self.launch_multiply(launch, x, weight, weight_scale, bias)

    def multiply_again(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """`multiply`, if a product of these sizes was computed before; None if not, or if a tensor does not lie so."""
        launch = self.launches.get(sizes_of(x, weight, weight_scale, bits, in_features))
        if launch is None or x.data_ptr() % 16 or reading_obstacle(weight, weight_scale) is not None:
            return None
        return self.launch_multiply(launch, x, weight, weight_scale, bias) if can_add(bias, x.dtype) else None

    def launch_multiply(
        self,
        launch: Launch,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        added = 0 if bias is None else bias.data_ptr()
        launch(self, x.data_ptr(), weight.data_ptr(), weight_scale.data_ptr(), added, out.data_ptr())
        return out

    def dequantize(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The matrix [N, K], equal to the reference's bit for bit."""
        outputs = weight.shape[0]
        out = weight.new_empty((outputs, in_features), dtype=dtype)
        launch = self.find_dequantize(dtype, outputs, in_features, count_groups(weight_scale), bits)
        launch(self, weight.data_ptr(), weight_scale.data_ptr(), out.data_ptr())
        return out


def function_name(kind: str, bits: int, dtype: torch.dtype) -> str:
    return f"{kind}_int{bits}_{name_of(dtype)}"


def sizes_of(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, in_features: int
) -> tuple[torch.dtype, int, int, int, int, int]:
    """What decides how a product is launched: dtype, M, N, K, n and bits."""
    groups = 1 if weight_scale.dim() == 1 else weight_scale.shape[1]
    return x.dtype, x.numel() // in_features, weight.shape[0], in_features, groups, bits


def can_add(bias: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels can add a bias to a product of this dtype."""
    return bias is None or (bias.dtype == dtype and bias.is_contiguous() and bias.data_ptr() % 16 == 0)


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
        for bits, groups in ((4, 8), (4, 1), (8, 1)):
            for dtype in kernels.dtypes:
                check_multiply(kernels, bits, groups, dtype, rows=3)
                check_dequantize(kernels, bits, groups, dtype)


class Problem(NamedTuple):
    """A small random product for the self-check: 64 outputs, 512 columns."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def make(cls, bits: int, groups: int, dtype: torch.dtype, rows: int) -> "Problem":
        random = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
        codes = torch.randint(-128, 128, (64, 512 * bits // 8), **random).to(torch.int8)
        scale = torch.rand((64, groups) if groups > 1 else (64,), **random).sub(0.5).half()
        return cls(torch.randn(rows, 512, **random).to(dtype), codes, scale, torch.randn(64, **random).to(dtype))


def check_multiply(
    kernels: DeviceKernels, bits: int, groups: int, dtype: torch.dtype, rows: int, tiles: Tiles | None = None
) -> None:
    """Compare a product with the naive twin's; raise a `KernelError` if they disagree."""
    problem = Problem.make(bits, groups, dtype, rows)
    x, codes, scale, bias = (tensor.to(kernels.device) for tensor in problem)
    sizes = sizes_of(x, codes, scale, bits, 512)
    launch = kernels.plan_multiply(*sizes) if tiles is None else kernels.plan_tiles(tiles, *sizes)
    out = kernels.launch_multiply(launch, x, codes, scale, bias)
    name = function_name("multiply", bits, dtype) if tiles is None else tiles.kernel(bits, dtype).name
    compare(name, dtype, out, multiply_naive(*problem[:3], bits) + problem.bias.float())


def check_dequantize(kernels: DeviceKernels, bits: int, groups: int, dtype: torch.dtype) -> None:
    """Compare a matrix with the naive twin's; raise a `KernelError` if they disagree."""
    problem = Problem.make(bits, groups, dtype, rows=1)
    out = kernels.dequantize(*(tensor.to(kernels.device) for tensor in problem[1:3]), bits, 512, dtype)
    compare(
        function_name("dequantize", bits, dtype), dtype, out, dequantize_naive(*problem[1:3], bits, 512, torch.float32)
    )


def compare(name: str, dtype: torch.dtype, out: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((out.float().cpu() - expected).norm() / expected.norm()).item()
    if not error < CHECK_TOLERANCE[dtype]:
        raise KernelError(f"{name} is off by {error:.2g} of the result.")


CUDA_PRODUCTS = CudaProducts()
