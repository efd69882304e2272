"""Questions from a JSON Lines file to answers in another, by one engine or by several processes with one each.

A line of the output is the line of the input with its answer added, in the input's order. Whatever is complete in the
output is not asked again, so that a run that was killed goes on where it was. A row that cannot be answered is a
`Problem`, whatever is wrong with it, and the next row is asked. Not here: options, progress bar, locks.
"""

import collections
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from visualglm_hf.fetching import download
from visualglm_hf.image_processing_visualglm import data_uri_bytes, open_picture
from visualglm_tools.output_files import ERRORS, PART, behind_links, is_stream, replace_file
from visualglm_tools.printing import one_line, printable, shortened
from visualglm_tools.serving.engine.answers import Answer, Completion, EngineError
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.prompts import conversation_messages
from visualglm_tools.serving.engine.sampling import MAX_SEED, Settings
from visualglm_tools.serving.json_lines import MAX_LINE_BYTES, is_blank, parse_line, read_lines


WINDOW = 4  # batches that are prepared ahead
MAX_PICTURE_BYTES = 256 * 2**20  # more than decoding it may take
DOWNLOAD_SECONDS = 60
LONGEST_FILE_NAME = 255  # bytes: what is longer may be the text of a picture in base64
LONGEST_NAME = 200  # characters of a path or an address that is shown
LONGEST_ROW = 4000  # characters of a row in the errors file; of an id, a quarter
ADDED = ("answer", "finish_reason")
# What preparing a row may raise: OSError for its picture, RuntimeError and MemoryError for one that is too large.
UNPREPARED = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)


@dataclass(frozen=True)
class Row:
    """One question.

    Args:
        number: of its line, from 1.
        content: the line's object: "id", "text", perhaps "image", perhaps more.
        line: the object as it was written.
    """

    number: int
    content: dict
    line: str | None = None

    @property
    def key(self) -> str:
        """The id, told apart from others: 1 and "1" are two ids."""
        return json.dumps(self.content["id"])

    def as_json(self) -> str:
        return self.line or json.dumps(self.content, ensure_ascii=False)

    def is_answered_by(self, line: str) -> bool:
        """Whether an output line with this row's id is about its question, which may have changed since."""
        answer = json.loads(line)
        same_picture = (answer.get("image") or None) == (self.content.get("image") or None)
        return "text" not in answer or (answer["text"] == self.content["text"] and same_picture)


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
        path: of the file; None for standard input.
        translate: makes a row of what a line holds, where that has another layout.

    Raises:
        ValueError: the file cannot be read.
    """
    numbers: dict[str, int] = {}
    try:
        with open_input(path) as file:
            lines = ((number, line) for number, line in enumerate(read_lines(file), 1) if not is_blank(line))
            read = [read_row(number, line, numbers, translate) for number, line in lines]
    except OSError as error:
        raise ValueError(f"cannot read {str(path or 'standard input')!r}: {error.strerror}") from error
    return [row for row in read if isinstance(row, Row)], [row for row in read if isinstance(row, Problem)]


def open_input(path: Path | None) -> BinaryIO:
    return open(os.dup(0) if path is None else path, "rb")


def read_row(number: int, line: bytes, numbers: dict[str, int], translate: Callable[[Any], Any]) -> Row | Problem:
    """The question in a line, whose number is put among the `numbers` of the keys."""
    content = None
    try:
        found, text = parse_line(line)
        content = translate(found)
        row = Row(number, check_content(content), text if content is found else None)
        if (first := numbers.setdefault(row.key, number)) != number:
            raise ValueError(f"The id {shortened(row.key)} is in line {first} already. Give each row its own.")
        return row
    except ValueError as error:
        row = line[: 4 * LONGEST_ROW].decode(errors="replace").strip()
        return Problem(number, reason(error), row, id_of(content))


def id_of(content) -> str | int | None:
    """The usable id of what may be a row."""
    key = content.get("id") if isinstance(content, dict) else None
    return key if isinstance(key, (str, int)) and not isinstance(key, bool) else None


def check_content(content) -> dict:
    if not isinstance(content, dict):
        raise ValueError('A row must be an object such as {"id": 1, "text": "描述一下这个场景", "image": "1.jpeg"}.')
    if id_of(content) is None:
        raise ValueError(f'"id" must be a text or a whole number, found {content.get("id")!r}.')
    if not isinstance(content.get("text"), str) or not content["text"].strip():
        raise ValueError(f'"text" must be the question, found {content.get("text")!r}.')
    if not isinstance(content.get("image"), (str, type(None))):
        raise ValueError(f'"image" must be a path, or empty for none, found {content["image"]!r}.')
    if taken := [name for name in ADDED if name in content]:
        raise ValueError(f'"{taken[0]}" is what will be added to the row. Give the row\'s own another name.')
    return content


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

    def open(self, source: str | None) -> Any:
        """What `decode` makes of the picture, or None for no source.

        Raises:
            ValueError: there is no such picture, or more than one.
        """
        return self.decode(self.read(source), repr(shortened(source, LONGEST_NAME))) if source else None

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


def answer_rows(
    engine: Engine,
    rows: Iterable[Row],
    pictures: Pictures,
    settings: Settings,
    seed: int,
    looking: dict[str, Any] | None = None,
) -> Iterator[tuple[Row, Completion | Problem]]:
    """The outcome of each row, in their order; later rows are prepared and answered meanwhile.

    `looking` are the keywords of `Engine.prepare` for rows with pictures.

    Rows whose batch has failed come last, each asked again alone: one of them may have been too much for all.

    Raises:
        EngineError: the engine is closed, and none of the rest can be answered.
    """

    def ask(row: Row) -> Answer | Problem:
        return submit(engine, row, pictures, replace(settings, seed=seed_of(row, seed)), looking or {})

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


def submit(
    engine: Engine, row: Row, pictures: Pictures, settings: Settings, looking: dict[str, Any]
) -> Answer | Problem:
    try:
        picture = pictures.open(row.content.get("image"))
        messages = conversation_messages((), row.content["text"], picture)
        prompt = engine.prepare(messages, **({} if picture is None else looking))
        return engine.submit(prompt, settings)
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


class Output:
    """The output file, the parts of it that several processes write, and what went wrong beside each.

    Args:
        path: of the output, or of a link to it.
        rows: all of the input's.
        unread: how many lines of the input are none; each may be a row that was one when it was answered.

    Raises:
        ValueError: there is something else than a plain file.
    """

    how_to_go_on = "The same command goes on from here."

    def __init__(self, path: Path, rows: Sequence[Row], unread: int = 0):
        self.path, self.rows, self.unread = behind_links(path), rows, unread
        self.errors_path = behind_links(path.with_name(path.name + ERRORS))

    def start(self, problems: Iterable[Problem]) -> int:
        """Gather what an earlier run has left, and list these problems instead of its.

        Returns how many answers are gone, since their questions have changed.
        """
        outdated = self.gather()
        for path in self.files_of_parts(ERRORS):
            path.unlink()
        replace_file(self.errors_path, map(Problem.as_json, problems))
        return outdated

    def part(self, process: int, processes: int) -> "Output":
        """Where one of several processes writes; a process alone writes into the output itself."""
        return self if processes == 1 else self.beside(self.path.with_name(f"{self.path.name}{PART}{process}"))

    def beside(self, path: Path) -> "Output":
        return Output(path, self.rows, self.unread)

    def read(self) -> dict[str, str]:
        """The complete lines by the ids' keys, without a last one that was not written to its end.

        Raises:
            ValueError: it holds something else than answers to these rows.
        """
        lines, known, spoiled = {}, {row.key for row in self.rows}, self.unread
        for number, line in enumerate(self.read_lines(), 1):
            key = key_of(line)
            if key is not None and key not in known:
                spoiled -= 1
            if key is not None and spoiled >= 0:
                lines[key] = line.decode().removesuffix("\n") + "\n"
            elif key is not None or not self.is_torn(line, is_ours=bool(lines)):
                raise ValueError(
                    f"{str(self.path)!r}, line {number}: no answer to a row of the input. Give another output, or "
                    "remove this one."
                )
        return lines

    def read_lines(self) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            yield from read_lines(file, 2 * MAX_LINE_BYTES)

    def is_torn(self, line: bytes, is_ours: bool) -> bool:
        """Whether a run was killed while it wrote this line; where no other says that the file is ours, by its text."""
        starts = (row.as_json().encode()[:-1] for row in self.rows)
        is_ours = is_ours or any(start.startswith(line) or line.startswith(start) for start in starts)
        return is_ours and not line.endswith(b"\n")

    def write(
        self, outcomes: Iterable[tuple[Row, Completion | Problem]], on_row: Callable[[Row, Problem | None], None]
    ) -> None:
        """Append each answer as soon as it is there; `on_row` is told of each row, and of the problem with it."""
        with open(self.path, "ab") as answers, open(self.errors_path, "ab") as errors:
            for row, result in outcomes:
                problem = result if isinstance(result, Problem) else None
                write_line(errors if problem else answers, problem.as_json() if problem else answered(row, result))
                on_row(row, problem)

    def count(self) -> int:
        """How many rows are answered, as the files say."""
        answers = self.answers()
        return sum(row.key in answers for row in self.rows)

    def finish(self) -> int:
        """Gather all parts; returns how many problems the errors file lists, by their lines. Without any, it goes."""
        self.gather()
        paths = [self.errors_path, *self.files_of_parts(ERRORS)]
        problems = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
        problems.sort(key=lambda problem: problem["line"])
        replace_file(self.errors_path, map(as_line, problems))
        for path in paths if not problems else paths[1:]:
            path.unlink()
        return len(problems)

    def gather(self) -> int:
        """Put the answers of all parts into the output, in the input's order, and remove the parts.

        Returns how many there were to rows that have changed since; these are left out.
        """
        lines, paths = self.answers(), self.files_of_parts()
        of_rows = {row.key: lines.pop(row.key) for row in self.rows if row.key in lines}
        current = [of_rows[row.key] for row in self.rows if row.key in of_rows and row.is_answered_by(of_rows[row.key])]
        replace_file(self.path, [*current, *lines.values()])
        for path in paths:
            path.unlink()
        return len(of_rows) - len(current)

    def answers(self) -> dict[str, str]:
        """The lines of the output and of all parts by the ids' keys."""
        parts = [self, *map(self.beside, self.files_of_parts())]
        return {key: line for part in parts for key, line in part.read().items()}

    def files_of_parts(self, suffix: str = "") -> list[Path]:
        name = re.compile(re.escape(self.path.name + PART) + r"\d+" + re.escape(suffix))
        return sorted(path for path in self.path.parent.iterdir() if name.fullmatch(path.name))


class Stream:
    """An output that can only be written to, from its beginning: standard output, a pipe or a device."""

    how_to_go_on = "The same command begins anew: this output cannot be read again."
    errors_path = None

    def __init__(self, file: BinaryIO):
        self.file = file
        self.num_problems = self.num_answers = 0

    def start(self, problems: Sequence[Problem]) -> int:
        self.num_problems = len(problems)
        return 0

    def part(self, process: int, processes: int) -> "Stream":
        return self

    def read(self) -> dict[str, str]:
        return {}

    def write(
        self, outcomes: Iterable[tuple[Row, Completion | Problem]], on_row: Callable[[Row, Problem | None], None]
    ) -> None:
        for row, result in outcomes:
            problem = result if isinstance(result, Problem) else None
            if problem:
                self.num_problems += 1
            else:
                write_line(self.file, answered(row, result))
                self.num_answers += 1
            on_row(row, problem)

    def count(self) -> int:
        return self.num_answers

    def finish(self) -> int:
        return self.num_problems


@contextlib.contextmanager
def open_output(path: Path | None, rows: Sequence[Row], unread: int) -> Iterator[Output | Stream]:
    """The output called `path`, or standard output, for the answers to these rows; `unread` as in `Output`."""
    if path is None or is_stream(path):
        with open(os.dup(1) if path is None else path, "wb") as file:
            yield Stream(file)
    else:
        yield Output(path, rows, unread)


def write_line(file: BinaryIO, line: str) -> None:
    file.write(line.encode())
    file.flush()


def answered(row: Row, completion: Completion) -> str:
    """The row's line as it was written, so that nothing in it is another number or text now, and what is added."""
    added = json.dumps(dict(zip(ADDED, (completion.text, completion.finish_reason), strict=True)), ensure_ascii=False)
    return f"{row.as_json()[:-1].rstrip()}, {added[1:]}\n"


def key_of(line: bytes) -> str | None:
    """The key of an output line's id; None if it is no such line."""
    try:
        content = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return json.dumps(content["id"]) if isinstance(content, dict) and "answer" in content and "id" in content else None
