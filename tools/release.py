"""A release: a wheel and a source distribution that are the same to the bit whenever and wherever a commit is built,
what they are built on, and the SHA-256 of each file.

    python -m tools.release dist

What is built is the commit, not the folder. The bytes are the same where Python, setuptools and zlib are of the same
versions, which the bill of materials (`sbom.py`) names. Not here: signing, which takes a key.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from visualglm_tools.packages import missing
from visualglm_tools.printing import report


ROOT = Path(__file__).resolve().parents[1]
SUMS_FILE = "SHA256SUMS"
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
FILE_MODE, FOLDER_MODE = 0o644, 0o755


def release(checkout: Path, target: Path) -> None:
    """Build the commit that is checked out.

    Args:
        checkout: of the repository, without changes.
        target: folder to write; must not exist, or be empty.

    Raises:
        ValueError: changes that are in no commit, a folder that is in use, or a build that fails.
    """
    from tools.sbom import write_sbom  # whose packages only a release needs

    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} holds something already. Remove it, or name another folder.")
    if changes := git(checkout, "status", "--porcelain", "--untracked-files=no"):
        raise ValueError(f"{changes.splitlines()[0].strip()} is in no commit, and what is released is a commit.")
    epoch = int(git(checkout, "log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as place:
        source, built = Path(place, "source"), Path(place, "built")
        export(checkout, source)
        wheel = build(source, built, epoch)
        write_sbom(wheel, built / f"{wheel.name.partition('-py3')[0]}.cdx.json", epoch)
        write_sums(built)
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(built.iterdir()):
            shutil.copyfile(file, target / file.name)


def git(checkout: Path, *words: str) -> str:
    """What git says."""
    finished = subprocess.run(["git", "-C", checkout, *words], capture_output=True, encoding="utf-8")
    if finished.returncode != 0:
        raise ValueError(f"git {words[0]}: {finished.stderr.strip()}")
    return finished.stdout


def export(checkout: Path, target: Path) -> None:
    """Write the files of the commit, and nothing that lies beside them."""
    archive = target.with_suffix(".tar")
    git(checkout, "archive", "--format=tar", f"--output={archive}", "HEAD")
    unpack(archive, target)


def unpack(archive: Path, target: Path) -> None:
    """Unpack an archive; its files may be read by all, as those of a release, whatever they may be here."""
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)


def build(source: Path, target: Path, epoch: int) -> Path:
    """Build a source distribution, and from it a wheel; returns the wheel."""
    target.mkdir()
    archive = target / run_backend("build_sdist", source, target, epoch)
    normalize(archive, epoch)
    with tempfile.TemporaryDirectory() as place:
        unpack(archive, Path(place, "source"))
        (unpacked,) = Path(place, "source").iterdir()
        return target / run_backend("build_wheel", unpacked, target, epoch)


def run_backend(hook: str, source: Path, target: Path, epoch: int) -> str:
    """Let setuptools build something, with the commit's time and nobody's umask; returns the name of what is built."""
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": str(epoch),
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }
    command = [sys.executable, "-c", BUILD, hook, str(target.resolve())]
    options = {"umask": 0o022} if os.name == "posix" else {}
    finished = subprocess.run(command, cwd=source, env=environment, capture_output=True, encoding="utf-8", **options)
    if finished.returncode != 0:
        raise ValueError(f"{hook} failed: {finished.stderr.strip()[-2000:]}")
    return finished.stdout.split()[-1]


def normalize(archive: Path, epoch: int) -> None:
    """Write a .tar.gz anew without what tells when, where and by whom it was packed; setuptools leaves it in."""
    fresh = archive.with_suffix(".new")
    with (
        tarfile.open(archive) as packed,
        fresh.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=epoch) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as written,
    ):
        for member in sorted(packed.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.linkname = member.type, member.size, member.linkname
            plain.mtime, plain.mode = epoch, FOLDER_MODE if member.isdir() else FILE_MODE
            written.addfile(plain, packed.extractfile(member) if member.isreg() else None)
    fresh.replace(archive)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of each file, as `sha256sum --check` reads it."""
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    (folder / SUMS_FILE).write_text(text, encoding="utf-8")


def main(target: Path) -> int:
    """Build a release of this checkout; returns the exit code."""
    try:
        release(ROOT, target)
    except ImportError as error:
        report(missing(str(error.name), "release"))
        return 2
    except (ValueError, OSError) as error:
        report(error)
        return 2
    print((target / SUMS_FILE).read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
