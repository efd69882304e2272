"""Room: the attention of a decode step that LLVM compiles for this CPU, against torch's in float64."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.helpers import assemble, default_dtype, skip_without_cpu_kernels, torch_threads
from visualglm_hf import cpu_attention, cpu_language
from visualglm_hf.cpu_attention import (
    CpuAttention,
    query_obstacle,
    single_query_attention,
    single_query_attention_naive,
    states_obstacle,
)
from visualglm_hf.kernel_choice import KernelError
from visualglm_hf.modeling_visualglm import build_glm_position_ids


skip_without_cpu_kernels()
HALVES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # largest error beside 1: weights, result are rounded
ATTENTION = CpuAttention()  # compiles each kernel once for all tests


def make_problem(length, columns=64, batch=2, heads=3, dtype=torch.bfloat16, masked=True, seed=0):
    """Arguments of `single_query_attention`; with a mask, a key that nobody may see is larger than all others."""
    random = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(batch, heads, n, columns, generator=random).to(dtype) for n in (1, length, length))
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, length, generator=random) < 0.7
        mask[..., -1] = True
        key[:, :, 0] *= 1 if mask[..., 0].all() else 100
    return query, key, value, mask, 0.4


def is_right(out, query, key, value, mask, scaling) -> bool:
    expected = single_query_attention_naive(query.double(), key.double(), value.double(), mask, scaling)
    bound = HALVES[query.dtype] * expected.abs().clamp(min=0.5)
    return out.shape == expected.shape and out.dtype == query.dtype and ((out - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("columns", [16, 48, 64, 80, 128])
def test_attention_equals_the_reference(columns, dtype):
    for length in (1, 2, 15, 16, 17, 64, 333):
        for masked in (False, True):
            problem = make_problem(length, columns, dtype=dtype, masked=masked)
            assert states_obstacle(*problem[:4]) is None
            assert is_right(ATTENTION(*problem), *problem)


@given(st.integers(1, 80), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_attention_that_fits_is_computed_right(length, batch, heads, masked, seed):
    problem = make_problem(length, 32, batch, heads, masked=masked, seed=seed)
    assert is_right(ATTENTION(*problem), *problem)


def test_keys_and_values_may_be_the_beginning_of_a_longer_cache():
    query, key, value, mask, scaling = make_problem(40)
    problem = query, key[:, :, :25], value[:, :, :25], mask[..., :25].contiguous(), scaling
    assert not problem[1].is_contiguous()
    assert states_obstacle(*problem[:4]) is None
    assert is_right(ATTENTION(*problem), *problem)


@pytest.mark.parametrize("has_openmp", [True, False])
def test_threads_share_the_heads_and_leave_none(monkeypatch, has_openmp):
    if not has_openmp:
        monkeypatch.setattr(ATTENTION.kernels.pool, "openmp", None)
    with torch_threads(4):
        for heads in (1, 3, 32):
            problem = make_problem(100, heads=heads)
            assert is_right(ATTENTION(*problem), *problem)


def test_threads_that_need_a_kernel_at_once_get_one():
    attention = CpuAttention()
    problems = [make_problem(20, columns, seed=columns) for columns in (32, 48, 80)] * 8
    with ThreadPoolExecutor(8) as pool:
        for out, problem in zip(pool.map(lambda problem: attention(*problem), problems), problems, strict=True):
            assert is_right(out, *problem)


def test_scores_far_apart_neither_overflow_nor_vanish():
    query, key, value, _, _ = make_problem(30, masked=False)
    for scaling in (1e-6, 50.0, 1e4):
        problem = query, key, value, None, scaling
        out = ATTENTION(*problem)
        assert out.isfinite().all()
        assert is_right(out, *problem)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad):
    problem = make_problem(30, masked=False)
    problem[1][1, 2, 7, 3] = bad
    out = ATTENTION(*problem)
    assert out[0].isfinite().all()
    assert out[1, 0, :2].isfinite().all()
    assert not out[1, 0, 2].isfinite().any()


def test_without_any_key_that_may_be_seen_all_count_the_same():
    """As in the original, whose masked scores are finite."""
    query, key, value, _, scaling = make_problem(9)
    out = ATTENTION(query, key, value, torch.zeros(2, 1, 1, 9, dtype=torch.bool), scaling)
    assert torch.allclose(out[:, 0].float(), value.float().mean(2), atol=1e-2)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_other_defaults_of_torch_change_nothing(default):
    problem = make_problem(40)
    expected = ATTENTION(*problem)
    with default_dtype(default), torch.device("meta"):
        attention = CpuAttention()
        assert attention.kernels is not None
        out = attention(*problem)
    assert torch.equal(out, expected)


def test_what_does_not_fit_takes_the_torch_way(monkeypatch):
    monkeypatch.setattr(ATTENTION.kernels, "attend", None)
    query, key, value, mask, scaling = make_problem(20)
    several = torch.randn(2, 3, 5, 64).bfloat16()
    by_column = key.transpose(2, 3).contiguous().transpose(2, 3)
    added = torch.zeros(2, 1, 1, 20, dtype=torch.bfloat16)
    odd = [states[..., :40].contiguous() for states in (query, key, value)]
    for problem, obstacle in (
        ((several, key, value, None), "several queries"),
        ((query, by_column, value, mask), "another layout"),
        ((query, key, value.half(), mask), "bfloat16 keys and float16 values"),
        ((query, key, value, added), "mask that is not boolean"),
        ((query, key, value, mask[:1]), "not for each sequence"),
        ((query.float(), key.float(), value.float(), mask), "float32 keys"),
        ((*odd, mask), "heads of 40 numbers"),
        ((query[:0], key[:0], value[:0], None), "nothing to attend to"),
    ):
        assert obstacle in states_obstacle(*problem)
        if problem[1].dtype == problem[2].dtype:
            assert torch.equal(ATTENTION(*problem, scaling), single_query_attention_naive(*problem, scaling))


@pytest.mark.parametrize(
    ("implementation", "shape", "dtype", "mask", "obstacle"),
    [
        ("sdpa", (1, 2, 1, 64), torch.float16, None, None),
        ("sdpa", (1, 2, 1, 64), torch.float16, torch.ones(1, 1, 1, 3, dtype=torch.bool), None),
        ("eager", (1, 2, 1, 64), torch.float16, None, "eager attention"),
        ("sdpa", (1, 2, 3, 64), torch.float16, None, "several queries"),
        ("sdpa", (1, 2, 1, 64), torch.float32, None, "float32 activations"),
        ("sdpa", (1, 2, 1, 64), torch.float16, torch.ones(1, 1, 1, 3), "a mask that is not boolean"),
    ],
)
def test_the_model_is_told_why_it_has_to_attend_otherwise(implementation, shape, dtype, mask, obstacle):
    query = torch.zeros(shape, dtype=dtype)
    with torch.no_grad():
        assert query_obstacle(implementation, query, mask) == obstacle
        if obstacle is None:
            assert query_obstacle(implementation, query.to("meta"), mask) == "queries on meta"
    assert query_obstacle("sdpa", torch.zeros(1, 2, 1, 64).half(), None) == "gradients"


def test_without_llvmlite_torch_does_the_work_silently(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    problem = make_problem(20)
    assert torch.equal(CpuAttention()(*problem), single_query_attention_naive(*problem))
    assert not recwarn.list
    monkeypatch.setenv("VISUALGLM_KERNELS", "cpu")
    with pytest.raises(KernelError, match="pip install llvmlite"):
        CpuAttention()(*problem)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(cpu_language, "LN_2", (0.7, 0.0))
    problem = make_problem(20)
    attention = CpuAttention()
    with pytest.warns(RuntimeWarning, match="Attention to torch.float16 is off by"):
        out = attention(*problem)
    assert torch.equal(out, single_query_attention_naive(*problem))


@pytest.mark.parametrize(
    ("triple", "processor"),
    [
        ("x86_64-pc-linux-gnu", "haswell"),
        ("x86_64-pc-windows-msvc", "sapphirerapids"),
        ("aarch64-linux-gnu", "neoverse-n1"),
        ("arm64-apple-darwin", "apple-m1"),
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_kernel_compiles_for_other_processors_and_calls_no_library(triple, processor, dtype):
    assembly = assemble(cpu_attention.write_attention("attention", dtype, 128), triple, processor)
    assert "attention" in assembly
    assert not any(call in assembly for call in ("call", "\tbl\t"))


def test_the_operator_is_what_torch_expects_of_one():
    torch.library.opcheck(torch.ops.visualglm.single_query_attention.default, make_problem(20))
    problem = make_problem(20)
    compiled = torch.compile(single_query_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*problem), single_query_attention(*problem))


# In the model


@pytest.fixture
def calls(monkeypatch):
    """The number of keys at each call of the operator by the model."""
    from visualglm_hf import modeling_visualglm

    lengths = []

    def count(query, key, *args):
        lengths.append(key.shape[2])
        return single_query_attention(query, key, *args)

    monkeypatch.setattr(modeling_visualglm, "single_query_attention", count)
    return lengths


def decode(model, input_ids):
    """Logits of the last token after a cached context."""
    positions = build_glm_position_ids(input_ids, None, model.config.text_config)
    cache = DynamicCache()
    model(input_ids[:, :-1], glm_position_ids=positions[..., :-1], cache=cache, use_cache=True, logits_to_keep=1)
    return model(input_ids[:, -1:], glm_position_ids=positions[..., -1:], cache=cache, use_cache=True).logits


@torch.no_grad()
def test_a_decode_step_in_half_precision_takes_it_and_says_the_same(half_model, prompt, calls, monkeypatch):
    layers = half_model.config.text_config.num_hidden_layers
    ours = decode(half_model, prompt)
    assert calls == [prompt.shape[1]] * layers
    half_model.set_attn_implementation("eager")
    try:
        theirs = decode(half_model, prompt)
    finally:
        half_model.set_attn_implementation("sdpa")
    assert len(calls) == layers
    assert torch.allclose(ours, theirs, atol=0.1)


def test_gradients_and_full_precision_do_without(model, half_model, prompt, calls):
    with torch.no_grad():
        decode(model, prompt)
    decode(half_model, prompt)
    assert not calls
