"""Training that is stopped, killed, and gone on with; nothing is lost, and what is said of it is true."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from tests.helpers import load_float32
from tests.paths import ROOT, TINY
from tests.training_helpers import HELD_OUT, ROWS, At, adapter_in, interrupt, is_same, send, short_run, silent
from visualglm_tools.training.output import complete_checkpoints, remove_old
from visualglm_tools.training.rehearsal import rehearse
from visualglm_tools.training.run import finetune
from visualglm_tools.training.stopping import SIGNALS, StopAfterStep, Stopped


@pytest.fixture(scope="module", autouse=True)
def as_in_a_terminal():
    """Signals are heard, also where pytest itself runs under nohup or in the background."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def settings(tmp_path):
    """A run that would save at its end alone."""
    return short_run(tmp_path / "out", lora_dropout=0.1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What the run of `settings` gives when nobody stops it."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    finetune(short_run(folder, lora_dropout=0.1), silent)
    return adapter_in(folder)


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGHUP, 1)])
def test_a_signal_before_the_first_save_saves_the_step_and_resuming_ends_as_without_it(
    number, step, settings, uninterrupted
):
    with pytest.raises(Stopped, match=rf"checkpoint-{step + 1} is saved, .*--resume") as caught:
        finetune(settings, silent, [At(step, send(number))])
    assert caught.value.number == number
    assert [path.name for path in complete_checkpoints(settings.save)] == [f"checkpoint-{step + 1}"]
    assert finetune(replace(settings, resume=True), silent)["steps"] == 4
    assert is_same(adapter_in(settings.save), uninterrupted)


def test_a_signal_while_held_out_rows_are_measured_saves_the_step(settings, uninterrupted):
    class During(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                send(signal.SIGINT)()

    settings = replace(settings, valid_data=(HELD_OUT,))
    with pytest.raises(Stopped, match="checkpoint-2 is saved"):
        finetune(settings, silent, [During()])
    resumed = finetune(replace(settings, resume=True), silent)
    assert [entry["step"] for entry in resumed["log"] if "eval_loss" in entry] == [0, 1, 2, 3, 4]


def test_a_second_ctrl_c_while_saving_ends_at_once_and_half_a_checkpoint_counts_for_nothing(
    settings, monkeypatch, uninterrupted
):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *arguments, **options: send(signal.SIGINT)())  # of the optimizer
        with pytest.raises(Stopped, match=r"before anything was saved; .* is free for the same command"):
            finetune(settings, silent, [At(1, send(signal.SIGINT))])
    assert (settings.save / "checkpoint-2").is_dir() and not complete_checkpoints(settings.save)
    with pytest.raises(ValueError, match="no complete checkpoint to resume from. Leave --resume out"):
        finetune(replace(settings, resume=True), silent)
    said = []
    assert finetune(settings, said.append)["steps"] == 4
    assert any("Removed settings.json, checkpoint-2 of a run" in line for line in said)
    assert is_same(adapter_in(settings.save), uninterrupted)


def test_ctrl_c_before_training_leaves_the_folder_free(settings, monkeypatch):
    settings = replace(settings, valid_data=(HELD_OUT,), train_iters=1)
    for moment in ("read_dataset", "load_base", "measure"):
        with monkeypatch.context() as patch:
            patch.setattr(f"visualglm_tools.training.run.{moment}", lambda *arguments: interrupt())
            with pytest.raises(Stopped, match="is free for the same command"):
                finetune(settings, silent)
    assert finetune(settings, silent)["steps"] == 1


def test_ctrl_c_after_training_says_that_resuming_ends_it(settings, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        patch.setattr("visualglm_tools.training.run.save_adapter", lambda *arguments: interrupt())
        with pytest.raises(Stopped, match="checkpoint-4 is saved"):
            finetune(settings, silent)
    finetune(replace(settings, resume=True), silent)
    assert is_same(adapter_in(settings.save), uninterrupted)


def test_any_signal_ends_a_run_that_does_not_train_yet_or_any_more_and_says_what_is_left(
    settings, monkeypatch, tmp_path
):
    moments = {
        "run.choose_kept": (finetune, signal.SIGHUP, "is free for the same command"),
        "run.save_adapter": (finetune, signal.SIGTERM, "checkpoint-1 is saved"),
        "rehearsal.time_asking": (rehearse, signal.SIGTERM, ""),
    }
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for moment, (begin, number, message) in moments.items():
        folder = settings.save if begin is finetune else tmp_path / "tried"
        with monkeypatch.context() as patch:
            patch.setattr(f"visualglm_tools.training.{moment}", lambda *arguments, number=number: send(number)())
            with pytest.raises(Stopped, match=message) as caught:
                begin(replace(settings, train_iters=1, save=folder), silent)
        assert caught.value.number == number
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_signals_are_as_they_were_when_training_has_ended():
    before = handlers()
    with StopAfterStep().listening():
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before


def test_a_background_job_goes_on_not_hearing_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopAfterStep().listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_leaves_signals_alone():
    heard = []

    def listen():
        with StopAfterStep().listening():
            heard.append(handlers())

    before = handlers()
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join(60)
    assert heard == [before]


def test_the_command_ends_as_shells_expect_and_says_what_is_true(tmp_path):
    options = f"--use_lora --cpu --batch-size 1 --train-iters 40 --log-interval 1 --save {tmp_path / 'out'}"
    options += f" --train-data {ROWS}"
    command = [sys.executable, str(ROOT / "scripts" / "finetune_visualglm.py"), *options.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seen = ""
    while not re.search(r"step [1-9] of 40: ", seen) and (character := process.stderr.read(1)):
        seen += character
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, seen + rest
    assert "Stopping: this step is finished and saved" in rest and "Traceback" not in rest
    [saved] = complete_checkpoints(tmp_path / "out")
    assert f"(stopped; {saved} is saved, and the same command with --resume goes on from there)" in rest


# ---------------------------------------------------------------- folders


def test_a_run_that_failed_before_its_first_save_leaves_the_folder_free(settings):
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        finetune(settings, silent, [At(1, fail)])
    assert finetune(replace(settings, train_iters=1), silent)["steps"] == 1


def test_a_folder_with_something_else_is_never_emptied(settings):
    settings.save.mkdir()
    for name in ("settings.json", "curves.png"):
        (settings.save / name).write_text('{"of": "another program"}', encoding="utf-8")
    (settings.save / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="is in use: it holds checkpoint-7, curves.png, settings.json"):
        finetune(settings, silent)
    assert len(list(settings.save.glob("[!.]*"))) == 3


def test_folders_that_only_look_like_checkpoints_are_left_alone(settings):
    with pytest.raises(Stopped):
        finetune(settings, silent, [At(1, send(signal.SIGINT))])
    shutil.copytree(settings.save / "checkpoint-2", settings.save / "checkpoint-2-copy")
    (settings.save / "checkpoint-mine").mkdir()
    assert finetune(replace(settings, resume=True), silent)["steps"] == 4
    assert (settings.save / "checkpoint-2-copy").is_dir() and (settings.save / "checkpoint-mine").is_dir()


def test_old_checkpoints_go_when_the_new_one_is_complete(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    (tmp_path / "checkpoint-12").mkdir()  # being written
    remove_old(tmp_path, keep=1, best_step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12", "checkpoint-2"]


# ---------------------------------------------------------------- going on with something else


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run on one's own picture, stopped after two steps, and the file of its rows."""
    folder = tmp_path_factory.mktemp("stopped")
    rows = write_rows(folder)
    settings = short_run(folder / "out", train_data=(rows,))
    with pytest.raises(Stopped):
        finetune(settings, silent, [At(1, send(signal.SIGINT))])
    return replace(settings, resume=True), rows


@pytest.fixture
def stopped(stopped_run):
    """The same with its rows and picture as they were."""
    write_rows(stopped_run[1].parent)
    return stopped_run


def write_rows(folder):
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "a.png")
    (folder / "rows.json").write_text('[{"img": "a.png", "prompt": "x", "label": "y"}]', encoding="utf-8")
    return folder / "rows.json"


def test_resuming_with_changed_rows_is_refused(stopped):
    settings, rows = stopped
    rows.write_text('[{"img": "a.png", "prompt": "x", "label": "z"}]', encoding="utf-8")
    with pytest.raises(ValueError, match="rows and pictures was .* Give the same options and data"):
        finetune(settings, silent)


def test_resuming_with_a_changed_picture_is_refused(stopped):
    settings, rows = stopped
    Image.new("RGB", (8, 8)).save(rows.with_name("a.png"))
    with pytest.raises(ValueError, match="rows and pictures was"):
        finetune(settings, silent)


def test_resuming_with_other_options_is_refused(stopped):
    settings, _ = stopped
    for name, value in {"batch_size": 1, "lr": 1.0, "train_iters": 9, "seed": 7, "precision": "bfloat16"}.items():
        with pytest.raises(ValueError, match=f"continues the same run, but {name} was"):
            finetune(replace(settings, **{name: value}), silent)


def test_resuming_on_other_weights_is_refused(stopped, monkeypatch):
    settings, _ = stopped

    def load(*arguments):
        model = load_float32(TINY)
        with torch.no_grad():
            model.transformer.final_layernorm.weight.mul_(1.5)
        return model

    monkeypatch.setattr("visualglm_tools.training.run.load_base", load)
    with pytest.raises(ValueError, match="base weights was"):
        finetune(settings, silent)


def test_a_resumed_run_takes_another_folder_name_and_another_interval(stopped, tmp_path):
    settings, _ = stopped
    moved = shutil.copytree(settings.save, tmp_path / "moved")
    finetune(replace(settings, save=moved, save_interval=1), silent)
    assert [path.name for path in complete_checkpoints(moved)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
