"""Pictures of other sizes than the positions: interpolated as transformers' ViTs do it, and off unless asked for."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings

from tests.helpers import SMALL_CONFIG, make_small_model
from tests.paths import CIRCLES
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration, VisualGLMVisionConfig


GREEDY = {"do_sample": False, "min_length": 0, "max_new_tokens": 24}


@pytest.fixture
def small():
    """A model of 28 x 28 pixels, four patches."""
    return make_small_model(torch.float32, bits=None)


def pixels(height: int, width: int, images: int = 1) -> torch.Tensor:
    return torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), [(224, 224), (392, 392), (448, 280), (112, 224)])
def test_positions_are_interpolated_as_the_library_interpolates_its_own(model, height, width):
    vit = model.image_encoder.vit
    table = vit.transformer["position_embeddings"].weight
    other = ViTEmbeddings(ViTConfig(hidden_size=table.shape[1], image_size=224, patch_size=14))
    other.position_embeddings.data = table.detach()[None]
    patches = (height // 14) * (width // 14)
    expected = other.interpolate_pos_encoding(torch.empty(1, 1 + patches, table.shape[1]), height, width)[0]
    found = vit.interpolate_positions(table, height // 14, width // 14)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_each_position_of_a_larger_picture_is_beside_its_patch():
    """Rows and columns are not exchanged: what differs from row to row in the table does so in what comes of it."""
    model = make_small_model(torch.float32, bits=None)
    vit = model.image_encoder.vit
    table = torch.zeros(5, 32)
    table[3:] = 1.0  # the lower of two rows of patches
    found = vit.interpolate_positions(table, 4, 6)[1:].unflatten(0, (4, 6))
    assert (found.std(dim=1) < 1e-6).all()
    assert found[0].mean() < 0.2 < 0.8 < found[-1].mean()


@torch.no_grad()
def test_the_model_s_own_size_is_the_same_to_the_last_bit(small):
    own = pixels(28, 28, images=2)
    plain = small.get_image_features(own)
    interpolated = small.get_image_features(own, interpolate_pos_encoding=True)
    assert torch.equal(plain.last_hidden_state, interpolated.last_hidden_state)
    assert torch.equal(plain.pooler_output, interpolated.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("size", [(42, 42), (14, 56)])
def test_a_picture_of_any_size_has_as_many_soft_prompts(small, size):
    features = small.get_image_features(pixels(*size, images=2), interpolate_pos_encoding=True)
    assert features.last_hidden_state.shape == (2, 1 + size[0] * size[1] // 14**2, 32)
    assert features.pooler_output.shape == (2, 4, 128)


@torch.no_grad()
def test_half_precision_interpolates_in_float32(small):
    table = small.image_encoder.vit.transformer["position_embeddings"].weight
    exact = small.image_encoder.vit.interpolate_positions(table.half().float(), 5, 7)
    half = small.image_encoder.vit.interpolate_positions(table.half(), 5, 7)
    assert half.dtype == torch.float16
    assert torch.equal(half, exact.half())


@pytest.mark.parametrize("call", ["forward", "generate", "get_image_features", "encode_pictures"])
@torch.no_grad()
def test_another_size_is_refused_unless_it_is_asked_for(small, call):
    pictures = {"pixel_values": pixels(42, 56)}
    if call in ("forward", "generate"):
        pictures["input_ids"] = torch.tensor([[1, 0, 0, 0, 0, 5, 251, 254]])
    run = small if call == "forward" else getattr(small, call)
    with pytest.raises(ValueError, match=r"\[images, 3, 28, 28\], found \[1, 3, 42, 56\].*interpolate_pos_encoding"):
        run(**pictures)
    run(**pictures, interpolate_pos_encoding=True)


@torch.no_grad()
def test_all_ways_to_ask_see_the_same_larger_picture(small):
    pixel_values, ids = pixels(42, 56), torch.tensor([[1, 0, 0, 0, 0, 5, 251, 254]])
    embeds = small.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output
    assert torch.equal(small.encode_pictures(pixel_values, interpolate_pos_encoding=True), embeds)
    expected = small(ids, image_embeds=embeds).logits
    assert torch.equal(small(ids, pixel_values, interpolate_pos_encoding=True).logits, expected)
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    answer = small.generate(ids, pixel_values=pixel_values, interpolate_pos_encoding=True, **options)
    torch.testing.assert_close(answer.logits[0], expected[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "words"),
    [((40, 42), "image_size=40 is not whole patches of 14 pixels. Take 28 or 42."), ((42, 7), "from 14 to 2240")],
)
def test_a_size_that_is_not_whole_patches_is_refused_with_its_neighbours(small, size, words):
    with pytest.raises(ValueError, match=words):
        small.get_image_features(pixels(*size), interpolate_pos_encoding=True)


@torch.no_grad()
def test_a_remembered_picture_is_another_one_at_another_size(small):
    small.eval()
    black = {size: torch.zeros(1, 3, size, size) for size in (28, 42)}
    features = {size: small.encode_pictures(picture, True) for size, picture in black.items()}
    assert not torch.equal(*features.values())
    assert small.image_cache.num_encoded == 2
    for size, picture in black.items():
        assert torch.equal(small.encode_pictures(picture, True), features[size])
    assert small.image_cache.num_encoded == 2


# ---------------------------------------------------------------- the size that a model prefers


def test_the_size_of_a_config_is_that_of_its_positions_unless_it_prefers_another():
    config = VisualGLMVisionConfig()
    assert (config.preferred_image_size, config.shown_image_size) == (None, 224)
    assert VisualGLMVisionConfig(preferred_image_size=392).shown_image_size == 392
    with pytest.raises(ValueError, match="Take 378 or 392"):
        VisualGLMVisionConfig(preferred_image_size=384)


def test_a_model_keeps_the_size_that_it_prefers_and_takes_it_unasked(tmp_path):
    values = copy.deepcopy(SMALL_CONFIG)
    values["vision_config"]["preferred_image_size"] = 42
    VisualGLMForConditionalGeneration(VisualGLMConfig(**values)).eval().save_pretrained(tmp_path)
    model = VisualGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.vision_config.shown_image_size == 42
    with torch.no_grad():
        assert model.get_image_features(pixels(42, 42)).last_hidden_state.shape[1] == 10
        with pytest.raises(ValueError, match="pixel_values must be"):
            model.get_image_features(pixels(42, 42), interpolate_pos_encoding=False)


# ---------------------------------------------------------------- chat


def test_chat_shows_a_picture_at_the_size_that_is_asked_for(loaded):
    model, tokenizer = loaded
    turn = model.prepare_turn(tokenizer, CIRCLES, "有几个？", None, image_size=392)
    usual = model.prepare_turn(tokenizer, CIRCLES, "有几个？", None)
    explicit = model.prepare_turn(tokenizer, CIRCLES, "有几个？", None, image_size=224)
    assert torch.equal(usual.inputs["image_embeds"], explicit.inputs["image_embeds"])
    assert turn.inputs["image_embeds"].shape == usual.inputs["image_embeds"].shape
    assert not torch.equal(turn.inputs["image_embeds"], usual.inputs["image_embeds"])
    (image,) = model.open_images(CIRCLES, 392)
    expected = model.get_image_features(image.pixel_values, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(turn.inputs["image_embeds"], expected)


def test_chat_and_its_stream_answer_alike_about_a_larger_picture(loaded):
    model, tokenizer = loaded
    answer, history = model.chat(tokenizer, CIRCLES, "描述这张图片。", image_size=448, **GREEDY)
    *_, last = model.stream_chat(tokenizer, CIRCLES, "描述这张图片。", image_size=448, **GREEDY)
    assert last == (answer, history)
    assert "红色的圆形，背景是草地" in answer


def test_the_same_picture_at_another_size_joins_the_conversation_again(loaded):
    model, tokenizer = loaded
    _, history = model.chat(tokenizer, CIRCLES, "描述这张图片。", **GREEDY)
    _, same = model.chat(tokenizer, CIRCLES, "有几个？", history=history, **GREEDY)
    _, larger = model.chat(tokenizer, CIRCLES, "有几个？", history=history, image_size=392, **GREEDY)
    assert [len(each.images) for each in (same, larger)] == [1, 2]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (384, "Take 378 or 392"),
        (0, "from 14 to 2240"),
        (10**6, "from 14 to 2240"),
        ("392", "a number of pixels"),
        (392.0, "a number of pixels"),
        (True, "a number of pixels"),
    ],
)
def test_chat_refuses_a_size_that_no_picture_can_have(loaded, size, words):
    model, tokenizer = loaded
    for picture in (CIRCLES, None):
        with pytest.raises(ValueError, match=words):
            model.chat(tokenizer, picture, "有几个？", image_size=size)


def test_a_size_may_be_a_number_of_numpys(loaded):
    model, tokenizer = loaded
    asked = [model.prepare_turn(tokenizer, CIRCLES, "有几个？", None, image_size=size) for size in (392, np.int64(392))]
    assert torch.equal(*(turn.inputs["image_embeds"] for turn in asked))


def test_the_image_processor_makes_pictures_of_any_size(processor):
    picture = Image.open(CIRCLES)
    text = f"<img>{processor.image_token}</img>问：描述这张图片。\n答："
    inputs = processor(text=text, images=picture, return_tensors="pt", size={"height": 280, "width": 392})
    assert inputs["pixel_values"].shape == (1, 3, 280, 392)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 32
