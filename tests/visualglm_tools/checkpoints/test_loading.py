"""The one loader of checkpoints: whichever tool loads, the model is the same and the refusals are."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import python, quantize, run
from tests.helpers import assert_same_state
from tests.paths import COMMAND, TINY
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_tools.benchmarking.run import make_model
from visualglm_tools.benchmarking.settings import Settings
from visualglm_tools.checkpoints import checks
from visualglm_tools.checkpoints.loading import load_model, load_tokenizer, load_weights
from visualglm_tools.training.adapters import load_base


CPU = torch.device("cpu")
LOST = "transformer.layers.1.mlp.dense_h_to_4h.weight"
DOORS = {
    "answering": lambda folder: load_model(folder, "cpu", "float32"),
    "training": lambda folder: load_base(folder, torch.float32),
    "measuring": lambda folder: make_model(Settings(model=folder, dtype="float32"), CPU),
    "checking": checks.load,
}


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != LOST},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def describe_another_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "num_layers": 28}))


FAULTS = {
    "no folder": (shutil.rmtree, "no checkpoint in .*: there is no such folder"),
    "no checkpoint": (lambda folder: (folder / "config.json").unlink(), "no checkpoint in .*: it has no config.json"),
    "another model": (describe_another_model, "is not of a VisualGLM"),
    "a config cut short": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json' is no JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load .*: .*model.safetensors"),
    "weights cut short": (cut, "cannot load .*: "),
    "a weight is missing": (lose, f"lacks 1 weights, among them {LOST}; they would be random"),
}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.mark.parametrize("fault", FAULTS)
def test_all_tools_refuse_a_folder_in_the_same_words(folder, fault):
    damage, expected = FAULTS[fault]
    damage(folder)
    said = {}
    for name, load in DOORS.items():
        with pytest.raises(ValueError, match=expected) as refusal:
            load(folder)
        said[name] = str(refusal.value)
    assert len(set(said.values())) == 1, said
    # Where weights are not mapped, the scales of the weight are lacking, too.
    with pytest.raises(ValueError, match=expected.replace("lacks 1", "lacks [12]")):
        load_base(folder, torch.float32, bits=4)


def test_only_answering_runs_the_code_beside_the_weights():
    for name in ("training", "measuring", "checking"):
        assert type(DOORS[name](TINY)) is VisualGLMForConditionalGeneration
    code = f"""
from visualglm_tools.checkpoints.loading import load_model

for quant in (None, 4):
    model, tokenizer = load_model({str(TINY)!r}, "cpu", quant=quant)
    print(type(model).__module__, type(tokenizer).__module__)
"""
    # In a process of its own: once this one has called `register()`, the package's classes are taken for all.
    output = python("-c", code).stdout
    assert [word.partition(".")[0] for word in output.split()] == ["transformers_modules"] * 4


def test_the_code_of_the_original_does_not_run(tiny_original):
    model, tokenizer = load_model(tiny_original, "cpu", "float32")
    assert type(model) is VisualGLMForConditionalGeneration
    assert type(tokenizer) is type(load_tokenizer(tiny_original))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_low_bits_are_equal_whether_stored_so_or_quantized_before_or_while_loading(tmp_path, bits):
    assert quantize(TINY, tmp_path / "stored", "--bits", bits) == 0
    expected = load_weights(TINY, torch.float16).quantize(bits).state_dict()
    stored = tmp_path / "stored"
    asked = ((TINY, bits), (stored, bits), (stored, None))
    ways = [load_weights(folder, torch.float16, few) for folder, few in asked]
    ways += [load_model(folder, "cpu", "float16", quant=bits)[0] for folder in (TINY, stored)]
    for model in ways:
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_image_encoder_in_8_bits_is_the_same_whether_stored_so_or_quantized_before_or_while_loading(tmp_path):
    assert quantize(TINY, tmp_path / "stored", "--bits", 4, "--quant-image-encoder") == 0
    expected = load_weights(TINY, torch.float16).quantize(4, image_encoder=True)
    stored = tmp_path / "stored"
    ways = [load_weights(stored, torch.float16), load_weights(stored, torch.float16, 4)]
    ways += [load_weights(folder, torch.float16, 4, image_encoder=True) for folder in (TINY, stored)]
    ways += [load_model(TINY, "cpu", "float16", quant=4, quant_image_encoder=True)[0]]
    ways += [make_model(Settings(model=TINY, dtype="float16", quant=4, quant_image_encoder=True), CPU)]
    for model in ways:
        assert_same_state(model, expected)
        assert model.config.quantization_image_encoder


def test_an_image_encoder_in_8_bits_that_cannot_be_had_is_refused_before_anything_is_loaded(tmp_path):
    assert quantize(TINY, tmp_path / "stored", "--bits", 4) == 0
    (tmp_path / "stored" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="full image encoder beside its weights of 4 bits. Quantize the full weights"):
        load_weights(tmp_path / "stored", torch.float32, 4, image_encoder=True)
    with pytest.raises(ValueError, match="goes with a language model in 8 or 4 bits"):
        load_weights(TINY, torch.float32, image_encoder=True)
    with pytest.raises(ValueError, match="bitsandbytes leaves the image encoder as it is"):
        load_weights(TINY, torch.float32, 4, "nf4", image_encoder=True)


def test_bits_that_contradict_those_of_the_weights_are_refused_before_anything_is_loaded(tmp_path):
    assert quantize(TINY, tmp_path / "stored", "--bits", 4) == 0
    (tmp_path / "stored" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has weights of 4 bits, not of 8"):
        load_weights(tmp_path / "stored", torch.float32, 8)
    with pytest.raises(ValueError, match="has weights of 4 bits, not of 8"):
        load_model(tmp_path / "stored", "cpu", quant=8)
    with pytest.raises(ValueError, match="has weights of 4 bits, not of 4 in nf4"):
        load_weights(tmp_path / "stored", torch.float32, 4, "nf4")
    with pytest.raises(ValueError, match="has weights of 4 bits, not of 8"):
        make_model(Settings(model=tmp_path / "stored", dtype="float32", quant=8), CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_home_that_cannot_be_written_is_said_with_the_remedy():
    environment = {"HOME": "/proc", "HF_HOME": None, "HF_MODULES_CACHE": None, "XDG_CACHE_HOME": None}
    finished = run(*COMMAND, "chat", "--query", "你好", "--model", TINY, code=2, environment=environment)
    [line] = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert "/proc/.cache" in line and "HF_HOME, or HF_MODULES_CACHE" in line
