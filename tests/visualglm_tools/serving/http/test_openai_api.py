"""OpenAI's routes over real sockets, by its official client; what cannot be honoured is refused by its name."""

import itertools
import json
import re
import sys
from typing import Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.paths import CIRCLES, PICTURES
from tests.picture_files import encoded
from tests.serving_helpers import (
    CAPTION,
    HELLO,
    MODEL,
    answer_of,
    ask_about,
    data_uri,
    error_of,
    is_idle,
    post,
    post_chat,
    sample,
    serve,
    wait_until,
)
from visualglm_tools.serving.http.guards import NAMED_FIELDS, told


EXACT = {"temperature": 0, "extra_body": {"repetition_penalty": 1}}  # what the tiny model has learned


def test_openai_client_lists_the_model(client):
    assert [(model.id, model.max_model_len) for model in client.models.list()] == [(MODEL, 2048)]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="visualglm-tiny"):
        client.models.retrieve("gpt-4o")


def test_openai_client_asks_about_a_picture_and_goes_on(client):
    messages = ask_about(data_uri(CIRCLES.read_bytes()))
    first = client.chat.completions.create(model=MODEL, messages=messages, **EXACT)
    assert first.choices[0].message.content == CAPTION and first.choices[0].finish_reason == "stop"
    assert first.usage.prompt_tokens > 32 and first.usage.completion_tokens > 5
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    messages += [first.choices[0].message, {"role": "user", "content": "这张图片的背景里有什么内容？"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, **EXACT)
    assert "草地" in second.choices[0].message.content


def test_a_zoom_is_a_field_of_the_request(url, small_star):
    messages = ask_about(data_uri(encoded(small_star, "PNG")), "What color is it?")
    for zoom in (True, 2):
        response = post_chat(url, messages=messages, temperature=0, repetition_penalty=1, zoom=zoom)
        assert answer_of(response) == "White."
    for zoom in (1.5, "x", [1]):
        refused = error_of(post_chat(url, messages=messages, zoom=zoom), 422)
        assert refused["message"] == "zoom: must be true, false or a whole number of looks"
    assert "from 0 to 4" in error_of(post_chat(url, messages=messages, zoom=5), 400)["message"]
    hello = [{"role": "user", "content": "Hello"}]
    assert "no picture to zoom into" in error_of(post_chat(url, messages=hello, zoom=True), 400)["message"]


def test_openai_client_streams(client):
    messages = ask_about(data_uri(CIRCLES.read_bytes()))
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **EXACT
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == CAPTION
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 5


def test_openai_client_sees_an_answer_grow(client, engine):
    options = {"temperature": 2, "extra_body": {"min_tokens": 1500}}
    with client.chat.completions.create(model=MODEL, messages=[HELLO], stream=True, **options) as stream:
        texts = (chunk.choices[0].delta.content for chunk in stream)
        assert len(list(itertools.islice(filter(None, texts), 5))) == 5
        assert sample(engine, "running") == 1  # and they came while it grew
    wait_until(lambda: is_idle(engine))


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
    hot = {"temperature": 2, "top_p": 1, "max_tokens": 20, "extra_body": {"min_tokens": 20}}
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


# ------------------------------------------------------------------------------------------------ how tokens are chosen


SCHEMA = {
    "type": "object",
    "properties": {"颜色": {"enum": ["红色", "绿色"]}, "shape": {"type": "string", "maxLength": 8}},
    "required": ["颜色", "shape"],
    "additionalProperties": False,
}


def json_of(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_an_answer_is_json_of_a_schema_streamed_or_not(client):
    asked = {"model": MODEL, "messages": ask_about(data_uri(CIRCLES.read_bytes())), "temperature": 0}
    whole = client.chat.completions.create(**asked, response_format=json_of(SCHEMA)).choices[0]
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)
    assert whole.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**asked, response_format=json_of(SCHEMA), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    cut = client.chat.completions.create(**asked, response_format=json_of(SCHEMA), max_tokens=3).choices[0]
    assert cut.finish_reason == "length" and whole.message.content.startswith(cut.message.content)
    whatever = client.chat.completions.create(
        **asked, response_format={"type": "json_object"}, max_tokens=200, stop=['":']
    )
    assert whatever.choices[0].message.content.startswith("{")


class Picture(pydantic.BaseModel):
    colour: Literal["red", "green"]
    count: Literal[1, 2, 3]


def test_openai_client_parses_an_answer_into_a_model(client):
    messages = ask_about(data_uri(CIRCLES.read_bytes()))
    found = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Picture, temperature=0)
    assert isinstance(found.choices[0].message.parsed, Picture)


def test_without_the_package_json_is_refused_with_the_remedy(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = error_of(post_chat(url, response_format={"type": "json_object"}), 422)
    assert error["param"] == "response_format" and "pip install 'visualglm-hf[json]'" in error["message"]


@pytest.mark.parametrize("more", [{}, {"stop": ["圆形"]}, {"max_tokens": 4}], ids=["whole", "stop", "length"])
def test_log_probabilities_are_told_streamed_or_not(client, more):
    asked = {"model": MODEL, "messages": ask_about(data_uri(CIRCLES.read_bytes())), "logprobs": True, **EXACT, **more}
    whole = client.chat.completions.create(**asked, top_logprobs=2).choices[0]
    told = whole.logprobs.content
    assert "".join(each.token for each in told).replace(",", "，") == whole.message.content
    assert bytes(byte for each in told for byte in each.bytes).decode() == "".join(each.token for each in told)
    for each in told:
        assert [each.token, each.logprob] == [each.top_logprobs[0].token, each.top_logprobs[0].logprob]  # greedy
        assert each.logprob >= each.top_logprobs[1].logprob
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, top_logprobs=2, stream=True)]
    parts = [choice.logprobs.content for choice in choices if choice.logprobs is not None]
    assert [each.token for part in parts for each in part] == [each.token for each in told]
    shown = ""
    for choice in choices:  # no token before its text
        shown += choice.delta.content or ""
        parts = choice.logprobs.content if choice.logprobs is not None else []
        assert choice.finish_reason or len(shown) >= len("".join(each.token for each in parts))


def test_biases_and_penalties_do_what_openai_says(client, engine):
    def create(**options) -> str:
        asked = {"model": MODEL, "messages": [HELLO], "max_tokens": 6, **EXACT, **options}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert create().startswith("Hello")
    for name in ("Hello", str(engine.vocabulary.token_ids("Hello")[-1])):
        assert not create(logit_bias={name: -100}).startswith("Hello")
    assert create(logit_bias={"红色": 100}) == "红色" * 6
    assert create(logit_bias={"红色": 100}, frequency_penalty=2, presence_penalty=2) == "红色" * 6
    assert create(logit_bias={"红色": 15}, presence_penalty=2).count("红色") < 6


# ------------------------------------------------------------------------------------------------ unknown fields


def test_unknown_fields_are_ignored_and_named_in_a_header(url):
    exact = {"temperature": 0, "repetition_penalty": 1}
    known = post_chat(url, **exact)
    assert "x-ignored-fields" not in known.headers
    messages = [{**HELLO, "content": [{"type": "text", "text": "Hello", "lang": "en"}], "reasoning": None}]
    response = post_chat(url, **exact, messages=messages, web=1, stream_options={"a": 1})
    assert answer_of(response) == answer_of(known)
    named = response.headers["x-ignored-fields"].split(", ")
    assert sorted(named) == ["messages[].content[].lang", "messages[].reasoning", "stream_options.a", "web"]
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body_of(stream=True, web=1)) as stream:
        assert stream.headers["x-ignored-fields"] == "web"
    wrong = post_chat(url, web=1, temperature=0, messages=[{"role": "user", "content": " "}])
    assert error_of(wrong, 400) and wrong.headers["x-ignored-fields"] == "web"


def body_of(**fields) -> dict:
    return {"model": MODEL, "messages": [HELLO], "max_tokens": 2, **fields}


def test_names_of_strangers_make_no_header_of_their_own(url):
    names = ["a\r\nX-Evil: 1", "é, b", "x" * 1000, *(f"f{index}" for index in range(40))]
    response = post_chat(url, max_tokens=1, **dict.fromkeys(names, 1))
    header = response.headers["x-ignored-fields"]
    assert "x-evil" not in response.headers and header.isascii() and len(header) < 400
    assert header.startswith("a%0D%0AX-Evil%3A%201, %C3%A9%2C%20b, xxx") and header.endswith("(23 more)")


def test_a_field_without_a_name_is_named_too(url):
    assert post_chat(url, max_tokens=1, **{"0": 1, "": 1}).headers["x-ignored-fields"] == '0, ""'
    assert post_chat(url, max_tokens=1, **{"": 1}).headers["x-ignored-fields"] == '""'


@given(st.lists(st.text(max_size=100), min_size=1, max_size=30, unique=True))
def test_names_of_any_letters_make_a_header_that_may_be_sent(names):
    value = told(names)
    assert re.fullmatch(rb"[!-~]+( [!-~]+)*", value)  # RFC 9110, 5.5: no blank at either end
    assert len(value.split(b", ")) == min(len(names), NAMED_FIELDS + 1)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [HELLO]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
    ],
)
def test_a_strict_server_refuses_unknown_fields(engine, path, fields):
    with serve(engine, strict=True) as url:
        asked = {"model": MODEL, **fields}
        error = error_of(post(url + path, json={**asked, "web": 1}), 422)
        assert error["param"] == "web" and "--strict" in error["message"]
        assert post(url + path, json=asked).status_code == 200


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
        ({"presence_penalty": 2.5}, 422, "presence_penalty"),
        ({"tools": [{"type": "function"}]}, 422, "tools"),
        ({"guided_json": {}}, 422, "guided_json"),
        ({"bad_words": ["a"]}, 422, "bad_words"),
        ({"zoom": "x"}, 422, "zoom"),
        ({"response_format": {"type": "xml"}}, 422, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, 422, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, 422, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, 422, "response_format"),
        ({"response_format": json_of({"type": "objekt"})}, 422, "response_format"),
        ({"response_format": json_of({"$ref": "file:///etc/passwd"})}, 422, "response_format"),
        ({"top_logprobs": 2}, 422, None),
        ({"logprobs": True, "top_logprobs": 21}, 422, "top_logprobs"),
        ({"logit_bias": {"zzzzqqq": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"5": 101}}, 422, "logit_bias"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(url, fields, status, param):
    found = error_of(post_chat(url, **fields), status)["param"]
    assert found is None if param is None else found.startswith(param)
