"""The house rules of CONTRIBUTING.md: who may import whom, and the laws of transformers' remote code."""

import ast
import re
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "visualglm_hf"
TOOLS = PACKAGE.parent / "visualglm_tools"
LIBRARIES = {"transformers", "huggingface_hub"}
# Room -> the siblings it may know, the other packages it may import.
ARROWS = {
    "configuration_visualglm": (set(), LIBRARIES),
    "conversation": (set(), set()),
    "fetching": (set(), set()),
    "tokenization_chatglm": ({"conversation"}, {"transformers", "sentencepiece"}),
    "picture_reading": (set(), {"PIL", "numpy"}),
    "image_processing_visualglm": ({"picture_reading"}, {"transformers", "PIL", "numpy"}),
    "processing_visualglm": ({"conversation", "fetching"}, {"transformers"}),
    "modeling_image_encoder": ({"configuration_visualglm"}, {"transformers", "torch"}),
    "modeling_visualglm": (
        {
            "cache_naming",
            "chat",
            "configuration_visualglm",
            "cpu_attention",
            "cpu_decoder",
            "feature_cache",
            "generation_visualglm",
            "glm_positions",
            "glm_prompts",
            "growing_cache",
            "kernel_report",
            "model_weights",
            "modeling_image_encoder",
            "prefix_encoder",
            "quantization",
            "soft_prompts",
        },
        {"transformers", "torch"},
    ),
    "generation_visualglm": (
        {
            "cache_naming",
            "compilation",
            "configuration_visualglm",
            "generation_options",
            "glm_positions",
            "growing_cache",
            "guidance",
        },
        {"transformers", "torch"},
    ),
    "adapters": (set(), {"torch"}),
    "model_weights": ({"adapters", "quantization"}, {"transformers", "torch"}),
    "prefix_encoder": ({"configuration_visualglm"}, {"torch"}),
    "soft_prompts": (set(), {"transformers", "torch"}),
    "cache_naming": (set(), {"transformers"}),
    "compilation": (set(), {"transformers", "torch"}),
    "feature_cache": (set(), {"torch"}),
    "generation_options": (set(), {"transformers", "torch"}),
    "glm_positions": (set(), {"transformers", "torch"}),
    "glm_prompts": ({"glm_positions"}, {"transformers", "torch"}),
    "growing_cache": (set(), {"transformers", "torch"}),
    "history": (set(), {"torch"}),
    "guidance": ({"cache_naming", "growing_cache"}, {"transformers", "torch"}),
    "chat": (
        {
            "compilation",
            "conversation",
            "fetching",
            "generation_options",
            "history",
            "image_processing_visualglm",
        },
        {"transformers", "torch"},
    ),
    "quantization": ({"adapters", "lowbit_format", "lowbit_products"}, {"transformers", "torch"}),
    "cpu_attention": ({"cpu_language", "cpu_layer", "cpu_runtime", "kernel_choice"}, {"torch"}),
    "cpu_decoder": (
        {
            "adapters",
            "cpu_attention",
            "cpu_language",
            "cpu_layer",
            "cpu_products",
            "cpu_runtime",
            "growing_cache",
            "kernel_choice",
        },
        {"transformers", "torch"},
    ),
    "cpu_language": (set(), {"torch"}),
    "cpu_layer": ({"cpu_language", "cpu_runtime"}, {"torch"}),
    "cpu_products": ({"cpu_language", "cpu_runtime", "kernel_choice", "lowbit_format"}, {"torch"}),
    "cpu_runtime": ({"cpu_language", "kernel_choice"}, {"torch", "llvmlite"}),
    "kernel_choice": (set(), set()),
    "kernel_report": (
        {"adapters", "cpu_attention", "cpu_decoder", "cpu_language", "growing_cache", "kernel_choice"},
        {"torch"},
    ),
    "cuda_products": (
        {"cuda_runtime", "cuda_source", "cuda_tiles", "kernel_choice", "lowbit_format"},
        {"torch"},
    ),
    "cuda_runtime": ({"kernel_choice"}, {"torch"}),
    "cuda_source": (set(), set()),
    "cuda_tiles": (set(), set()),
    "lowbit_format": (set(), {"torch"}),
    "lowbit_products": (
        {"cpu_language", "cpu_products", "cuda_products", "kernel_choice", "lowbit_format"},
        {"torch"},
    ),
}
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The siblings and the foreign packages that a file imports, wherever in it."""
    siblings, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            siblings.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
    return siblings, packages - set(sys.stdlib_module_names)


def test_every_room_is_on_the_map():
    assert set(ROOMS) <= set(ARROWS)


def test_every_file_has_its_place_in_the_architecture():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:\*\*|`)(\w+)(?:\*\*|`)", text))
    files = {path.stem for folder in (PACKAGE, TOOLS) for path in folder.rglob("*.py")} - {"__init__"}
    assert sorted(files - named) == []


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_it_may_know(room):
    siblings, packages = imports_of(PACKAGE / f"{room}.py")
    allowed_siblings, allowed_packages = ARROWS[room]
    assert siblings <= allowed_siblings
    assert packages <= allowed_packages


def test_arrows_have_no_circle():
    def depth(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"circle: {above} -> {room}"
        below = max((depth(sibling, (*above, room)) for sibling in ARROWS[room][0]), default=0)
        return below if is_in_basement(room) and below else 1 + below  # the kernels are one floor

    assert max(depth(room) for room in ARROWS) <= 4


def is_in_basement(room: str) -> bool:
    return room.startswith(("cpu_", "cuda_", "kernel_choice", "lowbit_"))


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_language_of_the_kernels_has_code_of_llvm(room):
    source = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    has_code = any(text in source for text in ("getelementptr", "<16 x ", "shufflevector", "alwaysinline"))
    assert has_code == (room == "cpu_language")


def functions_of(room: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("cpu_")])
def test_every_kernel_has_a_naive_twin_of_its_name(room):
    """In torch, beside it or, of the low-bit format, there. A program has none: it runs kernels."""
    kernels = {
        name.removesuffix("_kernel") for name in functions_of(room) if re.fullmatch(r"(?!write_)\w+_kernel", name)
    }
    twins = functions_of(room) | functions_of("lowbit_format")
    assert {name for name in kernels - {"program"} if f"{name}_naive" not in twins} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_remote_code_finder_sees_only_real_sibling_files(room):
    """transformers looks for relative imports with regexes, in docstrings too, and follows only `from .x import y`."""
    source = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.MULTILINE))
    assert found == imports_of(PACKAGE / f"{room}.py")[0]
    assert all((PACKAGE / f"{name}.py").exists() for name in found)
    assert not re.findall(r"^\s*(?:import\s+\.|from\s+\.\s+import)", source, re.MULTILINE)


@pytest.mark.parametrize("room", ROOMS)
def test_room_names_its_licence_in_one_line_and_then_says_what_it_is(room):
    """transformers' linter demands its long header of the files that it knows by their names."""
    header, docstring, _ = (PACKAGE / f"{room}.py").read_text(encoding="utf-8").partition('"""')
    is_known = room.startswith(("modeling_", "configuration_", "processing_", "image_processing_"))
    assert docstring
    assert header.startswith("# Copyright") if is_known else header == "# SPDX-License-Identifier: Apache-2.0\n"


@pytest.mark.parametrize("room", ROOMS)
def test_user_input_is_never_asserted_and_exceptions_are_caught_by_name(room):
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert getattr(node.type, "id", "") not in ("Exception", "BaseException")


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_compiler_of_the_cpu_kernels_asks_what_the_processor_can(room):
    """Features are handed on from there, so that a test can be given another processor's."""
    source = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    asks = set(re.findall(r"torch\.cpu\.\w+|torch\.backends\.cpu|get_host_cpu_\w+|cpuinfo", source))
    assert asks == ({"get_host_cpu_name", "get_host_cpu_features"} if room == "cpu_runtime" else set())


@pytest.mark.parametrize("script", sorted(TOOLS.rglob("*.py")), ids=lambda path: path.name)
def test_scripts_use_public_names_only(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not any(alias.name.startswith("_") for alias in node.names if alias.name != "__version__")


def test_importing_all_of_the_package_touches_no_gpu_and_no_optional_package():
    import subprocess

    code = """
import ctypes, sys
import torch, transformers.modeling_utils

class Refusing(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        assert not name or "cuda" not in name and "nvrtc" not in name, name
        super().__init__(name, *args, **kwargs)

ctypes.CDLL = Refusing
from visualglm_hf import *

assert not torch.cuda.is_initialized()
assert "visualglm_hf.modeling_visualglm" in sys.modules
heavy = {"llvmlite", "gradio", "fastapi", "peft", "bitsandbytes", "torchvision", "requests", "sat", "deepspeed"}
print(sorted(heavy & set(sys.modules)))
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert output.stdout.strip() == "[]"
