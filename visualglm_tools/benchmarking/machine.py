"""On what was measured, with which versions, by which command; nothing that tells a path of this machine."""

import os
import platform
import shlex
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from visualglm_tools.benchmarking.settings import RunSettings
from visualglm_tools.benchmarking.timing import GIB, digits


FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
FLAGS += ("asimd", "bf16", "i8mm", "sve")
# Options with paths of this machine, or with sections of the report of their own.
ELSEWHERE = {"reference_python", "variants", "peer", "save"}
PACKAGES = ("visualglm-hf", "llvmlite")  # without the one it runs from a checkout, without the other on torch alone


def cpu_info() -> dict[str, Any]:
    """Return the processor's name and those of its features that decide how fast matrices are multiplied."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    features = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    return {"cpu": name, "cpu_flags": [flag for flag in FLAGS if flag in features]}


def describe_machine(device: torch.device) -> dict[str, Any]:
    machine = {
        **cpu_info(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": digits(psutil.virtual_memory().total / GIB),
        "system": platform.system(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def describe_versions() -> dict[str, str | None]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**{name: version_of(name) for name in PACKAGES}, **versions}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_settings(settings: RunSettings) -> dict[str, Any]:
    """Return the options that say how was measured."""
    names = {name: value.name if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    if settings.model:
        names["geometry"] = None
    return {name: value for name, value in names.items() if name not in ELSEWHERE}


def public_command(words: list[str]) -> str:
    """Write a command line with only the last names of its paths."""
    return shlex.join(" ".join(public_word(part) for part in word.split(" ")) for word in words)


def public_word(word: str) -> str:
    before, equals, path = word.rpartition("=")
    return f"{before}{equals}{Path(path).name}" if "/" in path else word
