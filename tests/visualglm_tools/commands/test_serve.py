"""`visualglm serve`: the documented commands, what it says while it loads, drains and cannot open, and its options."""

import dataclasses
import re
import signal
import threading

import pytest

from tests.commands import SECONDS, python, run, script
from tests.commands import serve as serve_command
from tests.paths import ROOT, SCRIPTS, TINY
from tests.serving_helpers import (
    CAPTION,
    ENDLESS,
    error_of,
    free_port,
    get,
    health,
    open_door,
    post,
    post_chat,
    wait_until,
)
from visualglm_tools.commands import serve as serve_options
from visualglm_tools.options import from_values
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.http.app import ApiOptions
from visualglm_tools.serving.http.settings import api_of, limits_of


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """The door as the README opens it, and its answer to a request that came before the model was loaded."""
    prepared = tmp_path_factory.mktemp("path-to") / "prepared"
    prepared.symlink_to(TINY)
    with open_door("--model", str(prepared)) as (url, process, log):
        early = post_chat(url)
        wait_until(lambda: health(url) == 200)
        yield url, process, log, early


def test_the_door_says_503_while_it_loads(door):
    *_, early = door
    assert "loaded" in error_of(early, 503)["message"] and "Retry-After" in early.headers


def test_the_commands_of_the_readme_work(door, tmp_path):
    url, *_ = door
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Over HTTP")[2].partition("\n## ")[0]
    server, *requests = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert "visualglm serve --model path/to/prepared" in server  # the fixture's command
    assert len(requests) == 2
    for request, found in zip(requests, ("red circles", "[DONE]"), strict=True):
        request = request.replace("http://127.0.0.1:8080", url).replace("temp.json", str(tmp_path / "temp.json"))
        assert found in run("bash", "-ec", request).stdout


def test_the_python_of_the_documentation_works(monkeypatch, capsys):
    document = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(code, {"__name__": "__main__"})
    assert CAPTION in capsys.readouterr().out


def test_the_door_drains_on_sigterm(door):  # the last that uses it
    url, process, log, _ = door
    answers = []

    def ask():
        body = {"text": "a", **ENDLESS, "max_length": 600, "min_length": 600}
        answers.append(post(url, json=body))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    wait_until(lambda: "visualglm_running 3.0" in get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    process.wait(timeout=SECONDS)
    output = log.read_text(encoding="utf-8")
    assert process.returncode == -signal.SIGTERM, output  # as whoever sent it expects
    assert "Application shutdown complete" in output and "Traceback" not in output
    assert output.count("The model is loaded: requests are answered.") == 1
    assert "Whoever reaches" not in output  # it is this machine's alone


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--model", "no/such/folder"], "no such folder"),
        (["--device", "abacus"], "no device is called"),
        (["--replicas", "2"], "--replicas goes with --ray"),
    ],
)
def test_a_door_that_cannot_open_says_why_in_one_line(options, found, capsys):
    assert serve_command("--port", free_port(), *options) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert found in line


def test_an_option_that_is_not_given_leaves_the_engine_and_the_api_as_they_are():
    options = from_values(serve_options.Options, {})
    assert limits_of(options) == Limits()
    api = api_of(options, None, options.host)
    assert api == dataclasses.replace(ApiOptions(model_name=TINY.name), allowed_hosts=["127.0.0.1"])
    options = from_values(serve_options.Options, {"model": TINY / "a" / ".."})
    assert api_of(options, None, options.host).model_name == TINY.name
    options = from_values(serve_options.Options, {"max_body_mib": "0.5", "allowed_hosts": "a,b", "timeout": 1})
    assert limits_of(options).timeout == 1
    api = api_of(options, None, options.host)
    assert api.max_body_bytes == 2**19 and api.allowed_hosts == ["127.0.0.1", "a", "b"]


def test_help_is_quick_and_names_the_options():
    finished = python("-X", "importtime", SCRIPTS / "api_hf.py", "-h")
    assert "--allow-urls" in finished.stdout and "torch" not in finished.stderr


@pytest.mark.parametrize(
    "options",
    [["--port", "x"], ["--max-batch-size", "0"], ["--timeout", "inf"], ["--max-body-mib", "1e308"], ["--quant", "3"]],
)
def test_bad_options_are_refused_at_once(options):
    assert options[0] in script("api_hf.py", *options, code=2).stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("cors_origins", value) for value in ("https://page.example/", "page.example", "https://a b", "")),
        *(("allowed_hosts", value) for value in ("api.example:8080", "https://api.example", "a/b", "")),
    ],
)
def test_a_name_that_no_browser_would_send_is_refused_instead_of_never_matching(option, value, capsys):
    flag = {"cors_origins": "--cors-origin", "allowed_hosts": "--allowed-host"}[option]
    with pytest.raises(SystemExit) as end:
        serve_command(flag, value)
    assert end.value.code == 2 and f"found {value!r}" in capsys.readouterr().err


def test_origins_and_names_are_compared_in_small_letters():
    values = {"cors_origins": "https://Page.Example:8443,*", "allowed_hosts": "API.Example,*"}
    options = from_values(serve_options.Options, values)
    assert list(options.cors_origins) == ["https://page.example:8443", "*"]
    assert list(options.allowed_hosts) == ["api.example", "*"]
