"""The README's snippets and commands, and the first notebook, as a new user runs them."""

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import python, run
from tests.notebook_helpers import code_of, shown_by, trains
from tests.paths import COMMAND, ROOT
from tools.notebooks import NOTEBOOKS, execute


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL_BLOCKS = [text for language, text in BLOCKS if language == "shell"]
PYTHON_BLOCKS = [text for language, text in BLOCKS if language == "python"]


def test_the_first_screen_has_the_snippet_and_the_two_setup_commands():
    assert len(SHELL_BLOCKS) == 2
    assert SHELL_BLOCKS[0].startswith("pip install") and "visualglm chat" in SHELL_BLOCKS[0]
    assert SHELL_BLOCKS[1].startswith("pip install") and SHELL_BLOCKS[1].endswith("pytest\n")
    assert README.index(SHELL_BLOCKS[1]) < 2500


def test_the_first_command_describes_the_picture():
    # Its `pip install` line is run in a fresh environment by .ci/run.
    command = shlex.split(SHELL_BLOCKS[0].splitlines()[1])
    answer = run(*COMMAND, *command[1:]).stdout
    assert "红色" in answer and "圆形" in answer


def test_the_snippets_run_from_top_to_bottom_and_answer_rightly(tiny_original):
    notebook, original_folder, *_ = PYTHON_BLOCKS
    transformers_way = next(block for block in PYTHON_BLOCKS if "AutoProcessor" in block)
    original_folder = original_folder.replace("path/to/visualglm-6b", str(tiny_original))
    blocks = [notebook, "print(history)", original_folder, 'FOLDER = "models/visualglm-tiny"', transformers_way]
    # The snippet samples, but at the tiny model's confidence top_p leaves only the likeliest token.
    output = python("-c", "\n".join(blocks)).stdout
    assert "红色" in output and "草地" in output
    assert "red" in output.splitlines()[-1].lower()


LINKED = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "models" / "visualglm-tiny" / "README.md"]


def anchors_of(document: Path) -> set[str]:
    """What a link may name in a document: its headings, as GitHub spells them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", sorted(LINKED), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", text):
        place = (document.parent / target).resolve() if target else document
        assert place.exists(), target
        assert not anchor or anchor in anchors_of(place), f"{target}#{anchor}"


def test_the_front_page_leads_to_every_page():
    front = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in front} == set()


# Those that train are run by tests/tools/test_notebooks.py.
QUICK = [path for path in NOTEBOOKS if not trains(path)]


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.name)
def test_a_notebook_shows_what_is_stored_in_it(path):
    """After a change that is meant to change it: python -m tools.notebooks."""
    cells, again = code_of(path), [cell for cell in execute(path).cells if cell.cell_type == "code"]
    assert path.stat().st_size < 300 * 1024
    for cell, other in zip(cells, again, strict=True):
        assert shown_by(cell) == shown_by(other), cell.source
    shown = [shown_by(cell) for cell in cells]
    assert any("红色" in text and "草地" in text for text, _ in shown) and any(pictures for _, pictures in shown)
