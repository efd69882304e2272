"""The model's code in a checkpoint's folder: whether it is there, and writing it there.

In a checkout, `models/visualglm-tiny` has links to the code. Git on Windows and some archives write the text of a link
instead, and a copied folder may have links that lead nowhere. Not here: loading with that code (`loading.py`).
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path


LINKED_CODE = "linked_code.py"  # of models/visualglm-tiny: loads the others, or says what to do
LONGEST_LINK = 1024  # bytes


def check_code(folder: Path) -> None:
    """Raise a `ValueError` if links in a folder have become something else."""
    lost = lost_code(folder)
    if lost:
        others = f" and {len(lost) - 1} more files" if lost[1:] else ""
        raise ValueError(
            f"{lost[0]}{others} in {str(folder)!r} should be links to the model's code, but are the texts of links, as "
            "git and some archives write them where links may not be made, or lead nowhere. Write the code as files: "
            f'visualglm check "{folder}" --copy-code'
        )


def lost_code(folder: Path) -> list[str]:
    """The names of what once were links to code."""
    return sorted(path.name for path in folder.glob("*.py") if not path.is_file() or is_text_of_link(path))


def is_text_of_link(path: Path) -> bool:
    """Whether a file is one line that names a file of its own name somewhere else."""
    if path.stat().st_size > LONGEST_LINK:
        return False
    lines = path.read_bytes().strip().splitlines()
    return len(lines) == 1 and lines[0].endswith((f"/{path.name}".encode(), f"\\{path.name}".encode()))


def copy_code(folder: Path) -> list[str]:
    """Write the code of this version into a folder, instead of links or of an older version's; returns its files.

    Raises:
        ValueError: the folder is not loaded with this code.
    """
    package = package_folder()
    names = sorted(path.name for path in package.glob("*.py") if path.name != "__init__.py")
    known = {*names, LINKED_CODE}
    named = named_code(folder)
    if not named or not named <= known:
        told = f"names {', '.join(sorted(named - known))}" if named else "names no code"
        raise ValueError(
            f"{str(folder)!r} is not loaded with this code: its config.json {told}. Prepare it with visualglm convert, "
            "which writes another folder."
        )
    for name in names:
        fresh = folder / f".{name}.{os.getpid()}.new"
        try:
            shutil.copyfile(package / name, fresh)
            fresh.replace(folder / name)  # a link itself, not what it leads to
        finally:
            fresh.unlink(missing_ok=True)
    return names


def package_folder() -> Path:
    """Where the model's package is; it is not imported, since commands ask before they wait for anything."""
    return Path(find_spec("visualglm_hf").origin).resolve().parent


def named_code(folder: Path) -> set[str]:
    """The files that a folder's config.json tells transformers to load."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has no config.json, so it is no model that is loaded with code.")
    try:
        auto_map = json.loads(file.read_text(encoding="utf-8")).get("auto_map") or {}
        names = [name for value in auto_map.values() for name in (value if isinstance(value, list) else [value])]
        return {f"{name.rpartition('.')[0]}.py" for name in names if name}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is no configuration of a model: {error}") from error
