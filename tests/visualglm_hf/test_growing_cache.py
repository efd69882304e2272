"""Room: the dynamic cache with room for what comes next, against transformers' own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from visualglm_hf.cache_naming import CACHE_NAME
from visualglm_hf.growing_cache import ROOM, GrowingCache, make_cache
from visualglm_hf.modeling_visualglm import build_glm_position_ids


HEADS, DIMENSION = 2, 3


@pytest.fixture(scope="module")
def config(model):
    return model.config.text_config


def states(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, length, DIMENSION), torch.randn(batch, HEADS, length, DIMENSION)


def are_equal(cache: DynamicCache, other: DynamicCache) -> bool:
    return cache.get_seq_length() == other.get_seq_length() and all(
        torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        for ours, theirs in zip(cache.layers, other.layers, strict=True)
        if theirs.is_initialized
    )


OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 300)),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("crop"), st.integers(1, 40)),
    st.tuples(st.just("reorder"), st.integers(0, 2**20)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("inference"), st.integers(1, 3)),
)


@given(st.lists(OPERATIONS, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_it_holds_what_transformers_own_holds_whatever_is_done_with_it(config, operations):
    cache, other, batch = GrowingCache(config), DynamicCache(config=config), 2
    for name, number in operations:
        length = other.get_seq_length()
        if name in ("update", "inference"):
            with torch.inference_mode(name == "inference"):
                for layer in range(len(other.layers)):
                    new = states(batch, number)
                    returned = cache.update(*new, layer)
                    assert all(torch.equal(a, b) for a, b in zip(returned, other.update(*new, layer), strict=True))
        elif name == "crop" and length > number:
            cache.crop(-number)
            other.crop(-number)
        elif name == "reorder" and length:
            order = torch.randperm(batch, generator=torch.Generator().manual_seed(number))
            cache.reorder_cache(order)
            other.reorder_cache(order)
        elif name == "repeat" and length and batch < 8:
            cache.batch_repeat_interleave(number)
            other.batch_repeat_interleave(number)
            batch *= number
        elif name == "copy":
            cache = copy.deepcopy(cache)
        assert are_equal(cache, other)


@torch.no_grad()
def test_a_token_is_written_beside_the_others_which_stay_where_they_are(config):
    cache = GrowingCache(config)
    keys, _ = cache.update(*states(1, 10), 0)
    for _ in range(ROOM):
        longer, _ = cache.update(*states(1, 1), 0)
        assert longer.data_ptr() == keys.data_ptr()
    assert cache.update(*states(1, 1), 0)[0].data_ptr() != keys.data_ptr()  # the room is used up


@torch.no_grad()
def test_a_copy_does_not_write_into_its_original(config):
    cache = GrowingCache(config)
    cache.update(*states(1, 10), 0)
    copied = copy.deepcopy(cache)
    keys, _ = cache.update(*states(1, 1), 0)
    before = keys.clone()
    copied.update(*states(1, 1), 0)
    assert torch.equal(keys, before)


@torch.no_grad()
def test_states_that_somebody_put_there_are_kept(config):
    ours, theirs = GrowingCache(config), GrowingCache(config)
    for cache in (ours, theirs):
        cache.update(*states(1, 10), 0)
    ours.layers[0].keys = theirs.layers[0].keys
    keys, _ = ours.update(*states(1, 1), 0)
    assert torch.equal(keys[:, :, :10], theirs.layers[0].keys)


def test_gradients_flow_through_it(config):
    cache = GrowingCache(config)
    with torch.no_grad():
        cache.update(*states(1, 4), 0)
    first, second = (tuple(state.requires_grad_() for state in states(1, 1)) for _ in range(2))
    cache.update(*first, 0)
    keys, values = cache.update(*second, 0)
    (keys.square().sum() + values.sum()).backward()
    assert torch.allclose(first[0].grad, 2 * first[0])
    assert torch.equal(second[1].grad, torch.ones_like(second[1]))


@torch.no_grad()
def test_a_step_with_it_compiles_into_one_graph(model, golden):
    case = next(case for case in golden["prompts"] if not case["image"])
    input_ids = torch.tensor([[*case["input_ids"], 700]])
    positions = build_glm_position_ids(input_ids, None, model.config.text_config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits = []
    for call in (model, compiled):
        cache = model(input_ids[:, :-1], glm_position_ids=positions[..., :-1], use_cache=True)[CACHE_NAME]
        logits.append(call(input_ids[:, -1:], glm_position_ids=positions[..., -1:], cache=cache).logits)
    assert torch.equal(*logits)


def test_a_gpu_has_transformers_own(config):
    assert type(make_cache(config, torch.device("cuda"))) is DynamicCache


@torch.no_grad()
def test_forward_and_generate_take_it_on_a_cpu_unless_told_otherwise(model, golden):
    case = next(case for case in golden["prompts"] if not case["image"])
    input_ids = torch.tensor([case["input_ids"]])
    options = {"input_ids": input_ids, "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}

    assert type(model(input_ids, use_cache=True)[CACHE_NAME]) is GrowingCache
    default = model.generate(**options)
    assert type(default.past_key_values) is GrowingCache
    theirs = DynamicCache(config=model.config.text_config)
    for choice in ({"cache": theirs}, {"use_cache": False}, {"cache_implementation": "static"}):
        output = model.generate(**options, **choice)
        assert torch.equal(output.sequences, default.sequences)
    assert theirs.get_seq_length() == default.sequences.shape[1] - 1
