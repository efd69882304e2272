"""The HTTP API over real sockets: the original's route by curl, OpenAI's by its own client, and all that may fail."""

import base64
import contextlib
import dataclasses
import functools
import http.server
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import httpx
import openai
import pytest
from PIL import Image

from tests.commands import serve as serve_command
from tests.paths import PICTURES, ROOT, TINY
from tests.serving_helpers import free_port, health, open_door, serve, wait_until
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.commands import serve as serve_options
from visualglm_tools.options import from_values
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http import public_urls
from visualglm_tools.serving.http.app import ApiOptions


MODEL = "visualglm-tiny"
CAPTION = "图片中有两个红色的圆形，背景是草地。"
RED_CIRCLES = next(path for path in PICTURES if path.name == "red_circles_on_grass.png")
MAX_BYTES = 2**20
EXACT = {"temperature": 0, "extra_body": {"repetition_penalty": 1}}  # what the tiny model has learned
ENDLESS = {"temperature": 2, "top_p": 1, "top_k": 0, "seed": 1, "min_length": 1500}  # for the original's route


@pytest.fixture(scope="module")
def loaded():
    return load_model(TINY, "cpu", "float32")


@pytest.fixture(scope="module")
def engine(loaded):
    with Engine(*loaded) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask_about(picture: str, text: str = "描述这张图片。") -> list[dict]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": picture}}]
    return [{"role": "user", "content": parts}]


def error_of(response: httpx.Response, status: int) -> dict:
    """The error of a response, after a check of its status and of OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def post_chat(url: str, **fields) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


# The original's route


def test_both_curl_examples_work_literally(url, tmp_path):
    # The two examples of the original's README; only the address is another.
    script = r"""
echo "{\"image\":\"$(base64 path/to/example.jpg)\",\"text\":\"Describe this picture\",\"history\":[]}" > temp.json
curl -X POST -H "Content-Type: application/json" -d @temp.json http://127.0.0.1:8080

echo "{\"image\":\"\",\"text\":\"Hello\",\"history\":[]}" > temp.json
curl -X POST -H "Content-Type: application/json" -d @temp.json http://127.0.0.1:8080
"""
    (tmp_path / "path" / "to").mkdir(parents=True)
    Image.open(RED_CIRCLES).convert("RGB").save(tmp_path / "path" / "to" / "example.jpg", quality=95)
    script = script.replace("http://127.0.0.1:8080", url).replace("curl", "curl -sS")
    output = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    decoder = json.JSONDecoder()
    about_picture, end = decoder.raw_decode(output)
    greeting, _ = decoder.raw_decode(output[end:])
    assert "red circles" in about_picture["result"]
    assert about_picture["history"] == [["Describe this picture", about_picture["result"]]]
    assert greeting["result"].startswith("Hello!") and greeting["status"] == 200
    time.strptime(greeting["time"], "%Y-%m-%d %H:%M:%S")
    assert set(greeting) == {"result", "history", "status", "time"}


def test_line_breaks_of_gnu_base64_may_stand_raw_in_the_json(url):
    wrapped = subprocess.run(["base64", RED_CIRCLES], capture_output=True, text=True, check=True).stdout
    assert wrapped.count("\n") > 10
    body = f'{{"image":"{wrapped}","text":"描述这张图片。","history":[],"temperature":0,"repetition_penalty":1}}'
    response = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert response.json()["result"].startswith(CAPTION)


def test_the_history_that_is_returned_continues_the_conversation(url):
    picture = base64.b64encode(RED_CIRCLES.read_bytes()).decode()
    fields = {"image": picture, "temperature": 0, "repetition_penalty": 1, "min_length": 0}
    first = httpx.post(url, json={"text": "描述这张图片。", "history": [], **fields}, timeout=60).json()
    second = httpx.post(
        url, json={"text": "这张图片的背景里有什么内容？", "history": first["history"], **fields}, timeout=60
    ).json()
    assert first["history"] == [["描述这张图片。", CAPTION]]
    assert second["history"] == [*first["history"], ["这张图片的背景里有什么内容？", second["result"]]]
    assert "草地" in second["result"]


def test_the_original_route_answers_as_chat_with_its_defaults(url, loaded):
    model, tokenizer = loaded
    for text, english in (("你好", False), ("Hello", True), ("123", True)):
        expected = model.chat(
            tokenizer, text, max_length=2048, min_length=50, do_sample=False, repetition_penalty=1.2, english=english
        )[0]
        assert httpx.post(url, json={"text": text, "temperature": 0}, timeout=60).json()["result"] == expected


@pytest.mark.parametrize(
    ("fields", "status", "found"),
    [
        ({}, 422, "text"),
        ({"text": 5}, 422, "text"),
        ({"text": ""}, 400, "empty"),
        ({"text": "a", "image": "???"}, 400, "base64"),
        ({"text": "a", "image": "/etc/passwd"}, 400, "base64"),
        ({"text": "a", "image": "aGVsbG8="}, 400, "not a picture"),
        ({"text": "a", "history": "b"}, 422, "history"),
        ({"text": "a", "history": [["b"]]}, 422, "history"),
        ({"text": "a", "temperature": -1}, 400, "temperature"),
        ({"text": "a", "top_p": 2}, 400, "top_p"),
        ({"text": "a", "max_length": 3}, 400, "no room"),
        ({"text": "好" * 3000}, 400, "tokens long"),
        ({"text": "\ud800"}, 400, "surrogate"),
    ],
)
def test_bad_input_to_the_original_route_is_named(url, fields, status, found):
    body = json.dumps(fields).encode()
    assert found in error_of(httpx.post(url, content=body, timeout=60), status)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_a_body_that_is_no_json_is_a_400_or_422(url, path, body):
    response = httpx.post(url + path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    error_of(response, response.status_code)


# OpenAI's routes, by its official client


def test_openai_client_lists_the_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="visualglm-tiny"):
        client.models.retrieve("gpt-4o")


def test_openai_client_asks_about_a_picture_and_goes_on(client):
    messages = ask_about(data_uri(RED_CIRCLES.read_bytes()))
    first = client.chat.completions.create(model=MODEL, messages=messages, **EXACT)
    assert first.choices[0].message.content == CAPTION and first.choices[0].finish_reason == "stop"
    assert first.usage.prompt_tokens > 32 and first.usage.completion_tokens > 5
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    messages += [first.choices[0].message, {"role": "user", "content": "这张图片的背景里有什么内容？"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, **EXACT)
    assert "草地" in second.choices[0].message.content


def test_openai_client_streams(client):
    messages = ask_about(data_uri(RED_CIRCLES.read_bytes()))
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **EXACT
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == CAPTION and len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 5


def test_openai_client_streams_several_choices(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "你好"}], n=3, seed=4, temperature=1.5, top_p=1, stream=True
    )
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    whole = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "你好"}], n=3, seed=4, temperature=1.5, top_p=1
    )
    assert texts == [choice.message.content for choice in whole.choices]


def test_max_tokens_stop_and_seed_do_what_openai_says(client):
    def create(**options):
        messages = [{"role": "user", "content": "你好"}]
        return client.chat.completions.create(model=MODEL, messages=messages, **options)

    cut = create(max_tokens=2, **EXACT)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)
    stopped = create(stop="！", **EXACT).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", "你好")
    hot = {"temperature": 2, "top_p": 1, "max_tokens": 20}
    answers = [create(seed=seed, **hot).choices[0].message.content for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    longer = create(temperature=0, extra_body={"min_tokens": 30})
    assert longer.usage.completion_tokens >= 30
    choices = create(n=2, seed=1, **hot).choices
    assert [choice.message.content for choice in choices] == answers[1:]


def test_a_system_message_and_several_pictures_are_taken(client):
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(path.read_bytes())}} for path in PICTURES[:2]]
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [*pictures, {"type": "text", "text": "What colour?"}]},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages).usage.prompt_tokens > 64


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 422, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, None),
        ({"messages": [{"role": "user", "content": " "}]}, 400, None),
        ({"messages": [{"role": "user", "content": "\ufffc"}]}, 400, None),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 422, "messages.0.content"),
        ({"messages": ask_about("http://example.com/a.png")}, 400, "messages"),
        ({"messages": ask_about("file:///etc/passwd")}, 400, "messages"),
        ({"messages": ask_about("/etc/passwd")}, 400, "messages"),
        ({"messages": ask_about("data:image/png;base64,???")}, 400, None),
        ({"messages": ask_about("data:image/png,nothing")}, 400, None),
        ({"temperature": 3}, 422, "temperature"),
        ({"n": 99}, 400, "n"),
        ({"stop": [""]}, 422, "stop"),
        ({"presence_penalty": 1}, 422, "presence_penalty"),
        ({"tools": [{"type": "function"}]}, 422, "tools"),
        ({"response_format": {"type": "json_object"}}, 422, "response_format.type"),
        ({"unknown": 1}, 422, "unknown"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(url, fields, status, param):
    found = error_of(post_chat(url, **fields), status)["param"]
    assert found is None if param is None else found.startswith(param)


# Pictures that mean harm


def png_of_size(width: int, height: int) -> bytes:
    """The header of a huge PNG, with data that decompresses to nothing of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@functools.cache
def bad_pictures() -> dict[str, bytes]:
    whole = RED_CIRCLES.read_bytes()
    flat = io.BytesIO()
    Image.new("1", (65_535, 16_000)).save(flat, "PNG")  # 1 billion pixels in 130 kB
    return {
        "announced bomb": png_of_size(60_000, 60_000),
        "real bomb": flat.getvalue(),
        "strip": png_of_size(2_000_000, 1),
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
        httpx.post(url, json={"text": "a", "image": data_uri(data)}, timeout=60),
    ):
        error_of(response, 400)
    assert post_chat(url, max_tokens=1).status_code == 200


def test_too_many_bytes_are_a_413_announced_or_not(loaded):
    limits = Limits(max_picture_bytes=1000)
    with Engine(*loaded, limits) as engine, serve(engine, max_body_bytes=100_000) as url:
        error_of(post_chat(url, messages=ask_about(data_uri(b"0" * 1001))), 413)
        error_of(httpx.post(url, content=b"0" * 100_001), 413)
        error_of(httpx.post(url, content=iter([b"0" * 60_000] * 2)), 413)
        error_of(httpx.post(f"{url}/v1/chat/completions", content=iter([b"0" * 60_000] * 2)), 413)


# Addresses of pictures


class PictureSite(http.server.BaseHTTPRequestHandler):
    """Serves a picture, redirects, a page that never ends, and one that is too slow."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"0")
                    self.wfile.flush()
                    time.sleep(0.1)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(RED_CIRCLES.read_bytes())

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureSite) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_public_address_is_fetched_where_the_server_allows_it(engine, site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")  # this machine plays the net
    with serve(engine, allow_urls=True) as url:
        for address in (f"{site}/a.png", f"{site}/to/{site}/a.png"):
            response = post_chat(url, messages=ask_about(address), temperature=0, repetition_penalty=1)
            assert response.json()["choices"][0]["message"]["content"] == CAPTION


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/a.png",
        "http://localhost:8080/a.png",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0.0.0.0/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "https://127.0.0.1/a.png",
    ],
)
def test_an_address_that_is_not_public_is_refused(engine, address):
    with pytest.raises(ValueError, match="is not a public address"):
        public_urls.download_public(address, MAX_BYTES)


def test_redirects_are_checked_again(site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(ValueError, match=r"'127\.0\.0\.2' is not a public address"):
        public_urls.download_public(f"{site}/to/http://127.0.0.2/a.png", MAX_BYTES)
    with pytest.raises(ValueError, match="Cannot download"):
        public_urls.download_public(f"{site}/to/file:///etc/passwd", MAX_BYTES)
    with pytest.raises(ValueError, match="Cannot download"):
        public_urls.download_public(f"{site}/to/ftp://127.0.0.1/a.png", MAX_BYTES)


def test_the_address_that_was_checked_is_the_one_connected_to(site, monkeypatch):
    """A name that is public when it is checked and private a moment later (DNS rebinding) gains nothing."""
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    port = int(site.rsplit(":", 1)[1])
    original = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **keywords):
        if host != "rebinding.example":
            return original(host, *arguments, **keywords)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
    assert public_urls.download_public(f"http://rebinding.example:{port}/a.png", MAX_BYTES) == RED_CIRCLES.read_bytes()
    assert answers == [["127.0.0.2"]]


def test_a_host_with_one_private_address_is_refused_whole(monkeypatch):
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *arguments, **keywords: [(2, 1, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")],
    )
    with pytest.raises(ValueError, match="not a public address"):
        public_urls.download_public("http://two-faced.example/", MAX_BYTES)


def test_a_picture_of_too_many_bytes_is_not_read_to_its_end(site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: True)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        public_urls.download_public(f"{site}/a.png", 1000)


def test_a_slow_picture_is_given_up(site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: True)
    with pytest.raises(ValueError, match=r"took more than 0\.5 s"):
        public_urls.download_public(f"{site}/slow", MAX_BYTES, seconds=0.5)


# Keys, origins, states


def test_a_key_is_demanded_everywhere_but_for_health(engine):
    with serve(engine, api_key="sésame") as url:
        for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sésame".encode()}):
            for method, path in (
                ("POST", "/"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
            ):
                response = httpx.request(method, url + path, headers=wrong)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        assert httpx.get(f"{url}/health").status_code == 200
        right = {"Authorization": "Bearer sésame".encode()}
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200


def test_cors_is_off_unless_asked_for(engine, url):
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{url}/v1/chat/completions", headers=headers).headers
    assert "access-control-allow-origin" not in httpx.get(f"{url}/health", headers=headers).headers
    with serve(engine, cors_origins=["https://page.example"], api_key="k") as url:
        response = httpx.options(f"{url}/v1/chat/completions", headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.get(f"{url}/health", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_is_a_429_at_once_with_retry_after(loaded):
    with Engine(*loaded, Limits(max_batch_size=1, max_waiting=1)) as engine, serve(engine) as url:
        prompt = engine.prepare([{"role": "user", "content": "a"}])
        answers = engine.submit_all(prompt, [Settings(**ENDLESS)] * 2)
        response = post_chat(url, messages=ask_about(data_uri(RED_CIRCLES.read_bytes())))
        assert not any(answer.future.done() for answer in answers)  # it did not wait for them
        assert error_of(response, 429)["code"] == "queue_full"
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        for answer in answers:
            answer.cancel()
        wait_until(lambda: all(answer.future.done() for answer in answers))
        assert post_chat(url, max_tokens=1).status_code == 200


def value(engine, name: str, labels: dict | None = None) -> float:
    return engine.metrics.registry.get_sample_value(name, labels or {}) or 0


@pytest.mark.parametrize("leave_a_stream", [True, False])
def test_when_the_client_leaves_the_model_stops(engine, url, leave_a_stream):
    cancelled = value(engine, "visualglm_requests_total", {"outcome": "cancelled"})
    with httpx.Client() as client:
        if leave_a_stream:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True, "min_tokens": 1500}
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url, json={"text": "a", **ENDLESS}, timeout=0.3)
    wait_until(lambda: value(engine, "visualglm_requests_total", {"outcome": "cancelled"}) == cancelled + 1)
    assert value(engine, "visualglm_running") == 0


def test_an_answer_that_takes_too_long_is_a_504(loaded):
    with Engine(*loaded, Limits(timeout=0.2)) as engine, serve(engine) as url:
        assert error_of(httpx.post(url, json={"text": "a", **ENDLESS}, timeout=60), 504)["code"] == "timeout"
        streamed = post_chat(url, stream=True, min_tokens=1500).text
        assert '"code": "timeout"' in streamed.splitlines()[-2] and "[DONE]" not in streamed


def test_metrics_are_prometheus_text(url):
    post_chat(url, max_tokens=2)
    text = httpx.get(f"{url}/metrics").text
    for name in ("queue_length", "running", "requests_total", "completion_tokens_total", "request_seconds_bucket"):
        assert f"\nvisualglm_{name}" in text


def test_health_is_503_when_the_engine_is_closed(loaded):
    engine = Engine(*loaded)
    with serve(engine) as url:
        assert health(url) == 200
        engine.close()
        assert health(url) == 503
        response = post_chat(url)
        assert error_of(response, 503)["code"] == "unavailable" and "Retry-After" in response.headers


# The door itself


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """The door as the README opens it, and its answer to a request that came before the model was loaded."""
    prepared = tmp_path_factory.mktemp("path-to") / "prepared"
    prepared.symlink_to(TINY)
    with open_door("--model", str(prepared)) as (url, process, log):
        early = post_chat(url)
        wait_until(lambda: health(url) == 200)
        yield url, process, log, early


def test_the_door_says_503_while_it_loads(door):
    *_, early = door
    assert "loaded" in error_of(early, 503)["message"] and "Retry-After" in early.headers


def test_the_commands_of_the_readme_work(door, tmp_path):
    url, *_ = door
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Over HTTP")[2].partition("\n## ")[0]
    server, *requests = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert "visualglm serve --model path/to/prepared" in server  # the fixture's command
    assert len(requests) == 2
    for script, found in zip(requests, ("red circles", "[DONE]"), strict=True):
        script = script.replace("http://127.0.0.1:8080", url).replace("temp.json", str(tmp_path / "temp.json"))
        finished = subprocess.run(["bash", "-ec", script], cwd=ROOT, capture_output=True, text=True)
        assert found in finished.stdout, finished


def test_the_python_of_the_documentation_works():
    document = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert CAPTION in finished.stdout, finished.stderr


def test_the_door_drains_on_sigterm(door):  # the last that uses it
    url, process, log, _ = door
    answers = []

    def ask():
        body = {"text": "a", **ENDLESS, "max_length": 600, "min_length": 600}
        answers.append(httpx.post(url, json=body, timeout=120))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    wait_until(lambda: "visualglm_running 3.0" in httpx.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    process.wait(timeout=60)
    output = log.read_text(encoding="utf-8")
    assert process.returncode == -signal.SIGTERM, output  # as whoever sent it expects
    assert "Application shutdown complete" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--model", "no/such/folder"], "no such folder"),
        (["--device", "abacus"], "no device is called"),
    ],
)
def test_a_door_that_cannot_open_says_why_in_one_line(options, found, capsys):
    assert serve_command("--port", free_port(), *options) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert found in line


def test_an_option_that_is_not_given_leaves_the_engine_and_the_api_as_they_are():
    options = from_values(serve_options.Options, {})
    assert serve_options.limits_of(options) == Limits()
    api = serve_options.api_of(options, None)
    assert api == dataclasses.replace(ApiOptions(model_name=TINY.name), allowed_hosts=["127.0.0.1"])
    options = from_values(serve_options.Options, {"max_body_mib": "0.5", "allowed_hosts": "a,b", "timeout": 1})
    assert serve_options.limits_of(options).timeout == 1
    api = serve_options.api_of(options, None)
    assert api.max_body_bytes == 2**19 and api.allowed_hosts == ["127.0.0.1", "a", "b"]


def test_help_is_quick_and_names_the_options():
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "api_hf.py"), "-h"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--allow-urls" in finished.stdout and "torch" not in finished.stderr


@pytest.mark.parametrize(
    "options",
    [["--port", "x"], ["--max-batch-size", "0"], ["--timeout", "inf"], ["--max-body-mib", "1e308"], ["--quant", "3"]],
)
def test_bad_options_are_refused_at_once(options):
    command = [sys.executable, str(ROOT / "scripts" / "api_hf.py"), *options]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2 and options[0] in finished.stderr
