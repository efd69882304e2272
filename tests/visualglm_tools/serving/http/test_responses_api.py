"""`/v1/responses` by OpenAI's client: text and pictures in, events by their names, and nothing that would be stored."""

import json

import pytest

from tests.paths import CIRCLES
from tests.serving_helpers import CAPTION, HELLO, MODEL, answer_of, data_uri, error_of, post, post_chat


EXACT = {"temperature": 0, "extra_body": {"repetition_penalty": 1}}  # what the tiny model has learned


FILE = {"type": "input_image", "image_url": "/etc/passwd"}


def about_picture() -> list[dict]:
    picture = {"type": "input_image", "image_url": data_uri(CIRCLES.read_bytes()), "detail": "auto"}
    return [{"role": "user", "content": [picture, {"type": "input_text", "text": "描述这张图片。"}]}]


def test_a_picture_is_described_and_the_conversation_goes_on(client):
    first = client.responses.create(model=MODEL, input=about_picture(), store=False, metadata={"a": "b"}, **EXACT)
    assert (first.output_text, first.status, first.metadata) == (CAPTION, "completed", {"a": "b"})
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    messages = [*about_picture(), *first.output, {"role": "user", "content": "这张图片的背景里有什么内容？"}]
    second = client.responses.create(model=MODEL, input=messages, **EXACT)
    assert "草地" in second.output_text


def test_instructions_are_a_system_message(url, client):
    found = client.responses.create(model=MODEL, input="Hello", instructions="Be brief.", **EXACT).output_text
    messages = [{"role": "system", "content": "Be brief."}, HELLO]
    assert found == answer_of(post_chat(url, messages=messages, temperature=0, repetition_penalty=1))


def test_an_answer_that_a_limit_has_cut_is_incomplete(client):
    found = client.responses.create(model=MODEL, input="Hello", max_output_tokens=2, **EXACT)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.output_tokens == 2
    events = list(client.responses.create(model=MODEL, input="Hello", max_output_tokens=2, stream=True, **EXACT))
    assert events[-1].type == "response.incomplete"


def test_events_have_openais_names_and_numbers_and_add_up(client):
    events = list(client.responses.create(model=MODEL, input=about_picture(), stream=True, **EXACT))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(names[4:-4]) == {"output_text.delta"} and len(names) > 12
    assert "".join(event.delta for event in events[4:-4]) == CAPTION == events[-4].text
    whole = events[-1].response
    assert whole.output_text == CAPTION and whole.usage.output_tokens > 5 and whole.id == events[0].response.id
    with client.responses.stream(model=MODEL, input=about_picture(), **EXACT) as stream:
        assert stream.get_final_response().output_text == CAPTION


def test_log_probabilities_are_told_on_demand(client):
    asked = {"model": MODEL, "input": "Hello", "include": ["message.output_text.logprobs"], "top_logprobs": 2, **EXACT}
    [part] = client.responses.create(**asked).output[0].content
    assert "".join(each.token for each in part.logprobs) == part.text
    assert all(len(each.top_logprobs) == 2 for each in part.logprobs)
    events = list(client.responses.create(**asked, stream=True))
    deltas = [each for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    assert [each.token for each in deltas] == [each.token for each in part.logprobs]
    assert not client.responses.create(model=MODEL, input="Hello", **EXACT).output[0].content[0].logprobs


def test_an_answer_may_have_to_be_json(client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    found = client.responses.create(model=MODEL, input=about_picture(), text=text, temperature=0)
    assert json.loads(found.output_text)["n"] in (1, 2)


@pytest.mark.parametrize(
    ("fields", "status", "param", "found"),
    [
        ({"model": "gpt-4o"}, 404, "model", "no model"),
        # It is told back, so it is what OpenAI's is: texts that have a form in UTF-8, of a length, and not many.
        ({"metadata": {"a": "\ud83d"}}, 422, "metadata.a", "unicode"),
        ({"metadata": {"\ud83d": "a"}}, 422, None, "unicode"),
        ({"metadata": {"a": "\ud83d"}, "stream": True}, 422, "metadata.a", "unicode"),
        ({"metadata": {"a": {"b": "c"}}}, 422, "metadata.a", "string"),
        ({"metadata": {"a": 1}}, 422, "metadata.a", "string"),
        ({"metadata": {"a": "b" * 513}}, 422, "metadata.a", "at most 512"),
        ({"metadata": {"a" * 65: "b"}}, 422, None, "at most 64"),
        ({"metadata": {str(number): "a" for number in range(17)}}, 422, "metadata", "at most 16"),
        ({"store": True}, 422, "store", "stores nothing"),
        ({"previous_response_id": "resp_1"}, 422, "previous_response_id", "stores nothing"),
        ({"conversation": "conv_1"}, 422, "conversation", "stores nothing"),
        ({"prompt": {"id": "a"}}, 422, "prompt", "stores nothing"),
        ({"tools": [{"type": "web_search"}]}, 422, "tools", "never trained"),
        ({"background": True}, 422, "background", "False"),
        ({"truncation": "auto"}, 422, "truncation", "'auto'"),
        ({"reasoning": {"effort": "high"}}, 422, "reasoning.effort", "'high'"),
        ({"input": []}, 422, "input", "at least 1"),
        ({"input": 5}, 422, "input", "a text or a list of messages"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, 422, "input.0.content.0.type", "file"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, 422, "input.0.content.0", "has text"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 422, "input.0.type", "function_call"),
        ({"input": about_picture(), "top_logprobs": 21}, 422, "top_logprobs", "found 21"),
        ({"input": [{"role": "user", "content": " "}]}, 400, None, "empty"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 422, "text.format", "belongs to"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}]},
            400,
            None,
            "",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            422,
            "input.0.content.0.file_id",
            "no files",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(url, fields, status, param, found):
    body = json.dumps({"model": MODEL, "input": "a", **fields})  # httpx's own has no half surrogate pairs
    error = error_of(post(f"{url}/v1/responses", content=body), status)
    assert found in error["message"] and (param is None or error["param"] == param)
