"""Whatever the OpenAPI schema allows, and what it just forbids: documented answers, and never a 5xx."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.paths import TINY
from tests.serving_helpers import serve
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def url():
    with Engine(*load_model(TINY, "cpu", "float32"), Limits(max_new_tokens=8)) as engine, serve(engine) as url:
        yield url


@pytest.fixture
def schema_file(url, tmp_path) -> Path:
    """The server's schema with the name of its model, without which nearly all requests would be a 404."""
    schema = httpx.get(f"{url}/openapi.json").json()
    schema["components"]["schemas"]["ChatRequest"]["properties"]["model"] = {"const": "visualglm-tiny"}
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(schema), encoding="utf-8")
    return file


@pytest.mark.parametrize("examples", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_no_request_that_schemathesis_invents_fails_the_server(url, schema_file, examples):
    command = [Path(sys.executable).with_name("schemathesis"), "run", schema_file, "--url", url, "--seed", "1"]
    command += ["--checks", CHECKS, "--max-examples", str(examples)]
    finished = subprocess.run(command, cwd=schema_file.parent, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "6 selected / 6 total" in finished.stdout
    assert httpx.get(f"{url}/health").status_code == 200
