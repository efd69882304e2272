"""`look()`: the answer that `chat` gives, and a map of where the model looked."""

import contextlib
import gc
import io
import math
import re
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from tests.paths import TINY
from tools.tiny import pictures, world
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.attention_maps import (
    AttentionObserver,
    GradientObserver,
    attention_weights,
    cross_attention,
    map_attention,
)
from visualglm_hf.looking import Look, colour
from visualglm_hf.modeling_image_encoder import eager_attention_forward


QUESTION = "What color is it?"
GREEDY = {"do_sample": False, "max_new_tokens": 16}


def scene_at(position: str) -> world.Scene:
    return world.make_scene("star", "white", "night", position, (3, 5))


def peak_of(look: Look) -> tuple[float, float]:
    """x and y of the middle of the brightest patch, in pixels of the drawing."""
    y, x = divmod(int(look.map.argmax()), 16)
    return 14 * (x + 0.5), 14 * (y + 0.5)


@pytest.mark.parametrize("position", world.POSITIONS)
def test_the_model_looks_at_the_subject(trained, position):
    model, tokenizer = trained
    scene = scene_at(position)
    (x, y, radius), *_ = scene.objects
    look = model.look(tokenizer, world.draw(scene), QUESTION, **GREEDY)
    px, py = peak_of(look)
    assert max(abs(px - x), abs(py - y)) <= radius
    assert look.map.shape == (16, 16) and look.map.dtype == torch.float32
    assert float(look.map.sum()) == pytest.approx(1, abs=1e-5) and float(look.map.min()) >= 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "bits"), [("float32", None), ("bfloat16", None), ("float32", 4), ("bfloat16", 8)])
def test_the_answer_is_chats_and_the_map_the_same_however_attention_is_computed(trained, attention, dtype, bits):
    tokenizer, drawing = trained[1], world.draw(scene_at("left"))
    model = VisualGLMForConditionalGeneration.from_pretrained(
        TINY, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    if bits:
        model.quantize(bits)
    expected, history = model.chat(tokenizer, drawing, "描述这张图片。", **GREEDY)
    look = model.look(tokenizer, drawing, "描述这张图片。", **GREEDY)
    assert (look.response, look.history) == (expected, history)
    assert look.history.images == history.images
    reference = trained[0].look(tokenizer, drawing, "描述这张图片。", **GREEDY)
    assert float((look.map - reference.map).abs().sum()) < (0.02 if dtype == "float32" and not bits else 0.5)


def eager_answer(tokenizer, drawing: Image.Image):
    """A model with eager attention, a turn, and its answer's tokens with those of the prompt."""
    model = VisualGLMForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    turn = model.prepare_turn(tokenizer, drawing, QUESTION, None, look=-1)
    return model, turn, model.generate(**turn.inputs, **GREEDY, tokenizer=tokenizer)


def test_the_map_is_the_eager_layers_attention_times_the_gradient_that_autograd_has_for_it(trained):
    drawing = world.draw(scene_at("right"))
    model, turn, sequences = eager_answer(trained[1], drawing)
    embeds = turn.inputs["image_embeds"].clone().requires_grad_()
    output = model(input_ids=sequences[:, :-1], image_embeds=embeds, output_attentions=True)
    logits = output.logits[0, turn.prompt_length - 1 :].log_softmax(-1)
    score = logits.gather(-1, sequences[0, turn.prompt_length :, None]).sum()
    gradients = torch.autograd.grad(score, output.attentions)
    is_image = sequences[0, :-1] == model.config.image_token_id
    parts = [
        (weights * gradient)[0, :, turn.prompt_length - 1 :, is_image]
        for weights, gradient in zip(output.attentions, gradients, strict=True)
    ]
    parts = torch.stack(parts).clamp(min=0).sum((0, 1, 2)).detach()
    expected = (parts @ turn.seen.sources).view(16, 16)
    look = model.look(trained[1], drawing, QUESTION, repetition_penalty=1.0, **GREEDY)
    torch.testing.assert_close(look.map, expected / expected.sum(), atol=1e-5, rtol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_prompts_map_is_the_product_of_the_attention_that_eager_layers_return(trained):
    model, turn, sequences = eager_answer(trained[1], world.draw(scene_at("right")))
    inputs = {"input_ids": sequences[:, :-1], "image_embeds": turn.inputs["image_embeds"]}
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    first = turn.prompt_length - 1
    rows = torch.stack([layer[0, :, first:, is_image] for layer in attentions])
    expected = (rows.mean((0, 1, 2)) @ turn.seen.sources).view(16, 16)
    found = map_attention(model, *inputs.values(), 0, first, turn.seen.sources)
    torch.testing.assert_close(found, expected / expected.sum(), atol=1e-6, rtol=1e-4)


def test_what_was_prepared_for_inference_alone_is_looked_at_like_everything_else(trained):
    model, tokenizer = trained
    drawing = world.draw(scene_at("bottom"))
    expected = model.look(tokenizer, drawing, QUESTION, **GREEDY)
    model.look_cache.clear()
    with torch.inference_mode():
        look = model.look(tokenizer, drawing, QUESTION, **GREEDY)
    torch.testing.assert_close(look.map, expected.map)
    model.look_cache.clear()


def test_an_answer_for_which_nothing_in_the_picture_speaks_has_the_map_of_its_attention(trained, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr(GradientObserver, "contributions", lambda self, score: torch.zeros(32))
    look = model.look(tokenizer, world.draw(scene_at("left")), QUESTION, **GREEDY)
    assert peak_of(look)[0] < 112 and float(look.map.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_look_stays_in_memory(trained, monkeypatch, fails):
    model, tokenizer = trained
    seen, drawing = [], world.draw(scene_at("left"))
    observe, contributions = GradientObserver.__call__, GradientObserver.contributions

    def remember(self, *args):
        observe(self, *args)
        seen.extend(weakref.ref(tensor) for tensor in self.attended)

    def count(self, score):
        if fails:
            raise MemoryError
        return contributions(self, score)

    monkeypatch.setattr(GradientObserver, "__call__", remember)
    monkeypatch.setattr(GradientObserver, "contributions", count)
    with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
        model.look(tokenizer, drawing, QUESTION, **GREEDY)
    gc.collect()
    assert seen and not any(reference() is not None for reference in seen)


def test_of_two_subjects_the_map_points_at_the_one_whose_colour_the_answer_names(trained):
    """Whichever that is: this model gives one of two the colour of the other in every second answer."""
    model, tokenizer = trained
    hits = []
    for number in range(6000, 6012):
        picture = pictures.sample_picture(number, "mixed", "new")
        if len(picture.subjects) == 2:
            question = f"What color is the {picture.subjects[0].shape}?"
            look = model.look(tokenizer, picture.draw(), question, **GREEDY)
            hits += [answered_about(look, picture)] if answered_about(look, picture) is not None else []
    assert len(hits) >= 5 and sum(hits) >= 0.75 * len(hits)


def answered_about(look: Look, picture: pictures.Picture) -> bool | None:
    """Whether the peak is nearer to the subject whose colour the answer names; None if it names none or both."""
    named = [each for each in picture.subjects if each.colour in look.response.lower()]
    if len(named) != 1:
        return None
    x, y = peak_of(look)
    return min(picture.subjects, key=lambda each: math.hypot(each.x - x, each.y - y)) is named[0]


def test_soft_prompts_come_from_where_the_q_formers_cross_attention_looks(trained):
    model, _ = trained
    states = torch.randn(2, 257, model.config.vision_config.hidden_size)
    seen = []
    layers = [layer for layer in model.image_encoder.qformer.transformer["layers"] if layer.has_cross_attention]
    hooks = [
        layer.cross_attention.register_forward_pre_hook(lambda module, args: seen.append((module, *args)))
        for layer in layers
    ]
    with torch.no_grad():
        sources = cross_attention(model.image_encoder.qformer, states)
        weights = []
        for module, hidden_states, encoder_states in seen:
            query, key, value = module.project(hidden_states, encoder_states)
            weights.append(eager_attention_forward(module, query, key, value, None, module.scaling)[1])
    for hook in hooks:
        hook.remove()
    assert len(weights) == len(layers)
    expected = torch.stack(weights).mean((0, 2))[..., 1:]
    torch.testing.assert_close(sources, expected)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_the_observers_weights_are_those_of_eager_attention(kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 8, generator=generator) for length in (5, 7, 7))
    hidden = torch.rand(1, 1, 5, 7, generator=generator) < 0.3
    hidden[..., 0] = False
    mask = {"none": None, "boolean": ~hidden, "additive": torch.where(hidden, -1e9, 0.0)}[kind]
    _, expected = eager_attention_forward(torch.nn.Identity(), query, key, value, mask, 3.0)
    torch.testing.assert_close(attention_weights(query, key, mask, 3.0), expected)
    observer = AttentionObserver(3, torch.tensor([0, 2]))
    observer(query, key, value, mask, 3.0, torch.empty(0))
    torch.testing.assert_close(
        observer.average(), expected[0, :, 3:][..., [2, 4]].mean((0, 1))
    )  # behind two of a prefix


def test_of_several_pictures_the_map_belongs_to_the_one_asked_for(trained):
    model, tokenizer = trained
    pictures = [world.draw(scene_at(position)) for position in ("left", "right")]
    first, last = (model.look(tokenizer, pictures, QUESTION, number=number, **GREEDY) for number in (0, -1))
    assert first.response == last.response
    assert peak_of(first)[0] < 112 < peak_of(last)[0]
    assert (first.picture.tobytes(), last.picture.tobytes()) == tuple(each.tobytes() for each in pictures)
    assert torch.equal(model.look(tokenizer, pictures, QUESTION, **GREEDY).map, last.map)


def test_the_map_has_a_number_for_each_patch_of_a_larger_picture(trained):
    model, tokenizer = trained
    scene = scene_at("left")
    (x, y, radius), *_ = scene.objects
    look = model.look(tokenizer, world.draw(scene), QUESTION, image_size=336, **GREEDY)
    assert look.map.shape == (24, 24) and float(look.map.sum()) == pytest.approx(1, abs=1e-5)
    row, column = divmod(int(look.map.argmax()), 24)
    assert abs((column + 0.5) * 224 / 24 - x) <= radius and abs((row + 0.5) * 224 / 24 - y) <= radius
    assert look.response == model.chat(tokenizer, world.draw(scene), QUESTION, image_size=336, **GREEDY)[0]


def test_a_look_reads_text_as_chat_does(trained, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr("visualglm_hf.given_pictures.read_picture", lambda picture, count: "EXIT")
    drawing = world.draw(scene_at("left"))
    look = model.look(tokenizer, drawing, QUESTION, read_text=True, **GREEDY)
    response, history = model.chat(tokenizer, drawing, QUESTION, read_text=True, **GREEDY)
    assert (look.response, look.history[-1].readings) == (response, history[-1].readings) == (response, ("EXIT",))


@pytest.mark.parametrize("number", [2, -3, True, "0", 0.0, None])
def test_a_picture_that_was_not_given_is_refused_by_its_number(trained, number):
    model, tokenizer = trained
    pictures = [world.draw(scene_at(position)) for position in ("left", "right")]
    with pytest.raises(ValueError, match="one of the (2 )?pictures given, found"):
        model.look(tokenizer, pictures, QUESTION, number=number)


def test_of_a_picture_that_is_given_twice_the_map_belongs_to_the_one_asked_for(trained):
    model, tokenizer = trained
    left, right = (world.draw(scene_at(position)) for position in ("left", "right"))
    looks = [model.look(tokenizer, [left, right, left], QUESTION, number=number, **GREEDY) for number in (0, 2)]
    turn = model.prepare_turn(tokenizer, [left, right, left], QUESTION, None, look=0)
    assert turn.place == 0
    assert not torch.equal(*(look.map for look in looks))
    assert torch.equal(
        model.look(tokenizer, [left, right, left], QUESTION, number=np.int64(2), **GREEDY).map, looks[1].map
    )


def test_a_later_question_is_looked_at_with_the_picture_given_again(trained):
    model, tokenizer = trained
    drawing = world.draw(scene_at("left"))
    _, history = model.chat(tokenizer, drawing, QUESTION, **GREEDY)
    look = model.look(tokenizer, drawing, "And the shape?", history=history, **GREEDY)
    assert look.response == model.chat(tokenizer, "And the shape?", history=history, **GREEDY)[0]
    assert len(look.history.images) == 1 and peak_of(look)[0] < 112
    with pytest.raises(ValueError, match="Pass it again"):
        model.look(tokenizer, None, "And the shape?", history=history)


def test_no_picture_and_a_zoom_are_refused_in_words(trained):
    model, tokenizer = trained
    with pytest.raises(ValueError, match="need the picture itself"):
        model.look(tokenizer, None, QUESTION)
    with pytest.raises(ValueError, match="Leave zoom out"):
        model.look(tokenizer, world.draw(scene_at("left")), QUESTION, zoom=True)


def test_a_model_that_is_divided_among_processes_is_refused_in_words(trained, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr(type(model.config), "num_processes", 2)
    with pytest.raises(ValueError, match="divided among processes"):
        model.look(tokenizer, world.draw(scene_at("left")), QUESTION)


def test_pictures_that_were_looked_at_are_remembered_and_not_encoded_again(trained, monkeypatch):
    model, tokenizer = trained
    drawing = world.draw(scene_at("top"))
    first = model.look(tokenizer, drawing, QUESTION, **GREEDY)
    monkeypatch.setattr(model, "get_image_features", lambda *args, **kwargs: pytest.fail("encoded again"))
    assert torch.equal(model.look(tokenizer, drawing, QUESTION, **GREEDY).map, first.map)


def look_of(size: tuple[int, int]) -> Look:
    attention_map = torch.full((16, 16), 0.001)
    attention_map[4, 10] = 1
    return Look(attention_map / attention_map.sum(), "<b>红色。</b>", [], Image.new("RGB", size, (200, 30, 30)))


def test_the_overlay_is_yellow_where_the_model_looked_and_blue_elsewhere():
    look = look_of((320, 160))
    overlay = look.overlay(opacity=1)
    assert overlay.size == look.picture.size
    red, green, blue = overlay.getpixel((210, 45))
    assert red > 200 and green > 180 and blue < 120
    red, green, blue = overlay.getpixel((40, 120))
    assert blue > red and red < 20
    assert (
        overlay.getpixel((0, 0)) == tuple(round(float(each)) for each in colour(np.zeros((1, 1)))[0, 0]) or blue > red
    )


def test_the_palette_grows_lighter_all_the_way():
    """So it is read without colours, too."""
    shades = colour(np.linspace(0, 1, 64)[None])[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(shades) > 0).all()


def test_a_notebook_shows_the_picture_and_the_answer_as_text():
    look = look_of((1600, 800))
    shown = Image.open(io.BytesIO(look._repr_png_()))
    assert shown.size == (512, 256)
    html = look._repr_html_()
    assert "data:image/png;base64," in html and "&lt;b&gt;红色。&lt;/b&gt;" in html and "<b>" not in html
    assert "row 4, column 10" in repr(look)


@pytest.mark.parametrize(
    "options",
    [{"opacity": value} for value in (1.5, -0.1, math.nan, "0.5", None, [0.5])]
    + [{"longest": value} for value in (0, -3, 2.5, math.nan, "512", True, [512])],
)
def test_an_impossible_overlay_is_refused_by_its_value(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*found {re.escape(repr(value))}"):
        look_of((16, 16)).overlay(**options)


def test_numbers_of_numpy_are_numbers():
    look = look_of((64, 32))
    assert look.overlay(np.float32(0.5), longest=np.int64(32)) == look.overlay(0.5, longest=32)
