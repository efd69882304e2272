"""Questions of a file, JSON Lines or a table, and their answers by one engine.

A row is a question about a picture, or a whole conversation. One that cannot be answered is a `Problem`, whatever is
wrong with it, and the next row is asked. Not here: where the answers are written (`outputs.py`); options, progress bar,
locks (`runs.py`).
"""

import collections
import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from visualglm_hf.fetching import download
from visualglm_hf.image_processing_visualglm import data_uri_bytes, open_picture
from visualglm_tools.messages import Name, Read, check_list, pictures_of, place_pictures
from visualglm_tools.printing import one_line, printable, shortened
from visualglm_tools.serving.engine.answers import Answer, Completion, EngineError
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.prompts import Prompt
from visualglm_tools.serving.engine.sampling import MAX_SEED, Settings
from visualglm_tools.serving.json_lines import is_blank, parse_line, read_lines
from visualglm_tools.tables import PictureInTable, is_parquet, is_saved_table, open_table, rows_of_table


WINDOW = 4  # batches that are prepared ahead
MAX_PICTURE_BYTES = 256 * 2**20  # more than decoding it may take
DOWNLOAD_SECONDS = 60
LONGEST_FILE_NAME = 255  # bytes: what is longer may be the text of a picture in base64
LONGEST_NAME = 200  # characters of a path or an address that is shown
LONGEST_ROW = 4000  # characters of a row in the errors file; of an id, a quarter
ASKED = ("text", "messages", "image", "images")  # the fields that make a question
ADDED = ("answer", "finish_reason")
EXAMPLE = '{"id": 1, "text": "描述一下这个场景", "image": "1.jpeg"}'
SORTED = 64  # batches within which rows of like length are answered together
PICTURE_BYTES = 128  # a picture takes as many tokens as a text of about so many
# What preparing a row may raise: OSError for its picture, RuntimeError and MemoryError for one that is too large.
UNPREPARED = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)


@dataclass(frozen=True)
class Row:
    """One question.

    Args:
        number: of its line, or of its row in a table, from 1.
        content: the line's object: "id", "text" or "messages", perhaps "image" or "images", perhaps more.
        line: the object as it was written; of a table's row, `as_written`.
    """

    number: int
    content: dict
    line: str | None = None

    @property
    def key(self) -> str:
        """The id, told apart from others: 1 and "1" are two ids."""
        return json.dumps(self.content["id"])

    @property
    def question(self) -> str:
        """The text that is asked last."""
        messages, _ = self.conversation()
        return "\n".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")

    def conversation(self) -> Read:
        """Messages as the chat template takes them, each picture a part without content, and the pictures' names."""
        return conversation_of(self.content)

    def as_json(self) -> str:
        return self.line or json.dumps(self.content, ensure_ascii=False)

    def is_answered_by(self, line: str) -> bool:
        """Whether an output line with this row's id is about its question, which may have changed since."""
        asked = question_of(json.loads(line))
        return not {"text", "messages"} & asked.keys() or asked == question_of(json.loads(self.as_json()))


def question_of(content: dict) -> dict:
    """The fields of a row that say what is asked, without those that are empty."""
    return {name: without_nulls(content[name]) for name in ASKED if content.get(name) not in (None, "")}


def without_nulls(value: Any) -> Any:
    """A value of JSON without fields that are null, which are as good as missing."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def conversation_of(content: dict) -> Read:
    """What a row asks; see `Row.conversation`.

    Raises:
        ValueError: it asks nothing, or says it in a way that means nothing.
    """
    asked = question_of(content)
    if "messages" in asked:
        if "text" in asked:
            raise ValueError('A row has either "text" or "messages", found both.')
        messages, names = place_pictures(check_list(asked["messages"], "messages"), pictures_of(asked), "messages")
        check_turns(messages)
        return messages, names
    text, names = content.get("text"), pictures_of(asked)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"text" must be the question, found {text!r}.')
    return [{"role": "user", "content": [*({"type": "image"} for _ in names), {"type": "text", "text": text}]}], names


def check_turns(messages: Sequence[dict]) -> None:
    if messages[-1]["role"] != "user":
        raise ValueError(f'The last of "messages" must be the user\'s question, found {messages[-1]["role"]!r}.')
    silent = [message for message in messages if message["role"] != "user"]
    if any(part["type"] == "image" for message in silent for part in message["content"]):
        raise ValueError('Only the user can show pictures: move them to a message with "role": "user".')


@dataclass(frozen=True)
class Problem:
    """Why there is no answer to the line with this number, which holds `row`."""

    number: int
    error: str
    row: str
    id: str | int | None = None

    @classmethod
    def of(cls, row: Row, error: Exception) -> "Problem":
        return cls(row.number, reason(error), row.as_json(), row.content["id"])

    def as_json(self) -> str:
        row, key = shortened(printable(self.row), LONGEST_ROW), self.id
        if isinstance(key, str):
            key = shortened(printable(key))
        return as_line({"line": self.number, "id": key, "error": one_line(self.error), "row": row})


def reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def as_line(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def read_rows(
    path: Path | None, translate: Callable[[Any], Any] = lambda content: content
) -> tuple[list[Row], list[Problem]]:
    """The questions of a file, or of standard input, and the lines that are none. Blank lines do not count.

    Args:
        path: of JSON Lines or a table; None for standard input.
        translate: makes a row of what a line holds, where that has another layout.

    Raises:
        ValueError: the file cannot be read.
    """
    numbers: dict[str, int] = {}
    try:
        if path is not None and is_table(path):
            contents = enumerate(contents_of_table(path), 1)
            read = [read_row_of_table(number, content, numbers, translate) for number, content in contents]
        else:
            with open_input(path) as file:
                lines = ((number, line) for number, line in enumerate(read_lines(file), 1) if not is_blank(line))
                read = [read_row(number, line, numbers, translate) for number, line in lines]
    except OSError as error:
        raise ValueError(f"cannot read {str(path or 'standard input')!r}: {error.strerror}") from error
    return [row for row in read if isinstance(row, Row)], [row for row in read if isinstance(row, Problem)]


def open_input(path: Path | None) -> BinaryIO:
    return open(os.dup(0) if path is None else path, "rb")


def is_table(path: Path) -> bool:
    """Whether rows are read from a parquet file or a folder of `save_to_disk`."""
    return is_saved_table(path) or is_parquet(path)


def contents_of_table(path: Path) -> Iterator[dict]:
    """The rows of a table, all its columns, with a `PictureInTable` for all bytes."""
    table = open_table(path)
    return rows_of_table(table, path, table.column_names)


def as_written(content: Any) -> str:
    """A table's row as a line of JSON; of a picture in it there is the digest, by which a change is seen."""
    return json.dumps(plain(content), ensure_ascii=False, default=str)


def plain(value: Any) -> Any:
    if isinstance(value, PictureInTable):
        return f"sha256:{hashlib.sha256(value.read_bytes()).hexdigest()}"
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_row(number: int, line: bytes, numbers: dict[str, int], translate: Callable[[Any], Any]) -> Row | Problem:
    """The question in a line, whose number is put among the `numbers` of the keys."""
    content = None
    try:
        found, text = parse_line(line)
        content = translate(found)
        return new_row(Row(number, content, text if content is found else None), numbers)
    except ValueError as error:
        row = line[: 4 * LONGEST_ROW].decode(errors="replace").strip()
        return Problem(number, reason(error), row, id_of(content))


def read_row_of_table(
    number: int, content: dict, numbers: dict[str, int], translate: Callable[[Any], Any]
) -> Row | Problem:
    """The question in a row of a table; see `read_row`."""
    content = translate(content)
    row = Row(number, content, as_written(content))
    try:
        return new_row(row, numbers)
    except ValueError as error:
        return Problem(number, reason(error), row.as_json(), id_of(content))


def new_row(row: Row, numbers: dict[str, int]) -> Row:
    """The row, whose number is put among those of the keys; a `ValueError` if it is none or has another's id."""
    check_content(row.content)
    if (first := numbers.setdefault(row.key, row.number)) != row.number:
        raise ValueError(f"The id {shortened(row.key)} is in line {first} already. Give each row its own.")
    return row


def id_of(content) -> str | int | None:
    """The usable id of what may be a row."""
    key = content.get("id") if isinstance(content, dict) else None
    return key if isinstance(key, (str, int)) and not isinstance(key, bool) else None


def check_content(content: Any) -> None:
    if not isinstance(content, dict):
        hint = " Give each object of the list a line of its own." if isinstance(content, list) else ""
        raise ValueError(f"A row must be an object such as {EXAMPLE}.{hint}")
    if id_of(content) is None:
        raise ValueError(f'"id" must be a text or a whole number, found {content.get("id")!r}.')
    conversation_of(content)
    if taken := [name for name in ADDED if name in content]:
        raise ValueError(f'"{taken[0]}" is what will be added to the row. Give the row\'s own another name.')


def decode_here(data: bytes, name: str) -> Image.Image:
    return open_picture(data)


class Pictures:
    """Opens the pictures that rows name.

    Args:
        folder: of the input file. Relative paths are looked up in it and in the working directory.
        allow_urls: whether http(s) addresses may be fetched.
        decode: makes a picture of its bytes and a name for errors; by default in this process.
    """

    def __init__(self, folder: Path, allow_urls: bool, decode: Callable[[bytes, str], Any] = decode_here):
        self.folder, self.allow_urls, self.decode = folder, allow_urls, decode

    def open(self, source: Name) -> Any:
        """What `decode` makes of the picture.

        Raises:
            ValueError: there is no such picture, or more than one.
        """
        if isinstance(source, PictureInTable):
            return self.decode(source.read_bytes(), f"in row {source.row + 1}")
        return self.decode(self.read(source), repr(shortened(source, LONGEST_NAME)))

    def read(self, source: str) -> bytes:
        if source[:8].lower().startswith(("http://", "https://")):
            if not self.allow_urls:
                raise ValueError(f"The picture {source!r} is an address; give --allow-urls to fetch it.")
            return download_in_time(source)
        if source[:5].lower() == "data:":
            return data_uri_bytes(source)
        places = self.places_of(source)
        if not places and len(source) > LONGEST_FILE_NAME:
            with contextlib.suppress(ValueError):
                return data_uri_bytes(f"data:;base64,{source}")
        if not places:
            folders = " and ".join(dict.fromkeys(map(os.path.abspath, (self.folder, "."))))
            raise ValueError(f"There is no picture file {shortened(source, LONGEST_NAME)!r} in {folders}.")
        if len(places) > 1:
            raise ValueError(f"The picture {source!r} is ambiguous: there are {' and '.join(places)}.")
        return read_file(places[0])

    def places_of(self, name: str) -> list[str]:
        """The different plain files that may be meant."""
        path = os.path.expanduser(name)
        places = (os.path.abspath(os.path.join(folder, path)) for folder in (self.folder, "."))
        return list({os.path.realpath(place): place for place in places if os.path.isfile(place)}.values())


def download_in_time(url: str) -> bytes:
    """The bytes behind an address; a `ValueError` if they take too long, however slowly and steadily they come."""
    downloaded: Future[bytes] = Future()

    def work() -> None:
        try:
            downloaded.set_result(download(url))
        except UNPREPARED as error:
            downloaded.set_exception(error)

    threading.Thread(target=work, name="download", daemon=True).start()  # a process does not wait for it to end
    try:
        return downloaded.result(DOWNLOAD_SECONDS)
    except FutureTimeout as error:  # a TimeoutError from Python 3.11 on
        raise ValueError(f"The picture {url!r} took more than {DOWNLOAD_SECONDS} s. Save it, give the path.") from error


def read_file(path: str) -> bytes:
    size = os.path.getsize(path)  # 0 for those of Linux that have no end
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"The picture {path!r} has more than {MAX_PICTURE_BYTES} bytes. Make it smaller.")
    with open(path, "rb") as file:
        return file.read(size)


def seed_of(row: Row, seed: int) -> int:
    """A seed of the row's own, so that its answer is the same in whatever run it is asked."""
    digest = hashlib.sha256(f"{seed} {row.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED


@dataclass(frozen=True)
class Asking:
    """How the rows of a run are asked.

    Args:
        settings: of each answer, but for its seed.
        seed: from which each row has its own.
        looking: the keywords of `Engine.prepare` for rows with pictures.
        system: the system message of rows that have none of their own.
    """

    settings: Settings
    seed: int = 0
    looking: dict[str, Any] = field(default_factory=dict)
    system: str | None = None

    def prompt(self, row: Row, pictures: Pictures, engine: Engine) -> Prompt:
        """The prompt of a row, its pictures opened."""
        messages, names = row.conversation()
        opened = (pictures.open(name) for name in names)
        for message in messages:
            message["content"] = [
                {"type": "image", "image": next(opened)} if part["type"] == "image" else part
                for part in message["content"]
            ]
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return engine.prepare(messages, **(self.looking if names else {}))


def by_length(rows: Sequence[Row], count: int) -> Iterator[Row]:
    """The rows, of every so many the longest first: beside each other they have less padding."""
    for start in range(0, len(rows), count):
        yield from sorted(rows[start : start + count], key=length_of, reverse=True)


def length_of(row: Row) -> int:
    """About how long a row's prompt is, in bytes: in UTF-8 a token of either language has about as many."""
    messages, names = row.conversation()
    texts = (part["text"] for message in messages for part in message["content"] if part["type"] == "text")
    return sum(len(text.encode()) for text in texts) + PICTURE_BYTES * len(names)


def answer_rows(
    engine: Engine, rows: Iterable[Row], pictures: Pictures, asking: Asking
) -> Iterator[tuple[Row, Completion | Problem]]:
    """The outcome of each row, in their order; later rows are prepared and answered meanwhile.

    Rows whose batch has failed come last, each asked again alone: one of them may have been too much for all.

    Raises:
        EngineError: the engine is closed, and none of the rest can be answered.
    """

    def ask(row: Row) -> Answer | Problem:
        return submit(engine, row, pictures, asking)

    failed = []
    for row, answer in ahead(((row, ask(row)) for row in rows), WINDOW * engine.limits.max_batch_size):
        result = outcome(engine, row, answer)
        if isinstance(result, EngineError):
            failed.append(row)
        else:
            yield row, result
    for row in failed:
        result = outcome(engine, row, ask(row))
        yield row, Problem.of(row, result) if isinstance(result, EngineError) else result


def ahead(items: Iterable, count: int) -> Iterator:
    """The items; `count` of them are taken before the first is given."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) == count:
            yield waiting.popleft()
    yield from waiting


def submit(engine: Engine, row: Row, pictures: Pictures, asking: Asking) -> Answer | Problem:
    try:
        prompt = asking.prompt(row, pictures, engine)
        return engine.submit(prompt, replace(asking.settings, seed=seed_of(row, asking.seed)))
    except UNPREPARED as error:
        engine.check_alive()
        return Problem.of(row, error)


def outcome(engine: Engine, row: Row, answer: Answer | Problem) -> Completion | Problem | EngineError:
    """What has become of a row; an error of the engine's may be the fault of another row of its batch."""
    if isinstance(answer, Problem):
        return answer
    try:
        return answer.result()
    except EngineError as error:
        engine.check_alive()
        return error
    except (ValueError, RuntimeError) as error:
        return Problem.of(row, error)
