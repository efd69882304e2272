"""Whether a folder holds a VisualGLM: doors ask before they wait for any library.

Not here: what is in its files (`checkpoint_files.py`), and loading them (`serving/loading.py`).
"""

import json
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Raise a `ValueError` unless the folder says that it holds a VisualGLM."""
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
