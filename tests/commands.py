"""Commands of `visualglm` as tests run them: in this process, which need not wait for another one to import torch.

And in a process of their own, where that is what a test is about.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from tests.paths import ROOT, SCRIPTS
from visualglm_tools.__main__ import main


SECONDS = 300  # until whatever a test waits for has happened on a busy machine


def command(name: str, *arguments: object) -> int:
    """Run `visualglm NAME ARGUMENTS`; returns its exit code."""
    return main([name, *map(str, arguments)])


bench, chat, serve, web, batch = (partial(command, name) for name in ("bench", "chat", "serve", "web", "batch"))
check, convert, merge, quantize = (partial(command, name) for name in ("check", "convert", "merge", "quantize"))


def complaint(capsys: pytest.CaptureFixture, refuse: Callable[..., int], *arguments: object) -> str:
    """The one line of complaint of a command that must refuse: exit code 2, nothing else said, nothing left behind."""
    folders = {argument.parent for argument in arguments if isinstance(argument, Path)}
    before = {folder: sorted(folder.iterdir()) for folder in folders}
    capsys.readouterr()
    assert refuse(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert {folder: sorted(folder.iterdir()) for folder in folders} == before
    [line] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return line


def run(
    *words: object,
    code: int | None = 0,
    cwd: Path = ROOT,
    environment: Mapping[str, str | None] | None = None,
    **options,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and check its exit code unless `code` is None.

    `environment` is what differs from this process's; None takes a variable away.
    """
    variables = {**os.environ, **(environment or {})}
    finished = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        **{"capture_output": True, "encoding": "utf-8", "timeout": SECONDS, **options},
    )
    assert code is None or finished.returncode == code, (finished.stdout, finished.stderr)
    return finished


python = partial(run, sys.executable)


def script(name: str, *options: object, **details) -> subprocess.CompletedProcess[str]:
    """Run a command under the name that it had."""
    return python(SCRIPTS / name, *options, **details)


# Each takes a second or more to import.
HEAVY = {"torch", "transformers", "accelerate", "peft", "gradio", "fastapi", "uvicorn", "matplotlib"}


def modules_after(code: str, **details) -> set[str]:
    """What a fresh interpreter has imported after this code."""
    finished = python("-c", f"{code}\nimport sys; print(); print(*sys.modules)", **details)
    return set(finished.stdout.splitlines()[-1].split())
