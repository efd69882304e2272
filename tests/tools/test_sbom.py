"""The bill of materials of a wheel: everything that it needs, in the versions that are here, as CycloneDX has it."""

import hashlib
import json
import zipfile
from email.message import Message
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement


pytest.importorskip("cyclonedx")

from tools.sbom import ComponentType, component_of, write_sbom


EPOCH = 1_750_000_000


def wheel_of(folder: Path, *needed: str) -> Path:
    """A wheel of ours with nothing in it but what is read here."""
    about = ["Metadata-Version: 2.4", "Name: visualglm-hf", "Version: 9", "License-Expression: Apache-2.0"]
    about += [f"Requires-Dist: {requirement}" for requirement in needed]
    wheel = folder / "visualglm_hf-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("visualglm_hf-9.dist-info/METADATA", "\n".join(about) + "\n\n")
        archive.writestr("visualglm_tools/shipped/models/visualglm-tiny/model.safetensors", b"weights")
    return wheel


def read(wheel: Path) -> dict:
    file = wheel.with_suffix(".json")
    write_sbom(wheel, file, EPOCH)
    return json.loads(file.read_text(encoding="utf-8"))


def test_all_that_is_needed_is_listed_with_its_version(tmp_path):
    content = read(wheel_of(tmp_path, "transformers", "pillow>=12"))
    found = {component["name"]: component["version"] for component in content["components"]}
    assert found["transformers"] == version("transformers") and found["pillow"] == version("pillow")
    direct = [requirement for requirement in map(Requirement, requires("transformers")) if requirement.marker is None]
    assert {requirement.name.lower() for requirement in direct} <= found.keys()
    arrows = {each["ref"]: each.get("dependsOn", []) for each in content["dependencies"]}
    assert arrows["pkg:pypi/visualglm-hf@9"] == [
        f"pkg:pypi/pillow@{version('pillow')}",
        f"pkg:pypi/transformers@{version('transformers')}",
    ]
    assert {ref for needed in arrows.values() for ref in needed} <= arrows.keys()


def test_what_only_extras_and_other_machines_need_is_not_listed(tmp_path):
    content = read(wheel_of(tmp_path, 'pytest; extra == "dev"', 'no-such-package; sys_platform == "none"', "pillow"))
    assert [component["name"] for component in content["components"]] == ["pillow"]


def test_the_wheel_and_its_model_are_known_by_their_digests(tmp_path):
    wheel = wheel_of(tmp_path, "pillow")
    root = read(wheel)["metadata"]["component"]
    assert root["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}]
    (model,) = root["components"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"][0]["content"] == hashlib.sha256(b"weights").hexdigest()


def test_the_same_wheel_has_the_same_bill(tmp_path):
    wheel = wheel_of(tmp_path, "transformers")
    assert read(wheel) == read(wheel)
    assert read(wheel)["metadata"]["timestamp"].startswith("2025-06-15T15:06:40")


def test_a_package_that_is_not_here_has_no_version_to_list(tmp_path):
    with pytest.raises(ValueError, match="no-such-package is not installed, which visualglm-hf needs"):
        read(wheel_of(tmp_path, "no-such-package"))


class OfTheBackport(Message):
    """What `importlib.metadata` gives once anything has imported its backport: an absent field is an error."""

    def __getitem__(self, name: str) -> str:
        if name not in self:
            raise KeyError(name)
        return super().__getitem__(name)


def test_a_package_that_says_nothing_of_itself_is_listed():
    about = OfTheBackport()
    about["Name"], about["Version"] = "Bare_Package", "1"
    component = component_of(about, ComponentType.LIBRARY)
    assert (component.name, component.version, component.description) == ("bare-package", "1", None)
    assert not component.licenses
