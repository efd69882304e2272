"""The command `visualglm`: what it lists, what each command promises, and what a shell completes."""

import importlib
import io
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.commands import HEAVY, command, modules_after, run, script
from tests.paths import COMMAND, PICTURES, ROOT, TINY
from tools.reference import write_page
from visualglm_tools.__main__ import COMMANDS, INTERRUPTED, main, open_command, prepare_streams
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
DOORS = sorted({path.name for path in (ROOT / "scripts").glob("*.py")} - {"older_names.py"})
ANSWERING = (
    ("chat", ()),
    ("serve", ()),
    ("web", ()),
    ("batch", ("examples/example_inputs.jsonl", "answers.jsonl")),
)
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


def test_no_command_lists_them_all(capsys):
    assert main([]) == 2
    listed = capsys.readouterr().err
    assert all(f"  {name} " in listed for name in COMMANDS)


def test_a_closed_output_is_no_traceback(monkeypatch):
    finished = run("sh", "-c", f"'{sys.executable}' -m visualglm_tools -h >&-")
    assert "Traceback" not in finished.stderr
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of it
    assert command("check", TINY) == 0


@pytest.mark.parametrize("words", [("nope",), ("--model", "x"), ("-x", "chat"), ("",)])
def test_an_unknown_command_is_one_line_that_names_those_there_are(words, capsys):
    ends_with(2, *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and ("COMMAND" in line or "the command comes before" in line)
    assert "(visualglm -h lists the options)" in line


def test_the_version_is_the_packages(capsys):
    ends_with(0, "--version")
    assert capsys.readouterr().out == version("visualglm-hf") + "\n"


def test_every_command_but_the_newest_had_another_name():
    assert SCRIPTS.keys() == COMMANDS.keys() - {"evaluate"}
    scripts = (path for path in (ROOT / "scripts").glob("*.py") if 'run_command("' in path.read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("name", [name for name in DECLARED if name in SCRIPTS])
def test_both_names_of_a_command_have_the_same_help(name):
    helps = [each.stdout for each in (run(*COMMAND, name, "-h"), script(f"{SCRIPTS[name]}.py", "-h"))]
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
    run(*COMMAND, environment={**asked, **environment})
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
        streams = {"capture_output": False, "stdout": output, "stderr": subprocess.PIPE}
        finished = run(*COMMAND, *question, code=1, **streams)
    assert "Error" not in finished.stderr and "error" not in finished.stderr


def test_a_terminal_that_cannot_show_chinese_shows_question_marks():
    assert "(default: ???????)" in run(*COMMAND, "chat", "-h", environment={"PYTHONIOENCODING": "ascii"}).stdout


@pytest.mark.skipif(os.name != "posix", reason="locales")
def test_words_are_read_where_the_locale_knows_ascii_alone():
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": None}
    finished = run(*COMMAND, "check", "没有的文件夹", code=2, environment=ascii_alone)
    assert finished.stderr == "error: '没有的文件夹' is no folder; give the folder with the checkpoint.\n"
    finished = script("selftest.py", "没有的文件夹", code=2, environment=ascii_alone)
    assert "'没有的文件夹' is no folder" in finished.stderr


def test_what_is_typed_is_read_where_input_is_said_to_be_ascii(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("描述\n".encode()), encoding="ascii"))
    prepare_streams()
    assert sys.stdin.readline() == "描述\n"


@pytest.mark.skipif(os.name != "posix", reason="elsewhere it cannot be deleted")
def test_a_working_directory_that_was_deleted_is_said_so(tmp_path):
    program = f"mkdir gone; cd gone; rmdir ../gone; '{sys.executable}' -m visualglm_tools check '{TINY}'"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    finished = run("sh", "-c", program, code=2, cwd=tmp_path, environment={"PYTHONPATH": paths})
    assert finished.stderr == "error: the working directory has been deleted; change to one that is there.\n"


@pytest.mark.parametrize("imported", ["argparse", "visualglm_tools.options", "visualglm_tools.commands.check", "torch"])
def test_ctrl_c_before_anything_has_begun_says_nothing(imported):
    code = f"""
import sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {imported!r}:
            raise KeyboardInterrupt

sys.modules.pop({imported!r}, None)
sys.meta_path.insert(0, Interrupting())
from visualglm_tools.__main__ import main
sys.exit(main(["check"]))
"""
    finished = run(sys.executable, "-c", code, code=INTERRUPTED)
    assert finished.stderr == ""


@pytest.mark.parametrize("name", SCRIPTS.values())
def test_an_older_name_says_what_to_do_where_nothing_is_installed(name, tmp_path):
    path = ROOT / "scripts" / f"{name}.py"
    finished = run(sys.executable, "-S", path, "-h", code=2, cwd=tmp_path, environment={"PYTHONPATH": None})
    assert finished.stdout == "" and finished.stderr.count("\n") == 1
    assert finished.stderr.endswith(f"-m pip install -e {ROOT}\n")


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


def modules_of_door(door: str, *options: str, code: int) -> set[str]:
    """What a door has imported when it ends with this exit code."""
    paths = os.pathsep.join(filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
    return modules_after(
        f"""
import runpy, sys
sys.argv = {[door, *options]!r}
try:
    runpy.run_path("scripts/{door}", run_name="__main__")
except SystemExit as end:
    assert end.code == {code}, end
""",
        environment={"PYTHONPATH": paths},
    )


@pytest.mark.parametrize("door", DOORS)
def test_help_of_a_door_waits_for_no_library(door):
    assert not modules_of_door(door, "-h", code=0) & HEAVY


@pytest.mark.parametrize(
    ("door", "needed"),
    [
        ("cli_demo_hf.py", ()),
        ("web_demo_hf.py", ()),
        ("api_hf.py", ()),
        ("batch_infer.py", ("examples/example_inputs.jsonl", "answers.jsonl")),
        ("finetune_visualglm.py", ("--use_lora", "--train-data", "examples/example_inputs.jsonl")),
    ],
)
def test_a_folder_without_a_model_is_said_before_any_library_is_needed(door, needed):
    assert not modules_of_door(door, *needed, "--model", "nowhere", code=2) & HEAVY


@pytest.mark.parametrize(("command", "needed"), ANSWERING)
def test_a_folder_without_an_adapter_is_said_before_any_library_is_needed(command, needed):
    words = [command, *needed, "--adapter", "nowhere"]
    code = f"from visualglm_tools.__main__ import main; assert main({words!r}) == 2"
    assert not modules_after(code) & HEAVY


def test_what_is_not_there_or_in_the_way_is_said_before_any_library_is_needed():
    refused = [
        ("batch nowhere.jsonl answers.jsonl", "cannot read 'nowhere.jsonl'"),
        ("batch examples answers.jsonl", "'examples' is a folder"),
        ("evaluate nowhere.jsonl answers.jsonl", "cannot read 'nowhere.jsonl'"),
        ("convert nowhere out", "nowhere is no folder"),
        (f"convert {TINY} docs", "docs exists and is not an empty folder"),
        ("quantize nowhere out --bits 4", "nowhere is no folder"),
        (f"quantize {TINY} docs --bits 4", "docs exists and is not an empty folder"),
        ("merge nowhere docs out", "nowhere is no folder"),
        (f"merge {TINY} docs out", "no adapter in 'docs'"),
        ("finetune --use_lora --train-data nowhere", "nowhere cannot be read"),
        ("finetune --use_lora --train-data README.md --keep-data nowhere", "nowhere cannot be read"),
    ]
    code = f"""
import contextlib, io
from visualglm_tools.__main__ import main
for words, complaint in {refused!r}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(words.split()) == 2, words
    assert complaint in said.getvalue(), said.getvalue()
"""
    assert not modules_after(code) & HEAVY
