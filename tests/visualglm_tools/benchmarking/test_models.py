"""Weights that nobody trained: finite, varied, in their dtype, and in low bits without the full ones."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visualglm_hf.quantization import QuantizedLinear
from visualglm_tools.benchmarking.engines import ModelEngine, Prompts
from visualglm_tools.benchmarking.models import TINY, build_model, fill, model_figures, picture_flop


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_finite_varied_tied_and_in_their_dtype(dtype):
    dtype = getattr(torch, dtype)
    model = build_model(TINY, dtype, torch.device("cpu"))
    parameters = dict(model.named_parameters())
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in parameters.values())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    layer = model.transformer.layers[0]
    assert layer.input_layernorm.weight.float().mean() == pytest.approx(1, abs=0.05)
    assert torch.linalg.matrix_rank(layer.attention.query_key_value.weight.float()) == 64


def test_filling_repeats_the_block_and_cuts_the_last_copy_short():
    filled = fill(torch.empty(2, 4), torch.arange(3.0))
    assert filled.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("bits", [4, 8])
def test_low_bit_models_are_built_without_the_full_weights_and_are_like_quantized_ones(bits):
    built = build_model(TINY, torch.float32, torch.device("cpu"), bits).eval()
    quantized = build_model(TINY, torch.float32, torch.device("cpu")).quantize(bits)
    assert model_figures(built) == model_figures(quantized)
    layers = [module for module in built.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 4 * 3
    assert all(layer.dequantize().std() == pytest.approx(0.02, rel=0.2) for layer in layers)
    prompts = Prompts(built, batch=1)
    with torch.no_grad():
        assert ModelEngine(built).prefill(prompts.ids(20), prompts.image_embeds).isfinite().all()


def test_the_operations_of_a_picture_are_those_that_torch_counts():
    model = build_model(TINY, torch.float32, torch.device("cpu"))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.image_encoder(Prompts(model, batch=1).pictures())
    assert picture_flop(model) == counter.get_total_flops()


def test_an_image_encoder_in_8_bits_is_built_like_a_quantized_one():
    built = build_model(TINY, torch.float32, torch.device("cpu"), 4, image_encoder=True)
    quantized = build_model(TINY, torch.float32, torch.device("cpu")).quantize(4, image_encoder=True)
    assert model_figures(built) == model_figures(quantized)
    assert type(built.image_encoder.glm_proj) is QuantizedLinear
