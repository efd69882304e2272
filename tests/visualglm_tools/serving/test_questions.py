"""Rows that are whole conversations, and in which order rows are asked."""

import base64
import random
from pathlib import Path

import pytest
import torch

from tests.json_lines import read_lines, write_lines
from tests.paths import CIRCLES, PICTURES
from tests.serving_helpers import CAPTION
from visualglm_tools.commands.batch import Options
from visualglm_tools.options import from_values
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.questions import Asking, Pictures, Row, by_length, read_rows
from visualglm_tools.serving.runs import asking_of


SYSTEM = {"role": "system", "content": "请用中文回答。"}
DESCRIBE = {"type": "text", "text": "描述这张图片。"}
NEXT = {"role": "user", "content": "这张图片的背景里有什么内容？"}
URI = "data:image/png;base64," + base64.b64encode(CIRCLES.read_bytes()).decode()
EXACT = ("--repetition-penalty", "1")  # what the tiny model has learned


def asked(picture: dict, *, after: tuple[dict, ...] = ()) -> list[dict]:
    """A conversation that begins with the question for what is in a picture."""
    return [{"role": "user", "content": [picture, DESCRIBE]}, *after]


def test_a_conversation_has_the_answer_that_the_engine_gives_it(batch_door, engine):
    shown = asked(
        {"type": "image_url", "image_url": {"url": URI}}, after=({"role": "assistant", "content": CAPTION}, NEXT)
    )
    source = write_lines("in.jsonl", {"id": 1, "messages": [SYSTEM, *shown]}, {"id": 2, "messages": [NEXT]})
    assert batch_door(source, "out.jsonl", *EXACT)[0] == 0
    with_picture = [SYSTEM, *asked({"type": "image", "image": CIRCLES.read_bytes()}, after=tuple(shown[1:]))]
    settings = Settings(temperature=0, repetition_penalty=1)
    expected = [engine.submit(engine.prepare(each), settings).result().text for each in (with_picture, [NEXT])]
    assert "草地" in expected[0]
    rows = read_lines("out.jsonl")
    assert [row["answer"] for row in rows] == expected
    assert rows[0]["messages"] == [SYSTEM, *shown]  # as it was


@pytest.mark.parametrize(
    "row",
    [
        {"messages": asked({"type": "image_url", "image_url": URI})},
        {"messages": asked({"type": "image_url", "image_url": {"url": str(CIRCLES), "detail": "low"}})},
        {"messages": asked({"type": "image", "path": "here.png"})},
        {"messages": asked({"type": "image"}), "image": "here.png"},
        {"messages": [{"role": "user", "content": f"<image>{DESCRIBE['text']}"}], "images": ["here.png"]},
        {"messages": [{"role": "user", "content": DESCRIBE["text"]}], "images": ["here.png"]},
        {"messages": asked({"type": "image", "path": "here.png", "url": None}), "text": None, "image": None},
        {"text": DESCRIBE["text"], "images": ["here.png"]},
    ],
    ids=["address", "named address", "path", "place", "mark", "nowhere", "nulls", "text"],
)
def test_a_picture_may_be_named_in_its_message_or_in_the_row(row, engine, tmp_path):
    (tmp_path / "here.png").write_bytes(CIRCLES.read_bytes())
    [found], [] = read_rows(write_lines(tmp_path / "in.jsonl", {"id": 1, **row}))
    asking = Asking(Settings(temperature=0, repetition_penalty=1))
    prompt = asking.prompt(found, Pictures(tmp_path, False), engine)
    assert engine.submit(prompt, asking.settings).result().text == CAPTION


def test_pictures_of_a_conversation_are_shown_in_their_order(engine):
    messages = [{"role": "user", "content": "a <image> b <image>"}, {"role": "assistant", "content": "c"}]
    images = [{"type": "image", "path": str(PICTURES[2])}, {"type": "text", "text": "d"}]
    row = Row(1, {"messages": [*messages, {"role": "user", "content": images}], "images": list(map(str, PICTURES[:2]))})
    prompt = Asking(Settings()).prompt(row, Pictures(Path(), False), engine)
    alone = [
        Asking(Settings()).prompt(Row(1, {"text": "a", "image": str(path)}), Pictures(Path(), False), engine)
        for path in PICTURES[:3]
    ]
    assert torch.equal(prompt.pixel_values, torch.cat([each.pixel_values for each in alone]))


def test_the_system_message_of_a_run_is_for_rows_without_one(engine):
    options = from_values(Options, {"input": "in.jsonl", "output": "out.jsonl", "system": SYSTEM["content"]})
    pictures = Pictures(Path(), False)

    def tokens_of(asking: Asking, **content) -> tuple[int, ...]:
        return asking.prompt(Row(1, content), pictures, engine).token_ids

    given, none = asking_of(options), Asking(Settings())
    hello = {"role": "user", "content": "你好"}
    expected = tokens_of(none, messages=[SYSTEM, hello])
    assert tokens_of(given, text="你好") == expected != tokens_of(none, text="你好")
    newer = [{**SYSTEM, "role": "developer"}, {**hello, "name": "bob", "tool_calls": None}]
    assert tokens_of(none, messages=newer) == expected
    assert tokens_of(given, messages=[NEXT]) == tokens_of(none, messages=[SYSTEM, NEXT])
    own = [{"role": "system", "content": "Answer in English."}, NEXT]
    assert tokens_of(given, messages=own) == tokens_of(none, messages=own)


def test_a_conversation_that_has_changed_is_asked_again(batch_door):
    rows = [{"id": number, "messages": [SYSTEM, NEXT]} for number in range(3)]
    assert batch_door(write_lines("in.jsonl", *rows), "out.jsonl")[0] == 0
    rows[1] = {"id": 1, "messages": [NEXT]}
    rows[2] = {"id": 2, "messages": [SYSTEM, NEXT], "images": [str(PICTURES[0])]}
    code, _, said = batch_door(write_lines("in.jsonl", *rows), "out.jsonl")
    assert code == 0 and "2 rows have changed" in said
    assert [row["messages"] for row in read_lines("out.jsonl")] == [row["messages"] for row in rows]


def test_the_longest_rows_of_a_window_are_asked_first(tmp_path):
    lengths = random.Random(1).sample(range(1, 1000), 40)
    rows = [Row(number, {"id": number, "text": "字" * length}) for number, length in enumerate(lengths, 1)]
    in_turn = list(by_length(rows, 16))
    for start in range(0, 40, 16):
        window = [len(row.content["text"]) for row in in_turn[start : start + 16]]
        assert window == sorted(lengths[start : start + 16], reverse=True)
    with_picture = Row(1, {"id": 1, "text": "a", "image": "a.png"})
    assert next(by_length([Row(2, {"id": 2, "text": "a" * 50}), with_picture], 16)) is with_picture


def test_rows_of_all_lengths_come_out_in_the_order_of_the_input(batch_door):
    lengths = random.Random(2).sample(range(1, 60), 30)
    rows = [{"id": number, "text": "你好" * length} for number, length in enumerate(lengths)]
    source = write_lines("in.jsonl", *rows)
    code, _, said = batch_door(source, "out.jsonl", "--max-new-tokens", "4")
    assert code == 0
    assert [row["id"] for row in read_lines("out.jsonl")] == list(range(30))
    assert " rows/s, " in said and " tokens/s]" in said and " left, " in said
    code, shown, _ = batch_door(source, "-", "--max-new-tokens", "4")  # which cannot be put in order afterwards
    assert code == 0 and shown.encode() == Path("out.jsonl").read_bytes()
