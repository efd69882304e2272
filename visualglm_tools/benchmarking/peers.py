"""Other programs beside ours: a command that prints what it measured, in the format of `llama-bench -o json`.

That is a list of tests, each with `n_prompt`, `n_gen`, `n_depth` (tokens in the cache before) and `samples_ns`, of
which each is the whole test: n_prompt tokens at once, or n_gen one after the other. Any program whose output is brought
into that form will do.
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from typing import Any

from visualglm_tools.benchmarking.machine import public_command
from visualglm_tools.benchmarking.programs import run_program
from visualglm_tools.benchmarking.timing import digits, summarise


FACTS = ("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_type", "n_threads")


@dataclass(frozen=True)
class Peer:
    name: str
    words: list[str]  # of the command


def parse_peer(text: str) -> Peer:
    """Read NAME=COMMAND.

    Raises:
        ValueError: no name, no command, or a program that is not there.
    """
    name, _, command = text.partition("=")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"the command of {name!r} cannot be read: {error}") from error
    if not name.strip() or not words:
        raise ValueError(f"must be NAME=COMMAND, found {text!r}")
    if shutil.which(words[0]) is None:
        raise ValueError(f"there is no program {words[0]!r} for {name!r}")
    return Peer(name.strip(), words)


def run_peer(peer: Peer) -> dict[str, Any]:
    """Run the command of a peer and read what it prints.

    Raises:
        ValueError: it failed, or printed something else.
    """
    printed = run_program(peer.name, peer.words)
    try:
        tests = json.loads(printed)
        rows = [row for test in tests for row in read_test(test)]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{peer.name} did not print what `llama-bench -o json` prints ({type(error).__name__}: {error})."
        ) from error
    if not rows:
        raise ValueError(f"{peer.name} printed no test of either a prompt or an answer.")
    facts = {name: tests[0][name] for name in FACTS if tests[0].get(name) not in (None, "")}
    size = {"model_gb": digits(tests[0]["model_size"] / 1e9)} if tests[0].get("model_size") else {}
    return {"name": peer.name, "command": public_command(peer.words), **size, "facts": facts, "rows": rows}


def read_test(test: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn a test into our row; one that mixes a prompt and an answer says nothing about either."""
    prompt, answer, depth = test["n_prompt"], test["n_gen"], test.get("n_depth", 0)
    samples = [nanoseconds / 1e6 for nanoseconds in test.get("samples_ns") or [test["avg_ns"]]]
    if prompt and not answer and not depth:
        ms = summarise(samples)
        rate = {"tokens_per_s": digits(prompt * 1000 / ms["median"])}
        return [{"part": "prefill", "batch": 1, "context": prompt, "ms": ms, **rate}]
    if answer and not prompt:
        ms = summarise([sample / answer for sample in samples])
        rate = {"tokens_per_s": digits(1000 / ms["median"])}
        return [{"part": "decode", "batch": 1, "context": depth, "ms": ms, **rate}]
    return []
