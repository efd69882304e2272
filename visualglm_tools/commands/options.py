"""Options that several doors have."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualglm_tools.options import argument, option


DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "models" / "visualglm-tiny"


def number(kind: type, is_valid: Callable, expected: str) -> Callable:
    """An argparse type: a `kind` that `is_valid`; the error names the value and what was `expected`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, found {text!r}")
        return value

    return parse


COUNT = number(int, lambda value: value >= 1, "a whole number, 1 or more")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What the doors that answer questions load."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=DEFAULT_MODEL, type=Path, metavar="FOLDER", help="checkpoint folder")
    model.add_argument("--adapter", type=Path, metavar="FOLDER", help="what finetune_visualglm.py has trained on it")
    model.add_argument("--quant", type=int, choices=(8, 4), help="quantize the language model to 8 or 4 bits")
    model.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="number format; auto: float16, on a CPU float32 if it fits, else bfloat16",
    )


def loading_options(arguments: argparse.Namespace) -> dict:
    """The keywords of `load_model`, as `add_model_options` has read them."""
    return {name: getattr(arguments, name) for name in ("device", "dtype", "quant", "adapter")}


READY = "{} is ready: load it with trust_remote_code=True, check it with visualglm check."


def target_argument() -> Any:
    """The folder that a command writes."""
    return argument("folder to write; must not exist, or be empty", metavar="DST")


def tokenizer_option(source: str = "SRC") -> Any:
    """Where the vocabulary is, if not beside the weights."""
    return option(f"where ice_text.model is, if it is not in {source}", None, metavar="FOLDER_OR_FILE")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the commands that answer questions load."""

    model: Path = option(
        "checkpoint folder", DEFAULT_MODEL, metavar="FOLDER", names=("from_pretrained",), group="model"
    )
    adapter: Path | None = option("what visualglm finetune has trained on it", None, metavar="FOLDER", group="model")
    quant: int | None = option("quantize the language model to 8 or 4 bits", None, choices=(8, 4), group="model")
    device: str = option("auto, cuda, cuda:1, mps or cpu", "auto", group="model")
    dtype: str = option(
        "number format; auto: float16, on a CPU float32 if it fits, else bfloat16",
        "auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        group="model",
    )

    def loading(self) -> dict[str, Any]:
        """The keywords of `load_model`."""
        return {name: getattr(self, name) for name in ("device", "dtype", "quant", "adapter")}
