"""Where rows come from: files of JSON, tables, and folders of pictures with their captions; found out by looking.

A file of rows is a JSON list, or has the ending .jsonl and one object per line, in UTF-8. A folder holds pictures and
beside each, in a text of its name with the ending .txt, what it shows; or a `metadata.jsonl`, as `datasets` has it.

Not here: what a row means (`layouts.py`), how a table is read (`tables.py`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.messages import PICTURE_FIELDS, shown
from visualglm_tools.tables import is_parquet, is_saved_table, open_table, rows_of_table
from visualglm_tools.training.layouts import (
    CAPTION_QUESTIONS,
    OPTIONAL_FIELDS,
    Ambiguous,
    Layout,
    kind_of,
    layout_of,
)


PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"}
CAPTION_ENDING, METADATA = ".txt", "metadata.jsonl"
LONGEST_CAPTION = 2**20  # bytes
NAMED = 5  # files or columns, where there may be many
CHINESE = range(0x4E00, 0xA000)
FULL_WIDTH = (range(0x3000, 0x3040), range(0xFF00, 0xFFF0))  # punctuation


@dataclass(frozen=True)
class Source:
    """The rows of a file or folder.

    Attributes:
        name: by which rows are named.
        folder: where their pictures are looked for first.
        count: of the rows.
        rows: each with its number, from 1, or its line of a .jsonl file; a `ValueError` for one that cannot be read.
        notes: what else the user should know.
    """

    name: str
    folder: Path
    count: int
    rows: Iterator[tuple[int | str, object]] | Sequence[tuple[int | str, object]]
    notes: tuple[str, ...] = ()


def open_source(place: Path, needs_answers: bool = True) -> Source:
    """Find out what a file or folder is, and open it.

    Args:
        place: of the file or folder.
        needs_answers: whether a picture without a caption is a bad row.

    Raises:
        ValueError: it cannot be read, is nothing of the above, or has no rows.
    """
    if is_saved_table(place) or is_parquet(place):
        return open_rows_of_table(place)
    if not place.is_dir():
        return open_rows(place)
    if (place / METADATA).is_file():
        return open_rows(place / METADATA)
    return open_pictures(place, needs_answers)


# ---------------------------------------------------------------- JSON


def open_rows(file: Path) -> Source:
    text = read_text(file)
    rows = list(read_lines(file, text)) if file.suffix.lower() == ".jsonl" else read_list(file, text)
    if not rows:
        raise ValueError(f"{file} has no rows.")
    return Source(file.name, file.parent, len(rows), rows)


def read_text(file: Path) -> str:
    """What a file holds, its ends of lines as they are; a `ValueError` if it is not UTF-8."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from error
    if file.suffix.lower() in PICTURE_ENDINGS:
        raise ValueError(
            f"{file} is a picture. Give the folder that it is in, with a text beside each picture, or a file of rows."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = f"; it seems to be {encoding}" if (encoding := guess_encoding(data)) else ""
        raise ValueError(f"{file} cannot be read: it is not UTF-8 ({error}){guess}. Save it as UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{file} cannot be read: it has NUL characters, perhaps it is UTF-16. Save it as UTF-8.")
    return text


def guess_encoding(data: bytes) -> str | None:
    """What encoding a text that is not UTF-8 has: that of its mark, or GBK if that makes it Chinese."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        others = [ord(character) for character in data.decode("gbk") if not character.isascii()]
    except UnicodeDecodeError:
        return None
    known = sum(code in CHINESE or any(code in part for part in FULL_WIDTH) for code in others)
    return "GBK" if known > 0.9 * len(others) else None


def read_lines(file: Path, text: str) -> Iterator[tuple[int, object]]:
    # Not `splitlines`: U+2028, U+2029 and U+0085 end a line there, and may stand in a string of JSON.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse(line)
            except ValueError as error:
                hint = " A list needs the ending .json." if number == 1 and line.strip() == "[" else ""
                raise ValueError(f"{file}, line {number} is no JSON: {error}.{hint}") from error


def read_list(file: Path, text: str) -> list[tuple[int, object]]:
    try:
        rows = parse(text)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. One object per line needs the ending .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a list of rows, found {kind_of(rows)}. Put [ and ] around the rows.")
    return list(enumerate(rows, start=1))


def parse(text: str) -> object:
    """JSON to values, control characters in strings taken as they are; a `ValueError` for what is none."""
    try:
        return json.loads(text, strict=False, object_pairs_hook=unambiguous)
    except RecursionError as error:
        raise ValueError("it has too many lists or objects in each other") from error


def unambiguous(pairs: list[tuple[str, object]]) -> dict | Ambiguous:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    return Ambiguous(twice[0]) if twice else dict(pairs)


# ---------------------------------------------------------------- tables


def open_rows_of_table(place: Path) -> Source:
    """The rows of a table, with the columns that its layout knows.

    Raises:
        ValueError: see `open_table`; a table without rows, of no layout, or without pictures for its layout.
    """
    table = open_table(place)
    if not len(table):
        raise ValueError(f"{place} has no rows.")
    names = table.column_names
    layout = layout_of(dict.fromkeys(names) | next(rows_of_table(table.select([0]), place, names)))
    check_columns(place, names, layout)
    columns = [name for name in names if name in layout.fields]
    others = [name for name in names if name not in (*layout.fields, *OPTIONAL_FIELDS)]
    notes = (f"its columns {', '.join(map(shown, others[:NAMED]))} mean nothing here",) if others else ()
    rows = enumerate(rows_of_table(table, place, columns), start=1)
    return Source(place.name, place if place.is_dir() else place.parent, len(table), rows, notes)


def check_columns(place: Path, names: Sequence[str], layout: Layout) -> None:
    found = f"{place} has the columns {', '.join(map(shown, names[: 4 * NAMED]))}"
    if not set(names) & set(layout.fields):
        raise ValueError(
            f"{found}, none of which means anything here. Rename them to 'messages', to 'prompt' and 'completion', to "
            "'question' and 'answer' or to 'caption', and that of the pictures to 'image'."
        )
    if layout.shows_pictures and not set(names) & {"file_name", *PICTURE_FIELDS}:
        raise ValueError(f"{found}: {layout.name}, but no pictures. They belong in a column 'image' or 'images'.")


# ---------------------------------------------------------------- folders


def open_pictures(folder: Path, needs_answers: bool) -> Source:
    """The pictures of a folder, each a row with the text beside it as its caption, if there is one.

    Raises:
        ValueError: no pictures, or no captions where there must be some.
    """
    shown_files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    inner = [path.name for path in shown_files if path.is_dir()]
    files = [path for path in shown_files if not path.is_dir()]  # a link to nothing is a bad row, and not left out
    pictures = [path for path in files if path.suffix.lower() in PICTURE_ENDINGS]
    if not pictures:
        raise ValueError(f"{folder} {describe_other_folder(files, inner)}")
    stems = {path.with_suffix("") for path in pictures}
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == CAPTION_ENDING and path.is_file()}
    if needs_answers and not stems & set(texts):
        raise ValueError(
            f"{folder} has {len(pictures)} picture(s) and no captions. Write what each shows into a text of its name, "
            f"{pictures[0].with_suffix(CAPTION_ENDING).name}, or give the file with the rows."
        )
    notes = [f"a caption is the answer to {CAPTION_QUESTIONS[0]} or {CAPTION_QUESTIONS[1]}, by its language"]
    lonely = sorted(path.name for stem, path in texts.items() if stem not in stems)
    if lonely:
        notes.append(f"{len(lonely)} text(s) have no picture beside them: {', '.join(lonely[:NAMED])}")
    if inner:
        notes.append(f"what is in its folders is left out: {', '.join(inner[:NAMED])}; give these as well")
    rows = (
        (f"{number} ({path.name})", row_of_picture(path, texts.get(path.with_suffix("")), needs_answers))
        for number, path in enumerate(pictures, start=1)
    )
    return Source(folder.resolve().name, folder, len(pictures), rows, tuple(notes))


def row_of_picture(picture: Path, text: Path | None, needs_answers: bool) -> dict | ValueError:
    """A row of a picture and its caption, or what is wrong with that."""
    row = {"file_name": picture.name}
    if text is None:
        wanted = picture.with_suffix(CAPTION_ENDING).name
        return ValueError(f"its caption is missing, {wanted} beside it.") if needs_answers else row
    size = text.stat().st_size
    if size > LONGEST_CAPTION:
        return ValueError(f"{text.name} is no caption: it has {size:,} bytes, of {LONGEST_CAPTION:,} at most.")
    try:
        return row | {"text": read_text(text).strip()}
    except ValueError as error:
        return error


def describe_other_folder(files: Sequence[Path], inner: Sequence[str]) -> str:
    """What a folder without pictures is, of the files and the folders in it, and what to give instead."""
    tables = [path for path in files if is_parquet(path)]
    rows = [path for path in files if path.suffix.lower() in (".json", ".jsonl")]
    if tables or rows:
        given = " ".join(str(path) for path in (*tables, *rows)[:NAMED])
        return f"has no pictures, but files of rows. Give those that you mean: {given}"
    if inner:
        return f"has no pictures, but folders. Give those that have some: {', '.join(inner[:NAMED])}"
    return f"{'has no pictures' if files else 'is empty'}. Give a file of rows, or a folder of pictures with captions."
