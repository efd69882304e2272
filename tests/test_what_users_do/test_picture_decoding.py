"""Strangers' pictures are decoded in other processes: bit by bit the same, and what fails there costs one picture."""

import ast
import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, features

from tests.paths import ROOT
from tests.picture_files import ORIENTATION, encoded
from visualglm_hf.image_processing_visualglm import VisualGLMImageProcessor, open_picture
from visualglm_tools.serving.engine import confinement
from visualglm_tools.serving.engine.picture_pool import USUAL, Decoder, DecoderNotStarted, Lane, PicturePool, PoolClosed


SIZE = (224, 224)
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"]
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]
HAS_SECCOMP = sys.platform == "linux" and os.uname().machine in confinement.ALLOWED


@pytest.fixture(scope="module")
def pool():
    with PicturePool() as pool:
        yield pool


def drawing(mode: str = "RGB", size: tuple[int, int] = (613, 467), seed: int = 0) -> Image.Image:
    """Noise in a mode, its greatest values included."""
    draw = np.random.default_rng(seed)
    if mode in ("I", "F", "I;16"):
        values = draw.integers(0, 65_536, size[::-1]).astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode])
        return Image.fromarray(values)
    noise = Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    return noise.convert("L").convert(mode) if mode == "LA" else noise.convert(mode)


def writable() -> list[tuple[str, str]]:
    """Formats and modes that this PIL writes."""
    pairs = []
    for kind in FORMATS:
        for mode in MODES:
            try:
                encoded(drawing(mode, (9, 8)), kind)
            except (OSError, KeyError, ValueError):
                continue
            pairs.append((kind, mode))
    return pairs


def in_this_process(data: bytes, size=SIZE, resample=Image.Resampling.BICUBIC) -> Image.Image | str:
    try:
        return open_picture(data).resize(size, resample)
    except ValueError as error:
        return str(error)


def apart(pool: PicturePool, data: bytes, size=SIZE, resample=Image.Resampling.BICUBIC) -> Image.Image | str:
    try:
        return pool.decode(data, size, resample)
    except ValueError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------ the same pictures


@pytest.mark.parametrize(("kind", "mode"), writable())
def test_every_format_and_mode_is_decoded_bit_by_bit_as_in_this_process(pool, kind, mode):
    # Two that write nearly every mode do it larger than what is converted at a time.
    data = encoded(drawing(mode, (613, 467) if kind in ("PNG", "TIFF") else (307, 233)), kind)
    assert apart(pool, data) == in_this_process(data)
    assert features.check("avif") or kind != "AVIF"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(613, 467), (90, 4001)])
def test_turned_pictures_are_upright_bit_by_bit(pool, orientation, size):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(drawing(size=size), "PNG", exif=exif)
    assert apart(pool, data) == in_this_process(data)


@pytest.mark.parametrize("size", [(9, 2000), (2000, 9), (3, 1200)])
def test_a_strip_is_resized_alike_in_every_process_and_along_its_rows_first(pool, size):
    """From 12.3 on, PIL itself resizes pictures that are much higher than wide the other way."""
    picture = drawing("RGB", size)
    found = apart(pool, encoded(picture, "PNG"), (224, 224))
    processor = VisualGLMImageProcessor(do_normalize=False, do_rescale=False)
    processed = processor(picture, return_tensors="np")["pixel_values"][0]
    rows_first = picture.resize((224, size[1]), Image.Resampling.BICUBIC).resize((224, 224), Image.Resampling.BICUBIC)
    assert found == rows_first
    assert (np.asarray(processed).transpose(1, 2, 0) == np.asarray(rows_first)).all()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("size", "longest"), [((613, 467), 700), ((613, 467), 613), ((613, 467), 300), ((300, 2000), 500)]
)
def test_a_picture_for_a_zoom_keeps_its_proportions_and_its_pixels_if_they_are_few(pool, size, longest, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(drawing("RGB", size), "PNG", exif=exif)
    upright = open_picture(data)
    scale = min(1, longest / max(size))
    expected = upright if scale == 1 else upright.resize([max(1, round(side * scale)) for side in upright.size])
    found = pool.decode(data, (longest, 0))
    assert (found.size, found.tobytes()) == (expected.size, expected.tobytes())


def test_palettes_animations_and_other_ways_of_resizing_are_the_same_bit_by_bit(pool):
    palette = drawing("P")
    palette.info["transparency"] = bytes(range(256))
    frames = [drawing(seed=seed) for seed in range(3)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for data in (encoded(palette, transparency=bytes(range(256))), animated):
        assert apart(pool, data) == in_this_process(data)
    data = encoded(drawing(size=(700, 500)))
    for resample in Image.Resampling:
        for size in ((224, 224), (700, 30), (31, 500), (900, 900)):
            assert apart(pool, data, size, resample) == in_this_process(data, size, resample)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        encoded(drawing())[:3000],
        encoded(drawing(), "JPEG")[:3000],
        encoded(drawing(), "WEBP")[:3000],
        encoded(Image.new("1", (65_535, 1100))),
        encoded(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), "TIFF"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG", "half a WebP", "too many pixels", "NaN"],
)
def test_a_bad_picture_is_refused_in_the_words_of_this_process(pool, data):
    words = apart(pool, data)
    assert words.startswith("Picture <") and words == in_this_process(data)


def test_an_error_names_the_picture_as_whoever_sent_it_does(pool):
    with pytest.raises(ValueError, match="Picture 'café.png' is not a picture"):
        pool.decode(b"no picture", SIZE, name="'café.png'")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_a_picture_takes_the_memory_of_its_pixels_and_little_more_or_is_refused():
    with PicturePool([replace(USUAL, memory=26 * 2**20)]) as pool:
        for mode, value in (("RGBA", (9, 8, 7, 6)), ("F", 0.5)):  # 15 MiB; decoded and converted whole, 31
            data = encoded(Image.new(mode, (2000, 2000), value), "TIFF", compression="tiff_adobe_deflate")
            assert apart(pool, data) == in_this_process(data)
        data = encoded(Image.new("RGBA", (2800, 2800)))
        with pytest.raises(ValueError, match="takes too much to decode: more than 26 MiB or 1 s. Make it smaller"):
            pool.decode(data, SIZE)
        with pytest.raises(ValueError, match="may be damaged.* Or it takes more than 26 MiB or 1 s"):
            pool.decode(encoded(Image.new("RGB", (2800, 2800)), "WEBP"), SIZE)


def test_what_is_too_much_for_the_usual_decoders_goes_to_one_with_more():
    usual, large = replace(USUAL, pixels=1000), replace(USUAL, pixels=10**6)
    with PicturePool([usual, large]) as pool:
        for size in ((20, 20), (200, 200)):
            data = encoded(drawing(size=size))
            assert apart(pool, data) == in_this_process(data)
        assert [len(workers.decoders) for workers in pool.workers] == [1, 1]
        with pytest.raises(ValueError, match="takes too much"):
            pool.decode(encoded(Image.new("1", (1001, 1000))), SIZE)


def test_pictures_from_many_threads_come_to_those_who_sent_them(pool):
    pictures = [encoded(Image.new("RGB", (40, 30), (shade, 0, 0))) for shade in range(64)]
    with ThreadPoolExecutor(16) as threads:
        decoded = threads.map(lambda data: pool.decode(data, (2, 2)), pictures)
        assert [image.getpixel((0, 0))[0] for image in decoded] == list(range(64))


# ------------------------------------------------------------------------------------------------ hostile pictures

HOSTILE = """
import ctypes, os, time
from visualglm_tools.serving.engine import picture_decoder

open_encoded, answer = picture_decoder.open_encoded, picture_decoder.answer

def spin():
    while True:
        pass

def fail():
    raise KeyError

TRICKS = {
    b"sleep": lambda: time.sleep(1000),
    b"spin": spin,
    b"crash": lambda: ctypes.string_at(0),
    b"exit": lambda: os._exit(3),
    b"fail": fail,
    b"eat": lambda: bytearray(2**30),
}
LIES = {b"short": (b"P", b"short"), b"long": (b"E", bytes(2**20)), b"unknown": (b"?", b"")}

def open_hostile(file, name):
    TRICKS.get(file.getvalue(), int)()
    return open_encoded(file, name)

picture_decoder.open_encoded = open_hostile
picture_decoder.answer = lambda data, *wanted: LIES.get(data) or answer(data, *wanted)
picture_decoder.main()
"""
LANE = Lane(decoders=1, pixels=2**20, memory=2**26, seconds=1, patience=2, pictures=100)


@pytest.fixture(scope="module")
def hostile_pool():
    """Its decoders do what the picture says, as one would whose library has a hole."""
    with PicturePool([LANE], [sys.executable, "-c", HOSTILE]) as pool:
        yield pool


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (b"sleep", "too much to decode: more than 64 MiB or 1 s"),
        (b"spin", "too much to decode: more than 64 MiB or 1 s"),
        pytest.param(b"eat", "too much to decode", marks=pytest.mark.skipif(not HAS_SECCOMP, reason="Linux")),
        (b"crash", "ended with code -"),
        (b"exit", "ended with code 3"),
        (b"fail", "ended with code 1"),
        (b"short", "answered nonsense"),
        (b"long", "answered nonsense"),
        (b"unknown", "answered nonsense"),
    ],
)
def test_a_picture_that_breaks_its_decoder_is_refused_and_the_next_is_read(hostile_pool, picture, found):
    with pytest.raises(ValueError, match=f"Picture <{len(picture)} bytes> .*{found}"):
        hostile_pool.decode(picture, SIZE)
    assert hostile_pool.decode(encoded(drawing()), SIZE) == in_this_process(encoded(drawing()))


def test_while_one_decoder_hangs_the_other_reads():
    lane = replace(LANE, decoders=2, patience=1000)
    with PicturePool([lane], [sys.executable, "-c", HOSTILE]) as pool, ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(pool.decode, b"sleep", SIZE)
        assert [pool.decode(encoded(drawing()), SIZE).size for _ in range(5)] == [SIZE] * 5
        assert not hanging.done()
        pool.close()
        with pytest.raises(PoolClosed):  # it is not the picture's fault
            hanging.result()


def test_who_leaves_while_a_picture_waits_takes_it_out_of_the_queue():
    async def leave_while_waiting(pool):
        hanging = asyncio.create_task(pool.decode_async(b"sleep", SIZE))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pool.decode_async(encoded(drawing()), SIZE), 0.3)
        assert not hanging.done()
        pool.close()
        with pytest.raises(PoolClosed):
            await hanging

    with PicturePool([replace(LANE, patience=1000)], [sys.executable, "-c", HOSTILE]) as pool:
        asyncio.run(leave_while_waiting(pool))


def test_coroutines_decode_side_by_side(pool):
    async def decode_all():
        return await asyncio.gather(*(pool.decode_async(encoded(drawing(seed=seed)), SIZE) for seed in range(9)))

    for seed, image in enumerate(asyncio.run(decode_all())):
        assert image == in_this_process(encoded(drawing(seed=seed)))


def test_a_closed_pool_refuses_and_leaves_no_process():
    pool = PicturePool()
    pool.decode(encoded(drawing()), SIZE)
    [process] = [decoder.process for workers in pool.workers for decoder in workers.decoders]
    pool.close()
    pool.close()
    assert process.returncode is not None  # waited for: no zombie
    with pytest.raises(PoolClosed):
        pool.decode(encoded(drawing()), SIZE)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_no_picture_is_refused_because_a_decoder_was_told_to_end_or_was_killed():
    """Ctrl-C and systemd ask all processes of a server, which completes its requests first; Linux may kill any."""
    with PicturePool([replace(USUAL, decoders=1)]) as pool:
        pool.decode(encoded(drawing()), SIZE)
        [asked] = [decoder.process for decoder in pool.workers[0].decoders]
        asked.send_signal(signal.SIGINT)
        asked.send_signal(signal.SIGTERM)
        pool.decode(encoded(drawing()), SIZE)
        assert asked.poll() is None
        asked.kill()
        os.waitid(os.P_PID, asked.pid, os.WEXITED | os.WNOWAIT)
        assert pool.decode(encoded(drawing()), SIZE) == in_this_process(encoded(drawing()))
        [other] = [decoder.process for decoder in pool.workers[0].decoders]
        assert other.pid != asked.pid


def test_a_decoder_is_replaced_after_many_pictures():
    with PicturePool([replace(USUAL, decoders=1, pictures=2)]) as pool:
        seen = set()
        for _ in range(4):
            pool.decode(encoded(drawing()), SIZE)
            seen |= {decoder.process.pid for decoder in pool.workers[0].decoders}
        assert len(seen) == 2


def test_a_decoder_that_cannot_start_is_said():
    for program in (["/nowhere/python"], [sys.executable, "-c", "raise SystemExit(7)"]):
        with PicturePool([LANE], program) as pool, pytest.raises(DecoderNotStarted, match="start"):
            pool.decode(encoded(drawing()), SIZE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_decoders_of_its_own():
    code = """
        import os, sys
        from visualglm_tools.serving.engine.picture_pool import PicturePool
        from PIL import Image
        import io
        file = io.BytesIO()
        Image.new("RGB", (9, 9)).save(file, "PNG")
        with PicturePool() as pool:
            pool.decode(file.getvalue(), (4, 4))
            if not (child := os.fork()):
                os._exit(pool.decode(file.getvalue(), (4, 4)).width)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
            print(pool.decode(file.getvalue(), (4, 4)).size)
        """
    assert output_of(code) == "(4, 4)"


# ------------------------------------------------------------------------------------------------ the sandbox


def output_of(code: str, **options) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.skipif(not HAS_SECCOMP, reason="needs seccomp")
def test_a_confined_process_opens_no_file_and_no_socket_and_starts_nothing():
    code = """
        import ctypes, mmap, os, signal, socket, threading
        from visualglm_tools.serving.engine.confinement import LIMITS, SECCOMP, confine

        own = os.getpid()
        assert confine(2**26, 100) == [LIMITS, SECCOMP]
        libc = ctypes.CDLL(None)
        tries = {
            "read a file": lambda: open("/etc/hostname"),
            "write a file": lambda: open("/tmp/x", "w"),
            "list": lambda: os.listdir("/"),
            "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
            "unix socket": lambda: socket.socket(socket.AF_UNIX),
            "fork": os.fork,
            "thread": threading.Thread(target=print).start,
            "exec": lambda: os.execv("/bin/true", ["true"]),
            "kill": lambda: os.kill(own, signal.SIGTERM),
            "run code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
            "remove": lambda: os.unlink("/tmp/x"),
            "allocate": lambda: bytearray(2**27),
            "raise limits": lambda: __import__("resource").setrlimit(9, (-1, -1)),
        }
        for name, do in tries.items():
            try:
                do()
            except (OSError, RuntimeError, MemoryError, ValueError, LookupError):
                continue
            print(name)
        bytearray(2**25), mmap.mmap(-1, 4096)
        print("alive")
        """
    assert output_of(code) == "alive"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_decoder_inherits_neither_files_nor_environment(monkeypatch, tmp_path):
    code = """
import os, sys
from visualglm_tools.serving.engine.picture_decoder import READY, send

files = [number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
send(sys.stdout.buffer, READY, repr((sorted(os.environ), sorted(files))).encode())
sys.stdin.buffer.read()
"""
    monkeypatch.setenv("VISUALGLM_API_KEY", "secret")
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)
        decoder = Decoder(USUAL, [sys.executable, "-c", code])
    decoder.end()
    variables, files = ast.literal_eval(decoder.confinement)
    assert "VISUALGLM_API_KEY" not in variables and "PYTHONPATH" in variables and len(variables) < 10
    assert files == ["0", "1", "2"]
