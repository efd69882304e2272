"""Answers in a parquet file: the table of the input, or one of its rows, with two columns more.

A parquet file cannot be gone on with. So until a run ends its answers are lines of JSON beside the table, as
`outputs.py` writes them; then the table is written anew, part by part, and the lines go. Not here: how tables are read.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from visualglm_tools.output_files import ANSWERS, ERRORS, behind_links, is_stream, replacing
from visualglm_tools.packages import missing
from visualglm_tools.serving.outputs import Output, Stream
from visualglm_tools.serving.questions import ADDED, Problem, Row, as_written, contents_of_table, is_table
from visualglm_tools.tables import open_table


if TYPE_CHECKING:
    import pyarrow as pa

TABLE = ".parquet"  # the ending of an output that is a table
AT_ONCE = 64  # rows in memory; with their pictures


@contextlib.contextmanager
def open_output(path: Path | None, rows: Sequence[Row], unread: int, source: Path | None) -> Iterator[Output | Stream]:
    """The output called `path`, or standard output, for the answers to these rows of `source`.

    Args:
        path: None for standard output.
        rows, unread: as in `Output`.
        source: None for standard input.
    """
    if path is None or is_stream(path):
        with open(os.dup(1) if path is None else path, "wb") as file:
            yield Stream(file)
    elif path.suffix.lower() == TABLE:
        yield TableOutput(path, rows, unread, source)
    else:
        yield Output(path, rows, unread)


class TableOutput(Output):
    """An output that is a parquet file once all is done; `source` is the rows' own file, if it is a table."""

    def __init__(self, path: Path, rows: Sequence[Row], unread: int, source: Path | None):
        self.table = behind_links(path)
        super().__init__(self.table.with_name(self.table.name + ANSWERS), rows, unread)
        self.errors_path = behind_links(path.with_name(path.name + ERRORS))
        self.source = source if source is not None and is_table(source) else None

    def read_lines(self) -> Iterator[bytes]:
        """What is beside the table, if a run was stopped, else what is in it."""
        if self.path.exists() or not self.table.exists():
            yield from super().read_lines()
        else:
            for content in contents_of_table(self.table):
                yield f"{as_written(content)}\n".encode()

    def start(self, problems: Iterable[Problem]) -> int:
        with said_in_words(self.table):
            self.check_schema()
        return super().start(problems)

    def finish(self) -> int:
        problems = super().finish()
        answers = self.read()
        with said_in_words(self.table):
            self.write_table(answers)
        if answers.keys() <= {row.key for row in self.rows}:  # others wait there until their rows are right again
            self.path.unlink()
        return problems

    def check_schema(self) -> None:
        """Raise an error, before anything is asked, if there is no such table."""
        import pyarrow.parquet as pq

        schema = self.schema()
        if taken := [name for name in ADDED if name in schema.names[: -len(ADDED)]]:
            raise ValueError(f"it has a column {taken[0]!r} already. Give that another name.")
        pq.write_table(schema.empty_table(), io.BytesIO())

    def schema(self) -> "pa.Schema":
        """The columns of the input, and those of the answers."""
        import pyarrow as pa

        if self.source is not None:
            schema = open_table(self.source).features.arrow_schema
        else:
            pieces = (piece_of(piece) for piece in pieces_of(self.rows))
            schema = pa.unify_schemas([pa.schema([]), *(each.schema for each in pieces)], promote_options="permissive")
        for name in ADDED:
            schema = schema.append(pa.field(name, pa.string()))
        return schema

    def write_table(self, answers: dict[str, str]) -> None:
        """Write the rows that are answered, in the input's order."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema, keys = self.schema(), {row.number: row.key for row in self.rows}
        with replacing(self.table) as file, pq.ParquetWriter(file, schema) as writer:
            for numbers, piece in self.pieces(pa.schema(list(schema)[: -len(ADDED)])):
                places = [place for place, number in enumerate(numbers) if keys.get(number) in answers]
                lines = [json.loads(answers[keys[numbers[place]]]) for place in places]
                piece = piece.take(pa.array(places, pa.int64()))
                for name in ADDED:
                    piece = piece.append_column(name, pa.array([line.get(name) for line in lines], pa.string()))
                writer.write_table(piece.cast(schema))

    def pieces(self, schema: "pa.Schema") -> Iterator[tuple[list[int], "pa.Table"]]:
        """The input part by part, with the numbers of the rows."""
        if self.source is None:
            for piece in pieces_of(self.rows):
                yield [row.number for row in piece], piece_of(piece, schema)
            return
        number = 1
        for piece in open_table(self.source).iter(AT_ONCE):
            yield list(range(number, number + len(piece))), piece
            number += len(piece)


def pieces_of(rows: Sequence[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while piece := list(islice(left, AT_ONCE)):
        yield piece


def piece_of(rows: Sequence[Row], schema: "pa.Schema | None" = None) -> "pa.Table":
    """Rows as a table; without a schema, of the types that they have."""
    import pyarrow as pa

    contents = [json.loads(row.as_json()) for row in rows]
    types = dict.fromkeys(name for content in contents for name in content) if schema is None else typed(schema)
    columns = {name: column_of(name, [content.get(name) for content in contents], kind) for name, kind in types.items()}
    return pa.table(columns)


def typed(schema: "pa.Schema") -> dict[str, "pa.DataType"]:
    return {field.name: field.type for field in schema}


def column_of(name: str, values: list, kind: "pa.DataType | None") -> "pa.Array":
    """A column of this type, or of the one that its values have."""
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"its column {name!r}: {error}") from error


@contextlib.contextmanager
def said_in_words(table: Path) -> Iterator[None]:
    """Let what `pyarrow` refuses be a `ValueError`, and so its absence."""
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        raise ValueError(f"{str(table)!r} is a table: {missing('datasets', 'data')}") from error
    try:
        yield
    except (ArrowException, OverflowError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"{str(table)!r} cannot be a table: {reason}. Write JSON Lines instead.") from error
