"""Programs of others, measured beside ours."""

import json
import shlex
import sys

import pytest

from visualglm_tools.benchmarking.peers import parse_peer, run_peer


def test_a_peers_times_are_those_of_a_prompt_and_of_a_token(peer_command):
    result = run_peer(parse_peer(f"llama.cpp Q4_0={peer_command}"))
    assert [(row["part"], row["context"], row["ms"]["median"]) for row in result["rows"]] == [
        ("prefill", 16, 3.0),
        ("decode", 40, 2.0),
    ]
    assert result["rows"][1]["tokens_per_s"] == 500
    assert result["model_gb"] == 3.5
    assert "/" not in json.dumps(result)  # no path of this machine


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such model')", "ended with exit status 1: no such model"),
        ("print('fast enough')", "did not print what `llama-bench -o json` prints"),
        ("print('[]')", "printed no test"),
        ("print('[{}]')", "did not print what `llama-bench -o json` prints"),
    ],
)
def test_a_peer_that_fails_is_one_clear_message(code, message):
    with pytest.raises(ValueError, match="^other") as error:
        run_peer(parse_peer(f"other={shlex.join([sys.executable, '-c', code])}"))
    assert message in str(error.value)
