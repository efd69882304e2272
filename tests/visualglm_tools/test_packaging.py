"""The wheel and the source distribution: complete, nothing too much, and what they install works by itself."""

import email
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.commands import run as run_program
from tests.paths import PICTURES, ROOT, TINY
from tools import release
from tools.release import run_backend


# Not looked for by importing, nor by `find_spec`: after either, setuptools can no more be imported in this process.
HAS_PIP = any(distribution.name == "pip" for distribution in distributions())
pytestmark = pytest.mark.skipif(not HAS_PIP, reason="no pip")
[VERSION] = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
PACKED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("visualglm_hf", "visualglm_tools", "tools", "models", "examples")
EPOCH = 1_750_000_000  # seconds, at which the commit was made that is released
FOUND = "from visualglm_tools.shipped import *; print(DEFAULT_MODEL, *EXAMPLES, sep='\\n')"
LOAD = """
import sys
sys.modules["visualglm_hf"] = None  # an import of it would fail
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""


def run(*command: object, cwd: Path, path: str | Path = "") -> subprocess.CompletedProcess:
    """Run a command where nothing of the checkout is on the path unless `path` says so."""
    environment = {"PYTHONPATH": str(path), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    return run_program(*command, cwd=cwd, environment=environment)


def python(*arguments: object, **details) -> subprocess.CompletedProcess:
    return run(sys.executable, *arguments, **details)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def checkout(place) -> Path:
    """A copy of the checkout as git has it, since building writes into it; with a few of its tests."""
    copy = place / "check out"  # with a blank
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in PACKED:
        shutil.copyfile(ROOT / name, copy / name)
    (copy / "tests").mkdir()
    shutil.copyfile(ROOT / "tests" / "test_readme.py", copy / "tests" / "test_readme.py")
    return copy


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a distribution as a release does, without the network; returns its file."""
    target.mkdir(exist_ok=True)
    return target / run_backend(f"build_{kind}", source, target, EPOCH)


@pytest.fixture(scope="module")
def wheel(checkout, place) -> Path:
    return release.build(checkout, place / "released", EPOCH)


@pytest.fixture(scope="module")
def sdist(wheel) -> Path:
    (archive,) = wheel.parent.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, place) -> Path:
    folder = place / "installed"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=place)
    return folder


SEVERAL = """
import json, sys
from visualglm_tools.__main__ import main

for words in json.loads(sys.argv[1]):
    print(main(words), end=chr(0), flush=True)
"""


@pytest.fixture(scope="module")
def converted(place) -> Path:
    """Where the installed command writes the tiny model that it brings."""
    return place / "converted"


@pytest.fixture(scope="module")
def said(installed, converted, place) -> dict[str, str]:
    """What several installed commands say in an empty folder, by their names; one process runs them all."""
    empty, source = place / "empty", installed / "visualglm_tools" / "shipped" / "models" / "visualglm-tiny"
    empty.mkdir()
    ask_it = ("chat", "--model", converted, "--image", PICTURES[0], "--query", "Describe the image.", "--english")
    commands = {
        "chat": ("chat", "--image", PICTURES[1], "--query", "描述这张图片。"),
        "check": ("check",),
        "convert": ("convert", source, converted),
        "chat with what was converted": ask_it,
    }
    words = json.dumps([[*map(str, command)] for command in commands.values()])
    output = python("-c", SEVERAL, words, cwd=empty, path=installed).stdout
    texts = output.split("\0")[:-1]
    assert [text[-1] for text in texts] == ["0"] * len(commands), output
    return {name: text[:-1] for name, text in zip(commands, texts, strict=True)}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_both_packages_the_tiny_model_and_the_pictures_and_nothing_else(wheel):
    names = {name for name in names_in(wheel) if ".dist-info/" not in name}
    code = {path for folder in ("visualglm_hf", "visualglm_tools") for path in (ROOT / folder).rglob("*.py")}
    data = {ROOT / "visualglm_tools" / "checkpoints" / "real_tokenizer_vectors.json"}
    data |= {ROOT / "visualglm_tools" / "serving" / "page" / name for name in ("page.js", "style.css")}
    expected = {path.relative_to(ROOT).as_posix() for path in code | data}
    shipped = [*PICTURES, *(path for path in TINY.iterdir() if path.suffix)]
    expected |= {f"visualglm_tools/shipped/{path.relative_to(ROOT).as_posix()}" for path in shipped}
    assert names == expected
    assert len(PICTURES) == 3


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        read = {name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if "info/" in name}
        license_file = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    about = email.message_from_string(read["METADATA"])
    assert (about["Name"], about["License-Expression"], about["License-File"]) == (
        "visualglm-hf",
        "Apache-2.0",
        "LICENSE",
    )
    assert about["Requires-Python"] == ">=3.10"
    assert about["Description-Content-Type"] == "text/markdown"
    assert "visualglm = visualglm_tools.__main__:main" in read["entry_points.txt"]
    assert set(read["top_level.txt"].split()) == {"visualglm_hf", "visualglm_tools"}
    assert "Root-Is-Purelib: true" in read["WHEEL"] and "Tag: py3-none-any" in read["WHEEL"]


def test_the_source_distribution_has_what_a_wheel_is_built_from(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)  # no links, for where there are none
    tops = {member.name.split("/")[1] for member in members if "/" in member.name}
    assert not {"tests", "tools", "scripts"} & tops
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= tops


def test_a_release_is_the_same_to_the_bit_when_it_is_built_elsewhere_later_and_by_others(checkout, sdist, wheel, place):
    source = place / "another place"
    shutil.copytree(checkout, source, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for path in source.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700)
            os.utime(path, (EPOCH + 86_400, EPOCH + 86_400))
    again = release.build(source, place / "released again", EPOCH)
    assert again.read_bytes() == wheel.read_bytes()
    assert (again.parent / sdist.name).read_bytes() == sdist.read_bytes()


def test_a_wheel_is_complete_where_git_has_written_the_texts_of_links(checkout, wheel, place):
    source = place / "without links"
    shutil.copytree(checkout, source, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for link in (source / "models" / "visualglm-tiny").glob("*.py"):
        if link.is_symlink():
            text = os.readlink(link)
            link.unlink()
            link.write_text(text)
    again = build("wheel", source, place / "from texts")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        assert all(one.read(name) == other.read(name) for name in one.namelist())


def test_the_installed_tiny_model_has_the_code_as_files(installed):
    folder = installed / "visualglm_tools" / "shipped" / "models" / "visualglm-tiny"
    code = {path.name for path in (installed / "visualglm_hf").glob("*.py")} - {"__init__.py"}
    assert {path.name for path in folder.glob("*.py")} == code | {"linked_code.py"}
    assert not any(path.is_symlink() for path in installed.rglob("*"))
    assert filecmp.cmpfiles(folder, installed / "visualglm_hf", code, shallow=False)[1:] == ([], [])
    others = [path.name for path in TINY.iterdir() if path.is_file() and not path.is_symlink()]
    assert filecmp.cmpfiles(folder, TINY, others, shallow=False)[1:] == ([], [])


def test_the_installed_command_has_a_name_and_a_version(installed, tmp_path):
    (command,) = (path for path in (installed / "bin").iterdir() if path.stem == "visualglm")
    assert run(command, "--version", cwd=tmp_path, path=installed).stdout == f"{VERSION}\n"


def test_the_installed_command_describes_a_picture(said):
    assert said["chat"].splitlines()[-1] == "图片中有两个红色的圆形，背景是草地。"


def test_the_installed_command_checks_the_model_that_it_brings(said):
    assert "All 10 checks passed." in said["check"] and "remote code      ok" in said["check"]


def test_what_the_installed_command_converts_loads_without_it(said, converted, tmp_path):
    assert not any(path.is_symlink() for path in converted.iterdir())
    assert "linked_code" not in (converted / "config.json").read_text()
    assert python("-c", LOAD, converted, cwd=tmp_path).stdout.split()[-1] == "VisualGLMForConditionalGeneration"
    assert "orange triangles" in said["chat with what was converted"]


def found(*options: str, path: Path | str, cwd: Path, code: str = FOUND) -> list[Path]:
    """Where the tiny model and the pictures are, for a Python without any site-packages."""
    lines = python("-S", *options, "-c", code, cwd=cwd, path=path).stdout.splitlines()
    return [Path(line) for line in lines]


def test_the_tiny_model_is_found_in_a_wheel_in_a_checkout_and_by_an_editable_install(
    installed, checkout, place, tmp_path
):
    shipped = installed / "visualglm_tools" / "shipped"
    assert found(path=installed, cwd=tmp_path)[0] == shipped / "models" / "visualglm-tiny"
    assert found(path=checkout, cwd=tmp_path)[0] == checkout / "models" / "visualglm-tiny"
    editable = place / "editable"
    with zipfile.ZipFile(build("editable", checkout, place / "built")) as archive:
        assert not [name for name in archive.namelist() if "shipped" in name]
        archive.extractall(editable)
    code = f"import site; site.addsitedir({str(editable)!r}); {FOUND}"
    for model, *pictures in (
        found(path="", cwd=tmp_path, code=code),
        found(path=installed, cwd=tmp_path),
        found(path=checkout, cwd=tmp_path),
    ):
        assert (model / "model.safetensors").is_file()
        assert [picture.name for picture in pictures] == [picture.name for picture in PICTURES]


def test_a_checkout_that_is_only_on_the_path_lists_its_commands(tmp_path):
    shutil.copytree(ROOT / "visualglm_tools", tmp_path / "checkout" / "visualglm_tools")
    command = ("-S", "-m", "visualglm_tools")
    listed = python(*command, "-h", cwd=tmp_path, path=tmp_path / "checkout").stdout
    assert "visualglm COMMAND" in listed and "quantize" in listed
    assert python(*command, "--version", cwd=tmp_path, path=tmp_path / "checkout").stdout == "not installed\n"
