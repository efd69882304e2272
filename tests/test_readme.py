"""The README's snippets and commands, and the notebook, as a new user runs them."""

import importlib
import re
import shlex
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.paths import COMMAND, ROOT
from visualglm_tools.__main__ import main


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL_BLOCKS = [text for language, text in BLOCKS if language == "shell"]
PYTHON_BLOCKS = [text for language, text in BLOCKS if language == "python"]
OTHER_COMMANDS = [
    line.split("  ")[0]
    for language, text in BLOCKS
    for line in text.splitlines()
    if not language and line.startswith("visualglm ") and "path/to/" in line
]


def run(command: list[str], **kwargs) -> str:
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def run_door(command: list[str]) -> None:
    """A command that asks nothing, without waiting for another process to import torch."""
    assert main(command[1:]) == 0


def test_the_first_screen_has_the_snippet_and_the_two_setup_commands():
    assert len(SHELL_BLOCKS) == 2
    assert SHELL_BLOCKS[0].startswith("pip install") and "visualglm chat" in SHELL_BLOCKS[0]
    assert SHELL_BLOCKS[1].startswith("pip install") and SHELL_BLOCKS[1].endswith("pytest\n")
    assert README.index(SHELL_BLOCKS[1]) < 2500


def test_the_first_command_describes_the_picture():
    # Its `pip install` line is run in a fresh environment by .ci/run.
    command = shlex.split(SHELL_BLOCKS[0].splitlines()[1])
    answer = run([*COMMAND, *command[1:]])
    assert "红色" in answer and "圆形" in answer


def test_the_snippets_run_from_top_to_bottom_and_answer_rightly(tiny_original):
    notebook, original_folder, *_ = PYTHON_BLOCKS
    transformers_way = next(block for block in PYTHON_BLOCKS if "AutoProcessor" in block)
    original_folder = original_folder.replace("path/to/visualglm-6b", str(tiny_original))
    blocks = [notebook, "print(history)", original_folder, 'FOLDER = "models/visualglm-tiny"', transformers_way]
    # The snippet samples, but at the tiny model's confidence top_p leaves only the likeliest token.
    output = run([sys.executable, "-c", "\n".join(blocks)])
    assert "红色" in output and "草地" in output
    assert "red" in output.splitlines()[-1].lower()


def test_every_other_command_runs(tiny_original, golden_dir, tmp_path):
    assert len(OTHER_COMMANDS) == 7
    for index, command in enumerate(OTHER_COMMANDS):
        linked = "prepared-linked" if "--link" in command else "prepared"
        command = command.replace("path/to/visualglm-6b", str(tiny_original))
        command = command.replace("path/to/sat ", f"{golden_dir / 'sat_lora'} ")
        command = command.replace("path/to/adapter", str(tmp_path / "prepared-sat" / "adapter"))
        command = command.replace("path/to/prepared-sat", str(tmp_path / "prepared-sat"))
        command = command.replace("path/to/prepared", str(tmp_path / linked))
        command = command.replace("path/to/", f"{tmp_path}/")
        if "visualglm chat" in command:
            run([*COMMAND, *shlex.split(command)[1:]], input="\n你好\nstop\n")
        else:
            run_door(shlex.split(command))
        assert index or (tmp_path / "prepared" / "config.json").exists()
    assert (tmp_path / "for-sat" / "latest").exists() and (tmp_path / "merged" / "config.json").exists()


def test_options_in_the_documents_are_options_of_a_door():
    doors = [
        path.read_text(encoding="utf-8")
        for room in ("visualglm_tools", "tools")
        for path in (ROOT / room).rglob("*.py")
    ]
    doors.append(
        importlib.import_module("visualglm_tools.commands.finetune").build_parser().format_help()
    )  # it composes some
    options = set(re.findall(r"[\" ]--([a-z][\w-]+)", "\n".join(doors)))
    others = {"config_file", "multi_gpu", "num_processes", "nproc_per_node", "trust-remote-code"}  # of launchers
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"--peer '[^']*'", "--peer", document.read_text(encoding="utf-8"))  # another program's options
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text))
        assert named - options - others == set(), document.name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_runs_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    text = "".join(
        str(output.get("data", {}).get("text/plain", "")) + output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "红色" in text and "草地" in text
