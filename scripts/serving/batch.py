"""Questions from a JSON Lines file to answers in another, by one engine or by several processes with one each.

A line of the output is the line of the input with its answer added, in the input's order. Whatever is complete in the
output is not asked again, so that a run that was killed goes on where it was. Not here: options, progress bar.
"""

import collections
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from visualglm_hf.fetching import download
from visualglm_hf.image_processing_visualglm import open_picture

from .engine import Answer, Completion, Engine, EngineError
from .prompts import conversation_messages
from .sampling import MAX_SEED, Settings


WINDOW = 4  # batches that are prepared ahead
ERRORS = ".errors.jsonl"


@dataclass(frozen=True)
class Row:
    """One question.

    Args:
        number: of its line, from 1.
        content: the line's object: "id", "text", perhaps "image", perhaps more.
    """

    number: int
    content: dict

    @property
    def key(self) -> str:
        """The id, told apart from others: 1 and "1" are two ids."""
        return json.dumps(self.content["id"])


@dataclass(frozen=True)
class Problem:
    """Why there is no answer to the line with this number."""

    number: int
    error: str
    content: dict | str

    def as_json(self) -> str:
        return as_line({"line": self.number, "error": self.error, "row": self.content})


def as_line(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> tuple[list[Row], list[Problem]]:
    """The questions of a file, and the lines that are none. Blank lines do not count.

    Raises:
        ValueError: the file cannot be read, or two rows have the same id.
    """
    rows, problems = [], []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row(number, check_content(json.loads(line.decode("utf-8-sig")))))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            problems.append(Problem(number, str(error), line.decode(errors="replace").strip()))
    numbers: dict[str, int] = {}
    for row in rows:
        if (first := numbers.setdefault(row.key, row.number)) != row.number:
            raise ValueError(f"{str(path)!r} has the id {row.key} in line {first} and in line {row.number}.")
    return rows, problems


def read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from error


def check_content(content) -> dict:
    if not isinstance(content, dict):
        raise ValueError('A row must be an object such as {"id": 1, "text": "描述一下这个场景", "image": "1.jpeg"}.')
    if not isinstance(content.get("id"), (str, int)) or isinstance(content["id"], bool):
        raise ValueError(f'"id" must be a text or a whole number, found {content.get("id")!r}.')
    if not isinstance(content.get("text"), str) or not content["text"].strip():
        raise ValueError(f'"text" must be the question, found {content.get("text")!r}.')
    if not isinstance(content.get("image"), (str, type(None))):
        raise ValueError(f'"image" must be a path, or empty for none, found {content["image"]!r}.')
    return content


class Pictures:
    """Opens the pictures that rows name.

    Args:
        folder: of the input file. Relative paths are looked up in it and in the working directory.
        allow_urls: whether http(s) addresses may be fetched.
    """

    def __init__(self, folder: Path, allow_urls: bool):
        self.folder, self.allow_urls = folder, allow_urls

    def open(self, source: str | None) -> Image.Image | None:
        """The picture, or None for no source.

        Raises:
            ValueError: there is no such picture, or more than one.
        """
        if not source:
            return None
        if source.lower().startswith(("http://", "https://")):
            if not self.allow_urls:
                raise ValueError(f"The picture {source!r} is an address; give --allow-urls to fetch it.")
            return open_picture(download(source))
        return open_picture(source if source[:5].lower() == "data:" else self.find(Path(source).expanduser()))

    def find(self, path: Path) -> Path:
        places = list(dict.fromkeys(folder.resolve() / path for folder in (self.folder, Path())))
        found = {place.resolve(): place for place in places if place.is_file()}
        if len(found) > 1:
            raise ValueError(f"The picture {str(path)!r} is ambiguous: there are {' and '.join(map(str, places))}.")
        if not found:
            raise ValueError(f"There is no picture {' or '.join(map(str, places))}.")
        return next(iter(found.values()))


def seed_of(row: Row, seed: int) -> int:
    """A seed of the row's own, so that its answer is the same in whatever run it is asked."""
    digest = hashlib.sha256(f"{seed} {row.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED


def answer_rows(
    engine: Engine, rows: Iterable[Row], pictures: Pictures, settings: Settings, seed: int
) -> Iterator[tuple[Row, Completion | Problem]]:
    """The outcome of each row, in their order; later rows are prepared and answered meanwhile.

    Raises:
        EngineError: the engine is closed, and none of the rest can be answered.
    """
    pending: collections.deque[tuple[Row, Answer | Problem]] = collections.deque()
    for row in rows:
        pending.append((row, submit(engine, row, pictures, replace(settings, seed=seed_of(row, seed)))))
        if len(pending) == WINDOW * engine.limits.max_batch_size:
            yield outcome(engine, *pending.popleft())
    while pending:
        yield outcome(engine, *pending.popleft())


def submit(engine: Engine, row: Row, pictures: Pictures, settings: Settings) -> Answer | Problem:
    try:
        picture = pictures.open(row.content.get("image"))
        return engine.submit(engine.prepare(conversation_messages((), row.content["text"], picture)), settings)
    except ValueError as error:
        return Problem(row.number, str(error), row.content)


def outcome(engine: Engine, row: Row, answer: Answer | Problem) -> tuple[Row, Completion | Problem]:
    if isinstance(answer, Problem):
        return row, answer
    try:
        return row, answer.result()
    except (ValueError, EngineError) as error:
        engine.check_alive()
        return row, Problem(row.number, str(error), row.content)


class Output:
    """The output file, the parts of it that several processes write, and what went wrong beside each.

    Args:
        path: of the output.
        rows: all of the input's.
    """

    def __init__(self, path: Path, rows: Sequence[Row]):
        self.path, self.rows = path, rows
        self.errors_path = path.with_name(path.name + ERRORS)

    def start(self, problems: Iterable[Problem]) -> None:
        """Gather what an earlier run has left, and list these problems instead of its."""
        self.gather()
        for path in self.files_of_parts(ERRORS):
            path.unlink()
        replace_file(self.errors_path, map(Problem.as_json, problems))

    def part(self, process: int, processes: int) -> "Output":
        """Where one of several processes writes; a process alone writes into the output itself."""
        return self if processes == 1 else Output(self.path.with_name(f"{self.path.name}.part{process}"), self.rows)

    def read(self) -> dict[str, str]:
        """The complete lines by the ids' keys. A last line that was not written to its end is cut off.

        Raises:
            ValueError: it holds something else than answers to these rows.
        """
        if not self.path.exists():
            return {}
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(self.path, complete)
        known, lines = {row.key for row in self.rows}, {}
        for number, line in enumerate(data[:complete].splitlines(keepends=True), 1):
            key = key_of(line)
            if key not in known:
                raise ValueError(
                    f"{str(self.path)!r}, line {number}: no answer to a row of the input. Give another output, or "
                    "remove this one."
                )
            lines[key] = line.decode()
        return lines

    def write(
        self, outcomes: Iterable[tuple[Row, Completion | Problem]], on_row: Callable[[Row, Problem | None], None]
    ) -> None:
        """Append each answer as soon as it is there; `on_row` is told of each row, and of the problem with it."""
        with open(self.path, "a", encoding="utf-8") as answers, open(self.errors_path, "a", encoding="utf-8") as errors:
            for row, result in outcomes:
                problem = result if isinstance(result, Problem) else None
                file = errors if problem else answers
                file.write(problem.as_json() if problem else as_line(answered(row, result)))
                file.flush()
                on_row(row, problem)

    def finish(self) -> list[dict]:
        """Gather all parts; returns the problems, which the errors file lists by their lines. Without any, it goes."""
        self.gather()
        paths = [self.errors_path, *self.files_of_parts(ERRORS)]
        problems = [json.loads(line) for path in paths for line in read_lines(path)]
        problems.sort(key=lambda problem: problem["line"])
        replace_file(self.errors_path, map(as_line, problems))
        for path in paths if not problems else paths[1:]:
            path.unlink()
        return problems

    def gather(self) -> None:
        """Put the answers of all parts into the output, in the input's order, and remove the parts."""
        paths = self.files_of_parts()
        parts = [self, *(Output(path, self.rows) for path in paths)]
        lines = {key: line for part in parts for key, line in part.read().items()}
        replace_file(self.path, (lines[row.key] for row in self.rows if row.key in lines))
        for path in paths:
            path.unlink()

    def files_of_parts(self, suffix: str = "") -> list[Path]:
        name = re.compile(re.escape(self.path.name) + r"\.part\d+" + re.escape(suffix))
        return sorted(path for path in self.path.parent.iterdir() if name.fullmatch(path.name))


def answered(row: Row, completion: Completion) -> dict:
    return {**row.content, "answer": completion.text, "finish_reason": completion.finish_reason}


def key_of(line: bytes) -> str | None:
    """The key of an output line's id; None if it is no such line."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return json.dumps(content["id"]) if isinstance(content, dict) and "answer" in content and "id" in content else None


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write all or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
