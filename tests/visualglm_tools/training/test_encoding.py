"""Long conversations lose their oldest turns, and only as many as they must; contradicting rows are named.

Prompts, labels and what is cut of one turn are in the tests of the dataset, with the original's figures.
"""

import json

import pytest
from PIL import Image

from tests.training_rows import turn
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import (
    Collator,
    Encoder,
    describe_contradictions,
    describe_lengths,
    describe_truncation,
)


TURNS = [("海" * 40, answer) for answer in "甲乙丙丁"]  # of the same length
ENOUGH = 1000  # tokens of a source


@pytest.fixture
def read(tmp_path):
    for name, color in (("a.png", (200, 30, 30)), ("b.png", (30, 30, 200))):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)

    def read(rows, encoder):
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        return [example for row in read_dataset([tmp_path / "rows.json"], encoder) for example in row]

    return read


def talk(turns, system=None, images=()):
    messages = [turn("system", system)] if system else []
    for question, answer in turns:
        messages += [turn("user", question), turn("assistant", answer)]
    return {"messages": messages, "images": list(images)}


@pytest.fixture
def encoder_of(processor):
    return lambda source_length: Encoder(processor, source_length, 64, 2048)


@pytest.mark.parametrize("system", [None, "简短。"])
@pytest.mark.parametrize("left", [4, 3, 2, 1])
def test_as_many_of_the_oldest_turns_are_left_out_as_must_be(left, system, read, encoder_of):
    recent = read([talk(TURNS[-left:], system)], encoder_of(ENOUGH))[-1]
    for room in (0, 20):
        example = read([talk(TURNS, system)], encoder_of(recent.source_length + room))[-1]
        assert (example.input_ids, example.labels) == (recent.input_ids, recent.labels)
        assert example.left_out == 2 * (4 - left) and not example.is_cut
    shorter = read([talk(TURNS, system)], encoder_of(recent.source_length - 1))[-1]
    assert shorter.left_out > example.left_out or shorter.is_cut


def test_the_system_message_goes_before_the_question_does(read, encoder_of):
    alone = read([talk(TURNS[-1:])], encoder_of(ENOUGH))[-1]
    example = read([talk(TURNS[-2:], "系" * 50)], encoder_of(alone.source_length))[-1]
    assert example.input_ids == alone.input_ids
    assert example.left_out == 3 and not example.is_cut


@pytest.mark.parametrize("turns", [1, 3])
def test_a_last_question_that_is_too_long_loses_its_end_as_the_originals_did(turns, read, encoder_of):
    row = talk([*TURNS[: turns - 1], ("x" * 500, "y")])
    example = read([row], encoder_of(20))[-1]
    whole = read([talk([("x" * 500, "y")])], encoder_of(ENOUGH))[-1]
    assert example.is_cut and example.left_out == 2 * (turns - 1)
    assert example.prompt_ids[:19] == whole.prompt_ids[:19] and len(example.prompt_ids) == 21


def test_pictures_go_with_their_turns(read, encoder_of, processor):
    row = talk([("<image>一", "甲"), ("<image>二", "乙"), ("三", "丙")], images=["a.png", "b.png"])
    recent = talk([("<image>二", "乙"), ("三", "丙")], images=["b.png"])
    encoder = encoder_of(max(example.source_length for example in read([recent], encoder_of(ENOUGH))))
    first, second, third = read([row], encoder)
    assert [[picture.name for picture in each.pictures] for each in (first, second, third)] == [
        ["a.png"],
        ["b.png"],
        ["b.png"],
    ]
    assert (second.left_out, third.left_out) == (2, 2)
    assert len(Collator(processor)([first, second, third])["pixel_values"]) == 3
    same = read([recent], encoder)
    assert [each.input_ids for each in same] == [second.input_ids, third.input_ids]


def test_what_is_left_out_is_counted_and_the_advice_leaves_nothing_out(read, encoder_of, processor):
    rows = [talk([("<image>一", "甲"), TURNS[1]], images=["a.png"]), talk(TURNS)]
    whole = read(rows, encoder_of(ENOUGH))
    encoder = encoder_of(max(read([talk(TURNS[:1])], encoder_of(ENOUGH))[0].source_length, whole[0].source_length))
    advice = describe_truncation(read(rows, encoder), encoder)
    assert advice.startswith(
        "4 example(s) lose the oldest turns of their conversations, 14 messages in all with 1 picture(s); 1 of them "
        "have no picture left to answer by; none would with --max_source_length "
    )
    longest = max(example.source_length for example in whole)
    assert advice.endswith(f"; none would with --max_source_length {longest}.")
    assert describe_truncation(read(rows, encoder_of(longest)), encoder_of(longest)) is None


@pytest.mark.parametrize(
    ("source", "target", "room", "advice"),
    [
        (150, 10, 400, "--max_source_length 150"),
        (80, 90, 400, "--max_target_length 90"),
        (150, 90, 400, "--max_source_length 150 --max_target_length 90"),
        (150, 10, 200, "--max_source_length 150 --max_target_length 10"),  # 64 more would be too many
        (80, 90, 180, "--max_source_length 80 --max_target_length 90"),
    ],
)
def test_the_advice_names_the_lengths_that_must_change(source, target, room, advice, processor):
    assert describe_lengths(source, target, Encoder(processor, 100, 64, room)) == advice


# ---------------------------------------------------------------- contradictions


def row_of(picture, question, answer):
    return {"img": picture, "prompt": question, "label": answer}


def test_rows_with_different_answers_to_the_same_question_are_named(read, encoder_of, tmp_path):
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = [
        row_of("a.png", "x", "one"),
        row_of("b.png", "x", "two"),
        row_of("a.png", "y", "two"),
        row_of("a.png", "x", "one"),
        row_of("copy.png", "x", "three"),
    ]
    assert describe_contradictions(read(rows[:4], encoder_of(64))) is None
    assert describe_contradictions(read(rows, encoder_of(64))) == (
        "1 question(s) about the same picture have different answers, of which at most one can be learned: "
        "rows.json, row 1, rows.json, row 5."
    )


def test_the_same_words_may_be_answered_in_several_ways(read, encoder_of):
    rows = [{"prompt": "你好", "label": label} for label in ("你好！", "您好。")]
    assert describe_contradictions(read(rows, encoder_of(64))) is None


def test_of_many_contradictions_some_are_named(read, encoder_of):
    rows = [row_of("a.png", f"x{number}", answer) for number in range(12) for answer in "ab"]
    line = describe_contradictions(read(rows, encoder_of(64)))
    assert line.startswith("12 question(s)") and line.endswith("; and 2 more.") and "row 20" in line
