"""Room: the decode step of all layers in one call, against the layers themselves."""

import copy
import gc
import json
import math
import shutil
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, DynamicCache

from tests.helpers import (
    SMALL_CONFIG,
    assemble,
    default_dtype,
    make_small_model,
    skip_without_cpu_kernels,
    torch_threads,
)
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration
from visualglm_hf.cache_naming import CACHE_NAME
from visualglm_hf.cpu_decoder import CpuDecoder, StepProgram, addresses_of, write_program
from visualglm_hf.cpu_language import F32, FLOATS32
from visualglm_hf.cpu_layer import KERNELS, NormTask, write_stage
from visualglm_hf.growing_cache import make_cache
from visualglm_hf.modeling_visualglm import CPU_DECODER, build_glm_position_ids, make_example
from visualglm_hf.quantization import quantize_


skip_without_cpu_kernels()
HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of logits, relative to the largest: a last bit or two
PROMPT = 9


@pytest.fixture(scope="module")
def model():
    """Shared; tests that change it make their own."""
    return make_small_model()


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """The number of sequences in each step that was run as a program, but for those of the self-check."""
    assert CPU_DECODER.kernels is not None
    batches, run = [], StepProgram.run
    monkeypatch.setattr(StepProgram, "run", lambda self, x, *rest: batches.append(len(x)) or run(self, x, *rest))
    return batches


def make_ids(batch=1, length=PROMPT + 6, padded=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of prompts and what follows, [B, length], and their mask: the first row has `padded` tokens less."""
    random = torch.Generator().manual_seed(batch)
    ids, mask = torch.randint(5, 240, (batch, length), generator=random), torch.ones(batch, length, dtype=torch.long)
    ids[:, PROMPT - 2], ids[:, PROMPT - 1] = 251, 254
    ids[0, :padded], mask[0, :padded] = 3, 0
    return ids, mask


def decode(model, ids, mask=None, cache=None, **options):
    """Logits of each token after the prompt, [B, S, V], and the cache; the prompt alone is computed at once."""
    positions = build_glm_position_ids(ids, mask, model.config.text_config)
    logits = []
    for first, last in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, ids.shape[1]))]:
        output = model(
            ids[:, first:last],
            attention_mask=None if mask is None else mask[:, :last],
            glm_position_ids=positions[..., first:last],
            cache=cache,
            use_cache=True,
            **options,
        )
        cache = output[CACHE_NAME]
        logits.append(output.logits[:, -1])
    return torch.stack(logits[1:], dim=1), cache


def decode_by_layers(model, *args, **options):
    """The same without programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuDecoder, "step", lambda *args: None)
        return decode(model, *args, **options)


def are_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    bound = TOLERANCE[theirs.dtype] * theirs.abs().max()
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ((ours - theirs).abs() <= bound).all()


# Parity


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("bits", "quantization"), [(4, {}), (4, {"group_size": -1}), (4, {"group_size": 32}), (8, {}), (None, {})]
)
@torch.no_grad()
def test_a_program_computes_what_the_layers_compute(runs, bits, quantization, dtype):
    model = make_small_model(dtype, bits, **quantization)
    for batch, padded in ((1, 0), (1, 2), (3, 4), (4, 0)):
        ids, mask = make_ids(batch, padded=padded)
        mask = mask if padded else None
        ours, our_cache = decode(model, ids, mask)
        assert runs == [batch] * 6
        theirs, their_cache = decode_by_layers(model, ids, mask)
        assert len(runs) == 6
        runs.clear()
        assert are_close(ours, theirs)
        for layer, other in zip(our_cache.layers, their_cache.layers, strict=True):
            assert are_close(layer.keys, other.keys)
            assert are_close(layer.values, other.values)


@torch.no_grad()
def test_many_sequences_are_several_tiles(model, runs):
    for batch in (4, 5, 64):
        ids, mask = make_ids(batch=batch, padded=5)
        assert are_close(decode(model, ids, mask)[0], decode_by_layers(model, ids, mask)[0])
        assert runs == [batch] * 6
        runs.clear()
    decode(model, *make_ids(batch=65))
    assert not runs


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_generate_says_the_same_with_programs_and_without(model, runs, options):
    """Long enough that caches grow; beams reorder them."""
    ids, _ = make_ids(length=PROMPT)
    options = {"max_new_tokens": 260, "min_new_tokens": 260, "do_sample": False} | options
    outputs = []
    for step in (CPU_DECODER.step, lambda *args: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CPU_DECODER, "step", step)
            torch.manual_seed(0)
            outputs.append(model.generate(ids, **options))
        assert runs
    assert torch.equal(*outputs)


@torch.no_grad()
def test_sequences_may_share_their_positions(model, runs):
    ids, _ = make_ids(batch=3)
    positions = build_glm_position_ids(ids[:1], None, model.config.text_config)
    expected, _ = decode(model, ids)
    _, cache = decode(model, ids[:, :-1])
    runs.clear()
    logits = model(ids[:, -1:], glm_position_ids=positions[..., -1:], cache=cache).logits
    assert torch.equal(logits[:, -1], expected[:, -1])
    assert runs == [3]


@torch.no_grad()
def test_tokens_that_were_cut_off_are_written_over(model, runs):
    ids, _ = make_ids()
    expected, _ = decode(model, ids)
    wrong = ids.clone()
    wrong[:, -4:] = 77
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    _, cache = decode(model, wrong)
    cache.crop(-4)
    for at in range(-4, 0):
        now = {"glm_position_ids": positions[..., at : at + 1 or None], "cache": cache}
        logits = model(ids[:, at : at + 1 or None], **now).logits
        assert torch.equal(logits[:, -1], expected[:, at])
    assert len(runs) == 6 + 6 + 4


def test_chunks_of_several_tokens_are_left_to_the_layers(model, runs):
    ids, _ = make_ids()
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    with torch.no_grad():
        cache = model(ids[:, :PROMPT], glm_position_ids=positions[..., :PROMPT], use_cache=True)[CACHE_NAME]
        model(ids[:, PROMPT:], glm_position_ids=positions[..., PROMPT:], cache=cache)
    assert not runs


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@torch.no_grad()
def test_what_is_not_finite_stays_so_in_its_own_sequence(bad):
    model = make_small_model()
    model.get_input_embeddings().weight[7, 3] = bad
    ids, _ = make_ids(batch=2)
    ids[:, PROMPT:] = 8
    ids[1, -1] = 7
    logits, _ = decode(model, ids)
    logits[..., 7] = 0  # the head is tied to the embeddings
    assert logits[0].isfinite().all()
    assert logits[1, :-1].isfinite().all()
    assert logits[1, -1].isfinite().sum() == 1


# What a program does not do is left to the layers


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def add_hook(layers):
    layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def add_early_hook(layers):
    layers[1].register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))


def replace_forward(layers):
    mlp = layers[1].mlp
    mlp.forward = lambda x, forward=mlp.forward: 2 * forward(x)


def replace_module(layers):
    layers[1].input_layernorm = Scaled(128).bfloat16()


def add_adapter(layers):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["dense"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, layers[1])


@pytest.mark.parametrize("change", [add_hook, add_early_hook, replace_forward, replace_module, add_adapter])
@torch.no_grad()
def test_a_layer_that_was_changed_is_asked_itself_and_the_others_are_programs(runs, change):
    """As after the original's fine-tuning, whose adapters are in two of the layers."""
    model, ids = make_small_model(), make_ids()[0]
    before, _ = decode(model, ids)
    assert len(runs) == 6
    runs.clear()
    change(model.transformer.layers)
    after, _ = decode(model, ids)
    assert len(runs) == 2 * 6
    assert (after - before).abs().max() > 0.01
    assert are_close(after, decode_by_layers(model, ids)[0])


@torch.no_grad()
def test_layers_in_another_order_keep_their_numbers(runs):
    model, ids = make_small_model(), make_ids()[0]
    before, _ = decode(model, ids)
    model.transformer.layers = model.transformer.layers[::-1]
    after, _ = decode(model, ids)
    assert len(runs) == 2 * 6
    assert not are_close(after, before)
    assert are_close(after, decode_by_layers(model, ids)[0])


@torch.no_grad()
def test_global_hooks_see_every_layer(model, runs):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module).__name__))
    try:
        decode(model, make_ids()[0])
    finally:
        handle.remove()
    assert not runs
    assert seen.count("VisualGLMBlock") == 7 * 3


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded_after_programs(model, runs):
    ids, _ = make_ids()
    decode(model, ids)
    runs.clear()
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    cache = model(ids[:, :-1], glm_position_ids=positions[..., :-1], use_cache=True)[CACHE_NAME]
    own = copy.deepcopy(model)  # recording leaves hooks behind
    output = own(ids[:, -1:], glm_position_ids=positions[..., -1:], cache=cache, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    own.config.text_config.output_hidden_states = True
    assert len(decode_last(own, ids).hidden_states) == 4
    assert not runs


@torch.no_grad()
def test_a_prefix_of_p_tuning_is_seen_in_every_step(runs):
    config = copy.deepcopy(SMALL_CONFIG)
    config["text_config"] |= {"pre_seq_len": 4}
    torch.manual_seed(0)
    own = VisualGLMForConditionalGeneration(VisualGLMConfig(**config)).eval().bfloat16()
    own.transformer.prefix_encoder.embedding.weight.mul_(4)
    ids, _ = make_ids()
    assert are_close(decode(own, ids)[0], own(ids).logits[:, PROMPT:])
    assert not runs


def decode_last(model, ids):
    """The output for the last token."""
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    cache = model(ids[:, :-1], glm_position_ids=positions[..., :-1], use_cache=True)[CACHE_NAME]
    return model(ids[:, -1:], glm_position_ids=positions[..., -1:], cache=cache)


def with_gradients(model, ids):
    with torch.enable_grad():
        return decode(model, ids)[0].detach()


def with_autocast(model, ids):
    with torch.autocast("cpu", torch.bfloat16):
        return decode(model, ids)[0]


def with_another_cache(model, ids):
    return decode(model, ids, cache=DynamicCache(config=model.config.text_config))[0]


def with_a_mask_for_all(model, ids):
    """[1, 1, 1, T] for two sequences."""
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    cache = model(ids[:, :-1], glm_position_ids=positions[..., :-1], use_cache=True)[CACHE_NAME]
    mask = torch.ones(1, 1, 1, ids.shape[1], dtype=torch.bool)
    options = {"attention_mask": mask, "glm_position_ids": positions[..., -1:], "cache": cache}
    return torch.cat((decode_by_layers(model, ids[:, :-1])[0], model(ids[:, -1:], **options).logits), dim=1)


def with_eager_attention(model, ids):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return decode(model, ids)[0]


@pytest.mark.parametrize(
    "way", [with_gradients, with_autocast, with_another_cache, with_a_mask_for_all, with_eager_attention]
)
@torch.no_grad()
def test_other_ways_to_compute_a_step_are_left_to_the_layers(model, runs, way):
    ids, _ = make_ids(batch=2)
    logits = way(model, ids)
    assert not runs
    assert are_close(logits, decode_by_layers(model, ids)[0])


@torch.no_grad()
def test_a_cache_of_another_model_is_refused_by_the_layers(model, runs):
    ids, _ = make_ids()
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    sizes = {**SMALL_CONFIG, "text_config": {**SMALL_CONFIG["text_config"], "num_attention_heads": 4}}
    other = VisualGLMForConditionalGeneration(VisualGLMConfig(**sizes)).eval().bfloat16()
    cache = other(ids[:, :-1], glm_position_ids=positions[..., :-1], use_cache=True)[CACHE_NAME]
    with pytest.raises(RuntimeError, match="size"):
        model(ids[:, -1:], glm_position_ids=positions[..., -1:], cache=cache)
    assert not runs


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_attention_heads": 4}, {"intermediate_size": 96}])
@torch.no_grad()
def test_sizes_without_kernels_are_left_to_the_layers(runs, change):
    sizes = {**SMALL_CONFIG, "text_config": {**SMALL_CONFIG["text_config"], **change}}
    model = VisualGLMForConditionalGeneration(VisualGLMConfig(**sizes)).eval().bfloat16().quantize(4, group_size=32)
    assert decode(model, make_ids()[0])[0].isfinite().all()
    assert not runs


@torch.no_grad()
def test_full_precision_is_left_to_the_layers(runs):
    decode(make_small_model(torch.float32), make_ids()[0])
    assert not runs


@torch.no_grad()
def test_code_that_came_with_a_checkpoint_takes_caches_and_layers_of_this_package(tmp_path, monkeypatch):
    """Each folder's code is a copy of its own; the serving engine, for one, makes the caches."""
    make_small_model(bits=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tiny = Path(__file__).parents[2] / "models" / "visualglm-tiny"
    config["auto_map"] = json.loads((tiny / "config.json").read_text())["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in tiny.glob("*.py"):
        shutil.copy(file, tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert type(model) is not VisualGLMForConditionalGeneration
    quantize_(model.transformer, 4)
    copied, batches = sys.modules[type(model).__module__.replace("modeling_visualglm", "cpu_decoder")], []
    assert sys.modules[type(model).__module__].CPU_DECODER.kernels is not None
    run = copied.StepProgram.run
    monkeypatch.setattr(copied.StepProgram, "run", lambda self, *rest: batches.append(1) or run(self, *rest))
    ids, _ = make_ids()
    cache = make_cache(model.config.text_config, torch.device("cpu"))
    assert are_close(decode(model, ids, cache=cache)[0], decode(make_small_model(), ids)[0])
    assert len(batches) == 6


# Weights that change, and what is kept of them


@torch.no_grad()
def test_weights_that_change_are_seen(runs):
    model, ids = make_small_model(), make_ids()[0]
    dense = model.transformer.layers[1].mlp.dense_4h_to_h

    def write_into_weights():
        dense.weight.bitwise_not_()

    def move_weights():
        dense.weight.data = dense.weight.bitwise_not()

    def move_scales():
        dense.weight_scale = dense.weight_scale * 2

    def write_into_norm():
        model.transformer.final_layernorm.bias += 1

    before, _ = decode(model, ids)
    for change in (write_into_weights, move_weights, move_scales, write_into_norm):
        change()
        after, _ = decode(model, ids)
        assert not are_close(after, before)
        assert are_close(after, decode_by_layers(model, ids)[0])
        before = after
    assert len(runs) == 5 * 6


@torch.no_grad()
def test_weights_are_not_kept_when_a_model_is_quantized_or_deleted(runs):
    model = make_small_model(bits=None)
    decode(model, make_ids()[0])
    assert runs
    full = weakref.ref(model.transformer.layers[1].mlp.dense_4h_to_h.weight)
    model.quantize(4)
    gc.collect()
    assert full() is None
    ours, _ = decode(model, make_ids()[0])
    assert are_close(ours, decode_by_layers(model, make_ids()[0])[0])
    decoder = weakref.ref(model.transformer)
    del model
    gc.collect()
    assert decoder() is None


@torch.no_grad()
def test_a_model_can_be_copied_and_saved_after_a_step(runs, tmp_path):
    model, ids = make_small_model(), make_ids()[0]
    expected, _ = decode(model, ids)
    copied = copy.deepcopy(model)
    del model
    assert torch.equal(decode(copied, ids)[0], expected)
    copied.save_pretrained(tmp_path)
    loaded = VisualGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(decode(loaded, ids)[0], expected)
    assert len(runs) == 18


# Threads


@pytest.fixture
def eight_threads():
    """More than most machines that run this have processors."""
    with torch_threads(8):
        yield


@pytest.mark.parametrize("has_openmp", [True, False])
@pytest.mark.usefixtures("eight_threads")
@torch.no_grad()
def test_threads_share_the_stages_and_leave_none(monkeypatch, runs, has_openmp):
    config = copy.deepcopy(SMALL_CONFIG)
    config["text_config"] |= {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    model = VisualGLMForConditionalGeneration(VisualGLMConfig(**config)).eval().bfloat16().quantize(4)
    ids, _ = make_ids(batch=2, length=PROMPT + 12)
    expected, _ = decode_by_layers(model, ids)
    if not has_openmp:
        monkeypatch.setattr(CPU_DECODER.kernels.pool, "openmp", None)
    outs = [decode(model, ids)[0] for _ in range(3)]
    assert len(runs) == 3 * 12
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert are_close(outs[0], expected)


@pytest.mark.parametrize("has_openmp", [True, False])
@torch.no_grad()
def test_answers_at_the_same_time_do_not_disturb_each_other(model, monkeypatch, runs, has_openmp):
    if not has_openmp:
        monkeypatch.setattr(CPU_DECODER.kernels.pool, "openmp", None)
    prompts = [make_ids(batch, length=PROMPT + 20)[0] for batch in (1, 2, 3, 4)]
    expected = [decode(model, ids)[0] for ids in prompts]

    def decode_alone(ids):
        with torch.no_grad():
            return decode(model, ids)[0]

    with ThreadPoolExecutor(8) as pool:
        for out, wanted in zip(pool.map(decode_alone, prompts * 4), expected * 4, strict=True):
            assert torch.equal(out, wanted)
    assert len(runs) == 5 * 4 * 20


# Modes and defaults


def test_steps_in_inference_mode_and_out_of_it_follow_each_other(monkeypatch, runs):
    monkeypatch.setattr("visualglm_hf.modeling_visualglm.CPU_DECODER", make_decoder())
    ids, _ = make_ids()
    with torch.no_grad():
        model = make_small_model()
        expected, _ = decode_by_layers(model, ids)
    runs.clear()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            logits, cache = decode(model, ids)
        assert are_close(logits, expected)
    with torch.no_grad():
        decode_by_layers(model, ids, cache=cache)
        decode(model, ids, cache=cache)
    assert runs.count(1) >= 4 * 6


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_defaults_of_torch_change_nothing(model, monkeypatch, runs, default):
    ids, _ = make_ids(batch=2)
    expected, _ = decode(model, ids)
    monkeypatch.setattr("visualglm_hf.modeling_visualglm.CPU_DECODER", make_decoder())
    with default_dtype(default):
        out, _ = decode(model, ids)
    assert torch.equal(out, expected)
    assert runs.count(2) >= 2 * 6


@torch.no_grad()
def test_another_number_of_threads_is_another_program(model, runs):
    ids, _ = make_ids()
    expected, _ = decode(model, ids)
    for threads in (3, 1):
        with torch_threads(threads):
            assert torch.equal(decode(model, ids)[0], expected)
    assert {key[-1] for key in CPU_DECODER.programs[model.transformer]} >= {1, 3}


# The kernels


@pytest.mark.parametrize(
    ("triple", "machine", "processor"),
    [
        ("x86_64-pc-linux-gnu", "x86_64", "haswell"),
        ("x86_64-pc-windows-msvc", "AMD64", "sapphirerapids"),
        ("aarch64-linux-gnu", "aarch64", "neoverse-n1"),
        ("arm64-apple-darwin", "arm64", "apple-m1"),
    ],
)
def test_the_kernels_compile_for_other_processors_and_call_no_library(triple, machine, processor):
    for task_class in KERNELS:
        for dtype in HALVES:
            assembly = assemble(write_stage("kernel", task_class, 128, dtype), triple, processor)
            assert not any(call in assembly for call in ("call", "\tbl\t"))
    assembly = assemble(write_program("program", machine), triple, processor)
    assert ("pause" if "x86" in triple else "yield") in assembly


@pytest.mark.parametrize("dtype", HALVES)
def test_a_norm_is_torchs(dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 256).mul(3)
    x[1] += 100  # a large mean must not drown the deviations
    x[2] = 0
    x, (weight, bias) = x.to(dtype).float(), torch.randn(2, 256).to(dtype)
    out, kernels = torch.empty_like(x), CPU_DECODER.kernels
    stage = kernels.stage(dtype, 256, NormTask(4, 0, *addresses_of(x, weight, bias, out), 1e-5))
    kernels.pool.run(*stage)
    assert are_close(out.to(dtype), nn.functional.layer_norm(x.to(dtype), (256,), weight, bias, 1e-5))
    assert torch.equal(out, out.to(dtype).float())


def make_decoder() -> CpuDecoder:
    return CpuDecoder(CPU_DECODER.plain, make_example)


@pytest.mark.parametrize("task_class", KERNELS)
@torch.no_grad()
def test_kernels_that_compute_something_else_are_not_used(monkeypatch, runs, task_class):
    right = KERNELS[task_class]

    def write_wrong(k, task, half, columns):
        right(k, task, half, columns)
        out = task.out if hasattr(task, "out") else task.query
        out.of(FLOATS32)[task.chunk * columns].store(k.constant(F32, 3.0))

    monkeypatch.setitem(KERNELS, task_class, write_wrong)
    decoder, model = make_decoder(), make_small_model()
    monkeypatch.setattr("visualglm_hf.modeling_visualglm.CPU_DECODER", decoder)
    ids, _ = make_ids()
    with pytest.warns(RuntimeWarning, match="A decode step in torch.float16 is off by"):
        out, _ = decode(model, ids)
    assert len(runs) == 1  # the self-check
    assert torch.equal(out, decode_by_layers(model, ids)[0])


@torch.no_grad()
def test_without_llvmlite_the_layers_do_the_work_silently(monkeypatch, runs, recwarn):
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")
    monkeypatch.setattr("visualglm_hf.modeling_visualglm.CPU_DECODER", make_decoder())
    assert decode(make_small_model(), make_ids()[0])[0].isfinite().all()
    assert not runs
    assert not recwarn.list


def test_the_self_check_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert make_decoder().kernels is not None
    assert torch.equal(torch.rand(3), expected)
