"""`chat(..., zoom=...)`: the part of a picture that matters, from its full pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from visualglm_hf.image_processing_visualglm import VisualGLMImageProcessor
from visualglm_hf.zooming import MARGIN, SMALLEST_CROP, count_looks, find_region, look_ahead, zoom_obstacle


QUESTION = "What color is it?"
GREEDY = {"do_sample": False, "max_new_tokens": 16}
SEEN = 224  # pixels


@pytest.fixture
def drawing(small_star) -> Image.Image:
    return small_star


def map_of(*bright: tuple[int, int, float]) -> torch.Tensor:
    """A map that is bright in these patches (row, column, how much) and nearly dark elsewhere."""
    attention_map = torch.full((16, 16), 0.001)
    for y, x, value in bright:
        attention_map[y, x] = value
    return attention_map / attention_map.sum()


def test_the_region_is_a_square_around_what_is_bright():
    left, upper, right, lower = find_region(map_of((4, 10, 1.0)), (1600, 1600), SEEN)
    assert (right - left, lower - upper) == (400, 400)
    assert ((left + right) / 2, (upper + lower) / 2) == (1050, 450)


def test_the_regions_size_follows_what_is_bright():
    spots = [(4, 10, 1.0), (4, 11, 1.0), (5, 11, 0.5)]
    left, _, right, _ = find_region(map_of(*spots), (1600, 1600), SEEN)
    assert right - left == MARGIN * 2 * 100 > SMALLEST_CROP * 1600


def test_a_faint_patch_and_a_light_spot_do_not_widen_the_region():
    alone = find_region(map_of((4, 10, 1.0)), (1600, 1600), SEEN)
    assert find_region(map_of((4, 10, 1.0), (15, 0, 0.1)), (1600, 1600), SEEN) == alone  # a tenth of the peak
    assert find_region(map_of((4, 10, 1.0), (15, 0, 0.2)), (1600, 1600), SEEN) == alone  # bright, but light


def test_two_things_that_matter_are_both_in_the_region_or_there_is_none():
    left, upper, right, lower = find_region(map_of((4, 4, 1.0), (5, 5, 0.9)), (1600, 1600), SEEN)
    assert left <= 400 and right >= 600 and upper <= 400 and lower >= 600
    assert find_region(map_of((1, 1, 1.0), (14, 14, 0.9)), (1600, 1600), SEEN) is None


@pytest.mark.parametrize("size", [(1600, 1600), (1601, 777), (500, 3000), (449, 448)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 15), (15, 0), (15, 15)])
def test_a_region_in_a_corner_stays_in_the_picture_and_shows_the_corner(size, corner):
    region = find_region(map_of((*corner, 1.0)), size, SEEN)
    left, upper, right, lower = region
    assert 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]
    assert (left == 0 or right == size[0]) and (upper == 0 or lower == size[1])
    assert max(right - left, lower - upper) >= SEEN


@pytest.mark.parametrize("size", [(1600, 1600), (3000, 1000)])
def test_what_is_more_than_two_patches_wide_or_high_is_seen_well_enough(size):
    for spot in ([(4, 9, 1.0), (4, 10, 1.0), (4, 11, 1.0)], [(3, 9, 1.0), (4, 9, 1.0), (5, 9, 1.0)]):
        assert find_region(map_of(*spot), size, SEEN) is None
        assert find_region(map_of(*spot[:2]), size, SEEN) is not None


def test_nothing_is_enlarged_beyond_its_own_pixels():
    left, _, right, _ = find_region(map_of((4, 10, 1.0)), (500, 500), SEEN)
    assert right - left == SEEN


def test_an_even_map_has_no_region():
    assert find_region(torch.full((16, 16), 1 / 256), (1600, 1600), SEEN) is None


@pytest.mark.parametrize(
    ("given", "looks"),
    [(False, 0), (True, 1), (None, 0), (0, 0), (1, 1), (4, 4), (np.int64(2), 2), (np.True_, 1), (np.False_, 0)],
)
def test_zoom_is_a_truth_or_a_number_of_looks(given, looks):
    assert count_looks(given) == looks


@pytest.mark.parametrize("given", [-1, 5, 1.5, "yes", "1", [1]])
def test_another_zoom_is_refused_by_name(given):
    with pytest.raises(ValueError, match="zoom must be .*from 0 to 4, found"):
        count_looks(given)


def test_a_small_thing_is_seen_after_a_zoom(trained, drawing):
    model, tokenizer = trained
    answers = [model.chat(tokenizer, drawing, QUESTION, zoom=zoom, **GREEDY)[0] for zoom in (True, 2)]
    assert answers == ["White.", "White."]
    stream = model.stream_chat(tokenizer, drawing, QUESTION, zoom=True, **GREEDY)
    assert list(stream)[-1][0] == "White."


def test_a_zoom_answers_what_the_crop_alone_would_be_answered(trained, drawing):
    model, tokenizer = trained
    turn = model.prepare_turn(tokenizer, drawing, "描述这张图片。", None, look=-1)
    inputs = turn.inputs
    attention_map = look_ahead(model, turn.seen, inputs["input_ids"], inputs["image_embeds"], turn.place)
    region = find_region(attention_map, drawing.size, SEEN)
    left, upper, right, lower = region
    assert left <= 2 * SEEN + 70 and right >= 3 * SEEN - 70 and upper <= SEEN + 70 and lower >= 2 * SEEN - 70
    alone, _ = model.chat(tokenizer, drawing.crop(region), "描述这张图片。", **GREEDY)
    assert model.chat(tokenizer, drawing, "描述这张图片。", zoom=True, **GREEDY)[0] == alone


def test_the_history_remembers_the_whole_picture_once(trained, drawing):
    model, tokenizer = trained
    _, plain = model.chat(tokenizer, drawing, QUESTION, **GREEDY)
    _, zoomed = model.chat(tokenizer, drawing, QUESTION, zoom=True, **GREEDY)
    assert zoomed.images == plain.images
    torch.testing.assert_close(zoomed.images[0].embeds, plain.images[0].embeds)
    answer, after = model.chat(tokenizer, drawing, "And the shape?", history=zoomed, zoom=True, **GREEDY)
    assert (answer, len(after), len(after.images)) == ("A star.", 2, 1)
    torch.testing.assert_close(after.images[0].embeds, plain.images[0].embeds)


def test_without_a_zoom_nothing_more_is_computed(trained, drawing, monkeypatch):
    model, tokenizer = trained
    calls = []
    monkeypatch.setattr("visualglm_hf.zooming.map_attention", lambda *args: calls.append(args))
    seen = len(model.look_cache)
    model.chat(tokenizer, drawing, QUESTION, **GREEDY)
    assert (calls, len(model.look_cache)) == ([], seen)


def test_a_zoom_costs_one_more_encoding_and_one_more_prompt(trained, drawing, monkeypatch):
    model, tokenizer = trained
    encoded, prompts = [], []
    encode, forward = model.get_image_features, model.forward
    model.look_cache.clear()
    model.image_cache.clear()
    monkeypatch.setattr(
        model, "get_image_features", lambda *args, **kwargs: (encoded.append(1), encode(*args, **kwargs))[1]
    )

    def count(input_ids=None, **kwargs):
        prompts.extend([1] if input_ids is not None and input_ids.shape[1] > 1 else [])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", count)
    model.chat(tokenizer, drawing, QUESTION, zoom=True, **GREEDY)
    assert (len(encoded), len(prompts)) == (2, 2)


@pytest.mark.parametrize("size", [(224, 224), (100, 60), (447, 300)])
def test_a_picture_of_what_the_model_sees_anyway_is_answered_once_with_a_warning(trained, drawing, size, monkeypatch):
    model, tokenizer = trained
    warnings = []
    monkeypatch.setattr("visualglm_hf.zooming.logger.warning", warnings.append)
    small = drawing.resize(size)
    expected, _ = model.chat(tokenizer, small, QUESTION, **GREEDY)
    assert model.chat(tokenizer, small, QUESTION, zoom=True, **GREEDY)[0] == expected
    (warning,) = warnings
    assert warning == zoom_obstacle(size, SEEN)
    assert f"{size[0]} x {size[1]}" in warning and "448" in warning


def test_a_zoom_without_a_picture_is_refused_in_words(trained, drawing):
    model, tokenizer = trained
    with pytest.raises(ValueError, match="need the picture itself. Pass it before the query"):
        model.chat(tokenizer, QUESTION, zoom=True)
    _, history = model.chat(tokenizer, drawing, QUESTION, **GREEDY)
    with pytest.raises(ValueError, match="Pass it again: the history remembers only"):
        model.stream_chat(tokenizer, "And the shape?", history=history, zoom=True)


def test_preprocessed_pixels_are_no_picture_to_zoom_into(trained, drawing):
    model, tokenizer = trained
    pixel_values = VisualGLMImageProcessor()(drawing, return_tensors="pt")["pixel_values"]
    for given in (pixel_values, pixel_values[0]):
        with pytest.raises(ValueError, match=r"wrong shape|Pass the picture itself"):
            model.chat(tokenizer, given, QUESTION, zoom=True)


def test_of_several_pictures_the_last_is_looked_into(trained, drawing):
    model, tokenizer = trained
    other = drawing.transpose(Image.Transpose.ROTATE_180).resize((SEEN, SEEN))
    turn = model.prepare_turn(tokenizer, [other, drawing], QUESTION, None, zoom=True)
    plain = model.prepare_turn(tokenizer, [other, drawing], QUESTION, None)
    torch.testing.assert_close(turn.inputs["image_embeds"][0], plain.inputs["image_embeds"][0])
    assert not torch.equal(turn.inputs["image_embeds"][1], plain.inputs["image_embeds"][1])
    assert turn.images == plain.images


# ---------------------------------------------------------------- beside the other ways of showing a picture


def test_a_crop_is_shown_at_the_size_of_the_picture(trained, drawing, monkeypatch):
    model, tokenizer = trained
    opened, open_images = [], model.open_images
    monkeypatch.setattr(
        model, "open_images", lambda *args, **kwargs: (opened.append(open_images(*args, **kwargs)), opened[-1])[1]
    )
    turn = model.prepare_turn(tokenizer, drawing, QUESTION, None, zoom=True, image_size=336)
    assert [[tuple(each.pixel_values.shape) for each in images] for images in opened] == [[(1, 3, 336, 336)]] * 2
    [[_], [crop]] = opened
    assert 336 <= crop.picture.width < drawing.width
    expected = model.get_image_features(crop.pixel_values, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(turn.inputs["image_embeds"], expected)


def test_text_is_read_in_the_whole_picture_and_the_crop_is_looked_at(trained, drawing, monkeypatch):
    model, tokenizer = trained
    sizes = []
    monkeypatch.setattr(
        "visualglm_hf.given_pictures.read_picture", lambda picture, count: sizes.append(picture.size) or "EXIT"
    )
    turn = model.prepare_turn(tokenizer, drawing, QUESTION, None, read_text=True, zoom=True)
    assert sizes == [drawing.size]
    assert 'Text in the picture: "EXIT"' in tokenizer.decode(turn.inputs["input_ids"][0])
    plain = model.prepare_turn(tokenizer, drawing, QUESTION, None, read_text=True)
    assert turn.inputs["input_ids"].equal(plain.inputs["input_ids"])
    assert not turn.inputs["image_embeds"].equal(plain.inputs["image_embeds"])
    history = turn.finish("White.")[1]
    assert history[-1].readings == ("EXIT",)
    before = len(sizes)
    model.prepare_turn(tokenizer, drawing, "And the shape?", history, read_text=True, zoom=True)
    assert len(sizes) == before


def test_what_there_is_to_gain_depends_on_the_size_at_which_a_picture_is_shown(trained, drawing, monkeypatch):
    model, tokenizer = trained
    warnings = []
    monkeypatch.setattr("visualglm_hf.zooming.logger.warning", warnings.append)
    model.prepare_turn(tokenizer, drawing, QUESTION, None, zoom=True, image_size=462)
    assert warnings == [zoom_obstacle(drawing.size, 462)]
    assert "462 x 462" in warnings[0] and "924 pixels" in warnings[0]
