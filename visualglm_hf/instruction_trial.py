# SPDX-License-Identifier: Apache-2.0
"""Whether instructions that may end a process work here: tried in a child process, once per machine and version.

Not here: what is tried, and what for (`cpu_arithmetic.py`).

Under some virtual machines a processor says that it has instructions of which the first one kills the process, and some
systems want to be asked first. So a child is given the code, compiles and runs it, and its result is compared. How that
went is remembered in the user's cache folder; what died there is never run here.
"""

import ctypes
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


VERSION = 1  # of what children are asked
SECONDS = 60.0  # that a child may take; it needs one
# Compile and run the function of the code that is given, on the bytes that are given; answer with what they are then.
CHILD = """
import ctypes, json, sys
import llvmlite.binding as llvm
trial = json.load(sys.stdin)
if trial["permission"]:
    ctypes.CDLL(None).syscall(*trial["permission"])
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
machine = llvm.Target.from_default_triple().create_target_machine(trial["processor"], trial["features"], opt=3)
engine = llvm.create_mcjit_compiler(llvm.parse_assembly(trial["code"]), machine)
engine.finalize_object()
memory = ctypes.create_string_buffer(bytes.fromhex(trial["memory"]), len(trial["memory"]) // 2)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address(trial["function"]))(ctypes.addressof(memory))
print(memory.raw.hex())
"""


class Trial(NamedTuple):
    """What is tried.

    Args:
        name: of the instructions, as people call them.
        code: of LLVM.
        function: of the code; it is given the address of the memory.
        memory: what is there before.
        expected: what is there afterwards.
        permission: numbers of a call of the system that asks for leave, of Linux on x86; none if nobody has to ask.
    """

    name: str
    code: str
    function: str
    memory: bytes
    expected: bytes
    permission: tuple[int, ...] = ()


def run_trial(trial: Trial, processor: str, features: Mapping[str, bool]) -> str | None:
    """Why the instructions do not work in a child process; None if they do.

    Args:
        trial: what is tried.
        processor, features: of this machine, as LLVM names them.
    """
    given = {
        "code": trial.code,
        "function": trial.function,
        "memory": trial.memory.hex(),
        "permission": trial.permission,
        "processor": processor,
        "features": ",".join(("+" if has else "-") + name for name, has in features.items()),
    }
    try:
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a child process that tried {trial.name} did not end in {SECONDS:.0f} s"
    except OSError as error:
        return f"no child process could try {trial.name}: {error}"
    if child.returncode:
        return f"a child process that tried {trial.name} {name_end(child.returncode)}"
    if child.stdout.strip() != trial.expected.hex():
        return f"a child process that tried {trial.name} computed something else"
    return None


def name_end(code: int) -> str:
    """How a process with this return code ended."""
    if code > 0:
        return f"ended with {code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"died of {known.get(-code, -code)}"


def find_memory() -> Path:
    """Where trials are remembered."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "visualglm_hf" / "instructions.json"


def read_memory(path: Path) -> dict[str, str]:
    """The obstacles, "" for none, of what has been tried; nothing of a file that is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_sound = isinstance(known, dict) and all(isinstance(obstacle, str) for obstacle in known.values())
    return known if is_sound else {}


def remember(path: Path, key: str, obstacle: str) -> None:
    """Write an obstacle beside those that are known, if that is possible; others see the old file or the new one."""
    known = {**read_memory(path), key: obstacle}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


def trial_obstacle(trial: Trial, processor: str, features: Mapping[str, bool]) -> str | None:
    """Why the instructions cannot be used on this processor: what was remembered, else what a trial says now."""
    what = (VERSION, trial, processor, sorted(features.items()), platform.release(), sys.version)
    key = f"{trial.name} {hashlib.sha256(repr(what).encode()).hexdigest()[:32]}"
    try:
        path = find_memory()
    except RuntimeError:  # nobody's home
        return run_trial(trial, processor, features)
    known = read_memory(path)
    if key not in known:
        known[key] = run_trial(trial, processor, features) or ""
        remember(path, key, known[key])
    return known[key] or None


def ask_permission(numbers: tuple[int, ...]) -> bool:
    """Ask the system for leave, for this whole process; True if it is granted."""
    return not numbers or ctypes.CDLL(None).syscall(*numbers) == 0
