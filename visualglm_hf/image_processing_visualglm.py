# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Pictures: whatever a caller holds (file, bytes, base64, PIL image, array) to `pixel_values` [B, 3, 224, 224].

`open_picture` reads one picture as 8-bit RGB and refuses a bad one with a `ValueError` that names it;
`VisualGLMImageProcessor` resizes, rescales and normalizes. PIL and numpy only; nothing is fetched from the network,
and PIL's global settings stay as they are.

Source: `BlipImageEvalProcessor` in the original `visual.py`; its torchvision transforms (`Resize` on a PIL image,
`ToTensor`, `Normalize`) are reproduced bit for bit.
"""

import base64
import binascii
import io
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.processing_utils import Unpack
from transformers.utils import auto_docstring

from .code_links import replace_links
from .picture_reading import check_size, load, open_encoded, read_rgb, resized


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0..1; OpenAI CLIP, as in the original visual.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
MAX_ESCAPES = 100_000  # %XX of a data: URI; to decode one takes some 200 bytes
LONGEST_NAME = 200  # characters of a path shown in an error
# How the encoded pictures of FORMATS begin; text is taken for base64 only if such bytes come out of it.
ENCODED_PICTURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|RIFF|GIF8|BM|II[*+]\0|MM\0[*+]|P[1-6]\s|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp", re.DOTALL
)
URL_SAFE = str.maketrans("-_", "+/")  # the other alphabet of base64


def open_picture(source: Any) -> Image.Image:
    """Read one picture from wherever it is.

    Args:
        source: a PIL image; encoded bytes; the path of a file (str or PathLike); an open binary file, which is read
            from its beginning and left where it was; a `data:` URI or base64 text, of either alphabet, with or without
            padding; `{"bytes": ..., "path": ...}` as in datasets, of which either may be missing; a numpy array or CPU
            tensor [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8 or of floats in 0..1. Channels may come first
            where that is unambiguous. Of an animated file the first frame counts.

    Returns:
        A loaded PIL image of mode RGB, upright (see `to_rgb`).

    Raises:
        ValueError: a URL (fetch it first), or a picture that is missing, empty, damaged, truncated, of no supported
            format, or larger than `MAX_PIXELS` or `MAX_SIDE`; the size is read from the header, before decoding.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source), f"<{len(source)} bytes>")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open_bytes(data_uri_bytes(source), name_of_uri(source))
    if isinstance(source, str) and URL.match(source):
        raise ValueError(
            f"Picture {_name(source)} is a URL, and nothing is fetched here. Fetch it first and pass its bytes."
        )
    if isinstance(source, (str, os.PathLike)):
        data = picture_in_base64(source)
        return _open_file(source) if data is None else _open_bytes(data, f"<base64 text of {len(source)} characters>")
    if hasattr(source, "__array__"):
        return to_rgb(_from_array(source))
    if isinstance(source, Mapping) and not {"bytes", "path"}.isdisjoint(source):
        data = source.get("bytes")
        return open_picture(source.get("path") if data is None else data)
    if hasattr(source, "read"):
        return _open_bytes(_read(source), f"<{type(source).__name__}>")
    raise ValueError(
        "A picture must be a PIL image, bytes, a file or its path, a data: URI, base64 text, an array or a dict with "
        f'"bytes" or "path", found {type(source).__name__}.'
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of `image` as 8-bit RGB, upright and without metadata.

    Alpha is dropped and palettes are resolved by PIL's `convert("RGB")`, as the original did. Two things differ from
    the original on purpose: the EXIF orientation is applied (it showed the model sideways phone pictures), and
    greyscale of more than 8 bits is scaled (it was clipped to white): modes `I;16*` from 0..65535, modes `I` and `F`
    from the narrowest of 0..1 (`F` only), 0..255, 0..65535 and 0..maximum that holds the values; negative ones are 0.

    Raises:
        ValueError: no pixels, more than `MAX_PIXELS`, a side over `MAX_SIDE`, undecodable data, values that are not
            finite.
    """
    return read_rgb(image, _name_of(image))


def _name_of(image: Image.Image) -> str:
    path = getattr(image, "filename", "")  # only images opened from a file have it
    return _name(path) if path else f"<{image.mode} image of {image.width} x {image.height}>"


def _name(path: Any) -> str:
    text = str(path)
    if len(text) <= LONGEST_NAME:
        return repr(text)
    return f"{text[:40]!r}... ({len(text)} characters; base64 of no picture, with or without 'data:image/png;base64,')"


def _open_file(path: Any) -> Image.Image:
    name = _name(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error  # without the path, which may be a megabyte of base64
        raise ValueError(f"Picture {name} cannot be read: {reason}. Check the path.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise ValueError(f"Picture {name} is {kind}. Pass the path of a picture file.")
    if status.st_size == 0:
        raise ValueError(f"Picture {name} is an empty file. Copy or download it again.")
    return _decode(path, name)


def _read(file: Any) -> bytes:
    name = f"<{type(file).__name__}>"
    can_seek = file.seekable if hasattr(file, "seekable") else lambda: hasattr(file, "seek")  # mmap has no seekable
    try:
        data = _read_from_beginning(file) if can_seek() else file.read()
    except (OSError, ValueError, AttributeError) as error:  # closed, write-only, or text that is no UTF-8
        raise ValueError(f"Picture {name} cannot be read: {error}. Open the file in binary mode, 'rb'.") from error
    if not isinstance(data, bytes):
        raise ValueError(f"Picture {name} gives {type(data).__name__}, not bytes. Open the file in binary mode, 'rb'.")
    return data


def _read_from_beginning(file: Any) -> bytes:
    """All of an open file, which is left at the place where it was."""
    position = file.tell()
    file.seek(0)
    try:
        return file.read()
    finally:
        file.seek(position)


def picture_in_base64(text: Any) -> bytes | None:
    """The encoded picture in a text, or None if it is something else, such as the path of a file."""
    if not isinstance(text, str) or os.path.exists(text):
        return None
    try:
        data = _decode_base64(text)
    except ValueError:
        return None
    return data if ENCODED_PICTURE.match(data) else None


def _decode_base64(text: str) -> bytes:
    """The bytes in base64 text of either alphabet; a `ValueError` if it is none, or was cut and holds no picture."""
    text = "".join(text.split()).translate(URL_SAFE)
    missing = -len(text) % 4
    data = base64.b64decode(text + "=" * missing, validate=True)
    if missing and not ENCODED_PICTURE.match(data):
        raise binascii.Error("Incorrect padding")
    return data


def _open_bytes(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"Picture {name} is empty. Pass the bytes of an encoded picture (PNG, JPEG, ...).")
    return _decode(io.BytesIO(data), name)


def _decode(file: Any, name: str) -> Image.Image:
    with open_encoded(file, name) as image:
        return read_rgb(image, name)


def name_of_uri(uri: str) -> str:
    """What an error calls a `data:` URI, which may have megabytes."""
    return f"<data URI of {len(uri)} characters>"


def data_uri_bytes(uri: str) -> bytes:
    """What a `data:` URI holds; a `ValueError` if it is none, or one that takes much more memory than it holds."""
    head, comma, payload = uri.partition(",")
    name = name_of_uri(uri)
    if not comma:
        raise ValueError(f"Picture {name} has no comma. Expected data:image/png;base64,<base64 text>.")
    if payload.count("%") > MAX_ESCAPES:
        raise ValueError(f"Picture {name} has more than {MAX_ESCAPES:,} percent signs. Encode it as base64.")
    is_base64 = head.lower().rstrip().endswith(";base64")
    try:
        data = unquote_to_bytes(payload)
        return _decode_base64(data.decode("latin-1")) if is_base64 else data
    except ValueError as error:  # binascii.Error is one; so is what characters outside ASCII and half ones raise
        kind = "base64" if is_base64 else "text"
        raise ValueError(f"Picture {name} is broken {kind}: {error}. Encode the picture again.") from error


def _from_array(source: Any) -> Image.Image:
    try:
        array = np.asarray(source)
    except (TypeError, RuntimeError, ValueError) as error:  # a tensor on a GPU, with a gradient, of bfloat16
        raise ValueError(f"{type(source).__name__} cannot be read as an array: {error}.") from error
    name = f"<array {list(array.shape)} of {array.dtype}>"
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)  # [C, H, W], the way of torch
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"Picture {name} has a wrong shape, expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].")
    check_size(array.shape[1], array.shape[0], name)
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array, name)))


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"Picture {name} has a wrong type, expected uint8 in 0..255 or floats in 0..1. Convert it.")
    if not np.isfinite(array).all():
        raise ValueError(f"Picture {name} has values that are not finite. Replace NaN and infinity.")
    low, high = array.min(), array.max()
    if low < 0 or high > 1:
        remedy = "Divide by 255, or pass uint8" if low >= 0 else "Pass the picture itself: pixel_values are generate's"
        raise ValueError(f"Picture {name} has floats from {low:g} to {high:g}, expected 0..1. {remedy}.")
    return np.rint(array * 255.0).astype(np.uint8)


class VisualGLMImageProcessorKwargs:
    """What `VisualGLMImageProcessor` takes for one call; None means the processor's own value.

    A plain class where transformers has a `TypedDict`: that one holds frozensets, whose order differs from process to
    process, and with it the fingerprint that datasets computes of a processor whose code came with the checkpoint.
    """

    do_convert_rgb: bool | None
    do_resize: bool | None
    size: dict[str, int] | int | list[int] | tuple[int, ...] | None
    resample: int | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: float | list[float] | tuple[float, ...] | None
    image_std: float | list[float] | tuple[float, ...] | None
    return_tensors: str | None


PARAMETERS = tuple(name for name in VisualGLMImageProcessorKwargs.__annotations__ if name != "return_tensors")


@auto_docstring(
    custom_intro="""
    Pictures to `pixel_values` float32 [B, 3, height, width]: RGB, bicubic resize, rescale, normalize. Every parameter
    is saved to preprocessor_config.json and can be given for one call. Bit-identical to the original's
    `BlipImageEvalProcessor`.
    """
)
class VisualGLMImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]
    valid_kwargs = VisualGLMImageProcessorKwargs

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: dict[str, int] | int | Sequence[int] = 224,
        resample: int = Image.Resampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = CLIP_MEAN,
        image_std: float | Sequence[float] = CLIP_STD,
        **kwargs,
    ):
        r"""
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            False takes PIL images as they are, without `to_rgb`; they must be RGB then.
        size (`dict[str, int]`, *optional*, defaults to 224 x 224):
            The pixels {"height", "width"} to which pictures are stretched; a number means a square. The model takes
            224 x 224, and with `interpolate_pos_encoding=True` any multiples of its patches of 14.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply the values 0..255 by `rescale_factor`. Pictures given as floats in 0..1 have been made
            0..255 before.
        image_mean (`float` or `list[float]`, *optional*, defaults to CLIP's):
            What to subtract: one number for each of R, G, B, or one for all.
        image_std (`float` or `list[float]`, *optional*, defaults to CLIP's):
            What to divide by, as `image_mean`.
        """
        super().__init__(**kwargs)
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = _height_and_width(size)
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel(image_mean, "image_mean")
        self.image_std = _per_channel(image_std, "image_std")

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> list[str]:
        """Save it as [`BaseImageProcessor.save_pretrained`] does, with the code that loads it."""
        replace_links(save_directory)
        self.register_for_auto_class()
        return super().save_pretrained(save_directory, *args, **kwargs)

    @auto_docstring(
        custom_intro="""
        Prepare pictures for the model: `pixel_values` float32 [B, 3, height, width]. Raises a `ValueError` for no
        picture, for a bad one (see `open_picture`), and for a parameter that is unknown or makes no sense.
        """
    )
    def preprocess(
        self, images: Any, return_tensors: str | None = None, **kwargs: Unpack[VisualGLMImageProcessorKwargs]
    ) -> BatchFeature:
        r"""
        images (`Any`):
            Whatever `open_picture` takes, or a list of it; nested lists are flattened in order. An array [B, H, W, C]
            counts as B pictures.
        return_tensors (`str`, *optional*):
            "np" for one array, "pt" for one tensor; None for a list of B arrays [3, height, width].

        Returns:
            `pixel_values`, float32 [B, 3, height, width].
        """
        settings = self._settings(kwargs)
        arrays = [_pixel_values(source, settings) for source in _flatten(images)]
        if not arrays:
            raise ValueError("`images` holds no picture. Pass at least one.")
        if return_tensors is not None:
            arrays = _stack(arrays)
        return BatchFeature({"pixel_values": arrays}, tensor_type=return_tensors)

    def _settings(self, given: dict[str, Any]) -> SimpleNamespace:
        unknown = [name for name, value in given.items() if name not in PARAMETERS and value is not None]
        if unknown:
            raise ValueError(f"Unknown parameters {', '.join(unknown)}. Known are {', '.join(PARAMETERS)}.")
        settings = {name: getattr(self, name) if given.get(name) is None else given[name] for name in PARAMETERS}
        settings["size"] = _height_and_width(settings["size"])
        settings["resample"] = Image.Resampling(settings["resample"])
        settings["image_mean"] = _per_channel(settings["image_mean"], "image_mean")
        settings["image_std"] = _per_channel(settings["image_std"], "image_std")
        return SimpleNamespace(**settings)


def _height_and_width(size: Any) -> dict[str, int]:
    size = get_size_dict(size)
    height, width = size.get("height"), size.get("width")
    if not height or not width or height < 1 or width < 1:
        raise ValueError(f'`size` must be {{"height": pixels, "width": pixels}} or a number of pixels, found {size}.')
    return {"height": int(height), "width": int(width)}


def _per_channel(value: Any, name: str) -> list[float]:
    values = [float(each) for each in np.atleast_1d(np.asarray(value, dtype=np.float64))]
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not np.isfinite(values).all() or (name == "image_std" and min(values) <= 0):
        raise ValueError(f"`{name}` must be one number or three (R, G, B), a deviation above 0, found {value}.")
    return values


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", None) == 4:
        for each in images:
            yield from _flatten(each)
    else:
        yield images


def _pixel_values(source: Any, settings: SimpleNamespace) -> np.ndarray:
    """One picture as float32 [3, height, width]."""
    picture = open_picture(source) if settings.do_convert_rgb else _as_it_is(source)
    if settings.do_resize:
        picture = resized(picture, (settings.size["width"], settings.size["height"]), settings.resample)
    values = np.asarray(picture).transpose(2, 0, 1)  # [H, W, 3] -> [3, H, W], uint8
    if settings.do_rescale:
        # In float64: rounded once, x * (1 / 255) is the x / 255 of the original; in float32 half of them differ.
        values = values.astype(np.float64) * settings.rescale_factor
    values = np.ascontiguousarray(values, dtype=np.float32)
    if settings.do_normalize:
        mean, std = (np.float32(each)[:, None, None] for each in (settings.image_mean, settings.image_std))
        values = (values - mean) / std
    return values


def _as_it_is(source: Any) -> Image.Image:
    if not isinstance(source, Image.Image):
        return open_picture(source)
    if source.mode != "RGB":
        raise ValueError(f"Picture {_name_of(source)} is not RGB. Leave `do_convert_rgb` on, or convert it yourself.")
    load(source, _name_of(source))
    return source


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays [3, height, width] as one [B, 3, height, width]."""
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"Pictures of sizes {shapes} make no tensor. Leave `do_resize` on, or pass one at a time.")
    return np.stack(arrays)
