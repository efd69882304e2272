"""What a wheel of ours is built on, as a CycloneDX bill of materials: every package that it needs, and what they need,
in the versions of the environment that writes it, which is the one that the tests have run in; and the model in it.

The same wheel and the same environment give the same bytes: there is no other date in it than the commit's. Extras are
not in it. Not here: what is known about the safety of these versions; `pip-audit` asks a database for that.
"""

import email
import hashlib
import json
import platform
import zipfile
import zlib
from collections.abc import Iterator
from datetime import datetime, timezone
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


SCHEMA = SchemaVersion.V1_6
MODEL = "models/visualglm-tiny/model.safetensors"  # in the wheel, below the folder of what is shipped
LONGEST_LICENCE = 100  # characters of a name; longer ones are its text


def write_sbom(wheel: Path, file: Path, epoch: int) -> None:
    """Write the bill of materials of a wheel.

    Args:
        wheel: that was built.
        file: to be written.
        epoch: when its commit was made, in seconds.

    Raises:
        ValueError: a package that it needs is not installed, so that nobody knows its version.
    """
    about = read_metadata(wheel)
    root = component_of(about, ComponentType.APPLICATION, wheel)
    root.components = [model_in(wheel, about["Version"])]
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"{root.purl}#{sha256(wheel.read_bytes())}"))
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, timezone.utc)
    bom.metadata.component = root
    bom.metadata.properties = [Property(name=name, value=value) for name, value in builders().items()]
    known = {root.name: root}
    for needing, package in needed(about):
        if package.name not in known:
            known[package.name] = component_of(package.metadata, ComponentType.LIBRARY)
            bom.components.add(known[package.name])
        bom.register_dependency(known[needing], [known[package.name]])
    text = make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string(indent=1)
    if error := JsonStrictValidator(SCHEMA).validate_str(text):
        raise ValueError(f"What was made is no CycloneDX: {error}")
    file.write_text(json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_metadata(wheel: Path) -> Message:
    """What a wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def builders() -> dict[str, str]:
    """What decides about the bytes of an archive beside what is in it."""
    return {
        "build:python": platform.python_version(),
        "build:setuptools": distribution("setuptools").version,
        "build:zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def component_of(about: Message, kind: ComponentType, file: Path | None = None) -> Component:
    """A package, as its metadata describe it; with the digest of the file that it is, if that is at hand."""
    name = canonicalize_name(about["Name"])
    purl = PackageURL("pypi", name=name, version=about["Version"])
    digests = [] if file is None else [HashType(alg=HashAlgorithm.SHA_256, content=sha256(file.read_bytes()))]
    licence = about.get("License-Expression") or about.get("License") or ""
    is_name = 0 < len(licence) <= LONGEST_LICENCE and "\n" not in licence
    return Component(
        name=name,
        version=about["Version"],
        type=kind,
        bom_ref=str(purl),
        purl=purl,
        description=about.get("Summary"),
        licenses=[LicenseFactory().make_from_string(licence)] if is_name else [],
        hashes=digests,
    )


def model_in(wheel: Path, version: str) -> Component:
    """The trained model that a wheel brings."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(MODEL))
        digest = HashType(alg=HashAlgorithm.SHA_256, content=sha256(archive.read(name)))
    return Component(
        name="visualglm-tiny",
        version=version,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"visualglm-tiny@{version}",
        licenses=[LicenseFactory().make_from_string("Apache-2.0")],
        hashes=[digest],
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Installed:
    """A package of this environment, with the name that all its spellings have in common."""

    def __init__(self, requirement: Requirement, needing: str):
        self.name = canonicalize_name(requirement.name)
        try:
            found: Distribution = distribution(requirement.name)
        except PackageNotFoundError as error:
            raise ValueError(
                f"{self.name} is not installed, which {needing} needs: a bill of materials lists the versions that the "
                'tests have run with. pip install -e ".[dev]"'
            ) from error
        self.metadata, self.requires = found.metadata, found.requires or []


def needed(about: Message) -> Iterator[tuple[str, Installed]]:
    """Pairs of the name of a package and what it needs here, from the package that `about` describes to the last."""
    waiting = [(canonicalize_name(about["Name"]), about.get_all("Requires-Dist") or [], frozenset())]
    seen = set()
    while waiting:
        needing, requires, extras = waiting.pop()
        for requirement in map(Requirement, requires):
            if not holds(requirement, extras):
                continue
            package = Installed(requirement, needing)
            yield needing, package
            asked = (package.name, frozenset(requirement.extras))
            if asked not in seen:
                seen.add(asked)
                waiting.append((package.name, package.requires, asked[1]))


def holds(requirement: Requirement, extras: frozenset[str]) -> bool:
    """Whether something is needed on this machine, with the extras of a package that were asked for."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
