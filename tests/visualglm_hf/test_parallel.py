"""Several devices: weights spread and offloaded by accelerate, and divided among processes by a tensor-parallel plan.

Without GPUs, the devices are the CPU and the disk, and the processes two of one machine that talk through gloo.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import infer_auto_device_map

from tests.helpers import FLOAT32_TOLERANCE, relative_error
from tests.paths import ROOT
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration


OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

# What each process does: load its share, answer, and (the first one) write down what came out.
SHARE = """
import json, sys
import torch
from transformers.distributed import DistributedConfig
from visualglm_hf import VisualGLMForConditionalGeneration

folder, out = sys.argv[1:]
model = VisualGLMForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
).eval()
inputs = torch.load(f"{out}/inputs.pt", weights_only=True)
with torch.no_grad():
    logits = model(**inputs).logits
tokens = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
model.train()
model.transformer.requires_grad_(True)
layer = model.transformer.layers[1]
loss = model(input_ids=inputs["input_ids"][1:, -6:], labels=inputs["input_ids"][1:, -6:]).loss
loss.backward()
local = {name: list(p.to_local().shape) for name, p in layer.named_parameters() if hasattr(p, "to_local")}
gradient = layer.attention.query_key_value.weight.grad
gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
if torch.distributed.get_rank() == 0:
    torch.save({"logits": logits, "tokens": tokens, "loss": loss.detach(), "gradient": gradient}, f"{out}/outputs.pt")
    json.dump(local, open(f"{out}/shapes.json", "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def inputs(processor, pictures) -> dict:
    text = f"<img>{processor.image_token}</img>问：描述这张图片。\n答："
    return processor(text=[text, "问：你好\n答："], images=[pictures[:1], []], padding=True, return_tensors="pt")


def run_processes(number: int, *arguments: object) -> subprocess.CompletedProcess:
    """Start processes as torchrun does; only what goes wrong is printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(arguments[-1]) / "share.py"
    script.write_text(SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}", f"--master_port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_two_processes_compute_what_one_computes(model, inputs, tiny_original, tmp_path):
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    result = run_processes(2, tiny_original, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert relative_error(outputs["logits"], expected.numpy()) < FLOAT32_TOLERANCE
    assert torch.equal(outputs["tokens"], model.generate(**inputs, **OPTIONS))

    ids = inputs["input_ids"][1:, -6:]
    loss = model(input_ids=ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(loss, model.transformer.layers[1].attention.query_key_value.weight)
    assert relative_error(outputs["loss"][None], loss.detach()[None].numpy()) < FLOAT32_TOLERANCE
    assert relative_error(outputs["gradient"], gradient.numpy()) < FLOAT32_TOLERANCE
    # Each process has half of the rows, which are whole heads, or half of the columns.
    shapes = json.loads((tmp_path / "shapes.json").read_text())
    assert shapes["attention.query_key_value.weight"] == [96, 64]
    assert shapes["attention.dense.weight"] == [64, 32]
    assert shapes["mlp.dense_h_to_4h.weight"] == [128, 64]
    assert shapes["mlp.dense_4h_to_h.weight"] == [64, 128]


def test_plan_names_every_matrix_of_the_decoder(model):
    plan = {**model.config.text_config.base_model_tp_plan}
    named = {name.replace("layers.*", f"layers.{index}") for name in plan for index in range(4)}
    linear = {
        name
        for name, module in model.transformer.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    assert linear <= named
    assert model.supports_tp_plan


def divided(tiny_original, number: int, **changes) -> VisualGLMConfig:
    """The configuration as `from_pretrained` hands it to the model in one of several processes."""
    config = VisualGLMConfig.from_pretrained(tiny_original, **changes)
    config.distributed_config = SimpleNamespace(tp_size=number)
    return config


@pytest.mark.parametrize(
    ("number", "changes", "complaint"),
    [
        (3, {}, "3 processes cannot share 4 attention heads evenly"),
        (8, {}, "Start a number that divides 4"),
        (2, {"pre_seq_len": 5}, "pre_seq_len cannot be divided among"),
        (2, {"quantization_bit": 4}, "quantization_bit cannot be divided among"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_weights_are_read(tiny_original, number, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        VisualGLMForConditionalGeneration(divided(tiny_original, number, **changes))


@pytest.mark.slow
def test_three_processes_are_refused_in_one_line(tiny_original, inputs, tmp_path):
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    result = run_processes(3, tiny_original, tmp_path)
    assert result.returncode != 0
    assert "ValueError: 3 processes cannot share 4 attention heads evenly" in result.stderr


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def test_no_layer_is_cut_in_two(model):
    sizes = {name: sum(p.nbytes for p in module.parameters()) for name, module in model.named_modules()}
    for limit in range(500_000, sum(p.nbytes for p in model.parameters()), 150_000):
        memory = {"cpu": limit, "disk": 10**9}
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        whole = re.compile(r"|transformer(\.\w+|\.layers\.\d+)?|lm_head|image_encoder")
        assert [name for name in device_map if not whole.fullmatch(name)] == []
        assert all(sizes[name] <= limit for name, device in device_map.items() if device == "cpu")


@pytest.mark.parametrize("spread", ["auto", "disk", "some"])
def test_spread_and_offloaded_weights_answer_the_same(model, inputs, saved, tokenizer, pictures, tmp_path, spread):
    device_map = {"": "disk"} if spread == "disk" else "auto"
    if spread == "some":
        memory = {"cpu": sum(p.nbytes for p in model.parameters()) * 3 // 4, "disk": 10**9}
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        assert set(device_map.values()) == {"cpu", "disk"}
    offloaded = VisualGLMForConditionalGeneration.from_pretrained(
        saved, device_map=device_map, offload_folder=tmp_path, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(offloaded.generate(**inputs, **OPTIONS), model.generate(**inputs, **OPTIONS))
    options = {"do_sample": False, "max_new_tokens": 6}
    answers = [one.chat(tokenizer, pictures[1], "描述这张图片。", **options)[0] for one in (offloaded, model)]
    assert answers[0] == answers[1]


def test_prefix_is_offloaded_too(tiny_original, inputs, tmp_path):
    options = {"pre_seq_len": 4, "prefix_projection": True, "dtype": torch.float32}
    tuned = VisualGLMForConditionalGeneration.from_pretrained(tiny_original, **options).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    offloaded = VisualGLMForConditionalGeneration.from_pretrained(
        tmp_path / "tuned", device_map={"": "disk"}, offload_folder=tmp_path / "disk"
    ).eval()
    assert torch.equal(offloaded.generate(**inputs, **OPTIONS), tuned.generate(**inputs, **OPTIONS))
