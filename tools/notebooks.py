"""Run the notebooks of `examples/` from top to bottom and store what they show, so that nobody has to run them to read.

    python -m tools.notebooks
    python -m tools.notebooks examples/finetune.ipynb

What differs from run to run and from machine to machine is not stored: progress bars and warnings, times, and of a
picture's formats all but the smallest. `tests/test_readme.py` compares what is stored with a run, and
`tests/tools/test_notebooks.py` those that train.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SECONDS = 1200  # for a cell, on a machine that does other things
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def execute(path: Path) -> NotebookNode:
    """The notebook after a run in a kernel of its own, with outputs as they are stored."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, resources=folder).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = [tidy(output) for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = join_streams(shown)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def join_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what was printed in one piece, however it came."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def tidy(output: NotebookNode) -> NotebookNode:
    """An output without this machine's paths and addresses, and with one format of a picture."""
    if "text" in output:
        output.text = tidy_text(output.text)
    data = output.get("data", {})
    if "text/plain" in data:
        data["text/plain"] = tidy_text(data["text/plain"])
    formats = sorted((name for name in data if name.startswith("image/")), key=lambda name: len(data[name]))
    for name in formats[1:]:
        del data[name]
    return output


def tidy_text(text: str) -> str:
    return ADDRESS.sub("", text.replace(str(ROOT), "visualglm-hf"))


def main(names: Sequence[str]) -> None:
    """Run and store notebooks: those that are named, or all."""
    for path in [Path(name) for name in names] or NOTEBOOKS:
        nbformat.write(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
