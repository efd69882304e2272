"""The line that says how a run goes."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import TrainerState

from tests.training_helpers import HELD_OUT, short_run
from visualglm_tools.training import progress
from visualglm_tools.training.progress import Progress
from visualglm_tools.training.run import finetune


LINE = r"step (\d) of 4: loss [\d.]+, kept [\d.e-]+, held out [\d.]+; \d\d:\d\d left; [\d.]+ GB"


class Arguments:
    device = torch.device("cpu")


def after(steps: int, seconds: float, monkeypatch, **logs) -> str:
    """The line after some steps of 300 that have taken some seconds, of a run that was resumed at step 100."""
    monkeypatch.setattr(progress, "perf_counter", iter([0.0, seconds]).__next__)
    line = Progress(print, in_place=False)
    state = TrainerState(max_steps=300, global_step=100)
    line.on_train_begin(Arguments, state, None)
    line.figures = logs
    return line.describe(Arguments, replace(state, global_step=100 + steps))


def test_a_run_says_steps_losses_time_left_and_memory_in_one_line(tmp_path, capsys):
    said = []
    settings = short_run(tmp_path / "out", keep="self", keep_questions=2, valid_data=(HELD_OUT,))
    finetune(replace(settings, log_interval=2), said.append)
    lines = [line for line in said if line.startswith("step ")]
    assert [re.fullmatch(LINE, line).group(1) for line in lines] == ["2", "4"]
    assert "'loss'" not in capsys.readouterr().out  # which transformers prints as a dictionary


def test_the_time_that_is_left_is_that_of_the_steps_so_far(monkeypatch):
    assert after(50, 60.0, monkeypatch, loss=0.5).startswith("step 150 of 300: loss 0.5; 03:00 left; ")
    assert after(0, 1.0, monkeypatch).startswith("step 100 of 300: ") and "left" not in after(0, 1.0, monkeypatch)


def test_the_memory_of_a_gpu_is_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_070_000_000)
    assert progress.describe_memory(torch.device("cuda")) == "7.07 GB"


@pytest.mark.parametrize("process", [True, False], ids=["the first process", "another process"])
def test_in_a_terminal_the_line_is_renewed_in_its_place(process, capsys):
    said = []
    line = Progress(said.append, in_place=True)
    state = TrainerState(max_steps=3, is_world_process_zero=process)
    line.on_train_begin(Arguments, state, None)
    for state.global_step in (1, 2, 3):
        line.on_log(Arguments, state, None, {"loss": 1.0 / state.global_step})
        line.on_step_end(Arguments, state, None)
    line.on_train_end(Arguments, state, None)
    shown = capsys.readouterr().err
    assert said == [] and shown.count("\n") == process
    assert ("step 3 of 3: loss 0.3333" in shown) == process
