"""`visualglm quantize`: what it writes is the model that was quantized in memory; what it refuses stays away."""

import json
import sys
from collections import namedtuple

import pytest

from tests.commands import check, complaint, quantize
from tests.helpers import assert_same_state
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_tools.checkpoints import quantizing as on_disk


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, -1)])
def test_checkpoint_quantized_on_disk_equals_the_model_quantized_in_memory(tiny_original, tmp_path, bits, group_size):
    options = [] if group_size is None else ["--group-size", str(group_size)]
    target = tmp_path / "out"
    assert quantize(str(tiny_original), str(target), "--bits", str(bits), *options) == 0
    loaded, info = VisualGLMForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(
        loaded, VisualGLMForConditionalGeneration.from_pretrained(tiny_original).quantize(bits, group_size)
    )
    assert (target / "lowbit_products.py").is_file()
    assert json.loads((target / "model.safetensors.index.json").read_text())["metadata"]["total_size"] > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_an_image_encoder_quantized_on_disk_equals_the_one_in_memory_and_passes_all_checks(
    tiny_original, tmp_path, capsys, bits
):
    target = tmp_path / "out"
    assert quantize(tiny_original, target, "--bits", bits, "--quant-image-encoder") == 0
    loaded, info = VisualGLMForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    expected = VisualGLMForConditionalGeneration.from_pretrained(tiny_original).quantize(bits, image_encoder=True)
    assert_same_state(loaded, expected)
    assert check(target) == 0
    assert "those of the image encoder 8 bits" in capsys.readouterr().out


def test_original_per_row_checkpoint_is_reproduced(tiny_original, tiny_int4, tmp_path):
    on_disk.quantize_checkpoint(tiny_original, tmp_path / "out", 4, group_size=-1)
    assert_same_state(
        VisualGLMForConditionalGeneration.from_pretrained(tmp_path / "out"),
        VisualGLMForConditionalGeneration.from_pretrained(tiny_int4),
    )


def test_door_overwrites_nothing(tiny_original, tmp_path, capsys):
    (tmp_path / "precious").touch()
    assert "not an empty folder" in complaint(capsys, quantize, tiny_original, tmp_path, "--bits", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_door_refuses_what_it_cannot_quantize(tiny_original, tiny_int4, tmp_path, capsys):
    out = tmp_path / "out"
    assert "cannot be divided" in complaint(capsys, quantize, tiny_original, out, "--bits", 4, "--group-size", 48)
    message = complaint(capsys, quantize, tiny_int4, out, "--bits", 8, "--tokenizer", tiny_original)
    assert "4 bits already" in message
    assert not list(tmp_path.iterdir())


def test_door_looks_at_the_disk_before_it_writes(tiny_original, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 0, 10**6))
    assert "the disk has" in complaint(capsys, quantize, tiny_original, tmp_path / "out", "--bits", 4)
    assert not list(tmp_path.iterdir())


def test_door_holds_one_shard_at_a_time(tiny_original, tmp_path, monkeypatch):
    mapped = []
    map_tensors = on_disk.map_tensors
    monkeypatch.setattr(on_disk, "map_tensors", lambda path: mapped.append(path.name) or map_tensors(path))
    save = on_disk.save_safetensors
    monkeypatch.setattr(
        on_disk, "save_safetensors", lambda path, tensors: mapped.append("saved") or save(path, tensors)
    )
    on_disk.quantize_checkpoint(tiny_original, tmp_path / "out", 4)
    assert mapped[1::2] == ["saved"] * 2
    assert len(set(mapped)) == 3


def test_door_explains_itself(capsys):
    with pytest.raises(SystemExit) as exit_info:
        quantize("-h")
    assert exit_info.value.code == 0
    assert "--group-size" in capsys.readouterr().out
    assert sys.exc_info() == (None, None, None)
