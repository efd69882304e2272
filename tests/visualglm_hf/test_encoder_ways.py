"""Room: torch's ways for the image encoder on a CPU. Each computes the same, and the faster one is taken."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error, seeded
from visualglm_hf import encoder_ways
from visualglm_hf.encoder_ways import (
    SHARES,
    WAYS,
    linear,
    linear_by_onednn,
    linear_by_torch,
    measure_way,
    takes_onednn,
)


def choose(monkeypatch, place: int) -> None:
    """Let all measurements have found that torch's own way, 0, or the other one, 1, is faster."""
    monkeypatch.setattr(encoder_ways, "choose_way", lambda dtype, num_threads: list(WAYS)[place])


@pytest.fixture
def others(monkeypatch):
    choose(monkeypatch, 1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(5, 96), (2, 5, 96), (1, 96), (96,)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_gelu", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_both_ways_of_a_linear_layer_compute_the_same(shape, has_bias, has_gelu, dtype, tolerance):
    x, weight = random(*shape, dtype=dtype), random(40, 96, dtype=dtype, seed=1)
    bias = random(40, dtype=dtype, seed=2) if has_bias else None
    with torch.no_grad():
        found, expected = (way(x, weight, bias, has_gelu) for way in (linear_by_onednn, linear_by_torch))
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert relative_error(found.float(), expected.float()) < tolerance


@pytest.mark.parametrize("has_gelu", [True, False])
def test_the_other_way_rounds_to_bfloat16_once(has_gelu):
    x, weight, bias = (random(*shape, dtype=torch.bfloat16) for shape in ((33, 96), (40, 96), (40,)))
    exact = linear_by_torch(x.double(), weight.double(), bias.double(), has_gelu)
    with torch.no_grad():
        found = linear_by_onednn(x, weight, bias, has_gelu).double()
    assert relative_error(found, exact) < 1.02 * relative_error(exact.bfloat16().double(), exact)


def test_the_encoder_says_the_same_whichever_way_is_faster(tiny_original, pixel_values, monkeypatch):
    model, found = load_float32(tiny_original), {}
    for dtype in SHARES:
        for place in (0, 1):
            choose(monkeypatch, place)
            with torch.no_grad():
                found[dtype, place] = model.to(dtype).get_image_features(pixel_values.to(dtype)).pooler_output.float()
    exact = found[torch.float32, 0]
    assert relative_error(found[torch.float32, 1], exact) < FLOAT32_TOLERANCE
    own, other = (relative_error(found[torch.bfloat16, place], exact) for place in (0, 1))
    assert 0 < other < 2 * own  # the roundings of all layers add up by chance


def test_it_takes_the_other_way_without_gradients_in_the_number_formats_that_it_is_for(others):
    x, weight = random(5, 96), random(40, 96)
    with torch.no_grad():
        assert takes_onednn(x, weight) and takes_onednn(x.bfloat16(), weight.bfloat16())
        assert not takes_onednn(x.half(), weight.half())
        assert not takes_onednn(x.bfloat16(), weight)
        assert not takes_onednn(x[:0], weight)
        assert not takes_onednn(x.to("meta"), weight.to("meta"))
        with torch.autocast("cpu"):
            assert not takes_onednn(x, weight)
        with FakeTensorMode() as mode:
            assert not takes_onednn(mode.from_tensor(x), mode.from_tensor(weight))
        with torch.backends.mkldnn.flags(enabled=False):
            assert not takes_onednn(x, weight)
    assert not takes_onednn(x, weight)


def test_functions_are_transformed_and_traced_as_always(others):
    x, weight, bias = random(3, 5, 96), random(40, 96), random(40)
    expected = linear_by_torch(x, weight, bias, has_gelu=False)
    with torch.no_grad():
        assert relative_error(torch.vmap(lambda row: linear(row, weight, bias))(x), expected) < 1e-6
        traced = torch.jit.trace(lambda x: linear(x, weight, bias), x)
        assert "_linear_pointwise" not in str(traced.graph)


def test_gradients_come_when_they_are_wanted(others, tiny_original, pixel_values):
    model = load_float32(tiny_original)
    pictures = pixel_values[:1].float().requires_grad_()
    model.get_image_features(pictures).pooler_output.sum().backward()
    assert pictures.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.image_encoder.parameters())


def test_hooks_and_adapters_of_a_layer_are_asked(others, tiny_original, pixel_values):
    peft = pytest.importorskip("peft")
    model = load_float32(tiny_original)
    seen = []
    layer = model.image_encoder.vit.transformer["layers"][0].mlp.dense_h_to_4h
    with torch.no_grad():
        before = model.get_image_features(pixel_values[:1]).pooler_output
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert relative_error(model.get_image_features(pixel_values[:1]).pooler_output, before) < FLOAT32_TOLERANCE
        assert len(seen) == 1 and seen[0].min() < -0.2  # not GELU's
        targets = r"image_encoder\..*dense_h_to_4h"
        options = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, options)
        with_adapter = model.get_image_features(pixel_values[:1]).pooler_output
        assert relative_error(with_adapter, before) > 1e-3
        merged = adapted.merge_and_unload()
        assert relative_error(merged.get_image_features(pixel_values[:1]).pooler_output, with_adapter) < 1e-4


@pytest.mark.parametrize("dtype", SHARES)
@pytest.mark.parametrize("share", [0.5, 0.9, 2.0, None])
def test_the_other_way_is_taken_if_it_is_faster_and_works(monkeypatch, dtype, share):
    def measure(*calls):
        for call in calls:
            call()
        if share is None:
            raise RuntimeError("could not create a primitive")
        return [1.0, share]

    monkeypatch.setattr(encoder_ways, "measure_seconds", measure)
    place = int(share is not None and share < SHARES[dtype])
    assert measure_way(dtype) == list(WAYS)[place]


def test_where_torch_has_no_such_way_it_does_as_always(monkeypatch):
    choose(monkeypatch, 1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.no_grad():
        assert not takes_onednn(random(5, 96), random(40, 96))
