"""The files of `examples/deployment`: nginx with its own configuration, and what the others say of our command."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess

import httpx
import pytest

from tests.commands import SECONDS
from tests.paths import ROOT
from tests.serving_helpers import HELLO, MODEL, free_port, is_idle, sample, wait_until
from visualglm_tools.__main__ import open_command


DEPLOYMENT = ROOT / "examples" / "deployment"
MIB = 2**20


def read_command(words: list[str]):
    """Our command's options, as its parser reads them."""
    name, *options = words
    return open_command(name)[1].parse_args(options)


@pytest.fixture(scope="module")
def proxy(url, tmp_path_factory):
    """The address of nginx before the shared API, with the documented configuration but for names and ports."""
    nginx, openssl = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), shutil.which("openssl")
    if nginx is None or openssl is None:
        pytest.skip("needs nginx and openssl")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-days", "1", "-nodes"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", certificate, *subject]
    subprocess.run(command, check=True, capture_output=True)
    site = (DEPLOYMENT / "nginx.conf").read_text(encoding="utf-8")
    for documented, here in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:8080", url.removeprefix("http://")),
        ("/etc/ssl/example.org.pem", str(certificate)),
        ("/etc/ssl/example.org.key", str(key)),
    ):
        assert documented in site
        site = site.replace(documented, here)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.getuid() == 0 else ""  # or its workers cannot write what is kept for them
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off; {user} pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{site}\n}}\n",
        encoding="utf-8",
    )
    process = subprocess.Popen([nginx, "-c", configuration, "-p", folder], stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"https://localhost:{port}", verify=False, timeout=SECONDS) as client:
            wait_until(lambda: process.poll() is not None or answers(client))
            assert process.poll() is None, process.stderr.read()
            yield client
    finally:
        process.terminate()
        process.wait()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_answers_grow_through_the_proxy(proxy, engine):
    body = {"model": MODEL, "messages": [HELLO], "stream": True, "temperature": 2, "min_tokens": 1500}
    with proxy.stream("POST", "/v1/chat/completions", json=body) as response:
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        texts = (json.loads(event)["choices"][0]["delta"].get("content") for event in events)
        assert len(list(itertools.islice(filter(None, texts), 5))) == 5
        assert sample(engine, "running") == 1  # and they came while it grew
    wait_until(lambda: is_idle(engine))  # that the client has left reached the engine


def test_the_proxy_takes_the_bodies_that_the_server_takes_and_no_larger_ones(proxy):
    large = {"model": MODEL, "messages": [HELLO], "user": "x" * (4 * MIB), "max_tokens": 2}
    assert proxy.post("/v1/chat/completions", json=large).status_code == 200
    assert proxy.post("/v1/chat/completions", content=b"x" * (33 * MIB)).status_code == 413
    assert proxy.get("/metrics").status_code == 403


def test_the_service_starts_our_command_and_gives_it_time_to_end():
    unit = (DEPLOYMENT / "visualglm.service").read_text(encoding="utf-8")
    [start] = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *words = shlex.split(start)
    options = read_command(words)
    assert program.endswith("/bin/visualglm") and options.host == "127.0.0.1"
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop) > options.drain_seconds


def test_the_container_has_what_is_installed_and_starts_our_command():
    text = re.sub(r"\\\n", " ", (DEPLOYMENT / "Containerfile").read_text(encoding="utf-8"))
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    packages = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "visualglm_hf", "visualglm_tools", "models"}
    assert packages <= set(copied)
    assert not re.search(r"apt|gcc|build-essential|git ", " ".join(rest for name, rest in steps if name == "RUN"))
    last = {name: json.loads(rest) for name, rest in steps if name in ("ENTRYPOINT", "CMD")}
    program, *words = last["ENTRYPOINT"] + last["CMD"]
    options = read_command(words)
    assert program == "visualglm" and options.host == "0.0.0.0" and str(options.port) in text.partition("EXPOSE")[2]
    assert [name for name, _ in steps].index("USER") < [name for name, _ in steps].index("ENTRYPOINT")
