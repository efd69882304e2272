"""The notebooks that train: what is stored in them is what they show, and each runs from top to bottom.

By default their cells are run here, one after the other, with so little training that it takes seconds.
"""

import ast
import re
import tempfile

import pytest

from tests.notebook_helpers import code_of, has_parameters, shown_by, trains
from tests.paths import ROOT
from tools.notebooks import NOTEBOOKS, execute


pytest.importorskip("peft")

EXAMPLES = ROOT / "examples"
# How little of what each does is done by default.
LESS = {
    "finetune.ipynb": {"STEPS": 1, "QUESTIONS": 1, "METHOD": ["--use_lora", "--answers", "3"]},
    "preference.ipynb": {"STEPS": 1, "PICTURES": 3, "ANSWERS": 2, "HELD_OUT": 5},
}
# How far the figures of another run may be from those that are stored: answers are sampled in one of them.
APART = {"finetune.ipynb": 4, "preference.ipynb": 30}


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def test_each_notebook_that_trains_is_run_here():
    assert {path.name for path in NOTEBOOKS if trains(path)} == set(LESS)


@pytest.mark.parametrize("name", LESS)
def test_a_notebook_shows_tables_and_pictures_before_it_is_run(name):
    shown = [shown_by(cell) for cell in code_of(EXAMPLES / name)]
    assert sum(text.count("|---|") > 0 for text, _ in shown) >= 2
    assert sum(pictures for _, pictures in shown) >= 2
    assert (EXAMPLES / name).stat().st_size < 300 * 1024
    assert all(cell.execution_count for cell in code_of(EXAMPLES / name))


@pytest.mark.parametrize("name", LESS)
def test_the_cells_of_a_notebook_run_from_top_to_bottom(name, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {"__name__": "__main__", "display": lambda *shown: None}
    for cell in code_of(EXAMPLES / name):
        exec(compile(ast.parse(cell.source), name, "exec"), names)
        if has_parameters(cell):
            assert set(LESS[name]) <= set(names)
            names |= LESS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", LESS)
def test_a_notebook_that_trains_shows_what_is_stored_in_it(name):
    """Nearly: another processor adds up in another order, and learns a little differently."""
    stored = code_of(EXAMPLES / name)
    again = [cell for cell in execute(EXAMPLES / name).cells if cell.cell_type == "code"]
    for cell, other in zip(stored, again, strict=True):
        (text, pictures), (other_text, other_pictures) = shown_by(cell), shown_by(other)
        assert pictures == other_pictures
        if "|---|" in text:
            assert numbers_in(other_text) == pytest.approx(numbers_in(text), abs=APART[name])
