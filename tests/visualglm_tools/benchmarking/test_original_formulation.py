"""The yardstick computes what our model computes."""

import pytest
import torch

from tests.helpers import load_float32
from visualglm_tools.benchmarking.engines import Prompts
from visualglm_tools.benchmarking.models import TINY, build_model
from visualglm_tools.benchmarking.original_formulation import OriginalFormulation


@pytest.fixture(scope="module", params=["random weights", "the tiny original"])
def model(request, tiny_original):
    if request.param == "the tiny original":
        return load_float32(tiny_original)
    return build_model(TINY, torch.float32, torch.device("cpu")).eval()


@torch.no_grad()
def test_the_yardstick_computes_our_logits_at_every_position_and_step(model):
    prompts, yardstick = Prompts(model, batch=2), OriginalFormulation(model)
    input_ids = prompts.ids(60)
    input_ids[1, -3:] = input_ids[1, [-2, -1, -3]]  # an answer of one token in the second row
    logits = yardstick.prefill(input_ids, prompts.image_embeds)
    ours = model(input_ids, image_embeds=prompts.image_embeds).logits
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    for token in (20, 21, 22):
        input_ids = torch.cat((input_ids, torch.full((2, 1), token)), dim=1)
        ours = model(input_ids, image_embeds=prompts.image_embeds).logits[:, -1:]
        torch.testing.assert_close(yardstick.decode(input_ids), ours, rtol=0, atol=1e-5 * ours.abs().max().item())
