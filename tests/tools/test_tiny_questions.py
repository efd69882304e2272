"""What is asked about the harder pictures: one right answer each, as many to be answered with yes as with no."""

from collections import Counter

import numpy as np
import pytest

from tools.tiny import pictures, questions, tokenizer, world
from visualglm_hf.conversation import clean_response
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer


KINDS = (*questions.SIMPLE_KINDS, *questions.HARD_KINDS)
LANGUAGES = world.LANGUAGES


def sample(kind, count=60):
    return [pictures.sample_picture(number, kind, "new") for number in range(count)]


def asked_of(picture, language, rounds=6):
    for seed in range(rounds):
        generator = np.random.default_rng(seed)
        for kind in KINDS:
            if questions.can_ask(picture, kind):
                yield questions.ask(picture, kind, language, generator)


@pytest.mark.parametrize("kind", pictures.KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_question_about_a_picture_has_one_answer(kind, language):
    for picture in sample(kind, 25):
        answers = {}
        for each in [*asked_of(picture, language), *world.small_talk(language)]:
            assert answers.setdefault(each.question, each.answer) == each.answer


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_answer_names_the_colour_of_the_one_that_is_asked_about(language):
    for picture in sample("mixed"):
        generator = np.random.default_rng(0)
        for _ in range(4):
            exchange = questions.ask(picture, "colour of", language, generator)
            named = [
                each for each in picture.subjects if world.SHAPES[each.shape][language == "en"] in exchange.question
            ]
            (subject,) = named
            assert questions.name_of(world.COLOURS, subject.colour, language) in exchange.answer.lower()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_caption_names_each_subject_with_its_colour_and_the_background(language):
    for kind in ("mixed", "small", "contradicting"):
        for picture in sample(kind, 30):
            caption = questions.describe(picture, language).lower()
            for each in picture.subjects:
                assert questions.pair_name(each.colour, each.shape, language) in caption
            assert world.BACKGROUNDS[picture.background][0 if language == "zh" else 3] in caption


@pytest.mark.parametrize("strategy", questions.STRATEGIES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_popes_questions_are_balanced_and_what_is_absent_is_absent(strategy, language):
    for picture in sample("mixed"):
        exchanges = questions.ask_as_pope(picture, language, strategy, np.random.default_rng(1))
        yes, no = questions.YES_NO[language][0]
        assert Counter(each.answer for each in exchanges) == {yes: 2, no: 2}
        shapes = {each.shape for each in picture.subjects}
        pairs = {questions.pair_name(each.colour, each.shape, language) for each in picture.subjects}
        for each in exchanges[:2]:
            named = {shape for shape, names in world.SHAPES.items() if names[language == "en"] in each.question}
            assert (each.answer == yes) == (named <= shapes)
        for each in exchanges[2:]:
            assert (each.answer == yes) == any(pair in each.question for pair in pairs)


def test_an_adversarial_object_keeps_the_company_that_training_showed_most():
    for picture in sample("mixed"):
        chosen = questions.absent_shape(picture, "adversarial", np.random.default_rng(0))
        present = [each.shape for each in picture.subjects]
        weight = sum(questions.company(chosen, other) for other in present)
        absent = set(world.SHAPES) - set(present)
        assert chosen in absent
        assert weight == max(sum(questions.company(shape, other) for other in present) for shape in absent)


def test_an_adversarial_pair_swaps_the_attributes_of_what_is_there():
    for picture in sample("mixed"):
        colour, shape = questions.absent_pair(picture, "adversarial", np.random.default_rng(0))
        assert colour in {each.colour for each in picture.subjects}
        assert shape in {each.shape for each in picture.subjects}
        assert (colour, shape) not in {(each.colour, each.shape) for each in picture.subjects}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_word_is_answered_only_from_what_was_read(language):
    generator = np.random.default_rng(0)
    for picture in sample("sign", 20):
        assert questions.ask_text(picture, language, generator).answer == questions.UNREADABLE[language]
        assert picture.sign.word in questions.ask_text(picture, language, generator, picture.sign.word).answer
    assert questions.ask_text(sample("mixed", 1)[0], language, generator).answer == questions.NO_TEXT[language]


def test_the_scenes_of_today_are_asked_as_before():
    for number in range(40):
        scene = world.sample_scene(number, "new pictures")
        picture = pictures.from_scene(scene)
        for language in LANGUAGES:
            for kind in questions.SIMPLE_KINDS:
                assert questions.answer(picture, kind, language) == world.answer(scene, kind, language)


def test_a_question_without_an_answer_is_refused():
    picture = next(each for each in sample("mixed", 60) if each.sides is None)
    with pytest.raises(ValueError, match="no answer of kind 'place of'"):
        questions.ask(picture, "place of", "en", np.random.default_rng(0))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_new_question_without_a_picture_asks_for_one(language):
    generator = np.random.default_rng(0)
    for _ in range(80):
        exchange = questions.ask_blindly(language, generator)
        assert exchange.answer == world.NO_PICTURE[language] and "{" not in exchange.question


def test_every_question_and_answer_is_made_of_ordinary_pieces_and_survives_decoding(tmp_path):
    path = tmp_path / "ice_text.model"
    tokenizer.write_model(path)
    vocabulary = ChatGLMTokenizer(str(path))
    byte_ids = set(range(len(vocabulary) - 256, len(vocabulary)))
    for kind in pictures.KINDS:
        for picture in sample(kind, 12):
            for language in LANGUAGES:
                for each in asked_of(picture, language, 3):
                    for text in (each.question, each.answer):
                        ids = vocabulary(text, add_special_tokens=False)["input_ids"]
                        assert vocabulary.unk_token_id not in ids and not set(ids) & byte_ids, text
                        assert clean_response(vocabulary.decode(ids)) == text
