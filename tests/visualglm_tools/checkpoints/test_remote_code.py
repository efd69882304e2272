"""Links to the model's code: what is said where there are none, how files come in their place, and who writes files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from tests.commands import check, command, convert, merge, python, quantize
from tests.paths import PICTURES, ROOT, TINY
from visualglm_hf import (
    ChatGLMTokenizer,
    VisualGLMConfig,
    VisualGLMForConditionalGeneration,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
)
from visualglm_tools.checkpoints.folder import check_folder
from visualglm_tools.checkpoints.remote_code import copy_code, lost_code


AUTO_CLASSES = ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoProcessor", "AutoImageProcessor")
MARK = b"\n# as a user has changed it\n"
LOAD = """
import sys
from transformers import AutoModel, AutoProcessor, AutoTokenizer
for folder in sys.argv[1:]:
    for each in (AutoModel, AutoTokenizer, AutoProcessor):
        each.from_pretrained(folder, trust_remote_code=True)
"""


def copy_with(folder: Path, make) -> Path:
    """A copy of the tiny model, with what `make(name of a link, where it leads)` gives in the place of each link."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    shutil.copyfile(TINY / "linked_code.py", folder / "linked_code.py")
    for path in TINY.glob("*.py"):
        if path.is_symlink():
            make(folder / path.name, os.readlink(path))
    return folder


def write_text(path: Path, target: str) -> None:
    path.write_text(target)  # git's, without an end of the line


@pytest.fixture
def texts(tmp_path) -> Path:
    """The tiny model as git writes it where links may not be made."""
    return copy_with(tmp_path / "texts", write_text)


@pytest.fixture
def linked(tmp_path) -> Path:
    """The tiny model in a checkout of its own, with a package whose code can be told from any other."""
    package = tmp_path / "checkout" / "visualglm_hf"
    shutil.copytree(ROOT / "visualglm_hf", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TINY, tmp_path / "checkout" / "models" / "tiny", symlinks=True)
    for file in package.glob("*.py"):
        file.write_bytes(file.read_bytes() + MARK)
    return tmp_path / "checkout" / "models" / "tiny"


def package_of(linked: Path) -> Path:
    return linked.parents[1] / "visualglm_hf"


def is_untouched(package: Path) -> bool:
    """Whether nobody has written into the package that is linked to."""
    return all(file.read_bytes().endswith(MARK) for file in package.glob("*.py"))


def has_links(folder: Path) -> bool:
    return any(path.is_symlink() for path in folder.rglob("*"))


# ---------------------------------------------------------------- where there are no links


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_transformers_says_what_to_do_where_links_are_texts(name, texts):
    with pytest.raises(ImportError, match="visualglm check models/visualglm-tiny --copy-code") as caught:
        getattr(transformers, name).from_pretrained(texts, trust_remote_code=True)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_code_is_not_taken_for_the_text_of_a_link(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "mistaken"))  # with files, as copying makes them
    file = folder / "configuration_visualglm.py"
    file.write_text(file.read_text(encoding="utf-8") + "\ndef broken(:\n", encoding="utf-8")
    with pytest.raises(SyntaxError, match="invalid syntax"):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    "make",
    [
        write_text,
        lambda path, target: path.write_text(target.replace("/", "\\") + "\r\n"),
        lambda path, target: path.symlink_to(target),
    ],
    ids=["git's texts", "texts of Windows", "links that lead nowhere"],
)
def test_a_folder_without_its_code_is_refused_with_the_command_that_writes_it(make, tmp_path):
    folder = copy_with(tmp_path / "a folder", make)
    assert set(lost_code(folder)) == {path.name for path in TINY.glob("*.py")} - {"linked_code.py"}
    with pytest.raises(ValueError, match="visualglm check .*a folder. --copy-code"):
        check_folder(folder)


def test_a_folder_with_its_code_is_not_refused(linked, tmp_path):
    for folder in (TINY, linked, Path(shutil.copytree(TINY, tmp_path / "files"))):
        assert lost_code(folder) == []
        check_folder(folder)


def test_the_commands_say_it_in_one_line(texts, capsys):
    assert command("chat", "--model", texts, "--image", PICTURES[0], "--query", "hello") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f'visualglm check "{texts}" --copy-code' in error


def test_copied_code_makes_the_folder_whole(texts, capsys):
    assert check(texts) == 1
    assert "remote code      FAILED   adapters.py" in capsys.readouterr().out
    assert check(texts, "--copy-code") == 0
    output = capsys.readouterr().out
    assert "files of code written to" in output and "remote code      ok" in output
    model = AutoModel.from_pretrained(texts, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(texts, trust_remote_code=True)
    answer, _ = model.chat(tokenizer, str(PICTURES[1]), "描述这张图片。", do_sample=False)
    assert answer == "图片中有两个红色的圆形，背景是草地。"


def test_a_folder_that_lost_its_code_altogether_is_told_of_and_made_whole(tmp_path, capsys):
    folder = copy_with(tmp_path / "bare", lambda path, target: None)
    assert check(folder) == 1
    assert "is missing. Write the model's code into the folder: visualglm check" in capsys.readouterr().out
    assert check(folder, "--copy-code") == 0


def test_code_is_copied_over_links_and_over_older_code_and_not_through_them(linked):
    package = package_of(linked)
    (linked / "chat.py").unlink()
    (linked / "chat.py").write_text("# of an older version\n")
    assert len(copy_code(linked)) == len(list(package.glob("*.py"))) - 1
    assert is_untouched(package) and not has_links(linked)
    for file in (ROOT / "visualglm_hf").glob("[!_]*.py"):
        assert (linked / file.name).read_bytes() == file.read_bytes()
    assert not [path for path in linked.iterdir() if path.suffix == ".new"]


def test_code_is_not_copied_into_a_folder_that_is_loaded_with_another(tiny_original, tmp_path):
    original = Path(shutil.copytree(tiny_original, tmp_path / "original"))
    before = sorted(original.iterdir())
    with pytest.raises(ValueError, match=r"names .*modeling_chatglm\.py.*visualglm convert"):
        copy_code(original)
    assert sorted(original.iterdir()) == before
    (original / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no configuration"):
        copy_code(original)


def test_code_is_not_copied_where_there_is_no_model(tmp_path, capsys):
    assert check(tmp_path, "--copy-code") == 2
    error = f"error: {str(tmp_path)!r} has no config.json, so it is no model that is loaded with code.\n"
    assert capsys.readouterr().err == error
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- where links are


def snapshot(folder: Path) -> dict[str, tuple]:
    return {path.name: (path.is_symlink(), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def load_apart(*folders: Path, cwd: Path) -> None:
    python("-c", LOAD, *folders, cwd=cwd)


def test_a_checkout_may_have_blanks_in_its_path_be_linked_to_and_be_read_only(linked, tmp_path):
    checkout = tmp_path / "a check out"
    linked.parents[1].rename(checkout)
    (tmp_path / "link").symlink_to(checkout, target_is_directory=True)
    folder = checkout / "models" / "tiny"
    before = snapshot(folder)
    for path in (*checkout.rglob("*"), checkout):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    try:
        load_apart(folder, tmp_path / "link" / "models" / "tiny", Path("link", "models", "tiny"), cwd=tmp_path)
        assert snapshot(folder) == before  # a superuser could have written
        assert command("chat", "--model", folder, "--image", PICTURES[0], "--query", "Hello", "--greedy") == 0
    finally:
        for path in (checkout, *checkout.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o200)


# ---------------------------------------------------------------- who writes files


def is_whole(folder: Path) -> bool:
    """Whether a folder has all of the package's code, in files of its own, and does not rely on links."""
    code = [path.name for path in (ROOT / "visualglm_hf").glob("[!_]*.py")]
    own = [path for path in folder.glob("*.py") if path.is_file() and not path.is_symlink()]
    settings = [path.read_text(encoding="utf-8") for path in folder.glob("*.json")]
    return {path.name for path in own} == set(code) and not any("linked_code" in text for text in settings)


@pytest.mark.parametrize("source", [pytest.param("linked", marks=pytest.mark.slow), "texts"])
def test_what_commands_write_from_the_linked_model_has_the_code_in_files(source, request, tmp_path):
    source = request.getfixturevalue(source)
    assert convert(source, tmp_path / "converted") == 0
    assert convert("--link", source, tmp_path / "weights-linked") == 0
    assert quantize(source, tmp_path / "quantized", "--bits", 4) == 0
    model = VisualGLMForConditionalGeneration.from_pretrained(source)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", exclude_modules="lm_head"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.py")) and not has_links(tmp_path / "adapter")
    assert merge(source, tmp_path / "adapter", tmp_path / "merged") == 0
    for name in ("converted", "weights-linked", "quantized", "merged"):
        assert is_whole(tmp_path / name), name
    load_apart(*(tmp_path / name for name in ("converted", "quantized", "merged")), cwd=tmp_path)


def parts_of(folder: Path, is_remote: bool) -> list:
    """All that has a `save_pretrained`, from our package or as transformers imports it from the folder."""
    if is_remote:
        names = ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor", "AutoModel")
        return [getattr(transformers, name).from_pretrained(folder, trust_remote_code=True) for name in names]
    image_processor, tokenizer = (each.from_pretrained(folder) for each in (VisualGLMImageProcessor, ChatGLMTokenizer))
    model = VisualGLMForConditionalGeneration.from_pretrained(folder)
    processor = VisualGLMProcessor(image_processor, tokenizer)
    return [VisualGLMConfig.from_pretrained(folder), tokenizer, image_processor, processor, model]


@pytest.mark.parametrize("is_remote", [False, True], ids=["package", "remote code"])
@pytest.mark.parametrize("index", range(5), ids=["config", "tokenizer", "image processor", "processor", "model"])
def test_saving_into_a_folder_with_links_makes_files_of_them_and_writes_nothing_through_them(index, is_remote, linked):
    part = parts_of(linked, is_remote)[index]
    package = package_of(linked)
    for file in package.glob("*.py"):  # after loading: what is saved differs from what is linked
        file.write_bytes(file.read_bytes() + MARK)
    before = {file.name: file.read_bytes() for file in package.glob("*.py")}
    (linked / "gone.py").symlink_to("nowhere.py")
    part.save_pretrained(linked)
    assert {file.name: file.read_bytes() for file in package.glob("*.py")} == before
    assert not has_links(linked) and not (linked / "gone.py").exists()
    assert {path.name for path in linked.glob("*.py")} == {path.name for path in TINY.glob("*.py")}
    for each in parts_of(linked, True):  # what is not saved is there still
        assert each is not None


def test_what_is_saved_from_the_linked_model_does_not_need_its_links(linked, tmp_path):
    *_, processor, model = parts_of(linked, True)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    shutil.rmtree(linked.parents[1])
    assert not has_links(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_visualglm.VisualGLMConfig"
    load_apart(tmp_path / "saved", cwd=tmp_path)
