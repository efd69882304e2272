"""The second lessons of the tiny model: what a batch says is what its pictures show, and the same each time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tools.tiny import examiner, lessons, model, pictures, tokenizer, words, world
from tools.tiny.data import COLOURS, SHAPES, Dialogue
from tools.tiny.tokenizer import write_tokenizer
from tools.tiny.train import SecondLessons
from visualglm_hf import ChatGLMTokenizer
from visualglm_hf.conversation import build_prompt


@pytest.fixture(autouse=True)
def words_without_a_font(monkeypatch):
    """Signs have Latin words and digits alone: Chinese ones need a font that not every machine has."""
    latin = {script: listed for script, listed in words.TRAINED_WORDS.items() if script != "Chinese"}
    monkeypatch.setattr(pictures, "TRAINED_WORDS", latin)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def lessons_from(vocabulary, vision_steps=0) -> SecondLessons:
    return SecondLessons(vocabulary, 5, 8, 0, vision_steps)


def test_a_batch_is_a_function_of_seed_and_step(vocabulary):
    for step in (0, 3):
        one, again = (lessons_from(vocabulary).batch(step) for _ in range(2))
        assert torch.equal(one["pixels"], again["pixels"]) and torch.equal(one["pairs"], again["pairs"])
        for group, other in zip(one["groups"], again["groups"], strict=True):
            assert torch.equal(group["input_ids"], other["input_ids"])
    assert not torch.equal(one["pixels"], lessons_from(vocabulary).batch(4)["pixels"])


def test_each_picture_of_a_batch_is_in_some_dialogue_and_none_that_is_not_there(vocabulary):
    batch = lessons_from(vocabulary).batch(1)
    rows = torch.cat([group["picture_rows"] for group in batch["groups"]])
    assert set(rows.tolist()) == set(range(len(batch["pixels"])))
    for group in batch["groups"]:
        marks = (group["input_ids"] == vocabulary.unk_token_id).sum()
        assert marks == len(group["picture_rows"]) * model.NUM_QUERY_TOKENS


def test_while_the_eyes_learn_alone_there_are_no_dialogues(vocabulary):
    batch = lessons_from(vocabulary, vision_steps=3).batch(2)
    assert "groups" not in batch and batch["pixels"].dtype == torch.uint8


def test_the_words_of_the_fourth_lessons_begin_with_short_questions_about_one_of_several(vocabulary):
    batch = lessons.FourthLessons(vocabulary, 5, 4, 0, 2).batch(2)
    rows = torch.cat([group["picture_rows"] for group in batch["groups"]])
    assert sorted(rows.tolist()) == sorted([*range(4)] * lessons.ROWS_LOOKED_UP)
    assert (batch["pairs"].sum(1) >= 2).all()


def test_a_soft_prompt_is_asked_for_the_one_thing_that_is_there():
    table = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert examiner.only_one(table).tolist() == [1, 3, lessons.NONE, 2]


def test_the_backgrounds_colour_is_that_of_the_patches_without_a_subject():
    pixels = torch.full((1, 224, 224, 3), 51, dtype=torch.uint8)
    pixels[:, 14:28, 28:42] = 255  # the second row's third patch
    where = torch.zeros(1, 256, dtype=torch.long)
    where[0, 16 + 2] = 1
    assert torch.allclose(examiner.mean_outside(pixels, where), torch.tensor([[0.2, 0.2, 0.2]]))


def test_patches_are_asked_for_pairs_once_the_time_has_come(vocabulary):
    assert "patch_pairs" not in lessons_from(vocabulary).batch(lessons.PATCH_PAIRS_FROM - 1)
    batch = lessons_from(vocabulary).batch(lessons.PATCH_PAIRS_FROM)
    where, shapes, colours = batch["patch_labels"].unbind(1)
    pairs = batch["patch_pairs"]
    assert ((pairs == lessons.NONE) == (where == 0)).all()
    for pair, shape, colour in zip(pairs[where > 0], shapes[where > 0], colours[where > 0], strict=True):
        assert lessons.PAIRS[pair] == (COLOURS[colour], SHAPES[shape])


def test_patch_labels_name_what_is_drawn_there():
    picture = pictures.sample_picture(4, "mixed")
    labels = lessons.patch_labels(list(picture.subjects)).reshape(3, 16, 16)
    for each in picture.subjects:
        row, column = int(each.y // 14), int(each.x // 14)
        assert labels[0, row, column] == 2
        assert SHAPES[labels[1, row, column]] == each.shape and COLOURS[labels[2, row, column]] == each.colour
    assert (labels[1] == lessons.NONE).sum() == (labels[0] == 0).sum() > 128


def test_a_window_of_a_picture_has_only_the_subjects_that_it_shows():
    for number in range(20):
        picture = pictures.sample_picture(number, "small")
        for index, each in enumerate(picture.subjects):
            window = lessons.choose_window(picture, np.random.default_rng(number), index)
            shown = lessons.subjects_in(picture, window)
            (seen,) = [subject for subject in shown if subject.shape == each.shape]
            assert seen.radius == pytest.approx(each.radius * world.IMAGE_SIZE / window.side)
            assert 0 <= seen.x < world.IMAGE_SIZE and 0 <= seen.y < world.IMAGE_SIZE


def test_a_small_subject_is_never_shown_without_a_crop_around_it():
    views, generator = lessons.Views(), np.random.default_rng(0)
    for number in range(30):
        small = pictures.sample_picture(number, "small")
        for dialogue in lessons.about_detail(views, small, generator, None):
            whole, detail, *_ = dialogue.pictures
            assert views.windows[whole] == world.WHOLE and views.windows[detail].side < world.IMAGE_SIZE / 2
            assert dialogue.image_turns[0] == 0 and max(dialogue.image_turns) <= len(dialogue.history)
    assert "small" not in lessons.LESSONS


def test_what_was_read_stands_where_the_prompt_puts_it_and_does_not_choose_the_language():
    question = 'Text in the picture: "出口"\nWhat does it say?'
    dialogue = Dialogue("text", "en", (), question, 'It says "出口".', (0,), (0,))
    assert dialogue.prompt().startswith("<img>")
    assert f"Q:{question}\nA:" in dialogue.prompt()
    assert build_prompt(question, (), [0], True) in dialogue.prompt().replace("\ufffc" * 32, "\ufffc")


def test_most_readings_in_prompts_are_characters_at_random():
    picture = replace(pictures.sample_picture(0, "sign"), kind="sign")
    generator = np.random.default_rng(0)
    readings = [lessons.sample_reading(picture, generator) for _ in range(300)]
    assert 0.2 < np.mean([reading == picture.sign.word for reading in readings]) < 0.4
    assert len(set(readings)) > 200 and all(0 < len(reading) <= 17 for reading in readings)


def test_another_models_weights_are_taken_over_and_its_pieces_keep_their_rows(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "ice_text.model").write_bytes(tokenizer.build_model(world.all_texts()))
    old_vocabulary = ChatGLMTokenizer(str(old / "ice_text.model"))
    given = model.build_model(model.build_config(old_vocabulary), 1)
    given.save_pretrained(old)
    old_vocabulary.save_pretrained(old)
    new_vocabulary = write_tokenizer(tmp_path / "new")
    assert len(new_vocabulary) > len(old_vocabulary)
    taken = model.build_model(model.build_config(new_vocabulary), 2)
    before = taken.transformer.word_embeddings.weight.clone()
    model.take_over(taken, new_vocabulary, old)
    rows = taken.transformer.word_embeddings.weight
    for piece in ("<eop>", "[gMASK]", "\u2581red", "圆形", "<0x41>"):
        row, old_row = (each.convert_tokens_to_ids(piece) for each in (new_vocabulary, old_vocabulary))
        assert torch.equal(rows[row], given.transformer.word_embeddings.weight[old_row])
    added = new_vocabulary.convert_tokens_to_ids("\u2581sign")
    assert old_vocabulary.convert_tokens_to_ids("\u2581sign") == old_vocabulary.unk_token_id
    assert torch.equal(rows[added], before[added])
    for name, parameter in given.named_parameters():
        if "word_embeddings" not in name or "qformer" in name:
            assert torch.equal(parameter, dict(taken.named_parameters())[name])
