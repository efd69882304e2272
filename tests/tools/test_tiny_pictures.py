"""The harder pictures of the tiny world: what is in them is where it is said to be, at any size and in any window."""

import itertools

import numpy as np
import pytest

from tools.tiny import pictures, show, world
from tools.tiny.world import COLOURS, Window


NUM_PICTURES = 120
WITHOUT_WORDS = [kind for kind in pictures.KINDS if kind != "sign"]


def sample(kind, split="training", count=NUM_PICTURES):
    return [pictures.sample_picture(number, kind, split) for number in range(count)]


def colour_at(image, x, y):
    """The mean of a few pixels."""
    x, y = round(x), round(y)
    return np.asarray(image, dtype=float)[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_the_subjects_of_a_picture_can_be_told_apart_and_lie_in_it(kind):
    for picture in sample(kind):
        assert len({each.shape for each in picture.subjects}) == len(picture.subjects)
        assert len({each.colour for each in picture.subjects}) == len(picture.subjects)
        for one, other in itertools.combinations(picture.subjects, 2):
            assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius
        for each in picture.subjects:
            left, top, right, bottom = picture.box(each, world.IMAGE_SIZE)
            assert min(left, top) >= 0 and max(right, bottom) <= world.IMAGE_SIZE
            assert (each.colour, picture.background) not in world.CLASHES


@pytest.mark.parametrize("kind", WITHOUT_WORDS)
@pytest.mark.parametrize("size", [224, 448, 1344])
def test_a_subject_is_drawn_in_its_colour_where_its_box_is(kind, size):
    for picture in sample(kind, "new", 6):
        image = picture.whole(size)
        assert image.size == (size, size)
        for each in picture.subjects:
            left, top, right, bottom = picture.box(each, size)
            found = colour_at(image, (left + right) / 2, (top + bottom) / 2)
            assert np.abs(found - COLOURS[each.colour][1]).max() < 30


def test_a_window_shows_what_the_same_part_of_a_large_picture_shows():
    for picture in sample("small", "new", 12):
        window = pictures.oracle_window(picture.subjects[0])
        shown = np.asarray(picture.draw(window), dtype=float)
        scale = pictures.CANVAS / world.IMAGE_SIZE
        box = [window.left, window.top, window.left + window.side, window.top + window.side]
        crop = picture.whole().crop([round(value * scale) for value in box]).resize((224, 224))
        assert np.abs(shown - np.asarray(crop, dtype=float)).mean() < 12


def test_the_oracles_window_has_its_subject_whole_and_stays_in_the_picture():
    for picture in sample("small"):
        for each in picture.subjects:
            window = pictures.oracle_window(each)
            assert window.left >= 0 and window.top >= 0
            assert max(window.left, window.top) + window.side <= world.IMAGE_SIZE + 1e-9
            assert window.left <= each.x - each.radius and each.x + each.radius <= window.left + window.side + 1e-9
            assert window.side == pytest.approx(4 * each.radius)


def test_a_window_of_a_scene_of_today_leaves_the_whole_as_it_was():
    for number in range(8):
        scene = world.sample_scene(number)
        assert world.draw(scene).tobytes() == world.draw(scene, Window()).tobytes()
        subject = scene.subjects[0]
        window = pictures.clip_window(subject.x, subject.y, 40)
        centre = (subject.x - window.left) * window.scale, (subject.y - window.top) * window.scale
        assert np.abs(colour_at(world.draw(scene, window), *centre) - COLOURS[scene.colour][1]).max() < 30


def test_small_subjects_take_as_much_of_the_picture_as_is_said():
    shares = [(2 * each.radius) ** 2 / world.IMAGE_SIZE**2 for picture in sample("small") for each in picture.subjects]
    assert pictures.SMALLEST <= min(shares) < 1.1 * pictures.SMALLEST
    assert 0.9 * pictures.LARGEST_SMALL < max(shares) <= pictures.LARGEST_SMALL


@pytest.mark.parametrize("kind", ["mixed", "small", "middling"])
def test_training_never_shows_what_the_contradicting_pictures_show(kind):
    for picture in sample(kind, count=400):
        shapes = {each.shape for each in picture.subjects}
        assert not any(stranger <= shapes for stranger in pictures.STRANGERS)
        assert not any(each.colour == pictures.UNUSUAL[picture.background] for each in picture.subjects)
        assert not pictures.has_held_out(picture)
    for picture in sample("contradicting"):
        assert frozenset(each.shape for each in picture.subjects) in pictures.STRANGERS
        assert picture.subjects[0].colour == pictures.UNUSUAL[picture.background]


def test_training_shows_the_usual_colour_and_company_most_often():
    drawn = sample("mixed", count=600)
    colours = [each.colour == pictures.USUAL[picture.background] for picture in drawn for each in picture.subjects]
    two = [frozenset(each.shape for each in picture.subjects) for picture in drawn if len(picture.subjects) == 2]
    assert np.mean(colours) > 0.25  # one of seven otherwise
    assert np.mean([pair in pictures.HABITS for pair in two]) > 0.5  # three of eight otherwise


def test_every_unusual_colour_can_be_seen_on_its_background():
    for table in (pictures.USUAL, pictures.UNUSUAL):
        assert table.keys() == world.BACKGROUNDS.keys()
        assert not {(colour, background) for background, colour in table.items()} & world.CLASHES


def test_words_of_the_examination_are_in_no_picture_of_training():
    trained = {picture.sign.word for picture in sample("sign", "training", 600)}
    new = {picture.sign.word for picture in sample("sign", "new", 600)}
    assert trained and new and not trained & new


def test_a_latin_word_needs_no_font_and_shows_on_its_plate():
    picture = next(each for each in sample("sign") if each.sign.word.isascii())
    image = np.asarray(picture.whole(448), dtype=float)
    scale = 448 / world.IMAGE_SIZE
    sign = picture.sign
    top, bottom = round((sign.y - sign.height / 2) * scale) + 4, round((sign.y + sign.height / 2) * scale) - 4
    left, right = round((sign.x - sign.width / 2) * scale) + 4, round((sign.x + sign.width / 2) * scale) - 4
    plate = image[max(0, top) : bottom, max(0, left) : right].mean(2)
    assert plate.max() - plate.min() > 120


def test_a_chinese_word_without_a_font_is_refused_in_words(monkeypatch):
    pictures.find_chinese_font.cache_clear()
    monkeypatch.setattr(pictures, "CHINESE_FONTS", ("no such font.ttf",))
    picture = next(each for each in sample("sign") if not each.sign.word.isascii())
    try:
        with pytest.raises(ValueError, match="No font with Chinese characters.*--font"):
            picture.draw()
    finally:
        pictures.find_chinese_font.cache_clear()


@pytest.mark.parametrize("arguments", [("huge", "new"), ("mixed", "old")])
def test_a_kind_or_split_that_does_not_exist_is_refused(arguments):
    with pytest.raises(ValueError, match="choose one of"):
        pictures.sample_picture(0, *arguments)


@pytest.mark.parametrize("kind", WITHOUT_WORDS)
def test_the_same_number_is_the_same_picture_and_another_split_another(kind):
    one, again = (pictures.sample_picture(3, kind) for _ in range(2))
    assert one == again and one.draw().tobytes() == again.draw().tobytes()
    assert one != pictures.sample_picture(3, kind, "new")


def test_one_picture_is_drawn_into_a_file_with_its_captions(tmp_path, capsys):
    assert show.main([str(tmp_path / "one.png"), "--kind", "small", "--seed", "2", "--size", "300"]) == 0
    picture = pictures.sample_picture(2, "small", "new")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(picture.subjects)
    box = " ".join(str(round(edge)) for edge in picture.box(picture.subjects[0], 300))
    assert lines[2] == f"{picture.subjects[0].colour} {picture.subjects[0].shape} {box}"
    assert show.main([str(tmp_path / "nowhere" / "one.png")]) == 2
