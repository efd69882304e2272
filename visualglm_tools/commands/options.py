"""Options that several commands have which write a checkpoint.

Not here: how options are declared (`options.py` of the package), what is loaded and served (`serving/options.py`).
"""

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from visualglm_tools.options import argument, option, words
from visualglm_tools.printing import one_line


READY = "{} is ready: load it with trust_remote_code=True, check it with visualglm check."


def target_argument() -> Any:
    """The folder that a command writes."""
    return argument("folder to write; must not exist, or be empty", metavar="DST")


def tokenizer_option(source: str = "SRC") -> Any:
    """Where the vocabulary is, if not beside the weights."""
    return option(f"where ice_text.model is, if it is not in {source}", None, metavar="FOLDER_OR_FILE")


def describe_command(name: str, options: Any) -> str:
    """The command line that is read as these options, as a model card shows it: of paths the last part alone."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    ends = {field: Path(value.resolve().name) for field, value in values.items() if isinstance(value, Path)}
    return one_line(shlex.join(["visualglm", name, *words(replace(options, **ends))]))
