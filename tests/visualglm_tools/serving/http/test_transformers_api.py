"""`transformers chat`, unmodified, in a terminal; and the two things that it asks beyond OpenAI's routes."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from transformers import GenerationConfig

from tests.commands import SECONDS
from tests.serving_helpers import HELLO, MODEL, answer_of, error_of, post, post_chat, serve
from visualglm_tools.serving.http.app import ApiOptions, LoadingEngine, create_app


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
GREETING = {"role": "user", "content": "你好"}
OPTIONS = ApiOptions(model_name=MODEL)


def config_of(**settings) -> str:
    """As the client writes it: what differs from a config that says nothing."""
    config = GenerationConfig()
    config.update(do_sample=True, max_new_tokens=256)
    config.update(**settings)
    return config.to_json_string()


def name_of(speaker: str) -> str:
    """How the client begins somebody's words, in colours."""
    colours = r"(\x1b\[[\d;]*m)*"
    return f"<{colours}{speaker}{colours}>"


@pytest.mark.slow  # seconds to import all that it has
def test_transformers_chat_talks_to_the_server(url):
    pexpect = pytest.importorskip("pexpect")
    pytest.importorskip("rich", reason="transformers chat draws with it")
    command = ["chat", MODEL, f"{url}/v1", "do_sample=False", "repetition_penalty=1.0", "--user", "me"]
    executable = Path(sys.executable).with_name("transformers")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    with pexpect.spawn(
        str(executable), command, encoding="utf-8", timeout=SECONDS, env=environment, dimensions=(40, 100)
    ) as terminal:
        terminal.expect("was already loaded")
        terminal.expect(name_of("me"))
        terminal.sendline("你好")
        terminal.expect(name_of(MODEL))
        terminal.expect(name_of("me"))
        said = ESCAPES.sub("", terminal.before)
        terminal.sendline("!exit")
        terminal.expect(pexpect.EOF)
    expected = answer_of(post_chat(url, messages=[GREETING], temperature=0, repetition_penalty=1))
    assert expected in said


def test_load_model_says_that_the_one_model_is_there(url):
    ready = post(f"{url}/load_model", json={"model": MODEL})
    assert ready.headers["content-type"].startswith("text/event-stream")
    assert json.loads(ready.text.removeprefix("data: ")) == {"status": "ready", "model": MODEL, "cached": True}
    other = json.loads(post(f"{url}/load_model", json={"model": "gpt-4o"}).text.removeprefix("data: "))
    assert other["status"] == "error" and MODEL in other["message"]
    error_of(post(f"{url}/load_model", json={}), 422)
    error_of(post(f"{url}/load_model", content=b"{"), 400)


def test_load_model_needs_the_key_and_the_model(engine):
    with serve(engine, api_key="k") as url:
        error_of(post(f"{url}/load_model", json={"model": MODEL}), 401)
    loading = LoadingEngine(lambda: engine, lambda: None)
    client = TestClient(create_app(loading, OPTIONS), base_url="http://localhost")
    assert "loaded" in error_of(client.post("/load_model", json={"model": MODEL}), 503)["message"]


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (config_of(do_sample=False, max_new_tokens=4), {"temperature": 0, "max_tokens": 4}),
        (
            config_of(temperature=1.5, top_p=0.9, top_k=7, repetition_penalty=1.1, min_new_tokens=9, max_new_tokens=12),
            {
                "temperature": 1.5,
                "top_p": 0.9,
                "top_k": 7,
                "repetition_penalty": 1.1,
                "min_tokens": 9,
                "max_tokens": 12,
            },
        ),
        (config_of(do_sample=False, stop_strings=["！"]), {"temperature": 0, "stop": "！"}),
        ({"do_sample": False, "eos_token_id": 3, "use_cache": True}, {"temperature": 0}),
    ],
    ids=["greedy", "all", "stop", "an object"],
)
def test_a_generation_config_is_what_its_settings_are(url, config, fields):
    found = post_chat(url, messages=[GREETING], seed=1, generation_config=config)
    assert answer_of(found) == answer_of(post_chat(url, messages=[GREETING], seed=1, **fields))
    assert found.json()["usage"]["completion_tokens"] <= fields.get("max_tokens", 256)


def test_a_field_of_the_request_wins_over_the_config(url):
    config = config_of(max_new_tokens=3)
    for limit, expected in ((2, 2), (None, 3)):  # null means that it was not given
        answer = post_chat(url, messages=[HELLO], max_tokens=limit, generation_config=config)
        assert answer.json()["usage"]["completion_tokens"] == expected


@pytest.mark.parametrize("config", ["{", "[]", "7", 7, "[" * 1000, '{"temperature": 5}', '{"top_p": "high"}'])
def test_a_config_that_is_none_is_refused_in_words(url, config):
    assert error_of(post_chat(url, generation_config=config), 422)["message"]
