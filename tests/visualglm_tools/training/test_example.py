"""The fine-tuning example, by the documented commands: from no right answer to nearly all, within minutes."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.commands import run
from tests.paths import COMMAND, ROOT, TINY
from tests.training_helpers import EXAMPLE, HELD_OUT, ROWS
from tools.tiny import backgrounds as draw_backgrounds
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.training.settings import METHODS


DOCUMENT, README = (  # with each command in one line
    re.sub(r"\\\n +", "", file.read_text(encoding="utf-8"))
    for file in (ROOT / "docs" / "finetuning.md", ROOT / "README.md")
)
COMMANDS = re.findall(r"^visualglm (finetune .*--save out/(\w+))$", DOCUMENT, re.MULTILINE)
NEW_DRAWINGS = 20  # of each kind


def run_documented(command: str, folder: Path) -> str:
    """Run a documented command, with `out/` in `folder`."""
    options = shlex.split(command.replace("out/", f"{folder}/"))
    return run(*COMMAND, *options, timeout=900).stdout


def count_right(adapter: Path | None = None) -> int:
    """How many new drawings `chat` describes rightly."""
    model, tokenizer = load_model(TINY, "cpu", "float32", adapter=adapter)
    right = 0
    for tint in draw_backgrounds.TINTS:
        for number in range(100, 100 + NEW_DRAWINGS):
            picture = draw_backgrounds.sample_picture(tint, number)
            answer, _ = model.chat(tokenizer, picture, draw_backgrounds.QUESTION, do_sample=False, max_length=128)
            right += answer == draw_backgrounds.caption(tint)
    return right


def test_the_example_has_twenty_pictures_and_no_row_in_both_parts():
    trained, held_out = (json.loads(file.read_text("utf-8")) for file in (ROWS, HELD_OUT))
    names = [row["img"] for row in trained + held_out]
    assert len(names) == len(set(names)) == len(list(EXAMPLE.glob("*.jpg"))) == 20
    assert {row["label"] for row in trained} == {row["label"] for row in held_out}


def test_the_readme_shows_one_of_the_documented_commands():
    shown = re.findall(r"^visualglm (finetune .*)$", README, re.MULTILINE)
    assert [name for _, name in COMMANDS] == ["lora", "qlora", "ptuning"]
    assert shown == [COMMANDS[0][0]]


def test_the_documented_commands_leave_the_learning_rate_and_the_steps_to_their_methods():
    assert not any(
        option in command for command, _ in COMMANDS for option in ("--lr", "--train-iters", "--pre_seq_len")
    )


@pytest.mark.slow
def test_the_tiny_model_cannot_do_it_before():
    assert count_right() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), COMMANDS, ids=[name for _, name in COMMANDS])
def test_the_example_is_learned_from_fifteen_pictures(command, name, tmp_path):
    run_documented(command, tmp_path)
    report = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
    held_out, old = report["measured"]["held out"], report["measured"]["old abilities"]
    assert held_out["before"]["right"] == 0
    assert held_out["after"]["right"] >= 0.8 * held_out["examples"]
    assert old["before"]["right"] == old["examples"]
    assert old["after"]["right"] >= 0.9 * old["examples"]  # of which 34 to 36 would be left if nothing was kept
    right = count_right(tmp_path / name / "adapter")
    print(f"{name}: {held_out} {old} {right} of {5 * NEW_DRAWINGS} new drawings")
    assert right >= 0.8 * 5 * NEW_DRAWINGS  # 93 to 98 by method and seed
    if name == "lora":
        for answer in re.findall(r"^visualglm (chat .*out/lora.*)$", DOCUMENT + README, re.MULTILINE):
            assert run_documented(answer, tmp_path) == "这张图片的背景是红色的沙滩。\n"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_the_example_with_nothing_but_its_own_defaults(method, tmp_path):
    command = f"finetune --use_{method} --train-data {ROWS} --valid-data {HELD_OUT} --save out/{method}"
    run_documented(command, tmp_path)
    report = json.loads((tmp_path / method / "report.json").read_text(encoding="utf-8"))
    assert report["measured"]["held out"]["after"]["right"] >= 4
    kept = report["measured"]["kept answers"]
    assert kept["after"]["right"] >= 0.7 * kept["examples"]
