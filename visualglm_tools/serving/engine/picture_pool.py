"""Pictures that strangers send, decoded in other processes: a decoder that hangs, crashes or is taken over costs the
one request that brought the picture.

    with PicturePool() as pool:
        picture = pool.decode(data, (224, 224))     # from any thread; waits

Two processes read the usual pictures; those that take more pixels, memory or time go on to a third, one by one, and
never keep the usual ones waiting for long. The processes are started when they are first needed. What a decoder may do
is `confinement.py`'s, what it does `picture_decoder.py`'s; here, nothing that it answers is believed unseen.
"""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
import PIL
from PIL import Image

import visualglm_hf
import visualglm_tools
from visualglm_hf.picture_reading import MAX_PIXELS
from visualglm_tools.serving.engine.confinement import SECCOMP
from visualglm_tools.serving.engine.picture_decoder import ANSWER, ERROR, PICTURE, READY, REQUEST, SIZE, TOO_MUCH


MIB = 2**20
IMPORTED = (visualglm_tools, visualglm_hf, PIL, numpy)  # by a decoder, from where this process has them
PROGRAM = (sys.executable, "-m", f"{__package__}.picture_decoder")
MOST_TEXT = 2**16 - 1  # bytes of an error or of a name
START_SECONDS = 30  # for a decoder on a busy machine
SIGPROF = getattr(signal, "SIGPROF", 0)  # not on Windows
CLOSED = "The picture decoders have been stopped."
OUT_OF_TIME = "it takes too long"
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """Decoders that take turns with the pictures of one queue.

    Args:
        decoders: how many.
        pixels: of the largest picture.
        memory: bytes that a decoder may allocate for one; four for each pixel, and some for the format.
        seconds: of processor time for one.
        patience: seconds after which a decoder is ended from outside, however busy the machine is.
        pictures: that a decoder reads before a fresh one takes its place.
    """

    decoders: int
    pixels: int
    memory: int
    seconds: int
    patience: float
    pictures: int


USUAL = Lane(decoders=2, pixels=14 * MIB, memory=96 * MIB, seconds=1, patience=10, pictures=200)
# The largest JPEG takes 1 s, the largest float TIFF 3. Who waits behind a picture that means harm waits for no more.
LARGE = Lane(decoders=1, pixels=MAX_PIXELS, memory=288 * MIB, seconds=5, patience=60, pictures=50)
# What glibc's `free` is given goes back to the system, picture by picture; other systems have other names for it.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 * MIB), "MALLOC_TRIM_THRESHOLD_": str(16 * MIB)}


class TooMuchForLane(Exception):
    """The picture takes more than a decoder has; the text is a decoder's reason, or empty for its memory."""


class DecoderDied(Exception):
    """A decoder has ended, or has answered what none would answer."""


class DecoderNotStarted(RuntimeError):
    """The system, not the picture, is why it was not decoded."""


class PoolClosed(RuntimeError):
    """The pool takes no more pictures."""


class Decoder:
    """One decoding process; for one thread at a time.

    Args:
        lane: whose limits it has.
        program: the command that starts it.

    Raises:
        DecoderNotStarted: the process could not be started, or did not become ready.
    """

    def __init__(self, lane: Lane, program: Sequence[str]):
        self.lane = lane
        self.pictures_left = lane.pictures
        self.has_time = True
        limits = (lane.memory, lane.pictures * lane.seconds + START_SECONDS)
        try:
            self.process = subprocess.Popen(
                [*program, *map(str, limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment(),
            )
        except OSError as error:
            raise DecoderNotStarted(f"The picture decoder could not be started: {error}.") from error
        try:
            with self.limited(START_SECONDS):
                self.confinement = self.receive({READY: MOST_TEXT})[1].decode(errors="replace")
        except DecoderDied as error:
            raise DecoderNotStarted(f"The picture decoder did not start: {self.end()}.") from error

    def decode(self, data: bytes, name: str, size: tuple[int, int], resample: int) -> Image.Image:
        """The small picture; `size` is that of `PicturePool.decode`.

        Raises:
            ValueError: what `read_small` raises.
            TooMuchForLane: it takes more pixels, memory or time than this decoder has.
            DecoderDied: no answer, or none that makes sense; then this decoder is of no more use.
        """
        self.pictures_left -= 1
        label = name.encode(errors="replace")[:MOST_TEXT]
        request = REQUEST.pack(*size, resample, self.lane.pixels, self.lane.seconds, len(label), len(data))
        most_bytes = SIZE.size + size[0] * (size[1] or size[0]) * len("RGB")
        with self.limited(self.lane.patience):
            self.send(request + label, data)
            kind, content = self.receive({PICTURE: most_bytes, ERROR: MOST_TEXT, TOO_MUCH: MOST_TEXT})
        if kind == ERROR:
            raise ValueError(content.decode(errors="replace"))
        if kind == TOO_MUCH:
            raise TooMuchForLane(content.decode(errors="replace"))
        if not size[1] and len(content) >= SIZE.size:
            size, content = SIZE.unpack_from(content), content[SIZE.size :]
        if len(content) != size[0] * size[1] * len("RGB"):
            raise DecoderDied
        return Image.frombytes("RGB", size, content)

    def send(self, *parts: bytes) -> None:
        try:
            for part in parts:
                self.process.stdin.write(part)
            self.process.stdin.flush()
        except OSError as error:  # nobody reads any more
            raise DecoderDied from error

    def receive(self, most: dict[bytes, int]) -> tuple[bytes, bytes]:
        """Kind and content of the next answer, of one of these kinds and of so many bytes at most."""
        head = self.process.stdout.read(ANSWER.size)
        kind, length = ANSWER.unpack(head) if len(head) == ANSWER.size else (b"", 0)
        if length > most.get(kind, -1):
            raise DecoderDied
        content = self.process.stdout.read(length)
        if len(content) != length:
            raise DecoderDied
        return kind, content

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Kill the process after so many seconds: whoever waits for its answer then sees its end."""
        timer = threading.Timer(seconds, self.run_out)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
        if not self.has_time:  # in the moment of its answer
            raise DecoderDied

    def run_out(self) -> None:
        self.has_time = False
        self.process.kill()

    def end(self) -> str:
        """End the process; returns what ended it, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closes its pipe a moment before it has ended
            self.process.wait(0.1)
        had_ended = self.process.poll() is not None
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not written yet is lost
                pipe.close()
        if not self.has_time or code == -SIGPROF:
            return OUT_OF_TIME
        return f"its decoder ended with code {code}" if had_ended else "its decoder answered nonsense"


def environment() -> dict[str, str]:
    """What a decoder knows of ours: where its modules and libraries are, and on Windows the system."""
    paths = dict.fromkeys(str(Path(module.__file__).resolve().parents[1]) for module in IMPORTED)
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, **RETURN_MEMORY, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}


class LaneWorkers:
    """The threads of a lane; each has a decoder of its own, started when it is first needed."""

    def __init__(self, lane: Lane, program: Sequence[str]):
        self.lane, self.program = lane, program
        self.threads = ThreadPoolExecutor(lane.decoders, "pictures")
        self.own = threading.local()
        self.decoders: set[Decoder] = set()
        self.is_closed = False

    def submit(self, *picture) -> Future[Image.Image]:
        """The arguments are those of `Decoder.decode`; first come, first served."""
        try:
            return self.threads.submit(self.decode, *picture)
        except RuntimeError as error:  # after `close`
            raise PoolClosed(CLOSED) from error

    def decode(self, data: bytes, name: str, size: tuple[int, int], resample: int) -> Image.Image:
        decoder = self.decoder()
        try:
            return decoder.decode(data, name, size, resample)
        except DecoderDied as error:
            decoder.pictures_left = 0
            reason = decoder.end()
            if reason == OUT_OF_TIME:
                raise TooMuchForLane from error
            raise ValueError(f"Picture {name} cannot be decoded: {reason}. Save it as JPEG or PNG.") from error
        finally:
            if decoder.pictures_left == 0:
                self.drop(decoder)

    def decoder(self) -> Decoder:
        """That of this thread, which may have been killed since its last picture."""
        found = getattr(self.own, "decoder", None)
        if found is not None and found.process.poll() is not None:
            self.drop(found)
        if getattr(self.own, "decoder", None) is None:
            self.own.decoder = Decoder(self.lane, self.program)
            self.decoders.add(self.own.decoder)
            if self.is_closed:  # while it was being started
                self.own.decoder.process.kill()
            report(self.own.decoder.confinement)
        return self.own.decoder

    def drop(self, decoder: Decoder) -> None:
        self.own.decoder = None
        self.decoders.discard(decoder)
        decoder.end()

    def start(self) -> None:
        for _ in range(self.lane.decoders):
            self.threads.submit(self.decoder)

    def close(self) -> None:
        self.is_closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for decoder in tuple(self.decoders):
            decoder.process.kill()
        self.threads.shutdown()
        for decoder in tuple(self.decoders):
            decoder.end()


class PicturePool:
    """See the module's docstring. Of use in a forked process too, where it starts decoders of its own.

    Args:
        lanes: of which each gets what was too much for the one before.
        program: the command that starts a decoder.
    """

    def __init__(self, lanes: Sequence[Lane] = (USUAL, LARGE), program: Sequence[str] = PROGRAM):
        self.lanes, self.program = lanes, program
        self.lock = threading.Lock()
        self.is_closed = False
        self.owner: int | None = None  # the process whose threads the lanes have
        self.workers: list[LaneWorkers] = []

    def __enter__(self) -> "PicturePool":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def decode(
        self,
        data: bytes,
        size: tuple[int, int],
        resample: int = Image.Resampling.BICUBIC,
        name: str | None = None,
    ) -> Image.Image:
        """The picture as upright RGB, resized: bit by bit what the image processor makes of it in this process.

        Args:
            data: the encoded picture.
            size: width and height that are wanted; (side, 0) for the picture in its own shape, of at most so many
                pixels a side, which need not be those of the image processor.
            resample: how to resize, one of `PIL.Image.Resampling`.
            name: of the picture, in errors.

        Raises:
            ValueError: a picture that cannot be read, or that takes more time, pixels or memory than there are.
            PoolClosed: `close` was called.
            DecoderNotStarted: this machine starts no more processes.
        """
        name, reason = name or f"<{len(data)} bytes>", ""
        check_not_empty(data, name)
        for workers in self.open_lanes():
            try:
                return workers.submit(data, name, size, resample).result()
            except TooMuchForLane as error:
                reason = str(error)
            except CancelledError as error:
                raise PoolClosed(CLOSED) from error
        raise self.too_much(name, reason)

    async def decode_async(
        self,
        data: bytes,
        size: tuple[int, int],
        resample: int = Image.Resampling.BICUBIC,
        name: str | None = None,
    ) -> Image.Image:
        """`decode` for coroutines; when its task is cancelled, a picture that waits is not decoded any more."""
        name, reason = name or f"<{len(data)} bytes>", ""
        check_not_empty(data, name)
        for workers in self.open_lanes():
            future = workers.submit(data, name, size, resample)
            try:
                return await asyncio.wrap_future(future)
            except TooMuchForLane as error:
                reason = str(error)
            except asyncio.CancelledError:
                if self.is_closed:
                    raise PoolClosed(CLOSED) from None
                raise
        raise self.too_much(name, reason)

    def too_much(self, name: str, reason: str) -> ValueError:
        last = self.lanes[-1]
        limits = f"{last.memory // MIB} MiB or {last.seconds} s. Make it smaller, or save it as JPEG."
        if reason:
            return ValueError(f"{reason} Or it takes more than {limits}")
        return ValueError(f"Picture {name} takes too much to decode: more than {limits}")

    def start(self) -> None:
        """Start the decoders, beside the caller; where that fails, the first picture says so."""
        for workers in self.open_lanes():
            workers.start()

    def open_lanes(self) -> list[LaneWorkers]:
        with self.lock:
            if self.owner != os.getpid():
                self.owner = os.getpid()
                self.workers = [LaneWorkers(lane, self.program) for lane in self.lanes]
            return self.workers

    def close(self) -> None:
        """End the decoders; pictures that still wait are given up."""
        self.is_closed = True
        for workers in self.open_lanes():
            workers.close()


def check_not_empty(data: bytes, name: str) -> None:
    if not data:
        raise ValueError(f"Picture {name} is empty. Pass the bytes of an encoded picture (PNG, JPEG, ...).")


@functools.cache
def report(confinement: str) -> None:
    """Say once what decoders have given up."""
    if SECCOMP in confinement:
        LOG.info("Pictures are decoded in processes with %s.", confinement)
    else:
        LOG.warning("Pictures are decoded in processes with %s; see docs/serving.md.", confinement or "no limits")
