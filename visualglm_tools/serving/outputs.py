"""Where answers are written: a file that a run goes on from, with the parts of several processes, or a stream.

A line of the output is the line of the input with its answer added; when all is done they are in the input's order.
Whatever is complete in the output is not asked again, so that a run that was killed goes on where it was. Not here:
tables (`table_output.py`), locks (`runs.py`).
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from visualglm_tools.output_files import ERRORS, PART, behind_links, replace_file
from visualglm_tools.serving.engine.answers import Completion
from visualglm_tools.serving.json_lines import MAX_LINE_BYTES, read_lines
from visualglm_tools.serving.questions import ADDED, Problem, Row, as_line


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
    is_ordered_at_the_end = True

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
        self, outcomes: Iterable[tuple[Row, Completion | Problem]], on_row: Callable[[Completion | Problem], None]
    ) -> None:
        """Append each answer as soon as it is there; `on_row` is told what became of each row."""
        with open(self.path, "ab") as answers, open(self.errors_path, "ab") as errors:
            for row, result in outcomes:
                problem = result if isinstance(result, Problem) else None
                write_line(errors if problem else answers, problem.as_json() if problem else answered(row, result))
                on_row(result)

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
    is_ordered_at_the_end = False

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
        self, outcomes: Iterable[tuple[Row, Completion | Problem]], on_row: Callable[[Completion | Problem], None]
    ) -> None:
        for row, result in outcomes:
            problem = result if isinstance(result, Problem) else None
            if problem:
                self.num_problems += 1
            else:
                write_line(self.file, answered(row, result))
                self.num_answers += 1
            on_row(result)

    def count(self) -> int:
        return self.num_answers

    def finish(self) -> int:
        return self.num_problems


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
