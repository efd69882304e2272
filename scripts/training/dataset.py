"""Training data: files of rows to conversations with pictures. Every bad row is named before anything is loaded.

A row has one of two layouts:

    {"img": "1.png", "prompt": "…", "label": "…"}                                the original's; no "img": text only
    {"messages": [{"role": "user", "content": "…"}, …], "images": ["1.png", …]}   several turns and pictures

Pictures are looked for beside the file. A file is a JSON list, or has the ending .jsonl and one object per line.

Not here: prompts and tokens (`encoding.py`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from visualglm_hf.image_processing_visualglm import open_picture


ORIGINAL_FIELDS = ("img", "prompt", "label")
CONVERSATION_FIELDS = ("messages", "images")
OPTIONAL_FIELDS = ("id",)  # known, and of no meaning here
ROLES = ("system", "user", "assistant")
PICTURE_MARK = "<image>"  # in a message of a row that has "images": one of them belongs here
MAX_LISTED = 50  # problems described; of later ones only the row numbers
PROGRESS_FROM = 500  # rows


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template takes them, each picture a part without content, and the pictures in order."""

    source: str
    messages: tuple[dict, ...]
    pictures: tuple[Path, ...]

    @property
    def question(self) -> str:
        return text_of(self.messages[-2])

    @property
    def answer(self) -> str:
        return text_of(self.messages[-1])


def text_of(message: dict) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def read_rows(file: Path) -> list[tuple[int, object]]:
    """The rows of a file, each with its number: counted from 1, or its line of a .jsonl file.

    Raises:
        ValueError: a file that cannot be read, is no JSON, or has no rows.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    rows = list(read_lines(file, text)) if file.suffix == ".jsonl" else read_list(file, text)
    if not rows:
        raise ValueError(f"{file} has no rows.")
    return rows


def read_lines(file: Path, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is no JSON: {error}.") from error


def read_list(file: Path, text: str) -> list[tuple[int, object]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. One object per line needs the ending .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a list of rows, found {type(rows).__name__}.")
    return list(enumerate(rows, start=1))


def read_dataset(files: list[Path], convert=lambda conversation: conversation) -> list:
    """Read and check whole files, pictures included.

    Args:
        files: of rows, one after the other.
        convert: what to make of each conversation; a `ValueError` of its makes the row a bad one.

    Returns:
        What `convert` made, row by row.

    Raises:
        ValueError: names every bad row by its number, and what is wrong with it.
    """
    converted, problems = [], []
    for file in files:
        rows = read_rows(file)
        for number, row in tqdm(rows, desc=f"checking {file.name}", disable=len(rows) < PROGRESS_FROM):
            try:
                conversation = read_conversation(row, file, number)
                for picture in conversation.pictures:
                    check_picture(picture)
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
        lines.append("  and " + "; ".join(where for where, _ in problems[MAX_LISTED:]))
    return "\n".join(lines)


@cache
def check_picture(picture: Path) -> None:
    """Raise a `ValueError` if a picture is missing or damaged; each is decoded once, to the end."""
    open_picture(picture)


def read_conversation(row: object, file: Path, number: int) -> Conversation:
    """Understand one row, or raise a `ValueError` that says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, found {type(row).__name__}.")
    if "messages" in row:
        check_fields(row, CONVERSATION_FIELDS)
        messages, names = read_messages(row["messages"], row.get("images"))
    else:
        check_fields(row, ORIGINAL_FIELDS)
        messages, names = read_original(row)
    check_turns(messages)
    pictures = tuple(find_picture(name, file.parent) for name in names)
    return Conversation(f"{file.name}, row {number}", tuple(messages), pictures)


def check_fields(row: dict, known: tuple[str, ...]) -> None:
    unknown = sorted(set(row) - {*known, *OPTIONAL_FIELDS})
    if unknown:
        raise ValueError(
            f"unknown field(s) {', '.join(map(repr, unknown))}; a row has {ORIGINAL_FIELDS} or {CONVERSATION_FIELDS}, "
            f"and perhaps {OPTIONAL_FIELDS}."
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
        raise ValueError(f"{what} must be a string, found {type(text).__name__}: {text!r}.")
    if not text.strip():
        raise ValueError(f"{what} is empty.")
    return {"type": "text", "text": text}


def check_names(names: object) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"pictures must be given as file names, found {names!r}.")
    return names


def read_messages(messages: object, images: object) -> tuple[list[dict], list[str]]:
    """Turn messages of the usual layouts into those of the chat template, and collect the pictures' names."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of messages, found {messages!r}.")
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
        raise ValueError(f"messages[{index}] must have a role of {ROLES} and a content, found {message!r}.")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"messages[{index}].content must be a string or a list of parts, found {content!r}.")
    slots, texts = [], []
    for part in parts:
        if part.get("type") == "image" and set(part) <= {"type", "path", "image"}:
            slots.append(part.get("path", part.get("image")))
        elif part.get("type") == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
            text = part["text"]
            slots += [None] * (text.count(PICTURE_MARK) if marks else 0)
            texts.append(text.replace(PICTURE_MARK, "").strip() if marks and PICTURE_MARK in text else text)
        else:
            raise ValueError(f"messages[{index}] has a part that is neither text nor the name of a picture: {part!r}.")
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
            f"last word; found {', '.join(roles)}."
        )
    silent = [message for message in messages if message["role"] != "user"]
    if any(part["type"] == "image" for message in silent for part in message["content"]):
        raise ValueError("only the user can show pictures.")


def find_picture(name: str, folder: Path) -> Path:
    """The picture's file: relative to the row's file or, as in the original's examples, to the current folder."""
    if "://" in name or name[:5].lower() == "data:":
        raise ValueError(f"pictures must be files; save {name[:80]!r} beside the rows and give its name.")
    beside, here = folder / Path(name).expanduser(), Path(name)
    if not beside.is_file() and not here.is_file():
        raise ValueError(f"there is no picture {name!r}, neither in {folder} nor in the current folder.")
    return beside if beside.is_file() else here
