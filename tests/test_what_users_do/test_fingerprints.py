"""datasets finds its caches by a fingerprint of what made them, which every process must compute alike."""

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT


pytest.importorskip("datasets")

FINGERPRINTS = """
import sys
from datasets.fingerprint import Hasher
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

autos = [AutoProcessor, AutoTokenizer, AutoImageProcessor, AutoConfig]
parts = [auto.from_pretrained(sys.argv[1], trust_remote_code=True) for auto in autos]
before = [Hasher.hash(part) for part in parts]
processor = parts[0]
processor(text="你好<sop>")
assert before == [Hasher.hash(part) for part in parts]
before.append(Hasher.hash(lambda row: processor(text=row["text"])))
print(*before)
"""


@pytest.mark.slow
def test_fingerprints_are_the_same_in_every_process():
    command = [sys.executable, "-c", FINGERPRINTS, "models/visualglm-tiny"]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": str(seed)}
        )
        for seed in (1, 2)
    ]
    first, second = (process.communicate()[0].split() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    assert len(set(first)) == 5
