"""The number format of a CPU: measured, remembered, and asked for where it matters."""

import json

import pytest
import torch

from visualglm_tools.checkpoints import loading, precision


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The file in which measurements are remembered, not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "visualglm_hf" / "precision.json"


def pretend(monkeypatch, float32: float, bfloat16: float) -> list[torch.dtype]:
    """Let products take so long; returns what is measured, as it is measured."""
    asked = []
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(precision, "measure", lambda dtype: asked.append(dtype) or seconds[dtype])
    return asked


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [
        (15.0, 1.0, torch.bfloat16),  # matrix instructions
        (1.0, 3.0, torch.float32),  # bfloat16 is converted
        (1.0, 0.9, torch.float32),  # no gain that is worth rounding
        (1.0, 0.7, torch.bfloat16),
    ],
)
def test_the_format_that_is_clearly_faster_is_chosen(monkeypatch, memory, float32, bfloat16, expected):
    pretend(monkeypatch, float32, bfloat16)
    assert precision.faster_dtype() is expected


def test_a_measurement_is_remembered_and_not_made_again(monkeypatch, memory):
    asked = pretend(monkeypatch, 15.0, 1.0)
    assert [precision.faster_dtype() for _ in range(3)] == [torch.bfloat16] * 3
    assert asked == [torch.float32, torch.bfloat16]
    pretend(monkeypatch, 1.0, 15.0)  # a neighbour makes noise
    assert precision.faster_dtype() is torch.bfloat16
    monkeypatch.setattr("platform.node", lambda: "another machine")
    assert precision.faster_dtype() is torch.float32


@pytest.mark.parametrize("content", ["", "[1]", '{"KEY": "float8"}', '{"KEY": 3}'])
def test_a_damaged_memory_is_renewed(monkeypatch, memory, content):
    pretend(monkeypatch, 15.0, 1.0)
    precision.faster_dtype()
    (key,) = json.loads(memory.read_text())
    memory.write_text(content.replace("KEY", key))
    assert precision.faster_dtype() is torch.bfloat16
    assert json.loads(memory.read_text())[key] == "bfloat16"


def test_where_nothing_can_be_remembered_the_answer_is_the_same(monkeypatch, memory):
    memory.parent.write_text("no folder")
    pretend(monkeypatch, 15.0, 1.0)
    assert precision.faster_dtype() is torch.bfloat16


def test_products_of_both_formats_are_measured():
    assert all(precision.measure(dtype) > 0 for dtype in precision.FORMATS.values())


def test_it_is_asked_for_large_models_that_fit_alone(monkeypatch, tiny_original):
    monkeypatch.setattr(loading, "faster_dtype", lambda: torch.bfloat16)
    cpu = torch.device("cpu")
    assert loading.choose_dtype("auto", cpu, tiny_original) is torch.float32
    monkeypatch.setattr(loading, "SMALL", 0)
    assert loading.choose_dtype("auto", cpu, tiny_original) is torch.bfloat16
    assert loading.choose_dtype("float32", cpu, tiny_original) is torch.float32
