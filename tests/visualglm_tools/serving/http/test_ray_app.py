"""Two replicas behind Ray Serve, started as users start them."""

import base64
import contextlib
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

from tests.paths import PICTURES, ROOT
from tests.serving_helpers import health, wait_until


pytest.importorskip("ray.serve", reason="needs pip install 'visualglm-hf[ray]'")

pytestmark = pytest.mark.slow  # Ray takes most of a minute to start
COLOURS = {"circles": "红色", "star": "黄色", "triangles": "橙色"}


@pytest.fixture(scope="module")
def service():
    """The address of two replicas, and Ray's log."""
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    options = ["min_replicas=2", "max_replicas=2", "device=cpu", "cpus_per_replica=0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": temporary}
    serve = Path(sys.executable).parent / "serve"
    with open(Path(temporary, "log"), "w") as log:
        process = subprocess.Popen(
            [str(serve), "run", "visualglm_tools.serving.http.ray_app:create_service", *options],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        url = "http://127.0.0.1:8000"  # where Ray Serve is unless a configuration file says another place
        wait_until(lambda: health(url) == 200 or process.poll() is not None, 180)
        assert process.poll() is None, Path(log.name).read_text()[-3000:]
        yield url, Path(log.name)
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


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
