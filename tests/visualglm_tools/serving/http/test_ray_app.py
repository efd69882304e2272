"""Two replicas behind Ray Serve, started as users start them."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.commands import SECONDS
from tests.commands import serve as serve_command
from tests.paths import PICTURES, ROOT
from tests.serving_helpers import free_port, health, wait_until
from tests.visualglm_tools.serving.http import test_app, test_openai_api, test_transformers_api
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.http.settings import api_of, limits_of


pytest.importorskip("ray.serve", reason="needs pip install 'visualglm-hf[ray]'")

pytestmark = pytest.mark.slow  # Ray takes most of a minute to start
COLOURS = {"circles": "红色", "star": "黄色", "triangles": "橙色"}


SERVE_RUN = ["serve", "run", "visualglm_tools.serving.http.ray_app:create_service", "min_replicas=2", "max_replicas=2"]
SERVE_RUN += ["device=cpu", "cpus_per_replica=0.5"]
TOO_SLOW, AGAIN = "node timed out during startup", 2  # Ray gives its own processes 30 s: a busy machine is no failure
OURS = ["visualglm", "serve", "--ray", "--replicas", "2", "--device", "cpu", "--cpus-per-replica", "0.5"]


def start(command: list[str], environment: dict[str, str], url: str, log: Path) -> subprocess.Popen:
    """The process, once it answers or has ended."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    wait_until(lambda: health(url) == 200 or process.poll() is not None)
    return process


@pytest.fixture(scope="module", params=[OURS, SERVE_RUN], ids=["visualglm serve --ray", "serve run"])
def service(request):
    """The address of two replicas, and Ray's log."""
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    name, *options = request.param
    command = [str(Path(sys.executable).parent / name), *options]
    port = 8000  # where Ray Serve is unless a configuration file says another place
    if name == "visualglm":
        port = free_port()
        command = [sys.executable, "-m", "visualglm_tools", *options, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": temporary}
    url, log = f"http://127.0.0.1:{port}", Path(temporary, "log")
    process = start(command, environment, url, log)
    for _ in range(AGAIN):
        if process.poll() is not None and TOO_SLOW in log.read_text():
            process = start(command, environment, url, log)
    try:
        assert process.poll() is None, log.read_text()[-3000:]
        yield url, log
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def url(service) -> str:
    """In the place of the shared API's address: tests of that are asked of the replicas, too."""
    return service[0]


test_models = test_openai_api.test_openai_client_lists_the_model
test_chat = test_openai_api.test_openai_client_asks_about_a_picture_and_goes_on
test_stream = test_openai_api.test_openai_client_streams
test_streams = test_openai_api.test_openai_client_streams_several_choices
test_settings = test_openai_api.test_max_tokens_stop_and_seed_do_what_openai_says
test_errors = test_openai_api.test_what_cannot_be_honoured_is_refused_by_name
test_metrics = test_app.test_metrics_are_prometheus_text
test_load_model = test_transformers_api.test_load_model_says_that_the_one_model_is_there


def ask(url: str, path: Path) -> str:
    body = {"image": base64.b64encode(path.read_bytes()).decode(), "text": "描述这张图片。", "history": []}
    request = urllib.request.Request(url, json.dumps(body | {"min_length": 0}).encode())
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["result"]


def test_two_replicas_answer_as_one_server(service):
    url, _ = service
    with ThreadPoolExecutor(12) as pool:
        paths = PICTURES * 8
        answers = list(pool.map(lambda path: ask(url, path), paths))
    for path, answer in zip(paths, answers, strict=True):
        [colour] = [colour for shape, colour in COLOURS.items() if shape in path.name]
        assert colour in answer
    # Each replica counts its own, and /metrics is answered by either.
    counted = {prompt_tokens(url) for _ in range(30)}
    assert len(counted) == 2 and 0 not in counted


def prompt_tokens(url: str) -> float:
    with urllib.request.urlopen(url + "/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("visualglm_prompt_tokens_total"))


def test_answers_stream_through_ray(service):
    url, _ = service
    body = {"model": "visualglm-tiny", "stream": True, "messages": [{"role": "user", "content": "你好"}]}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        events = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    texts = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert sum(map(bool, texts)) > 1 and "你好" in "".join(texts)


def test_more_replicas_at_least_than_at_most_are_refused():
    from visualglm_tools.serving.http.ray_app import create_service

    with pytest.raises(ValueError, match="min_replicas=3"):
        create_service({"min_replicas": "3", "max_replicas": 2})
    with pytest.raises(ValueError, match="there is no option 'max_replica'"):
        create_service({"max_replica": "2"})
    with pytest.raises(ValueError, match="quant: must be one of 8, 4, found 3"):
        create_service({"quant": "3"})


def test_a_replica_takes_on_what_the_options_say(monkeypatch):
    """Those of `visualglm serve` reach the engines and the API: none is dropped on the way."""
    from visualglm_tools.serving.http import ray_app

    served = []
    monkeypatch.setattr(ray_app, "serve_replicas", lambda *found: served.append(found) or 0)
    words = ["--ray", "--replicas", "3", "--max-pictures", "2", "--timeout", "9", "--cors-origin", "https://a.example"]
    assert serve_command(*words, "--max-body-mib", "1", "--drain-seconds", "7", "--port", "0", "--api-key", "k") == 0
    [(options, key, host, port)] = served
    assert (key, host, options.min_replicas, options.max_replicas) == ("k", "127.0.0.1", 3, 3) and port > 0
    assert limits_of(options) == Limits(max_pictures=2, timeout=9)
    api = api_of(options, key, host)
    assert (api.cors_origins, api.max_body_bytes, api.api_key) == (("https://a.example",), 2**20, "k")
    assert options.drain_seconds == 7
