# SPDX-License-Identifier: Apache-2.0
"""Encoded pictures to 8-bit RGB: what is read, how large it may be, and how each mode becomes RGB.

PIL and numpy alone, so that a small process can decode for a large one: `read_small` gives there, in little memory, bit
by bit what `VisualGLMImageProcessor` gives after `to_rgb` and resizing. Not here: where a picture comes from
(`image_processing_visualglm.py`, `fetching.py`).
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image


MAX_PIXELS = 64 * 2**20  # a 64-megapixel phone's picture passes; decoded it takes 256 MiB
MAX_SIDE = 65_535  # pixels, JPEG's limit; to resize a strip of 1 x 64M, PIL 13 takes 2 GB and 9 s
BAND_PIXELS = 2**18  # converted at a time, where the whole would be a second picture in memory
# Raster formats only: for EPS PIL would run Ghostscript, and its readers of rare formats accept nearly any bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")

# What PIL raises on damaged pictures, measured by fuzzing its plugins; IndexError, EOFError and struct.error are the
# ones that PIL itself takes for "not this format".
DECODE_ERRORS = (
    OSError,  # truncated data, libtiff, libwebp, UnidentifiedImageError, PermissionError
    SyntaxError,  # PNG: broken chunk
    ValueError,  # PPM and BMP headers, text chunks beyond PIL's limit, an image closed by its owner
    TypeError,  # TIFF: tag of another type
    RuntimeError,  # AVIF
    IndexError,
    EOFError,
    struct.error,
)
TOO_LARGE_FOR_PIL = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # raised where warnings are errors
EXIF_ERRORS = (SyntaxError, ValueError, TypeError, OSError, IndexError, struct.error)

EXIF_ORIENTATION = 0x0112
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
# Their first row was the last row, or the rightmost column, before.
REVERSING = (
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
)


def open_encoded(file: Any, name: str) -> Image.Image:
    """Open a path or a binary file and look at its header; neither is its size checked nor anything decoded yet.

    Args:
        file: what `PIL.Image.open` takes.
        name: of the picture, in errors.

    Raises:
        ValueError: no picture, or one of another format than `FORMATS`.
    """
    Image.init()  # makes all plugins known; naming an unknown one below would be a KeyError
    try:
        return Image.open(file, formats=[each for each in FORMATS if each in Image.OPEN])
    except TOO_LARGE_FOR_PIL as error:
        raise ValueError(f"Picture {name} is too large: {error} Make it smaller.") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"Picture {name} is not a picture, is damaged, or has a format other than {', '.join(FORMATS)}."
            " Convert it to PNG or JPEG."
        ) from error
    except DECODE_ERRORS as error:
        raise damaged(name, error) from error


def damaged(name: str, error: Exception) -> ValueError:
    reason = str(error) or type(error).__name__
    return ValueError(
        f"Picture {name} cannot be read, it may be damaged or truncated: {reason}. Copy or export it again."
    )


def check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"Picture {name} has no pixels: {width} x {height}. Pass one of at least 1 x 1.")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"Picture {name} is too large: {width} x {height} pixels, at most {MAX_PIXELS:,} in all and {MAX_SIDE:,}"
            " a side are read. Make it smaller; the model sees far fewer."
        )


def load(image: Image.Image, name: str) -> None:
    """Decode a picture that PIL has opened; a `ValueError` if it is too large or its data are damaged."""
    check_size(image.width, image.height, name)
    try:
        image.load()
    except DECODE_ERRORS as error:
        raise damaged(name, error) from error


def read_rgb(image: Image.Image, name: str) -> Image.Image:
    """The whole picture as upright RGB without metadata; see `to_rgb` of the image processor."""
    load(image, name)
    rgb = convert(image, grey_top(image, name))
    if (turn := upright_turn(image)) is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # the copy would keep the EXIF orientation, and a second `to_rgb` would turn it again
    return rgb


def resized(picture: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """`picture.resize(size, resample)`, along its rows first and along its columns then.

    That is what PIL does by itself, except from 12.3 on with pictures that are much higher than wide: a picture shall
    not become another one with another PIL.
    """
    return picture.resize((size[0], picture.height), resample).resize(size, resample)


def read_small(image: Image.Image, name: str, size: tuple[int, int], resample: int) -> Image.Image:
    """`resized(read_rgb(image, name), size, resample)`, bit by bit, in little more than the decoded picture's memory.

    Bands of rows are converted and narrowed one after the other.
    """
    load(image, name)
    turn, top = upright_turn(image), grey_top(image, name)
    width, height = image.size[::-1] if turn in SIDEWAYS else image.size
    narrow = Image.new("RGB", (size[0], height))
    for first, last in bands(width, height):
        band = convert(image.crop(source_box(turn, first, last, image.size)), top)
        band = band if turn is None else band.transpose(turn)
        narrow.paste(band.resize((size[0], last - first), resample), (0, first))
    return resized(narrow, size, resample)


def read_reduced(image: Image.Image, name: str, longest_side: int, resample: int) -> Image.Image:
    """The picture as `read_small` gives it, in its own shape, and with no more pixels a side than that.

    Its pixels are not those of `read_rgb` resized: a JPEG is decoded no larger than it has to be.
    """
    check_size(image.width, image.height, name)
    image.draft(None, (longest_side, longest_side))
    load(image, name)
    width, height = image.size[::-1] if upright_turn(image) in SIDEWAYS else image.size
    scale = min(1.0, longest_side / max(width, height))
    return read_small(image, name, (max(1, round(scale * width)), max(1, round(scale * height))), resample)


def bands(width: int, height: int) -> Iterator[tuple[int, int]]:
    """First and last row, the last excluded, of bands that together are the picture."""
    rows = max(1, BAND_PIXELS // width)
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def source_box(turn: Image.Transpose | None, first: int, last: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part (left, upper, right, lower) of a picture of this `size` that, turned, becomes these rows."""
    length = size[0] if turn in SIDEWAYS else size[1]
    if turn in REVERSING:
        first, last = length - last, length - first
    return (first, 0, last, size[1]) if turn in SIDEWAYS else (0, first, size[0], last)


def upright_turn(image: Image.Image) -> Image.Transpose | None:
    """How a loaded picture must be turned, by its EXIF data: PNG may hold them behind the pixels, TIFF is turned."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except EXIF_ERRORS:  # broken metadata does not spoil a readable picture
        return None
    return TO_UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def convert(image: Image.Image, top: float | None) -> Image.Image:
    """A loaded picture, or a part of one, as RGB; `top` is the `grey_top` of the whole."""
    if top is not None:
        grey = np.rint(np.asarray(image).astype(np.float32).clip(0, top) * (255 / top)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied alpha; PIL knows no direct way
        return image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.copy()  # PIL would warn that alpha is lost, which is what we want
        del image.info["transparency"]
    return image.convert("RGB")


def grey_top(image: Image.Image, name: str) -> float | None:
    """The value of greyscale of more than 8 bits that is white; None for other modes.

    Raises:
        ValueError: values that are not finite.
    """
    tops = grey_tops(image.mode)
    if tops is None:
        return None
    peaks = []
    for first, last in bands(*image.size):
        values = np.asarray(image.crop((0, first, image.width, last))).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"Picture {name} has values that are not finite. Replace NaN and infinity.")
        peaks.append(values.max())
    peak = max(peaks)
    return next((top for top in tops if peak <= top), peak)


def grey_tops(mode: str) -> tuple[int, ...] | None:
    if mode.startswith("I;16"):
        return (65_535,)
    return {"I": (255, 65_535), "F": (1, 255, 65_535)}.get(mode)
