"""Files of pictures, as tests make them; of PNG also what no program would write."""

import io
import struct
import zlib

from PIL import Image


ORIENTATION = 0x0112  # the field of EXIF
CHANNELS = {0: 1, 2: 3, 6: 4}  # of PNG's kinds of colour: grey, RGB, RGB with alpha


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The file of an image; `options` are those of PIL's writer."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    """What a camera writes that was held in one of eight ways."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, deflated: bytes) -> bytes:
    """A PNG that says it is so large, whatever is in it."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", deflated) + png_chunk(b"IEND", b"")


def png_of_zeros(width: int, height: int, bits: int = 1, colour: int = 0) -> bytes:
    """A black PNG, which is small however large the picture is."""
    packer, row = zlib.compressobj(1), bytes(1 + -(-width * bits * CHANNELS[colour] // 8))
    return png(width, height, bits, colour, b"".join(packer.compress(row) for _ in range(height)) + packer.flush())
