"""Files that a program writes for others to rely on: one writer at a time, replaced whole or not at all.

A lock is the system's, not the existence of a file: it ends with its process, however that ends. Not here: what is in
the files.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


# What stands beside OUTPUT while it is written, as an ending of its name.
ERRORS, PART, LOCK, TEMPORARY = ".errors.jsonl", ".part", ".lock", ".tmp"
ANSWERS = ".answers.jsonl"  # those that have not come into a table yet


def is_stream(path: Path) -> bool:
    """Whether `path` can only be written to, and neither be read again nor replaced: a pipe, /dev/null, a terminal.

    Raises:
        ValueError: it is no file at all, but a folder, a disk or a socket.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return True
    if not stat.S_ISREG(mode):
        raise ValueError(f"{str(path)!r} is no file but a folder or a device. Give the name of a file to write.")
    return False


def behind_links(path: Path) -> Path:
    """The plain file that is meant by `path`, to be replaced where it is: a link to it stays a link.

    Raises:
        ValueError: there is something else than a plain file.
    """
    target = Path(os.path.realpath(path))
    if is_stream(target):
        raise ValueError(f"{str(path)!r} is no plain file and cannot be replaced. Remove it, or give another name.")
    return target


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two names, or links, are of one file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def is_written_for(path: Path, output: Path) -> bool:
    """Whether a plain file is `output` or one that its writer keeps beside it now or later, however it is called."""
    endings = (re.escape(ending) for ending in (ERRORS, LOCK, TEMPORARY))
    own = re.compile(rf"{re.escape(output.name)}({re.escape(ANSWERS)})?({re.escape(PART)}\d+)?({'|'.join(endings)})*")
    neighbours = [each for each in output.parent.iterdir() if own.fullmatch(each.name)]
    place = Path(os.path.realpath(path))
    return (is_same_file(place.parent, output.parent) and own.fullmatch(place.name) is not None) or any(
        is_same_file(path, each) for each in (output, *neighbours)
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one who writes `path`, among those who lock it; what is locked is a file beside it.

    Raises:
        ValueError: somebody else writes it, or files cannot be locked there.
    """
    name = path.with_name(path.name + LOCK)
    while True:
        with open(name, "ab") as file:
            lock(file, path)
            if not is_called(file, name):
                continue  # its owner has removed it meanwhile: whoever comes next would lock another one
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError, PermissionError):  # of Windows, as long as it is open
                    name.unlink()
            return


def lock(file: BinaryIO, path: Path) -> None:
    """Lock an open file for this process, or say at once why `path` is not to be written."""
    try:
        if fcntl is None:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # PermissionError: on Windows
        raise ValueError(
            f"another run writes {str(path)!r}. Wait until it has ended, or give another output."
        ) from error
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be locked: {error.strerror}. Write to another disk.") from error


def is_called(file: BinaryIO, name: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), name.stat())
    except FileNotFoundError:
        return False


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write all or nothing; the file's permissions stay. For the owner of the lock only."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path`, with its permissions, if all goes well; else nothing is changed."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there was an error: the disk may be full
