"""Whether a folder holds a VisualGLM, or an adapter: commands ask before they wait for any library.

Not here: what is in a checkpoint's files (`files.py`), and loading them (`loading.py`, `adapters.py`).
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

from visualglm_tools.checkpoints.remote_code import check_code
from visualglm_tools.packages import missing


ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHT_FILE = "adapter_model.safetensors"


def check_folder(folder: Path) -> None:
    """Raise a `ValueError` unless the folder says that it holds a VisualGLM, and has the code it once had."""
    config_file = folder.expanduser() / "config.json"
    if not config_file.is_file():
        found = "it has no config.json" if config_file.parent.is_dir() else "there is no such folder"
        raise ValueError(f"no checkpoint in {str(folder)!r}: {found}. Give the folder with the weights as --model.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(config_file)!r} is no JSON: {error}") from error
    # The other ChatGLMs have the same model_type; loading one would leave most weights random.
    if not isinstance(config, dict) or not ({"eva_config", "vision_config"} & config.keys()):
        raise ValueError(f"{str(config_file)!r} is not of a VisualGLM: it has neither vision_config nor eva_config.")
    check_code(config_file.parent)


def check_source(folder: Path, whose: str) -> None:
    """Raise a `ValueError` unless there is a folder to read a checkpoint from."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of {whose}.")


def check_new(target: Path) -> None:
    """Raise a `ValueError` if there is something already in the place of a folder that is to be written."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder. Name a new one; nothing is overwritten.")


def check_adapter(folder: Path) -> None:
    """Raise a `ValueError` unless the folder holds an adapter, and what it takes to use it is installed."""
    config = read_adapter_config(folder.expanduser())
    if config.get("peft_type") != "PREFIX_TUNING" and find_spec("peft") is None:  # a prefix is the model's own affair
        raise ValueError(missing("peft", "train"))


def quieten_peft() -> None:
    """Let PEFT, when it is imported, not tell of the packages that bitsandbytes could use: nothing here needs them."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def read_adapter_config(folder: Path) -> dict:
    """PEFT's description of the adapter; a `ValueError` if the folder holds none."""
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHT_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"no adapter in {str(folder)!r}: there is no {name}. visualglm finetune writes one into the folder "
                "'adapter' of its --save."
            )
    return read_object(folder / ADAPTER_CONFIG_FILE)


def read_object(file: Path) -> dict:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} must hold an object, found {type(content).__name__}.")
    return content
