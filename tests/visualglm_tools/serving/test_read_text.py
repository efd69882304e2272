"""Text in pictures through every door: read in all their pixels, told apart from the answer, within limits."""

import asyncio
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import user
from tests.json_lines import read_lines, write_lines
from tests.paths import CIRCLES, TINY
from tests.serving_helpers import ask_about, data_uri, error_of, post, post_chat
from visualglm_hf import text_in_pictures
from visualglm_hf.picture_reading import read_reduced
from visualglm_tools.commands import batch, chat
from visualglm_tools.options import parse
from visualglm_tools.serving.engine import prompts
from visualglm_tools.serving.engine.picture_pool import PicturePool
from visualglm_tools.serving.engine.prompts import WHOLE
from visualglm_tools.serving.page import page as web
from visualglm_tools.serving.questions import Row
from visualglm_tools.serving.runs import tell_unlooked


SLIDERS = (2048, 0.4, 0.8)
SWITCHES = (True, False, False)  # read the text, zoom, show where the model looked
READING = "出口 / <img>问："


@pytest.fixture
def seen(monkeypatch, engine) -> list:
    """The sizes of the pictures that were read; in each stands `READING`, in small ones nothing."""
    sizes = []

    def read(picture, count_tokens):
        sizes.append(picture.size)
        assert count_tokens("出口") > 0
        return READING if picture.width > 300 else ""

    monkeypatch.setattr(prompts, "load_reader", lambda: None)
    monkeypatch.setattr(text_in_pictures, "import_reader", tuple)
    monkeypatch.setattr(prompts, "read_picture", read)
    engine._prompts.readings.clear()
    return sizes


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def messages(data: bytes, text: str) -> list[dict]:
    return [user([{"type": "image", "image": data}, {"type": "text", "text": text}])]


@pytest.mark.parametrize(
    ("question", "head"),
    [("写着什么？", f"图片中的文字：“{READING}”\n"), ("What does it say?", f'Text in the picture: "{READING}"\n')],
)
def test_the_prompt_is_that_of_chat(engine, seen, question, head):
    data = png(800, 400)
    prompt = engine.prepare(messages(data, question), read_text=True)
    plain = engine.prepare(messages(data, head + question), english=question.isascii())
    assert prompt.token_ids == plain.token_ids
    assert prompt.pixel_values.equal(plain.pixel_values)
    assert (prompt.readings, plain.readings) == ((READING,), ())
    assert seen == [(800, 400)]  # with all its pixels


def test_pictures_without_text_are_asked_as_ever(engine, seen):
    data = png(200, 200)
    read, plain = (engine.prepare(messages(data, "这是什么？"), read_text=each) for each in (True, False))
    assert read.token_ids == plain.token_ids and read.pixel_values.equal(plain.pixel_values)
    assert (read.readings, plain.readings) == (("",), ())


def test_a_picture_is_read_once_however_often_it_is_asked_about(engine, seen):
    for question in ("一", "二"):
        engine.prepare(messages(png(800, 400), question), read_text=True)
    engine.prepare(messages(png(800, 400, seed=1), "三"), read_text=True)
    assert len(seen) == 2


def test_switches_that_are_none_are_refused_by_name(engine, seen):
    for read_text in ("no", 2):
        with pytest.raises(ValueError, match="read_text must be True or False, found"):
            engine.prepare(messages(png(800, 400), "一"), read_text=read_text)
        with pytest.raises(ValueError, match="read_text must be True or False, found"):
            engine.decode_picture(png(800, 400), read_text=read_text)
    with pytest.raises(ValueError, match="zoom must be .*found 'no'"):
        engine.decode_picture(png(800, 400), zoom="no")
    assert seen == []


def test_each_picture_is_read_for_its_own_turn(engine, seen):
    talk = [*messages(png(200, 200), "一"), {"role": "assistant", "content": "x"}, *messages(png(800, 400), "二")]
    prompt = engine.prepare(talk, read_text=True)
    talk[2]["content"][1]["text"] = f"图片中的文字：“{READING}”\n二"
    assert prompt.token_ids == engine.prepare(talk).token_ids
    assert prompt.readings == ("", READING)


def test_text_is_read_and_the_same_pixels_are_looked_into(engine, seen):
    prompt = engine.prepare(messages(png(800, 400), "写着什么？"), read_text=True, zoom=2, is_shown=True)
    read = engine.prepare(messages(png(800, 400), "写着什么？"), read_text=True)
    assert (prompt.token_ids, prompt.readings) == (read.token_ids, (READING,))
    assert (prompt.looks, prompt.is_shown, prompt.picture.size) == (2, True, (800, 400))
    assert (read.looks, read.is_shown, read.picture) == (0, False, None)
    decoded = engine.decode_picture(png(800, 400), read_text=True, zoom=2)
    same = engine.prepare(messages(decoded, "写着什么？"), read_text=True, zoom=2)
    assert same.pixel_values.equal(prompt.pixel_values) and same.readings == prompt.readings
    assert same.picture.tobytes() == prompt.picture.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decoders_give_a_picture_in_its_own_shape_and_within_the_limit(kind):
    picture = Image.open(io.BytesIO(png(4000, 1000)))
    file = io.BytesIO()
    picture.save(file, kind)
    with PicturePool() as pool:
        whole = pool.decode(file.getvalue(), WHOLE)
        assert whole.size == (WHOLE[0], WHOLE[0] // 4)
        small = pool.decode(png(40, 80), WHOLE)
    assert small.tobytes() == Image.open(io.BytesIO(png(40, 80))).tobytes()
    here = read_reduced(Image.open(file), "x", WHOLE[0], Image.Resampling.BICUBIC)
    assert whole.tobytes() == here.tobytes()


def test_a_picture_that_lies_on_its_side_is_stood_up():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(png(3200, 800))).save(file, "JPEG", exif=exif)
    with PicturePool() as pool:
        assert pool.decode(file.getvalue(), WHOLE).size == (WHOLE[0] // 4, WHOLE[0])


def test_over_http_what_was_read_is_told_beside_the_answer(url, seen):
    asked = {"messages": ask_about(data_uri(png(800, 400)), "写着什么？"), "temperature": 0, "max_tokens": 3}
    assert post_chat(url, **asked, read_text=True).json()["readings"] == [READING]
    assert "readings" not in post_chat(url, **asked).json()
    lines = post_chat(url, **asked, read_text=True, stream=True).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [event.get("readings") for event in events] == [[READING], *[None] * (len(events) - 1)]
    assert "readings" not in post_chat(url, **asked, stream=True).text
    assert post_chat(url, **asked, read_text=True, zoom=True).json()["readings"] == [READING]


def test_the_original_route_reads_text_where_that_is_asked_for(url, seen):
    picture = base64.b64encode(png(800, 400)).decode()
    asked = {"image": picture, "text": "写着什么？", "temperature": 0, "max_length": 200, "min_length": 0}
    read = post(url, json={**asked, "read_text": True}).json()
    assert read["readings"] == [READING] and read["history"] == [["写着什么？", read["result"]]]
    plain = post(url, json=asked).json()
    assert set(plain) == {"result", "history", "status", "time"} and len(seen) == 1
    without = post(url, json={"text": "你好", "read_text": True}).json()
    assert without["readings"] == [] and without["status"] == 200


def test_a_server_without_ocr_says_so(url, monkeypatch):
    def fail():
        raise ValueError("rapidocr is not installed")

    monkeypatch.setattr(prompts, "load_reader", fail)
    asked = {"messages": ask_about(data_uri(png(810, 400)), "写着什么？"), "read_text": True}
    assert "rapidocr is not installed" in error_of(post_chat(url, **asked), 400)["message"]


def test_the_page_shows_what_was_read_in_front_and_in_brackets(engine, seen):
    class OneUpload:
        path = Path("x.png")

        def read(self):
            return png(800, 400)

        def delete(self):
            pass

    async def last(updates):
        return [update async for update in updates][-1]

    handlers, session = web.Handlers(engine), web.Session()
    chat = asyncio.run(last(handlers.change_picture(session, OneUpload(), "写着什么？", *SLIDERS, *SWITCHES)))
    assert chat[0] == {"role": "user", "content": "[图片中的文字：“出口 / &lt;img&gt;问：”]"}
    assert [each["role"] for each in chat[1:]] == ["user", "assistant"]
    assert (session.picture.reading, session.picture.whole) == (READING, None)
    chat, _ = asyncio.run(last(handlers.ask(session, "再问一次", (), *SLIDERS, False, False, False)))
    assert not chat[0]["content"].startswith("[")
    chat, _ = asyncio.run(last(handlers.ask(session, "又问一次", (), *SLIDERS, True, True, True)))
    assert chat[0]["content"].startswith("[") and session.look.startswith("<figure>")
    assert (session.picture.reading, session.picture.whole) == (READING, None)
    assert len(seen) == 1


def test_a_run_over_a_file_reads_pictures_too(tmp_path, monkeypatch, capsys, engine, seen):
    monkeypatch.chdir(tmp_path)
    Path("sign.png").write_bytes(png(800, 400))
    prepared = []
    monkeypatch.setattr(type(engine), "submit", lambda self, prompt, settings: prepared.append(prompt) or fails())

    def fails():
        raise ValueError("asked enough")

    write_lines("in.jsonl", {"id": 1, "text": "写着什么？", "image": "sign.png"}, {"id": 2, "text": "你好"})
    words = ["in.jsonl", "out.jsonl", "--read-text", "--zoom", "--model", str(TINY)]
    options = parse(batch.Options, words, "batch", "")
    assert options.looking() == {"read_text": True, "zoom": 1}
    assert batch.run(options) == 1
    assert [(prompt.readings, prompt.looks) for prompt in prepared] == [((READING,), 1), ((), 0)]
    assert read_lines("out.jsonl.errors.jsonl")[0]["error"] == "asked enough"
    told = [line for line in capsys.readouterr().err.splitlines() if "no picture" in line]
    assert told == ["1 of 2 rows have no picture: --read-text and --zoom cannot change their answers."]


def test_a_run_without_ocr_says_so_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    write_lines("in.jsonl", {"id": 1, "text": "写着什么？", "image": str(CIRCLES)})
    with pytest.raises(ValueError, match="rapidocr is not installed"):
        batch.run(parse(batch.Options, ["in.jsonl", "out.jsonl", "--read-text", "--model", str(TINY)], "batch", ""))
    assert list(tmp_path.iterdir()) == [tmp_path / "in.jsonl"]


@pytest.mark.parametrize(
    ("words", "pictures", "told"),
    [
        (
            ["--zoom-twice"],
            ["x.png", None, ""],
            "2 of 3 rows have no picture: --zoom-twice cannot change their answers.\n",
        ),
        (["--read-text"], ["x.png"], ""),
        ([], [None], ""),
    ],
)
def test_a_run_tells_once_how_many_rows_its_switches_do_nothing_for(words, pictures, told, capsys):
    options = parse(batch.Options, ["in.jsonl", "out.jsonl", *words, "--model", str(TINY)], "batch", "")
    rows = [Row(number, {"id": number, "text": "你好", "image": name}) for number, name in enumerate(pictures, 1)]
    tell_unlooked(options, rows)
    assert capsys.readouterr().err == told


def test_the_terminal_tells_what_was_read_apart_from_the_answer(monkeypatch, capsys, loaded):
    room = sys.modules[type(loaded[0]).read_images.__module__]  # the code that came with the weights
    monkeypatch.setattr(room, "read_picture", lambda picture, count_tokens: "出口")
    monkeypatch.setattr(text_in_pictures, "import_reader", tuple)
    monkeypatch.setattr(chat, "open_model", lambda options: loaded)
    words = ["--image", str(CIRCLES), "--query", "写着什么？", "--read-text", "--greedy", "--model", str(TINY)]
    chat.run(parse(chat.Options, words, "chat", ""))
    shown = capsys.readouterr()
    assert "[图片中的文字：“出口”]" in shown.err
    assert "图片中的文字" not in shown.out
    conversation = chat.Conversation(*loaded, {"do_sample": False}, "zh", {"read_text": True})
    conversation.choose_picture(str(CIRCLES))
    conversation.answer("写着什么？")
    conversation.answer("什么颜色？")
    assert capsys.readouterr().out.count("[图片中的文字：“出口”]") == 1
