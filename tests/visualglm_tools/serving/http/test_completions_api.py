"""`/v1/completions` by OpenAI's client: a text as it stands, several of them, streams, and what is refused."""

import json

import httpx
import pytest

from tests.commands import SECONDS
from tests.serving_helpers import MODEL, error_of, post


EXACT = {"temperature": 0, "extra_body": {"repetition_penalty": 1}}  # what the tiny model has learned
QUESTIONS = ["问：你好\n答：", "Q:Hello\nA:"]  # as the chat template writes them
ANSWERS = ["你好!请给我一张图片。", "Hello! Please give me a picture."]  # before the clean-up of `chat`


def test_a_text_is_answered_as_it_stands_without_clean_up(client):
    found = client.completions.create(model=MODEL, prompt=QUESTIONS[0], max_tokens=100, **EXACT)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (ANSWERS[0], "stop")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    default = client.completions.create(model=MODEL, prompt="a", temperature=0, extra_body={"min_tokens": 30})
    assert (default.usage.completion_tokens, default.choices[0].finish_reason) == (16, "length")


def test_several_texts_have_n_answers_each_in_their_order(client):
    found = client.completions.create(model=MODEL, prompt=QUESTIONS, n=2, max_tokens=100, **EXACT)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [ANSWERS[0]] * 2 + [ANSWERS[1]] * 2
    alone = [client.completions.create(model=MODEL, prompt=each, max_tokens=1).usage for each in QUESTIONS]
    assert found.usage.prompt_tokens == sum(each.prompt_tokens for each in alone)


def test_streams_and_echoes_add_up_to_the_answers(client):
    for echo in (False, True):
        stream = client.completions.create(
            model=MODEL,
            prompt=QUESTIONS,
            max_tokens=100,
            echo=echo,
            stream=True,
            stream_options={"include_usage": True},
            **EXACT,
        )
        texts, reasons, spent = ["", ""], {}, None
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason
            spent = chunk.usage or spent
        begins = QUESTIONS if echo else ["", ""]
        assert texts == [begin + answer for begin, answer in zip(begins, ANSWERS, strict=True)]
        assert reasons == {0: "stop", 1: "stop"} and spent.completion_tokens > 10
    whole = client.completions.create(model=MODEL, prompt=QUESTIONS[0], max_tokens=100, echo=True, **EXACT)
    assert whole.choices[0].text == QUESTIONS[0] + ANSWERS[0]


def test_an_event_is_one_line_to_clients_that_split_at_every_line_break_of_unicode(url):
    prompt = "a\u2028b\u2029c\x85d\r\ne\x0b\x0c\x1c\x1d\x1ef"
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "echo": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == prompt


def test_log_probabilities_are_lists_streamed_or_not(client):
    asked = {"model": MODEL, "prompt": QUESTIONS[1], "max_tokens": 100, "logprobs": 2, **EXACT}
    whole = client.completions.create(**asked).choices[0]
    told = whole.logprobs
    assert "".join(told.tokens) == whole.text == ANSWERS[1]
    for offset, token, logprob, top in zip(
        told.text_offset, told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert whole.text[offset:].startswith(token)
        assert top[token] == pytest.approx(logprob) and len(top) == 2  # greedy: the likeliest
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    parts = [part for part in parts if part is not None]
    assert [token for part in parts for token in part.tokens] == told.tokens
    assert [offset for part in parts for offset in part.text_offset] == told.text_offset
    assert [each for part in parts for each in part.token_logprobs] == pytest.approx(told.token_logprobs)


def test_a_completion_may_have_to_be_json(client):
    pytest.importorskip("llguidance")
    asked = {"json_schema": {"schema": {"enum": ["红,色", "a"]}}, "type": "json_schema"}
    found = client.completions.create(
        model=MODEL, prompt="a", temperature=0, max_tokens=50, extra_body={"response_format": asked}
    )
    assert json.loads(found.choices[0].text) in ("红,色", "a")


@pytest.mark.parametrize(
    ("fields", "status", "param", "found"),
    [
        ({"model": "gpt-4o"}, 404, "model", "no model"),
        ({"prompt": ""}, 400, None, "empty"),
        ({"prompt": []}, 422, "prompt", "at least 1"),
        ({"prompt": [1, 2]}, 422, "prompt", "token ids are not taken"),
        ({"prompt": [[1, 2]]}, 422, "prompt", "token ids are not taken"),
        ({"prompt": {"text": "a"}}, 422, "prompt", "a text or a list of texts"),
        ({"prompt": "\ufffc"}, 400, None, "reserved"),
        ({"prompt": "好" * 5000}, 400, None, "tokens long"),
        ({"prompt": ["a"] * 3000}, 422, "prompt", "entries"),
        ({"prompt": ["a"] * 1000}, 400, "prompt", "at most"),
        ({"n": 99}, 400, "n", "at most"),
        ({"suffix": "b"}, 422, "suffix", "between two texts"),
        ({"echo": True, "logprobs": 1}, 422, None, "do not go together"),
        ({"logprobs": 6}, 422, "logprobs", "found 6"),
        ({"best_of": 2}, 422, "best_of", "found 2"),
        ({"max_tokens": 0}, 422, "max_tokens", "found 0"),
        ({"logit_bias": {"zzzzqqq": 1}}, 400, "logit_bias", "not exactly one token"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(url, fields, status, param, found):
    error = error_of(post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "a", **fields}), status)
    assert error["param"] == param and found in error["message"]
