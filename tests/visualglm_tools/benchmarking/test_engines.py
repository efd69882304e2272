"""Caches that nobody computed go on like those of a prompt."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from visualglm_tools.benchmarking import timing
from visualglm_tools.benchmarking.engines import FilledRunner, ModelEngine, Prompts, fill_cache, random_states


@torch.no_grad()
def test_a_filled_cache_is_like_that_of_a_prompt_and_goes_on_like_it(tiny):
    prompts = Prompts(tiny, batch=2)
    engine, filled = ModelEngine(tiny), ModelEngine(tiny)
    engine.prefill(prompts.ids(30), prompts.image_embeds)
    filled.fill(2, 30)
    for ours, theirs in zip(filled.cache.layers, engine.cache.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape == ours.values.shape
        assert ours.keys.dtype == theirs.keys.dtype
        assert ours.keys.std() > 0 and not torch.equal(ours.keys, ours.values)
    assert filled.decode(prompts.answered(30)).isfinite().all()
    assert filled.cache.get_seq_length() == 31


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_filled_with_a_prompts_own_states_gives_the_prompts_answer(tiny, kind):
    prompts, engine = Prompts(tiny, batch=2), ModelEngine(tiny)
    engine.prefill(prompts.ids(30), prompts.image_embeds)
    states = [(layer.keys.clone(), layer.values.clone()) for layer in engine.cache.layers]
    options = {"max_cache_len": 40} if kind is StaticCache else {}
    engine.cache = fill_cache(kind(config=tiny.config.text_config, **options), states)
    input_ids = prompts.answered(30)
    whole = tiny(input_ids, image_embeds=prompts.image_embeds, logits_to_keep=1).logits
    settings = {"do_sample": False, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    answer = tiny.generate(input_ids, past_key_values=engine.cache, disable_compile=True, **settings)
    torch.testing.assert_close(answer.logits[0], whole[:, -1], rtol=0, atol=1e-5 * whole.abs().max().item())


@torch.no_grad()
def test_the_states_of_a_filled_cache_differ_from_layer_to_layer(tiny):
    keys = [key for key, _ in random_states(tiny, batch=1, context=10)]
    assert len(keys) == 3
    assert not torch.equal(keys[0], keys[1]) and not torch.equal(keys[1], keys[2])


@torch.no_grad()
def test_every_step_of_a_filled_runner_sees_one_token_more(tiny):
    runner = FilledRunner(ModelEngine(tiny), Prompts(tiny, batch=1), timing.Clock(tiny.device))
    runner.start(30)
    assert all(runner.step() > 0 for _ in range(3))
    assert runner.engine.cache.get_seq_length() == 33
    assert runner.input_ids.shape[1] == 34
