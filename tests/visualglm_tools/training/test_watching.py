"""Right answers while a run goes on, and the curves of it."""

from dataclasses import replace

from PIL import Image

from tests.training_helpers import EXAMPLE, HELD_OUT, short_run, silent
from visualglm_tools.training import report, watching
from visualglm_tools.training.run import finetune


OLD = EXAMPLE / "old_abilities.json"
SHARES = ("right_held out", "right_old abilities")


def test_what_is_new_and_what_was_known_is_measured_in_the_run_and_changes_nothing(tmp_path):
    settings = short_run(tmp_path / "watched", valid_data=(HELD_OUT,), old_data=(OLD,), lr=0.1, log_interval=2)
    watched = finetune(settings, silent)
    shares = {entry["step"]: [entry[name] for name in SHARES] for entry in watched["log"] if SHARES[0] in entry}
    assert list(shares) == [0, 1, 2, 3, 4]
    assert shares[0] == [0.0, 1.0]
    first = {name: figures["after"]["right"] for name, figures in watched["measured"].items()}
    assert shares[4][0] == first["held out"] / 5
    other = finetune(replace(settings, save=tmp_path / "other", valid_data=(), old_data=()), silent)
    losses = [[entry["loss"] for entry in each["log"] if "loss" in entry] for each in (watched, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_long_list_is_measured_in_part(monkeypatch, tmp_path):
    monkeypatch.setattr(watching, "WATCHED", 2)
    measured = []
    monkeypatch.setattr(watching, "measure", lambda *run: measured.append(run[2]) or report.Measurement([True], 0.0))
    finetune(short_run(tmp_path / "out", old_data=(OLD,), train_iters=1), silent)
    assert [len(rows) for rows in measured] == [2]


def test_the_curves_are_losses_above_and_right_answers_below_if_there_are_any(tmp_path):
    losses = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    shares = [{"step": step, SHARES[0]: step / 2, SHARES[1]: 1.0} for step in (0, 1, 2)]
    sizes = []
    for log in (losses, losses + shares):
        report.plot_curves(log, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 1.5 * sizes[0][1]
    labels = {"right_held out": "new", "right_other": "other"}
    assert report.curves_in([*losses, *shares], labels) == {"new": [(0, 0.0), (1, 0.5), (2, 1.0)]}


def test_nothing_is_drawn_of_nothing(tmp_path):
    report.plot_curves([{"step": 0, SHARES[0]: 0.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
