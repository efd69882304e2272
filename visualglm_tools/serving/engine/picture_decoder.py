"""The program that decodes pictures for `picture_pool.py`, in a process of its own that is allowed nothing else.

    python -m visualglm_tools.serving.engine.picture_decoder MEMORY CPU_SECONDS

It first writes `READY` and what it has given up. Then it reads requests from standard input (`REQUEST`, the picture's
name, its bytes) and answers each on standard output with an `ANSWER`, one byte that says what it is and the length of
what follows: the finished small picture, an error, or the reason why another decoder, with more memory, may read it.
"""

import io
import os
import signal
import struct
import sys
from typing import BinaryIO

from PIL import AvifImagePlugin, Image

from visualglm_hf.picture_reading import (
    DECODE_ERRORS,
    FORMATS,
    MAX_PIXELS,
    check_size,
    open_encoded,
    read_reduced,
    read_small,
)
from visualglm_tools.serving.engine.confinement import confine


# Width and height, or the longest side and 0 for a picture that keeps its shape; resample, most pixels, seconds,
# bytes of the name, of the picture.
REQUEST = struct.Struct(">HHBIHHI")
ANSWER = struct.Struct(">cI")
SIZE = struct.Struct(">HH")  # before the pixels of a picture that keeps its shape
READY, PICTURE, ERROR, TOO_MUCH = b"R", b"P", b"E", b"M"

MANY_PIXELS = 2 * 2**20  # no format takes more memory for fewer than a decoder has
PIXELS_PER_BYTE = 512  # at most, for a guess as long as the header is not read

WARM_UP_SECONDS = 10
WARM_UP_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16")


def main() -> None:
    memory, cpu_seconds = map(int, sys.argv[1:])
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print shall not be taken for an answer
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever asked for pictures ends this process, and not before
        signal.signal(number, signal.SIG_IGN)
    warm_up()
    send(answers, READY, "; ".join(confine(memory, cpu_seconds)).encode())
    while head := requests.read(REQUEST.size):
        *wanted, name_length, length = REQUEST.unpack(head)
        name = requests.read(name_length).decode()
        send(answers, *answer(requests.read(length), name, *wanted))


def send(answers: BinaryIO, kind: bytes, content: bytes) -> None:
    answers.write(ANSWER.pack(kind, len(content)) + content)
    answers.flush()


def answer(
    data: bytes, name: str, width: int, height: int, resample: int, most_pixels: int, seconds: int
) -> tuple[bytes, bytes]:
    """Kind and content of the answer to one request; the process is ended after so many seconds of processor time."""
    pixels = PIXELS_PER_BYTE * len(data)
    limit_time(seconds)
    try:
        with open_encoded(io.BytesIO(data), name) as image:
            check_size(image.width, image.height, name)
            pixels = image.width * image.height
            if pixels > most_pixels:
                return TOO_MUCH, b""
            if height:
                return PICTURE, read_small(image, name, (width, height), resample).tobytes()
            whole = read_reduced(image, name, width, resample)
            return PICTURE, SIZE.pack(*whole.size) + whole.tobytes()
    except MemoryError:
        return TOO_MUCH, b""
    except ValueError as error:
        kind = TOO_MUCH if pixels >= MANY_PIXELS and may_lack_memory(error) else ERROR
        return kind, str(error).encode(errors="replace")
    finally:
        limit_time(0)


def may_lack_memory(error: ValueError) -> bool:
    """Whether the data seemed to be damaged: most formats' libraries say that when they get no memory."""
    cause = error.__cause__
    return isinstance(cause, DECODE_ERRORS) and not isinstance(cause, Image.UnidentifiedImageError)


def limit_time(seconds: int) -> None:
    """End this process after so many seconds of processor time, however busy the machine is; 0 lifts the limit."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def warm_up() -> None:
    """Import all that PIL imports when it first needs it: later, no file can be opened."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.init()
    for mode in WARM_UP_MODES:
        for kind in FORMATS:
            decode_one(kind, mode)


def decode_one(kind: str, mode: str) -> None:
    file = io.BytesIO()
    try:
        Image.new(mode, (8, 8)).save(file, kind)
    except (OSError, KeyError, ValueError):  # PIL writes no such mode in this format, or lacks the format
        return
    answer(file.getvalue(), "<warm-up>", 4, 4, Image.Resampling.BICUBIC, MAX_PIXELS, WARM_UP_SECONDS)


if __name__ == "__main__":
    main()
