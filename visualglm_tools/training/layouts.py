"""Layouts of rows, a reader for each: a row as messages of the chat template, and its pictures in their order.

    {"img": "1.png", "prompt": "…", "label": "…"}                                         the original's
    {"messages": [{"role": "user", "content": "…"}, …], "images": ["1.png", …]}            OpenAI's, transformers'
    {"conversations": [{"from": "human", "value": "<image>\\n…"}, …], "image": "1.png"}     LLaVA's, ShareGPT's
    {"prompt": "…" or messages, "completion": "…" or messages, "images": ["1.png"]}        TRL's
    {"question": "…", "answer": "…", "image": "1.png"}                                     of questions about pictures
    {"file_name": "1.png", "text": "…"}                                                    captions

`layout_of` tells them apart by their fields. All have the same checks: turns alternate, nothing is empty, there are as
many pictures as are mentioned, no field means nothing.

Not here: where rows come from (`sources.py`), which picture a name means (`dataset.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from visualglm_hf.conversation import is_english
from visualglm_tools.messages import (
    PICTURE_FIELDS,
    PICTURE_MARK,
    Name,
    Read,
    check_list,
    check_names,
    pictures_of,
    place_pictures,
    shown,
    text_part,
)


OPTIONAL_FIELDS = ("id",)  # known, and of no meaning here
# What `from` is in conversations.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
SPEAKERS["system"] = "system"
CAPTION_QUESTIONS = ("描述这张图片。", "Describe the image.")  # to which a caption is the answer, by its language

UNKNOWN = "(not answered yet)"  # in the place of an answer that the model is to give


class Ambiguous:
    """What stands for an object of JSON that has a field twice; Python's reader would drop the first."""

    def __init__(self, field: str):
        self.field = field

    def __repr__(self) -> str:
        return f"an object that has the field {shown(self.field)} twice"


def kind_of(value: object) -> str:
    return repr(value) if isinstance(value, Ambiguous) else type(value).__name__


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Layout:
    """What rows of a kind have.

    Attributes:
        name: as the run calls it.
        fields: all that have a meaning.
        read: makes messages, and the names of pictures, of a row and of whether it must have its last answer.
        shows_pictures: whether it has no meaning without.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[dict, bool], Read]
    shows_pictures: bool = False


def read_row(row: object, needs_answers: bool = True) -> tuple[Layout, list[dict], list[Name]]:
    """Understand one row, whatever its layout.

    Args:
        row: what a file has for one, or why it cannot be read.
        needs_answers: whether it must end with an answer; else `UNKNOWN` stands in its place.

    Returns:
        Its layout, messages as the chat template takes them, each picture a part without content, and the names of the
        pictures in order.

    Raises:
        ValueError: says what is wrong with it.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, found {kind_of(row)}.")
    layout = layout_of(row)
    check_fields(row, layout)
    messages, names = layout.read(row, needs_answers)
    if not needs_answers and messages[-1]["role"] == "user":
        messages.append(assistant_message(UNKNOWN))
    check_turns(messages)
    return layout, messages, names


def layout_of(row: dict) -> Layout:
    """By which of the layouts a row is to be read: by the first field that only one of them has."""
    for field, layout in MARKS.items():
        if field in row:
            return layout
    is_ours = isinstance(row.get("prompt"), list) or any(field in row for field in PICTURE_FIELDS)
    return COMPLETION if "prompt" in row and is_ours and not {"img", "label"} & set(row) else ORIGINAL


def check_fields(row: dict, layout: Layout) -> None:
    unknown = sorted(set(row) - {*layout.fields, *OPTIONAL_FIELDS})
    if unknown:
        raise ValueError(
            f"unknown field(s) {', '.join(map(shown, unknown[:5]))}; as a row of {layout.name} it has "
            f"{layout.fields}, and perhaps {OPTIONAL_FIELDS}."
        )


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


def assistant_message(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# ---------------------------------------------------------------- fields with a question and an answer


def read_original(row: dict, needs_answers: bool) -> Read:
    names = [row["img"]] if row.get("img") not in (None, "") else []
    return ask(row, "prompt", "label", check_names(names), needs_answers)


def read_question(row: dict, needs_answers: bool) -> Read:
    return ask(row, "question", "answer", pictures_of(row), needs_answers)


def read_caption(row: dict, needs_answers: bool) -> Read:
    """A picture with what it shows, as the answer to a question for that; in Chinese if there is nothing yet."""
    names = pictures_of(row, ("file_name", *PICTURE_FIELDS))
    if not names:
        raise ValueError("a caption needs its picture: 'file_name' or 'image' is missing.")
    if {"caption", "text"} <= set(row):
        raise ValueError("a row has one caption, found 'caption' and 'text'.")
    field = "caption" if "caption" in row else "text"
    caption = row.get(field)
    question = CAPTION_QUESTIONS[isinstance(caption, str) and is_english(caption)]
    return ask(row | {"question": question}, "question", field, names, needs_answers)


def ask(row: dict, question: str, answer: str, names: list[Name], needs_answers: bool) -> Read:
    """Messages of the fields that hold a question, all pictures before it, and its answer."""
    asked = ask_before(row, question, names)
    if not has_answer(row, answer, needs_answers):
        return [asked], names
    return [asked, {"role": "assistant", "content": [text_part(row[answer], answer)]}], names


def ask_before(row: dict, question: str, names: list[Name]) -> dict:
    """The message that asks; a mark of each picture in it is no text."""
    if question not in row:
        raise ValueError(f"the field {question!r} is missing.")
    asked = text_part(row[question], question)
    marks = asked["text"].count(PICTURE_MARK) if names else 0
    if marks and marks != len(names):
        raise ValueError(f"the row has {len(names)} picture(s), its {question} mentions {marks}, {PICTURE_MARK}.")
    if marks:
        asked = text_part(asked["text"].replace(PICTURE_MARK, "").strip(), question)
    return {"role": "user", "content": [{"type": "image"}] * len(names) + [asked]}


def has_answer(row: dict, field: str, needs_answers: bool) -> bool:
    """Whether a row has its answer; a `ValueError` if it must, and has not."""
    if field not in row and needs_answers:
        raise ValueError(f"the field {field!r} is missing.")
    return needs_answers or row.get(field) is not None


# ---------------------------------------------------------------- lists of messages


def read_messages(row: dict, needs_answers: bool) -> Read:
    return place_pictures(check_list(row["messages"], "messages"), pictures_of(row), "messages")


def read_conversations(row: dict, needs_answers: bool) -> Read:
    """LLaVA's and ShareGPT's: a speaker and a value, perhaps the system message in a field of its own."""
    turns = check_list(row["conversations"], "conversations")
    messages = [translate_turn(turn, index) for index, turn in enumerate(turns)]
    if row.get("system") not in (None, ""):
        messages.insert(0, {"role": "system", "content": row["system"]})
    names = pictures_of(row)
    if not names and any(isinstance(each["content"], str) and PICTURE_MARK in each["content"] for each in messages):
        raise ValueError(f"a message mentions a picture, {PICTURE_MARK}, and the row has none.")
    return place_pictures(messages, names, "conversations")


def translate_turn(turn: object, index: int) -> dict:
    """A message of {"from", "value"}; one of {"role", "content"} as it is."""
    if isinstance(turn, dict) and set(turn) == {"role", "content"}:
        return turn
    speaker = turn.get("from") if isinstance(turn, dict) and set(turn) == {"from", "value"} else None
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(
            f"conversations[{index}] must have a value and be from one of {tuple(SPEAKERS)}, found {shown(turn)}."
        )
    return {"role": SPEAKERS[speaker], "content": turn["value"]}


def read_completion(row: dict, needs_answers: bool) -> Read:
    """TRL's: what comes before the last answer, and that answer, as texts or as messages."""
    prompt = as_messages(row, "prompt", "user")
    completion = as_messages(row, "completion", "assistant") if has_answer(row, "completion", needs_answers) else []
    return place_pictures([*prompt, *completion], pictures_of(row), "messages")


def as_messages(row: dict, field: str, role: str) -> list:
    if field not in row:
        raise ValueError(f"the field {field!r} is missing.")
    if isinstance(row[field], str):
        return [{"role": role, "content": text_part(row[field], field)["text"]}]
    return check_list(row[field], field)


ORIGINAL = Layout("the original's layout", ("img", "prompt", "label"), read_original)
MESSAGES = Layout("messages", ("messages", *PICTURE_FIELDS), read_messages)
CONVERSATIONS = Layout("conversations", ("conversations", "system", *PICTURE_FIELDS), read_conversations)
COMPLETION = Layout("prompts and completions", ("prompt", "completion", *PICTURE_FIELDS), read_completion)
QUESTION = Layout("questions and answers", ("question", "answer", *PICTURE_FIELDS), read_question, True)
CAPTION = Layout("captions", ("file_name", *PICTURE_FIELDS, "text", "caption"), read_caption, True)
# The fields that only one layout has, and all of its rows.
MARKS = {
    "messages": MESSAGES,
    "conversations": CONVERSATIONS,
    "completion": COMPLETION,
    "question": QUESTION,
    "caption": CAPTION,
    "text": CAPTION,
    "file_name": CAPTION,
}
