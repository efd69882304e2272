"""The folder of the pictures that browsers send to the page: this process's own, bounded, and gone when it ends.

A process that was killed cannot clean up; the next one that starts does it instead. Each holds a lock in its folder
while it lives, so only what nobody uses any more is removed.
"""

import contextlib
import functools
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows, where what a killed process left behind stays
    fcntl = None

PREFIX = "visualglm-web-"
LOCK = "visualglm-web.lock"  # without it, a folder is not one of ours
MAX_BYTES = 512 * 2**20  # of all pictures together
MAX_FILES = 1000


@dataclass(frozen=True)
class Upload:
    """A picture in the folder.

    Args:
        path: where it is; the same for the same picture, whoever has sent it.
        came_at: nanoseconds, by its file.
        is_ours: it was not uploaded.
    """

    path: Path
    came_at: int
    is_ours: bool

    def read(self) -> bytes:
        """Its bytes; a `ValueError` if they are gone."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError as error:
            raise ValueError("The picture is not here any more. Choose it again.") from error

    def delete(self) -> None:
        """Delete it, unless somebody has sent the same one since."""
        with contextlib.suppress(FileNotFoundError):
            if not self.is_ours and self.path.stat().st_mtime_ns == self.came_at:
                self.path.unlink()


class Uploads:
    """A temporary folder, only this user's, that never keeps much: beyond its limits the oldest uploads go.

    Nobody misses them: the model has seen a picture, and its browser has shown it, a moment after it came.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES):
        remove_leftovers()
        self.max_bytes, self.max_files = max_bytes, max_files
        self.folder, lock = make_locked_folder()
        self.ours: frozenset[Path] = frozenset()
        self.keep_all()
        self.close = weakref.finalize(self, remove, self.folder, lock)  # at the latest when the process ends

    def keep_all(self) -> None:
        """What is there now was not uploaded, and stays until the end."""
        self.ours = frozenset(files_in(self.folder))

    def find(self, path: str) -> Upload:
        """The picture at a path that a browser names; a `ValueError` for all that is not in the folder."""
        file = Path(path).resolve()
        if not file.is_relative_to(self.folder) or not file.is_file() or file.name == LOCK:
            raise ValueError("The picture is not here. Upload it; nothing else is opened.")
        return Upload(file, file.stat().st_mtime_ns, file in self.ours)

    def trim(self) -> None:
        """Delete the oldest uploads beyond the limits, and empty folders."""
        num_bytes = 0
        for count, (path, status) in enumerate(self.newest_first(), start=1):
            num_bytes += status.st_size
            if num_bytes > self.max_bytes or count > self.max_files:
                path.unlink(missing_ok=True)
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):  # a file, or not empty
                folder.rmdir()

    def newest_first(self) -> list[tuple[Path, os.stat_result]]:
        """The uploads, those on their way too."""
        uploads = []
        for path in files_in(self.folder):
            with contextlib.suppress(FileNotFoundError):  # renamed since it was listed: it has just come
                if path not in self.ours:
                    uploads.append((path, path.stat()))
        return sorted(uploads, key=lambda upload: upload[1].st_mtime_ns, reverse=True)


@functools.cache
def own_uploads() -> Uploads:
    """This process's, which are gradio's too from now on: it keeps what is uploaded where this variable says."""
    uploads = Uploads()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
    return uploads


def files_in(folder: Path) -> list[Path]:
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def make_locked_folder() -> tuple[Path, int | None]:
    """A new temporary folder, and its lock: an open file, so that it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    file = folder / "new"
    file.touch()
    lock = try_to_lock(file)
    file.rename(folder / LOCK)  # now that it is locked, others may find it
    return folder, lock


def try_to_lock(file: Path) -> int | None:
    """Lock a file of this user; None if there is none, or another process has locked it."""
    if fcntl is None:
        return None
    try:
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def remove_leftovers() -> None:
    """Remove the folders that killed processes left behind."""
    for file in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        lock = try_to_lock(file)
        if lock is not None:
            remove(file.parent, lock)


def remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
