# SPDX-License-Identifier: Apache-2.0
"""Code for this CPU: LLVM compiles it, and several threads run it.

Not here: how the code is written (`cpu_language.py`), what it computes (`cpu_products.py`, `cpu_many_rows.py`,
`cpu_attention.py`, `cpu_layer.py`), and whether it is used (`kernel_choice.py`).

The code is compiled for the CPU that runs it, when it is first needed, by the LLVM inside the Python package llvmlite:
`pip install llvmlite` is all there is to install.
"""

import ctypes
import mmap
import os
import platform
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from .cpu_language import ARM
from .kernel_choice import KernelError, KernelUser, NoKernelsError


LANES = 16  # numbers that are computed at a time
NEEDED_FEATURES = ("avx2", "f16c", "fma")  # of an x86 processor
FLOATS = {"dtype": torch.float32, "device": "cpu"}  # what kernels work with, whatever torch's defaults are
LARGE_PAGE = 2**21  # bytes
X86 = ("x86_64", "amd64")  # as platforms call it


def load_llvm():
    """Import LLVM, with what it needs to compile for this processor; None without llvmlite."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def check_processor(features: Mapping[str, bool]) -> None:
    """Raise a `KernelError` if LLVM would have to call functions of a C library for what this processor lacks."""
    machine = platform.machine().lower()
    if machine not in X86 + ARM:
        raise KernelError(f"There are no kernels for {machine} processors.")
    lacks = [name for name in NEEDED_FEATURES if not features.get(name)]
    if machine in X86 and lacks:
        raise KernelError(f"The processor lacks {', '.join(lacks)}.")


class Function(NamedTuple):
    """Compiled code."""

    address: int
    call: Callable[..., None]


class Compiler:
    """LLVM for one processor. What it has compiled stays until the process ends.

    Args:
        llvm: as `load_llvm` returns it.
        processor: its name, as LLVM has it; of this machine by default.
        features: what it can do and what not, by LLVM's names.
    """

    def __init__(self, llvm, processor: str | None = None, features: Mapping[str, bool] | None = None):
        self.llvm = llvm
        self.processor = processor or llvm.get_host_cpu_name()
        self.features = features or llvm.get_host_cpu_features()
        check_processor(self.features)
        self.target = self.make_target()
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self.make_target())  # takes the target

    def make_target(self):
        features = ",".join(("+" if has else "-") + name for name, has in self.features.items())
        return self.llvm.Target.from_default_triple().create_target_machine(self.processor, features, opt=3)

    def compile(self, name: str, source: str) -> Function:
        """Compile the function `name` of a task; while it runs, other threads of Python do too."""
        module = self.llvm.parse_assembly(source)
        module.verify()
        passes = self.llvm.create_pass_builder(self.target, self.llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(module, passes)
        self.engine.add_module(module)
        self.engine.finalize_object()
        address = self.engine.get_function_address(name)
        return Function(address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address))


def find_advise() -> Callable[..., int] | None:
    """Find the function with which Linux is told how memory will be used."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def make_empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor that is written once and read often, in large pages if the system has them to give.

    A processor that reads gigabytes in pages of 4 KB waits for their addresses. The system is asked before anything is
    written there, and may decline.
    """
    tensor, advise = torch.empty(shape, dtype=dtype, device="cpu"), find_advise()
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is not None and end - first >= LARGE_PAGE:
        advise(first, end - first, mmap.MADV_HUGEPAGE)
    return tensor


class Task(ctypes.Structure):
    """What the threads that run a kernel have in common; each kernel's has more."""

    _fields_ = (
        ("chunks", ctypes.c_int64),
        ("next_chunk", ctypes.c_int64),  # the first chunk that no thread has taken
    )

    def restart(self) -> None:
        """Let it be done once more."""
        self.next_chunk = 0


class Stage(NamedTuple):
    """A kernel, what it works on, and how many threads are worth it."""

    kernel: Function
    task: Task
    threads: int


def find_openmp() -> Callable[..., None] | None:
    """Find the function with which torch's own threads, warm and waiting, run a piece of work; Linux has it."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not GNU's OpenMP; Windows does not open None
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


class ThreadPool:
    """Runs a kernel in several threads: those of torch if they can be had, else some of its own."""

    def __init__(self):
        self.openmp = find_openmp()
        self.process = os.getpid()
        self.helpers = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="visualglm")

    def run(self, kernel: Function, task: ctypes.Structure, threads: int) -> None:
        if threads == 1:
            kernel.call(ctypes.byref(task))
        elif self.openmp is not None:
            self.openmp(kernel.address, ctypes.byref(task), threads, 0)
        else:
            self.run_with_helpers(kernel, task, threads - 1)

    def run_with_helpers(self, kernel: Function, task: ctypes.Structure, helpers: int) -> None:
        if self.process != os.getpid():  # a fork has no threads but one
            self.__init__()
        futures = [self.helpers.submit(kernel.call, ctypes.byref(task)) for _ in range(helpers)]
        kernel.call(ctypes.byref(task))
        for future in futures:
            if not future.cancel():  # one that has not begun has nothing left to take
                future.result()


class Kernels:
    """Kernels, compiled as they are needed, and the threads that run them.

    Raises:
        KernelError, RuntimeError, AttributeError: LLVM cannot make them, does not know this processor, or is too old.
    """

    def __init__(self, llvm):
        self.compiler = Compiler(llvm)
        self.pool = ThreadPool()
        self.functions: dict[str, Function] = {}
        self.lock = threading.Lock()

    def compiled(self, name: str, write: Callable[..., str]) -> Function:
        """The function that `write` writes when it is told the name, compiled once."""
        if name not in self.functions:
            with self.lock:
                if name not in self.functions:
                    self.functions[name] = self.compiler.compile(name, write(name))
        return self.functions[name]


class CpuKernelUser(KernelUser):
    """A user of kernels for this CPU, which are of `kernels_class`."""

    choice, name = "cpu", "CPU kernels"
    kernels_class: type[Kernels]

    @property
    def kernels(self) -> Any | None:
        """The kernels, or None for the torch way."""
        return self.find()

    def make(self, device: tuple | None) -> Kernels:
        """Make the kernels, those of a tuple of what they are for, or all."""
        llvm = load_llvm()
        if llvm is None:
            raise NoKernelsError("llvmlite is not installed; get it with: pip install llvmlite")
        return self.kernels_class(llvm, *(device or ()))
