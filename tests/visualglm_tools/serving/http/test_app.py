"""What holds for all routes: keys, other origins, a full queue, clients that leave, time that is up, metrics."""

import http.client
import json
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.commands import run
from tests.paths import CIRCLES
from tests.serving_helpers import (
    ENDLESS,
    HELLO,
    MODEL,
    ask_about,
    data_uri,
    error_of,
    get,
    health,
    is_idle,
    post,
    post_chat,
    request,
    sample,
    serve,
    wait_until,
)
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http.app import ApiOptions


def test_a_key_is_demanded_everywhere_but_for_health(engine):
    with serve(engine, api_key="sésame") as url:
        for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sésame".encode()}):
            for method, path in (
                ("POST", "/"),
                ("POST", "/v1/chat/completions"),
                ("POST", "/v1/completions"),
                ("POST", "/v1/responses"),
                ("POST", "/tokenize"),
                ("GET", "/v1/models"),
                ("GET", "/version"),
                ("GET", "/metrics"),
            ):
                response = request(method, url + path, headers=wrong)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        assert get(f"{url}/health").status_code == 200
        right = {"Authorization": "Bearer sésame".encode()}
        assert get(f"{url}/v1/models", headers=right).status_code == 200


@pytest.mark.parametrize("name", ["", "a\udcff", "a\nb", "\x1b[31m", "a\u2028"])
def test_a_name_of_the_model_that_no_client_could_read_or_write_is_refused_before_it_is_served(name):
    with pytest.raises(ValueError, match="--served-model-name"):
        ApiOptions(model_name=name)


@pytest.mark.parametrize("name", ["图 é", "org/model", "a%2Fb?c#d"])
def test_a_model_of_any_other_name_is_found_by_it(engine, name):
    with serve(engine, model_name=name) as url:
        [model] = get(f"{url}/v1/models").json()["data"]
        assert get(f"{url}/v1/models/{quote(name)}").json() == model
        assert model["id"] == name == get(f"{url}/health").json()["model"]
        assert post_chat(url, model=name, max_tokens=1).json()["model"] == name


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 405), ("GET", "/v1", 404), ("POST", "/v1/embeddings", 404), ("GET", "/v1/chat/completions", 405)],
)
def test_who_asks_where_nothing_is_learns_where_to_look(url, method, path, status):
    message = error_of(request(method, f"{url}{path}", json={}), status)["message"]
    assert message == f"{method} {path} is none of the routes here; GET /docs shows them."
    assert get(f"{url}/docs").status_code == 200


def test_cors_is_off_unless_asked_for(engine, url):
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert (
        "access-control-allow-origin" not in request("OPTIONS", f"{url}/v1/chat/completions", headers=headers).headers
    )
    assert "access-control-allow-origin" not in get(f"{url}/health", headers=headers).headers
    with serve(engine, cors_origins=["https://page.example"], api_key="k") as url:
        response = request("OPTIONS", f"{url}/v1/chat/completions", headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        other = get(f"{url}/health", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_is_a_429_at_once_with_retry_after(loaded):
    with Engine(*loaded, Limits(max_batch_size=1, max_waiting=1)) as engine, serve(engine) as url:
        prompt = engine.prepare([{"role": "user", "content": "a"}])
        answers = engine.submit_all(prompt, [Settings(**ENDLESS)] * 2)
        response = post_chat(url, messages=ask_about(data_uri(CIRCLES.read_bytes())))
        assert not any(answer.future.done() for answer in answers)  # it did not wait for them
        assert error_of(response, 429)["code"] == "queue_full"
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        for answer in answers:
            answer.cancel()
        wait_until(lambda: all(answer.future.done() for answer in answers))
        assert post_chat(url, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": MODEL, "messages": [HELLO], "stream": True, "min_tokens": 1500}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [HELLO], "min_tokens": 1500}),
        ("/", {"text": "a", **ENDLESS}),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "min_tokens": 1500, "max_tokens": 2000}),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "min_tokens": 1500, "max_tokens": 2000, "stream": True}),
        ("/v1/responses", {"model": MODEL, "input": "a", "min_tokens": 1500}),
        ("/v1/responses", {"model": MODEL, "input": "a", "min_tokens": 1500, "stream": True}),
    ],
    ids=[
        *("stream", "answer", "the original's route"),
        *("completion", "stream of a completion", "response", "events of a response"),
    ],
)
def test_when_the_client_leaves_the_model_stops(engine, url, path, body):
    cancelled = sample(engine, "requests_total", outcome="cancelled")
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: sample(engine, "running") == 1)
    connection.close()
    wait_until(lambda: sample(engine, "requests_total", outcome="cancelled") == cancelled + 1)
    assert is_idle(engine)


def test_an_answer_that_takes_too_long_is_a_504(loaded):
    with Engine(*loaded, Limits(timeout=0.2)) as engine, serve(engine) as url:
        assert error_of(post(url, json={"text": "a", **ENDLESS}), 504)["code"] == "timeout"
        streamed = post_chat(url, stream=True, min_tokens=1500).text
        assert '"code": "timeout"' in streamed.splitlines()[-2] and "[DONE]" not in streamed


def test_metrics_are_prometheus_text(url):
    post_chat(url, max_tokens=2)
    text = get(f"{url}/metrics").text
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


# Whatever the OpenAPI schema allows, and what it just forbids: documented answers, and never a 5xx

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def short_url(loaded):
    with Engine(*loaded, Limits(max_new_tokens=8)) as engine, serve(engine) as url:
        yield url


@pytest.fixture
def schema_file(short_url, tmp_path) -> Path:
    """The server's schema with the name of its model, without which nearly all requests would be a 404."""
    schema = get(f"{short_url}/openapi.json").json()
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest", "TokenizeRequest"):
        schema["components"]["schemas"][name]["properties"]["model"] = {"const": MODEL}
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(schema), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("examples", "phases"),
    [(5, "fuzzing"), pytest.param(300, "examples,coverage,fuzzing,stateful", marks=pytest.mark.slow)],
)
def test_no_request_that_schemathesis_invents_fails_the_server(short_url, schema_file, examples, phases):
    schemathesis = Path(sys.executable).with_name("schemathesis")
    options = ("--url", short_url, "--seed", 1, "--checks", CHECKS, "--max-examples", examples, "--phases", phases)
    options += ("--suppress-health-check", "all", "--request-timeout", 120)  # a busy machine is no failure
    finished = run(schemathesis, "run", schema_file, *options, cwd=schema_file.parent, timeout=1800)
    assert "10 selected / 10 total" in finished.stdout
    assert get(f"{short_url}/health").status_code == 200
