"""Bodies and pictures that mean harm or nothing: refused in the API's words, and the server lives."""

import functools
import zlib

import pytest

from tests.paths import CIRCLES
from tests.picture_files import png, png_of_zeros
from tests.serving_helpers import ask_about, data_uri, error_of, post, post_chat, serve
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_a_body_that_is_no_json_is_a_400_or_422(url, path, body):
    response = post(url + path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    error_of(response, response.status_code)


@functools.cache
def bad_pictures() -> dict[str, bytes]:
    whole = CIRCLES.read_bytes()
    few = zlib.compress(b"\0" * 10_000)  # bytes, and not of that size
    return {
        "announced bomb": png(60_000, 60_000, 8, 2, few),
        "real bomb": png_of_zeros(65_535, 16_000),  # 1 billion pixels in 130 kB
        "strip": png(2_000_000, 1, 8, 2, few),
        "cut": whole[: len(whole) // 2],
        "garbage": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
        "html": b"<html></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "empty": b"",
    }


@pytest.mark.parametrize("name", bad_pictures())
def test_bombs_and_bad_pictures_are_4xx_and_the_server_lives(url, name):
    data = bad_pictures()[name]
    for response in (
        post_chat(url, messages=ask_about(data_uri(data))),
        post(url, json={"text": "a", "image": data_uri(data)}),
    ):
        error_of(response, 400)
    assert post_chat(url, max_tokens=1).status_code == 200


def test_too_many_bytes_are_a_413_announced_or_not(loaded):
    limits = Limits(max_picture_bytes=1000)
    with Engine(*loaded, limits) as engine, serve(engine, max_body_bytes=100_000) as url:
        error_of(post_chat(url, messages=ask_about(data_uri(b"0" * 1001))), 413)
        error_of(post(url, content=b"0" * 100_001), 413)
        error_of(post(url, content=iter([b"0" * 60_000] * 2)), 413)
        error_of(post(f"{url}/v1/chat/completions", content=iter([b"0" * 60_000] * 2)), 413)
