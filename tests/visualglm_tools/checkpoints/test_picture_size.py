"""The size of pictures from training to every door: with the adapter, in a merged model, and against both."""

import json
from dataclasses import replace

import pytest

from tests.commands import command
from tests.paths import CIRCLES, TINY
from tests.training_helpers import ROWS, short_run, silent
from visualglm_hf import VisualGLMConfig
from visualglm_tools.checkpoints.loading import load_model, make_processor
from visualglm_tools.checkpoints.merging import merge
from visualglm_tools.checkpoints.picture_size import image_size_of, set_image_size
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.training.run import finetune


SIZE = 280


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with larger pictures."""
    folder = tmp_path_factory.mktemp("larger")
    finetune(short_run(folder, image_size=SIZE, train_iters=2, save_interval=1), silent)
    return folder


@pytest.mark.parametrize("name", ["adapter", "checkpoint-1"])
def test_an_adapter_keeps_the_size_that_it_was_trained_with(trained, name):
    assert json.loads((trained / name / "pictures.json").read_text("utf-8")) == {"image_size": SIZE}
    model, tokenizer = load_model(TINY, "cpu", "float32", adapter=trained / name)
    assert image_size_of(model.config) == SIZE
    assert make_processor(tokenizer, model.config).image_processor.size == {"height": SIZE, "width": SIZE}
    (image,) = model.open_images(CIRCLES)
    assert image.pixel_values.shape == (1, 3, SIZE, SIZE)


def test_an_adapter_of_usual_pictures_says_nothing_of_them(trained, tmp_path):
    finetune(replace(short_run(tmp_path / "run"), train_iters=1, save_interval=1), silent)
    assert not list((tmp_path / "run").rglob("pictures.json"))


def test_what_was_trained_is_overridden_in_words(trained, capsys):
    model, _ = load_model(TINY, "cpu", "float32", adapter=trained / "adapter", image_size=392)
    assert image_size_of(model.config) == 392
    assert f"shown at 392 × 392 pixels; the model was trained at {SIZE}." in capsys.readouterr().err
    load_model(TINY, "cpu", "float32", adapter=trained / "adapter", image_size=SIZE)
    assert "shown at" not in capsys.readouterr().err


def test_a_merged_model_keeps_the_size(trained, tmp_path):
    merge(TINY, trained / "adapter", tmp_path / "merged")
    assert VisualGLMConfig.from_pretrained(tmp_path / "merged").vision_config.shown_image_size == SIZE
    saved = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text("utf-8"))
    assert saved["size"] == {"height": SIZE, "width": SIZE}


@pytest.mark.parametrize("size", [None, 392])
def test_a_server_shows_its_pictures_at_the_size_that_it_was_started_with(size):
    with Engine.load(TINY, device="cpu", dtype="float32", image_size=size) as engine:
        prompt = engine.prepare([{"role": "user", "content": [{"type": "image", "image": CIRCLES.read_bytes()}]}])
        assert prompt.pixel_values.shape[-2:] == (size or 224,) * 2
        chat, _ = engine.model.chat(
            engine.tokenizer, CIRCLES, "描述这张图片。", do_sample=False, min_length=0, max_new_tokens=24
        )
    assert "红色的圆形，背景是草地" in chat


@pytest.mark.parametrize(
    "words",
    [
        f"chat --image {CIRCLES} --query 有几个？ --image-size 384",
        f"finetune --use_lora --train_data {ROWS} --image_size 384",
    ],
)
def test_a_size_that_is_not_whole_patches_is_one_line_with_its_neighbours(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*words.split()) == 2
    error = capsys.readouterr().err
    assert "image_size=384 is not whole patches of 14 pixels. Take 378 or 392." in error
    assert error.count("\n") == 1


def test_code_that_is_older_shows_pictures_at_its_own_size_or_says_so():
    class OldVision:
        image_size = 224

    class OldConfig:
        vision_config = OldVision()

    assert image_size_of(OldConfig) == 224
    with pytest.raises(ValueError, match="--copy-code"):
        set_image_size(OldConfig, 392)
