"""Training data: files of rows to conversations with pictures. Every bad row is named before anything is loaded.

A row has one of two layouts:

    {"img": "1.png", "prompt": "…", "label": "…"}                                the original's; no "img": text only
    {"messages": [{"role": "user", "content": "…"}, …], "images": ["1.png", …]}   several turns and pictures

Pictures are files, looked for beside the rows' file, or base64 text. A file of rows is a JSON list, or has the ending
.jsonl and one object per line.

Not here: prompts and tokens (`encoding.py`).
"""

import hashlib
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tqdm import tqdm

from visualglm_hf.image_processing_visualglm import open_picture, picture_in_base64


ORIGINAL_FIELDS = ("img", "prompt", "label")
CONVERSATION_FIELDS = ("messages", "images")
OPTIONAL_FIELDS = ("id",)  # known, and of no meaning here
ROLES = ("system", "user", "assistant")
PICTURE_MARK = "<image>"  # in a message of a row that has "images": one of them belongs here
PICTURE_PARTS = ({"type"}, {"type", "path"}, {"type", "image"})  # the fields of a part that is a picture
MAX_LISTED = 50  # problems described; of later ones only the row numbers
MAX_NAMED = 1000  # rows named at all
PROGRESS_FROM = 500  # rows
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

UNKNOWN = "(not answered yet)"  # in the place of an answer that the model is to give

Picture = Path | str | bytes  # a file, a `data:` URI, or what a file would hold

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


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


def assistant_message(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text_of(message: dict) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def shown(value: object) -> str:
    """A value for an error: a row may hold a megabyte of base64, or lists in lists."""
    return SHORT.repr(value)


def read_rows(file: Path) -> list[tuple[int, object]]:
    """The rows of a file, each with its number: counted from 1, or its line of a .jsonl file.

    Raises:
        ValueError: a file that cannot be read, is no JSON, or has no rows.
    """
    text = read_text(file)
    rows = list(read_lines(file, text)) if file.suffix.lower() == ".jsonl" else read_list(file, text)
    if not rows:
        raise ValueError(f"{file} has no rows.")
    return rows


def read_text(file: Path) -> str:
    """What a file holds, its ends of lines as they are; a `ValueError` if it is not UTF-8."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read: it is not UTF-8 ({error}). Save it as UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{file} cannot be read: it has NUL characters, perhaps it is UTF-16. Save it as UTF-8.")
    return text


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


class Ambiguous:
    """What stands for an object of JSON that has a field twice; Python's reader would drop the first."""

    def __init__(self, field: str):
        self.field = field

    def __repr__(self) -> str:
        return f"an object that has the field {shown(self.field)} twice"


def parse(text: str) -> object:
    """JSON to values, control characters in strings taken as they are; a `ValueError` for what is none."""
    try:
        return json.loads(text, strict=False, object_pairs_hook=unambiguous)
    except RecursionError as error:
        raise ValueError("it has too many lists or objects in each other") from error


def unambiguous(pairs: list[tuple[str, object]]) -> dict | Ambiguous:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    return Ambiguous(twice[0]) if twice else dict(pairs)


def kind_of(value: object) -> str:
    return repr(value) if isinstance(value, Ambiguous) else type(value).__name__


def read_dataset(files: list[Path], convert=lambda conversation: conversation, needs_answers: bool = True) -> list:
    """Read and check whole files, pictures included.

    Args:
        files: of rows, one after the other.
        convert: what to make of each conversation; a `ValueError` of its makes the row a bad one.
        needs_answers: whether a row without its last answer is a bad one; else `UNKNOWN` stands in its place.

    Returns:
        What `convert` made, row by row.

    Raises:
        ValueError: names every bad row by its number, and what is wrong with it.
    """
    converted, problems = [], []
    check = cache(check_picture)  # each is decoded once, to the end
    for file in files:
        rows = read_rows(file)
        for number, row in tqdm(rows, desc=f"checking {file.name}", disable=len(rows) < PROGRESS_FROM):
            try:
                conversation = read_conversation(row if needs_answers else with_any_answer(row), file, number)
                for picture in conversation.pictures:
                    check(picture)
                converted.append(convert(conversation))
            except ValueError as error:
                problems.append((f"{file.name}, row {number}", str(error)))
    if problems:
        raise ValueError(describe_problems(problems))
    return converted


def describe_problems(problems: list[tuple[str, str]]) -> str:
    lines = [f"{len(problems)} bad row(s); nothing was loaded or trained."]
    lines += [f"  {where}: {what}" for where, what in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append("  and " + "; ".join(where for where, _ in problems[MAX_LISTED:MAX_NAMED]))
    if len(problems) > MAX_NAMED:
        lines.append(f"  and {len(problems) - MAX_NAMED} more")
    return "\n".join(lines)


def digest_picture(picture: Picture) -> bytes:
    """By which to know the same picture again."""
    content = picture.read_bytes() if isinstance(picture, Path) else picture
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()


def check_picture(picture: Picture) -> None:
    """Raise a `ValueError` if a picture is missing or damaged."""
    open_picture(picture)


def read_conversation(row: object, file: Path, number: int) -> Conversation:
    """Understand one row, or raise a `ValueError` that says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, found {kind_of(row)}.")
    if "messages" in row:
        check_fields(row, CONVERSATION_FIELDS)
        messages, names = read_messages(row["messages"], row.get("images"))
    else:
        check_fields(row, ORIGINAL_FIELDS)
        messages, names = read_original(row)
    check_turns(messages)
    pictures = tuple(find_picture(name, file.parent) for name in names)
    return Conversation(f"{file.name}, row {number}", tuple(messages), pictures)


def with_any_answer(row: object) -> object:
    """A row that may end with a question, with an answer to it."""
    if not isinstance(row, dict):
        return row
    if "messages" not in row:
        return {"label": UNKNOWN} | row
    last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else None
    if isinstance(last, dict) and last.get("role") == "user":
        return row | {"messages": [*row["messages"], {"role": "assistant", "content": UNKNOWN}]}
    return row


def check_fields(row: dict, known: tuple[str, ...]) -> None:
    unknown = sorted(set(row) - {*known, *OPTIONAL_FIELDS})
    if unknown:
        raise ValueError(
            f"unknown field(s) {', '.join(map(shown, unknown[:5]))}; a row has {ORIGINAL_FIELDS} or "
            f"{CONVERSATION_FIELDS}, and perhaps {OPTIONAL_FIELDS}."
        )


def read_original(row: dict) -> tuple[list[dict], list[str]]:
    """Turn a row of the original's into messages and the name of its picture."""
    for name in ("prompt", "label"):
        if name not in row:
            raise ValueError(f"the field {name!r} is missing.")
    names = [row["img"]] if row.get("img") not in (None, "") else []
    question = [{"type": "image"}] * len(names) + [text_part(row["prompt"], "prompt")]
    answer = [text_part(row["label"], "label")]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], check_names(names)


def text_part(text: object, what: str) -> dict:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, found {type(text).__name__}: {shown(text)}.")
    if not text.strip():
        raise ValueError(f"{what} is empty.")
    return {"type": "text", "text": text}


def check_names(names: object) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"pictures must be given as file names, found {shown(names)}.")
    return names


def read_messages(messages: object, images: object) -> tuple[list[dict], list[str]]:
    """Turn messages of the usual layouts into those of the chat template, and collect the pictures' names."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of messages, found {shown(messages)}.")
    images = check_names([] if images is None else [images] if isinstance(images, str) else images)
    read = [read_message(message, index, marks=bool(images)) for index, message in enumerate(messages)]
    slots = [name for _, slots in read for name in slots]
    messages = [message for message, _ in read]
    if images and not slots:
        # As TRL does it: pictures that no message mentions come before the first question.
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
        return messages, images
    if slots.count(None) != len(images):
        raise ValueError(
            f"images has {len(images)} picture(s), the messages mention {slots.count(None)}. Write {PICTURE_MARK} "
            "where each belongs, or nowhere to have all before the first question."
        )
    waiting = iter(images)
    return messages, [next(waiting) if name is None else name for name in slots]


def read_message(message: object, index: int, marks: bool) -> tuple[dict, list[str | None]]:
    """One message, and its pictures: a name, or None for the next of the row's "images"."""
    if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
        raise ValueError(f"messages[{index}] must have a role of {ROLES} and a content, found {shown(message)}.")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"messages[{index}].content must be a string or a list of parts, found {shown(content)}.")
    slots, texts = [], []
    for part in parts:
        if part.get("type") == "image" and set(part) in PICTURE_PARTS:
            slots.append(part.get("path", part.get("image")))
        elif part.get("type") == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
            text = part["text"]
            slots += [None] * (text.count(PICTURE_MARK) if marks else 0)
            texts.append(text.replace(PICTURE_MARK, "").strip() if marks and PICTURE_MARK in text else text)
        else:
            raise ValueError(
                f"messages[{index}] has a part that is neither text nor the name of a picture: {shown(part)}."
            )
    check_names([name for name in slots if name is not None])
    content = [{"type": "image"}] * len(slots) + [text_part("\n".join(texts), f"messages[{index}]")]
    return {"role": message["role"], "content": content}, slots


def check_turns(messages: list[dict]) -> None:
    """Raise a `ValueError` unless user and assistant alternate, after a system message or none, to a last answer."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"user and assistant must alternate, after at most one system message, and the assistant must have the "
            f"last word; found {shown(roles)}."
        )
    silent = [message for message in messages if message["role"] != "user"]
    if any(part["type"] == "image" for message in silent for part in message["content"]):
        raise ValueError("only the user can show pictures.")


def find_picture(name: str, folder: Path) -> Picture:
    """What a row means by the name of a picture.

    Returns:
        The file, relative to the rows' file or, as in the original's examples, to the current folder; else what the
        name is itself: a `data:` URI, or base64 text, decoded.

    Raises:
        ValueError: an address, or neither a file nor base64 text of a picture.
    """
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
