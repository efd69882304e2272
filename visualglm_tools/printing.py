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


def report(error: object) -> None:
    """One line on stderr that says what went wrong; where nobody reads it, that is no error of its own."""
    with contextlib.suppress(BrokenPipeError):
        print("error:", one_line(error), file=sys.stderr)
