"""Rows of every layout: the same conversation is the same example, and what is wrong is said, whatever the layout."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.training_rows import LAYOUTS, said, turn
from visualglm_tools.training.dataset import digest_picture, read_dataset
from visualglm_tools.training.encoding import Encoder
from visualglm_tools.training.layouts import CAPTION_QUESTIONS


QUESTION = "这是什么？"
LONGEST_ERROR = 1000  # characters, of one row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, color in (("a.png", (200, 30, 30)), ("b.png", (30, 30, 200))):
        Image.new("RGB", (8, 8), color).save(folder / name)
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-300])
    return folder


@pytest.fixture(scope="module")
def read(folder):
    def read(rows, convert=lambda conversation: conversation, **options):
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        return read_dataset([folder / "rows.json"], convert, **options)

    return read


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor, 512, 64, 2048)


def what_is_learned(example):
    return example.input_ids, example.labels, [digest_picture(picture) for picture in example.pictures]


# ---------------------------------------------------------------- the same in all


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_the_same_example_in_every_layout(layout, read, encoder):
    write = LAYOUTS[layout]
    [[one], [same]] = read(
        [LAYOUTS["the original's"](QUESTION, "海。", "a.png"), write(QUESTION, "海。", "a.png")], encoder
    )
    assert what_is_learned(one) == what_is_learned(same)
    assert len(one.pictures) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_a_picture_may_be_text_in_every_layout(layout, prefix, read, encoder, folder):
    text = prefix + base64.b64encode((folder / "a.png").read_bytes()).decode()
    [[example]] = read([LAYOUTS[layout](QUESTION, "海。", text)], encoder)
    [[same]] = read([LAYOUTS[layout](QUESTION, "海。", "a.png")], encoder)
    assert (example.input_ids, example.labels) == (same.input_ids, same.labels)


TEXTS = st.sampled_from([QUESTION, "What is it?", "海。", "a < b\nc", "3", "x" * 50, "{'from': 'gpt'}"])
PICTURES = st.lists(st.sampled_from(["a.png", "b.png"]), max_size=2)
TURNS = st.lists(st.tuples(TEXTS, PICTURES, TEXTS), min_size=1, max_size=3)


def in_messages(system, turns, content_of, make=turn, roles=("system", "user", "assistant")):
    """Messages of turns of a question, its pictures and an answer."""
    messages = [make(roles[0], system)] if system else []
    for question, pictures, answer in turns:
        messages += [make(roles[1], content_of(question, pictures)), make(roles[2], answer)]
    return messages


def with_marks(question, pictures):
    return "<image>" * len(pictures) + question


def with_parts(question, pictures):
    return [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]


def with_names(question, pictures):
    return [
        *({"type": "image_url", "image_url": {"url": name}} for name in pictures),
        {"type": "text", "text": question},
    ]


def all_rows_of(system, turns):
    """A conversation in all layouts that can hold it."""
    names = [name for _, pictures, _ in turns for name in pictures]
    speakers = ("system", "human", "gpt")
    marked, parts = in_messages(system, turns, with_marks), in_messages(system, turns, with_parts)
    rows = [
        {"messages": marked, "images": names},
        {"messages": parts, "images": names},
        {"messages": in_messages(system, turns, with_names)},
        {"conversations": in_messages(system, turns, with_marks, said, speakers), "images": names},
        {"conversations": in_messages(None, turns, with_marks, said, speakers), "system": system, "images": names},
        {"conversations": marked, "image": names},
        {"prompt": marked[:-1], "completion": marked[-1:], "images": names},
        {"prompt": parts[:-1], "completion": marked[-1]["content"], "images": names},
    ]
    if len(turns) == 1 and not system:
        [(question, pictures, answer)] = turns
        rows.append({"prompt": question, "completion": answer, "images": names})
        rows.append({"question": question, "answer": answer, "images": names})
        if len(pictures) < 2:
            rows.append({"img": "".join(pictures), "prompt": question, "label": answer})
    return rows


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([None, "简短地回答。"]), TURNS)
def test_any_conversation_is_the_same_examples_in_every_layout(read, encoder, system, turns):
    first, *others = read(all_rows_of(system, turns), encoder)
    assert len(first) == len(turns)
    for other in others:
        assert list(map(what_is_learned, other)) == list(map(what_is_learned, first))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_need_no_answers_may_end_with_a_question_in_every_layout(layout, read, encoder):
    rows = [LAYOUTS[layout](QUESTION, answer, "a.png") for answer in (None, "海。")]
    [[asked], [answered]] = read(rows, encoder, needs_answers=False)
    assert asked.prompt_ids == answered.prompt_ids
    assert not asked.conversation.is_answered and answered.conversation.is_answered


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize("field", ["text", "caption"])
@pytest.mark.parametrize("picture", ["file_name", "image"])
@pytest.mark.parametrize(("caption", "question"), [*zip(("一片海。", "A sea."), CAPTION_QUESTIONS, strict=True)])
def test_a_caption_answers_a_question_in_its_language(field, picture, caption, question, read, encoder):
    rows = [{picture: "a.png", field: caption}, LAYOUTS["the original's"](question, caption, "a.png")]
    [[one], [same]] = read(rows, encoder)
    assert what_is_learned(one) == what_is_learned(same)


def test_a_picture_without_a_caption_may_be_asked_for_one(read):
    [conversation] = read([{"file_name": "a.png"}], needs_answers=False)
    assert conversation.question == CAPTION_QUESTIONS[0] and not conversation.is_answered


# ---------------------------------------------------------------- what is wrong


BAD = {  # a question, an answer and a picture; what is said
    "no answer": ((QUESTION, None, "a.png"), "is missing|the assistant must have the last word"),
    "a blank answer": ((QUESTION, " ", "a.png"), "is empty"),
    "a blank question": (("\u3000", "海。", "a.png"), "is empty"),
    "an answer that is a number": ((QUESTION, 3, "a.png"), "must be a (string|list of messages)"),
    "a picture that is not there": ((QUESTION, "海。", "gone.png"), "there is no picture 'gone.png'"),
    "a picture at an address": ((QUESTION, "海。", "https://example.org/a.png"), "pictures must be files; save"),
    "a picture that is a number": ((QUESTION, "海。", 3), "given as file names|name of a picture"),
    "an object for a picture": ((QUESTION, "海。", {"name": "a.png"}), "given as file names|name of a picture"),
    "half a picture": ((QUESTION, "海。", "half.jpg"), "half.jpg"),
    "a mark of the prompt": (("x\ufff9", "海。", "a.png"), "reserved for the prompt|reserved character"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said_in_every_layout(layout, kind, read, encoder):
    values, message = BAD[kind]
    rows = [LAYOUTS[layout](QUESTION, "海。", "a.png"), LAYOUTS[layout](*values)]
    with pytest.raises(ValueError, match=rf"^1 bad row(.|\n)*rows.json, row 2: .*({message})") as caught:
        read(rows, encoder)
    assert len(str(caught.value)) < LONGEST_ERROR


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_field_that_means_nothing_is_named_in_every_layout(layout, read):
    with pytest.raises(ValueError, match="row 1: unknown field.* 'lable'; as a row of "):
        read([LAYOUTS[layout](QUESTION, "海。", "a.png") | {"lable": "x"}])


ODD = {
    "a speaker that nobody knows": {"conversations": [said("bot", "x"), said("gpt", "y")]},
    "an answer first": {"conversations": [said("gpt", "x"), said("human", "y")]},
    "no turns": {"conversations": []},
    "a turn that is a text": {"conversations": ["x", "y"]},
    "a mark without a picture": {"conversations": [said("human", "<image>\nx"), said("gpt", "y")]},
    "two marks for a picture": {
        "conversations": [said("human", "<image><image>x"), said("gpt", "y")],
        "image": "a.png",
    },
    "two fields of pictures": {"question": "x", "answer": "y", "image": "a.png", "images": ["a.png"]},
    "an image_url of something else": {
        "messages": [turn("user", [{"type": "image_url", "image_url": {"link": "a.png"}}]), turn("assistant", "y")]
    },
    "a caption without its picture": {"text": "a sea"},
    "two captions": {"image": "a.png", "text": "a sea", "caption": "a lake"},
    "a prompt without a completion": {"prompt": [turn("user", "x")]},
    "a completion without a prompt": {"completion": "x"},
    "a completion that asks": {"prompt": "x", "completion": [turn("user", "y")]},
    "an answer that shows a picture": {
        "prompt": "x",
        "completion": [turn("assistant", [{"type": "image", "path": "a.png"}, {"type": "text", "text": "y"}])],
    },
}
MESSAGES = {
    "a speaker that nobody knows": "must have a value and be from one of",
    "an answer first": "must alternate",
    "no turns": "must be a list of messages",
    "a turn that is a text": r"conversations\[0\] must have",
    "a mark without a picture": "mentions a picture, <image>, and the row has none",
    "two marks for a picture": r"images has 1 picture\(s\), the messages mention 2",
    "two fields of pictures": "in one field, found images and image",
    "an image_url of something else": "given as file names",
    "a caption without its picture": "a caption needs its picture",
    "two captions": "found 'caption' and 'text'",
    "a prompt without a completion": "'completion' is missing",
    "a completion without a prompt": "'prompt' is missing",
    "a completion that asks": "must alternate",
    "an answer that shows a picture": "only the user can show pictures",
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_row_of_a_layout_is_named_in_a_short_error(kind, read):
    with pytest.raises(ValueError, match=f"row 1: .*{MESSAGES[kind]}") as caught:
        read([ODD[kind]])
    assert len(str(caught.value)) < LONGEST_ERROR


# ---------------------------------------------------------------- what is said


def test_a_run_says_what_it_takes_each_file_for(read):
    lines = []
    read([LAYOUTS["the original's"]("x", "y", "a.png")] * 2, say=lines.append)
    read([LAYOUTS["LLaVA's"]("x", "y", "a.png"), {"prompt": "x", "label": "y"}], say=lines.append)
    read([{"prompt": "x", "label": "y"}], say=lines.append)
    assert lines == [
        "rows.json: 2 rows, the original's layout.",
        "rows.json: 2 rows, conversations (1), the original's layout (1).",
        "rows.json: 1 row, the original's layout; none shows a picture.",
    ]
