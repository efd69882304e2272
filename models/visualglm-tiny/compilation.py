# SPDX-License-Identifier: Apache-2.0
"""A compiled decode step: with which compiler, recorded as a CUDA graph or not, for caches of which lengths.

Not here: the step itself (`modeling_visualglm.py`). On CUDA a static cache alone lets transformers compile; on a CPU
it never does, so here is one way for both.
"""

import functools
import importlib.util
import os
import shlex
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers import Cache, CompileConfig
from transformers.utils import ModelOutput


SHORTEST_CACHE = 256  # tokens; every longer one is twice as long, so a conversation meets few lengths
CPP_COMPILER = {"darwin": "clang++", "win32": "cl"}  # where torch.compile looks, elsewhere g++
# Modes of torch.compile with CUDA graphs, and the same without; the backend that records and does not compile.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
GRAPHS_ALONE = "cudagraphs"
RECORDING = threading.Lock()  # a process may record one graph at a time


def bucket_length(length: int, limit: int) -> int:
    """The length of the cache for `length` tokens: the same for many of them; beyond `limit`, their own."""
    bucket = SHORTEST_CACHE
    while bucket < length:
        bucket *= 2
    return max(length, min(bucket, limit))


def resolve_compile_config(compile: bool | CompileConfig, device: torch.device) -> CompileConfig:
    """The options of `torch.compile` for a device.

    Args:
        compile: True for the best that is known, or the caller's own.
        device: of the model.

    Raises:
        ValueError: something else, a device that has no compiler, or a compiler that is not installed.
    """
    if compile is True:
        compile = best_config(device)
    if not isinstance(compile, CompileConfig):
        raise ValueError(f"compile must be True, False or a CompileConfig of transformers, found {compile!r}.")
    if compile.backend == GRAPHS_ALONE and device.type != "cuda":
        raise ValueError(
            f"CUDA graphs (backend={GRAPHS_ALONE!r}) are for CUDA, not for {device.type!r}. Leave them out."
        )
    if compile.backend == "inductor":
        check_compiler(device)
    return compile


def best_config(device: torch.device) -> CompileConfig:
    """On CUDA with graphs, and without a compiler where Triton is missing."""
    if device.type != "cuda":
        return CompileConfig(mode="default")
    return CompileConfig(mode="reduce-overhead") if has_triton() else CompileConfig(backend=GRAPHS_ALONE)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_compiler(device: torch.device) -> None:
    """Raise a `ValueError` if inductor, torch's own backend, cannot compile for a device."""
    if device.type == "cpu":
        compiler = shlex.split(os.environ.get("CXX", "") or CPP_COMPILER.get(sys.platform, "g++"))[0]
        if shutil.which(compiler) is None:
            raise ValueError(
                f"compile=True needs a C++ compiler on a CPU, and there is no {compiler!r}. Install it (Linux: the "
                "package g++; macOS: xcode-select --install; Windows: the Visual Studio Build Tools), name another in "
                "the environment variable CXX, or leave compile out."
            )
    elif device.type == "cuda":
        if not has_triton():
            raise ValueError(
                "This CompileConfig needs Triton on CUDA, and it is not installed. Install it (pip install triton; "
                "Windows: triton-windows), or give compile=True, which then records CUDA graphs without compiling."
            )
    else:
        raise ValueError(f"compile=True is for the CPU and CUDA, not for {device.type!r}. Leave compile out.")


def compile_call(config: CompileConfig, device: torch.device, is_divided: bool = False) -> Callable[..., ModelOutput]:
    """`call_model` for one answer, compiled and, where `config` says CUDA graphs, recorded.

    torch knows equal options again: another answer's step is not compiled anew.

    Args:
        device: of the inputs.
        is_divided: other parts of the model are on other devices or in other processes, where a graph cannot be.
    """
    can_record = device.type == "cuda" and not is_divided
    if config.backend == GRAPHS_ALONE:
        return RecordedCall(call_model) if can_record else call_model
    options = config.to_dict()
    if can_record and config.backend == "inductor" and config.mode in WITHOUT_GRAPHS:
        return RecordedCall(torch.compile(call_model, **{**options, "mode": WITHOUT_GRAPHS[config.mode]}))
    return torch.compile(call_model, **options)


def call_model(model: torch.nn.Module, **inputs) -> ModelOutput:
    """A function of the model rather than its method: what is compiled for a model is never mistaken for a copy's."""
    return model(**inputs)


class RecordedCall:
    """A call of a model that is recorded as a CUDA graph when its inputs come again, and replayed from then on.

    All that the call starts on the device, hundreds of kernels, is then started at once. It is for one answer:
    recording takes less than two steps that are not recorded, so each answer has its own graph, wherever its cache lies
    and in whichever thread it is generated. (Graphs of torch's own mode "reduce-overhead" belong to a thread, and what
    it does around them, for each token, took longer than the step itself on an H200.)

    The first call runs as it is, and so do calls with inputs of other shapes or a cache that has moved. If recording
    fails, there is one warning, and all calls run as they are.

    Args:
        call: takes a model, and its inputs by name. Tensors among the inputs may have other values each time, and a
            cache may change in place.
    """

    def __init__(self, call: Callable[..., ModelOutput]):
        self.call = call
        self.key: Hashable = None
        self.inputs: dict[str, Any] = {}  # that `key` describes: nothing else can have their ids
        self.recording: Recording | None = None
        self.can_record = True

    def __call__(self, model: torch.nn.Module, **inputs) -> ModelOutput:
        key = describe_inputs(inputs)
        if key != self.key:
            self.key, self.inputs, self.recording = key, inputs, None
        elif self.recording is None and self.can_record:
            self.record(model, inputs)
        return self.call(model, **inputs) if self.recording is None else self.recording.replay(inputs)

    def record(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        try:
            self.recording = Recording(self.call, model, inputs)
        except RuntimeError as error:
            self.can_record = False
            warnings.warn(
                f"This step cannot be recorded as a CUDA graph, and is slower without. Reason: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


class Recording:
    """A CUDA graph of a call, which is not executed while it is recorded, on buffers in place of its tensors."""

    def __init__(self, call: Callable[..., ModelOutput], model: torch.nn.Module, inputs: dict[str, Any]):
        self.buffers = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.graph = torch.cuda.CUDAGraph()
        # The outer stream is there to come back to, if recording fails.
        with RECORDING, torch.cuda.device(model.device), torch.cuda.stream(torch.cuda.current_stream()):
            stream = recording_stream(model.device)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = call(model, **{**inputs, **self.buffers})

    def replay(self, inputs: dict[str, Any]) -> ModelOutput:
        for name, buffer in self.buffers.items():
            buffer.copy_(inputs[name])
        self.graph.replay()
        return copy_tensors(self.outputs)  # the next replay writes where this one did


@functools.lru_cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


def describe_inputs(inputs: dict[str, Any]) -> Hashable:
    """What has to stay the same for a graph to be replayed."""
    return tuple((name, *describe(value)) for name, value in inputs.items())


def describe(value: Any) -> tuple:
    """Of a tensor all but its values, of a cache where it lies; anything else has to be the same object."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, Cache):
        return id(value), *((layer.keys.data_ptr(), layer.values.data_ptr()) for layer in value.layers)
    return (id(value),)


def copy_tensors(value: Any) -> Any:
    """Copy the tensors of an output, and of the tuples and outputs in it."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, ModelOutput):
        return type(value)(**{name: copy_tensors(each) for name, each in value.items()})
    return tuple(map(copy_tensors, value)) if isinstance(value, tuple) else value
