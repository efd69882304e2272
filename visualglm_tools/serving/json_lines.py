"""JSON Lines as people and programs write them: each is bounded, strict JSON, and a bad one is an error of its own.

Not here: what the objects mean.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO


MAX_LINE_BYTES = 96 * 2**20  # a picture of 64 MiB as a data: URI, and much text
MAX_VALUES = 2**20  # in a line; as Python objects they take up to 250 MB
MAX_NESTING = 100  # lists and objects in each other


def read_lines(file: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The lines of a file, ended by a line feed and nothing else. Of a longer one the first `max_bytes` + 1 bytes."""
    while line := file.readline(max_bytes + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(2**20)):
            pass
        yield line


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(b"\xef\xbb\xbf").strip()


def parse_line(line: bytes) -> tuple[Any, str]:
    """The value of a line, and its text without a byte order mark and blanks around it.

    Raises:
        ValueError: no UTF-8; no JSON, such as NaN; text that no UTF-8 can hold; too long, too deep, too many values.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"The line has more than {MAX_LINE_BYTES} bytes. Save its picture and give the path.")
    if line.count(b",") + line.count(b"[") + line.count(b"{") > MAX_VALUES:
        raise ValueError(f"The line has more than {MAX_VALUES} values. Leave out what is not asked about.")
    text = decode(line).strip()
    value = parse(text)
    check_nesting(value)
    if "\\u" in text:
        check_surrogates(value)
    return value, text


def decode(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"No UTF-8: byte 0x{line[error.start]:02x} at place {error.start}. Save the file as UTF-8."
        ) from error


def parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        hint = " Give each object a line of its own." if text in ("[", "{") else ""
        raise ValueError(f"No JSON: {error.msg}, at character {error.pos + 1}.{hint}") from error
    except RecursionError as error:
        raise ValueError(too_deep()) from error


def refuse_constant(name: str) -> None:
    raise ValueError(f"No JSON: {name} is no JSON value. Write null, or leave it out.")


def check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [inner for outer in level for inner in parts_of(outer)]
        if not level:
            return
    raise ValueError(too_deep())


def too_deep() -> str:
    return f"Lists and objects are nested more than {MAX_NESTING} deep. Make the row flatter."


def parts_of(value: Any) -> list:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def check_surrogates(value: Any) -> None:
    r"""Refuse "\ud83d" alone, in a text or a name: half of a character, which JSON can say and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(rf'"\u{half:x}" is half of a character. Write both halves, or leave it out.') from error
