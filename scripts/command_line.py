"""What several doors have in common: options, and how they say something about data without obeying it."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path


DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "models" / "visualglm-tiny"
# An escape sequence in an answer or in a file must not move the cursor or rename the window; halves of characters
# cannot be written at all.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
LONGEST_LINE = 1000  # characters that are printed of it


def printable(text: str) -> str:
    """`text` without control characters, but for tabs and line ends."""
    return UNPRINTABLE.sub("", text)


def shortened(text: str, longest: int = LONGEST_LINE) -> str:
    """`text`; of a longer one than so many characters the middle is left out."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def one_line(text: object) -> str:
    """`text` as a printable line of bounded length."""
    return shortened(printable(" ".join(str(text).split())))


def report(error: object) -> None:
    """One line on stderr that says what went wrong; where nobody reads it, that is no error of its own."""
    with contextlib.suppress(BrokenPipeError):
        print("error:", one_line(error), file=sys.stderr)


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
