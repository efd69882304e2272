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
"""A compiled decode step: with which compiler, for caches of which lengths.

Not here: the step itself (`modeling_visualglm.py`). On CUDA a static cache alone lets transformers compile; on a CPU
it never does, so here is one way for both.
"""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Callable

import torch
from transformers import CompileConfig
from transformers.utils import ModelOutput


SHORTEST_CACHE = 256  # tokens; every longer one is twice as long, so a conversation meets few lengths
CPP_COMPILER = {"darwin": "clang++", "win32": "cl"}  # where torch.compile looks, elsewhere g++
# Before, CUDA graphs worked in no thread but one, and `stream_chat` generates in another.
CUDA_GRAPHS_IN_THREADS = "2.13"


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
        compile = CompileConfig(mode=best_mode(device))
    if not isinstance(compile, CompileConfig):
        raise ValueError(f"compile must be True, False or a CompileConfig of transformers, found {compile!r}.")
    if compile.backend == "inductor":
        check_compiler(device)
    return compile


def best_mode(device: torch.device) -> str:
    """CUDA graphs, where there are any."""
    has_graphs = device.type == "cuda" and torch.__version__ >= CUDA_GRAPHS_IN_THREADS
    return "reduce-overhead" if has_graphs else "default"


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
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                "compile=True needs Triton on CUDA, and it is not installed. Install it (pip install triton; Windows: "
                "triton-windows) or leave compile out."
            )
    else:
        raise ValueError(f"compile=True is for the CPU and CUDA, not for {device.type!r}. Leave compile out.")


def compile_call(config: CompileConfig) -> Callable[..., ModelOutput]:
    """`call_model`, compiled. torch knows equal options again: another call's step is not compiled anew."""
    return torch.compile(call_model, **config.to_dict())


def call_model(model: torch.nn.Module, **inputs) -> ModelOutput:
    """A function of the model rather than its method: what is compiled for a model is never mistaken for a copy's."""
    return model(**inputs)
