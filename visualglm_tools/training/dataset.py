"""Training data: rows to conversations with pictures. Every bad row is named before anything is loaded.

Pictures are files, looked for beside the rows, text (a `data:` URI or base64), or in the table of the row.

Not here: files and folders (`sources.py`), what a row means (`layouts.py`), prompts and tokens (`encoding.py`).
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from visualglm_hf.image_processing_visualglm import data_uri_bytes, open_picture, picture_in_base64
from visualglm_tools.messages import Name, shown
from visualglm_tools.tables import PictureInTable
from visualglm_tools.training.layouts import UNKNOWN, Layout, assistant_message, read_row
from visualglm_tools.training.sources import Source, open_source


MAX_LISTED = 50  # problems described; of later ones only the row numbers
MAX_NAMED = 1000  # rows named at all
PROGRESS_FROM = 500  # rows
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

# A file, a `data:` URI, what a file would hold, or where that is.
Picture = Path | str | bytes | PictureInTable


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template takes them, each picture a part without content, and the pictures in order."""

    source: str
    messages: tuple[dict, ...]
    pictures: tuple[Picture, ...]

    @property
    def question(self) -> str:
        return text_of(self.messages[-2])

    @property
    def answer(self) -> str:
        return text_of(self.messages[-1])

    @property
    def is_answered(self) -> bool:
        return self.answer != UNKNOWN

    def with_answer(self, answer: str) -> "Conversation":
        """The same conversation with another last answer."""
        return replace(self, messages=(*self.messages[:-1], assistant_message(answer)))


def text_of(message: dict) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def read_dataset(
    files: list[Path],
    convert: Callable = lambda conversation: conversation,
    needs_answers: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list:
    """Read and check whole files and folders, pictures included.

    Args:
        files: of rows, or folders, one after the other.
        convert: what to make of each conversation; a `ValueError` of its makes the row a bad one.
        needs_answers: whether a row without its last answer is a bad one; else `UNKNOWN` stands in its place.
        say: called with a line for each file: how many rows, and in which layout.

    Returns:
        What `convert` made, row by row.

    Raises:
        ValueError: names every bad row by its number, and what is wrong with it.
    """
    converted, problems = [], []
    check = cache(check_picture)  # each is decoded once, to the end
    for file in files:
        source = open_source(file, needs_answers)
        layouts, shows_pictures = Counter(), False
        for number, row in tqdm(
            source.rows, desc=f"checking {source.name}", total=source.count, disable=source.count < PROGRESS_FROM
        ):
            try:
                layout, conversation = read_conversation(row, source, number, needs_answers)
                layouts[layout.name] += 1
                shows_pictures |= bool(conversation.pictures)
                for picture in conversation.pictures:
                    check(picture)
                converted.append(convert(conversation))
            except ValueError as error:
                problems.append((f"{source.name}, row {number}", str(error)))
        say(describe_source(source, layouts, shows_pictures))
    if problems:
        raise ValueError(describe_problems(problems))
    return converted


def describe_source(source: Source, layouts: Counter, shows_pictures: bool) -> str:
    """How many rows there are, and what they were taken for: "dataset.json: 15 rows, the original's layout."."""
    counts = [name if len(layouts) == 1 else f"{name} ({count})" for name, count in layouts.items()]
    parts = [", ".join([f"{source.count} row{'s' * (source.count != 1)}", *counts])]
    parts += [] if shows_pictures else ["none shows a picture"]
    return f"{source.name}: {'; '.join([*parts, *source.notes])}."


def describe_problems(problems: list[tuple[str, str]]) -> str:
    lines = [f"{len(problems)} bad row(s); nothing was loaded or trained."]
    lines += [f"  {where}: {what}" for where, what in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append("  and " + "; ".join(where for where, _ in problems[MAX_LISTED:MAX_NAMED]))
    if len(problems) > MAX_NAMED:
        lines.append(f"  and {len(problems) - MAX_NAMED} more")
    return "\n".join(lines)


def load_picture(picture: Picture) -> Image.Image:
    """Open a picture; a `ValueError` if it is missing or damaged."""
    return open_picture(picture.read_bytes() if isinstance(picture, PictureInTable) else picture)


def digest_picture(picture: Picture) -> bytes:
    """By which to know the same picture again, wherever it is."""
    content = picture.read_bytes() if isinstance(picture, (Path, PictureInTable)) else picture
    return hashlib.sha256(data_uri_bytes(content) if isinstance(content, str) else content).digest()


def check_picture(picture: Picture) -> None:
    """Raise a `ValueError` if a picture is missing or damaged."""
    load_picture(picture)


def read_conversation(
    row: object, source: Source, number: int | str, needs_answers: bool = True
) -> tuple[Layout, Conversation]:
    """Understand one row, or raise a `ValueError` that says what is wrong with it."""
    layout, messages, names = read_row(row, needs_answers)
    pictures = tuple(find_picture(name, source.folder) for name in names)
    return layout, Conversation(f"{source.name}, row {number}", tuple(messages), pictures)


def find_picture(name: Name, folder: Path) -> Picture:
    """What a row means by the name of a picture.

    Returns:
        The file, relative to the rows' file or, as in the original's examples, to the current folder; else what the
        name is itself: a `data:` URI, base64 text, decoded, or a picture in a table.

    Raises:
        ValueError: an address, or neither a file nor base64 text of a picture.
    """
    if isinstance(name, PictureInTable):
        return name
    if ADDRESS.match(name):
        raise ValueError(f"pictures must be files; save {shown(name)} beside the rows and give its name.")
    if name[:5].lower() == "data:":
        return name
    places = [folder / os.path.expanduser(name), Path(name)]
    for exists in (os.path.isfile, os.path.exists):  # a folder is found last, to be named as one
        for place in filter(exists, places):
            return place
    picture = picture_in_base64(name)
    if picture is None:
        raise ValueError(f"there is no picture {shown(name)}, neither in {folder} nor in the current folder.")
    return picture
