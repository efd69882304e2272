"""What is compared with the yardstick: only what is right, block by block."""

import pytest
import torch

from visualglm_tools.benchmarking import timing
from visualglm_tools.benchmarking.comparison import DEVIATIONS, ShortStack, check_deviation, deviation
from visualglm_tools.benchmarking.engines import ModelEngine, Prompts
from visualglm_tools.benchmarking.models import TINY, build_model
from visualglm_tools.benchmarking.original_formulation import OriginalFormulation


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_yardstick_rounds_in_half_precision_like_the_original_and_stays_near_ours(dtype):
    model = build_model(TINY, getattr(torch, dtype), torch.device("cpu")).eval()
    prompts, engine = Prompts(model, batch=1), ModelEngine(model)
    found = deviation(engine, OriginalFormulation(model), prompts, context=60)
    assert 0 <= found <= DEVIATIONS[dtype]


def test_a_wrong_yardstick_is_refused():
    with pytest.raises(ValueError, match="its times would say nothing"):
        check_deviation(float("nan"), "float32")


def test_shortening_the_decoder_leaves_the_model_alone():
    model = build_model(TINY, torch.float32, torch.device("cpu")).eval()
    stack = ShortStack(model, 1, batch=2, clock=timing.Clock(model.device))
    with torch.no_grad():
        assert stack.start(10) > 0
        assert stack.step() > 0
    assert len(stack.decoder.layers) == 1
    assert stack.cache.get_seq_length() == 11
    assert len(model.transformer.layers) == 3
