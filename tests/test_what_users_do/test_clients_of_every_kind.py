"""What clients of OpenAI's API, of HTTP and of browsers send, taken as it was meant or refused by its name."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.paths import PICTURES, ROOT, TINY
from tests.serving_helpers import (
    HELLO,
    MODEL,
    answer_of,
    data_uri,
    error_of,
    get,
    post,
    post_chat,
    request,
    serve,
    wait_until,
)
from visualglm_tools.serving.engine import prompts
from visualglm_tools.serving.engine.answers import Limits, QueueFull
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.picture_pool import Lane, PicturePool
from visualglm_tools.serving.engine.prompts import QUESTIONS, arrange, separate_pictures
from visualglm_tools.serving.http.api_key import check_key
from visualglm_tools.serving.http.app import ApiOptions
from visualglm_tools.serving.listening import address_of, listen


EXACT = {"temperature": 0, "repetition_penalty": 1, "max_tokens": 12}
PICTURE = data_uri(PICTURES[0].read_bytes())
IMAGE = {"type": "image_url", "image_url": {"url": PICTURE}}


def chat(url: str, messages: list | None = None, **fields) -> httpx.Response:
    return post_chat(url, **{"messages": messages or [HELLO], **EXACT, **fields})


# ------------------------------------------------------------------------------------------------ what changes nothing


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "none"},
        {"tool_choice": "auto", "tools": []},
        {"parallel_tool_calls": True},
        {"functions": [], "function_call": "none"},
        {"logprobs": False, "top_logprobs": 0},
        {"modalities": ["text"], "audio": None},
        {"service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h"},
        {"reasoning_effort": "none", "verbosity": "medium"},
        {"user": "x", "store": True, "metadata": {"a": "b"}},
        {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"n": 1, "best_of": 1, "echo": False, "use_beam_search": False, "ignore_eos": False},
        {"stop": None, "stream": False, "stream_options": None},
        {"stop": [], "seed": -1},
        {"seed": -(2**63)},
        {"top_k": -1},
        {"response_format": {"type": "text"}},
        {"prediction": {"type": "content", "content": "x"}, "web_search_options": None},
        {"min_p": 0, "length_penalty": 1.0, "stop_token_ids": []},
        {"max_completion_tokens": 12},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_fields_that_change_nothing_are_taken(url, fields):
    assert answer_of(chat(url, **fields)) == answer_of(chat(url))


@pytest.mark.parametrize(
    ("fields", "param", "found"),
    [
        ({"tool_choice": "required"}, "tool_choice", "'required'"),
        ({"tools": [{"type": "function"}]}, "tools", "never trained to call tools"),
        ({"functions": [{"name": "f"}]}, "functions", "never trained to call tools"),
        ({"stop_token_ids": [5]}, "stop_token_ids", "this model cannot do that"),
        ({"audio": {"voice": "alloy"}}, "audio", "no audio"),
        ({"top_logprobs": 30}, "top_logprobs", "found 30"),
        ({"modalities": ["text", "audio"]}, "modalities.1", "'audio'"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "'high'"),
        ({"verbosity": "low"}, "verbosity", "'low'"),
        ({"web_search_options": {}}, "web_search_options", "searches nothing"),
        ({"best_of": 4}, "best_of", "found 4"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [1]}, "stop.0", "string"),
        ({"stop": 5}, "stop", "list"),
        ({"max_tokens": 0}, "max_tokens", "found 0"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stream_options": {"include_usage": "often"}}, "stream_options.include_usage", "'often'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_field_that_cannot_be_honoured_is_refused_by_its_name_and_value(url, fields, param, found):
    error = error_of(chat(url, **fields), 422)
    assert error["param"] == param and found in error["message"]


BODIES = {
    "/": {"text": "Hello"},
    "/load_model": {"model": MODEL},
    "/tokenize": {"prompt": "Hello"},
    "/v1/chat/completions": {"model": MODEL, "messages": [HELLO]},
    "/v1/completions": {"model": MODEL, "prompt": "Hello"},
    "/v1/responses": {"model": MODEL, "input": "Hello"},
}
CHAT, COMPLETIONS, RESPONSES = list(BODIES)[3:]
ANY_JSON = {"type": "json_object"}


@pytest.mark.parametrize(
    ("path", "fields", "found"),
    [
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, "one limit with two values"),
        (CHAT, {"max_tokens": 5, "min_tokens": 6}, "min_tokens is 6, more than max_tokens, 5"),
        (CHAT, {"max_completion_tokens": 5, "min_tokens": 6}, "more than max_completion_tokens, 5"),
        (CHAT, {"response_format": ANY_JSON, "min_tokens": 6}, "ends where that is complete"),
        (COMPLETIONS, {"max_tokens": 5, "min_tokens": 6}, "more than max_tokens, 5"),
        (COMPLETIONS, {"response_format": ANY_JSON, "min_tokens": 6}, "ends where that is complete"),
        (COMPLETIONS, {"tools": [{"type": "function"}]}, "never trained to call tools"),
        (COMPLETIONS, {"zoom": True}, "only /v1/chat/completions"),
        (COMPLETIONS, {"read_text": True}, "only /v1/chat/completions"),
        (RESPONSES, {"max_output_tokens": 5, "min_tokens": 6}, "more than max_output_tokens, 5"),
        (RESPONSES, {"text": {"format": ANY_JSON}, "min_tokens": 6}, "ends where that is complete"),
        (RESPONSES, {"zoom": 2}, "only /v1/chat/completions"),
        (RESPONSES, {"read_text": True}, "only /v1/chat/completions"),
        (RESPONSES, {"n": 2}, "there is one answer"),
        (RESPONSES, {"max_tokens": 5}, "called max_output_tokens here"),
        (RESPONSES, {"max_completion_tokens": 5}, "called max_output_tokens here"),
        (RESPONSES, {"response_format": ANY_JSON}, "called text.format here"),
        (RESPONSES, {"include": ["logprobs"]}, "message.output_text.logprobs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_setting_that_another_one_or_its_route_would_drop_is_refused(url, path, fields, found):
    response = post(url + path, json={**BODIES[path], **fields})
    assert found in error_of(response, 422)["message"]


def test_two_biases_for_one_token_are_refused_unless_they_are_the_same(engine, url):
    [token_id] = engine.vocabulary.token_ids("红色")
    error = error_of(chat(url, logit_bias={"红色": 5, str(token_id): -5}), 400)
    assert (error["param"], f"'红色' and '{token_id}' mean the same token" in error["message"]) == ("logit_bias", True)
    both, one = (chat(url, logit_bias=bias) for bias in ({"红色": 5, str(token_id): 5}, {"红色": 5}))
    assert answer_of(both) == answer_of(one)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 5, "min_tokens": 5}),
        (CHAT, {"response_format": ANY_JSON, "min_tokens": 0, "max_tokens": 5}),
        (COMPLETIONS, {"suffix": "", "tools": [], "tool_choice": "none", "zoom": False, "read_text": False}),
        (RESPONSES, {"n": 1, "zoom": False, "include": ["reasoning.encrypted_content"], "max_output_tokens": 5}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_do_not_contradict_each_other_are_taken(url, path, fields):
    response = post(url + path, json={**BODIES[path], **fields})
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers


def test_every_route_names_a_field_that_it_does_not_know_and_refuses_it_where_that_was_asked_for(engine, url):
    with serve(engine, strict=True) as strict_url:
        for path, body in BODIES.items():
            response = post(url + path, json={**body, "max_lenght": 9})
            assert response.status_code == 200 and response.headers["x-ignored-fields"] == "max_lenght", path
            refused = post(strict_url + path, json={**body, "max_lenght": 9})
            assert error_of(refused, 422)["param"] == "max_lenght", path


# ------------------------------------------------------------------------------------------------ messages and parts


@pytest.mark.parametrize(
    "first",
    [
        {"role": "assistant", "content": "Hi!", "tool_calls": [], "annotations": [], "refusal": None, "audio": None},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi!"}]},
        {"role": "assistant", "content": None, "refusal": "Hi!"},
        {"role": "assistant", "refusal": "Hi!", "function_call": None},
        {"role": "assistant", "content": "Hi!", "name": "bot"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi!", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_an_answer_may_come_back_as_clients_send_it(url, first):
    plain = [HELLO, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "What colour?"}]
    assert answer_of(chat(url, [HELLO, first, plain[2]])) == answer_of(chat(url, plain))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": PICTURE},
        {"type": "image_url", "image_url": {"url": PICTURE, "detail": "high"}},
        {"type": "image_url", "image_url": {"url": PICTURE, "detail": None}},
        {**IMAGE, "cache_control": {"type": "ephemeral"}, "text": None},
    ],
)
def test_a_picture_may_be_sent_as_clients_do(url, part):
    question = {"type": "text", "text": "描述这张图片。"}
    expected = answer_of(chat(url, [{"role": "user", "content": [IMAGE, question]}]))
    assert answer_of(chat(url, [{"role": "user", "content": [part, question]}])) == expected


@pytest.mark.parametrize(
    ("message", "param", "found"),
    [
        ({"role": "user", "content": None}, "messages.0", "content is missing or null"),
        ({"role": "user"}, "messages.0", "content is missing or null"),
        ({"role": "user", "content": 5}, "messages.0.content", "a text or a list of parts, found int"),
        ({"role": "user", "content": {"text": "a"}}, "messages.0.content", "found dict"),
        ({"role": "user", "content": ["a"]}, "messages.0.content.0", "dict"),
        ({"role": "user", "content": [{"type": "video_url"}]}, "messages.0.content.0.type", "'video_url'"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages.0.content.0.type", "required"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0", "found neither"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages.0.content.0.text", "string, found 5"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0", "found neither"),
        ({"role": "user", "content": [{**IMAGE, "text": "a"}]}, "messages.0.content.0", "image_url and text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "a"}}]},
            "messages.0.content.0.image_url.url",
            "required",
        ),
        ({"role": "tool", "content": "a"}, "messages.0.role", "'tool'"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls", "this model cannot do that"),
        ("hello", "messages.0", "dict"),
    ],
)
def test_a_wrong_message_is_refused_in_words_about_what_was_meant(url, message, param, found):
    error = error_of(chat(url, [message]), 422)
    assert error["param"] == param and found in error["message"]


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_a_picture_that_is_not_the_users_is_refused_in_words(url, role):
    message = error_of(chat(url, [{"role": role, "content": [IMAGE]}, HELLO]), 400)["message"]
    assert "messages[0]" in message and "only the user's" in message


def test_half_a_character_in_a_picture_is_refused_in_words(url):
    for head, kind in (("data:;base64,", "base64"), ("data:,", "text")):
        response = post(url, content=json.dumps({"text": "a", "image": head + "\ud83d"}))
        assert f"broken {kind}" in error_of(response, 400)["message"]


def arranged(*messages: tuple[str, object], english: bool | None = None) -> list[tuple[str, str]]:
    """Roles and contents after arranging, texts joined and pictures as `#`, as the template will join them."""
    conversation, _ = separate_pictures([{"role": role, "content": content} for role, content in messages])

    def written(content) -> str:
        if isinstance(content, str):
            return content
        images = "#" * sum(part["type"] == "image" for part in content)
        return images + "\n".join(part["text"] for part in content if part["type"] == "text")

    return [(message["role"], written(message["content"])) for message in arrange(conversation, english)]


IMG = {"type": "image", "image": b"1"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "a"), ("user", "b")], [("user", "a\nb")]),
        ([("user", [IMG]), ("user", "b")], [("user", "#b")]),
        ([("user", "a"), ("user", [IMG, IMG])], [("user", "##a")]),
        (
            [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")],
            [("user", "a"), ("assistant", "b\nc"), ("user", "d")],
        ),
        ([("system", "s"), ("system", "t"), ("user", "a")], [("system", "s\nt"), ("user", "a")]),
        ([("user", "a"), ("system", "s"), ("user", "b")], [("system", "s"), ("user", "a\nb")]),
        ([("assistant", "hi"), ("user", "a")], [("user", ""), ("assistant", "hi"), ("user", "a")]),
        (
            [("system", "s"), ("assistant", "hi"), ("user", "a")],
            [("system", "s"), ("user", ""), ("assistant", "hi"), ("user", "a")],
        ),
        ([("user", [IMG])], [("user", f"#{QUESTIONS[0]}")]),
        ([("user", [IMG, {"type": "text", "text": " "}])], [("user", f"#{QUESTIONS[0]}")]),
        ([("system", "Be brief."), ("user", [IMG])], [("system", "Be brief."), ("user", f"#{QUESTIONS[1]}")]),
        (
            [("user", [IMG]), ("assistant", "一只猫。"), ("user", "what?")],
            [("user", f"#{QUESTIONS[0]}"), ("assistant", "一只猫。"), ("user", "what?")],
        ),
    ],
)
def test_a_conversation_that_openai_takes_is_arranged_for_the_model(messages, expected):
    assert arranged(*messages) == expected


def test_what_is_arranged_gets_the_answers_of_what_was_meant(url):
    alone = [{"role": "user", "content": [IMAGE]}]
    asked = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "描述这张图片。"}]}]
    assert answer_of(chat(url, alone)) == answer_of(chat(url, asked))
    apart = [*alone, {"role": "user", "content": "描述这张图片。"}]
    assert answer_of(chat(url, apart)) == answer_of(chat(url, asked))
    greeted = [{"role": "developer", "content": "a"}, {"role": "assistant", "content": "Hi!"}, HELLO]
    assert answer_of(chat(url, greeted))
    bare = PICTURE.partition(",")[2]
    legacy = post(url, json={"image": bare, "text": "", "temperature": 0, "min_length": 0}).json()
    asked = post(url, json={"image": bare, "text": "描述这张图片。", "temperature": 0, "min_length": 0}).json()
    assert legacy["result"] == asked["result"] and legacy["history"] == [["", legacy["result"]]]


# ------------------------------------------------------------------------------------------------ HTTP


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_key_may_be_written_in_any_case(engine, scheme):
    with serve(engine, api_key="k") as url:
        assert get(f"{url}/v1/models", headers={"Authorization": f"{scheme} k"}).status_code == 200
        for wrong in (f"{scheme} K", scheme, "Basic k", "k"):
            assert get(f"{url}/v1/models", headers={"Authorization": wrong}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/metrics", "/docs", "/openapi.json"])
def test_head_is_answered_as_get_without_a_body(url, path):
    head = request("HEAD", url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get(url + path).headers["content-type"]


def test_a_slash_at_the_end_changes_nothing(url):
    assert get(f"{url}/v1/models/").json()["object"] == "list"
    assert get(f"{url}/v1/models/{MODEL}/").json()["id"] == MODEL
    body = {"model": MODEL, "messages": [HELLO], **EXACT}
    assert answer_of(post(f"{url}/v1/chat/completions/", json=body)) == answer_of(chat(url))


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}]
)
def test_json_is_read_whatever_it_is_called(url, headers):
    body = json.dumps({"model": MODEL, "messages": [HELLO], **EXACT}).encode()
    assert answer_of(post(f"{url}/v1/chat/completions", content=body, headers=headers))


def test_methods_paths_and_encodings_that_are_not_there_say_so(url):
    response = get(url)
    assert error_of(response, 405) and response.headers["Allow"] == "POST"
    response = request("DELETE", f"{url}/v1/models")
    assert error_of(response, 405) and response.headers["Allow"] == "GET"
    error_of(get(f"{url}/v2"), 404)
    compressed = post(url, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert "compressed" in error_of(compressed, 415)["message"]


def test_more_choices_than_there_are_places_are_a_400_not_a_429_for_ever(loaded):
    with Engine(*loaded, Limits(max_batch_size=1, max_waiting=1)) as engine, serve(engine) as url:
        assert "at most 2" in error_of(chat(url, n=3), 400)["message"]
        assert len(chat(url, n=2).json()["choices"]) == 2


SLEEPING = """
import time
from visualglm_tools.serving.engine import picture_decoder

picture_decoder.warm_up, picture_decoder.answer = print, lambda *picture: time.sleep(1000)
picture_decoder.main()
"""


@pytest.fixture
def hanging_decoders(monkeypatch):
    """For engines that never get a picture decoded."""
    lane = Lane(decoders=1, pixels=10**6, memory=2**26, seconds=1, patience=1000, pictures=1)
    monkeypatch.setattr(prompts, "PicturePool", lambda: PicturePool([lane], [sys.executable, "-c", SLEEPING]))


def refuses(engine: Engine, requests: int = 1) -> bool:
    """Whether an engine has no place for so many."""
    try:
        engine.check_room(requests)
    except QueueFull:
        return True
    return False


def test_preparing_holds_up_nobody(loaded, hanging_decoders):
    with Engine(*loaded) as engine, serve(engine) as url, ThreadPoolExecutor() as threads:
        waiting = [threads.submit(chat, url, [{"role": "user", "content": [IMAGE]}]) for _ in range(3)]
        wait_until(lambda: refuses(engine, engine.capacity - 2))
        assert len({answer_of(chat(url)) for _ in range(3)}) == 1
        assert not any(each.done() for each in waiting)
        engine.close()
        assert {each.result().status_code for each in waiting} <= {400, 503}  # 400: whose decoder was ended with it


def test_preparing_counts_as_time_of_the_request(loaded, hanging_decoders):
    with Engine(*loaded, Limits(timeout=0.5)) as engine, serve(engine) as url:
        assert error_of(chat(url, [{"role": "user", "content": [IMAGE]}]), 504)["code"] == "timeout"
        assert not refuses(engine, engine.capacity)  # its place is free again


def test_those_that_are_being_prepared_take_places_in_the_queue(loaded, hanging_decoders):
    limits = Limits(max_batch_size=1, max_waiting=1)
    with Engine(*loaded, limits) as engine, serve(engine) as url, ThreadPoolExecutor() as threads:
        waiting = [threads.submit(chat, url, [{"role": "user", "content": [IMAGE]}]) for _ in range(2)]
        wait_until(lambda: refuses(engine))
        assert error_of(chat(url), 429)["code"] == "queue_full"
        engine.close()
        assert {each.result().status_code for each in waiting} <= {400, 503}


# ------------------------------------------------------------------------------------------------ browsers


ASKED = ("/", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize")


@pytest.mark.parametrize("path", [*ASKED, "/v1/models", "/version", "/metrics", "/docs", "/openapi.json"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8080", "Origin": "http://evil.example:8080"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost.evil.example"},
        {"Origin": "http://[::1"},
        {"Origin": ""},
    ],
    ids=str,
)
def test_a_page_of_another_origin_or_name_is_refused_where_there_is_no_key(url, path, headers):
    method = "POST" if path in ASKED else "GET"
    body = json.dumps({"text": "a", "model": MODEL, "messages": [HELLO]}).encode()
    headers = {"Content-Type": "text/plain", **headers}
    error = error_of(request(method, url + path, content=body, headers=headers), 403)
    assert error["code"] in ("origin_not_allowed", "host_not_allowed")


def test_own_pages_named_pages_and_own_names_are_not_refused(engine, url):
    port = url.rpartition(":")[2]
    for host in (
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        "LOCALHOST",
        "[::1]:80",
        "192.168.1.5",
        "box",
        "a.localhost",
    ):
        assert get(f"{url}/v1/models", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200
    assert get(f"{url}/health", headers={"Host": "probe.example"}).status_code == 200
    page = {"Origin": "https://page.example"}
    with serve(engine, cors_origins=["https://page.example"], allowed_hosts=["api.example"]) as named:
        assert get(f"{named}/v1/models", headers={**page, "Host": "api.example"}).status_code == 200
        assert get(f"{named}/v1/models", headers={"Host": "other.example"}).status_code == 403
    with serve(engine, api_key="k") as keyed:  # a page does not know the key
        headers = {"Origin": "https://evil.example", "Host": "evil.example", "Authorization": "Bearer k"}
        assert get(f"{keyed}/v1/models", headers=headers).status_code == 200


# ------------------------------------------------------------------------------------------------ starting


@pytest.mark.parametrize("key", ["", " ", "\n", "a b", "a\nb", "a\x00", "\ufeff"])
def test_a_key_that_no_client_can_send_is_refused(key):
    with pytest.raises(ValueError, match="the API key"):
        check_key(key)
    with pytest.raises(ValueError, match="the API key"):
        ApiOptions(model_name=MODEL, api_key=key)


def test_a_key_is_stripped_of_the_line_break_that_files_end_with(engine):
    with serve(engine, api_key="sk-1\n") as url:
        assert get(f"{url}/v1/models", headers={"Authorization": "Bearer sk-1"}).status_code == 200
        assert get(f"{url}/v1/models").status_code == 401


def test_a_door_that_cannot_open_says_why_in_one_line_before_it_loads_anything():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port], {}, "cannot listen"),
            (["--port", "99999"], {}, "0 to 65535"),
            (["--host", "300.1.1.1"], {}, "cannot listen"),
            (["--api-key", ""], {}, "API key is empty"),
            ([], {"VISUALGLM_API_KEY": " \n"}, "API key is empty"),
        ]
        command = [sys.executable, str(ROOT / "scripts" / "api_hf.py")]
        started = [
            subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **variables})
            for options, variables, _ in cases
        ]
        for process, (*_, found) in zip(started, cases, strict=True):
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 2 and "Traceback" not in errors and "Loading" not in errors
            [line] = [line for line in errors.splitlines() if "error:" in line]
            assert found in line


def test_a_free_port_is_one_for_all_addresses_of_a_name_and_is_said():
    sockets = listen("localhost", 0)
    ports = {each.getsockname()[1] for each in sockets}
    said = {address_of(each) for each in sockets}
    for each in sockets:
        each.close()
    assert len(ports) == 1 and said <= {f"http://{host}:{port}" for host in ("127.0.0.1", "[::1]") for port in ports}


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"stop_strings": ["的"]},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 4, "repetition_penalty": 9.0, "max_new_tokens": 2, "suppress_tokens": [7]},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 3.0, "min_length": 50, "no_repeat_ngram_size": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_in_the_folder_of_the_model_do_not_come_between(tmp_path, url, settings):
    folder = tmp_path / MODEL
    shutil.copytree(TINY, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with Engine.load(folder, device="cpu", dtype="float32") as other, serve(other) as other_url:
        assert answer_of(chat(other_url)) == answer_of(chat(url))
