"""The training of the tiny model, a few steps of it: a run that was stopped computes what it would have computed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tools.tiny import pictures, train, words
from tools.tiny.options import Options
from visualglm_hf import VisualGLMForConditionalGeneration


STEPS, VISION_STEPS, STOP = 6, 2, 4


class Killed(Exception):
    """What ends a run."""


def options_for(folder, lessons="first") -> Options:
    return Options(output=folder, lessons=lessons, steps=STEPS, vision_steps=VISION_STEPS, batch_size=2, seed=5)


@pytest.fixture
def losses(monkeypatch) -> list[tuple[float, float]]:
    """What is computed, step by step."""
    noted, compute = [], train.compute_losses

    def note(*arguments):
        exam, words, marks = compute(*arguments)
        noted.append((exam.item(), words.item()))
        return exam, words, marks

    monkeypatch.setattr(train, "compute_losses", note)
    monkeypatch.setattr(train, "CHECKPOINT_INTERVAL", 2)
    return noted


@pytest.mark.parametrize(
    "lessons",
    [*(pytest.param(lessons, marks=pytest.mark.slow) for lessons in ("first", "second", "third")), "fourth"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, losses, monkeypatch, lessons):
    latin = {script: listed for script, listed in words.TRAINED_WORDS.items() if script != "Chinese"}
    monkeypatch.setattr(pictures, "TRAINED_WORDS", latin)  # Chinese signs need a font
    train.train(options_for(tmp_path / "whole", lessons))
    whole = list(losses)
    assert len(whole) == STEPS
    assert all((words > 0) == (step >= VISION_STEPS) for step, (_, words) in enumerate(whole))  # eyes first
    losses.clear()

    note = train.compute_losses

    def stop(*arguments):
        if len(losses) == STOP:
            raise Killed
        return note(*arguments)

    monkeypatch.setattr(train, "compute_losses", stop)
    with pytest.raises(Killed):
        train.train(options_for(tmp_path / "stopped", lessons))
    monkeypatch.setattr(train, "compute_losses", note)
    assert (tmp_path / "stopped.checkpoint.pt").exists()
    train.train(options_for(tmp_path / "stopped", lessons))
    assert losses == whole
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]

    model = VisualGLMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert model.dtype == torch.float16
    assert not any(path.is_symlink() for path in (tmp_path / "whole").iterdir())
    record = json.loads((tmp_path / "whole" / "training.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["vision_steps"], record["batch_size"], record["seed"]) == (
        STEPS,
        VISION_STEPS,
        2,
        5,
    )


def test_a_training_that_begins_with_another_model_says_which(tmp_path, losses):
    train.train(options_for(tmp_path / "first"))
    train.train(replace(options_for(tmp_path / "next"), start=tmp_path / "first"))
    first, following = (
        json.loads((tmp_path / name / "training.json").read_text(encoding="utf-8")) for name in ("first", "next")
    )
    assert following["start"] == first and "start" not in first
