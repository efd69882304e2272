"""The original's route over real sockets: by curl as its README has it, and what it is sent wrongly."""

import base64
import io
import json
import time

import pytest
from PIL import Image

from tests.commands import run
from tests.paths import CIRCLES
from tests.serving_helpers import CAPTION, error_of, post


def test_both_curl_examples_work_literally(url, tmp_path):
    # The two examples of the original's README; only the address is another.
    script = r"""
echo "{\"image\":\"$(base64 path/to/example.jpg)\",\"text\":\"Describe this picture\",\"history\":[]}" > temp.json
curl -X POST -H "Content-Type: application/json" -d @temp.json http://127.0.0.1:8080

echo "{\"image\":\"\",\"text\":\"Hello\",\"history\":[]}" > temp.json
curl -X POST -H "Content-Type: application/json" -d @temp.json http://127.0.0.1:8080
"""
    (tmp_path / "path" / "to").mkdir(parents=True)
    Image.open(CIRCLES).convert("RGB").save(tmp_path / "path" / "to" / "example.jpg", quality=95)
    script = script.replace("http://127.0.0.1:8080", url).replace("curl", "curl -sS")
    output = run("bash", "-c", script, cwd=tmp_path).stdout
    decoder = json.JSONDecoder()
    about_picture, end = decoder.raw_decode(output)
    greeting, _ = decoder.raw_decode(output[end:])
    assert "red circles" in about_picture["result"]
    assert about_picture["history"] == [["Describe this picture", about_picture["result"]]]
    assert greeting["result"].startswith("Hello!") and greeting["status"] == 200
    time.strptime(greeting["time"], "%Y-%m-%d %H:%M:%S")
    assert set(greeting) == {"result", "history", "status", "time"}


def test_line_breaks_of_gnu_base64_may_stand_raw_in_the_json(url):
    wrapped = run("base64", CIRCLES).stdout
    assert wrapped.count("\n") > 10
    body = f'{{"image":"{wrapped}","text":"描述这张图片。","history":[],"temperature":0,"repetition_penalty":1}}'
    response = post(url, content=body, headers={"Content-Type": "application/json"})
    assert response.json()["result"].startswith(CAPTION)


def test_the_history_that_is_returned_continues_the_conversation(url):
    picture = base64.b64encode(CIRCLES.read_bytes()).decode()
    fields = {"image": picture, "temperature": 0, "repetition_penalty": 1, "min_length": 0}
    first = post(url, json={"text": "描述这张图片。", "history": [], **fields}).json()
    second = post(url, json={"text": "这张图片的背景里有什么内容？", "history": first["history"], **fields}).json()
    assert first["history"] == [["描述这张图片。", CAPTION]]
    assert second["history"] == [*first["history"], ["这张图片的背景里有什么内容？", second["result"]]]
    assert "草地" in second["result"]


def test_a_zoom_is_a_field_of_the_original_route_too(url, small_star):
    file = io.BytesIO()
    small_star.save(file, "PNG")
    fields = {"temperature": 0, "repetition_penalty": 1, "min_length": 0, "text": "What color is it?"}
    asked = {"image": base64.b64encode(file.getvalue()).decode(), **fields}
    for zoom in (True, 2):
        assert post(url, json={**asked, "zoom": zoom}).json()["result"] == "White."
    for zoom in (1.5, "x", [1]):
        refused = error_of(post(url, json={**asked, "zoom": zoom}), 422)
        assert refused["message"] == "zoom: must be true, false or a whole number of looks"
    assert "from 0 to 4" in error_of(post(url, json={**asked, "zoom": 5}), 400)["message"]
    assert "no picture to zoom into" in error_of(post(url, json={**fields, "zoom": True}), 400)["message"]


def test_the_original_route_answers_as_chat_with_its_defaults(url, loaded):
    model, tokenizer = loaded
    for text, english in (("你好", False), ("Hello", True), ("123", True)):
        expected = model.chat(
            tokenizer, text, max_length=2048, min_length=50, do_sample=False, repetition_penalty=1.2, english=english
        )[0]
        assert post(url, json={"text": text, "temperature": 0}).json()["result"] == expected


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
    assert found in error_of(post(url, content=body), status)["message"]
