"""Commands of `visualglm` as tests run them: in this process, which need not wait for another one to import torch."""

import subprocess
import sys
from functools import partial

from tests.paths import ROOT
from visualglm_tools.__main__ import main


def command(name: str, *arguments: object) -> int:
    """Run `visualglm NAME ARGUMENTS`; returns its exit code."""
    return main([name, *map(str, arguments)])


chat, serve, web, batch = (partial(command, name) for name in ("chat", "serve", "web", "batch"))
check, convert, merge, quantize = (partial(command, name) for name in ("check", "convert", "merge", "quantize"))

# Each takes a second or more to import.
HEAVY = {"torch", "transformers", "accelerate", "peft", "gradio", "fastapi", "uvicorn", "matplotlib"}


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported after this code."""
    whole = [sys.executable, "-c", f"{code}\nimport sys; print(); print(*sys.modules)"]
    finished = subprocess.run(whole, check=True, capture_output=True, text=True, cwd=ROOT)
    return set(finished.stdout.splitlines()[-1].split())
