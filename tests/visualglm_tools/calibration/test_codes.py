"""Room: visualglm quantize --calibrate and --measure: prompts of the user's own, and what is wrong with them."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests import commands
from tests.paths import TINY
from tools.tiny import world
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_tools.calibration import codes


PICTURES = 12


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of pictures, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(PICTURES):
        world.draw(world.sample_scene(5000 + number)).save(folder / f"{number:02d}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def quantize(target: Path, *options) -> int:
    return commands.quantize(TINY, target, "--bits", 4, *options)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return VisualGLMForConditionalGeneration.from_pretrained(folder).state_dict()


def test_the_door_writes_calibrated_codes_where_plain_ones_would_be(pictures, tmp_path, capsys):
    assert quantize(tmp_path / "plain") == 0
    assert quantize(tmp_path / "calibrated", "--calibrate", pictures) == 0
    assert "notes.txt is left out" in capsys.readouterr().err
    plain, calibrated = state_of(tmp_path / "plain"), state_of(tmp_path / "calibrated")
    assert plain.keys() == calibrated.keys()
    changed = [key for key, value in plain.items() if not torch.equal(value, calibrated[key])]
    assert changed == [key for key in plain if f"{key}_scale" in plain or key.endswith("_scale")]
    assert all(plain[key].shape == calibrated[key].shape for key in plain)
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "calibrated" / "config.json").read_text()


@pytest.mark.parametrize("group_size", [64, 32])
def test_the_error_after_prompts_that_were_held_out_is_said(pictures, tmp_path, capsys, group_size):
    assert quantize(tmp_path / "out", "--calibrate", pictures, "--measure", "--group-size", group_size) == 0
    said = re.search(r"after 3 prompts that were held out: ([\d.]+) % plain, ([\d.]+) % calib", capsys.readouterr().out)
    plain, calibrated = map(float, said.groups())
    assert 0 < calibrated < plain


def test_rows_of_questions_are_prompts_and_bad_ones_are_named(pictures, tmp_path, capsys):
    rows = [{"id": number, "text": "What is it?", "image": f"{number:02d}.png"} for number in range(4)]
    rows += [{"id": 4, "text": "你好"}, {"id": 5, "text": "What?", "image": "lost.png"}, {"text": "no id"}]
    questions = pictures / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert quantize(tmp_path / "out", "--calibrate", questions) == 0
    said = capsys.readouterr().err
    assert "line 6 is left out: There is no picture file 'lost.png'" in said
    assert "line 7 is left out" in said
    assert "line 5" not in said


def test_no_more_prompts_are_taken_than_are_of_use(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(codes, "MOST_PROMPTS", 5)
    assert quantize(tmp_path / "out", "--calibrate", pictures) == 0
    assert "the first 5 are taken" in capsys.readouterr().err


def test_what_cannot_be_calibrated_with_is_refused_in_words(pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    (tmp_path / "empty.jsonl").write_text("")
    for picture in sorted(pictures.glob("*.png"))[3:]:
        picture.unlink()
    for options, message in (
        (["--calibrate", tmp_path / "empty"], "has nothing to calibrate with"),
        (["--calibrate", tmp_path / "empty.jsonl"], "has nothing to calibrate with"),
        (["--calibrate", tmp_path / "texts"], "No picture of .* can be read"),
        (["--calibrate", tmp_path / "nowhere"], "does not exist"),
        (["--calibrate", pictures, "--measure"], "3 prompts are too few to hold some out"),
        (["--measure"], "no prompts to measure with"),
        (["--calibrate", pictures, "--bits", 8], "8 bits gain nothing"),
    ):
        assert quantize(tmp_path / "out", *options) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
