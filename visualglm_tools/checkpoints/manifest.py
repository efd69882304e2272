"""`manifest.json`: the files of a folder as they were written, by size and SHA-256, and whether they still are so.

It finds damage, and what was changed by somebody who could not change the manifest as well. Who could is found by a
signature, or by a digest that was published elsewhere. The model's code is compared with that of this release, whatever
the manifest says of it. Nothing in a folder is loaded or run, and no file is ever in memory as a whole.

Not here: whether what was written makes sense (`checks.py`).
"""

import hashlib
import json
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.checkpoints.remote_code import LINKED_CODE, package_folder
from visualglm_tools.shipped import DEFAULT_MODEL
from visualglm_tools.versions import OWN, version_of, versions


MANIFEST_FILE = "manifest.json"
FORMAT = 1
LONGEST_JSON = 16 * 1024**2  # bytes of a file that is read as a whole
PIECE = 1024**2  # bytes that are hashed at a time
SIGNATURES = {f"{MANIFEST_FILE}.{suffix}" for suffix in ("sig", "minisig", "asc", "sigstore.json")}
BOOKKEEPING = (".git/", ".cache/huggingface/")  # of git and of a hub's downloads
CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"}


def files_of(folder: Path) -> dict[str, Path]:
    """All files in a folder and in folders below, by their names as seen from it; no link to a folder is followed.

    Not among them are the manifest, its signatures, and what git and a hub's downloads have for themselves.
    """
    found, folders = {}, [folder]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
            else:
                found[path.relative_to(folder).as_posix()] = path
    return {name: found[name] for name in sorted(found) if is_listed(name)}


def is_listed(name: str) -> bool:
    return name not in {MANIFEST_FILE, ".git", ".gitattributes", *SIGNATURES} and not name.startswith(BOOKKEEPING)


def sha256_of(file: Path, count_bytes: Callable[[int], object] = lambda count: None) -> str:
    """The SHA-256 of a file, which is read piece by piece; `count_bytes` is called with the length of each."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
            count_bytes(count)
    return digest.hexdigest()


def hashed(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """The names of files, each with the SHA-256 of what is in it."""
    from tqdm import tqdm  # not for -h

    total = sum(path.stat().st_size for path in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Hashing", leave=False, disable=None, delay=1) as progress:
        for name, path in files.items():
            yield name, sha256_of(path, progress.update)


def render(content: dict) -> bytes:
    """The bytes of a manifest: a digest of the rest is in it, so that they are those of no other content."""
    inner = json.dumps(content, indent=1, sort_keys=True)
    content = {**content, "sha256": hashlib.sha256(inner.encode()).hexdigest()}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def write_manifest(folder: Path) -> None:
    """Write what a folder's files are now, and by which versions they were written; the last thing that is done to it.

    Raises:
        ValueError: something in it is no file, such as a link that leads nowhere.
    """
    files = files_of(folder)
    for name, path in files.items():
        if problem := why_no_file(path):
            raise ValueError(f"{folder / name} {problem}, so no {MANIFEST_FILE} can be written. Remove it.")
    entries = {name: {"bytes": files[name].stat().st_size, "sha256": digest} for name, digest in hashed(files)}
    replace_manifest(folder, {"format": FORMAT, "made_by": versions(), "files": entries})


def renew_manifest(folder: Path, names: Iterable[str]) -> None:
    """Take over into a folder's manifest, if it has one, some files that were just written by this version.

    Raises:
        ValueError: the manifest is damaged.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return
    content = read_manifest(folder)
    for name in names:
        content["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    content["made_by"] |= {OWN: version_of(OWN)}
    replace_manifest(folder, content)


def replace_manifest(folder: Path, content: dict) -> None:
    """Write a manifest whole or not at all."""
    fresh = folder / f".{MANIFEST_FILE}.new"
    try:
        fresh.write_bytes(render(content))
        fresh.replace(folder / MANIFEST_FILE)
    finally:
        fresh.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict:
    """What a folder's manifest says, without the digest of itself.

    Raises:
        ValueError: there is none, or it is not as it was written.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST_FILE}, so nothing is known of what was written there. Folders of visualglm "
            "convert, quantize, merge and finetune have one; visualglm check FOLDER looks into the weights themselves, "
            "and --write-manifest writes one of what is there now."
        )
    if file.stat().st_size > LONGEST_JSON:
        raise ValueError(f"{file} is no manifest: it has {file.stat().st_size:,} bytes.")
    raw = file.read_bytes()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is no JSON. Copy or download the folder again.") from error
    if not is_manifest(content):
        raise ValueError(f"{file} is no manifest of this format ({FORMAT}), or is damaged.")
    content.pop("sha256")
    if raw != render(content):
        raise ValueError(f"{file} is damaged, or was changed after it was written. Copy or download the folder again.")
    return content


def is_manifest(content: object) -> bool:
    """Whether there is all in it that is read here, of the right kind."""
    if not isinstance(content, dict) or content.get("format") != FORMAT or "sha256" not in content:
        return False
    files, made_by = content.get("files"), content.get("made_by")
    return (
        isinstance(files, dict)
        and all(map(is_entry, files.values()))
        and isinstance(made_by, dict)
        and isinstance(made_by.get(OWN), str)
    )


def is_entry(entry: object) -> bool:
    """Whether a manifest says of a file what it has to."""
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        return False
    return isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)


# ---------------------------------------------------------------- whether it is so


@dataclass(frozen=True)
class Verdict:
    """What was found out about a folder.

    Args:
        problems: a line for each file that is not what it should be.
        num_files, num_bytes: what was compared.
        writer: the version of this package that wrote the folder; None without a manifest.
        sha256: of the manifest, by which the whole folder is known; None without one.
    """

    problems: tuple[str, ...]
    num_files: int = 0
    num_bytes: int = 0
    writer: str | None = None
    sha256: str | None = None


def verify(folder: Path) -> Verdict:
    """Compare each file of a folder with its manifest, and the code in it with that of this release."""
    files = files_of(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return Verdict((str(error), *find_foreign_code(folder, files, None)))
    writer = manifest["made_by"][OWN]
    problems = (*find_differences(files, manifest["files"]), *find_foreign_code(folder, files, writer))
    num_bytes = sum(path.stat().st_size for path in files.values() if path.is_file())
    return Verdict(problems, len(files), num_bytes, writer, sha256_of(folder / MANIFEST_FILE))


def find_differences(files: Mapping[str, Path], listed: Mapping[str, Mapping]) -> Iterator[str]:
    """A line for each file that is missing, additional or another one."""
    yield from (f"{name} is missing." for name in sorted(listed.keys() - files.keys()))
    yield from (f"{name} is additional: the manifest does not list it." for name in files.keys() - listed.keys())
    same_size = {}
    for name in sorted(files.keys() & listed.keys()):
        path, expected = files[name], listed[name]["bytes"]
        if problem := why_no_file(path):
            yield f"{name} {problem}."
        elif path.stat().st_size != expected:
            yield f"{name} differs: it has {path.stat().st_size:,} bytes instead of {expected:,}."
        else:
            same_size[name] = path
    for name, digest in hashed(same_size):
        if digest != listed[name]["sha256"]:
            yield f"{name} differs: its SHA-256 is {digest} instead of {listed[name]['sha256']}."


def why_no_file(path: Path) -> str | None:
    """Why there is nothing to be read; None for a file, also one that is linked to."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            return "is no regular file"
        path.open("rb").close()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def find_foreign_code(folder: Path, files: Mapping[str, Path], writer: str | None) -> Iterator[str]:
    """A line for each piece of code that is not this release's.

    Args:
        folder: with the files.
        files: all of them, by name.
        writer: the version that wrote the folder, if that is known.
    """
    own = {path.name: path for path in package_folder().glob("*.py") if path.name != "__init__.py"}
    own[LINKED_CODE] = DEFAULT_MODEL / LINKED_CODE
    release = version_of(OWN)
    origin = f"; the manifest says that {writer} wrote it" if writer not in (None, release) else ""
    code = {name: path for name, path in files.items() if path.suffix.lower() in CODE and not why_no_file(path)}
    for name, path in code.items():
        if name not in own:
            yield f"{name} is code that this release ({release}) does not have{origin}."
        elif path.stat().st_size != own[name].stat().st_size or sha256_of(path) != sha256_of(own[name]):
            remedy = "visualglm check FOLDER --copy-code renews it."
            yield f"{name} is not the code of this release ({release}){origin}. {remedy}"
    if code:
        missing = own.keys() - files.keys() - {LINKED_CODE}
        yield from (f"{name}, code of this release ({release}), is missing{origin}." for name in sorted(missing))
    yield from find_code_elsewhere(folder, own.keys())


def find_code_elsewhere(folder: Path, own: Collection[str]) -> Iterator[str]:
    """A line for each place that tells transformers to load code that is none of this release's files, `own`: from
    another repository, or from anywhere on the machine, for a module's name may be a path; and for settings of which
    that cannot be said.
    """
    for file in sorted(path for path in folder.iterdir() if path.suffix.lower() == ".json"):  # systems may ignore case
        if file.name == MANIFEST_FILE or why_no_file(file):
            continue
        if (size := file.stat().st_size) > LONGEST_JSON:  # of which transformers reads any size
            yield f"{file.name} has {size:,} bytes, too many to look for code that it may name."
            continue
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            yield f"{file.name} cannot be read as JSON, so it may name any code."
            continue
        for each in sorted(set(named_code(content))):
            if "--" in each:
                yield f"{file.name} names code of another repository: {each}."
            elif f"{each.partition('.')[0]}.py" not in own:
                yield f"{file.name} names code that this release does not have: {each}."
        for each in sorted(set(named_kernels(content))):
            yield f"{file.name} names code of another repository: {each}."
    yield from find_other_model(folder)


def objects_in(content: object) -> Iterator[dict]:
    """All objects in what a JSON file says, at any depth."""
    places = [content]
    while places:
        place = places.pop()
        places.extend(place.values() if isinstance(place, dict) else place if isinstance(place, list) else ())
        if isinstance(place, dict):
            yield place


def named_code(content: object) -> Iterator[str]:
    """The classes that settings name in an `auto_map` or as a pipeline's, as `module.Class`."""
    for place in objects_in(content):
        named = place["auto_map"] if isinstance(place.get("auto_map"), dict) else {}
        for value in (*named.values(), place.get("impl")):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))


def named_kernels(content: object) -> Iterator[str]:
    """The repositories whose kernels settings name as a way of attention or of experts, one for each part or for all:
    transformers fetches and runs them.
    """
    for place in objects_in(content):
        for name, value in place.items():
            if name.endswith(("attn_implementation", "experts_implementation")):
                values = value.values() if isinstance(value, dict) else [value]
                yield from (each for each in values if isinstance(each, str) and "/" in each)


def find_other_model(folder: Path) -> Iterator[str]:
    """A line for an adapter's settings beside a model: of a name on a hub, transformers loads the model that they name
    instead, with its code.
    """
    file = folder / "adapter_config.json"
    if (folder / "config.json").exists() and file.is_file():
        yield f"{file.name} beside a model makes transformers load another model, and its code, from a hub."
