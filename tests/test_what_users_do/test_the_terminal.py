"""The terminal: what people paste, drop and pipe into it."""

import io
import os
import sys
from pathlib import Path

import pytest

from tests.commands import SECONDS
from tests.commands import chat as chat_command
from tests.paths import PICTURES, ROOT, TINY
from visualglm_tools.commands import chat


PICTURE = PICTURES[0]


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    (folder := tmp_path / "my photos").mkdir()
    (photo := folder / "it's (1) & 图.png").write_bytes(PICTURE.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    return photo


def escaped(path: str) -> str:
    return "".join(f"\\{each}" if each in " '()&" else each for each in path)


@pytest.mark.skipif(os.name != "posix", reason="other terminals paste otherwise")
@pytest.mark.parametrize(
    "pasted",
    [
        str,
        lambda path: f'"{path}"',
        lambda path: escaped(str(path)),
        lambda path: path.as_uri(),
        lambda path: path.as_uri().replace("file:///", "file://localhost/"),
        lambda path: "~/" + str(path.relative_to(path.home())),
        lambda path: escaped("~/" + str(path.relative_to(path.home()))),
    ],
    ids=["plain", "quoted", "escaped", "URI", "URI with host", "home", "home, escaped"],
)
def test_a_picture_is_found_as_terminals_and_file_managers_paste_it(photo, pasted):
    assert chat.clean_path(pasted(photo)) == str(photo)
    assert chat.open_source(pasted(photo)).size == chat.open_source(str(PICTURE)).size


def test_a_name_with_a_backslash_is_that_name(tmp_path):
    (path := tmp_path / "a\\b.png").write_bytes(b"")
    assert chat.clean_path(str(path)) == str(path)


@pytest.mark.parametrize(
    "source",
    ["x" * 5000, "\0", "/", "/dev/null", "file:///no/such", "file://", "~no/such", "\\", "'", "data:,"],
)
def test_what_is_no_picture_is_refused_in_words(source):
    with pytest.raises(ValueError, match="(?i)picture") as caught:
        chat.open_source(source)
    assert len(str(caught.value)) < 400


def run(monkeypatch, capsys, *options: str, typed: str = "") -> tuple[int, str, str]:
    """Exit code and what was written, with a pipe for a keyboard, and without a model."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code = chat_command("--model", TINY, *options)
    return code, *capsys.readouterr()


def test_a_bad_picture_for_one_question_is_refused_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(chat, "open_model", lambda options: pytest.fail("the model was loaded"))
    code, _, errors = run(monkeypatch, capsys, "--image", "no/such.png", "--query", "What is this?")
    assert code == 2 and errors.count("\n") == 1 and "no/such.png" in errors


@pytest.mark.parametrize(
    ("options", "typed"), [(("--image", "no/such.png"), "What is this?\n"), ((), "no/such.png\nWhat is this?\n")]
)
def test_in_a_pipe_a_question_is_not_taken_for_the_next_path(model, monkeypatch, capsys, options, typed):
    monkeypatch.setattr(chat, "open_model", lambda options: (model, None))
    code, _, errors = run(monkeypatch, capsys, *options, typed=typed)
    assert code == 2 and errors.count("\n") == 1 and "no/such.png" in errors


def test_pasted_lines_are_one_question():
    pexpect = pytest.importorskip("pexpect")
    readline = pytest.importorskip("readline")
    if "GNU" not in readline.__doc__:
        pytest.skip("only GNU's readline knows what is pasted")
    program = """
from visualglm_tools.commands.chat import edit_lines, read_line

edit_lines()
print(ascii([read_line("> ") for _ in range(2)]))
"""
    options = {"cwd": str(ROOT), "env": {**os.environ, "TERM": "xterm"}, "encoding": "utf-8"}
    child = pexpect.spawn(sys.executable, ["-c", program], timeout=SECONDS, **options)
    child.expect_exact("\x1b[?2004h")  # asks the terminal to mark what is pasted
    child.expect("> ")
    child.send("\x1b[200~What colour\rare the shapes?\x1b[201~\r")
    child.expect("> ")
    child.send("And now?\r")
    child.expect_exact("['What colour\\nare the shapes?', 'And now?']")
    child.close(force=True)
