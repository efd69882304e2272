"""Tables of Hugging Face's `datasets`, a `.parquet` file or a folder of `save_to_disk`: their rows as the readers of
layouts take them, with their pictures still on the disk.

A parquet file is read once, part by part, into the cache of `datasets`, from which any row is taken at once; nothing is
loaded whole.

Not here: what a row means (`messages.py`), files of JSON and folders of pictures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from visualglm_tools.packages import missing


if TYPE_CHECKING:
    from datasets import Dataset

PARQUET = b"PAR1"  # with which such files begin
SAVED, SEVERAL_SAVED = (
    "dataset_info.json",
    "dataset_dict.json",
)  # in a folder of `save_to_disk`: a table, tables by name
AT_ONCE = 16  # rows, whose pictures are in memory while they are looked through


@dataclass(frozen=True)
class PictureInTable:
    """An encoded picture that is read when it is needed.

    Attributes:
        file: or folder of the table.
        row: from 0.
        place: of the picture in it, such as ("images", 0, "bytes").
        table: that has it.
    """

    file: Path
    row: int
    place: tuple[str | int, ...]
    table: "Dataset" = field(compare=False, repr=False)

    def read_bytes(self) -> bytes:
        value = self.table[self.row].to_pylist()[0]
        for step in self.place:
            value = value[step]
        return value


def is_saved_table(folder: Path) -> bool:
    return (folder / SAVED).is_file() or (folder / SEVERAL_SAVED).is_file()


def is_parquet(file: Path) -> bool:
    """Whether a file is a parquet file by its name or its first bytes."""
    if file.suffix.lower() == ".parquet":
        return True
    if not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            return opened.read(len(PARQUET)) == PARQUET
    except OSError:
        return False  # why not is said where it is read


def open_table(place: Path) -> "Dataset":
    """Open a parquet file, or a folder that `save_to_disk` wrote.

    Raises:
        ValueError: `datasets` is missing, a folder of several tables, or one that cannot be read.
    """
    if (place / SEVERAL_SAVED).is_file():
        tables = sorted(path.name for path in place.iterdir() if (path / SAVED).is_file())
        raise ValueError(
            f"{place} has several tables: give one of them, {' or '.join(map(str, tables[:10]))}, as its folder."
        )
    try:
        from datasets import Dataset, load_from_disk
        from datasets.exceptions import DatasetsError
        from pyarrow.parquet import read_metadata
    except ImportError as error:
        raise ValueError(f"{place} is a table: {missing('datasets', 'data')}") from error
    try:
        if place.is_file() and not read_metadata(place).num_rows:
            return Dataset.from_dict({})
        table = load_from_disk(str(place)) if place.is_dir() else Dataset.from_parquet(str(place))
    except (DatasetsError, OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors, too
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{place} cannot be read as a table: {reason or type(error).__name__}. Write it again."
        ) from error
    return table.with_format("arrow")


def rows_of_table(table: "Dataset", file: Path, columns: list[str]) -> Iterator[dict]:
    """The rows with some columns, fields without a value left out, and a `PictureInTable` for all bytes."""
    number = 0
    for part in table.select_columns(columns).iter(AT_ONCE):
        for row in part.to_pylist():
            yield lighten(row, (), lambda place, number=number: PictureInTable(file, number, place, table))
            number += 1


def lighten(value: object, place: tuple[str | int, ...], stand_in: Callable[[tuple], PictureInTable]) -> object:
    """A value without the bytes in it, and without what a table has to write where others have a value."""
    if isinstance(value, bytes):
        return stand_in(place)
    if isinstance(value, dict):
        return {name: lighten(each, (*place, name), stand_in) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [lighten(each, (*place, index), stand_in) for index, each in enumerate(value)]
    return value
