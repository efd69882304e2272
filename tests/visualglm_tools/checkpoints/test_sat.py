"""SAT checkpoints, both ways: what comes over computes what SAT computed, and nothing in a file is executed."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.commands import complaint
from tests.commands import convert as run_convert
from tests.helpers import FLOAT32_TOLERANCE, assert_same, load_float32, relative_error
from tests.paths import TINY
from visualglm_hf import VisualGLMForConditionalGeneration


PART = "mp_rank_00_model_states.pt"
QKV = "transformer.layers.0.attention.query_key_value.weight"
ROTARY = "mixins.chatglm-attn.rotary_emb.inv_freq"
BOTH_VERSIONS = pytest.mark.parametrize("version", ["0.3", "0.4"])
LAST = 8  # positions of a case's logits that were kept


@pytest.fixture(scope="module")
def sat(golden_dir) -> dict:
    return json.loads((golden_dir / "golden_sat.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sat_arrays(golden_dir):
    with np.load(golden_dir / "golden_sat.npz") as file:
        yield file


@pytest.fixture(scope="module")
def convert(tiny_original, tmp_path_factory):
    """Convert with the golden tokenizer; returns the new folder."""

    def convert(source: Path, *options: str) -> Path:
        target = tmp_path_factory.mktemp("sat") / "converted"
        assert run_convert(str(source), str(target), "--tokenizer", str(tiny_original), *options) == 0
        return target

    return convert


@pytest.fixture(scope="module")
def from_sat(convert, golden_dir) -> Path:
    """The tiny SAT checkpoint, converted; not to be changed."""
    return convert(golden_dir / "sat", "--from", "sat", "--sat-version", "0.4")


@pytest.fixture(scope="module")
def to_sat(convert, tiny_original) -> Path:
    """The tiny original, converted to SAT; not to be changed."""
    return convert(tiny_original, "--to", "sat")


@pytest.fixture
def source(golden_dir, tmp_path) -> Path:
    """A copy of the tiny SAT checkpoint, to be changed."""
    return Path(shutil.copytree(golden_dir / "sat", tmp_path / "source"))


def read_part(folder: Path, iteration: str = "1", number: int = 0) -> dict:
    return torch.load(folder / iteration / f"mp_rank_{number:02d}_model_states.pt", weights_only=True)["module"]


def write_parts(folder: Path, *modules: dict) -> None:
    for number, module in enumerate(modules):
        torch.save({"module": module}, folder / "1" / f"mp_rank_{number:02d}_model_states.pt")


def logits_of(model, case: dict, pixel_values: torch.Tensor) -> torch.Tensor:
    picture = pixel_values[int(case["image"][3])][None] if case["image"] else None
    with torch.no_grad():
        return model(input_ids=torch.tensor([case["input_ids"]]), pixel_values=picture).logits[0, -LAST:]


def assert_computes(model, cases: list[dict], arrays, name: str, pixel_values) -> None:
    for number, case in enumerate(cases):
        assert relative_error(logits_of(model, case, pixel_values), arrays[f"{name}.{number}"]) < FLOAT32_TOLERANCE


# --- from SAT


def test_converted_model_computes_what_sat_computed(from_sat, sat, sat_arrays, pixel_values):
    cases = sat["mapping_proof.tiny-original"]["cases"]
    assert_computes(load_float32(from_sat), cases, sat_arrays, "tiny-original.sat_native.logits.f32", pixel_values)


def test_model_of_full_depth_computes_what_both_originals_computed(convert, golden_dir, sat, sat_arrays, pixel_values):
    model = load_float32(convert(golden_dir / "sat28", "--sat-version", "0.4.12"))
    cases = sat["mapping_proof.tiny28-original"]["cases"]
    assert_computes(model, cases, sat_arrays, "tiny28-original.hf.logits.f32", pixel_values)


def test_weights_are_those_of_the_hugging_face_checkpoint(from_sat, convert, tiny_original):
    assert_same(load_file(from_sat / "model.safetensors"), load_file(convert(tiny_original) / "model.safetensors"))


def test_residual_factor_is_sats(from_sat):
    config = load_float32(from_sat).config.text_config
    assert math.isclose(config.residual_alpha, math.sqrt(2 * config.num_hidden_layers))


def test_what_is_dropped_is_named(golden_dir, tiny_original, tmp_path, capsys):
    arguments = [golden_dir / "sat", tmp_path / "new", "--tokenizer", tiny_original, "--sat-version", "0.4"]
    assert run_convert(*arguments) == 0
    assert "transformer.position_embeddings.weight is dropped" in capsys.readouterr().err


def test_folder_of_an_iteration_is_read(convert, golden_dir, from_sat):
    converted = convert(golden_dir / "sat" / "1", "--from", "sat", "--sat-version", "0.4")
    assert_same(load_file(converted / "model.safetensors"), load_file(from_sat / "model.safetensors"))


# --- row orders


@BOTH_VERSIONS
def test_row_order_of_trained_weights_is_found_out(convert, tiny_original, version, capsys):
    folder = convert(TINY, "--to", "sat", "--tokenizer", str(TINY), "--sat-version", version)
    capsys.readouterr()
    back = convert(folder, "--tokenizer", str(TINY))
    assert f"as SAT {version} has them" in capsys.readouterr().err
    assert_same(load_file(back / "model.safetensors"), load_file(TINY / "model.safetensors"))


def test_row_order_that_cannot_be_known_is_asked_for(golden_dir, tiny_original, tmp_path, capsys):
    error = complaint(capsys, run_convert, "--tokenizer", tiny_original, golden_dir / "sat", tmp_path / "new")
    assert "--sat-version" in error and "0.3" in error and "0.4" in error


def test_lora_of_sat_0_4_tells_the_row_order(convert, golden_dir, capsys):
    convert(golden_dir / "sat_lora", "--lora", "merge")
    assert "as SAT 0.4 has them" in capsys.readouterr().err


def test_version_that_sat_never_had_is_refused(golden_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_convert(str(golden_dir / "sat"), str(tmp_path / "new"), "--sat-version", "four")
    assert "0.3 or 0.4" in capsys.readouterr().err


# --- to SAT


def test_written_folder_is_what_sat_wrote(to_sat, golden_dir):
    expected = read_part(golden_dir / "sat")
    del expected["transformer.position_embeddings.weight"]
    assert_same(read_part(to_sat), expected)
    assert (to_sat / "latest").read_text() == "1"
    written, original = (
        json.loads((folder / "model_config.json").read_text()) for folder in (to_sat, golden_dir / "sat")
    )
    assert written.pop("residual_alpha") == pytest.approx(math.sqrt(56))  # for the way back
    assert written == original


@BOTH_VERSIONS
def test_way_there_and_back_changes_no_bit(convert, tiny_original, version):
    straight = convert(tiny_original)
    back = convert(convert(tiny_original, "--to", "sat", "--sat-version", version), "--sat-version", version)
    assert_same(load_file(back / "model.safetensors"), load_file(straight / "model.safetensors"))
    assert json.loads((back / "config.json").read_text()) == json.loads((straight / "config.json").read_text())


def test_other_residual_factor_is_warned_of(convert, tiny_original, capsys):
    convert(tiny_original, "--to", "sat")
    assert "warning: the residual factor of this model is 7.4833" in capsys.readouterr().err


def test_scratch_files_are_gone(to_sat):
    assert {str(path.relative_to(to_sat)) for path in to_sat.rglob("*")} == {
        "1",
        f"1/{PART}",
        "README.md",
        "ice_text.model",
        "latest",
        "manifest.json",
        "model_config.json",
    }


def test_low_bits_are_not_given_to_sat(golden_dir, tiny_original, tmp_path, capsys):
    arguments = ["--to", "sat", "--tokenizer", tiny_original, golden_dir / "tiny-original-int4", tmp_path / "new"]
    assert "4 bits" in complaint(capsys, run_convert, *arguments)


def test_different_head_survives_the_way_there_and_back(convert, tiny_original, tmp_path):
    folder = Path(shutil.copytree(convert(tiny_original), tmp_path / "untied"))
    model = VisualGLMForConditionalGeneration.from_pretrained(folder, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(folder)
    back = convert(convert(folder, "--to", "sat"), "--sat-version", "0.4")
    assert_same(load_file(back / "model.safetensors"), model.state_dict())


# --- model-parallel parts


def divide(key: str, tensor: torch.Tensor, version: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of two processes of SAT holds of a tensor."""
    module, kind = key.split(".")[-2:]
    if tensor.shape[0] == 1 or module == "position_embeddings":
        return tensor, tensor
    fused = {"query_key_value": 3, "key_value": 2}.get(module, 1)
    if version == "0.3" and key.startswith("transformer."):
        fused = 1
    if fused > 1 or module in ("query_key_value", "query", "dense_h_to_4h", "word_embeddings", "lm_head"):
        first, second = tensor.unflatten(0, (fused, 2, -1)).unbind(1)
        return first.flatten(0, 1), second.flatten(0, 1)
    if module in ("dense", "dense_4h_to_h") and kind == "weight":
        return tensor.chunk(2, dim=1)
    return tensor, tensor


@BOTH_VERSIONS
def test_model_parallel_parts_are_joined(convert, tiny_original, tmp_path, version):
    folder = Path(shutil.copytree(convert(tiny_original, "--to", "sat", "--sat-version", version), tmp_path / "two"))
    halves = {key: divide(key, tensor, version) for key, tensor in read_part(folder).items()}
    assert halves["transformer.word_embeddings.weight"][0].shape[0] == 800
    write_parts(folder, *({key: pair[rank].clone() for key, pair in halves.items()} for rank in (0, 1)))
    converted = convert(folder, "--sat-version", version)
    assert_same(load_file(converted / "model.safetensors"), load_file(convert(tiny_original) / "model.safetensors"))


def test_missing_part_is_named(source, tiny_original, tmp_path, capsys):
    config = json.loads((source / "model_config.json").read_text())
    (source / "model_config.json").write_text(json.dumps(config | {"model_parallel_size": 2}))
    error = complaint(capsys, run_convert, "--tokenizer", tiny_original, source, tmp_path / "new")
    assert "lacks mp_rank_01_model_states.pt" in error


def test_parts_of_different_checkpoints_are_refused(source, tiny_original, tmp_path, capsys):
    module = read_part(source)
    other = {key: tensor + 1 for key, tensor in module.items()}
    write_parts(source, module, other)
    error = complaint(
        capsys, run_convert, "--sat-version", "0.4", "--tokenizer", tiny_original, source, tmp_path / "new"
    )
    assert "not the same in all parts" in error


# --- LoRA


def test_adapter_computes_what_sats_lora_computed(convert, golden_dir, sat, sat_arrays, pixel_values):
    peft = pytest.importorskip("peft")
    folder = convert(golden_dir / "sat_lora")
    model = peft.PeftModel.from_pretrained(load_float32(folder), folder / "adapter").eval()
    assert_computes(model, sat["lora"]["cases"], sat_arrays, "lora.unmerged.sat_native.logits.f32", pixel_values)
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")
    }
    layers = (f"base_model.model.transformer.layers.{index}.attention" for index in sat["lora"]["layer_range"])
    assert adapted == {f"{layer}.{name}" for layer in layers for name in ("query_key_value", "dense")}


def test_merged_lora_is_sats_to_the_bit(convert, golden_dir, sat, sat_arrays, pixel_values):
    folder = convert(golden_dir / "sat_lora", "--lora", "merge")
    assert not (folder / "adapter").exists()
    weights = load_file(folder / "model.safetensors")
    for layer in sat["lora"]["layer_range"]:
        attention = f"layers.{layer}.attention"
        for name, order in (("query_key_value", "hf_order"), ("dense", "sat")):
            expected = sat_arrays[f"lora.merged.{order}.{attention}.{name}.weight"]
            assert np.array_equal(weights[f"transformer.{attention}.{name}.weight"].numpy(), expected)
    assert_computes(
        load_float32(folder), sat["lora"]["cases"], sat_arrays, "lora.merged.sat_native.logits.f32", pixel_values
    )


def test_adapter_alone_is_written_for_weights_that_are_there(convert, golden_dir, sat, sat_arrays, pixel_values):
    peft = pytest.importorskip("peft")
    adapter = convert(golden_dir / "sat_lora", "--lora", "only")
    written = {"adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"}
    assert {path.name for path in adapter.iterdir()} == written
    base = convert(golden_dir / "sat_lora", "--lora", "adapter")
    model = peft.PeftModel.from_pretrained(load_float32(base), adapter).eval()
    assert_computes(model, sat["lora"]["cases"], sat_arrays, "lora.unmerged.sat_native.logits.f32", pixel_values)


def old_lora(module: dict, head_dim: int) -> dict:
    """The LoRA checkpoint as SAT 0.3 has it: fused rows per head, no index for `dense`."""
    old = {}
    for key, tensor in module.items():
        if re.fullmatch(r"transformer.+query_key_value\.(original\.)?(weight|bias)", key):
            tensor = tensor.unflatten(0, (3, -1, head_dim)).transpose(0, 1).flatten(0, 2)
        old[key.replace("dense.matrix_A.0", "dense.matrix_A").replace("dense.matrix_B.0", "dense.matrix_B")] = tensor
    return old


@pytest.mark.parametrize("option", ["adapter", "merge"])
def test_lora_of_sat_0_3_becomes_the_same(convert, golden_dir, tmp_path, capsys, option):
    pytest.importorskip("peft")
    folder = Path(shutil.copytree(golden_dir / "sat_lora", tmp_path / "old"))
    module = torch.load(folder / "8" / PART, weights_only=False)["module"]  # ours, and numpy's states are in it
    torch.save({"module": old_lora(module, head_dim=16)}, folder / "8" / PART)
    old = convert(folder, "--lora", option)
    assert "as SAT 0.3 has them" in capsys.readouterr().err
    new = convert(golden_dir / "sat_lora", "--lora", option)
    for path in new.rglob("*.safetensors"):
        assert_same(load_file(old / path.relative_to(new)), load_file(path))


def test_only_the_lora_of_4_bit_weights_is_taken(golden_dir, tiny_original, tmp_path, capsys):
    pytest.importorskip("peft")
    folder = Path(shutil.copytree(golden_dir / "sat_lora", tmp_path / "qlora"))
    module = torch.load(folder / "8" / PART, weights_only=False)["module"]
    key = "transformer.layers.1.attention.dense.weight"
    module[key] = torch.zeros(module[key].numel() // 2, 1, dtype=torch.uint8)
    module[key.replace("weight", "quant_state")] = [torch.ones(64), [64, 64], torch.float16, 64, None, "nf4"]
    torch.save({"module": module}, folder / "8" / PART)
    arguments = ["--tokenizer", tiny_original, folder, tmp_path / "new"]
    assert "--lora only" in complaint(capsys, run_convert, *arguments)
    assert run_convert("--lora", "only", *arguments) == 0


def test_missing_peft_is_noticed_before_anything_is_written(golden_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("visualglm_tools.checkpoints.sat.is_peft_available", lambda: False)
    arguments = ["--tokenizer", golden_dir / "tiny-original", golden_dir / "sat_lora", tmp_path / "new"]
    error = complaint(capsys, run_convert, *arguments)
    assert "pip install" in error and "--lora merge" in error


def test_lora_only_without_a_lora_is_refused(golden_dir, tiny_original, tmp_path, capsys):
    error = complaint(
        capsys, run_convert, "--lora", "only", "--tokenizer", tiny_original, golden_dir / "sat", tmp_path / "new"
    )
    assert "has none" in error


# --- P-tuning


@pytest.fixture
def with_prefix(source, sat, sat_arrays) -> Path:
    """The tiny SAT checkpoint after P-tuning."""
    prefixes = {key: torch.from_numpy(sat_arrays[name]) for key, name in sat["ptuning_sat"]["arrays"].items()}
    write_parts(source, read_part(source) | prefixes)
    return source


def test_prefixes_compute_what_they_computed_in_sat(convert, with_prefix, sat, sat_arrays, pixel_values):
    model = load_float32(convert(with_prefix, "--sat-version", "0.4"))
    assert model.config.text_config.pre_seq_len == sat["ptuning_sat"]["pre_seq_len"]
    cases = sat["mapping_proof.tiny-original"]["cases"]
    assert_computes(model, cases, sat_arrays, "ptuning_sat.sat_native.logits.f32", pixel_values)


def test_prefixes_survive_the_way_there_and_back(convert, with_prefix):
    there = convert(convert(with_prefix, "--sat-version", "0.4"), "--to", "sat")
    found, expected = read_part(there), read_part(with_prefix)
    del expected["transformer.position_embeddings.weight"]
    assert_same(found, expected)
    config = json.loads((there / "model_config.json").read_text())
    assert config["model_class"] == "FineTuneVisualGLMModel"
    assert config["use_ptuning"] is True
    assert config["pre_seq_len"] == 3


def test_length_of_a_prefix_that_is_not_there_means_nothing(convert, golden_dir):
    assert json.loads((golden_dir / "sat_lora" / "model_config.json").read_text())["pre_seq_len"] == 8
    assert load_float32(convert(golden_dir / "sat_lora", "--lora", "merge")).config.text_config.pre_seq_len is None


# --- what may be in a file


class Malicious:
    """What its pickle does when it is loaded as pickles usually are."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, subprocess.check_call, eval, exec], ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_code_in_a_file_is_not_executed(source, tiny_original, tmp_path, capsys, function, place):
    mark = tmp_path / "executed"
    argument = {
        os.mkdir: str(mark),
        subprocess.check_call: ["mkdir", str(mark)],
        eval: f"__import__('os').mkdir({str(mark)!r})",
        exec: f"import os; os.mkdir({str(mark)!r})",
    }[function]
    module, bad = read_part(source), Malicious(function, argument)
    content = {"module": module, "rng": bad} if place == "beside" else {"module": module | {"more": bad}}
    torch.save(content, source / "1" / PART)
    error = complaint(
        capsys, run_convert, "--sat-version", "0.4", "--tokenizer", tiny_original, source, tmp_path / "new"
    )
    assert not mark.exists()
    assert "loading it would run" in error and function.__name__ in error


def give_words_for_numbers(folder: Path) -> None:
    config = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps(config | {"num_layers": "four"}))


def add_lora(folder: Path, **shapes: tuple[int, int]) -> None:
    module = "transformer.layers.1.attention.dense"
    matrices = {f"{module}.matrix_{side}.0": torch.ones(shape).half() for side, shape in shapes.items()}
    write_parts(folder, read_part(folder) | matrices)


def test_random_states_of_deepspeed_are_passed_over(golden_dir, convert):
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(golden_dir / "sat_lora" / "8" / PART, weights_only=True)
    convert(golden_dir / "sat_lora", "--lora", "merge")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "latest").write_text("2"), "names the iteration '2'"),
        (lambda folder: (folder / "latest").write_text("../source"), "names the iteration"),
        (lambda folder: (folder / "1" / PART).unlink(), f"has no {PART}"),
        (lambda folder: (folder / "1" / PART).write_bytes(b"PK\x03\x04nothing"), "truncated"),
        (lambda folder: (folder / "1" / PART).write_bytes(b"version https://git-lfs"), "Git LFS pointer"),
        (lambda folder: (folder / "model_config.json").unlink(), "has no model_config.json"),
        (lambda folder: (folder / "model_config.json").write_text("{}"), "lacks eva_args or qformer_args"),
        (give_words_for_numbers, "model_config.json: VisualGLMTextConfig: Field 'num_hidden_layers' expected int"),
        (lambda folder: torch.save({"weights": {}}, folder / "1" / PART), "no 'module'"),
        (lambda folder: write_parts(folder, {k: v for k, v in read_part(folder).items() if k[:3] != "mix"}), "missing"),
        (lambda folder: write_parts(folder, read_part(folder) | {"mixins.x.y.weight": torch.ones(2)}), "unexpected"),
        (lambda folder: add_lora(folder, A=(4, 64), B=(32, 4)), "the layer is [64, 64]"),
        (lambda folder: add_lora(folder, A=(4, 64)), "lacks a matrix_A or a matrix_B"),
    ],
    ids=[
        "iteration",
        "outside",
        "part",
        "truncated",
        "pointer",
        "config",
        "text model",
        "words",
        "module",
        "missing",
        "more",
        "other LoRA",
        "half a LoRA",
    ],
)
def test_unusable_source_is_refused(source, tiny_original, tmp_path, capsys, damage, message):
    damage(source)
    arguments = ["--from", "sat", "--sat-version", "0.4", "--tokenizer", tiny_original, source, tmp_path / "new"]
    assert message in complaint(capsys, run_convert, *arguments)


def test_missing_tokenizer_is_asked_for(source, tmp_path, capsys):
    error = complaint(capsys, run_convert, "--sat-version", "0.4", source, tmp_path / "new")
    assert "ice_text.model" in error and "--tokenizer" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--link",), "--link keeps weight files"),
        (("--to", "sat", "--link"), "--link keeps weight files"),
        (("--to", "sat"), "use --lora merge"),
        (("--to", "sat", "--lora", "only"), "use --lora merge"),
        (("--to", "sat", "--lora", "merge", "--max-shard-size", "1GB"), "SAT has one file"),
        (("--from", "hf", "--lora", "only"), "goes with --from sat"),
        (("--from", "hf", "--sat-version", "0.4"), "--sat-version goes with"),
    ],
    ids=" ".join,
)
def test_options_that_contradict_each_other_are_refused(source, tmp_path, capsys, options, message):
    assert message in complaint(capsys, run_convert, *options, source, tmp_path / "new")


def test_sat_folder_is_written_anew_in_another_shape(convert, golden_dir):
    """Parts joined, LoRA merged, in one file."""
    again = convert(golden_dir / "sat_lora", "--to", "sat", "--lora", "merge")
    back, merged = convert(again, "--sat-version", "0.4"), convert(golden_dir / "sat_lora", "--lora", "merge")
    assert_same(load_file(back / "model.safetensors"), load_file(merged / "model.safetensors"))


def test_full_disk_is_noticed_before_anything_is_written_for_sat(tiny_original, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=16 * 1024**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    error = complaint(capsys, run_convert, "--to", "sat", tiny_original, tmp_path / "new")
    assert "GB left" in error
