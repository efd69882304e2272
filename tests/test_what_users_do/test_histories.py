"""A conversation is a list: whatever is done with it, each picture stays with its turn, or leaves with it."""

import copy
import json
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visualglm_hf.chat import ChatHistory
from visualglm_hf.conversation import build_prompt
from visualglm_hf.history import AnsweredTurn, RememberedImage, images_of


GREEDY = {"do_sample": False, "min_length": 0, "repetition_penalty": 1.0, "max_new_tokens": 3}


# Any list operation, with a list of (pair, names of its pictures) beside it that does the same


def turn(pair, names):
    return AnsweredTurn(pair, [RememberedImage(name, torch.zeros(1, 1, 1)) for name in names])


def history_of(model) -> ChatHistory:
    return ChatHistory(turn(pair, names) if names else pair for pair, names in model)


def names_in(history) -> list:
    return [(pair, tuple(image.digest for image in images_of(pair))) for pair in history]


PAIR = st.tuples(st.sampled_from("qrs"), st.sampled_from("xyz"))
MODEL = st.lists(st.tuples(PAIR, st.lists(st.sampled_from("ABC"), max_size=2).map(tuple)), max_size=5)
BOUND = st.none() | st.integers(-6, 6)
SLICE = st.builds(slice, BOUND, BOUND, st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]))


def words(each) -> tuple[str, str]:
    """The pair of a turn, or of what stands for it in the list beside it."""
    return each[0] if isinstance(each[0], tuple) else tuple(each)


NEW_LISTS = {
    "[a:b:c]": lambda turns, other, part, number: turns[part],
    "+": lambda turns, other, part, number: turns + other,
    "list +": lambda turns, other, part, number: list(turns) + other,
    "*": lambda turns, other, part, number: turns * number,
    "* from the left": lambda turns, other, part, number: number * turns,
    "copy": lambda turns, other, part, number: turns.copy(),
    "copy.copy": lambda turns, other, part, number: copy.copy(turns),
    "deepcopy": lambda turns, other, part, number: copy.deepcopy(turns),
    "pickle": lambda turns, other, part, number: pickle.loads(pickle.dumps(turns)),
    "sum": lambda turns, other, part, number: sum([turns, other], []),
}
PLAIN_LISTS = {
    "list": lambda turns, other, part, number: list(turns),
    "reversed": lambda turns, other, part, number: list(reversed(turns)),
    "sorted": lambda turns, other, part, number: sorted(turns, key=words),
    "comprehension": lambda turns, other, part, number: [each for each in turns if "q" not in words(each)],
    "unpacking": lambda turns, other, part, number: [*turns, *other],
    "random.sample": lambda turns, other, part, number: random.Random(number).sample(turns, len(turns) // 2),
}
CHANGES = {
    "+=": lambda turns, other, part, number: turns.__iadd__(other),
    "*=": lambda turns, other, part, number: turns.__imul__(number),
    "extend": lambda turns, other, part, number: turns.extend(other),
    "append": lambda turns, other, part, number: turns.append(turns[number]),
    "insert": lambda turns, other, part, number: turns.insert(number, other[0]),
    "pop": lambda turns, other, part, number: turns.pop(),
    "pop(i)": lambda turns, other, part, number: turns.pop(number),
    "del [i]": lambda turns, other, part, number: turns.__delitem__(number),
    "del [a:b:c]": lambda turns, other, part, number: turns.__delitem__(part),
    "clear": lambda turns, other, part, number: turns.clear(),
    "reverse": lambda turns, other, part, number: turns.reverse(),
    "sort": lambda turns, other, part, number: turns.sort(key=words),
    "[i] =": lambda turns, other, part, number: turns.__setitem__(number, turns[0]),
    "[a:b] =": lambda turns, other, part, number: turns.__setitem__(slice(number, number), other),
    "swap": lambda turns, other, part, number: turns.__setitem__(slice(0, 2), turns[1::-1]),
}


def outcome(change, turns, *arguments):
    """What an operation returns or changes; None if it is impossible, for instance for an empty list."""
    try:
        returned = change(turns, *arguments)
    except IndexError:
        return None
    return returned if isinstance(returned, list) else turns


@pytest.mark.parametrize("name", [*NEW_LISTS, *PLAIN_LISTS, *CHANGES])
@given(model=MODEL, other=MODEL, part=SLICE, number=st.integers(-3, 3))
@settings(max_examples=25, deadline=None)
def test_each_picture_stays_with_its_turn_or_leaves_with_it(name, model, other, part, number):
    change = {**NEW_LISTS, **PLAIN_LISTS, **CHANGES}[name]
    history = history_of(model)
    found = outcome(change, history, history_of(other), part, number)
    expected = outcome(change, list(model), list(other), part, number)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert names_in(found) == expected
        assert isinstance(found, ChatHistory) or name in PLAIN_LISTS
    if name not in CHANGES:
        assert names_in(history) == model


def test_a_turn_is_removed_by_its_words():
    history = history_of([(("q", "x"), ("A",)), (("r", "y"), ("B",))])
    history.remove(("q", "x"))
    assert names_in(history) == [(("r", "y"), ("B",))]


@given(model=MODEL, part=SLICE)
@settings(deadline=None)
def test_an_edited_turn_keeps_its_pictures(model, part):
    history = history_of(model)
    history[part] = [(query, "other") for query, _ in history[part]]
    for index in range(*part.indices(len(model))):
        model[index] = ((model[index][0][0], "other"), model[index][1])
    assert names_in(history) == model
    for index in range(len(history)):
        history[index] = ["list", "too"]
    assert names_in(history) == [(("list", "too"), names) for _, names in model]


def test_fewer_turns_in_the_place_of_many_have_no_pictures_of_theirs():
    history = history_of([(("q", "x"), ("A",)), (("r", "y"), ("B",))])
    history[:2] = [("what was said", "in short")]
    assert names_in(history) == [(("what was said", "in short"), ())]


def test_a_history_is_compared_shown_and_written_as_the_plain_list():
    history = history_of([(("q", "x"), ("A",))])
    assert history == [("q", "x")] == history
    assert repr(history) == "[('q', 'x')]"
    assert json.loads(json.dumps(history)) == [["q", "x"]]
    assert hash(history[0]) == hash(("q", "x"))
    with pytest.raises(TypeError):
        "text" + history


# Conversations with a model


@pytest.fixture(scope="module")
def ask(model, tokenizer):
    def ask(*arguments, **options):
        return model.chat(tokenizer, *arguments, **options, **GREEDY)

    return ask


@pytest.fixture
def prompt_of(model, tokenizer):
    """The ids of the prompt that asks after a history, and the embeddings of the pictures in it, in order."""

    def prompt_of(history, picture=None, query="那么？"):
        asked = model.prepare_turn(tokenizer, picture, query, history)
        embeds = asked.inputs.get("image_embeds", torch.zeros(0))
        return asked.inputs["input_ids"][0].tolist(), embeds

    return prompt_of


@pytest.fixture(scope="module")
def held(ask, pictures) -> ChatHistory:
    """Two turns about a picture, then one about another."""
    _, history = ask(pictures[0], "这是什么？")
    _, history = ask("什么颜色？", history=history)
    _, history = ask(pictures[1], "这个呢？", history=history)
    assert [image.turn for image in history.images] == [0, 2]
    return history


CUTS = {
    "the last five": lambda history: (history[-5:], [0, 2]),
    "all but the last": lambda history: (history[:-1], [0]),
    "all but the first": lambda history: (history[1:], [1]),
    "the last": lambda history: (history[-1:], [0]),
    "every other": lambda history: (history[::2], [0, 1]),
    "backwards": lambda history: (history[::-1], [0, 2]),
    "copy": lambda history: (history.copy(), [0, 2]),
    "one more": lambda history: (history.__add__([("a", "b")]), [0, 2]),
    "one before": lambda history: ([("a", "b"), *history], [1, 3]),
    "twice": lambda history: (history * 2, [0, 2, 3, 5]),
    "joined": lambda history: (history[2:] + history[:2], [0, 1]),
    "plain": lambda history: ([tuple(turn) for turn in history], []),
    "JSON": lambda history: (json.loads(json.dumps(history)), []),
    "a generator": lambda history: ((turn for turn in history), [0, 2]),
}


@pytest.mark.parametrize("name", CUTS)
def test_the_prompt_shows_the_pictures_of_the_turns_that_are_left(name, model, tokenizer, held, prompt_of):
    turns, places = CUTS[name](held)
    turns = turns if name == "a generator" else list(turns)
    words = list(held) if name == "a generator" else turns
    ids, embeds = prompt_of(turns)
    prompt = build_prompt("那么？", [tuple(turn) for turn in words], places)
    assert ids == model.tokenize_prompt(tokenizer, prompt, len(places), None)["input_ids"][0].tolist()
    expected = [image.embeds for turn in words for image in images_of(turn)]
    assert torch.equal(embeds, torch.cat(expected)) if expected else not len(embeds)


def test_joined_conversations_show_the_pictures_of_both(ask, pictures):
    first, second = (ask(picture, "这是什么？")[1] for picture in pictures[:2])
    joined = first + second
    assert [image.turn for image in joined.images] == [0, 1]
    assert [image.digest for image in joined.images] == [first.images[0].digest, second.images[0].digest]
    _, longer = ask("那么？", history=joined)
    assert longer[:2].images == joined.images


def test_an_edited_answer_is_asked_about_with_its_picture(ask, pictures, prompt_of):
    _, history = ask(pictures[0], "这是什么？")
    history[-1] = ("这是什么？", "一只猫。")
    assert len(prompt_of(history)[1]) == 1


def test_the_picture_shown_last_is_not_shown_again(held, pictures, prompt_of):
    assert prompt_of(held, pictures[1])[0] == prompt_of(held)[0]


def test_a_picture_given_again_after_another_is_shown_again_and_not_encoded_again(
    model, held, pictures, prompt_of, monkeypatch
):
    def encode(pixel_values, **kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr(model, "encode_pictures", encode)
    _, embeds = prompt_of(held, pictures[0])
    assert torch.equal(embeds, torch.cat([held.images[index].embeds for index in (0, 1, 0)]))


def test_a_picture_whose_turn_was_dropped_is_a_new_one(held, pictures, prompt_of):
    ids, embeds = prompt_of(held[1:2], pictures[0])
    assert torch.allclose(embeds, held.images[0].embeds, atol=1e-5)
    assert ids.index(0) > 10  # it stands before the question


def test_a_picture_given_after_words_belongs_to_its_own_turn(ask, pictures):
    _, history = ask(None, "你好")
    _, history = ask(pictures[0], "这是什么？", history=history)
    assert [image.turn for image in history.images] == [1]
    assert len(history[1:].images) == 1


def test_with_a_plain_list_the_picture_stands_in_front_as_in_the_original(ask, pictures, prompt_of):
    plain = [["你好", "你好！"], ["好", "好。"]]
    _, history = ask(pictures[0], "这是什么？", history=plain)
    assert [image.turn for image in history.images] == [0]
    assert plain == [["你好", "你好！"], ["好", "好。"]]
    assert history[:2] == [("你好", "你好！"), ("好", "好。")]


def test_several_pictures_are_asked_about_at_once(model, processor, ask, pictures):
    answer, history = ask([pictures[0], pictures[1]], "哪个更大？")
    assert [image.turn for image in history.images] == [0, 0]
    inputs = processor(text=build_prompt("哪个更大？", image_turns=[0, 0]), images=pictures[:2], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :]) == [answer]
    assert ask([], "你好")[0] == ask(None, "你好")[0]
    _, history = ask((pictures[1], pictures[2]), "这些呢？", history=history)
    assert [image.turn for image in history.images] == [0, 0, 1]  # the second was shown last


def test_a_stream_that_is_stopped_leaves_a_history_with_its_picture(model, tokenizer, pictures):
    stream = model.stream_chat(tokenizer, pictures[0], "这是什么？", **{**GREEDY, "max_new_tokens": 30})
    _, history = next(stream)
    stream.close()
    assert [image.turn for image in history.images] == [0]


def test_pictures_that_another_model_encoded_are_refused(model, tokenizer):
    history = ChatHistory([turn(("a", "b"), "A")])
    with pytest.raises(ValueError, match=r"history\[0\] was encoded by another model.*\(1, 1, 1\).*the picture again"):
        model.chat(tokenizer, "c", history=history)


@pytest.mark.parametrize("history", [np.array([["a", "b"], ["c", "d"]]), {"a": "b"}, "ab", 3, iter(["ab"])])
def test_what_is_no_history_is_refused_in_words(model, tokenizer, history):
    with pytest.raises(ValueError, match=r"history(\[0\])? must be a"):
        model.chat(tokenizer, "c", history=history)


@pytest.mark.parametrize("bad", ["x" * 10**6, ["x" * 10**6] * 1000, {"bytes": b"x" * 10**6}, 3])
def test_a_bad_turn_is_named_in_a_line(model, tokenizer, bad):
    with pytest.raises(ValueError, match=r"history\[1\]") as caught:
        model.chat(tokenizer, None, "c", history=[("a", "b"), bad])
    assert len(str(caught.value)) < 1000
