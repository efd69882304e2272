"""Text that comes from data, as it may be printed: no terminal obeys it, and no line is without end."""

import contextlib
import re
import sys


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


def first_line(error: Exception) -> str:
    """What an error of a library says, without its paragraphs of advice."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])  # a heading says nothing yet


def report(error: object) -> None:
    """One line on stderr that says what went wrong; where nobody reads it, that is no error of its own."""
    with contextlib.suppress(BrokenPipeError):
        print("error:", one_line(error), file=sys.stderr)
