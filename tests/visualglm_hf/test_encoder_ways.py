"""Room: torch's ways for the image encoder on a CPU. Each computes the same, and the faster one is taken."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error, seeded
from visualglm_hf import encoder_ways
from visualglm_hf.encoder_ways import (
    WAYS,
    attend_by_products,
    attend_fused,
    attends_by_products,
    linear,
    linear_by_blas,
    linear_by_onednn,
    measure_way,
    takes_onednn,
)
from visualglm_hf.modeling_image_encoder import eager_attention_forward


def choose(monkeypatch, place: int) -> None:
    """Let all measurements have found that torch's own way, 0, or the other one, 1, is faster."""
    monkeypatch.setattr(encoder_ways, "choose_way", lambda question, num_threads: WAYS[question][place].__name__)


@pytest.fixture
def others(monkeypatch):
    choose(monkeypatch, 1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(5, 96), (2, 5, 96), (1, 96), (96,)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_both_ways_of_a_linear_layer_compute_the_same(shape, has_bias):
    x, weight, bias = random(*shape), random(40, 96, seed=1), random(40, seed=2) if has_bias else None
    with torch.no_grad():
        found, expected = linear_by_onednn(x, weight, bias), linear_by_blas(x, weight, bias)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(("pictures", "queries", "keys"), [(1, 33, 33), (3, 4, 33)])
def test_attention_by_products_is_as_exact_as_the_fused_one_and_more_than_rounded_scores(pictures, queries, keys):
    head_dim = 24
    query = random(pictures, 3, queries, head_dim, seed=1) * 3
    key, value = random(pictures, 3, keys, head_dim, seed=2) * 3, random(pictures, 3, keys, head_dim, seed=3)
    states = [each.bfloat16() for each in (query, key, value)]
    exact = attend_fused(*[each.double() for each in states], head_dim**-0.5)
    rounded, _ = eager_attention_forward(nn.Identity(), *states, None, head_dim**-0.5)
    with torch.no_grad():
        found, fused = attend_by_products(*states, head_dim**-0.5), attend_fused(*states, head_dim**-0.5)
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    assert relative_error(found.double(), exact) < 1.5 * relative_error(fused.double(), exact)
    assert relative_error(found.double(), exact) < 0.5 * relative_error(rounded.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_says_the_same_whichever_way_is_faster(tiny_original, pixel_values, monkeypatch, dtype):
    model = load_float32(tiny_original).to(dtype)
    found = []
    for place in (0, 1):
        choose(monkeypatch, place)
        with torch.no_grad():
            found.append(model.get_image_features(pixel_values.to(dtype)).pooler_output.float())
    assert relative_error(found[1], found[0]) < (FLOAT32_TOLERANCE if dtype == torch.float32 else 1e-2)


def test_it_takes_the_other_way_without_gradients_in_the_number_format_that_it_is_for(others):
    x, weight, states = random(5, 96), random(40, 96), random(1, 2, 5, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert takes_onednn(x, weight) and attends_by_products(states, states, states)
        assert not takes_onednn(x.bfloat16(), weight.bfloat16())
        assert not takes_onednn(x.bfloat16(), weight)
        assert not takes_onednn(x[:0], weight)
        assert not attends_by_products(*[states.float()] * 3)
        long = states.new_zeros(1, 2, encoder_ways.MOST_TOKENS + 1, 16)
        assert not attends_by_products(states, long, long)
        assert not takes_onednn(x.to("meta"), weight.to("meta"))
        with torch.autocast("cpu"):
            assert not takes_onednn(x, weight)
        with FakeTensorMode() as mode:
            assert not takes_onednn(mode.from_tensor(x), mode.from_tensor(weight))
        with torch.backends.mkldnn.flags(enabled=False):
            assert not takes_onednn(x, weight)
    assert not takes_onednn(x, weight) and not attends_by_products(states, states, states)


def test_functions_are_transformed_and_traced_as_always(others):
    x, weight, bias = random(3, 5, 96), random(40, 96), random(40)
    expected = linear_by_blas(x, weight, bias)
    with torch.no_grad():
        assert relative_error(torch.vmap(lambda row: linear(row, weight, bias))(x), expected) < 1e-6
        traced = torch.jit.trace(lambda x: linear(x, weight, bias), x)
        assert "_linear_pointwise" not in str(traced.graph)


def test_a_linear_layer_without_gradients_has_them_when_they_are_wanted(others, tiny_original, pixel_values):
    model = load_float32(tiny_original)
    pictures = pixel_values[:1].float().requires_grad_()
    model.get_image_features(pictures).pooler_output.sum().backward()
    assert pictures.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.image_encoder.parameters())


def test_hooks_and_adapters_of_a_layer_are_asked(others, tiny_original, pixel_values):
    peft = pytest.importorskip("peft")
    model = load_float32(tiny_original)
    called = []
    layer = model.image_encoder.vit.transformer["layers"][0].mlp.dense_h_to_4h
    layer.register_forward_hook(lambda module, inputs, output: called.append(output.shape))
    with torch.no_grad():
        before = model.get_image_features(pixel_values[:1]).pooler_output
        assert len(called) == 1
        targets = r"image_encoder\..*dense_h_to_4h"
        options = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, options)
        with_adapter = model.get_image_features(pixel_values[:1]).pooler_output
        assert relative_error(with_adapter, before) > 1e-3
        merged = adapted.merge_and_unload()
        assert relative_error(merged.get_image_features(pixel_values[:1]).pooler_output, with_adapter) < 1e-4


@pytest.mark.parametrize(("seconds", "place"), [((1.0, 0.5), 1), ((1.0, 0.9), 0), ((1.0, 2.0), 0), ((1.0, None), 0)])
@pytest.mark.parametrize("question", WAYS)
def test_the_other_way_is_taken_if_it_is_clearly_faster_and_works(monkeypatch, question, seconds, place):
    def measure(*calls):
        for call in calls:
            call()
        if None in seconds:
            raise RuntimeError("could not create a primitive")
        return seconds

    monkeypatch.setattr(encoder_ways, "measure_seconds", measure)
    assert measure_way(question) == WAYS[question][place].__name__
