"""The commands that make the tiny model and its drawings, under today's names and under those that they had."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import python
from tests.paths import ROOT
from tools.tiny import __main__ as tiny
from tools.tiny import backgrounds, world


SCRIPTS = {  # the name that it had: the module
    "train_tiny": "tools.tiny",
    "tiny_world": "tools.tiny.world",
    "draw_backgrounds": "tools.tiny.backgrounds",
}


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command without the checkout on the path."""
    return python(*command, cwd=cwd, environment={"PYTHONPATH": None}, code=None)


@pytest.mark.parametrize(("script", "module"), SCRIPTS.items(), ids=list(SCRIPTS))
def test_each_command_runs_from_the_checkout_and_by_its_old_name_from_anywhere(script, module, tmp_path):
    today, before = run("-m", module, "-h", cwd=ROOT), run(ROOT / "scripts" / f"{script}.py", "-h", cwd=tmp_path)
    assert today.returncode == before.returncode == 0, before.stderr
    assert today.stdout == before.stdout and today.stdout.startswith(f"usage: python -m {module} ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_name_passes_the_exit_code_on(script, tmp_path):
    finished = run(ROOT / "scripts" / f"{script}.py", "--no-such-option", cwd=tmp_path)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1


def test_an_old_name_draws_where_it_was_called(tmp_path):
    finished = run(ROOT / "scripts" / "tiny_world.py", "scene.png", "--seed", 663, cwd=tmp_path)
    assert finished.stdout == "图片中有两个红色的圆形，背景是草地。\nTwo red circles on grass.\n"
    drawn, shipped = (Image.open(path) for path in (tmp_path / "scene.png", ROOT / "examples/red_circles_on_grass.png"))
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(shipped, dtype=int)).mean() < 1


def test_the_example_of_fine_tuning_is_what_is_drawn(tmp_path):
    assert backgrounds.main([str(tmp_path / "new" / "background")]) == 0
    drawn, shipped = tmp_path / "new" / "background", ROOT / "examples" / "background"
    assert sorted(path.name for path in drawn.iterdir()) == sorted(path.name for path in shipped.iterdir())
    for file in shipped.glob("*.json"):
        assert json.loads((drawn / file.name).read_text("utf-8")) == json.loads(file.read_text("utf-8"))
    for file in shipped.glob("*.jpg"):
        one, other = (np.asarray(Image.open(place / file.name), dtype=int) for place in (drawn, shipped))
        assert np.abs(one - other).mean() < 2


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (world.main, ["scene.picture"]),
        (world.main, ["no/such/folder/scene.png"]),
        (tiny.main, ["--output", "no/such/folder", "--evaluate"]),
        (tiny.main, ["--output", "no/such/folder", "--refresh"]),
    ],
)
def test_what_cannot_be_done_is_one_line(main, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"],
        ["--pictures", "many"],
        ["--learning-rate", "-1"],
        ["--evaluate", "--refresh"],
        ["--vision_step", "3"],
    ],
)
def test_bad_options_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        tiny.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
