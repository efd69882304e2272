"""The command `visualglm`: what it lists, what each command promises, and what a shell completes."""

import importlib
import io
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.commands import HEAVY, command, modules_after
from tests.paths import COMMAND, PICTURES, ROOT, TINY
from tools.reference import write_page
from visualglm_tools.__main__ import COMMANDS, main, open_command
from visualglm_tools.options import describe


SCRIPTS = {
    "chat": "cli_demo_hf",
    "serve": "api_hf",
    "web": "web_demo_hf",
    "batch": "batch_infer",
    "finetune": "finetune_visualglm",
    "merge": "merge_lora",
    "convert": "convert_checkpoint",
    "quantize": "quantize_checkpoint",
    "check": "selftest",
    "bench": "benchmark",
}
MODULES = {name: importlib.import_module(f"visualglm_tools.commands.{name}") for name in COMMANDS}
DECLARED = [name for name, module in MODULES.items() if hasattr(module, "Options")]


def ends_with(code: int, *words: str) -> None:
    """Run `visualglm`, which shall end the process so."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == code


def test_each_command_is_listed_with_what_it_does(capsys):
    ends_with(0, "-h")
    listed = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert f"  {name} " in listed and what in listed


@pytest.mark.parametrize("words", [(), ("nope",), ("--model", "x"), ("",)])
def test_an_unknown_command_is_one_line_that_names_those_there_are(words, capsys):
    ends_with(2, *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "COMMAND" in line
    assert "(visualglm -h lists the options)" in line


def test_the_version_is_the_packages(capsys):
    ends_with(0, "--version")
    assert capsys.readouterr().out == version("visualglm-hf") + "\n"


def test_every_command_had_another_name():
    assert SCRIPTS.keys() == COMMANDS.keys()
    scripts = (
        path for path in (ROOT / "scripts").glob("*.py") if "visualglm_tools" in path.read_text(encoding="utf-8")
    )
    assert sorted(SCRIPTS.values()) == sorted(path.stem for path in scripts)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_waits_for_no_library(name):
    code = f"""
from visualglm_tools.__main__ import main
try:
    main([{name!r}, "-h"])
except SystemExit as end:
    assert end.code == 0
"""
    assert not modules_after(code) & (HEAVY | {"numpy", "PIL", "importlib.metadata", "urllib.request"})


@pytest.mark.parametrize("name", DECLARED)
def test_both_names_of_a_command_have_the_same_help(name):
    old = [sys.executable, str(ROOT / "scripts" / f"{SCRIPTS[name]}.py")]
    helps = [
        subprocess.run([*words, "-h"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for words in ([*COMMAND, name], old)
    ]
    assert helps[0] == helps[1]
    assert f"\n    visualglm {name}" in helps[0]  # an example
    for option, _, _ in describe(open_command(name)[0].Options):
        assert option.split()[0].rstrip(",") in helps[0]


@pytest.mark.parametrize("name", DECLARED)
def test_help_says_no_default_that_says_nothing(name):
    _, parser = open_command(name)
    text = " ".join(parser.format_help().split())
    assert "default: None" not in text and "default: False" not in text and "default: ()" not in text
    assert str(ROOT) not in text


def complete(line: str, tmp_path: Path, **environment: str) -> set[str]:
    """What a shell offers at the end of this line, asked as argcomplete's code in the shell asks."""
    pytest.importorskip("argcomplete")
    answer = tmp_path / "completions"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    subprocess.run(COMMAND, check=True, env={**os.environ, **asked, **environment}, cwd=ROOT, capture_output=True)
    return {each.strip() for each in answer.read_text().splitlines()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("visualglm ch", {"chat", "check"}),
        ("visualglm chat --tem", {"--temperature"}),
        ("visualglm chat --query 图 --max-l", {"--max-length"}),
        ("visualglm batch --max-", {"--max-length", "--max-new-tokens"}),
        ("visualglm quantize --bits ", {"4", "8"}),
        ("visualglm serve --dtype fl", {"float16", "float32"}),
        ("visualglm check mod", {"models/"}),
    ],
)
def test_a_shell_completes_commands_options_and_choices(line, expected, tmp_path):
    assert complete(line, tmp_path) == expected


def test_completing_waits_for_no_library():
    pytest.importorskip("argcomplete")
    code = """
import os, sys
os._exit = sys.exit
os.environ |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull}
os.environ |= {"COMP_LINE": "visualglm chat --tem", "COMP_POINT": "20"}
from visualglm_tools.__main__ import main
try:
    main([])
except SystemExit as end:
    assert not end.code
"""
    modules = modules_after(code)
    assert not modules & HEAVY
    assert "visualglm_tools.commands.chat" in modules and "visualglm_tools.commands.serve" not in modules


class Module:
    """A command that does what it is told."""

    from visualglm_tools.commands.check import Options

    def __init__(self, act, **details: str):
        self.run = act
        self.__doc__ = "A command."
        self.__dict__.update(details)


def raising(error: BaseException):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize(
    ("act", "code", "said"),
    [
        (lambda options: None, 0, ""),
        (lambda options: 1, 1, ""),
        (raising(ValueError("bad\ninput\x1b")), 2, "error: bad input\n"),
        (raising(FileNotFoundError(2, "No such file", "a.bin")), 2, "error: [Errno 2] No such file: 'a.bin'\n"),
        (
            raising(ModuleNotFoundError("No module", name="peft")),
            2,
            "error: peft is missing: pip install 'visualglm-hf[train]'\n",
        ),
        (raising(KeyboardInterrupt()), 130, ""),
    ],
)
def test_how_a_command_ends_is_the_exit_code_and_at_most_one_line(act, code, said, monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", lambda name: Module(act, EXTRA="train"))
    assert command("check") == code
    assert capsys.readouterr().err == said


def test_what_every_command_needs_is_advised_without_an_extra(monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", lambda name: Module(raising(ImportError(name="torch"))))
    assert command("check") == 2
    assert capsys.readouterr().err == "error: torch is missing: pip install visualglm-hf\n"


def test_a_reader_that_has_gone_is_no_news():
    question = ["chat", "--query", "你好", "--greedy", "--device", "cpu"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        finished = subprocess.run([*COMMAND, *question], stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert finished.returncode == 1
    assert "Error" not in finished.stderr and "error" not in finished.stderr


def test_a_terminal_that_cannot_show_chinese_shows_question_marks():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    finished = subprocess.run([*COMMAND, "chat", "-h"], env=environment, cwd=ROOT, capture_output=True)
    assert finished.returncode == 0 and b"(default: ???????)" in finished.stdout


def test_a_stream_that_is_no_file_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    ends_with(0, "--version")
    assert sys.stdout.getvalue()


def test_the_page_of_all_options_is_what_the_commands_say():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == write_page(), "python -m tools.reference docs/commands.md"
    for name in DECLARED:
        assert f"## visualglm {name}\n" in page
    assert str(ROOT) not in page


def test_an_adapter_that_is_none_is_said_by_every_command_that_answers(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("[]")
    (tmp_path / "adapter_model.safetensors").touch()
    questions = tmp_path / "in.jsonl"
    questions.touch()
    for name, *words in (("chat",), ("serve",), ("web",), ("batch", questions, tmp_path / "out.jsonl")):
        for adapter, complaint in (("nope", "no adapter in 'nope'"), (tmp_path, "must hold an object, found list")):
            assert command(name, *words, "--adapter", adapter) == 2
            assert complaint in capsys.readouterr().err


def test_an_adapter_that_needs_peft_is_refused_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("visualglm_tools.commands.chat.open_model", lambda options: pytest.fail("the model was loaded"))
    assert command("chat", "--image", PICTURES[0], "--model", TINY, "--adapter", tmp_path) == 2
    assert capsys.readouterr().err == "error: peft is missing: pip install 'visualglm-hf[train]'\n"
