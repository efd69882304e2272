"""Pictures against the original's pixel values; what else may come as a picture, and how bad ones are refused."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFile, features
from transformers import AutoImageProcessor, dynamic_module_utils

from tests.picture_files import ORIENTATION, encoded, oriented, png_of_zeros
from visualglm_hf import image_processing_visualglm, picture_reading
from visualglm_hf.image_processing_visualglm import (
    CLIP_MEAN,
    CLIP_STD,
    VisualGLMImageProcessor,
    open_picture,
    to_rgb,
)
from visualglm_hf.picture_reading import MAX_PIXELS, MAX_SIDE


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]
SOURCES = [Path(image_processing_visualglm.__file__), Path(picture_reading.__file__)]


@pytest.fixture(scope="module")
def processor():
    return VisualGLMImageProcessor()


def noise(height=40, width=50, channels=3, seed=0) -> np.ndarray:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(**size) -> Image.Image:
    return Image.fromarray(noise(**size))


def same(image, other) -> bool:
    return image.mode == other.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(other))


# ---------------------------------------------------------------------------------------------- the original's numbers


@pytest.mark.parametrize("index", range(5))
def test_resized_pixels_equal_the_originals_with_the_same_pillow(golden, arrays, golden_dir, processor, index):
    """Pillow 13 wrote the golden data; before, it rounded some pixels of one picture to a neighbouring level."""
    entry = golden["images"][index]
    resized = processor(golden_dir / entry["file"], do_rescale=False, do_normalize=False, return_tensors="np")
    off = np.abs(resized["pixel_values"][0].transpose(1, 2, 0) - arrays[entry["resized_u8"]])
    assert off.max() <= (index == 2 and int(PIL.__version__.split(".")[0]) < 13)
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("index", range(5))
def test_pixel_values_equal_the_original_bit_for_bit(golden, arrays, processor, index):
    entry = golden["images"][index]
    found = processor(arrays[entry["resized_u8"]], return_tensors="np")["pixel_values"]
    if "pixel_values" in entry:
        expected = arrays[entry["pixel_values"]]
    else:  # the original's arithmetic in torch, from its own resized bytes
        values = torch.from_numpy(arrays[entry["resized_u8"]]).permute(2, 0, 1).float().div(255)[None]
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
        expected = values.sub(mean).div(std).numpy()
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (1, 3, 224, 224)
    assert np.array_equal(found, expected)


def test_opened_pictures_have_the_mode_and_size_of_the_golden_record(golden, golden_dir):
    for entry in golden["images"]:
        image = open_picture(golden_dir / entry["file"])
        assert image.mode == "RGB"
        assert list(image.size) == entry["size"]
        with Image.open(golden_dir / entry["file"]) as original:
            assert same(image, original.convert("RGB"))


def test_a_batch_equals_its_pictures_one_by_one(golden, golden_dir, processor):
    paths = [golden_dir / entry["file"] for entry in golden["images"]]
    batch = processor(paths, return_tensors="np")["pixel_values"]
    for path, values in zip(paths, batch, strict=True):
        assert np.array_equal(processor(path, return_tensors="np")["pixel_values"][0], values)


# ------------------------------------------------------------------------------------------------- kinds of input


def test_the_same_picture_from_every_source_is_the_same(tmp_path):
    image = picture()
    data = encoded(image, "PNG")
    path = tmp_path / "图 片.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    pixels = noise()
    sources = {
        "PIL": image,
        "lazy PIL": Image.open(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "path": path,
        "str": str(path),
        "data URI": f"data:image/png;base64,{text}",
        "data URI in lines": "DATA:image/png;charset=x;BASE64," + "\n".join(re.findall(".{1,60}", text)),
        "data URI, escaped": "data:;base64," + text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        "data URI without base64": "data:image/png," + "".join(f"%{byte:02X}" for byte in data),
        "uint8": pixels,
        "read-only strided": np.broadcast_to(pixels[::-1], pixels.shape)[::-1],
        "RGBA array": np.dstack([pixels, pixels[..., :1]]),
        "float32": (pixels / 255).astype(np.float32),
        "float16": (pixels / 255).astype(np.float16),
        "float64": pixels / 255,
        "channels first": pixels.transpose(2, 0, 1),
        "torch": torch.from_numpy(pixels),
        "torch float, channels first": torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
    }
    for name, source in sources.items():
        assert same(open_picture(source), image), name
    sources["lazy PIL"].close()


def test_grey_arrays_become_grey_rgb():
    grey = noise(channels=0)
    expected = Image.fromarray(grey).convert("RGB")
    for array in (grey, grey[..., None], grey[None], grey / 255):
        assert same(open_picture(array), expected)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "JPEG"])
def test_supported_formats_open(file_format):
    image = picture().quantize(16).convert("RGB")
    options = {"lossless": True} if file_format == "WEBP" else {}
    opened = open_picture(encoded(image, file_format, **options))
    assert opened.size == image.size
    assert file_format == "JPEG" or same(opened, image)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_every_pil_mode_becomes_rgb_without_a_warning(mode, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = to_rgb(Image.new(mode, size))
    assert image.mode == "RGB"
    assert image.size == size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "CMYK", "YCbCr", "1"])
def test_alpha_is_dropped_and_colours_converted_as_the_original_did(mode):
    source = "L" if mode in ("LA", "1") else "P" if mode == "PA" else "RGB"
    image = picture().convert(source).convert(mode)
    if mode in ("RGBA", "LA", "PA"):
        image.putalpha(7)
    assert same(to_rgb(image), image.convert("RGB"))


def test_a_palette_with_a_transparency_table_opens_without_a_warning():
    image = picture().quantize(8)
    data = encoded(image, "PNG", transparency=bytes(range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_picture(data)
        given = Image.open(io.BytesIO(data))
        assert same(to_rgb(given), opened)
        assert same(opened, image.convert("RGB"))
    assert given.info["transparency"] == bytes(range(8))  # the caller's image is untouched


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(mode, dtype):
    values = np.linspace(0, 65_535, 256).reshape(16, 16).astype(dtype)
    image = Image.frombytes(mode, (16, 16), values.tobytes())
    assert np.array_equal(np.asarray(to_rgb(image))[..., 1].ravel(), np.arange(256))
    for file_format in ("PNG", "TIFF") if mode != "I" else ("TIFF",):
        assert same(open_picture(encoded(image, file_format)), to_rgb(image))


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", [0, 7, 255], [0, 7, 255]),  # 8 bits in a wide mode
        ("I", [-5, 257, 65_535], [0, 1, 255]),
        ("I", [0, 2**24, 2**25], [0, 128, 255]),
        ("I", [-9, -8, -7], [0, 0, 0]),
        ("F", [0, 0.2, 1], [0, 51, 255]),
        ("F", [0, 7, 255], [0, 7, 255]),
        ("F", [0, 257, 65_535], [0, 1, 255]),
        ("F", [-1, 5e8, 1e9], [0, 128, 255]),
        ("F", [0, 0, 0], [0, 0, 0]),
    ],
)
def test_wide_grey_modes_are_scaled_by_the_narrowest_range_that_holds_them(mode, values, expected):
    array = np.array([values], dtype=np.int32 if mode == "I" else np.float32)
    image = Image.frombytes(mode, (3, 1), array.tobytes())
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animated_file_the_first_frame_counts(file_format):
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(first, file_format, save_all=True, append_images=[second], **options)
    assert same(open_picture(data), first)


def test_to_rgb_leaves_the_callers_image_alone():
    image = picture()
    image.info["exif"] = oriented(6).tobytes()
    upright = to_rgb(image)
    upright.putpixel((0, 0), (1, 2, 3))
    assert image.info["exif"]
    assert np.array_equal(np.asarray(image), noise())


# ------------------------------------------------------------------------------------------------- EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_phone_pictures_are_upright(orientation, file_format):
    image = picture(height=3, width=5)
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the orientation that undoes each
    turned = image
    if orientation > 1:
        turned = image.transpose(picture_reading.TO_UPRIGHT[back[orientation]])
    options = {"exif": oriented(orientation)}
    if file_format == "TIFF":
        options = {"tiffinfo": {ORIENTATION: orientation}}
    if file_format == "WEBP":
        options["lossless"] = True
    assert same(open_picture(encoded(turned, file_format, **options)), image)


def test_a_turned_picture_is_turned_once():
    data = encoded(picture(height=3, width=5), "PNG", exif=oriented(6))
    once = open_picture(data)
    assert once.size == (3, 5)
    assert same(to_rgb(once), once)
    with Image.open(io.BytesIO(data)) as lazy:
        assert same(to_rgb(lazy.convert("RGB")), once)  # PIL's convert keeps the EXIF data


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_unknown_orientations_are_ignored(orientation):
    assert open_picture(encoded(picture(), "PNG", exif=oriented(orientation))).size == (50, 40)


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_does_not_spoil_a_readable_picture():
    whole = oriented(6).tobytes()
    draw = np.random.default_rng(0)
    image = picture(height=2, width=2)
    for _ in range(3000):
        exif = bytearray(whole[: draw.integers(1, len(whole) + 1)])
        exif[draw.integers(len(exif))] = draw.integers(256)
        image.info["exif"] = bytes(exif)
        assert to_rgb(image.copy()).mode == "RGB"  # a copy, because PIL reads the EXIF data of an image once


# ------------------------------------------------------------------------------------------------- bad pictures


def refuse(source, *expected):
    """The message with which `source` is refused; it holds every one of `expected`."""
    with pytest.raises(ValueError, match="[Pp]icture|array") as caught:
        open_picture(source)
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert len(message) < 700
    assert "\n" not in message
    with pytest.raises(ValueError, match=re.escape(message)):
        VisualGLMImageProcessor()(source)
    return message


def test_a_missing_path_is_refused_by_name(tmp_path):
    refuse(tmp_path / "no.png", "no.png", "No such file", "Check the path")
    refuse("", "''", "Check the path")
    refuse("a\0b.png", "Check the path")


def test_a_directory_is_refused_by_name(tmp_path):
    refuse(tmp_path, str(tmp_path), "is a directory")
    refuse(os.devnull, os.devnull, "no regular file")


def test_zero_bytes_are_refused(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    refuse(tmp_path / "empty.png", "empty.png", "empty file")
    refuse(b"", "<0 bytes>")
    refuse("data:image/png;base64,", "empty")


def test_what_is_not_a_picture_is_refused(tmp_path):
    (tmp_path / "cat.jpg").write_text("<html>404</html>")
    refuse(tmp_path / "cat.jpg", "cat.jpg", "Convert it to PNG or JPEG")
    refuse(b"hello", "<5 bytes>", "not a picture")
    refuse("data:text/plain,hello", "<data URI of 21 characters>", "not a picture")


def test_formats_that_run_programs_or_accept_anything_are_refused():
    refuse(encoded(picture(), "EPS"), "JPEG")
    refuse(encoded(picture(), "TGA"), "JPEG")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    for name, file_format in (("half.png", "PNG"), ("half.jpg", "JPEG")):
        data = encoded(picture(height=200, width=200), file_format)
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        refuse(tmp_path / name, name, "truncated", "Copy")
        refuse(data[: len(data) // 2], f"<{len(data) // 2} bytes>", "truncated")
        with Image.open(tmp_path / name) as lazy, pytest.raises(ValueError, match=name):
            to_rgb(lazy)


def test_broken_data_uris_are_refused():
    refuse("data:image/png;base64,####", "broken base64", "again")
    refuse("data:image/png;base64,abc", "broken base64")
    refuse("data:image/png;base64,é", "broken base64")
    refuse("data:image/png", "no comma", "Expected data:image/png;base64,")


def test_bare_base64_is_refused_with_the_remedy_and_without_its_megabyte():
    text = base64.b64encode(bytes(10**6)).decode()
    message = refuse(text, "data:image/png;base64,", f"{len(text)} characters")
    assert text[:100] not in message


@pytest.mark.parametrize(
    "url", ["http://a.example/cat.png", "HTTPS://a.example/cat.png", "file:///etc/passwd", "s3://a/b"]
)
def test_a_url_is_refused_and_never_fetched(url):
    refuse(url, url, "Fetch it first")


@pytest.mark.parametrize("source", [None, 3, 3.5, {"a": 1}, {1}, object()])
def test_other_types_are_refused(source):
    refuse(source, "A picture must be", type(source).__name__)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 5, 3), (0, 0, 4)])
def test_arrays_without_pixels_are_refused(shape):
    refuse(np.zeros(shape, np.uint8), "no pixels", str(list(shape)))


@pytest.mark.parametrize("shape", [(), (3,), (5, 5, 2), (5, 5, 5), (2, 5, 5), (1, 1, 5, 5, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
    refuse(np.zeros(shape, np.uint8), "wrong shape", "[H, W, 3]")


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, bool, np.complex64, object, "U1"])
def test_arrays_of_other_types_are_refused(dtype):
    refuse(np.zeros((5, 5, 3), dtype), "wrong type", "uint8")


@pytest.mark.parametrize(
    ("value", "expected"), [(1.01, "0..1"), (-0.01, "0..1"), (200.0, "255"), (np.nan, "finite"), (np.inf, "finite")]
)
def test_floats_outside_zero_to_one_are_refused(value, expected):
    array = np.zeros((5, 5, 3), np.float32)
    array[2, 3, 1] = value
    refuse(array, expected, "float32")


def test_float_images_that_are_not_finite_are_refused():
    for value in (np.nan, np.inf, -np.inf):
        refuse(Image.fromarray(np.array([[0.0, value]], np.float32)), "finite", "F image of 2 x 1")


def test_tensors_that_are_no_arrays_are_refused():
    refuse(torch.zeros(5, 5, requires_grad=True), "Tensor", "grad")
    refuse(torch.zeros(5, 5, dtype=torch.bfloat16), "Tensor", "BFloat16")


def test_images_without_pixels_are_refused():
    refuse(Image.new("RGB", (0, 5)), "no pixels", "0 x 5")


def test_a_closed_image_is_refused(tmp_path):
    picture().save(tmp_path / "closed.png")
    image = Image.open(tmp_path / "closed.png")
    image.close()
    refuse(image, "closed.png", "closed")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size", [(10_000, 10_000), (20_000, 10_000), (8_193, 8_192), (MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)]
)
def test_a_bomb_is_refused_in_milliseconds_and_never_decoded(size, tmp_path, monkeypatch):
    data = png_of_zeros(*size)
    (tmp_path / "bomb.png").write_bytes(data)
    lazy = Image.open(io.BytesIO(data)) if size != (20_000, 10_000) else None  # that one PIL itself refuses

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    begin = time.thread_time()  # other programs on the machine do not count
    for source, name in ((data, f"<{len(data)} bytes>"), (tmp_path / "bomb.png", "bomb.png"), (lazy, "")):
        if source is not None:
            with pytest.raises(ValueError, match="too large.*smaller") as caught:
                open_picture(source)
            assert name in str(caught.value)
    assert time.thread_time() - begin < 0.1


def test_a_bomb_is_a_value_error_where_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="too large"):
            open_picture(png_of_zeros(10_000, 10_000))


def test_a_huge_array_is_refused_before_it_is_converted():
    huge = np.broadcast_to(np.float64(np.nan), (MAX_PIXELS // 1000 + 1, 1000, 3))
    refuse(huge, "too large")


def test_the_largest_side_is_still_read(processor):
    for size in ((MAX_SIDE, 1), (1, MAX_SIDE)):
        assert processor(png_of_zeros(*size), return_tensors="np")["pixel_values"].shape == (1, 3, 224, 224)


# ------------------------------------------------------------------------------------------------- damage by hundreds


def files_of_every_format() -> dict[str, bytes]:
    image = picture()
    files = {
        "png": encoded(image, "PNG", exif=oriented(6)),
        "palette png": encoded(image.quantize(16), "PNG", transparency=bytes(16)),
        "16-bit png": encoded(Image.fromarray(noise(channels=0).astype(np.uint16) * 257), "PNG"),
        "jpeg": encoded(image, "JPEG", exif=oriented(6)),
        "progressive jpeg": encoded(image, "JPEG", progressive=True),
        "cmyk jpeg": encoded(image.convert("CMYK"), "JPEG"),
        "gif": encoded(image, "GIF"),
        "animated gif": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "webp": encoded(image, "WEBP"),
        "lossless webp": encoded(image, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "grey bmp": encoded(image.convert("L"), "BMP"),
        "tiff": encoded(image, "TIFF", tiffinfo={ORIENTATION: 6}),
        "ppm": encoded(image, "PPM"),
        "jpeg 2000": encoded(image, "JPEG2000"),
    }
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        with contextlib.suppress(OSError, ValueError):  # PIL without libtiff
            files[compression] = encoded(image, "TIFF", compression=compression)
    if features.check("avif"):
        files["avif"] = encoded(image, "AVIF")
    return files


def opened_or_refused(data: bytes) -> Image.Image | None:
    """The picture, or None where it is refused by name; any other exception fails the test."""
    try:
        return open_picture(data)
    except ValueError as error:
        message = str(error)
    assert f"Picture <{len(data)} bytes>" in message
    return None


FILES = files_of_every_format()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_anywhere_is_refused_or_complete(name):
    data = FILES[name]
    complete = open_picture(data)
    offsets = {*range(300), *range(0, len(data), len(data) // 50 + 1), *range(len(data) - 40, len(data))}
    for offset in sorted(offset for offset in offsets if offset < len(data)):
        opened = opened_or_refused(data[:offset])
        # Where it opens, what is missing comes after the pixels; but OpenJPEG takes a file cut after its tile header.
        assert opened is None or name == "jpeg 2000" or same(opened, complete)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")  # PIL's remarks on broken metadata
def test_a_file_with_wrong_bytes_is_refused_or_opened(name, monkeypatch):
    monkeypatch.setattr(picture_reading, "MAX_PIXELS", 10**6)  # decoding more takes long
    draw = np.random.default_rng(1)
    for _ in range(400):
        data = bytearray(FILES[name])
        for position in draw.integers(min(len(data), draw.choice([64, 300, len(data)])), size=draw.choice([1, 2, 8])):
            data[position] = draw.choice([0, 1, 127, 255, draw.integers(256)])
        opened = opened_or_refused(bytes(data))
        assert opened is None or opened.mode == "RGB"


# ------------------------------------------------------------------------------------------------- the processor


def test_any_size_and_mode_gives_finite_pixel_values(processor):
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")

    @hypothesis.settings(max_examples=80, deadline=None, database=None)
    @hypothesis.given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(MODES), st.integers(0, 2**32 - 1))
    def holds(width, height, mode, seed):
        draw = np.random.default_rng(seed)
        image = Image.new(mode, (width, height))
        if mode == "F":
            image = Image.fromarray(draw.normal(0, 10 ** float(draw.integers(9)), (height, width)).astype(np.float32))
        elif mode != "PA":
            image.frombytes(draw.bytes(len(image.tobytes())))
        values = processor(image, return_tensors="np")["pixel_values"]
        assert values.shape == (1, 3, 224, 224)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert values.min() >= -1.8
        assert values.max() <= 2.2

    holds()


def test_lists_are_flattened_in_order(processor):
    images = [picture(seed=seed) for seed in range(5)]
    flat = processor(images, return_tensors="np")["pixel_values"]
    nested = processor([images[0], [images[1], (images[2],)], [], images[3:]], return_tensors="np")["pixel_values"]
    stacked = processor(np.stack([np.asarray(image) for image in images]), return_tensors="np")["pixel_values"]
    assert flat.shape == (5, 3, 224, 224)
    assert np.array_equal(flat, nested)
    assert np.array_equal(flat, stacked)


def test_the_tensor_type_is_as_asked(processor):
    image = picture()
    as_list = processor([image, image])["pixel_values"]
    as_array = processor([image, image], return_tensors="np")["pixel_values"]
    as_tensor = processor([image, image], return_tensors="pt")["pixel_values"]
    assert isinstance(as_list, list)
    assert [each.shape for each in as_list] == [(3, 224, 224)] * 2
    assert isinstance(as_array, np.ndarray)
    assert as_array.flags["C_CONTIGUOUS"]
    assert as_tensor.dtype == torch.float32
    assert as_tensor.is_contiguous()
    assert np.array_equal(as_list, as_array)
    assert np.array_equal(as_tensor.numpy(), as_array)


@pytest.mark.parametrize("images", [[], [[]], (), np.zeros((0, 5, 5, 3), np.uint8)])
def test_no_picture_is_refused(processor, images):
    with pytest.raises(ValueError, match="no picture"):
        processor(images)


def test_one_bad_picture_in_a_batch_is_named(processor, tmp_path):
    with pytest.raises(ValueError, match="gone.png"):
        processor([picture(), [tmp_path / "gone.png"]])


PER_CALL = {
    "size": {"height": 32, "width": 48},
    "resample": Image.Resampling.NEAREST,
    "do_resize": False,
    "do_rescale": False,
    "rescale_factor": 1 / 127.5,
    "do_normalize": False,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.125],
}


@pytest.mark.parametrize("name", PER_CALL)
def test_a_parameter_of_the_call_does_what_the_same_one_of_the_processor_does(processor, name):
    image = picture()
    usual = processor(image)["pixel_values"][0]
    of_call = processor(image, **{name: PER_CALL[name]})["pixel_values"][0]
    of_processor = VisualGLMImageProcessor(**{name: PER_CALL[name]})(image)["pixel_values"][0]
    assert of_call.dtype == np.float32
    assert np.array_equal(of_call, of_processor)
    assert of_call.shape != usual.shape or not np.array_equal(of_call, usual)
    assert np.array_equal(processor(image)["pixel_values"][0], usual)  # the call has left nothing behind


def test_none_means_the_processors_own_value(processor):
    image = picture()
    values = processor(image, **dict.fromkeys(PER_CALL), do_convert_rgb=None, device=None)["pixel_values"][0]
    assert np.array_equal(values, processor(image)["pixel_values"][0])


def test_the_steps_can_be_left_out_one_by_one(processor):
    image, pixels = picture(), noise().transpose(2, 0, 1)
    raw = processor(image, do_resize=False, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(raw, pixels.astype(np.float32))
    unit = processor(image, do_resize=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(unit, pixels.astype(np.float32) / np.float32(255))
    wide = processor(image, size={"height": 32, "width": 48})["pixel_values"][0]
    assert wide.shape == (3, 32, 48)
    assert processor(image, size=16)["pixel_values"][0].shape == (3, 16, 16)
    assert processor(image, size=(16, 24))["pixel_values"][0].shape == (3, 16, 24)


def test_without_conversion_only_rgb_images_are_taken(processor):
    image = picture()
    image.info["exif"] = oriented(6).tobytes()
    values = processor(image, do_convert_rgb=False, do_resize=False)["pixel_values"][0]
    assert values.shape == (3, 40, 50)  # not turned
    assert processor(image, do_resize=False)["pixel_values"][0].shape == (3, 50, 40)
    with pytest.raises(ValueError, match="RGBA image of 50 x 40.*do_convert_rgb"):
        processor(image.convert("RGBA"), do_convert_rgb=False)
    assert processor(encoded(image, "PNG"), do_convert_rgb=False)["pixel_values"][0].shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"size": {"shortest_edge": 224}}, "size"),
        ({"size": {"height": 0, "width": 5}}, "size"),
        ({"resample": 99}, "99"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [1, 0, 1]}, "image_std"),
        ({"image_std": 0.0}, "image_std"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"return_tensors": "np", "do_resize": False}, "do_resize"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(processor, parameters, expected):
    with pytest.raises(ValueError, match=expected):
        processor([picture(), picture(height=7)], **parameters)


# ------------------------------------------------------------------------------------------------- saving, remote code


def test_saving_and_loading_keeps_every_parameter(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 224, "width": 224}
    assert saved["resample"] == 3
    assert saved["image_mean"] == list(CLIP_MEAN)
    assert saved["image_std"] == list(CLIP_STD)
    assert {"do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb"} <= saved.keys()
    assert saved["image_processor_type"] == "VisualGLMImageProcessor"
    again = VisualGLMImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert np.array_equal(again(picture())["pixel_values"], processor(picture())["pixel_values"])

    changed = VisualGLMImageProcessor(**PER_CALL)
    changed.save_pretrained(tmp_path)
    assert VisualGLMImageProcessor.from_pretrained(tmp_path).to_dict() == changed.to_dict()
    assert VisualGLMImageProcessor.from_pretrained(tmp_path, size=64).size == {"height": 64, "width": 64}


def test_it_loads_as_remote_code_and_saves_its_own_code(tmp_path, processor):
    processor.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "preprocessor_config.json"
    auto_map = {"AutoImageProcessor": "image_processing_visualglm.VisualGLMImageProcessor"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))
    for source in SOURCES:
        shutil.copy(source, tmp_path / "model")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(loaded).__name__ == "VisualGLMImageProcessor"
    assert type(loaded) is not VisualGLMImageProcessor
    assert np.array_equal(loaded(picture())["pixel_values"], processor(picture())["pixel_values"])
    loaded.save_pretrained(tmp_path / "copy")
    for source in SOURCES:
        assert (tmp_path / "copy" / source.name).read_text() == source.read_text()


def test_the_files_import_only_what_their_room_may():
    allowed = {"numpy", "PIL", "transformers"}
    assert set(dynamic_module_utils.get_imports(SOURCES[0])) - set(sys.stdlib_module_names) == allowed
    assert sorted(dynamic_module_utils.get_relative_imports(SOURCES[0])) == ["code_links", "picture_reading"]
    assert dynamic_module_utils.get_relative_imports(SOURCES[1]) == []


def test_pils_global_state_is_left_alone(processor):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    processor(picture())
    for bad in (b"x", FILES["png"][:100]):
        with pytest.raises(ValueError, match="bytes"):
            open_picture(bad)
    after = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    assert after == before
