"""Strangers' pictures are decoded in other processes: bit by bit the same, and what fails there costs one picture."""

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image, features
from serving import confinement
from serving.picture_pool import PicturePool

from visualglm_hf.image_processing_visualglm import open_picture


SIZE = (224, 224)
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"]
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]
ORIENTATION = 0x0112
HAS_SECCOMP = sys.platform == "linux" and os.uname().machine in confinement.ALLOWED


@pytest.fixture(scope="module")
def pool():
    with PicturePool() as pool:
        yield pool


def drawing(mode: str = "RGB", size: tuple[int, int] = (301, 203), seed: int = 0) -> Image.Image:
    """Noise in a mode, its greatest values included."""
    draw = np.random.default_rng(seed)
    if mode in ("I", "F", "I;16"):
        values = draw.integers(0, 65_536, size[::-1]).astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode])
        return Image.fromarray(values)
    noise = Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    return noise.convert("L").convert(mode) if mode == "LA" else noise.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    data = encoded(drawing(mode), kind)
    assert apart(pool, data) == in_this_process(data)
    assert features.check("avif") or kind != "AVIF"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(301, 203), (50, 4001)])
def test_turned_pictures_are_upright_bit_by_bit(pool, orientation, size, monkeypatch):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(drawing(size=size), "PNG", exif=exif)
    assert apart(pool, data) == in_this_process(data)
