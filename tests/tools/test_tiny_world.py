"""The tiny world and its vocabulary: properties that its "exact match" and the shape of the tokenizer rest on."""

import numpy as np
import pytest

from tools.tiny import tokenizer as tiny_tokenizer
from tools.tiny import world as tiny_world
from visualglm_hf.conversation import END_MARK, build_prompt, clean_response
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer


NUM_SCENES = 300


@pytest.fixture(scope="module")
def world():
    return tiny_world


@pytest.fixture(scope="module")
def vocabulary():
    return tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(vocabulary, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "ice_text.model"
    vocabulary.write_model(path)
    return ChatGLMTokenizer(str(path))


def combination(scene):
    return (scene.shape, scene.colour, scene.background)


def test_every_question_about_a_scene_has_one_answer(world):
    for number in range(NUM_SCENES):
        scene = world.sample_scene(number)
        for language in world.LANGUAGES:
            answers = {}
            for each in [*world.exchanges(scene, language), *world.small_talk(language)]:
                assert answers.setdefault(each.question, each.answer) == each.answer


def test_a_question_without_a_picture_has_one_answer(world):
    for language in world.LANGUAGES:
        exchanges = [*world.small_talk(language), *world.blind_exchanges(language)]
        assert len({each.question for each in exchanges}) == len(exchanges)


def test_held_out_combinations_never_appear_in_training(world):
    seen = {combination(world.sample_scene(number)) for number in range(NUM_SCENES)}
    assert not seen & set(world.HELD_OUT_COMBINATIONS)
    assert not set(world.TRAINING_COMBINATIONS) & set(world.HELD_OUT_COMBINATIONS)


def test_held_out_pictures_are_of_held_out_combinations_only(world):
    drawn = {combination(world.sample_scene(number, "new combinations")) for number in range(NUM_SCENES)}
    assert drawn <= set(world.HELD_OUT_COMBINATIONS)


def test_training_shows_each_pair_of_properties_that_is_held_out(world):
    for first, second in ((0, 1), (0, 2), (1, 2)):
        held_out = {(each[first], each[second]) for each in world.HELD_OUT_COMBINATIONS}
        assert held_out <= {(each[first], each[second]) for each in world.TRAINING_COMBINATIONS}


def test_the_splits_share_no_scene(world):
    for number in range(50):
        assert world.sample_scene(number, "training") != world.sample_scene(number, "new pictures")


def test_an_unknown_split_is_refused(world):
    with pytest.raises(ValueError, match="no split 'test'.*new pictures"):
        world.sample_scene(0, "test")


def test_the_same_seed_draws_the_same_picture(world):
    for number in range(5):
        first, second = (np.asarray(world.draw(world.sample_scene(number))) for _ in range(2))
        assert first.shape == (world.IMAGE_SIZE, world.IMAGE_SIZE, 3)
        assert np.array_equal(first, second)


def test_different_seeds_draw_different_pictures(world):
    pictures = {world.draw(world.sample_scene(number)).tobytes() for number in range(50)}
    assert len(pictures) == 50


def test_objects_do_not_overlap(world):
    for number in range(NUM_SCENES):
        objects = np.array(world.sample_scene(number).objects)
        for index, (x, y, radius) in enumerate(objects):
            for other_x, other_y, other_radius in objects[:index]:
                assert np.hypot(x - other_x, y - other_y) > radius + other_radius


def test_the_layout_of_the_vocabulary_is_the_original_one(vocabulary, world):
    model = vocabulary.build_model(world.all_texts())
    pieces = [dict(vocabulary.fields(value)) for number, value in vocabulary.fields(model) if number == 1]
    names = tuple(piece[1].decode() for piece in pieces)
    types = tuple(piece.get(3, vocabulary.NORMAL) for piece in pieces)
    assert names[:6] == ("<unk>", "<s>", "</s>", "<pad>", "<n>", "\u2581")
    assert types[:6] == (
        vocabulary.UNKNOWN,
        *[vocabulary.CONTROL] * 3,
        vocabulary.USER_DEFINED,
        vocabulary.NORMAL,
    )
    ordinary = names.index("[MASK]") - 5
    assert set(types[5 : 5 + ordinary]) == {vocabulary.NORMAL}
    specials = names[5 + ordinary :]
    assert specials[:8] == ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    assert specials[8:88] == ("<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
    assert specials[88:] == tuple(f"<0x{byte:02X}>" for byte in range(256))
    assert types[-344:] == (*[vocabulary.CONTROL] * 8, *[vocabulary.USER_DEFINED] * 80, *[vocabulary.BYTE] * 256)


def test_the_vocabulary_is_built_byte_for_byte_the_same(vocabulary, world):
    assert vocabulary.build_model(world.all_texts()) == vocabulary.build_model(world.all_texts())


def test_a_protobuf_message_is_read_as_it_was_written(vocabulary):
    written = [(1, 0), (2, 127), (3, 128), (40, 2**40), (5, -2.5), (6, "圆形".encode())]
    message = b"".join(vocabulary.field(number, value) for number, value in written)
    assert list(vocabulary.fields(message)) == written


def test_every_text_of_the_world_is_made_of_ordinary_pieces(tokenizer, world):
    byte_ids = range(len(tokenizer) - 256, len(tokenizer))
    for text in world.all_texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert not set(ids) & set(byte_ids), text


def test_every_text_of_the_world_survives_encoding_and_decoding(tokenizer, world):
    for text in world.all_texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert clean_response(tokenizer.decode(ids)) == text


def test_a_whole_dialogue_has_the_marks_of_the_prompt_as_special_tokens(tokenizer):
    text = (
        build_prompt("有几个？", [("描述这张图片。", "图片中有两个红色的圆形，背景是草地。")], [0])
        + "两个。"
        + END_MARK
    )
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert ids.count(tokenizer.unk_token_id) == 1  # the picture
    assert ids.count(tokenizer.gmask_token_id) == ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
