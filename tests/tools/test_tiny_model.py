"""`models/visualglm-tiny`: the model that README, demos and tests rely on is small, current, and knows its world."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.paths import ROOT, TINY
from tools.tiny import training
from visualglm_hf import (
    ChatGLMTokenizer,
    VisualGLMForConditionalGeneration,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
)


FOLDER = TINY


@pytest.fixture(scope="module")
def measured() -> dict:
    """Exact-match accuracy on a few held-out pictures, measured now."""
    command = [sys.executable, "-m", "tools.tiny", "--output", str(FOLDER), "--evaluate", "--pictures", "24"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("split", ["new pictures", "new combinations"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_held_out_pictures_are_answered_exactly(measured, split, language):
    assert measured[split][language]["all"] >= 0.9
    assert measured[split][language]["describe"] >= 0.8


def test_the_card_claims_at_least_nine_in_ten_in_each_language():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    overall = next(line for line in card.splitlines() if line.startswith("| all |"))
    figures = [float(figure) for figure in re.findall(r"([\d.]+) %", overall)]
    assert len(figures) == 4 and min(figures) >= 90
    assert "python -m tools.tiny --output models/visualglm-tiny" in card


def test_the_folder_links_to_the_code_of_the_package():
    shipped = {path.name for path in FOLDER.glob("*.py")}
    assert shipped == {path.name for path in (ROOT / "visualglm_hf").glob("*.py")} - {"__init__.py"}
    for name in shipped:
        assert (FOLDER / name).readlink() == Path("..", "..", "visualglm_hf", name)


def test_the_folder_is_small_and_safe():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 15 * 1024**2
    assert not list(FOLDER.glob("*.bin"))
    config = json.loads((FOLDER / "config.json").read_text())
    for part in ("text_config", "vision_config", "qformer_config"):
        assert config[part]["hidden_size"] % 64 == 0 and config[part]["intermediate_size"] % 64 == 0


@pytest.fixture(scope="module")
def tiny_training():
    return training


@pytest.fixture(scope="module")
def held_out_answers(tiny_training):
    """Answer everything there is to ask about held-out pictures with the weights in so many bits."""
    pictures = 16
    scenes = [tiny_training.tiny_world.sample_scene(number, "new pictures") for number in range(pictures)]
    dialogues = [
        dialogue
        for language in tiny_training.tiny_world.LANGUAGES
        for dialogue in tiny_training.examination(scenes, language, np.random.default_rng(0))
    ]
    processor = VisualGLMProcessor(
        VisualGLMImageProcessor.from_pretrained(FOLDER), ChatGLMTokenizer.from_pretrained(FOLDER)
    )

    def answer(bits: int | None) -> list[str]:
        model = VisualGLMForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
        if bits:
            model.quantize(bits)
        with torch.no_grad():
            return tiny_training.answer_all(model, processor, scenes, dialogues, batch_size=16)

    return answer


def test_low_bits_answer_as_the_full_weights_do(held_out_answers):
    expected = held_out_answers(None)
    assert len(expected) > 200
    for bits, least in ((8, 1.0), (4, 0.98)):
        same = [answer == wanted for answer, wanted in zip(held_out_answers(bits), expected, strict=True)]
        assert sum(same) / len(same) >= least
