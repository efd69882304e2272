"""The documents keep their word: each of their commands is run here, read by the parser that would read it, or run by
a test that is named here; names, paths and messages in their sentences are those of the code.

A command that is new in a document and none of these fails.
"""

import ast
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import command, run
from tests.paths import COMMAND, PICTURES, ROOT, TINY
from tests.serving_helpers import free_port, health, wait_until
from visualglm_tools.__main__ import COMMANDS, list_parser, main, open_command


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for room in ("visualglm_hf", "visualglm_tools") for path in sorted((ROOT / room).rglob("*.py"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = ("", "shell", "bash")
STARTS = (
    "visualglm ",
    "python -m ",
    "python scripts/",
    "accelerate launch ",
    "torchrun ",
    "serve run ",
    "pip install ",
    "curl ",
    "eval ",
    "hf ",
    "make ",
    "sha256sum ",
    "ssh-keygen ",
)
SETTING = re.compile(r"^[A-Z_]+=\S* ")  # of a variable, before a command
REST = ("…", "...")  # more options, which the reader knows
NEEDED = {"finetune": ["--train-data", "dataset.json"], "batch": ["rows.jsonl", "answers.jsonl"]}
NEEDED["evaluate"] = NEEDED["batch"]  # among them
PLACEHOLDER = re.compile(r"\[?[A-Z]{3,}\]?")  # of a usage, for what readers have

# What runs until it is stopped, or measures for minutes, is read by its parser alone.
READ_ONLY = {"serve", "web", "bench"}
# What is run does less here than for its reader.
LESS_WORK = {
    "chat": ["--max-length", "128"],
    "batch": ["--max-new-tokens", "8"],
    "evaluate": ["--max-new-tokens", "8"],
    "finetune": ["--train-iters", "2", "--answers", "0"],
}
TYPED = "\n你好\nstop\n"  # no picture, a question, the end
ADDRESS = "http://127.0.0.1:8080"  # of the server; what is sent there is sent by a test of its own
# Commands that another test runs, by what they begin with: the test, and what in it shows that it does.
ELSEWHERE = {
    "serve run visualglm_tools": ("tests/visualglm_tools/serving/http/test_ray_app.py", "http.ray_app:create_service"),
    "ssh-keygen -Y verify": ("tests/tools/test_release.py", "ssh-keygen -Y verify"),
    "sha256sum --check": ("tests/tools/test_release.py", "sha256sum --check"),
    'eval "$(register-python-argcomplete': ("tests/test_documents.py", "def test_a_shell_learns_to_complete"),
}
NOT_OURS = ("curl http://localhost:8000/",)  # how transformers' own server fails


def lines_of(document: Path) -> list[str]:
    """The lines in a document's blocks for a shell, one for each command."""
    blocks = FENCE.findall(document.read_text(encoding="utf-8"))
    joined = "".join(block.replace("\\\n", " ") for language, block in blocks if language in SHELLS)
    return [line.removeprefix("$ ") for line in joined.splitlines()]


def requests_of(document: Path) -> list[str]:
    """The lines that send something to the server, or write what is sent."""
    lines = lines_of(document)
    return [line for line in lines if line.startswith("echo ") or line.startswith("curl ") and ADDRESS in line]


def commands_of(document: Path) -> list[str]:
    """The commands in a document's blocks, each in one line."""
    return [line for line in lines_of(document) if SETTING.sub("", line).startswith(STARTS)]


def words_of(line: str) -> list[str]:
    """The words of a command, without comments and the variables before it."""
    return shlex.split(SETTING.sub("", line), comments=True)


def parser_of(name: str):
    """The parser of one of our commands."""
    return open_command(name)[1]


def read(name: str, words: list[str]) -> None:
    """Let a command's parser read what comes after its name; an error ends the test."""
    more = NEEDED[name] if set(REST) & set(words) else []
    parser_of(name).parse_args([word.strip("[]") for word in words if word not in REST] + more)


def is_run(words: list[str]) -> bool:
    """Whether a command of ours stands there as it can be run here."""
    is_usage = any(word in REST or PLACEHOLDER.fullmatch(word) for word in words)
    return words[1] not in READ_ONLY and not is_usage


def read_launcher(words: list[str]) -> None:
    """Let `accelerate launch` or `torchrun` read its own options, and ours what it hands on."""
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(words[2:])
    else:
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(words[1:])
    assert launched.module and launched.training_script == "visualglm_tools"
    name, *options = launched.training_script_args
    read(name, options)


def check_install(words: list[str]) -> None:
    """Only what there is is installed: this project, with extras that it has."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    for word in words[2:]:
        if word not in ("-e", ".", "torch==2.13.0"):
            extras = re.fullmatch(r"(?:\.|visualglm-hf)\[([\w,]+)\]", word)
            assert extras, word
            assert set(extras[1].split(",")) <= set(known)


def check_hub(words: list[str]) -> None:
    """A hub's own command has the options that are named here; nothing is sent."""
    names = words[1:3] if words[1] in ("auth", "models") else words[1:2]
    said = run(Path(sys.executable).with_name("hf"), *names, "--help", environment={"COLUMNS": "200"}).stdout
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z][a-z-]*", said)), said


def targets_of(words: list[str]) -> list[str]:
    """The folders that a command writes and that must not be there yet."""
    places = {"convert": 3, "quantize": 3, "merge": 4}
    return [words[places[words[1]]]] if words[1] in places else []


def run_here(words: list[str], monkeypatch) -> None:
    """Run one of our commands in this process, with less work."""
    for target in targets_of(words):
        shutil.rmtree(target, ignore_errors=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
    assert main([*words[1:], *LESS_WORK.get(words[1], [])]) == 0
    assert all(any(Path(target).iterdir()) for target in targets_of(words))


@pytest.fixture(scope="module")
def adapter(tiny_original, golden_dir, tmp_path_factory) -> Path:
    """An adapter that was trained on the tiny original."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    source = golden_dir / "sat_lora"
    assert command("convert", source, folder, "--tokenizer", tiny_original, "--lora", "only") == 0
    return folder


@pytest.fixture
def reader(tiny_original, golden_dir, adapter, tmp_path, monkeypatch) -> Path:
    """The folder of somebody who reads: a checkout without its code, and `path/to/` what documents speak of."""
    for name in ("examples", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    places = tmp_path / "path" / "to"
    places.mkdir(parents=True)
    (places / "visualglm-6b").symlink_to(tiny_original)
    (places / "sat").symlink_to(golden_dir / "sat_lora")
    (places / "adapter").symlink_to(adapter)
    shutil.copytree(TINY, places / "prepared")
    shutil.copytree(ROOT / "examples" / "background", tmp_path, dirs_exist_ok=True)  # their own rows and pictures
    shutil.copy(PICTURES[0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_of_a_document_run_from_top_to_bottom(document, reader, monkeypatch):
    for line in commands_of(document):
        words = words_of(line)
        if line.startswith(tuple(ELSEWHERE)):
            test, sign = ELSEWHERE[next(start for start in ELSEWHERE if line.startswith(start))]
            assert sign in (ROOT / test).read_text(encoding="utf-8")
        elif words[0] == "pip":
            check_install(words)
        elif words[0] == "hf":
            check_hub(words)
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        elif words[0] in ("accelerate", "torchrun"):
            read_launcher(words)
        elif words[:2] == ["python", "-m"]:
            assert words[2] == "visualglm_tools", line
            read(words[3], words[4:])
        elif words[0] == "python":
            read(OLD_NAMES[f"python {words[1]}"].removeprefix("visualglm "), words[2:])
        elif words[0] == "visualglm" and is_run(words):
            run_here(words, monkeypatch)
        elif words[0] == "visualglm":
            read(words[1], words[2:])
        else:
            is_known = line in requests_of(document) or line.startswith(NOT_OURS)
            assert is_known, f"{name_of(document)}: nobody runs {line!r}"


def test_most_commands_are_seen():
    """A fence that is written otherwise would hide its commands."""
    found = {name_of(document): len(commands_of(document)) for document in DOCUMENTS}
    assert found["README.md"] >= 20
    assert min(found[f"docs/{name}.md"] for name in ("checkpoints", "finetuning", "serving", "loading")) >= 3
    assert sum(found.values()) > 50


def test_requests_of_the_documents_are_answered(reader):
    """By the README's server, as they stand there but for the port."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    server = words_of(next(line for line in commands_of(DOCUMENTS[0]) if line.startswith("visualglm serve")))
    lines = [line for document in DOCUMENTS for line in requests_of(document)]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with open("server.log", "w") as log:
        process = subprocess.Popen([*COMMAND, *server[1:], "--port", str(port)], stdout=log, stderr=log)
    answers = []
    try:
        wait_until(lambda: health(url) == 200 or process.poll() is not None)
        for line in lines:
            shell = ["bash", "-c", line.replace(ADDRESS, url).replace("curl ", "curl -sS --fail ", 1)]
            answers.append(run(*shell, cwd=Path.cwd()).stdout)
    finally:
        process.terminate()
        process.wait()
    _, legacy, stream, *others = answers
    assert "red" in json.loads(legacy)["result"].lower()
    assert stream.startswith("data: {") and stream.endswith("data: [DONE]\n\n")
    assert all(json.loads(answer)["choices"] for answer in others)


def test_a_shell_learns_to_complete():
    line = next(line for line in commands_of(ROOT / "README.md") if line.startswith("eval "))
    scripts = Path(sys.executable).parent
    code = f'export PATH="{scripts}:$PATH"; {line}; complete -p visualglm'
    assert "argcomplete" in run("bash", "-c", code).stdout


# ---------------------------------------------------------------- the names of before


OLD_NAMES = dict(
    re.findall(
        r"^\| `(python scripts/\w+\.py)` \| `(visualglm \w+)` \|$",
        (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)


def test_every_name_of_before_is_in_the_table():
    assert {name.split()[1] for name in OLD_NAMES} == {
        f"scripts/{path.name}"
        for path in (ROOT / "scripts").glob("*.py")
        if 'run_command("' in path.read_text(encoding="utf-8")  # others are of `tools`
    }
    assert {name.split()[1] for name in OLD_NAMES.values()} <= set(COMMANDS)


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items(), ids=OLD_NAMES.values())
def test_a_name_of_before_has_the_options_of_the_command(old, new, monkeypatch, capsys):
    def help_of(call) -> str:
        with pytest.raises(SystemExit) as end:
            call()
        assert end.value.code == 0
        return capsys.readouterr().out

    script, name = ROOT / old.split()[1], new.split()[1]
    monkeypatch.syspath_prepend(script.parent)  # as Python does that runs it
    monkeypatch.setattr(sys, "argv", [str(script), "-h"])
    monkeypatch.setenv("COLUMNS", "100")
    before = help_of(lambda: runpy.run_path(str(script), run_name="__main__"))
    assert before == help_of(lambda: main([name, "-h"]))
    assert before.startswith("usage: ") and before.count(" --") > 1


# ---------------------------------------------------------------- sentences


def spans_of(document: Path) -> list[str]:
    """What stands between backticks in the sentences of a document."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_command_in_a_sentence_is_one_with_options_that_it_has(document):
    for span in spans_of(document):
        if span.startswith("visualglm ") and not span.startswith(("visualglm -", "visualglm X", "visualglm COMMAND")):
            _, name, *words = span.split()
            assert name in COMMANDS, span
            options = {
                word.partition("=")[0].replace("_", "-") for word in words if word.startswith("-") and word != "-"
            }
            assert options <= set(re.findall(r"--?[a-z][\w-]*", parser_of(name).format_help().replace("_", "-"))), span


LAUNCHERS = {"config-file", "multi-gpu", "num-processes", "nproc-per-node", "trust-remote-code", "app-dir"}
# Of hf and sha256sum (verifying), pip and lmms-eval (evaluating), npm, docker and systemctl (deploying).
OTHER_PROGRAMS = {"check", "commit-message", "expand", "local-dir", "private", "revision", "strict"}
OTHER_PROGRAMS |= {"no-deps", "model-args", "include-path", "tasks", "output-path", "log-samples"}
OTHER_PROGRAMS |= {"prefix", "build-arg", "gpus", "now", "read-only", "time", "tmpfs"}
# Of the original's fine-tuning, which are taken and do nothing, so that no help lists them.
OBSOLETE = {
    "distributed-backend",
    "experiment-name",
    "local-rank",
    "resume-dataloader",
    "skip-init",
    "split",
    "zero-stage",
}


def test_options_in_the_documents_are_options_of_a_command():
    helps = [list_parser().format_help(), *(parser_of(name).format_help() for name in COMMANDS)]
    helps += [path.read_text(encoding="utf-8") for path in (ROOT / "tools").rglob("*.py")]
    known = (
        set(re.findall(r"[\" \[]--([a-z][\w-]+)", "\n".join(helps).replace("_", "-")))
        | LAUNCHERS
        | OTHER_PROGRAMS
        | OBSOLETE
    )
    for document in DOCUMENTS:
        text = re.sub(r"--peer '[^']*'", "--peer", document.read_text(encoding="utf-8"))  # another program's options
        named = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)}
        assert named - known == set(), name_of(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_advice_to_install_is_the_same_everywhere(document):
    """Ours by its extras, from the checkout or as a package; others by their names."""
    for advice in re.findall(r"`pip install ([^`]+)`", document.read_text(encoding="utf-8")):
        ours = re.fullmatch(r"""-e "\.\[[\w,]+\]"|'visualglm-hf\[[\w,]+\]'""", advice)
        assert ours or re.fullmatch(r"[a-z-]+(\s[a-z-]+)*", advice), advice
        if ours:
            check_install(["pip", "install", *shlex.split(advice)])


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "conformance.md"], ids=lambda path: path.name
)
def test_a_path_in_a_sentence_is_there(document):
    """But in conformance.md, which speaks of another repository's."""
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for span in spans_of(document):
        for word in span.split():
            if re.fullmatch(r"[\w-]+(/[\w.-]+)+/?", word) and word.split("/")[0] in rooms:
                is_there = (ROOT / word).exists() or (ROOT / f"{word}.py").exists()
                assert is_there, f"{name_of(document)}: {word}"


def test_messages_that_are_explained_are_those_of_the_code():
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "loading.md").read_text(encoding="utf-8"), re.MULTILINE)
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    code = re.sub(r'"\s+f?"', "", code)  # texts over several lines
    code = code.replace("{VOCABULARY_FILE}", "ice_text.model")
    foreign = {"out of memory", "pip install"}  # torch's, and made up of parts
    messages = {message for cell in table for message in re.findall(r"`([^`]+)`", cell)} - foreign
    assert len(messages) > 15
    assert {message for message in messages if message not in code} == set()


def test_the_walks_through_the_house_are_those_of_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = text[text.index("## The walk of a picture") : text.index("## The model")]
    names = re.findall(r"`([\w/]+)\.(\w+)`", walks)
    assert len(names) > 40
    for room, name in names:
        folder = "visualglm_tools" if "/" in room else "visualglm_hf"
        tree = ast.parse((ROOT / folder / f"{room}.py").read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, kinds)}, f"{room}.{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_what_is_loaded_from_a_hub_is_a_commit(document):
    """A folder is what it is; a name is whatever its owner last put there."""
    named = re.findall(r"from_pretrained\(NAME[^)]*\)", document.read_text(encoding="utf-8"))
    assert [call for call in named if "revision=COMMIT" not in call] == []
    assert bool(named) == (name_of(document) in ("README.md", "docs/verifying.md"))
