"""Messages with pictures as people write them in files, read for training and for asking.

OpenAI's and transformers' shape: a role and a content, which is a text or parts; a part names its picture, or leaves
its place for the next picture of the row, as a mark in a text does. Not here: which picture a name means, and rows that
are no messages.
"""

import reprlib
from collections.abc import Collection

from visualglm_tools.tables import PictureInTable


PICTURE_FIELDS = ("images", "image")
ROLES = ("system", "user", "assistant")
PICTURE_MARK = "<image>"  # in a message of a row that has pictures: one of them belongs here
PICTURE_PARTS = ("path", "image", "url")  # where a part that is a picture names it

Name = str | PictureInTable  # by which a row calls a picture: of a file, a `data:` URI, base64 text, or where it is
Read = tuple[list[dict], list[Name]]

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


def shown(value: object) -> str:
    """A value for an error: a row may hold a megabyte of base64, or lists in lists."""
    return SHORT.repr(value)


def check_list(messages: object, what: str) -> list:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{what} must be a list of messages, found {shown(messages)}.")
    return messages


def place_pictures(messages: list, images: list[Name], what: str) -> Read:
    """Turn messages into those of the chat template, and collect the pictures' names in their order.

    Args:
        messages: with a role and a content each, a text or parts.
        images: the row's, for which marks and parts without a name stand; without any, as TRL does it, all come before
            the first question.
        what: the field, for errors.
    """
    read = [read_message(message, f"{what}[{index}]", bool(images)) for index, message in enumerate(messages)]
    slots = [name for _, slots in read for name in slots]
    messages = [message for message, _ in read]
    if images and not slots:
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


def read_message(message: object, what: str, marks: bool) -> tuple[dict, list[Name | None]]:
    """One message, and its pictures: a name, or None for the next of the row's."""
    if not isinstance(message, dict):
        raise ValueError(f"{what} must be an object with a role and a content, found {shown(message)}.")
    known = {name: value for name, value in message.items() if value is not None and name != "name"}
    role = "system" if known.get("role") == "developer" else known.get("role")  # OpenAI's newer word
    if role not in ROLES or set(known) != {"role", "content"}:
        others = "".join(f"; {name!r} is not understood" for name in known.keys() - {"role", "content"})
        raise ValueError(f"{what} must have a role of {ROLES} and a content, found {shown(message)}{others}.")
    content = known["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{what}.content must be a string or a list of parts, found {shown(content)}.")
    slots, texts = [], []
    for part in parts:
        if is_picture(part):
            slots.append(name_in(part))
        elif part.get("type") == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
            text = part["text"]
            slots += [None] * (text.count(PICTURE_MARK) if marks else 0)
            texts.append(text.replace(PICTURE_MARK, "").strip() if marks and PICTURE_MARK in text else text)
        else:
            raise ValueError(f"{what} has a part that is neither text nor the name of a picture: {shown(part)}.")
    content = [{"type": "image"}] * len(slots) + [text_part("\n".join(texts), what)]
    return {"role": role, "content": content}, slots


def text_part(text: object, what: str) -> dict:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, found {type(text).__name__}: {shown(text)}.")
    if not text.strip():
        raise ValueError(f"{what} is empty.")
    return {"type": "text", "text": text}


def is_picture(part: dict) -> bool:
    """Whether a part of a message is a picture, named in it or not; OpenAI's are `image_url`."""
    fields = set(part) - {"type"}
    if part.get("type") == "image_url":
        return fields == {"image_url"}
    return part.get("type") == "image" and len(fields) <= 1 and fields <= set(PICTURE_PARTS)


def name_in(part: dict) -> Name | None:
    """The picture that a part names; None for the next of the row's. The name of a picture is never empty."""
    [*fields] = set(part) - {"type"}
    if not fields:
        return None
    value = part[fields[0]]
    if fields == ["image_url"] and isinstance(value, dict) and set(value) in ({"url"}, {"url", "detail"}):
        value = value["url"]
    return check_name(value)


def pictures_of(row: dict, fields: Collection[str] = PICTURE_FIELDS) -> list[Name]:
    """What the fields for pictures name, of which a row has one: a picture, a list of them, or nothing."""
    given = [field for field in fields if row.get(field) not in (None, "")]
    if len(given) > 1:
        raise ValueError(f"pictures must be in one field, found {' and '.join(given)}.")
    if not given:
        return []
    value = row[given[0]]
    return check_names(value if isinstance(value, list) else [value])


def check_names(names: list) -> list[Name]:
    return [check_name(name) for name in names]


def check_name(name: object) -> Name:
    """What names a picture; of a column of pictures, the bytes or else the path."""
    value = name
    if isinstance(name, dict) and name and set(name) <= {"bytes", "path"}:
        value = name.get("path") if name.get("bytes") is None else name["bytes"]
    if isinstance(value, PictureInTable) or (isinstance(value, str) and value):
        return value
    raise ValueError(f"pictures must be given as file names, found {shown(name)}.")
