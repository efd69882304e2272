"""`scripts/merge_lora.py`: merged weights answer as base and adapter do, load without PEFT, and can be quantized."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import complaint, convert, merge, quantize
from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error
from tests.paths import TINY
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_tools.checkpoints import adapters


peft = pytest.importorskip("peft")
DECODER = r"transformer\.layers\.(0|2)\.attention\.(query_key_value|dense)"


@pytest.fixture(scope="module")
def base(tiny_original, tmp_path_factory) -> Path:
    """The tiny original in float32, so that merging rounds as little as adapting does."""
    folder = tmp_path_factory.mktemp("merge") / "base"
    assert convert(str(tiny_original), str(folder)) == 0
    weights = load_file(folder / "model.safetensors")
    save_file({key: tensor.float() for key, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def train_nothing(folder: Path, base: Path, **options) -> Path:
    """An adapter with random numbers, as far from the base as training would take it."""
    torch.manual_seed(0)
    kind = options.pop("kind", peft.LoraConfig)
    if kind is peft.LoraConfig:
        options = {"r": 4, "lora_alpha": 4, "target_modules": DECODER, "init_lora_weights": False, **options}
    model = peft.get_peft_model(load_float32(base), kind(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or (kind is not peft.LoraConfig and parameter.requires_grad):
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return train_nothing(tmp_path_factory.mktemp("adapter") / "lora", base)


@pytest.fixture(scope="module")
def merged(base, adapter, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("merge") / "merged"
    assert merge(str(base), str(adapter), str(target)) == 0
    return target


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_merged_logits_equal_the_adapters(base, adapter, merged, described):
    adapted = peft.PeftModel.from_pretrained(load_float32(base), adapter).eval()
    expected = logits(adapted, described)
    assert relative_error(logits(load_float32(merged), described), expected.numpy()) < FLOAT32_TOLERANCE
    assert (expected - logits(load_float32(base), described)).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": r".*(qformer.*query_key_value|glm_proj|dense_4h_to_h)"},
        {"modules_to_save": ["final_layernorm", "glm_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["word_embeddings"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": r"transformer\.word_embeddings"},
        {"target_modules": ["lm_head", "word_embeddings"], "use_dora": True},
        {"kind": peft.TrainableTokensConfig, "token_indices": [5, 6]},
        {"kind": peft.OFTConfig, "oft_block_size": 8, "target_modules": ["lm_head"]},
        {"kind": peft.PrefixTuningConfig, "num_virtual_tokens": 3},
        {"kind": peft.PrefixTuningConfig, "num_virtual_tokens": 3, "prefix_projection": True},
    ],
    ids=[
        "rslora",
        "dora",
        "elsewhere",
        "whole layers",
        "whole head",
        "whole embeddings",
        "head",
        "embeddings",
        "both with dora",
        "tokens",
        "oft of the head",
        "prefix",
        "projected prefix",
    ],
)
def test_every_kind_of_adapter_is_merged(base, described, tmp_path, options):
    adapter = train_nothing(tmp_path / "adapter", base, **options)
    expected = logits(peft.PeftModel.from_pretrained(load_float32(base), adapter).eval(), described)
    assert merge(str(base), str(adapter), str(tmp_path / "merged")) == 0
    assert relative_error(logits(load_float32(tmp_path / "merged"), described), expected.numpy()) < FLOAT32_TOLERANCE
    assert (expected - logits(load_float32(base), described)).abs().max() > 1e-3


def test_a_head_of_its_own_is_written_and_said_so(base, tmp_path):
    """The base ties it to the embeddings, of which it then no longer is one."""
    adapter = train_nothing(tmp_path / "adapter", base, target_modules=["lm_head"])
    assert merge(str(base), str(adapter), str(tmp_path / "merged")) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": peft.PromptTuningConfig, "num_virtual_tokens": 3}, "tokens before the prompt"),
        ({"kind": peft.LilyConfig, "r": 4, "target_modules": DECODER}, "cannot fold LILY"),
        (
            {"kind": peft.LNTuningConfig, "target_modules": ["input_layernorm"], "modules_to_save": ["lm_head"]},
            "lm_head and 0 more layers have an adapter",
        ),
    ],
    ids=["prompt", "lily", "whole layers beside layer norms"],
)
def test_what_peft_cannot_fold_is_refused(base, tmp_path, capsys, options, message):
    adapter = train_nothing(tmp_path / "adapter", base, **options)
    assert message in complaint(capsys, merge, base, adapter, tmp_path / "merged")


def test_merged_folder_loads_without_peft(merged, described, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it would fail
    model, info = VisualGLMForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "adapter_config.json" not in {path.name for path in merged.iterdir()}
    assert logits(model.eval(), described).isfinite().all()


def test_only_what_the_adapter_touches_changes(base, merged):
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    names = ("query_key_value", "dense")
    assert changed == {f"transformer.layers.{layer}.attention.{name}" for layer in (0, 2) for name in names}


def test_half_precision_is_rounded_once(tiny_original, base, adapter, merged, tmp_path):
    """The tiny original has the same numbers as the base, in float16."""
    assert merge(str(tiny_original), str(adapter), str(tmp_path / "half")) == 0
    half, full = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", merged))
    assert all(torch.equal(half[key], full[key].half()) for key in full)


def test_merged_weights_can_be_quantized(base, adapter, merged, described, tmp_path):
    arguments = [str(merged), str(tmp_path / "int4"), "--bits", "4", "--group-size", "16"]
    assert quantize(*arguments) == 0
    expected = load_float32(merged).quantize(4, group_size=16)
    assert torch.equal(logits(load_float32(tmp_path / "int4"), described), logits(expected, described))


@pytest.mark.parametrize("more", [(), ("--quant-image-encoder",)])
def test_quantized_weights_are_refused_with_the_remedy(base, adapter, tmp_path, capsys, more):
    arguments = [str(base), str(tmp_path / "int8"), "--bits", "8", *more]
    assert quantize(*arguments) == 0
    error = complaint(capsys, merge, tmp_path / "int8", adapter, tmp_path / "merged")
    assert "quantized weights" in error and "merge there, and quantize the result" in error


def test_adapter_of_a_model_of_another_size_is_refused(adapter, tmp_path, capsys):
    error = complaint(capsys, merge, TINY, adapter, tmp_path / "merged")
    assert "does not fit this model" in error


def test_adapter_of_other_weights_of_the_same_size_is_refused(base, adapter, tmp_path, capsys):
    files = adapters
    adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    other = load_float32(base)
    files.write_fingerprint(adapter, files.fingerprint(other))
    assert merge(str(base), str(adapter), str(tmp_path / "same")) == 0
    torch.nn.init.normal_(other.transformer.word_embeddings.weight)
    files.write_fingerprint(adapter, files.fingerprint(other))
    assert "another base model" in complaint(capsys, merge, base, adapter, tmp_path / "merged")


def test_an_adapter_is_put_on_without_advice_to_install_what_nothing_here_needs(base, adapter):
    """As bitsandbytes has, which PEFT imports, of a package `kernels`."""
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.NOTSET)
    adapters.attach_adapter(load_float32(base), adapter)
    assert not logger.isEnabledFor(logging.WARNING)


def test_an_adapter_is_merged_once_alone(base, adapter, merged, tmp_path, capsys):
    """However little it changes, and whatever becomes of the merged weights."""
    assert "merged into these weights already" in complaint(capsys, merge, merged, adapter, tmp_path / "again")
    assert quantize(str(merged), str(tmp_path / "int8"), "--bits", "8") == 0
    with pytest.raises(ValueError, match="merged into these weights already"):
        adapters.attach_adapter(load_float32(tmp_path / "int8"), adapter)
    another = train_nothing(tmp_path / "another", merged, r=2)
    assert merge(str(merged), str(another), str(tmp_path / "both")) == 0
    for each in (adapter, another):
        assert "merged into these weights already" in complaint(capsys, merge, tmp_path / "both", each, tmp_path / "x")


def lose_weights(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[2:]), folder / "adapter_model.safetensors")


def break_numbers(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor * torch.nan for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"), "does not fit this model"),
        (lose_weights, "in the adapter or in the model alone"),
        (break_numbers, "NaN"),
    ],
    ids=["config", "weights", "JSON", "cut", "missing", "NaN"],
)
def test_unusable_adapter_is_refused(base, adapter, tmp_path, capsys, damage, message):
    adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    damage(adapter)
    assert message in complaint(capsys, merge, base, adapter, tmp_path / "merged")


def test_target_with_content_is_not_touched(base, adapter, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").touch()
    assert "nothing is overwritten" in complaint(capsys, merge, base, adapter, tmp_path / "merged")


def test_sat_adapter_is_merged_as_sat_merges_it(golden_dir, tiny_original, tmp_path):
    tokenizer = ["--tokenizer", str(tiny_original)]
    source = str(golden_dir / "sat_lora")
    assert convert(source, str(tmp_path / "kept"), *tokenizer) == 0
    assert convert(source, str(tmp_path / "expected"), "--lora", "merge", *tokenizer) == 0
    kept = tmp_path / "kept"
    assert merge(str(kept), str(kept / "adapter"), str(tmp_path / "merged")) == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert found.keys() == expected.keys()
    # Here three products are summed in one, in another order: at most the last bit of a half differs.
    assert all((found[key] - tensor).abs().max() <= tensor.abs().max() * 2**-10 for key, tensor in expected.items())


def test_generation_defaults_are_kept(base, adapter, tmp_path):
    source = Path(shutil.copytree(base, tmp_path / "source"))
    fields = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.5, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(fields))
    assert merge(str(source), str(adapter), str(tmp_path / "merged")) == 0
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()) == fields
