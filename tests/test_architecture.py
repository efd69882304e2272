"""The house rules of CONTRIBUTING.md: who may import whom, and the laws of transformers' remote code."""

import ast
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "visualglm_hf"
TOOLS = PACKAGE.parent / "visualglm_tools"
LIBRARIES = {"transformers", "huggingface_hub"}
# Room -> the siblings it may know, the other packages it may import.
ARROWS = {
    "code_links": (set(), set()),
    "configuration_visualglm": ({"code_links"}, LIBRARIES),
    "conversation": (set(), set()),
    "fetching": (set(), set()),
    "tokenization_chatglm": ({"code_links", "conversation"}, {"transformers", "sentencepiece"}),
    "picture_reading": (set(), {"PIL", "numpy"}),
    "text_in_pictures": ({"conversation"}, {"PIL", "numpy", "onnxruntime", "rapidocr"}),
    "image_processing_visualglm": ({"code_links", "picture_reading"}, {"transformers", "PIL", "numpy"}),
    "processing_visualglm": ({"code_links", "conversation", "fetching"}, {"transformers"}),
    "measured_choice": ({"instruction_trial"}, {"torch"}),
    "encoder_ways": ({"measured_choice"}, {"torch"}),
    "modeling_image_encoder": ({"configuration_visualglm", "encoder_ways"}, {"transformers", "torch"}),
    "modeling_visualglm": (
        {
            "cache_naming",
            "calibration",
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
            "looking",
            "model_weights",
            "modeling_image_encoder",
            "prefix_encoder",
            "quantization",
            "given_pictures",
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
    "model_weights": ({"adapters", "code_links", "quantization"}, {"transformers", "torch"}),
    "prefix_encoder": ({"configuration_visualglm"}, {"torch"}),
    "soft_prompts": (set(), {"transformers", "torch"}),
    "cache_naming": (set(), {"transformers"}),
    "compilation": (set(), {"transformers", "torch"}),
    "feature_cache": ({"quantization"}, {"torch"}),
    "generation_options": (set(), {"transformers", "torch"}),
    "glm_positions": (set(), {"transformers", "torch"}),
    "glm_prompts": ({"glm_positions"}, {"transformers", "torch"}),
    "growing_cache": (set(), {"transformers", "torch"}),
    "history": (set(), {"torch"}),
    "guidance": ({"cache_naming", "growing_cache"}, {"transformers", "torch"}),
    "attention_maps": (set(), {"torch"}),
    "zooming": ({"attention_maps"}, {"transformers", "torch", "numpy"}),
    "looking": ({"attention_maps", "history"}, {"transformers", "torch", "PIL", "numpy"}),
    "given_pictures": (
        {"fetching", "history", "image_processing_visualglm", "soft_prompts", "text_in_pictures"},
        {"transformers", "torch", "PIL"},
    ),
    "chat": (
        {
            "attention_maps",
            "compilation",
            "conversation",
            "generation_options",
            "history",
            "text_in_pictures",
            "zooming",
        },
        {"transformers", "torch"},
    ),
    "mapped_files": (set(), {"transformers", "torch"}),
    "quantization": (
        {"adapters", "cpu_quantizing", "lowbit_codes", "lowbit_format", "lowbit_products", "mapped_files"},
        {"transformers", "torch"},
    ),
    "calibration": ({"lowbit_codes", "lowbit_format", "quantization"}, {"torch"}),
    "cpu_attention": ({"cpu_language", "cpu_layer", "cpu_runtime", "kernel_choice"}, {"torch"}),
    "cpu_decoder": (
        {
            "adapters",
            "cpu_attention",
            "cpu_language",
            "cpu_layer",
            "cpu_many_rows",
            "cpu_products",
            "cpu_runtime",
            "cpu_several_rows",
            "growing_cache",
            "kernel_choice",
        },
        {"transformers", "torch"},
    ),
    "cpu_language": (set(), {"torch"}),
    "cpu_layer": ({"cpu_language", "cpu_runtime"}, {"torch"}),
    "cpu_arithmetic": ({"cpu_language", "cpu_products", "cpu_runtime", "instruction_trial"}, {"torch"}),
    "cpu_many_rows": (
        {"cpu_arithmetic", "cpu_language", "cpu_products", "cpu_runtime", "kernel_choice", "lowbit_format"},
        {"torch"},
    ),
    "cpu_products": ({"cpu_language", "cpu_runtime", "kernel_choice", "lowbit_format"}, {"torch"}),
    "cpu_quantizing": (
        {"cpu_language", "cpu_products", "cpu_runtime", "kernel_choice", "lowbit_codes"},
        {"torch"},
    ),
    "cpu_several_rows": (
        {"cpu_arithmetic", "cpu_language", "cpu_many_rows", "cpu_products", "cpu_runtime"},
        {"torch"},
    ),
    "cpu_runtime": ({"cpu_language", "kernel_choice"}, {"torch", "llvmlite"}),
    "instruction_trial": (set(), set()),
    "kernel_choice": (set(), set()),
    "kernel_report": (
        {
            "adapters",
            "cpu_attention",
            "cpu_decoder",
            "cpu_language",
            "cpu_many_rows",
            "cpu_quantizing",
            "growing_cache",
            "kernel_choice",
            "quantization",
        },
        {"torch"},
    ),
    "cuda_products": (
        {"cuda_runtime", "cuda_source", "cuda_tiles", "kernel_choice", "lowbit_format"},
        {"torch"},
    ),
    "cuda_runtime": ({"kernel_choice"}, {"torch"}),
    "cuda_source": (set(), set()),
    "cuda_tiles": (set(), set()),
    "lowbit_codes": ({"lowbit_format"}, {"torch"}),
    "lowbit_format": (set(), {"torch"}),
    "lowbit_products": (
        {
            "cpu_language",
            "cpu_many_rows",
            "cpu_products",
            "cpu_several_rows",
            "cuda_products",
            "kernel_choice",
            "lowbit_format",
        },
        {"torch"},
    ),
}
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@dataclass(frozen=True)
class Room:
    """What a folder of the tools imports: modules of other folders, modules of the model, foreign packages."""

    tools: str = ""
    model: str = ""  # visualglm_hf: its public names
    packages: str = ""


TOOL_ROOMS = {
    ".": Room(
        packages="datasets pyarrow tqdm",
    ),
    "__main__": Room(
        tools="options packages printing versions",
        packages="argcomplete",
    ),
    "commands": Room(
        tools="benchmarking.report benchmarking.run benchmarking.settings calibration.codes checkpoints.checks "
        "checkpoints.conversion checkpoints.files checkpoints.folder checkpoints.loading checkpoints.manifest "
        "checkpoints.merging checkpoints.picture_size checkpoints.quantizing checkpoints.remote_code "
        "evaluation.chart evaluation.objects evaluation.references evaluation.results evaluation.scoring "
        "evaluation.tables imports options output_files packages printing prompt_bar serving.engine.engine "
        "serving.engine.text serving.http.api_key serving.http.app serving.http.ray_app serving.http.settings "
        "serving.listening serving.options serving.page.accounts serving.page.page serving.page.uploads serving.runs "
        "shipped training.memory training.rehearsal training.run training.settings versions",
        model="conversation fetching image_processing_visualglm zooming",
        packages="torch transformers uvicorn",
    ),
    "checkpoints": Room(
        tools="packages printing shipped versions",
        model="adapters chat configuration_visualglm image_processing_visualglm measured_choice "
        "modeling_visualglm processing_visualglm quantization tokenization_chatglm visualglm_hf",
        packages="PIL huggingface_hub peft psutil safetensors torch tqdm transformers yaml",
    ),
    "serving": Room(
        tools="checkpoints.folder checkpoints.loading imports messages options output_files packages printing "
        "serving.engine.answers serving.engine.engine serving.engine.prompts serving.engine.sampling shipped tables",
        model="compilation fetching image_processing_visualglm text_in_pictures",
        packages="PIL accelerate pyarrow tqdm transformers",
    ),
    "serving/engine": Room(
        tools="checkpoints.loading checkpoints.picture_size layer_bar packages printing",
        model="attention_maps chat compilation conversation glm_positions growing_cache image_processing_visualglm "
        "picture_reading text_in_pictures tokenization_chatglm visualglm_hf zooming",
        packages="PIL jinja2 llguidance numpy prometheus_client torch transformers",
    ),
    "serving/http": Room(
        tools="options printing serving.engine.answers serving.engine.engine serving.engine.grammar "
        "serving.engine.prompts serving.engine.sampling serving.engine.vocabulary serving.options",
        model="conversation fetching",
        packages="fastapi prometheus_client pydantic ray starlette torch",
    ),
    "serving/page": Room(
        tools="layer_bar serving.engine.answers serving.engine.engine serving.engine.picture_pool "
        "serving.engine.prompts serving.engine.sampling serving.http.guards",
        model="conversation looking picture_reading",
        packages="PIL anyio gradio starlette",
    ),
    "evaluation": Room(
        tools="printing serving.outputs serving.questions",
        packages="matplotlib",
    ),
    "training": Room(
        tools="benchmarking.timing checkpoints.adapters checkpoints.cards checkpoints.folder checkpoints.loading "
        "checkpoints.manifest checkpoints.picture_size messages options printing shipped tables versions",
        model="configuration_visualglm conversation image_processing_visualglm modeling_visualglm "
        "processing_visualglm quantization",
        packages="PIL filelock jinja2 matplotlib peft safetensors torch tqdm transformers",
    ),
    "calibration": Room(
        tools="checkpoints.loading checkpoints.prepared checkpoints.quantizing layer_bar messages printing "
        "serving.engine.prompts serving.questions",
        model="calibration quantization visualglm_hf",
        packages="torch tqdm",
    ),
    "benchmarking": Room(
        tools="checkpoints.loading options packages",
        model="compilation cpu_decoder cpu_products cpu_runtime encoder_ways glm_positions growing_cache "
        "modeling_visualglm quantization visualglm_hf",
        packages="matplotlib numpy psutil torch transformers",
    ),
    "tools/tiny": Room(
        tools="__main__ checkpoints.loading checkpoints.prepared checkpoints.remote_code evaluation.references "
        "evaluation.scoring evaluation.statistics evaluation.tables options packages printing serving.questions",
        model="conversation looking text_in_pictures visualglm_hf zooming",
        packages="PIL cyclonedx nbclient nbformat numpy packageurl packaging sentencepiece torch tqdm transformers",
    ),
}
TOOL_FILES = sorted([*TOOLS.rglob("*.py"), *(PACKAGE.parent / "tools").rglob("*.py")])


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
    assert set(ROOMS) == set(ARROWS)


def test_every_file_has_its_place_in_the_architecture():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:\*\*|`)(\w+)(?:\*\*|`)", text))
    files = {path.stem for folder in (PACKAGE, TOOLS) for path in folder.rglob("*.py")} - {"__init__"}
    assert sorted(files - named) == []


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_what_is_on_the_map(room):
    assert imports_of(PACKAGE / f"{room}.py") == ARROWS[room]


def test_arrows_have_no_circle():
    def depth(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"circle: {above} -> {room}"
        below = max((depth(sibling, (*above, room)) for sibling in ARROWS[room][0]), default=0)
        return below if is_in_basement(room) and below else 1 + below  # kernels and their choice are one floor

    assert max(depth(room) for room in ARROWS) <= 4


def is_in_basement(room: str) -> bool:
    return room.startswith(("cpu_", "cuda_", "instruction_trial", "kernel_choice", "lowbit_", "measured_choice"))


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
    """In torch, beside it or, of low bits, with their definition. A program has none: it runs kernels."""
    kernels = {
        name.removesuffix("_kernel") for name in functions_of(room) if re.fullmatch(r"(?!write_)\w+_kernel", name)
    }
    twins = functions_of(room) | functions_of("lowbit_format") | functions_of("lowbit_codes")
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
def test_only_the_compiler_of_the_cpu_kernels_asks_what_the_processor_can(room):
    """Features are handed on from there, so that a test can be given another processor's."""
    source = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    asks = set(re.findall(r"torch\.cpu\.\w+|torch\.backends\.cpu|get_host_cpu_\w+|cpuinfo", source))
    assert asks == ({"get_host_cpu_name", "get_host_cpu_features"} if room == "cpu_runtime" else set())


def place_of(path: Path) -> str:
    """A file's name as it is imported: visualglm_tools.serving.json_lines."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room of a file of the tools."""
    top, _, inside = module.partition(".")
    if top == "tools":
        return "tools/tiny"
    folder, _, name = inside.rpartition(".")
    return "__main__" if inside == "__main__" else folder.replace(".", "/") or "."


@cache
def modules_of(path: Path) -> set[str]:
    """The modules that a file imports wherever in it, those of our packages as whole files."""
    files = all_modules()
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = place_of(path).split(".")[: -node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            parts = {f"{module}.{alias.name}" for alias in node.names}
            found |= parts & files or {module}
    return found


@cache
def all_modules() -> set[str]:
    return {place_of(file) for folder in ("visualglm_hf", "visualglm_tools", "tools") for file in files_in(folder)}


@cache
def files_in(folder: str) -> list[Path]:
    return sorted((PACKAGE.parent / folder).rglob("*.py"))


@cache
def imports_of_room(room: str) -> tuple[set[str], set[str], set[str]]:
    tools, model, packages = set(), set(), set()
    for path in TOOL_FILES:
        if room_of(place_of(path)) == room:
            for module in modules_of(path):
                top, _, inside = module.partition(".")
                if top in ("visualglm_tools", "tools"):
                    tools |= {inside} if inside and room_of(module) != room else set()
                elif top == "visualglm_hf":
                    model.add(inside or "visualglm_hf")
                elif top not in sys.stdlib_module_names:
                    packages.add(top)
    return tools, model, packages


def test_every_room_of_the_tools_is_on_the_map():
    assert {room_of(place_of(path)) for path in TOOL_FILES} == set(TOOL_ROOMS)


@pytest.mark.parametrize("room", TOOL_ROOMS)
def test_room_of_the_tools_imports_what_is_on_the_map(room):
    wanted = TOOL_ROOMS[room]
    for found, text in zip(imports_of_room(room), (wanted.tools, wanted.model, wanted.packages), strict=True):
        assert sorted(found - set(text.split())) == [], "not on the map"
        assert sorted(set(text.split()) - found) == [], "on the map alone"


def test_rooms_of_the_tools_have_no_circle():
    below = {
        room: {room_of(f"visualglm_tools.{module}") for module in wanted.tools.split()}
        for room, wanted in TOOL_ROOMS.items()
    }

    def descend(room: str, above: tuple[str, ...] = ()) -> None:
        assert room not in above, f"circle: {above} -> {room}"
        for other in below[room]:
            descend(other, (*above, room))

    for room in below:
        descend(room)


def test_files_of_the_tools_have_no_circle():
    imports = {place_of(path): modules_of(path) for path in TOOL_FILES}

    def descend(module: str, above: tuple[str, ...] = ()) -> None:
        assert module not in above, f"circle: {above} -> {module}"
        for other in imports.get(module, ()):
            descend(other, (*above, module))

    for module in imports:
        descend(module)


def test_commands_are_imported_by_nobody():
    """Not even by `__main__`, which looks up the one that is asked for."""
    for room in set(TOOL_ROOMS) - {"commands"}:
        assert not any(module.startswith("commands") for module in imports_of_room(room)[0])


@pytest.mark.parametrize("path", files_in("visualglm_hf"), ids=lambda path: path.stem)
def test_the_model_knows_no_tools(path):
    assert not any(module.startswith(("visualglm_tools", "tools", "scripts")) for module in modules_of(path))


@cache
def private_names_of_the_model() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files_in("visualglm_hf")]
    names = {getattr(node, "name", None) or getattr(node, "attr", "") for tree in trees for node in ast.walk(tree)}
    return {name for name in names if re.match("_[a-z]", name)} - {"_modules"}  # that is torch's


@pytest.mark.parametrize("path", [path for path in TOOL_FILES if path.stem != "__init__"], ids=place_of)
def test_tools_use_public_names_only(path):
    private = private_names_of_the_model()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not any(alias.name.startswith("_") for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("self", "cls"):
            assert node.attr not in private


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
