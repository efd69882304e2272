"""Real servers for tests: the application in a thread of this process, or the door in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from tests.paths import ROOT
from visualglm_tools.serving.http.app import ApiOptions, create_app


SECONDS = 120  # until a busy machine has loaded the tiny model


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
    app = create_app(lambda: engine, ApiOptions(model_name="visualglm-tiny", **options))
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
    command = [sys.executable, str(ROOT / "scripts" / script), "--port", str(port), "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+") as log:  # a pipe that nobody reads would fill up and stop the server
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_until(lambda: health(url) is not None or process.poll() is not None)
            yield url, process, Path(log.name)
        finally:
            process.kill()
            process.wait()


def health(url: str) -> int | None:
    """The status of `GET /health`; None if nobody listens."""
    try:
        with urllib.request.urlopen(url + "/health", timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
