"""OpenAI's routes over real sockets, by its official client; what cannot be honoured is refused by its name."""

import itertools

import openai
import pytest

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
    post_chat,
    sample,
    wait_until,
)


EXACT = {"temperature": 0, "extra_body": {"repetition_penalty": 1}}  # what the tiny model has learned


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_lists_the_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
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
