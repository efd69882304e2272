"""`scripts/convert_checkpoint.py`: what it writes loads and answers as the original did; what it refuses stays away."""

import errno
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from tests.commands import complaint, convert, python
from tests.damage import (
    EMBEDDINGS,
    FIRST,
    LAST,
    change_config,
    change_shard,
    cut_shard,
    cut_tokenizer,
    promise_quantization,
    remove_config,
    remove_shard,
    remove_tokenizer,
    shrink_vocabulary,
)
from tests.helpers import assert_same
from tests.paths import ROOT
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.image_processing_visualglm import VisualGLMImageProcessor
from visualglm_hf.processing_visualglm import VisualGLMProcessor
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer


PACKAGE = ROOT / "visualglm_hf"
LM_HEAD = "lm_head.weight"
QUANTIZED = (".query_key_value.weight", ".dense.weight", ".dense_h_to_4h.weight", ".dense_4h_to_h.weight")
SPARE_BYTES = 16 * 1024**2  # beside the weights
BASE_PACKAGES = {"transformers", "torch", "numpy", "PIL", "sentencepiece", "safetensors", "huggingface_hub"}

# What a user does who has the folder and today's transformers, and nothing of this project.
USER_PROGRAM = """
import json, sys
sys.modules["visualglm_hf"] = None  # an import of it would fail
import torch, transformers

folder, golden_dir, saved = sys.argv[1:]
turn = json.load(open(f"{golden_dir}/golden.json"))["chat"][0]
load = lambda name, place=folder, **kwargs: getattr(transformers, name).from_pretrained(
    place, trust_remote_code=True, **kwargs
)
answers = {}
for name in ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor"):
    answers[name] = type(load(name)).__name__
heads = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
for name in heads:
    model, info = load(name, dtype=torch.float32, output_loading_info=True)
    answers[name] = type(model).__name__
    answers[f"{name} problems"] = [str(problem) for problems in info.values() for problem in problems]
tokenizer = load("AutoTokenizer")
first = turn["turns"][0]
answers["response"], _ = model.chat(
    tokenizer, f"{golden_dir}/{turn['image']}", first["query"], history=[], english=False, min_length=0,
    repetition_penalty=1.0, do_sample=False, max_length=first["max_length"],
)
answers["is_tied"] = model.lm_head.weight is model.transformer.word_embeddings.weight

model = load("AutoModel")  # as it is stored
model.save_pretrained(saved)
tokenizer.save_pretrained(saved)
load("AutoProcessor").save_pretrained(saved)
again = load("AutoModel", saved)
state = again.state_dict()
answers["lossless"] = all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
answers["reloaded"] = [type(load(name, saved)).__name__ for name in ("AutoTokenizer", "AutoProcessor")]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module", autouse=True)
def unregistered():
    """The script makes `save_pretrained` copy code for the rest of the process; other tests should not notice."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (VisualGLMConfig, ChatGLMTokenizer, VisualGLMImageProcessor, VisualGLMProcessor):
            patch.setattr(cls, "_auto_class", cls._auto_class)
        yield


@pytest.fixture(scope="module")
def converted(tiny_original, tmp_path_factory) -> Path:
    """The tiny original, converted; not to be changed."""
    folder = tmp_path_factory.mktemp("converted") / "visualglm"
    assert convert(str(tiny_original), str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def as_a_user(converted, golden_dir, tmp_path_factory) -> dict:
    """What the user's program found out in a process of its own."""
    home = tmp_path_factory.mktemp("elsewhere")
    environment = {"PYTHONPATH": None, "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = (converted, golden_dir, home / "saved")
    result = python("-c", USER_PROGRAM, *arguments, cwd=home, environment=environment)
    return {**json.loads(result.stdout.splitlines()[-1]), "saved": home / "saved"}


@pytest.fixture
def source(tiny_original, tmp_path) -> Path:
    """A copy of the tiny original, to be damaged."""
    return Path(shutil.copytree(tiny_original, tmp_path / "source"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, whatever its format."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def kept(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what the conversion drops."""
    return {key: tensor for key, tensor in tensors.items() if "inv_freq" not in key and key != LM_HEAD}


def make_single(folder: Path, change=lambda tensors: None, name: str = "pytorch_model.bin") -> None:
    """Turn a sharded folder into one with a single weight file."""
    tensors = tensors_of(folder)
    change(tensors)
    for path in (*folder.glob("*.bin"), *folder.glob("*.index.json")):
        path.unlink()
    save = torch.save if name.endswith(".bin") else save_file
    save({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)


def quantize(tensors: dict[str, torch.Tensor], bits: int) -> None:
    """Quantize the decoder as the original's `quantize(bits)` does."""
    for key in [key for key in tensors if key.startswith("transformer.layers.") and key.endswith(QUANTIZED)]:
        weight = tensors[key]
        scale = (weight.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        levels = (weight / scale[:, None]).round().to(torch.int8)
        packed = levels if bits == 8 else (levels[:, ::2] << 4) | (levels[:, 1::2] & 0xF)
        tensors |= {key: packed, f"{key}_scale": scale}


# ---- what it writes


def test_every_auto_class_loads_without_this_project(as_a_user):
    assert as_a_user["AutoConfig"] == "VisualGLMConfig"
    assert as_a_user["AutoTokenizer"] == "ChatGLMTokenizer"
    assert as_a_user["AutoImageProcessor"] == "VisualGLMImageProcessor"
    assert as_a_user["AutoProcessor"] == "VisualGLMProcessor"
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert as_a_user[name] == "VisualGLMForConditionalGeneration"
        assert as_a_user[f"{name} problems"] == []
    assert as_a_user["is_tied"]


def test_converted_model_answers_as_the_original(as_a_user, golden):
    assert as_a_user["response"] == golden["chat"][0]["turns"][0]["response"]


def test_converted_model_saves_and_reloads_without_loss(as_a_user, converted):
    assert as_a_user["lossless"]
    assert as_a_user["reloaded"] == ["ChatGLMTokenizer", "VisualGLMProcessor"]
    assert {path.name for path in as_a_user["saved"].glob("*.py")} == {path.name for path in converted.glob("*.py")}


def test_weights_are_those_of_the_original_without_its_copies(converted, tiny_original):
    assert_same(tensors_of(converted), kept(tensors_of(tiny_original)))
    assert json.loads((converted / "config.json").read_text())["tie_word_embeddings"] is True


def test_weights_are_split_into_shards_of_the_wished_size(tiny_original, tmp_path):
    assert convert(str(tiny_original), str(tmp_path / "out"), "--max-shard-size", "200kb") == 0
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "out")
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same(tensors, kept(tensors_of(tiny_original)))
    _, info = VisualGLMForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_files_are_as_readable_as_any_new_file(converted):
    modes = {path.stat().st_mode for path in converted.iterdir()}
    assert len(modes) == 1


def test_code_is_what_the_entry_files_import_and_no_more(converted):
    entries = {
        f"{target.split('.')[0]}.py"
        for value in json.loads((converted / "config.json").read_text())["auto_map"].values()
        for target in (value if isinstance(value, list) else [value])
        if target
    }
    needed = {
        Path(file).name for entry in entries for file in dynamic_module_utils.get_relative_import_files(PACKAGE / entry)
    }
    shipped = {path.name for path in converted.glob("*.py")}
    assert shipped == entries | needed
    for name in shipped:
        assert (converted / name).read_bytes() == (PACKAGE / name).read_bytes()


def test_code_demands_only_the_base_dependencies(converted):
    for path in converted.glob("*.py"):
        assert set(dynamic_module_utils.get_imports(path)) - set(sys.stdlib_module_names) <= BASE_PACKAGES
        dynamic_module_utils.check_imports(path)


def test_generate_is_greedy_by_default_as_the_originals_was(converted):
    saved = json.loads((converted / "generation_config.json").read_text())
    saved.pop("transformers_version")
    assert saved == {"bos_token_id": 1104, "eos_token_id": 1105, "pad_token_id": 3}


def test_tokenizer_and_processor_files_are_complete(converted, tiny_original):
    assert (converted / "ice_text.model").read_bytes() == (tiny_original / "ice_text.model").read_bytes()
    assert (
        json.loads((converted / "tokenizer_config.json").read_text()).get("clean_up_tokenization_spaces") is not False
    )
    for name in ("chat_template.jinja", "preprocessor_config.json", "processor_config.json"):
        assert (converted / name).stat().st_size > 0


def test_no_path_of_this_machine_is_written(converted, tiny_original):
    for path in converted.glob("*.json"):
        assert str(tiny_original) not in path.read_text()


# ---- what it reads


def test_single_file_is_read(source, tmp_path, tiny_original):
    make_single(source)
    assert convert(str(source), str(tmp_path / "out")) == 0
    assert_same(tensors_of(tmp_path / "out"), kept(tensors_of(tiny_original)))


def test_safetensors_are_read(source, tmp_path, tiny_original):
    make_single(source, name="model.safetensors")
    assert convert(str(source), str(tmp_path / "out")) == 0
    assert_same(tensors_of(tmp_path / "out"), kept(tensors_of(tiny_original)))


def test_converted_folder_can_be_converted_again(converted, tmp_path):
    assert convert(str(converted), str(tmp_path / "out"), "--max-shard-size", "300KB") == 0
    assert_same(tensors_of(tmp_path / "out"), tensors_of(converted))


def test_files_from_before_pytorch_1_6_are_read(source, tmp_path, tiny_original):
    for name in (FIRST, LAST):
        tensors = torch.load(source / name, weights_only=True)
        torch.save(tensors, source / name, _use_new_zipfile_serialization=False)
    assert convert(str(source), str(tmp_path / "out")) == 0
    assert_same(tensors_of(tmp_path / "out"), kept(tensors_of(tiny_original)))


def test_different_head_is_kept_with_a_warning(source, tmp_path, capsys):
    change_shard(source, FIRST, lambda tensors: tensors.update({EMBEDDINGS: tensors[EMBEDDINGS] * 2}))
    assert convert(str(source), str(tmp_path / "out")) == 0
    assert "warning: lm_head and the word embeddings differ" in capsys.readouterr().err
    model, info = VisualGLMForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.lm_head.weight * 2, model.transformer.word_embeddings.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_stay_as_they_are(source, tmp_path, bits):
    key = "transformer.layers.0.mlp.dense_h_to_4h.weight"
    make_single(source, lambda tensors: quantize(tensors, bits))
    change_config(source, quantization_bit=bits)
    assert convert(str(source), str(tmp_path / "out")) == 0
    tensors = tensors_of(tmp_path / "out")
    assert_same(tensors, kept(tensors_of(source)))
    assert sum(tensor.dtype == torch.int8 for tensor in tensors.values()) == 16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_bit"] == bits
    model, info = VisualGLMForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.state_dict()[key], tensors[key])


def test_checkpoint_that_the_original_quantized_is_converted(golden_dir, tiny_original, tmp_path):
    source = golden_dir / "tiny-original-int4"  # without a tokenizer, as it was saved
    assert convert(str(source), str(tmp_path / "out"), "--tokenizer", str(tiny_original)) == 0
    assert_same(tensors_of(tmp_path / "out"), kept(tensors_of(source)))
    _, info = VisualGLMForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("part", ["lm_head", "image_encoder"])
def test_parts_quantized_by_this_project_are_kept_without_a_warning(tiny_original, tmp_path, capsys, part):
    VisualGLMForConditionalGeneration.from_pretrained(tiny_original).quantize(4, **{part: True}).save_pretrained(
        tmp_path / "source"
    )
    options = ["--tokenizer", str(tiny_original)]
    assert convert(str(tmp_path / "source"), str(tmp_path / "out"), *options) == 0
    assert "warning" not in capsys.readouterr().err
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "source"))


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "folder"])
def test_tokenizer_may_be_elsewhere(source, tmp_path, tiny_original, is_file):
    (source / "ice_text.model").unlink()
    place = tiny_original / "ice_text.model" if is_file else tiny_original
    assert convert(str(source), str(tmp_path / "out"), "--tokenizer", str(place)) == 0
    assert (tmp_path / "out" / "ice_text.model").is_file()


# ---- --link


def test_links_share_the_weights_of_the_source(source, tmp_path):
    assert convert(str(source), str(tmp_path / "out"), "--link") == 0
    for name in (FIRST, LAST):
        assert (tmp_path / "out" / name).samefile(source / name)
        assert not (tmp_path / "out" / name).is_symlink()
    assert (tmp_path / "out" / "pytorch_model.bin.index.json").is_file()
    model, info = VisualGLMForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_links_are_symbolic_where_hard_ones_are_impossible(source, tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", fail)
    assert convert(str(source), str(tmp_path / "out"), "--link") == 0
    assert (tmp_path / "out" / FIRST).is_symlink()
    assert_same(tensors_of(tmp_path / "out"), tensors_of(source))


def test_links_need_no_space(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, SPARE_BYTES))
    assert convert(str(source), str(tmp_path / "out"), "--link") == 0


# ---- what it refuses


def test_a_place_that_takes_no_folder_is_not_said_to_be_full(tiny_original, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert convert(tiny_original, tmp_path / "file" / "out") == 2
    assert "file takes no new folder (Not a directory)" in capsys.readouterr().err

    def refuse(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    said = complaint(capsys, convert, tiny_original, tmp_path / "out")
    assert f"{tmp_path} takes no new folder (Read-only file system)" in said and "GB" not in said


def test_target_with_content_is_not_touched(tiny_original, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "not an empty folder" in complaint(capsys, convert, tiny_original, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_empty_target_is_filled(tiny_original, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert(str(tiny_original), str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_folder_one_stands_in_is_filled_and_not_replaced(tiny_original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = Path.cwd().stat().st_ino
    assert convert(tiny_original, ".") == 0
    assert Path("config.json").is_file() and Path.cwd().stat().st_ino == before
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*.unfinished"))


def test_missing_source_is_refused(tmp_path, capsys):
    assert "is no folder" in complaint(capsys, convert, tmp_path / "nowhere", tmp_path / "out")


def cut_config(folder):
    (folder / "config.json").write_text('{"num_layers": 4,')


def give_words_for_numbers(folder):
    change_config(folder, hidden_size="wide")


def give_another_model(folder):
    (folder / "config.json").write_text(json.dumps({"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}))


def cut_safetensors(folder):
    make_single(folder, name="model.safetensors")
    os.truncate(folder / "model.safetensors", 500_000)


def leave_pointer(folder):
    (folder / LAST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1980385902\n")


def remove_index(folder):
    (folder / "pytorch_model.bin.index.json").unlink()


def break_index(folder):
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def exchange_shard(folder):
    change_shard(folder, LAST, lambda tensors: tensors.update(surprise=torch.zeros(1)))


def remove_weights(folder):
    for path in (*folder.glob("*.bin"), *folder.glob("*.index.json")):
        path.unlink()


def save_no_tensors(folder):
    make_single(folder)
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")


def save_code(folder):
    make_single(folder)
    torch.save({"path": Path("x")}, folder / "pytorch_model.bin")


def remove_vision(folder):
    make_single(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("image_encoder.")])


def enlarge_vocabulary(folder):
    """The weights of the early ChatGLM-6B."""
    rows = torch.zeros(150528, 64, dtype=torch.float16)
    make_single(folder, lambda tensors: tensors.update({EMBEDDINGS: rows, LM_HEAD: rows.clone()}))


def quantize_silently(folder):
    make_single(folder, lambda tensors: quantize(tensors, 8))


def exchange_tokenizer(folder):
    change_config(folder, bos_token_id=1304)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, r"has no config\.json"),
        (cut_config, r"config\.json is no JSON"),
        (give_words_for_numbers, "hidden_size"),
        (give_another_model, "lacks eva_config"),
        (remove_shard, rf"lacks {LAST}, 1 of the 2 files .* download"),
        (cut_shard, rf"{LAST} \(300,000 bytes\) .*truncated.* download it again"),
        (cut_safetensors, r"model\.safetensors .*truncated.* download it again"),
        (leave_pointer, rf"{LAST} is a Git LFS pointer.*git lfs pull"),
        (remove_index, "no index"),
        (break_index, "no weight_map"),
        (exchange_shard, "does not describe the files beside it: surprise"),
        (remove_weights, "has no weights"),
        (save_no_tensors, "something other than tensors"),
        (save_code, "cannot be read as a PyTorch file of tensors"),
        (remove_vision, "keys are missing: image_encoder.*this is a ChatGLM-6B"),
        (enlarge_vocabulary, "150,528 rows, config.json says vocab_size 1,600.*early ChatGLM-6B"),
        (shrink_vocabulary, "1,600 rows, config.json says vocab_size 1,500"),
        (quantize_silently, "weight_scale.*quantization_bit"),
        (promise_quantization, "of a wrong shape or type.*quantization_bit"),
        (remove_tokenizer, r"has no ice_text\.model.*--tokenizer"),
        (cut_tokenizer, r"ice_text\.model"),
        (exchange_tokenizer, "bos_token is 1104, the model's 1304"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("option", [(), ("--link",)], ids=["write", "link"])
def test_unusable_source_is_refused_before_anything_is_written(source, tmp_path, capsys, damage, message, option):
    damage(source)
    (tmp_path / "place").mkdir()
    error = complaint(capsys, convert, source, tmp_path / "place" / "out", *option)
    assert re.search(message, error), error


def test_all_wrong_keys_are_listed_at_once(source, tmp_path, capsys):
    def change(tensors):
        tensors["transformer.final_layernorm.weights"] = tensors.pop("transformer.final_layernorm.weight")
        tensors["image_encoder.glm_proj.bias"] = torch.zeros(3)

    make_single(source, change)
    error = complaint(capsys, convert, source, tmp_path / "out")
    assert "1 keys are missing: transformer.final_layernorm.weight;" in error
    assert "1 keys are unexpected: transformer.final_layernorm.weights;" in error
    assert "image_encoder.glm_proj.bias is [3] float32 instead of [64]" in error


def test_full_disk_is_noticed_before_anything_is_written(tiny_original, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, SPARE_BYTES))
    assert "--link" in complaint(capsys, convert, tiny_original, tmp_path / "out")


def test_nothing_is_left_when_writing_fails(tiny_original, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("visualglm_tools.checkpoints.conversion.write_description", fail)
    assert "No space left" in complaint(capsys, convert, tiny_original, tmp_path / "out")


def test_nothing_is_left_when_the_user_interrupts(tiny_original, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("visualglm_tools.checkpoints.prepared.save_safetensors", interrupt)
    assert convert(tiny_original, tmp_path / "out") == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["5", "big", "-1GB"])
def test_shard_size_without_meaning_is_refused(tiny_original, tmp_path, size):
    with pytest.raises(SystemExit) as stop:
        convert(str(tiny_original), str(tmp_path / "out"), f"--max-shard-size={size}")
    assert stop.value.code == 2


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        convert("--help")
    assert stop.value.code == 0
    assert "--link" in capsys.readouterr().out


# ---- the original folder, without converting it


@pytest.fixture
def transformers_log():
    """What transformers logs from WARNING on."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_original_folder_loads_whole_and_in_silence(tiny_original, transformers_log):
    model, info = VisualGLMForConditionalGeneration.from_pretrained(tiny_original, output_loading_info=True)
    assert not any(info.values())
    assert transformers_log == []
    expected = tensors_of(tiny_original)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_loading_without_a_shard_names_it(source):
    remove_shard(source)
    with pytest.raises(OSError, match=LAST):
        VisualGLMForConditionalGeneration.from_pretrained(source)


def test_loading_a_truncated_shard_says_so(source):
    cut_shard(source)
    with pytest.raises(RuntimeError, match="corrupted"):
        VisualGLMForConditionalGeneration.from_pretrained(source)


def test_loading_another_vocabulary_names_both_sizes(source, transformers_log):
    shrink_vocabulary(source)
    with pytest.raises((RuntimeError, ValueError)) as error:
        VisualGLMForConditionalGeneration.from_pretrained(source)
    told = "\n".join([str(error.value), *transformers_log])
    assert all(word in told for word in (EMBEDDINGS, "1600", "1500"))
