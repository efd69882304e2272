"""`/tokenize` and `/version`: what a conversation costs before it is asked, and which release answers."""

import json
from importlib.metadata import version

import pytest

from tests.paths import CIRCLES
from tests.serving_helpers import HELLO, MODEL, ask_about, data_uri, error_of, get, post, post_chat


def tokenize(url: str, **fields):
    return post(f"{url}/tokenize", json=fields)


def test_the_tokens_of_a_text_are_the_tokenizers(url, loaded):
    tokenizer = loaded[1]
    for text in ("你好", "Hello  there\n\tx", "[gMASK]<sop>"):
        found = tokenize(url, prompt=text, add_special_tokens=False, return_token_strs=True).json()
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert found["tokens"] == expected and found["count"] == len(expected)
        assert found["token_strs"] == tokenizer.convert_ids_to_tokens(expected)
        assert found["max_model_len"] == 2048
        context = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        assert tokenize(url, prompt=text).json()["tokens"] == [*expected, *context]


@pytest.mark.parametrize("messages", [[HELLO], ask_about(data_uri(CIRCLES.read_bytes()))], ids=["text", "picture"])
def test_a_conversation_has_as_many_tokens_as_its_answer_says(url, messages):
    asked = post_chat(url, messages=messages, max_tokens=1).json()
    found = tokenize(url, model=MODEL, messages=messages).json()
    assert found["count"] == len(found["tokens"]) == asked["usage"]["prompt_tokens"]
    assert found["token_strs"] is None


def test_a_text_longer_than_the_context_is_still_counted(url):
    assert tokenize(url, prompt="a，" * 1500).json()["count"] > 2048


@pytest.mark.parametrize(
    ("fields", "status", "found"),
    [
        ({}, 422, "a prompt, or messages"),
        ({"prompt": "a", "messages": [HELLO]}, 422, "not both"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": "\ufffc"}, 400, "reserved"),
        ({"prompt": "好" * 100_000}, 400, "at least"),
        ({"prompt": "a", "model": "gpt-4o"}, 404, "no model"),
        ({"messages": ask_about("http://example.com/a.png")}, 400, "fetches no pictures"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_in_words(url, fields, status, found):
    response = post(f"{url}/tokenize", content=json.dumps(fields).encode())
    assert found in error_of(response, status)["message"]


def test_the_version_is_that_of_the_package(url):
    assert get(f"{url}/version").json() == {"version": version("visualglm-hf")}
