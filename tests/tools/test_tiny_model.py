"""`models/visualglm-tiny`: the model that README, demos and tests rely on is small, current, and knows its world."""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import load_float32, torch_threads
from tests.paths import ROOT, TINY
from tools.tiny import card, exam, world
from tools.tiny.__main__ import main
from tools.tiny.options import Options
from visualglm_hf import (
    ChatGLMTokenizer,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
)
from visualglm_tools.options import parse


FOLDER = TINY


@pytest.fixture(scope="module")
def measured() -> dict:
    """Exact-match accuracy on a few held-out pictures, measured now."""
    with contextlib.redirect_stdout(io.StringIO()) as said, torch_threads(torch.get_num_threads()):
        assert main(["--output", str(FOLDER), "--evaluate", "--pictures", "24"]) == 0
    return json.loads(said.getvalue().splitlines()[-1])


@pytest.mark.parametrize("split", ["new pictures", "new combinations"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_held_out_pictures_are_answered_exactly(measured, split, language):
    assert measured[split][language]["all"] >= 0.9
    assert measured[split][language]["describe"] >= 0.8


def test_the_card_claims_at_least_nine_in_ten_in_each_language():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    overall = next(line for line in text.splitlines() if line.startswith("| all |"))
    figures = [float(figure) for figure in re.findall(r"([\d.]+) %", overall)]
    assert len(figures) == 4 and min(figures) >= 90


def test_the_card_is_what_is_written_today_of_the_weights_and_the_record_of_their_training(tmp_path):
    shipped = (FOLDER / "README.md").read_text(encoding="utf-8")
    copy = Path(shutil.copytree(FOLDER, tmp_path / "tiny"))
    (copy / "README.md").unlink()
    card.write_card(copy, json.loads((FOLDER / "accuracy.json").read_text(encoding="utf-8")))
    assert (copy / "accuracy.json").read_bytes() == (FOLDER / "accuracy.json").read_bytes()
    assert (copy / "README.md").read_text(encoding="utf-8") == shipped


def test_the_commands_of_the_card_are_understood():
    shipped = (FOLDER / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python -m tools\.tiny (.*)$", shipped, re.MULTILINE)
    *trainings, evaluation = (parse(Options, shlex.split(command), "tiny", "") for command in commands)
    assert evaluation.task == "evaluate" and {training.task for training in trainings} == {"train"}
    assert ROOT / trainings[-1].output == ROOT / evaluation.output == FOLDER
    assert [training.start for training in trainings] == [None, *(training.output for training in trainings[:-1])]
    runs = card.runs_of(json.loads((FOLDER / "training.json").read_text(encoding="utf-8")))
    names = ("lessons", "seed", "steps", "vision_steps", "batch_size", "learning_rate", "threads")
    for training, run in zip(trainings, runs, strict=True):
        assert {name: getattr(training, name) for name in names} == {name: run[name] for name in names}
        assert training.last_step == run.get("last_step")


def test_the_folder_links_to_the_code_of_the_package():
    shipped = {path.name for path in FOLDER.glob("*.py")} - {"linked_code.py"}
    assert shipped == {path.name for path in (ROOT / "visualglm_hf").glob("*.py")} - {"__init__.py"}
    assert not (FOLDER / "linked_code.py").is_symlink()
    for name in shipped:
        assert (FOLDER / name).readlink() == Path("..", "..", "visualglm_hf", name)


def test_the_folder_is_small_and_safe():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 15 * 1024**2
    assert not list(FOLDER.glob("*.bin"))
    config = json.loads((FOLDER / "config.json").read_text())
    for part in ("text_config", "vision_config", "qformer_config"):
        assert config[part]["hidden_size"] % 64 == 0 and config[part]["intermediate_size"] % 64 == 0


@pytest.fixture(scope="module")
def held_out_answers():
    """Answer everything there is to ask about held-out pictures with the weights in so many bits."""
    pictures = 16
    scenes = [world.sample_scene(number, "new pictures") for number in range(pictures)]
    images = [world.draw(scene) for scene in scenes]
    dialogues = [
        dialogue
        for language in world.LANGUAGES
        for dialogue in exam.examination(scenes, language, np.random.default_rng(0))
    ]
    processor = VisualGLMProcessor(
        VisualGLMImageProcessor.from_pretrained(FOLDER), ChatGLMTokenizer.from_pretrained(FOLDER)
    )

    def answer(bits: int | None) -> list[str]:
        model = load_float32(FOLDER)
        if bits:
            model.quantize(bits)
        with torch.no_grad():
            return exam.answer_all(model, processor, images, dialogues, batch_size=16)

    return answer


def test_low_bits_answer_as_the_full_weights_do(held_out_answers):
    expected = held_out_answers(None)
    assert len(expected) > 200
    for bits, least in ((8, 1.0), (4, 0.98)):
        same = [answer == wanted for answer, wanted in zip(held_out_answers(bits), expected, strict=True)]
        assert sum(same) / len(same) >= least
