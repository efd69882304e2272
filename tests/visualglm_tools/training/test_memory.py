"""The memory that training takes, computed; what the documentation says of it."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from tests.commands import command
from tests.paths import ROOT, TINY
from visualglm_hf import VisualGLMConfig
from visualglm_hf.quantization import record
from visualglm_tools.training import memory
from visualglm_tools.training.adapters import lora_config, prefix_config


def test_weights_of_the_memory_table_are_those_of_the_real_checkpoint(golden_dir):
    keys = json.loads((golden_dir / "full_size_keys.json").read_text(encoding="utf-8"))["keys"]
    stored = {name: math.prod(entry["shape"]) for name, entry in keys.items()}
    wanted = [stored[name] for name in stored if name != "lm_head.weight" and not name.endswith("inv_freq")]
    assert memory.weight_bytes(VisualGLMConfig(), bits=0) == 2 * sum(wanted)
    quantized = r"transformer\.layers\..*(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.weight"
    halved = [stored[name] for name in stored if re.fullmatch(quantized, name)]
    saved = 2 * sum(wanted) - memory.weight_bytes(VisualGLMConfig(), bits=4)
    assert saved == sum(halved) * (16 - 4.25) / 8  # 4 bits, and 16 for each 64 columns


def test_computed_memory_grows_with_the_batch_and_shrinks_with_checkpoints():
    config = VisualGLMConfig.from_pretrained(TINY)
    step = memory.Step(lora_config(memory.RANK, [0, 3]), rows=1, length=40)
    one, two = (memory.estimate(config, replace(step, rows=rows)) for rows in (1, 2))
    kept = memory.estimate(config, replace(step, rows=2, checkpointing=True))
    assert one.activations < two.activations <= 2.01 * one.activations
    assert kept.activations < 0.7 * two.activations
    assert one.adapter == two.adapter == 16 * 10 * 2 * ((128 + 384) + (128 + 128))


@pytest.mark.slow
def test_computed_memory_of_kept_rows_is_about_that_of_as_many_others():
    full = VisualGLMConfig()
    for checkpointing in (False, True):
        step = memory.default_step(4, 1, checkpointing)
        learned, kept = (compute(full, step) for compute in (memory.estimate, memory.estimate_kept))
        more = memory.estimate_kept(full, replace(step, kept_rows=2))
        assert 0.9 * learned.total < kept.total < 1.1 * learned.total
        assert (kept.weights, kept.adapter) == (more.weights, more.adapter) == (learned.weights, learned.adapter)
        assert 1.9 * kept.activations < more.activations < 2.1 * kept.activations
        assert kept.total < more.total and max(kept.total, learned.total) < 9.8e9  # as the original documents for QLoRA


def test_a_step_takes_the_larger_of_what_it_learns_and_what_it_keeps():
    config = VisualGLMConfig.from_pretrained(TINY)
    for kept_rows in (0, 1, 4):
        step = memory.Step(lora_config(memory.RANK, [0, 3]), 2, 40, kept_rows)
        parts = [memory.estimate(config, step)] + ([memory.estimate_kept(config, step)] if kept_rows else [])
        assert memory.estimate_most(config, step).total == max(part.total for part in parts)


def test_whatever_is_trained_has_its_memory_computed():
    config = VisualGLMConfig.from_pretrained(TINY)
    lora, prefix = (memory.Step(adapter, 2, 40) for adapter in (lora_config(10, [0, 3]), prefix_config(4, config)))
    few = memory.estimate(config, lora)
    full = memory.estimate(config, replace(lora, dtype=torch.float32))
    assert full.weights == 2 * few.weights and few.activations < full.activations <= 2 * few.activations
    assert memory.estimate(config, prefix).adapter == 16 * 4 * 2 * 4 * 128  # tokens, keys and values, layers, width
    assert memory.estimate(config, replace(lora, bits=4)).weights < few.weights


def test_a_model_in_low_bits_counts_as_what_it_is():
    full = VisualGLMConfig.from_pretrained(TINY)
    quantized = copy.deepcopy(full)
    record(quantized, 4, None, lm_head=False)
    step = memory.Step(lora_config(memory.RANK, [0, 3]), 1, 40, bits=4)
    assert memory.estimate(quantized, step) == memory.estimate(full, step)


@pytest.mark.slow
def test_the_documented_memory_table_is_the_computed_one(capsys):
    assert command("finetune", "--memory") == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
