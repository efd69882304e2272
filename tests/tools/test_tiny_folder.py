"""What stands beside the tiny model's weights is renewed without touching what is right already."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.paths import ROOT, TINY
from tools.tiny import folder
from visualglm_hf import VisualGLMConfig


CODE = sorted(path.name for path in (ROOT / "visualglm_hf").glob("[!_]*.py"))


@pytest.fixture
def linked(tmp_path, monkeypatch) -> Path:
    """The tiny model in a checkout of its own."""
    shutil.copytree(ROOT / "visualglm_hf", tmp_path / "visualglm_hf", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(folder, "CHECKOUT", tmp_path)
    monkeypatch.setattr(folder, "PACKAGE", tmp_path / "visualglm_hf")
    return Path(shutil.copytree(TINY, tmp_path / "models" / "visualglm-tiny", symlinks=True))


def state_of(place: Path) -> dict[str, tuple]:
    """Each file or link: where it leads, or its bytes; and when it was written."""
    return {
        path.name: (os.readlink(path) if path.is_symlink() else path.read_bytes(), path.lstat().st_mtime_ns)
        for path in place.iterdir()
    }


def settings_of(name: str, content: bytes) -> dict:
    """What a file of settings says, whichever transformers has written it."""
    settings = json.loads(content)
    if name == "config.json":
        settings = VisualGLMConfig.from_dict(settings).to_dict()
    return settings | {"transformers_version": ""}


def change(settings: Path, **fields) -> None:
    content = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(content | fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def test_the_folder_of_the_checkout_is_up_to_date(linked):
    before = state_of(linked)
    folder.refresh(linked)
    assert state_of(linked) == before


def test_another_version_of_transformers_is_no_reason_to_write(linked):
    for name in ("config.json", "generation_config.json"):
        change(linked / name, transformers_version="5.18.0")
    before = state_of(linked)
    folder.refresh(linked)
    assert state_of(linked) == before


def test_what_has_changed_is_written_again_and_nothing_else(linked):
    before = state_of(linked)
    change(linked / "preprocessor_config.json", do_resize=False)
    change(linked / "config.json", auto_map={})
    (linked / "generation_config.json").write_text("{")
    (linked / "chat_template.jinja").write_text("changed")
    for name in CODE[:3]:
        (linked / name).unlink()
    (linked / CODE[1]).write_text(f"../../visualglm_hf/{CODE[1]}")  # as git writes it without links
    (linked / CODE[2]).symlink_to("elsewhere.py")
    changed = {"preprocessor_config.json", "config.json", "generation_config.json", "chat_template.jinja", *CODE[:3]}
    folder.refresh(linked)
    after = state_of(linked)
    assert {name for name in after if after[name][1] != before[name][1]} == changed
    for name in (name for name in changed if name.endswith(".json")):
        assert settings_of(name, after[name][0]) == settings_of(name, before[name][0])
    assert [after[name][0] for name in CODE] == [f"../../visualglm_hf/{name}" for name in CODE]


def test_a_folder_where_no_links_can_be_made_gets_files(linked, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(1314, "A required privilege is not held by the client")

    for name in CODE:
        (linked / name).unlink()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder.refresh(linked)
    for name in CODE:
        assert not (linked / name).is_symlink()
        assert (linked / name).read_bytes() == (ROOT / "visualglm_hf" / name).read_bytes()


def test_a_folder_outside_of_the_checkout_gets_files_and_usual_settings(linked, tmp_path_factory):
    outside = Path(shutil.copytree(linked, tmp_path_factory.mktemp("outside") / "tiny", symlinks=True))
    folder.refresh(outside)
    assert not any(path.is_symlink() for path in outside.iterdir())
    assert "linked_code" not in "".join(path.read_text(encoding="utf-8") for path in outside.glob("*.json"))
    assert {path.name for path in outside.glob("*.py")} == {*CODE, "linked_code.py"}
