"""What tests of the benchmark share: a run that is done at once, and what is in its report."""

import subprocess

from tests.commands import script


QUICK = ("--geometry", "tiny", "--dtype", "float32", "--threads", "1", "--contexts", "16", "40")
QUICK += ("--new-tokens", "4", "--repeats", "2", "--bandwidth-gib", "0.02", "--bandwidth-repeats", "1")


def run_apart(*options) -> subprocess.CompletedProcess:
    """Run the command under its old name in a process of its own, as a user does."""
    return script("benchmark.py", *options, code=None)


def rows_of(variant: dict, part: str) -> list[dict]:
    return [row for row in variant["rows"] if row["part"] == part]


def llama_bench(prompt: int, answer: int, depth: int, *samples_ns: int) -> dict:
    """One test as `llama-bench -o json` prints it, without the fields that nobody reads."""
    return {
        "build_commit": "b6099d4",
        "cpu_info": "a processor",
        "model_filename": "/home/somebody/model.gguf",
        "model_type": "chatglm 6B Q4_0",
        "model_size": 3_500_000_000,
        "n_threads": 2,
        "n_prompt": prompt,
        "n_gen": answer,
        "n_depth": depth,
        "avg_ns": sum(samples_ns) // len(samples_ns),
        "samples_ns": list(samples_ns),
    }


def decode_rows(time_of, batch: int = 1) -> list[dict]:
    contexts = (64, 256, 512, 1024, 1536, 1984)
    shared = {"part": "decode", "path": "forward", "batch": batch}
    return [{**shared, "context": context, "ms": {"median": time_of(context)}} for context in contexts]
