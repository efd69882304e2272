"""Write the documentation's page of all options from the commands themselves.

    python -m tools.reference docs/commands.md

A command is on it as soon as its module has `Options`. What the options are for is on the other pages.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from visualglm_tools.__main__ import COMMANDS
from visualglm_tools.options import describe


HEAD = """# Commands and their options

`visualglm COMMAND -h` says the same in a terminal. The names of options may be spelled with `_` instead of `-`, as the
original's were. This page is written by `python -m tools.reference docs/commands.md`.
"""


def write_page() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *(line for name in COMMANDS for line in write_command(name))])


def write_command(name: str) -> Iterator[str]:
    """The lines about one command: its first sentences, examples among them, and the table of its options."""
    command = importlib.import_module(f"visualglm_tools.commands.{name}")
    if not hasattr(command, "Options"):
        return
    sentence, examples = inspect.getdoc(command).split("\n\n")[:2]
    yield f"## visualglm {name}\n\n{sentence}\n\n```\n{inspect.cleandoc(examples)}\n```\n"
    yield "| option | default | what it says |\n|---|---|---|"
    for option, default, help in describe(command.Options):
        yield f"| `{cell(option)}` | {cell(default)} | {cell(help)} |"
    yield ""


def cell(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", r"\|")


def main(path: Path) -> None:
    path.write_text(write_page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
