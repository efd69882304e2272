"""Real servers for tests: the application in a thread of this process, or the door in a process of its own; and what
is asked of them. The engine that most tests share, and the address of the API on it, are fixtures in `conftest.py`.
"""

import base64
import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import uvicorn

from tests.commands import SECONDS
from tests.paths import SCRIPTS, TINY
from visualglm_tools.serving.engine.answers import Answer, Completion
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.prompts import Prompt
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http.app import ApiOptions, create_app


MODEL = TINY.name
CAPTION = "图片中有两个红色的圆形，背景是草地。"  # what the tiny model says about `CIRCLES`, asked to describe it
HELLO = {"role": "user", "content": "Hello"}
ENDLESS = {"temperature": 2, "top_p": 1, "top_k": 0, "seed": 1, "min_length": 1500}  # goes on until it is stopped


# Of httpx, which would wait for 5 seconds.
get, post, request = (partial(ask, timeout=SECONDS) for ask in (httpx.get, httpx.post, httpx.request))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextlib.contextmanager
def serve(engine, **options) -> Iterator[str]:
    """The application on `engine` in a thread; yields its address."""
    app = create_app(lambda: engine, ApiOptions(**{"model_name": MODEL, **options}))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def open_door(*options: str, script: str = "api_hf.py") -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """A server of `scripts/` in a process; yields its address as soon as it listens, the process, its log."""
    port = free_port()
    command = [sys.executable, str(SCRIPTS / script), "--port", str(port), "--device", "cpu", *options]
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+") as log:  # a pipe that nobody reads would fill up and stop the server
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: health(url) is not None or process.poll() is not None)
            yield url, process, Path(log.name)
        finally:
            process.kill()
            process.wait()


def health(url: str) -> int | None:
    """The status of `GET /health`; None if nobody listens."""
    try:
        with urllib.request.urlopen(url + "/health", timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


class EngineByHand:
    """Answers "one" and waits to be cancelled."""

    def check_room(self) -> None:
        pass

    def prepare(self, messages: list[dict], **looking) -> Prompt:
        return Prompt((0,))

    def submit(self, prompt: Prompt, settings: Settings) -> Answer:
        answer = Answer(prompt, settings, 60, self.cancel)
        answer.publish("one")
        return answer

    def cancel(self, answer: Answer) -> None:
        if not answer.future.done():
            answer.finish(Completion(answer.text, "cancelled", 1, 1))


def sample(engine: Engine, name: str, **labels: str) -> float:
    """A number among an engine's metrics."""
    return engine.metrics.registry.get_sample_value(f"visualglm_{name}", labels) or 0


def is_idle(engine: Engine) -> bool:
    return sample(engine, "running") == sample(engine, "queue_length") == 0


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask_about(picture: str, text: str = "描述这张图片。") -> list[dict]:
    """Messages with a question about the picture at an address."""
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": picture}}]
    return [{"role": "user", "content": parts}]


def post_chat(url: str, **fields) -> httpx.Response:
    """What OpenAI's route answers to `fields`; without any, to a greeting."""
    body = {"model": MODEL, "messages": [HELLO], **fields}
    return post(f"{url}/v1/chat/completions", json=body)


def nested_schema(depth: int) -> dict:
    """A JSON schema of lists in lists."""
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def answer_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def error_of(response: httpx.Response, status: int) -> dict:
    """The error of a response, after a check of its status and of OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error
