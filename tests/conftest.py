"""What several tests share: outputs of the original code (`tests/golden/`) and the tiny checkpoint they came from."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything loads from folders
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder with golden.json, golden.npz, the input pictures and the tiny original checkpoint."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir) -> dict:
    """What the original code computed: structure, ids and texts; strings name arrays of `arrays`."""
    return json.loads((golden_dir / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def arrays(golden_dir):
    """What the original code computed: arrays by name, each read when it is asked for."""
    with np.load(golden_dir / "golden.npz") as file:
        yield file


@pytest.fixture(scope="session")
def tiny_original(golden_dir) -> Path:
    """A tiny VisualGLM checkpoint as the original code writes it."""
    return golden_dir / "tiny-original"


@pytest.fixture(scope="session")
def tokenizer(tiny_original):
    """The tokenizer of the tiny checkpoint; shared, so tests that change one load their own."""
    from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(tiny_original)
