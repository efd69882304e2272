"""A CPU that plays CUDA graphs, so that tests can record and replay without a GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from visualglm_hf.compilation import GRAPHS_ALONE, RecordedCall, call_model


RECORD = CompileConfig(backend=GRAPHS_ALONE)


class FakeGraph:
    """Does again, on the same memory, what was done while it recorded; recording itself leaves no trace."""

    def __init__(self):
        self.tape: list[tuple] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, arguments, keywords, results in self.tape:
            again = tensors_in(function(*arguments, **keywords))
            for old, new in zip(results, again, strict=False):
                old.copy_(new)


class Recorder(TorchDispatchMode):
    """Notes all operators, and refuses to hand a value to Python, as a stream does that is being captured."""

    def __init__(self, graph: FakeGraph):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        keywords = keywords or {}
        for parameter, value in zip(function._schema.arguments, arguments, strict=False):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                self.before.append((value, value.clone()))
        results = function(*arguments, **keywords)
        is_new = all(each.alias_info is None for each in function._schema.returns)  # no view, not written in place
        self.graph.tape.append((function, arguments, keywords, tensors_in(results) if is_new else []))
        return results

    def undo(self) -> None:
        """Bring back what was written to, and leave nothing in what was computed."""
        for _, _, _, results in self.graph.tape:
            for result in results:
                result.fill_(float("nan") if result.is_floating_point() else 0)
        for tensor, before in reversed(self.before):
            tensor.copy_(before)


def tensors_in(results: Any) -> list[torch.Tensor]:
    return [each for each in (results if isinstance(results, (tuple, list)) else [results]) if torch.is_tensor(each)]


@contextlib.contextmanager
def record(graph: FakeGraph, stream: Any, capture_error_mode: str) -> Iterator[None]:
    recorder = Recorder(graph)
    try:
        with recorder:
            yield
    finally:
        recorder.undo()


def play_graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Let this CPU play CUDA's graphs; returns those that are recorded, in order."""
    graphs: list[FakeGraph] = []

    class NotedGraph(FakeGraph):
        def __init__(self):
            super().__init__()
            graphs.append(self)

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NotedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")  # ours write to memory without torch knowing
    return graphs


def play_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Let decode steps of models on this CPU be recorded, whatever `compile` says; returns their graphs, in order."""
    for room in ("chat", "generation_visualglm"):
        monkeypatch.setattr(f"visualglm_hf.{room}.resolve_compile_config", lambda compile, device: compile)
    monkeypatch.setattr("visualglm_hf.generation_visualglm.compile_call", lambda *_: RecordedCall(call_model))
    return play_graphs(monkeypatch)
