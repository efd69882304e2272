# SPDX-License-Identifier: Apache-2.0
"""Code for an NVIDIA GPU: NVRTC compiles it, the driver loads and launches it.

Not here: the code (`cuda_source.py`, `cuda_tiles.py`), what is launched for which sizes (`cuda_products.py`), and
whether it is used (`kernel_choice.py`).

The source is compiled when a device is first used, by the NVRTC that comes with torch, to machine code for that
device. Nothing else is needed: no compiler, no toolkit, no headers. Importing this file touches no GPU and no library.
"""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .kernel_choice import KernelError


# By major version, the newest first: on Linux, on Windows.
NVRTC_NAMES = {
    13: ("libnvrtc.so.13", "nvrtc64_130_0.dll"),
    12: ("libnvrtc.so.12", "nvrtc64_120_0.dll"),
    11: ("libnvrtc.so.11.2", "nvrtc64_112_0.dll"),
}
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
MOST_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
USUAL_MEMORY = 48 * 1024  # bytes of shared memory that a block has without asking


def find_nvrtc() -> Iterator[ctypes.CDLL]:
    """Load one NVRTC after the other, torch's major version first: the one found by name, then those of the wheels.

    A library that torch has loaded already is found by name.
    """
    own = (torch.version.cuda or "").split(".")[0]
    majors = [int(own)] if own else []
    majors += [major for major in NVRTC_NAMES if major not in majors]
    names = [NVRTC_NAMES[major][sys.platform == "win32"] for major in majors if major in NVRTC_NAMES]
    packages = Path(torch.__file__).parents[1]
    folders = [packages / "torch/lib", *sorted(packages.glob("nvidia/*/lib")), *sorted(packages.glob("nvidia/*/bin"))]
    for name in names:
        for folder in (None, *(folder for folder in folders if (folder / name).exists())):
            try:
                yield load_with_builtins(folder, name)
            except OSError:
                continue


def load_with_builtins(folder: Path | None, name: str) -> ctypes.CDLL:
    """Load a library, after the one that NVRTC looks for by name when it compiles, and does not find in a wheel."""
    if folder is None:
        return ctypes.CDLL(name)
    for builtins in sorted(folder.glob("*nvrtc-builtins*")):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(folder / name))


def check_nvrtc(nvrtc: ctypes.CDLL, code: int, program: ctypes.c_void_p) -> None:
    if code == 0:
        return
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    raise KernelError(f"{nvrtc.nvrtcGetErrorString(code).decode()} {log.value.decode(errors='replace')}".strip())


def supported_architectures(nvrtc: ctypes.CDLL) -> list[int]:
    """Compute capabilities that NVRTC has machine code for, such as 80 for 8.0."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    architectures = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(architectures)
    return sorted(architectures)


def compile_with(nvrtc: ctypes.CDLL, capability: tuple[int, int], source: str) -> bytes:
    """Compile to a CUBIN; for a GPU that this NVRTC does not know yet to PTX, which the driver finishes.

    PTX is the exception because a driver refuses it if it is older than NVRTC.
    """
    wanted = capability[0] * 10 + capability[1]
    known = [architecture for architecture in supported_architectures(nvrtc) if architecture <= wanted]
    if not known:
        raise KernelError(f"NVRTC does not know sm_{wanted} nor anything older.")
    kind, get = ("sm", "CUBIN") if known[-1] == wanted else ("compute", "PTX")
    options = [f"--gpu-architecture={kind}_{known[-1]}".encode(), b"--std=c++17"]
    program = ctypes.c_void_p()
    check_nvrtc(
        nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"visualglm.cu", 0, None, None), program
    )
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        check_nvrtc(nvrtc, code, program)
        size = ctypes.c_size_t()
        check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{get}Size")(program, ctypes.byref(size)), program)
        image = ctypes.create_string_buffer(size.value)
        check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{get}")(program, image), program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def compile_kernels(capability: tuple[int, int], source: str) -> bytes:
    """Compile with the first NVRTC that can."""
    reasons = []
    for nvrtc in find_nvrtc():
        try:
            return compile_with(nvrtc, capability, source)
        except (KernelError, AttributeError) as error:  # an old NVRTC lacks functions
            reasons.append(str(error))
    raise KernelError("; ".join(reasons) or "NVRTC, which comes with torch for CUDA, was not found.")


def load_driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def current_stream(index: int) -> int:
    """The address of torch's current stream on a device, without the object around it, which takes longer to make."""
    return torch._C._cuda_getCurrentRawStream(index)


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute with a value of three dimensions."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_uint * 3),
        ("unused", ctypes.c_uint * 13),
    ]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


class Driver:
    """The functions of CUDA's driver that are needed here, with errors as exceptions."""

    def __init__(self):
        self.library = load_driver()
        pointer, number = ctypes.c_void_p, ctypes.c_uint  # with types, or each call works them out
        self.launch_kernel = self.library.cuLaunchKernel
        self.launch_kernel.argtypes = (pointer, *[number] * 7, pointer, pointer, pointer)
        self.launch_clusters = getattr(self.library, "cuLaunchKernelEx", None)  # old drivers lack it, and clusters
        if self.launch_clusters is not None:
            self.launch_clusters.argtypes = (pointer, pointer, pointer, pointer)
        self.allowed: dict[int, int] = {}  # by function

    def check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise KernelError(f"CUDA error {code}: {(text.value or b'unknown').decode()}")

    def current_context(self) -> ctypes.c_void_p:
        context = ctypes.c_void_p()
        self.check(self.library.cuCtxGetCurrent(ctypes.byref(context)))
        return context

    def load_module(self, image: bytes) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        self.check(self.library.cuModuleLoadData(ctypes.byref(module), image))
        return module

    def get_function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self.check(self.library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        return function

    def allow_memory(self, function: ctypes.c_void_p, memory: int) -> None:
        """Let blocks of a kernel have so many bytes of shared memory, or more."""
        if memory <= self.allowed.get(function.value, USUAL_MEMORY):
            return
        self.allowed[function.value] = memory
        self.check(self.library.cuFuncSetAttribute(function, MOST_SHARED_MEMORY, memory))

    def launch_again(self, context: ctypes.c_void_p, code: int, call: Callable[..., int], arguments: tuple) -> None:
        """Make up for a launch that failed, for a thread whose first work on the device it is; else raise."""
        if code == INVALID_CONTEXT:
            self.check(self.library.cuCtxSetCurrent(context))
            code = call(*arguments)
        self.check(code)


class Launch:
    """A kernel and all that stays the same from call to call: how often it runs, and its sizes.

    Args:
        driver, function: of the kernel.
        grid: blocks, in two dimensions.
        threads, memory: of a block; bytes of shared memory.
        tensors: how many pointers the kernel takes.
        sizes: what it takes after them, as 32-bit integers.
        cluster: how many neighbours of the grid's first dimension share their memory.
    """

    def __init__(
        self,
        driver: Driver,
        function: ctypes.c_void_p,
        grid: tuple[int, int],
        threads: int,
        memory: int,
        tensors: int,
        sizes: tuple,
        cluster: int = 1,
    ):
        self.driver, self.function = driver, function
        self.pointers = (ctypes.c_uint64 * tensors)()
        self.sizes = (ctypes.c_int * len(sizes))(*sizes)
        addresses = [ctypes.addressof(self.pointers) + 8 * i for i in range(tensors)]
        addresses += [ctypes.addressof(self.sizes) + 4 * i for i in range(len(sizes))]
        self.arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self.call = (function, *grid, 1, threads, 1, 1, memory)
        self.config = None
        if cluster > 1:
            self.attribute = LaunchAttribute(CLUSTER_DIMENSION, 0, (cluster, 1, 1))
            self.config = LaunchConfig((*grid, 1), (threads, 1, 1), memory, None, ctypes.pointer(self.attribute), 1)
            self.config_address = ctypes.addressof(self.config)
        driver.allow_memory(function, memory)
        self.lock = threading.Lock()  # several threads may generate; the driver reads the arguments before it returns

    def __call__(self, kernels, *addresses: int) -> None:
        """Start it on torch's current stream, with the addresses of the tensors."""
        if kernels.device.index == torch.cuda.current_device():
            return self.start(kernels, addresses)
        with torch.cuda.device(kernels.device):
            return self.start(kernels, addresses)

    def start(self, kernels, addresses: tuple[int, ...]) -> None:
        stream = current_stream(kernels.device.index)
        with self.lock:
            self.pointers[:] = addresses
            if self.config is None:
                call, arguments = self.driver.launch_kernel, (*self.call, stream, self.arguments, None)
            else:
                self.config.stream = stream
                call, arguments = (
                    self.driver.launch_clusters,
                    (self.config_address, self.function, self.arguments, None),
                )
            code = call(*arguments)
            if code:
                self.driver.launch_again(kernels.context, code, call, arguments)
