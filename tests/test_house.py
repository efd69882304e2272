"""The house rules of CONTRIBUTING.md that hold for every file: sizes, no dead names, one loader, no `sys.path`; and for
every file of tests: that it has the name of what it tests, and is never skipped for a module of ours.

Who may import whom is in `test_architecture.py`.
"""

import ast
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import visualglm_hf
from tests.paths import ROOT, TINY


PACKAGES = ("visualglm_hf", "visualglm_tools", "tools")
FILES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
# Lines, from the first of the signature to the last: docstrings and comments count, decorators do not.
LONGEST_FILE, LONGEST_CLASS, LONG_FUNCTION = 650, 300, 25
SHARE_OF_FUNCTIONS = 0.9  # that are no longer than `LONG_FUNCTION`
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


# ---------------------------------------------------------------- sizes


@each_file
def test_no_file_and_no_class_is_too_long_to_be_read_at_once(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    classes = {node.name: lines_of(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)}
    assert {name: length for name, length in classes.items() if length > LONGEST_CLASS} == {}


@pytest.mark.parametrize("folder", PACKAGES)
def test_nine_functions_in_ten_are_short(folder):
    trees = [tree_of(path) for path in FILES if path.relative_to(ROOT).parts[0] == folder]
    lengths = sorted(lines_of(node) for tree in trees for node in ast.walk(tree) if isinstance(node, FUNCTIONS))
    assert lengths[math.ceil(SHARE_OF_FUNCTIONS * len(lengths)) - 1] <= LONG_FUNCTION


# ---------------------------------------------------------------- one place for a thing


def test_the_tools_load_models_in_one_place_alone():
    """All of it: tokenizers, settings and adapters are no models."""
    others = re.compile(r"(Tokenizer|Config|Processor)$|^PeftModel$")
    loading = {
        name_of(path)
        for path in FILES + SCRIPTS
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
        if not others.search(getattr(node.value, "id", ""))
    }
    assert loading == {"visualglm_tools.checkpoints.loading"}


# Of the original's code, which is quoted but is not here.
ORIGINAL = {"modeling_chatglm.py", "configuration_chatglm.py", "visual.py", "model/infer_util.py"}


@each_file
def test_a_file_that_is_named_is_there(path):
    """Beside the one that names it, at the top of the repository or of its package, a script, or the tiny model's."""
    named = set(re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8"))) - ORIGINAL
    places = (path.parent, ROOT, ROOT / path.relative_to(ROOT).parts[0], ROOT / "scripts", TINY)
    assert sorted(name for name in named if not any((place / name).is_file() for place in places)) == []


def test_nothing_tampers_with_the_search_for_modules():
    """An installed package is found as it is; a script that is not must not need to know where it stands."""
    tampering = re.compile(r"\bsys\.path\b(?!_)|\bfrom sys import .*\bpath\b")
    kinds = {".py", ".md", ".ipynb", ".toml", ".yaml", ".yml", ".sh"}
    folders = (".ci", "docs", "examples", "scripts", "tests", *PACKAGES)
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    files += [path for path in ROOT.iterdir() if path.suffix in kinds]
    forbidding = {Path(__file__), ROOT / "CONTRIBUTING.md"}
    assert [path for path in files if path not in forbidding and tampering.search(path.read_text("utf-8"))] == []


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=name_of)
def test_user_input_is_never_asserted_and_exceptions_are_caught_by_name(path):
    broad = {"Exception", "BaseException"}
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not {getattr(kind, "id", "") for kind in ast.walk(node.type)} & broad
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "suppress":
            assert not {getattr(kind, "id", "") for kind in node.args} & broad


# ---------------------------------------------------------------- dead names


# What nobody names in the packages, tools or scripts, and why it stays. Tests alone keep nothing alive.
UNNAMED = {
    r"visualglm_hf\.cpu_\w+\.\w+_naive": "what the tests compare a kernel with",
    r"visualglm_hf\.\w+\.LIBRARY": "torch forgets its operators with it",
    r"visualglm_hf\.model_weights\.WeightsMixin\.(peft_config|resize_token_embeddings)": "called by PEFT and by users",
    r"visualglm_hf\.looking\.Look\._repr_html_": "called by notebooks",
    r"visualglm_tools\.commands\.\w+\.(run|main|EXTRA)": "called by `__main__`, which imports by name",
    r"visualglm_tools\.serving\.http\.ray_app\.Replica\.check_health": "called by Ray",
    r"visualglm_tools\.training\.keeping\.KeepAnswers\.training_step": "called by the trainer that it is mixed into",
}


def loads_of(node: ast.AST) -> Counter[str]:
    return Counter(each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load))


def stored_by(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module gives to something."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return [statement.name]
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]  # not `table` in `table[key] = value`


@cache
def named_elsewhere() -> set[tuple[str, str]]:
    """What files take from others, as (last word of the module, name): `from a.b import c`, and `b.c`."""
    found = set()
    for path in FILES + SCRIPTS:
        modules = {}
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and path.stem != "__init__":
                last = (node.module or path.parent.name).rpartition(".")[2]
                found |= {(last, alias.name) for alias in node.names}
                modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        attributes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
        found |= {(modules.get(getattr(node.value, "id", ""), ""), node.attr) for node in attributes}
    return found


def unnamed_in(path: Path) -> Iterator[str]:
    """The names of a module that neither its other statements nor other files use."""
    module = path.parent.name if path.stem == "__init__" else path.stem
    loads = loads_of(tree_of(path))
    for statement in tree_of(path).body:
        inside = loads_of(statement)  # a function that calls itself is not used by that
        for name in stored_by(statement):
            is_used = loads[name] > inside[name] or (module, name) in named_elsewhere()
            if not is_used and name not in visualglm_hf.__all__ and not re.fullmatch(r"__\w+__", name):
                yield name


@cache
def classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)}


def has_foreign_base(node: ast.ClassDef) -> bool:
    """Whether somebody else's class is among a class's ancestors, whose methods are called from there."""
    bases = [getattr(base, "value", base) if isinstance(base, ast.Subscript) else base for base in node.bases]
    names = [getattr(base, "id", "") for base in bases]
    return any(name not in classes() or has_foreign_base(classes()[name]) for name in names)


@cache
def attributes() -> Counter[str]:
    nodes = [node for path in FILES + SCRIPTS for node in ast.walk(tree_of(path))]
    return Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))


def unnamed_methods_in(path: Path) -> Iterator[str]:
    """Methods and properties whose name no other code has behind a dot."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef) and not has_foreign_base(node):
            for method in node.body:
                if isinstance(method, FUNCTIONS) and not re.fullmatch(r"__\w+__", method.name):
                    own = sum(getattr(each, "attr", "") == method.name for each in ast.walk(method))
                    if attributes()[method.name] <= own:
                        yield f"{node.name}.{method.name}"


@cache
def unnamed() -> set[str]:
    return {f"{name_of(path)}.{name}" for path in FILES for name in (*unnamed_in(path), *unnamed_methods_in(path))}


def test_no_name_is_dead():
    assert sorted(name for name in unnamed() if not any(re.fullmatch(known, name) for known in UNNAMED)) == []


@pytest.mark.parametrize("known", UNNAMED)
def test_what_is_kept_without_a_use_is_there_and_has_none(known):
    assert any(re.fullmatch(known, name) for name in unnamed())


# ---------------------------------------------------------------- the tests


TESTS = sorted((ROOT / "tests").rglob("*.py"))
SHORT_BODY = 80  # characters, which are as quickly written as they are found
# Files of tests that have no room of their name in the package, and what they test.
OTHERS = {
    "visualglm_hf/test_gpu": "the model on a CUDA device",
    "visualglm_hf/test_gpu_quantization": "low bits on a CUDA device",
    "visualglm_hf/test_larger_pictures": "pictures of other sizes, from positions to `chat`",
    "visualglm_hf/test_parallel": "the model in several processes, and spread over devices",
    "visualglm_hf/test_public_api": "what `__init__` exports",
    "visualglm_hf/test_straight_products": "`lowbit_products`: eager products on a GPU without the operator",
    "visualglm_tools/serving/test_read_text": "`text_in_pictures`: what is read in pictures, by every door",
    "visualglm_tools/serving/test_load": "an engine and its API under many clients",
    "visualglm_hf/test_cpu_many_rows_on_arm": "`cpu_many_rows`: in an emulator, which not everybody has",
    "visualglm_tools/test_option_words": "`options`: command lines that say again what was read",
    "visualglm_tools/test_packaging": "what is built and installed",
    "visualglm_tools/training/test_example": "the documented example, from drawings to answers",
    "visualglm_tools/training/test_gpu": "training on a CUDA device",
    "visualglm_tools/training/test_preferences": "TRL's trainers of preferences with model and processor as they are",
    "visualglm_tools/training/test_tables": "training on the rows of `tables`",
    "visualglm_tools/training/test_trl": "TRL's trainers with what a room of training gives them",
}


def body_of(node: ast.FunctionDef) -> str:
    """What a function does, without its name, its docstring and its arguments."""
    return ast.unparse(ast.Module(node.body[ast.get_docstring(node) is not None :], []))


def test_no_helper_of_tests_is_written_twice():
    """What two files of tests need is in a module beside them, or a fixture of a `conftest.py` above both."""
    places = defaultdict(list)
    for path in TESTS:
        for node in tree_of(path).body:
            if isinstance(node, FUNCTIONS) and not node.name.startswith("test_") and len(body_of(node)) > SHORT_BODY:
                places[body_of(node)].append(f"{name_of(path)}.{node.name}")
    assert [names for names in places.values() if len(names) > 1] == []


def without_a_room() -> set[str]:
    """Files of tests below a package's name, of which the package has no module or folder of the same path."""
    files = [path.relative_to(ROOT / "tests") for path in TESTS if path.name.startswith("test_")]
    names = {file: file.stem.removeprefix("test_") for file in files if file.parts[0].startswith("visualglm_")}
    rooms = {file: (f"{name}.py", f"__{name}__.py", name) for file, name in names.items()}  # `__main__.py`, too
    return {
        file.with_suffix("").as_posix()
        for file, places in rooms.items()
        if not any((ROOT / file.parent / place).exists() for place in places)
    }


def test_tests_have_the_names_of_the_rooms_that_they_test():
    assert without_a_room() == OTHERS.keys()


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_is_skipped_because_a_module_of_ours_is_not_there(path):
    """A package of others may be missing; ours under an old name would be skipped for ever, and nobody would see it."""
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call) and node.args]
    skipping = [call.args[0] for call in calls if ast.unparse(call.func).split(".")[-1] == "importorskip"]
    assert [ast.unparse(name) for name in skipping if not isinstance(name, ast.Constant)] == []
    assert {name.value.partition(".")[0] for name in skipping} & {"tests", "scripts", *PACKAGES} == set()
