"""A picture is taken in whatever form people and libraries have it; what is none is refused in a line."""

import base64
import io
import mmap
import tempfile
import urllib.parse
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visualglm_hf.image_processing_visualglm import VisualGLMImageProcessor, open_picture
from visualglm_tools.serving.engine.prompts import PromptBuilder


GREEDY = {"do_sample": False, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A PNG whose base64 text has every letter that differs between the alphabets, and padding."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    for seed in range(100):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        text = base64.b64encode(path.read_bytes()).decode()
        if {"+", "/", "="} <= set(text):
            return path
    raise AssertionError("no such picture")


def as_file(path: Path, kind: str):
    """The picture as an open file of some kind."""
    if kind == "open":
        return path.open("rb")
    if kind == "raw":
        return path.open("rb", buffering=0)
    if kind == "mmap":
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file = {"BytesIO": io.BytesIO, "SpooledTemporaryFile": tempfile.SpooledTemporaryFile}[kind]()
    file.write(path.read_bytes())  # and the position stays at the end, as after `image.save(file)`
    return file


def forms_of(path: Path) -> dict:
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    pixels = np.asarray(Image.open(path))
    return {
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "path": str(path),
        "Path": path,
        "PIL": Image.open(path),
        "array": pixels,
        "tensor": torch.from_numpy(pixels.copy()),
        "tensor, channels first": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "base64": text,
        "base64 in lines": base64.encodebytes(data).decode(),
        "base64 without padding": text.rstrip("="),
        "base64, URL-safe": base64.urlsafe_b64encode(data).decode(),
        "base64, URL-safe without padding": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "data URI": f"data:image/png;base64,{text}",
        "data URI without padding": f"data:image/png;base64,{text.rstrip('=')}",
        "data URI, URL-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}",
        "data URI, escaped": f"data:image/png;base64,{urllib.parse.quote(text, safe='')}",
        "data URI without a type": f"data:;base64,{text}",
        "data URI without base64": f"data:image/png,{urllib.parse.quote_from_bytes(data)}",
        "a row of datasets": {"bytes": data, "path": "not/there.png"},
        "a row with its path": {"bytes": None, "path": str(path)},
        "bytes alone": {"bytes": data},
        "path alone": {"path": path},
        "another mapping": UserDict(bytes=data),
    }


FORMS = list(forms_of(Path(__file__).parent.parent / "golden" / "images" / "img0.png"))
FILES = ["open", "raw", "mmap", "BytesIO", "SpooledTemporaryFile"]


@pytest.fixture(scope="module")
def expected(path):
    return VisualGLMImageProcessor()(Image.open(path), return_tensors="pt")["pixel_values"]


def pixels_at_every_door(source, model, tokenizer, processor) -> dict:
    """What the image processor, the processor, its messages and `chat` see of a picture."""
    message = [{"role": "user", "content": [{"type": "image", "image": source}, {"type": "text", "text": "a"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return {
        "image processor": processor.image_processor(source, return_tensors="pt")["pixel_values"],
        "list": processor.image_processor([source], return_tensors="pt")["pixel_values"],
        "processor": processor(images=source, return_tensors="pt")["pixel_values"],
        "processor, list": processor(images=[source], return_tensors="pt")["pixel_values"],
        "messages": processor.apply_chat_template(message, **options)["pixel_values"],
        "chat": torch.cat([image.pixel_values for image in model.open_images(source)]),
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_is_taken_at_every_door(form, path, expected, model, tokenizer, processor):
    for door, pixels in pixels_at_every_door(forms_of(path)[form], model, tokenizer, processor).items():
        assert torch.equal(pixels, expected), door


@pytest.mark.parametrize("kind", FILES)
def test_an_open_file_is_read_from_its_beginning_and_left_where_it_was(
    kind, path, expected, model, tokenizer, processor
):
    with as_file(path, kind) as file:
        for position in (0, 7, path.stat().st_size):
            file.seek(position)
            for door, pixels in pixels_at_every_door(file, model, tokenizer, processor).items():
                assert torch.equal(pixels, expected), door
                assert file.tell() == position


def test_a_stream_that_cannot_go_back_is_read_once(path, expected):
    class Response(io.RawIOBase):
        def read(self, size=-1):
            return path.read_bytes()

        def seekable(self):
            return False

    assert torch.equal(VisualGLMImageProcessor()(Response(), return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", lambda path: str(path)),
        ("path", lambda path: path),
        ("url", lambda path: str(path)),
        ("url", lambda path: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode().rstrip('=')}"),
        ("base64", lambda path: base64.b64encode(path.read_bytes()).decode()),
        ("base64", lambda path: base64.urlsafe_b64encode(path.read_bytes()).decode().rstrip("=")),
        ("image", lambda path: {"bytes": path.read_bytes(), "path": None}),
    ],
)
def test_messages_name_a_picture_by_every_key_of_transformers(key, value, path, expected, processor):
    content = [{"type": "image", key: value(path)}, {"type": "text", "text": "a"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values"], expected)


def test_an_array_of_pictures_is_so_many_pictures(model, processor, expected):
    arrays = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    inputs = processor(images=arrays, text=f"{processor.image_token}问：a{processor.image_token}\n答：")
    assert len(inputs["pixel_values"]) == 2
    assert len(model.open_images(torch.from_numpy(arrays))) == 2


def test_chat_takes_an_open_file_twice(model, tokenizer, path):
    with path.open("rb") as file:
        first, history = model.chat(tokenizer, file, "描述", **GREEDY)
        second, history = model.chat(tokenizer, file, "描述", history=history, **GREEDY)
    assert len(history.images) == 1


# What is no picture


TEXTS = {
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "JSON": b'{"error": "not found"}',
    "PDF": b"%PDF-1.7\n" + bytes(100),
    "one byte": b"x",
}
LONG = "QUJD" * 20_000


def refused() -> dict:
    closed = io.BytesIO(b"x")
    closed.close()
    sources = {
        "long base64 of text": LONG,
        "long URL-safe base64": LONG.replace("U", "_"),
        "long data URI": f"data:image/png;base64,{LONG}",
        "long broken data URI": f"data:image/png;base64,{LONG}!",
        "long data URI without a comma": f"data:{LONG.replace(',', '')}",
        "long path": "/a" * 50_000,
        "long Path": Path("/a" * 50_000),
        "long URL": f"ftp://a.example/{LONG}",
        "NUL": "a\0b.png",
        "half of a surrogate pair": "a\ud83d.png",
        "an empty file": io.BytesIO(),
        "a closed file": closed,
        "a file of text": io.StringIO("x"),
        "a dict of nothing": {"bytes": None, "path": None},
        "a dict of other things": {"url": LONG},
        "a dict of a list": {"bytes": [1, 2]},
        "a number": 3,
        "normalized": torch.full((3, 8, 8), -1.5),
    }
    for name, data in TEXTS.items():
        text = base64.b64encode(data).decode()
        sources |= {name: data, f"{name}, file": io.BytesIO(data), f"{name}, base64": f"data:image/png;base64,{text}"}
    return sources


@pytest.mark.parametrize("name", list(refused()))
def test_what_is_no_picture_is_one_short_error_at_every_door(name, model, tokenizer, processor):
    source = refused()[name]
    message = [{"role": "user", "content": [{"type": "image", "image": source}, {"type": "text", "text": "a"}]}]
    for door in (
        lambda: open_picture(source),
        lambda: processor.image_processor(source),
        lambda: processor(images=source),
        lambda: processor.apply_chat_template(message, tokenize=True, return_dict=True),
        lambda: model.chat(tokenizer, source, "描述"),
    ):
        with pytest.raises(ValueError, match="icture") as caught:
            door()
        assert len(str(caught.value)) < 700


def test_a_file_opened_for_text_is_refused_with_the_remedy(path):
    with path.open(encoding="utf-8") as file, pytest.raises(ValueError, match="'rb'"):
        open_picture(file)


@pytest.mark.parametrize(
    ("url", "reason"),
    [(f"http://127.0.0.1:9/{LONG}", "Connection refused"), (f"http://a b/{LONG}", "control characters")],
)
def test_an_address_that_fails_is_shown_in_short(url, reason, model, tokenizer):
    for source in (url, {"bytes": None, "path": url}):
        with pytest.raises(ValueError, match=reason) as caught:
            model.chat(tokenizer, source, "描述")
        assert len(str(caught.value)) < 700


def test_normalized_pixels_are_refused_with_the_right_remedy(model, tokenizer, processor, path):
    inputs = processor(images=path, text=f"{processor.image_token}问：a\n答：", return_tensors="pt")
    for shown in (inputs["pixel_values"], inputs["pixel_values"][0]):
        with pytest.raises(ValueError, match="Pass the picture itself"):
            model.chat(tokenizer, shown, "描述")
    one = {**inputs, "pixel_values": inputs["pixel_values"][0]}
    for door in (model.generate, model):
        with pytest.raises(ValueError, match=r"found \[3, 224, 224\]. Pass pixel_values\[None\]"):
            door(**one)


@pytest.mark.parametrize("query", [LONG.encode(), [LONG] * 100, np.zeros(10**6), Image.new("RGB", (9, 9)), {"a": LONG}])
def test_a_query_that_is_none_is_shown_in_short(query, model, tokenizer):
    with pytest.raises(ValueError, match="must be a string") as caught:
        model.chat(tokenizer, query)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("form", ["path", "Path", "path alone", "a row with its path", "a row of datasets", "base64"])
def test_a_server_opens_no_path_in_any_form(form, path, model, tokenizer):
    prompts = PromptBuilder(model, tokenizer, max_pictures=1, max_picture_bytes=10**6)
    content = [{"type": "image", "image": forms_of(path)[form]}, {"type": "text", "text": "a"}]
    with pytest.raises(ValueError, match="no path or address is opened here"):
        prompts.build([{"role": "user", "content": content}])
