"""`manifest.json`, and `visualglm check --verify`: whatever is changed in a folder that was written here is found."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.commands import HEAVY, check, complaint, convert, merge, modules_after, quantize
from tests.paths import ROOT, TINY
from visualglm_tools.checkpoints import manifest, prepared
from visualglm_tools.checkpoints.manifest import LONGEST_JSON, MANIFEST_FILE, render, sha256_of, verify, write_manifest
from visualglm_tools.versions import OWN, version_of


RELEASE = version_of(OWN)


@pytest.fixture(scope="module")
def made(tiny_original, golden_dir, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind that commands write."""
    place = tmp_path_factory.mktemp("made")
    lora, vocabulary = golden_dir / "sat_lora", ("--tokenizer", tiny_original)
    commands = {
        "converted": lambda target: convert(TINY, target),
        "linked": lambda target: convert(tiny_original, target, "--link"),
        "with an adapter": lambda target: convert(lora, target, *vocabulary),
        "adapter": lambda target: convert(lora, target, *vocabulary, "--lora", "only"),
        "sat": lambda target: convert(tiny_original, target, "--to", "sat"),
        "quantized": lambda target: quantize(place / "converted", target, "--bits", 4),
        "merged": lambda target: merge(place / "with an adapter", place / "adapter", target),
    }
    assert [name for name, write in commands.items() if write(place / name) != 0] == []
    return {name: place / name for name in commands}


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A converted folder of one's own."""
    return Path(shutil.copytree(made["converted"], tmp_path / "copy"))


def problem(folder: Path) -> str:
    """The one thing that is wrong with a folder."""
    [line] = verify(folder).problems
    return line


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


KINDS = ("converted", "linked", "with an adapter", "adapter", "sat", "quantized", "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_every_folder_that_is_written_has_a_manifest_of_all_its_files(made, kind, capsys):
    content = json.loads((made[kind] / MANIFEST_FILE).read_text())
    assert content["files"].keys() == names_in(made[kind]) - {MANIFEST_FILE}
    assert content["made_by"].keys() == {OWN, "transformers", "torch"}
    assert check(made[kind], "--verify") == 0
    said = capsys.readouterr().out
    assert f"{len(content['files'])} files" in said
    assert sha256_of(made[kind] / MANIFEST_FILE) in said


def test_an_adapter_inside_another_folder_has_a_manifest_of_its_own(made):
    assert verify(made["with an adapter"] / "adapter").problems == ()
    assert "adapter/manifest.json" in manifest.read_manifest(made["with an adapter"])["files"]


def test_the_same_folder_has_the_same_manifest_wherever_it_is_written(made, tmp_path):
    target = tmp_path / "converted"
    assert convert(TINY, target) == 0
    assert (target / MANIFEST_FILE).read_bytes() == (made["converted"] / MANIFEST_FILE).read_bytes()


def test_a_folder_whose_manifest_cannot_be_written_does_not_appear(tiny_original, tmp_path, monkeypatch):
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "write_manifest", fail)
    assert convert(tiny_original, tmp_path / "out") == 2
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is changed


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_byte_of_any_file_that_is_another_one_is_found(folder, data):
    name = data.draw(st.sampled_from(sorted(names_in(folder))))
    before = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    flipped = bytearray(before)
    flipped[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(flipped)
    try:
        found = verify(folder).problems
    finally:
        (folder / name).write_bytes(before)
    assert found and all(name in line for line in found[:1])
    assert verify(folder).problems == ()


def test_a_file_that_is_gone_or_shorter_is_found(folder, capsys):
    (folder / "config.json").unlink()
    os.truncate(folder / "model.safetensors", 1000)
    first, second = verify(folder).problems
    assert first == "config.json is missing."
    assert second.startswith("model.safetensors differs: it has 1,000 bytes instead of ")
    assert check(folder, "--verify") == 1
    assert "FAILED" in capsys.readouterr().out


def put(file: Path, content: str = "") -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)


ADDITIONS = {
    "empty": lambda folder: put(folder / "empty"),
    ".hidden": lambda folder: put(folder / ".hidden"),
    "below/manifest.json": lambda folder: put(folder / "below" / "manifest.json"),
    "pytorch_model.bin": lambda folder: put(folder / "pytorch_model.bin", "x"),
    "elsewhere": lambda folder: (folder / "elsewhere").symlink_to(TINY),
    "nowhere": lambda folder: (folder / "nowhere").symlink_to("there is no such file"),
    "pipe": lambda folder: os.mkfifo(folder / "pipe"),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_whatever_is_added_is_found(folder, name):
    ADDITIONS[name](folder)
    assert problem(folder) == f"{name} is additional: the manifest does not list it."


def test_what_takes_the_place_of_a_file_is_never_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert problem(folder) == "config.json is no regular file."


@pytest.mark.parametrize("name", [".gitattributes", ".git/HEAD", ".cache/huggingface/x.lock", "manifest.json.sig"])
def test_what_git_a_hub_and_signatures_leave_behind_is_no_addition(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert verify(folder).problems == ()


def test_files_that_are_links_as_in_a_hubs_cache_are_read(folder, tmp_path):
    for path in folder.iterdir():
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert verify(folder).problems == ()
    (tmp_path / "model.safetensors").write_bytes(b"x" * (folder / "model.safetensors").stat().st_size)
    assert problem(folder).startswith("model.safetensors differs: its SHA-256 is ")


def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * 1024**2)  # with holes: nothing is written
    tracemalloc.start()
    try:
        write_manifest(tmp_path)
        assert verify(tmp_path).problems == ()
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024**2
    finally:
        tracemalloc.stop()


def test_nothing_is_imported_to_verify_a_folder(made):
    arguments = ["check", str(made["converted"]), "--verify"]
    code = f"from visualglm_tools.__main__ import main; assert main({arguments}) == 0"
    assert modules_after(code) & HEAVY == set()


# ---------------------------------------------------------------- code


def of_release(folder: Path, release: str, monkeypatch) -> None:
    """Write a folder's manifest as another release would have written it."""
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "versions", lambda: {OWN: release, "transformers": "5.18.0", "torch": "2.6.0"})
        write_manifest(folder)


def test_code_of_another_release_is_named_and_can_be_renewed(folder, monkeypatch, capsys):
    (folder / "chat.py").write_bytes((folder / "chat.py").read_bytes() + b"# as it was before\n")
    of_release(folder, "0.0.1", monkeypatch)
    assert problem(folder) == (
        f"chat.py is not the code of this release ({RELEASE}); the manifest says that 0.0.1 wrote it. "
        "visualglm check FOLDER --copy-code renews it."
    )
    assert check(folder, "--copy-code", "--verify") == 0
    assert f"that of this release, {RELEASE}" in capsys.readouterr().out
    assert manifest.read_manifest(folder)["made_by"]["torch"] == "2.6.0"  # the weights are as old as they were


def test_code_of_another_release_that_has_fewer_files_is_found(folder, monkeypatch):
    (folder / "zooming.py").unlink()
    of_release(folder, "0.0.1", monkeypatch)
    assert problem(folder).startswith("zooming.py, code of this release")


@pytest.mark.parametrize("name", ["other.py", "custom_generate/generate.py", "fast.SO", "below/chat.py"])
def test_code_that_this_release_does_not_have_is_found_even_if_the_manifest_lists_it(folder, name):
    put(folder / name, (ROOT / "visualglm_hf" / "chat.py").read_text(encoding="utf-8"))
    write_manifest(folder)
    assert problem(folder).startswith(f"{name} is code that this release")


def test_code_of_another_repository_is_found_even_if_the_manifest_lists_it(folder):
    content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    content["auto_map"] = {"AutoTokenizer": ["somebody/else--tokenization.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    write_manifest(folder)
    expected = "tokenizer_config.json names code of another repository: somebody/else--tokenization.Tokenizer."
    assert problem(folder) == expected


@pytest.mark.parametrize(
    ("file", "more", "found"),
    [
        ("config.json", {"auto_map": {"AutoModel": "a/b--c.D"}}, "another repository: a/b--c.D"),
        ("config.json", {"auto_map": {"AutoModel": "/tmp/c.D"}}, "this release does not have: /tmp/c.D"),
        ("config.json", {"auto_map": {"AutoModel": "//host/share/c.D"}}, "this release does not have: //host"),
        ("config.json", {"auto_map": {"AutoModel": "C:\\c.D"}}, "this release does not have: C:\\c.D"),
        ("config.json", {"custom_pipelines": {"mine": {"impl": "a/b--c.D"}}}, "another repository: a/b--c.D"),
        ("processor_config.json", {"image_processor": {"auto_map": {"A": "a/b--c.D"}}}, "another repository: a/b--c.D"),
        ("config.json", {"attn_implementation": "a/b"}, "another repository: a/b"),
        ("config.json", {"attn_implementation": {"text_config": "paged|a/b@main:c"}}, "another repository: paged|a/b"),
        ("config.json", {"vision_config": {"_attn_implementation": "a/b"}}, "another repository: a/b"),
        ("config.json", {"experts_implementation": "a/b"}, "another repository: a/b"),
        ("Config.JSON", {"auto_map": {"AutoModel": "a/b--c.D"}}, "Config.JSON names code of another repository"),
        ("adapter_config.json", {"base_model_name_or_path": "a/b"}, "load another model, and its code"),
        ("config.json", {"auto_map": {"AutoModel": "a/b--c.D"}, "x": "x" * LONGEST_JSON}, "too many to look for code"),
        ("config.5.0.json", {"auto_map": {"A": "a/b--c.D"}, "x": "x" * LONGEST_JSON}, "too many to look for code"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wherever_settings_name_code_that_is_not_this_releases_it_is_found(folder, file, more, found):
    content = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, **more}), encoding="utf-8")
    write_manifest(folder)
    assert found in problem(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"auto_map": ', "\ufeff{}x"], ids=["deep", "cut", "no JSON"])
def test_settings_that_cannot_be_looked_through_are_no_good_ones(folder, content):
    """Others may read deeper: how deep is a setting of the process."""
    (folder / "config.5.0.json").write_text(content, encoding="utf-8")
    write_manifest(folder)
    assert problem(folder) == "config.5.0.json cannot be read as JSON, so it may name any code."


def test_an_adapters_folder_names_its_model(folder):
    """Which the user of an adapter gives himself."""
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    write_manifest(folder)
    assert verify(folder).problems == ()


def test_the_tiny_models_own_code_is_this_releases(tmp_path):
    tiny = shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("__pycache__"))
    write_manifest(tiny)
    assert verify(tiny).problems == ()


# ---------------------------------------------------------------- no manifest, or a bad one


def test_a_folder_without_a_manifest_is_told_what_can_be_done_about_it(folder, capsys):
    (folder / MANIFEST_FILE).unlink()
    assert check(folder, "--verify") == 1
    said = capsys.readouterr().out
    assert "has no manifest.json" in said and "--write-manifest" in said
    assert "UNKNOWN" in said and "FAILED" not in said
    assert check(folder, "--write-manifest", "--verify") == 0


CROOKED = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "deep": b"[" * 200_000,
    "a list": b"[]",
    "another format": render({"format": 2, "made_by": {OWN: "9"}, "files": {}}),
    "no versions": render({"format": 1, "files": {}}),
    "no list of files": render({"format": 1, "made_by": {OWN: "1"}, "files": []}),
    "a size that is text": render(
        {"format": 1, "made_by": {OWN: "1"}, "files": {"config.json": {"bytes": "1", "sha256": "0"}}}
    ),
    "no digest": b'{"format": 1, "made_by": {"visualglm-hf": "1"}, "files": {}}',
    "spaced otherwise": render({"format": 1, "made_by": {OWN: "1"}, "files": {}}) + b"\n",
}


@pytest.mark.parametrize("content", CROOKED.values(), ids=CROOKED)
def test_a_manifest_that_was_not_written_here_is_refused_in_words(folder, content):
    (folder / MANIFEST_FILE).write_bytes(content)
    assert str(folder / MANIFEST_FILE) in problem(folder)
    assert "damaged" in problem(folder)


def test_a_manifest_of_gigabytes_is_not_read(folder):
    os.truncate(folder / MANIFEST_FILE, 2**33)
    assert "is no manifest: it has 8,589,934,592 bytes" in problem(folder)


def test_a_manifest_leads_nowhere_outside_its_folder(folder, tmp_path):
    (tmp_path / "outside").write_text("x")
    content = manifest.read_manifest(folder)
    content["files"]["../outside"] = {"bytes": 1, "sha256": sha256_of(tmp_path / "outside")}
    (folder / MANIFEST_FILE).write_bytes(render(content))
    assert problem(folder) == "../outside is missing."


def test_names_from_a_folder_move_no_cursor(folder, capsys):
    (folder / "\x1b[2J").touch()
    assert check(folder, "--verify") == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_manifest_is_not_written_of_what_cannot_be_read(folder, capsys):
    (folder / "nowhere").symlink_to("there is no such file")
    assert "nowhere cannot be read" in complaint(capsys, check, folder, "--write-manifest")


@pytest.mark.parametrize("option", ["--generate", "--kernels"])
def test_to_verify_is_to_load_nothing(folder, option, capsys):
    assert "loads nothing" in complaint(capsys, check, folder, "--verify", option)
