"""What tests of notebooks share: their cells, and what these show."""

from pathlib import Path

import nbformat


PARAMETERS = "parameters"  # tag of the cell that says how much a notebook trains


def code_of(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def has_parameters(cell: nbformat.NotebookNode) -> bool:
    return PARAMETERS in cell.metadata.get("tags", ())


def trains(path: Path) -> bool:
    return any(map(has_parameters, code_of(path)))


def shown_by(cell: nbformat.NotebookNode) -> tuple[str, int]:
    """What a cell shows: its text, however it came in pieces, and how many pictures."""
    text, pictures = "", 0
    for output in cell.outputs:
        data = output.get("data", {})
        text += output.get("text", "") or data.get("text/markdown", data.get("text/plain", ""))
        pictures += sum(name.startswith("image/") for name in data)
    return text, pictures
