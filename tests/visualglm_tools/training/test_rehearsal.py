"""`visualglm finetune --dry-run`: what it says, that it is true, and that nothing is left of it."""

import json
import re
import tempfile
from dataclasses import replace

import pytest

from tests.training_helpers import EXAMPLE, HELD_OUT, ROWS, At, interrupt, short_run, silent, train
from visualglm_tools.commands.finetune import Options
from visualglm_tools.training import rehearsal
from visualglm_tools.training.output import SETTINGS_FILE
from visualglm_tools.training.rehearsal import Clock, Times, describe_times, rehearse


@pytest.fixture
def settings(tmp_path):
    return short_run(tmp_path / "out", keep="self", train_iters=300, valid_data=(HELD_OUT,))


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_a_run_that_is_tried_says_what_it_would_take_and_leaves_nothing(tmp_path, temporary, capsys):
    options = f"--use_lora --train-data {ROWS} --old-data {EXAMPLE / 'old_abilities.json'} --save {tmp_path / 'out'}"
    assert train(f"{options} --cpu --dry-run", tmp_path) == 0
    said = capsys.readouterr().err
    assert "Lengths: 65 to 65 tokens" in said and "answers up to 12 of --max_target_length 256" in said
    assert "Steps: 300 of 4 rows" in said and "each row 80 times; 4 kept rows beside them" in said
    assert re.search(r"Memory: a step takes \d+ MB, computed \(weights 5 MB, .*\); at most [\d.]+ GB were in use", said)
    assert re.search(r"Time: [\d.]+ s a step, the median of 10 of .*: \d\d:\d\d in all", said)
    assert "The adapter is in" not in said and "Keeping" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"] and not list(temporary.iterdir())


def test_nothing_is_left_of_a_try_that_is_stopped(settings, temporary, monkeypatch):
    monkeypatch.setattr(rehearsal, "Clock", lambda: At(3, interrupt))
    with pytest.raises(KeyboardInterrupt):
        rehearse(settings, silent)
    assert not settings.save.exists() and not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strict": True, "max_target_length": 5}, "too long"),
        ({"layer_range": ("9",)}, "there is no layer '9'"),
        ({"layer_range": ("0", "all")}, "indices of layers, or the one word"),
    ],
    ids=["data", "options", "options that contradict each other"],
)
def test_what_a_run_refuses_is_refused_before(changes, message, settings):
    with pytest.raises(ValueError, match=message):
        rehearse(replace(settings, **changes), silent)
    assert not settings.save.exists()


def test_a_run_that_is_resumed_is_not_tried():
    with pytest.raises(ValueError, match="leave it or --resume out"):
        Options(method="lora", train_data=("data.json",), dry_run=True, resume=True).check()


def test_a_folder_that_is_in_use_is_refused_and_one_that_a_run_would_free_is_not_touched(settings, monkeypatch):
    (settings.save / "adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match="is in use"):
        rehearse(settings, silent)
    (settings.save / "adapter").rmdir()
    (settings.save / SETTINGS_FILE).write_text(json.dumps(settings.as_json()), encoding="utf-8")
    monkeypatch.setattr(rehearsal, "load_trainer", lambda *run: pytest.skip("it is taken"))
    with pytest.raises(pytest.skip.Exception):
        rehearse(settings, silent)
    assert [path.name for path in settings.save.iterdir()] == [SETTINGS_FILE]


def test_ten_steps_are_measured_after_those_that_warm_up():
    clock = Clock()
    clock.times = [0.0, 10.0, *(11.0 + number for number in range(10))]
    assert clock.steps() == [1.0] * 10


def test_the_time_of_a_run_is_that_of_its_steps_and_of_what_it_does_besides(settings):
    said = describe_times(Times([0.1, 0.2, 0.3], asking=20.0, measuring=40.0), settings)
    assert said == (
        "Time: 0.2 s a step, the median of 3 of 0.1 to 0.3 s; 01:00 for all steps, 00:20 of asking before, 00:40 of "
        "measuring: 02:00 in all, without loading."
    )
