"""What tests of several parts of the benchmark measure."""

import json
import shlex
import sys

import pytest
import torch

from tests.benchmarking_helpers import llama_bench
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_tools.benchmarking.models import TINY, build_model


@pytest.fixture(scope="session")
def tiny() -> VisualGLMForConditionalGeneration:
    return build_model(TINY, torch.float32, torch.device("cpu")).eval()


@pytest.fixture(scope="session")
def peer_command(tmp_path_factory):
    tests = [llama_bench(16, 0, 0, 2_000_000, 4_000_000), llama_bench(0, 4, 40, 8_000_000), llama_bench(8, 4, 0, 1)]
    program = tmp_path_factory.mktemp("peer") / "peer.py"
    program.write_text(f"import sys\nprint('loading', file=sys.stderr)\nprint({json.dumps(json.dumps(tests))})\n")
    return shlex.join([sys.executable, str(program)])
