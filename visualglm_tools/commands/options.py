"""Options that several commands have which write a checkpoint.

Not here: how options are declared (`options.py` of the package), what is loaded and served (`serving/options.py`).
"""

from typing import Any

from visualglm_tools.options import argument, option


READY = "{} is ready: load it with trust_remote_code=True, check it with visualglm check."


def target_argument() -> Any:
    """The folder that a command writes."""
    return argument("folder to write; must not exist, or be empty", metavar="DST")


def tokenizer_option(source: str = "SRC") -> Any:
    """Where the vocabulary is, if not beside the weights."""
    return option(f"where ice_text.model is, if it is not in {source}", None, metavar="FOLDER_OR_FILE")
