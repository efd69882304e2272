"""Room: text_in_pictures. What is written in a picture, read by a library that is not always there."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from tests.paths import PICTURES, TINY
from visualglm_hf import text_in_pictures
from visualglm_hf.conversation import LINE_BREAK, MORE
from visualglm_hf.text_in_pictures import (
    LONGEST_SIDE,
    MOST_LINES,
    TextReader,
    load_reader,
    read_picture,
    straightened,
)


SIGN = "停车场 / EXIT 24"
ANSWER = {"do_sample": False, "max_new_tokens": 4, "min_length": 0}


class WrittenPages:
    """A reader of pictures that stand for what is written in them, by the colour of their first pixel."""

    def __init__(self):
        self.pages = {}
        self.num_read = 0

    def page(self, *lines: str) -> Image.Image:
        self.pages[len(self.pages)] = lines
        return Image.new("RGB", (300, 300), (len(self.pages) - 1, 90, 200))

    def lines(self, picture):
        for line in self.pages[picture.getpixel((0, 0))[0]]:
            self.num_read += 1
            yield line


@pytest.fixture
def written(monkeypatch) -> WrittenPages:
    pages = WrittenPages()
    monkeypatch.setattr(text_in_pictures, "load_reader", lambda: pages)
    return pages


def prompt_of(model, tokenizer, *args, **options) -> str:
    return tokenizer.decode(model.prepare_turn(tokenizer, *args, **options).inputs["input_ids"][0])


def test_what_is_written_comes_before_the_question_and_is_told(model, tokenizer, written):
    picture = written.page("出口", "EXIT")
    turn = model.prepare_turn(tokenizer, picture, "图里写着什么？", None, read_text=True)
    plain = model.prepare_turn(tokenizer, picture, "图片中的文字：“出口 / EXIT”\n图里写着什么？", None)
    assert turn.inputs["input_ids"].tolist() == plain.inputs["input_ids"].tolist()
    answer, history = model.chat(tokenizer, picture, "图里写着什么？", read_text=True, **ANSWER)
    assert history[-1].readings == ("出口 / EXIT",)
    assert history == [("图里写着什么？", answer)]  # the question is the user's own
    *_, (streamed, history) = model.stream_chat(tokenizer, picture, "图里写着什么？", read_text=True, **ANSWER)
    assert (streamed, history[-1].readings) == (answer, ("出口 / EXIT",))


def test_what_was_read_stays_in_the_conversation_in_the_language_of_each_question(model, tokenizer, written):
    picture = written.page("出口")
    _, history = model.chat(tokenizer, picture, "图里写着什么？", read_text=True, **ANSWER)
    for options in ({}, {"read_text": True}):
        turn = model.prepare_turn(tokenizer, "What does it say?", None, history, **options)
        asked = 'Text in the picture: "出口"\n图里写着什么？'
        plain = model.prepare_turn(tokenizer, picture, asked, None, english=True)
        head = plain.inputs["input_ids"][0].tolist()[:-2]  # without [gMASK] <sop>
        assert turn.inputs["input_ids"][0].tolist()[: len(head)] == head
    assert written.num_read == 1


def test_a_picture_that_was_shown_before_can_be_read_later(model, tokenizer, written):
    picture = written.page("出口")
    _, history = model.chat(tokenizer, picture, "这是什么？", **ANSWER)
    assert history[-1].readings == ("",)
    _, later = model.chat(tokenizer, picture, "写着什么？", history=history, read_text=True, **ANSWER)
    assert [turn.readings for turn in later] == [("出口",), ()]
    assert history[-1].readings == ("",)  # the caller's own is not changed


@pytest.mark.parametrize("query", ["描述这张图片。", "What is it?"])
def test_pictures_without_text_are_asked_as_ever(model, tokenizer, written, pictures, query):
    blank = written.page()
    read, plain = (model.prepare_turn(tokenizer, blank, query, None, read_text=each).inputs for each in (True, False))
    assert read.keys() == plain.keys()
    assert all(read[name].equal(plain[name]) for name in plain)


def test_several_pictures_are_read_each_for_itself_also_out_of_one_array(model, tokenizer, written):
    pages = [written.page("one"), written.page(), written.page("two")]
    expected = 'Text in the picture: "one"\nText in the picture: "two"\nWhat?'
    asked = model.prepare_turn(tokenizer, pages, "What?", None, read_text=True).inputs["input_ids"]
    assert asked.equal(model.prepare_turn(tokenizer, pages, expected, None).inputs["input_ids"])
    array = np.stack([np.asarray(page) for page in pages])
    assert asked.equal(model.prepare_turn(tokenizer, array, "What?", None, read_text=True).inputs["input_ids"])


def test_without_a_picture_there_is_nothing_to_read(model, tokenizer):
    with pytest.raises(ValueError, match="read_text=True reads the text in pictures, and there is none"):
        model.chat(tokenizer, None, "你好", read_text=True)


def test_a_picture_that_was_never_read_must_be_given_again_to_be_read(model, tokenizer, written):
    _, history = model.chat(tokenizer, written.page("出口"), "这是什么？", **ANSWER)
    with pytest.raises(ValueError, match="read_text=True reads .*Give it again"):
        model.chat(tokenizer, "写着什么？", history=history, read_text=True, **ANSWER)
    assert written.num_read == 0


@pytest.mark.parametrize("read_text", ["no", "true", "", 2, 1.5, [], [True]])
def test_what_is_neither_true_nor_false_reads_nothing(model, tokenizer, written, read_text):
    page = written.page("出口")
    for ask in (model.chat, model.stream_chat, model.look):
        with pytest.raises(ValueError, match=f"read_text must be True or False, found {re.escape(repr(read_text))}"):
            ask(tokenizer, page, "写着什么？", read_text=read_text, **ANSWER)


@pytest.mark.parametrize(("read_text", "num_read"), [(np.True_, 1), (1, 1), (np.False_, 0), (0, 0), (None, 0)])
def test_truths_of_other_kinds_are_truths(model, tokenizer, written, read_text, num_read):
    model.prepare_turn(tokenizer, written.page("出口"), "写着什么？", None, read_text=read_text)
    assert written.num_read == num_read


def test_a_long_page_is_read_until_there_is_enough_and_says_so(written):
    page = written.page(*(f"第{number}行" for number in range(1000)))
    text = read_picture(page, len, most_tokens=50)
    assert text.endswith(MORE)
    assert len(text) <= 50
    assert written.num_read < 20
    assert "第0行 / 第1行".startswith(text.removesuffix(MORE)[:9])
    assert read_picture(written.page("12345"), len, most_tokens=5) == "12345"
    assert read_picture(written.page("123456"), len, most_tokens=5) == "1234" + MORE
    assert read_picture(written.page("123" + MORE), len, most_tokens=9) == "123..."


def test_no_more_lines_are_read_than_may_be(written):
    text = read_picture(written.page(*["a"] * 1000), len, most_tokens=10**6)
    assert text.count(LINE_BREAK) == MOST_LINES
    assert text.endswith(MORE)
    assert written.num_read == MOST_LINES + 1


def test_a_turned_line_becomes_an_upright_one():
    picture = Image.new("RGB", (100, 100), "white")
    picture.paste("red", (20, 40, 80, 50))
    line = straightened(picture, np.array([[20, 40], [80, 40], [80, 50], [20, 50]]))
    assert line.size == (60, 10)
    assert line.getcolors() == [(600, (255, 0, 0))]
    turned = straightened(
        picture.transpose(Image.Transpose.ROTATE_270), np.array([[50, 20], [60, 20], [60, 80], [50, 80]])
    )
    assert turned.size == (60, 10)


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_what_is_missing_is_said_with_how_to_get_it(model, tokenizer, monkeypatch, pictures, package):
    for name in ("rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else ModuleType(name))
    load_reader.cache_clear()
    with pytest.raises(ValueError, match=rf"{package} is not installed.*pip install rapidocr onnxruntime"):
        model.chat(tokenizer, pictures[0], "图里写着什么？", read_text=True)


# With the library itself


@pytest.fixture(scope="module")
def reader() -> TextReader:
    pytest.importorskip("rapidocr", reason="needs pip install 'visualglm-hf[ocr]'")
    pytest.importorskip("onnxruntime", reason="needs pip install 'visualglm-hf[ocr]'")
    load_reader.cache_clear()
    return load_reader()


@pytest.fixture(scope="module")
def count_tokens():
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def sign() -> Image.Image:
    return Image.open(Path(__file__).parents[1] / "signs" / "sign.png").convert("RGB")


@pytest.mark.parametrize("degrees", [0, 10, 180])
def test_a_sign_is_read_however_it_hangs(reader, sign, count_tokens, degrees):
    turned = sign.rotate(degrees, expand=True, fillcolor=sign.getpixel((0, 0)))
    expected = set(SIGN.replace(" 24", "24").split(LINE_BREAK))
    assert set(read_picture(turned, count_tokens).replace(" 24", "24").split(LINE_BREAK)) == expected


def test_a_sign_in_a_picture_of_many_pixels_is_read(reader, sign, count_tokens):
    canvas = Image.new("RGB", (3000, 2000), sign.getpixel((0, 0)))
    canvas.paste(sign, (900, 1200))
    assert "停车场" in read_picture(canvas, count_tokens)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_shapes_are_no_letters(reader, count_tokens, path):
    assert read_picture(Image.open(path).convert("RGB"), count_tokens) == ""


@pytest.mark.parametrize("size", [(1, 1), (3, 4000), (LONGEST_SIDE * 40, 20), (224, 224)])
def test_pictures_of_any_shape_without_text_have_none(reader, count_tokens, size):
    assert read_picture(Image.new("RGB", size, "grey"), count_tokens) == ""
