"""Room: the name of the cache of keys and values, which transformers changed in 5.24."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from visualglm_hf.cache_naming import CACHE_NAME, OLD_NAME
from visualglm_hf.modeling_visualglm import build_glm_position_ids


NAMES = ("cache", OLD_NAME)


@torch.no_grad()
def fill(model, input_ids, name):
    """A cache of all but the last token, and their positions."""
    cache = DynamicCache()
    positions = build_glm_position_ids(input_ids, None, model.config.text_config)
    model(input_ids[:, :-1], glm_position_ids=positions[..., :-1], use_cache=True, **{name: cache})
    return cache, positions


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_and_fills_the_cache_by_either_name(model, prompt, name):
    cache, positions = fill(model, prompt, name)
    assert cache.get_seq_length() == prompt.shape[1] - 1
    with torch.no_grad():
        step = model(prompt[:, -1:], glm_position_ids=positions[..., -1:], **{name: cache}).logits
        whole = model(prompt, logits_to_keep=1).logits
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_from_a_cache_by_either_name(model, prompt, name):
    options = {"input_ids": prompt, "max_new_tokens": 4, "do_sample": False}
    cache, _ = fill(model, prompt, name)
    output = model.generate(**options, **{name: cache})
    assert torch.equal(output, model.generate(**options))
    assert cache.get_seq_length() == output.shape[1] - 1


def test_output_has_the_cache_by_the_name_that_transformers_reads(model, prompt):
    with torch.no_grad():
        output = model(prompt, use_cache=True)
    assert output[CACHE_NAME].get_seq_length() == prompt.shape[1]
    with torch.no_grad():
        assert CACHE_NAME not in model(prompt, use_cache=False)


def test_prefix_of_peft_finds_the_cache_under_the_older_name(model, prompt):
    cache = DynamicCache()
    inputs = model.prepare_inputs_for_generation(prompt, **{CACHE_NAME: cache}, is_first_iteration=True)
    assert inputs[OLD_NAME] is cache


@pytest.mark.parametrize(
    "method", ["forward", "generate", "prepare_inputs_for_generation", "create_masks_for_generate"]
)
def test_signature_shows_the_name_that_transformers_looks_for(model, method):
    parameters = inspect.signature(getattr(model, method)).parameters
    assert CACHE_NAME in parameters
    assert not set(NAMES) - {CACHE_NAME} & set(parameters)


def test_a_cache_by_both_names_is_refused(model, prompt):
    with pytest.raises(ValueError, match="once, as cache or as past_key_values"):
        model(prompt, cache=DynamicCache(), past_key_values=DynamicCache())


def test_a_chat_uses_no_name_that_transformers_warns_of():
    code = """
import warnings
warnings.simplefilter("error", FutureWarning)
from transformers import AutoModel, AutoTokenizer
folder = "models/visualglm-tiny"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
model.chat(tokenizer, "examples/red_circles_on_grass.png", "Describe it.", history=[])
for answer in model.stream_chat(tokenizer, "Hello", history=[]):
    pass
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert "deprecated" not in result.stderr
