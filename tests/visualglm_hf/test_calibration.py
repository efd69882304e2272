"""Room: calibrated codes: smaller errors in the same bytes, on inputs that were not shown; refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import difference, make_small_model, seeded, weight_family
from tests.paths import TINY
from tools.tiny import world
from visualglm_hf import VisualGLMForConditionalGeneration, VisualGLMImageProcessor, VisualGLMProcessor
from visualglm_hf.calibration import (
    ANSWER_TOKENS,
    answer,
    decompose,
    measure,
    quantize_calibrated,
    quantize_with_feedback,
    record_calls,
    solve,
    watch,
)
from visualglm_hf.lowbit_format import dequantize_naive
from visualglm_hf.quantization import QuantizedLinear, find_quantized, quantize_tensor
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer


def make_inputs(rows: int, columns: int = 512, seed: int = 1, together: float = 1.0) -> torch.Tensor:
    """Inputs that go together, as those in a model do, one channel in a hundred ten times as large."""
    shared = seeded(99)
    scale = torch.where(torch.rand(columns, generator=shared) < 0.01, 10.0, 1.0)
    mix = torch.randn(columns // 8, columns, generator=shared) / (columns // 8) ** 0.5
    generator = seeded(seed)
    x = 0.5 * torch.randn(rows, columns, generator=generator)
    return (x + together * torch.randn(rows, columns // 8, generator=generator) @ mix) * scale


def error_of(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    values = dequantize_naive(codes, scales, 4, weight.shape[1], torch.float32)
    return difference(x @ values.T, x @ weight.T)


# A matrix


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("family", ["gauss", "t5", "llm"])
def test_products_with_inputs_that_were_not_shown_are_off_by_a_third_less(family, group_size):
    weight, shown, held_out = weight_family(family, 256, 512), make_inputs(1500), make_inputs(400, seed=2)
    plain = quantize_tensor(weight, 4, group_size)
    calibrated = quantize_with_feedback(weight, shown.T @ shown, group_size)
    for tensor, expected in zip(calibrated, plain, strict=True):
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    assert error_of(*calibrated, weight, held_out) <= 0.7 * error_of(*plain, weight, held_out)


def test_inputs_that_do_not_go_together_do_no_harm():
    weight, shown, held_out = (
        weight_family("llm", 256, 512),
        make_inputs(1500, together=0),
        make_inputs(400, seed=2, together=0),
    )
    calibrated = quantize_with_feedback(weight, shown.T @ shown)
    assert error_of(*calibrated, weight, held_out) <= error_of(*quantize_tensor(weight, 4), weight, held_out)


def test_fewer_inputs_than_columns_do_no_harm():
    weight, shown, held_out = weight_family("llm", 256, 512), make_inputs(60), make_inputs(400, seed=2)
    calibrated = quantize_with_feedback(weight, shown.T @ shown)
    assert error_of(*calibrated, weight, held_out) <= error_of(*quantize_tensor(weight, 4), weight, held_out)


@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_without_any_input_the_codes_are_those_of_the_search(group_size):
    weight = weight_family("t5", 256, 512)
    found = quantize_with_feedback(weight, torch.zeros(512, 512), group_size)
    assert all(map(torch.equal, found, quantize_tensor(weight, 4, group_size)))


def test_rows_that_are_quantized_apart_have_the_same_codes(monkeypatch):
    weight, shown = weight_family("gauss", 256, 512), make_inputs(1500)
    whole = quantize_with_feedback(weight, shown.T @ shown)
    monkeypatch.setattr("visualglm_hf.calibration.ROWS", 100)
    parts = quantize_with_feedback(weight, shown.T @ shown)
    # Products of other sizes are rounded otherwise, and a near tie may turn all that comes after it.
    assert (whole[0] == parts[0]).float().mean() > 0.95


def test_the_factor_is_that_of_the_damped_products():
    x = make_inputs(300, 64).double()
    hessian = (x.T @ x).float()
    factor, costs = decompose(hessian.clone(), 0.1)
    assert torch.equal(factor, factor.tril())
    assert torch.allclose(factor.diagonal(), torch.ones(64))
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(64)
    assert difference(factor * costs @ factor.T, damped) < 1e-5


def test_products_that_rounding_has_spoilt_are_damped_until_they_have_a_factor():
    hessian = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    factor, costs = decompose(hessian, 0.1)
    assert factor.isfinite().all()
    assert (costs > 0).all()


def test_what_products_lack_is_made_up_for():
    weight, full, held_out = weight_family("llm", 256, 512), make_inputs(1500), make_inputs(400, seed=2)
    off = torch.where(torch.arange(512) % 2 == 0, 0.7, 1.0)
    shown = full * off
    errors = []
    for lack in (None, shown.T @ ((full - shown) @ weight.T)):
        codes, scales = quantize_with_feedback(weight, shown.T @ shown, lack=lack)
        found = held_out * off @ dequantize_naive(codes, scales, 4, 512, torch.float32).T
        errors.append(difference(found, held_out @ weight.T))
    assert errors[1] < 0.5 * errors[0]


def test_what_is_lacking_is_solved_for():
    x = make_inputs(300, 64).double()
    factor, costs = decompose((x.T @ x).float(), 0.1)
    right = torch.randn(64, 5, generator=seeded(4))
    assert difference(factor * costs @ factor.T @ solve(factor, costs, right), right) < 1e-4


@pytest.mark.parametrize(("weight", "x"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_what_is_not_finite_is_refused(weight, x):
    weights, inputs = weight_family("gauss", 4, 64), make_inputs(100, 64)
    weights[1, 3] *= weight
    inputs[5, 7] *= x
    with pytest.raises(ValueError, match="not finite"):
        quantize_with_feedback(weights, inputs.T @ inputs)


# A model


@pytest.fixture(scope="module")
def tiny() -> VisualGLMForConditionalGeneration:
    return VisualGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


def ask(number: int, split: str) -> list[dict]:
    """Inputs of so many questions about pictures of a split, in both languages."""
    processor = VisualGLMProcessor(VisualGLMImageProcessor(), ChatGLMTokenizer.from_pretrained(TINY))
    prompts = []
    for seed in range(number):
        scene = world.sample_scene(5000 + seed, split)
        questions = world.exchanges(scene, world.LANGUAGES[seed % 2])
        content = [{"type": "image"}, {"type": "text", "text": questions[seed % len(questions)].question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append(dict(processor(text=text, images=[world.draw(scene)], return_tensors="pt")))
    return prompts


@torch.no_grad()
def logits_of(model: nn.Module, prompts: list[dict]) -> torch.Tensor:
    return torch.cat([model(**inputs, logits_to_keep=1).logits[:, -1] for inputs in prompts])


@pytest.mark.parametrize("group_size", [None, -1])
def test_the_tiny_model_answers_new_questions_with_a_third_less_error(tiny, group_size):
    shown, held_out = ask(32, "training"), ask(24, "new combinations")
    expected = logits_of(tiny, held_out)
    plain = difference(logits_of(copy.deepcopy(tiny).quantize(4, group_size), held_out), expected)
    model = copy.deepcopy(tiny).quantize(4, group_size, calibration=shown)
    assert difference(logits_of(model, held_out), expected) <= 0.7 * plain


def make_prompts(number: int, length: int = 20) -> list[dict]:
    """Inputs of questions in random words for the small model."""
    ids = torch.randint(5, 240, (number, length), generator=seeded(3))
    ids[:, -2:] = torch.tensor([251, 254])  # [gMASK] and <sop>
    return [{"input_ids": row[None]} for row in ids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_calibrated_model_is_like_any_other_of_4_bits(dtype, tmp_path):
    options = {"lm_head": True, "image_encoder": True}
    model, plain = make_small_model(dtype, bits=None), make_small_model(dtype, bits=None).quantize(4, **options)
    assert model.train().quantize(4, calibration=make_prompts(4), **options) is model
    assert model.training
    state, other = model.state_dict(), plain.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in other.items()
    }
    assert find_quantized(model) == find_quantized(plain)
    assert model.config.to_dict() == plain.config.to_dict()
    model.save_pretrained(tmp_path)
    loaded = VisualGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_padding_is_no_input():
    prompts = make_prompts(3)
    found = []
    for filler in (7, 100):
        ids = torch.cat([torch.full((3, 6), filler), torch.cat([inputs["input_ids"] for inputs in prompts])], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :6] = 0
        model = make_small_model(torch.float32, bits=None)
        found.append(model.quantize(4, calibration=[{"input_ids": ids, "attention_mask": mask}]).state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def inputs_of(model: nn.Module, layer: nn.Module, prompts: list[dict]) -> torch.Tensor:
    """What enters a layer, [tokens, K]."""
    inputs = []
    handle = layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].flatten(0, -2)))
    logits_of(model, prompts)
    handle.remove()
    return torch.cat(inputs)


def test_a_layer_is_calibrated_with_what_the_quantized_layers_before_it_give(monkeypatch):
    full, model = make_small_model(torch.float32, bits=None), make_small_model(torch.float32, bits=None)
    prompts = [answer(full, inputs) for inputs in make_prompts(16, 40)]
    monkeypatch.setattr("visualglm_hf.calibration.answer", lambda model, inputs: inputs)
    seen = []
    original = quantize_with_feedback

    def watched(weight, hessian, group_size, lack):
        seen.append((hessian.clone(), lack.clone()))
        return original(weight, hessian, group_size, lack=lack)

    monkeypatch.setattr("visualglm_hf.calibration.quantize_with_feedback", watched)
    model.quantize(4, calibration=prompts)
    names = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    for name, (hessian, lack) in zip(names, seen[-4:], strict=True):
        quantized, layer = (other.transformer.layers[-1].get_submodule(name) for other in (model, full))
        x, wanted = inputs_of(model, quantized, prompts), inputs_of(full, layer, prompts)
        assert difference(hessian, x.T @ x) < 1e-4, name
        if name != names[-1]:
            assert difference(lack, x.T @ ((wanted - x) @ layer.weight.T)) < 1e-3, name


@torch.no_grad()
def test_the_last_matrix_of_a_layer_aims_at_what_the_full_layer_gives():
    full, model = make_small_model(torch.float32, bits=None), make_small_model(torch.float32, bits=None)
    prompts = make_prompts(16, 40)
    model.quantize(4, calibration=prompts)
    (states, calls), (others, _) = (record_calls(each, each.transformer.layers, prompts) for each in (full, model))
    calls = [call[0] for call in calls]
    block, quantized = full.transformer.layers[0], model.transformer.layers[0]
    inputs, outputs = watch(block, states, calls)
    quantized.set_submodule("mlp.dense_4h_to_h", block.mlp.dense_4h_to_h)
    hessian, lack = measure(quantized, "mlp.dense_4h_to_h", others, calls, inputs["mlp.dense_4h_to_h"], outputs)
    found = [call.run(quantized, state) for state, call in zip(others, calls, strict=True)]
    missing = torch.cat([(a - b).flatten(0, -2) for a, b in zip(outputs, found, strict=True)])
    x = torch.cat(watch(quantized, others, calls)[0]["mlp.dense_4h_to_h"])
    assert difference(hessian, x.T @ x) < 1e-5
    assert difference(lack, x.T @ missing) < 1e-4


def test_a_prompt_goes_on_with_what_the_model_answers(tiny):
    prompt = ask(1, "training")[0]
    answered = answer(tiny, {**prompt, "labels": prompt["input_ids"]})
    expected = tiny.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    assert torch.equal(answered["input_ids"], expected)
    assert expected.shape[1] > prompt["input_ids"].shape[1]
    assert answered["attention_mask"].shape == expected.shape
    assert answered.keys() == prompt.keys()


def test_several_prompts_in_a_batch_go_on_as_far_as_the_shortest_answer(tiny):
    prompts = ask(4, "training")
    answers = [answer(tiny, prompt)["input_ids"].shape[1] - prompt["input_ids"].shape[1] for prompt in prompts]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    missing = [longest - prompt["input_ids"].shape[1] for prompt in prompts]
    ids, mask = (
        torch.cat([F.pad(prompt[name], (n, 0), value=filler) for prompt, n in zip(prompts, missing, strict=True)])
        for name, filler in (("input_ids", 3), ("attention_mask", 0))
    )
    pictures = torch.cat([prompt["pixel_values"] for prompt in prompts])
    answered = answer(tiny, {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures})
    assert answered["input_ids"].shape == answered["attention_mask"].shape == (4, longest + min(answers))
    assert torch.equal(answered["attention_mask"].sum(1), mask.sum(1) + min(answers))


def test_prompts_that_are_no_ids_are_taken_as_they_are(tiny):
    prompt = {"inputs_embeds": torch.zeros(1, 3, 128)}
    assert answer(tiny, prompt) is prompt


def test_what_cannot_be_calibrated_is_refused_and_left_as_it_is():
    model, prompts = make_small_model(torch.float32, bits=None), make_prompts(1)
    for options, message in (
        ({"bits": 8, "calibration": prompts}, "8 bits gain nothing"),
        ({"bits": 3, "calibration": prompts}, "4 or 8 bits, not to 3"),
        ({"bits": 4, "calibration": []}, "no prompts to calibrate with"),
        ({"bits": 4, "calibration": ["a"]}, "a mapping of inputs, not a str"),
        ({"bits": 4, "group_size": 48, "calibration": prompts}, "cannot be divided into groups of 48"),
    ):
        with pytest.raises(ValueError, match=message):
            model.quantize(**options)
    assert not find_quantized(model)
    assert not model.config.quantization_bit
    with pytest.raises(ValueError, match="4 bits already"):
        quantize_calibrated(make_small_model(bits=4), prompts)


def test_states_that_are_not_finite_name_their_layer():
    model = make_small_model(torch.float32, bits=None)
    with torch.no_grad():
        model.transformer.layers[1].input_layernorm.weight[0] = float("inf")
    with pytest.raises(ValueError, match="layer 1: The inputs of a linear layer are not finite"):
        model.quantize(4, calibration=make_prompts(2))


def test_a_layer_of_given_codes_shares_the_bias():
    linear = nn.Linear(128, 32)
    layer = QuantizedLinear.from_codes(linear, *quantize_tensor(linear.weight, 4), 4)
    assert layer.bias is linear.bias
    assert torch.equal(layer.dequantize(), QuantizedLinear.from_linear(linear, 4).dequantize())
