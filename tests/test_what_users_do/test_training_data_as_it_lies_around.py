"""Training data as people have it: odd characters, odd files, pictures as text; and what of it is learned."""

import base64
import io
import json
import re
import shutil

import pytest
import torch
from PIL import Image

from tests.paths import ROOT
from tests.training_helpers import short_run
from visualglm_hf import VisualGLMConfig
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import (
    IGNORED,
    Collator,
    Encoder,
    count_shared,
    describe_contradictions,
    describe_truncation,
    digest,
)
from visualglm_tools.training.layouts import COMPLETION, MARKS, ORIGINAL
from visualglm_tools.training.run import build_encoder, read_data


GOOD = {"img": "a.png", "prompt": "这是什么？", "label": "海。"}
MODEL_LENGTH = 2048
LONGEST_ERROR = 1000  # characters, of one row


@pytest.fixture
def folder(tmp_path):
    """A folder with one picture, `a.png`."""
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def read(folder):
    """Writes a file of rows, text or bytes, and reads it."""

    def read(content, name="rows.json", convert=lambda conversation: conversation):
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content, ensure_ascii=False)
        content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / name).write_bytes(content)
        return read_dataset([folder / name], convert)

    return read


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor, 256, 64, MODEL_LENGTH)


def as_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------- lines and files


@pytest.mark.parametrize("character", list("\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\t\r"), ids=ascii)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_character_that_ends_lines_elsewhere_is_text_in_a_string(character, name, read):
    row = f'{{"prompt": "a{character}b", "label": "c{character}d"}}'
    conversations = read(f"{row}\n{row}\n" if name == "rows.jsonl" else f"[{row}, {row}]", name)
    assert [(each.question, each.answer) for each in conversations] == [(f"a{character}b", f"c{character}d")] * 2


def test_lines_may_end_as_on_windows_and_a_mark_may_begin_the_file(read):
    lines = "\r\n".join(['{"prompt": "一", "label": "1"}', "", '{"prompt": "二", "label": "2"}', ""])
    conversations = read(b"\xef\xbb\xbf" + lines.encode(), "ROWS.JSONL")
    assert [each.question for each in conversations] == ["一", "二"]
    assert [each.source for each in conversations] == ["ROWS.JSONL, row 1", "ROWS.JSONL, row 3"]


ODD_FILES = {
    "GBK": ("rows.jsonl", as_lines(GOOD).encode("gbk"), "not UTF-8 .* Save it as UTF-8"),
    "UTF-16": ("rows.json", json.dumps([GOOD]).encode("utf-16"), "not UTF-8 .* Save it as UTF-8"),
    "UTF-16 without a mark": ("rows.json", json.dumps([GOOD]).encode("utf-16-le"), "NUL .* Save it as UTF-8"),
    "empty": ("rows.json", b"", "is no JSON"),
    "blank lines": ("rows.jsonl", b"\n \n", "has no rows"),
    "an empty list": ("rows.json", b"[]", "has no rows"),
    "one object": ("rows.json", json.dumps(GOOD).encode(), r"must hold a list of rows, found dict. Put \[ and \]"),
    "a word": ("rows.json", b'"x"', "must hold a list of rows, found str"),
    "lines called a list": ("rows.json", as_lines(GOOD, GOOD).encode(), "needs the ending .jsonl"),
    "a list called lines": ("rows.jsonl", json.dumps([GOOD], indent=1).encode(), "line 1 .* needs the ending .json"),
    "a line cut short": ("rows.jsonl", (as_lines(GOOD) + '{"prompt": "x"').encode(), "line 2 is no JSON"),
    "lists in lists": ("rows.jsonl", (as_lines(GOOD) + "[" * 100_000).encode(), "line 2 is no JSON: .* each other"),
    "a list of lists in lists": ("rows.json", b"[" * 100_000, "is no JSON: .* each other"),
    "endless digits": ("rows.jsonl", (as_lines(GOOD) + "1" * 5000).encode(), "line 2 is no JSON"),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_file_that_is_something_else_is_named_with_the_remedy(kind, read):
    name, content, message = ODD_FILES[kind]
    with pytest.raises(ValueError, match=rf"{name}.*{message}") as caught:
        read(content, name)
    assert len(str(caught.value)) < LONGEST_ERROR


# ---------------------------------------------------------------- rows


ODD_ROWS = {
    "a field twice": ('{"prompt": "x", "label": "y", "label": "z"}', "the field 'label' twice"),
    "a field of a message twice": (
        '{"messages": [{"role": "user", "role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        "the field 'role' twice",
    ),
    "a list": ("[1]", "must be an object, found list"),
    "nothing": ("null", "must be an object, found NoneType"),
    "no number": ('{"prompt": "x", "label": NaN}', "label must be a string, found float"),
    "no label": ('{"prompt": "x", "label": null}', "label must be a string, found NoneType"),
    "a blank label": ('{"prompt": "x", "label": " \\n\\u3000"}', "label is empty"),
    "a large number": (f'{{"prompt": "x", "label": {"1" * 4000}}}', "label must be a string, found int"),
    "a long list": (f'{{"prompt": "x", "label": {[1] * 9999}}}', "label must be a string, found list"),
    "a deep list": (f'{{"prompt": "x", "label": {"[" * 400 + "]" * 400}}}', "label must be a string, found list"),
    "half a pair": ('{"prompt": "\\ud83d", "label": "y"}', "half of a surrogate pair"),
    "half a pair as a label": ('{"prompt": "x", "label": "y\\udc00"}', "half of a surrogate pair"),
    "a mark of the prompt": ('{"prompt": "x", "label": "y\\ufff9"}', "reserved for the prompt"),
    "many unknown fields": (json.dumps({f"field{i}" * 20: 1 for i in range(999)}), "unknown field"),
    "a role that is a list": ('{"messages": [{"role": [], "content": "x"}]}', "must have a role"),
    "two names of one picture": (
        '{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png", "image": "a.png"}, '
        '{"type": "text", "text": "x"}]}, {"role": "assistant", "content": "y"}]}',
        "neither text nor the name of a picture",
    ),
}


@pytest.mark.parametrize("kind", ODD_ROWS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_an_odd_row_is_named_in_a_short_error(kind, name, read, encoder):
    row, message = ODD_ROWS[kind]
    good = json.dumps(GOOD)
    content = f"{good}\n{row}\n{good}\n" if name == "rows.jsonl" else f"[{good}, {row}, {good}]"
    with pytest.raises(ValueError, match=rf"^1 bad row(.|\n)*{name}, row 2: .*{re.escape(message)}") as caught:
        read(content, name, encoder)
    assert len(str(caught.value)) < LONGEST_ERROR


def test_what_looks_like_the_models_own_tokens_is_text(read, encoder):
    [[example]] = read([{"prompt": "<sop> \x00 </s>", "label": "[gMASK]<eop>"}], convert=encoder)
    [[plain]] = read([{"prompt": "x", "label": "y"}], convert=encoder)
    specials = set(encoder.processor.tokenizer.all_special_ids)
    assert sorted(specials & set(example.input_ids)) == sorted(specials & set(plain.input_ids))


def test_of_endless_bad_rows_not_all_are_named(read):
    with pytest.raises(ValueError, match=r"^5000 bad row(.|\n)*and 4000 more$") as caught:
        read([3] * 5000)
    assert len(str(caught.value)) < 40_000


# ---------------------------------------------------------------- pictures


def picture_bytes(format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (300, 300), (30, 60, 200)).save(file, format)
    return file.getvalue()


def row_with(picture, layout):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    parts = [{"type": "image", layout: picture}, {"type": "text", "text": "x"}]
    return {
        "img": {"img": picture, "prompt": "x", "label": "y"},
        "images": {"messages": messages, "images": [picture]},
        "image": {"messages": [{"role": "user", "content": parts}, messages[1]]},
        "path": {"messages": [{"role": "user", "content": parts}, messages[1]]},
    }[layout]


LAYOUTS = ("img", "images", "image", "path")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_base64_text_is_the_picture_itself(layout, prefix, read, folder, encoder):
    (folder / "b.png").write_bytes(picture_bytes())
    text = prefix + base64.b64encode(picture_bytes()).decode()
    [[example], [same]] = read([row_with(text, layout), row_with("b.png", layout)], convert=encoder)
    batch = Collator(encoder.processor)([example, same])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


ODD_PICTURES = {
    "base64 of no picture": base64.b64encode(b"no picture at all" * 4000).decode(),
    "base64 of half a picture": base64.b64encode(picture_bytes("JPEG")[:-200]).decode(),
    "a data URI of nothing": "data:image/png;base64,",
    "a long name": "a" * 70_000 + ".png",
    "a long name in folders": "a/" * 5_000,
    "NUL": "a\x00.png",
    "half of a surrogate pair": "\udc00.png",
    "a home that is not there": "~nobody-at-all/a.png",
    "a folder": ".",
    "an address": "https://example.org/" + "a" * 9999,
    "a file address": "file:///etc/hostname",
    "an empty picture": "empty.png",
    "no picture": "words.png",
    "a truncated picture": "half.jpg",
    "a number": 3,
    "a truth": True,
    "a list": ["a.png"] * 999,
    "an object": {"name": "a.png"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ODD_PICTURES)
def test_a_picture_that_is_none_is_named_in_a_short_error(kind, layout, read, folder):
    (folder / "empty.png").touch()
    (folder / "words.png").write_text("words", encoding="utf-8")
    (folder / "half.jpg").write_bytes(picture_bytes("JPEG")[:-200])
    row = row_with(ODD_PICTURES[kind], layout)
    with pytest.raises(ValueError, match=r"^1 bad row(.|\n)*rows.json, row 2: .*[Pp]icture") as caught:
        read(json.dumps([GOOD, row]))
    assert len(str(caught.value)) < LONGEST_ERROR


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_picture_is_a_conversation_in_words(nothing, read):
    [conversation] = read([{"img": nothing, "prompt": "x", "label": "y"}])
    assert conversation.pictures == ()


MARKED = {
    "the original's": {"img": "a.png", "prompt": "<image>\nx", "label": "y"},
    "questions": {"image": "a.png", "question": "x <image>", "answer": "y"},
    "two of them": {"images": ["a.png", "a.png"], "question": "<image><image>x", "answer": "y"},
    "TRL's": {"image": "a.png", "prompt": "<image>x", "completion": "y"},
}


@pytest.mark.parametrize("kind", MARKED)
def test_the_mark_of_a_picture_is_no_text_of_its_question(kind, read):
    [conversation] = read([MARKED[kind]])
    assert conversation.question == "x"
    assert len(conversation.pictures) == str(MARKED[kind]).count("a.png")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"img": "a.png", "prompt": "<image><image>x", "label": "y"}, "has 1 picture.* its prompt mentions 2, <image>"),
        ({"images": ["a.png"] * 2, "question": "<image>x", "answer": "y"}, "its question mentions 1"),
        ({"img": "a.png", "prompt": "<image>\n", "label": "y"}, "prompt is empty"),
    ],
    ids=["more marks", "fewer marks", "nothing else"],
)
def test_marks_are_as_many_as_pictures_and_not_all_of_a_question(row, message, read):
    with pytest.raises(ValueError, match=message):
        read([row])


# ---------------------------------------------------------------- labels


CONVERSATIONS = {
    "a picture": {"img": "a.png", "prompt": "这是什么？", "label": "海。"},
    "words": {"prompt": "Hello", "label": "Hi."},
    "several turns": {
        "messages": [
            {"role": "system", "content": "简短地回答。"},
            {"role": "user", "content": "<image>这是什么？"},
            {"role": "assistant", "content": "海。"},
            {"role": "user", "content": "<image>那这个呢？"},
            {"role": "assistant", "content": "草地。"},
            {"role": "user", "content": "海。"},
            {"role": "assistant", "content": "是。"},
        ],
        "images": ["a.png", "a.png"],
    },
    "an answer that was asked": {"prompt": "海。海。", "label": "海。"},
    "an answer that is cut": {"img": "a.png", "prompt": "x", "label": "海" * 100},
    "a question that is cut": {"prompt": "海" * 300, "label": "x"},
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_labels_are_on_the_answer_alone(kind, read, encoder):
    tokenizer = encoder.processor.tokenizer
    [examples] = read([CONVERSATIONS[kind]], convert=encoder)
    for example in examples:
        start = example.input_ids.index(tokenizer.bos_token_id)
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
        assert example.input_ids[start - 1] == tokenizer.gmask_token_id
        assert set(example.labels[:start]) == {IGNORED}
        # The original counts `<sop>` itself: it is said after [gMASK], which does not see it.
        assert example.labels[start:] == example.input_ids[start:]


# ---------------------------------------------------------------- advice


def lengths_in(advice):
    """The options and values that a message names."""
    return {name: int(value) for name, value in re.findall(r"--(max_\w+_length) (\d+)", advice)}


@pytest.mark.parametrize(
    ("source", "target"), [(10, 500), (500, 10), (1000, 1000), (10, 2703), (2703, 10), (1500, 1500)], ids=str
)
def test_the_lengths_that_are_advised_are_taken_and_cut_nothing(source, target, processor, read):
    rows = [GOOD, {"prompt": "海" * source, "label": "x"}, {"prompt": "x", "label": "草" * target}]
    short = Encoder(processor, 64, 256, MODEL_LENGTH)
    advice = describe_truncation([example for row in read(rows, convert=short) for example in row], short)
    if source + target > MODEL_LENGTH:
        assert not lengths_in(advice) and "Shorten the longest: rows.json, row" in advice
        assert ("row 2 has a source of" if source >= target else "row 3 a target of") in advice
        return
    lengths = {"max_source_length": 64, "max_target_length": 256} | lengths_in(advice)
    long = Encoder(processor, **lengths, max_length=MODEL_LENGTH)
    assert describe_truncation([example for row in read(rows, convert=long) for example in row], long) is None


@pytest.mark.parametrize(("pictures", "fits"), [(2, True), (44, True), (70, False)])
def test_the_length_that_is_advised_for_many_pictures_is_taken(pictures, fits, processor, read):
    row = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "images": ["a.png"] * pictures,
    }
    with pytest.raises(ValueError, match="row 1: --max_source_length 64 would cut a picture") as caught:
        read([row], convert=Encoder(processor, 64, 256, MODEL_LENGTH))
    advice = lengths_in(str(caught.value))
    needed = re.search(r"needs up to (\d+)", str(caught.value))
    if not fits:
        assert not needed and "show fewer pictures" in str(caught.value)
        return
    lengths = {"max_target_length": 256, **advice, "max_source_length": int(needed.group(1))}
    assert len(read([row], convert=Encoder(processor, **lengths, max_length=MODEL_LENGTH))) == 1


# ---------------------------------------------------------------- a run


TALK = {
    "messages": [
        {"role": "user", "content": "海" * 40},
        {"role": "assistant", "content": "一"},
        {"role": "user", "content": "海" * 40},
        {"role": "assistant", "content": "二"},
    ]
}


@pytest.fixture
def run(folder):
    """Reads what a run is given, as it does before any model is loaded; returns the data and what was said."""

    def run(*names, **changes):
        settings = short_run(folder / "out", train_data=tuple(folder / name for name in names), **changes)
        lines = []
        encoder = build_encoder(settings, VisualGLMConfig.from_pretrained(settings.model))
        return read_data(settings, encoder, lines.append), lines

    return run


def test_a_run_says_what_its_data_is_and_what_of_it_is_not_learned(folder, run):
    (folder / "rows.json").write_text(json.dumps([GOOD, {**GOOD, "label": "草。"}, TALK]), encoding="utf-8")
    (folder / "pictures").mkdir()
    shutil.copy(folder / "a.png", folder / "pictures")
    (folder / "pictures" / "a.txt").write_text("A red square.", encoding="utf-8")
    data, lines = run("rows.json", "pictures")
    assert data.notes == lines[:4]
    named, captions, left_out, contradicting = lines[:4]
    assert named == "rows.json: 3 rows, the original's layout (2), messages (1)."
    assert captions.startswith("pictures: 1 row, captions; a caption is the answer to ")
    assert left_out.startswith(
        "1 example(s) lose the oldest turns of their conversations, 2 messages in all; none would"
    )
    assert contradicting.endswith("at most one can be learned: rows.json, row 1, rows.json, row 2.")


def test_a_strict_run_leaves_no_turn_out(folder, run):
    (folder / "rows.json").write_text(json.dumps([TALK]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^1 example\(s\) lose the oldest turns"):
        run("rows.json", strict=True)


EXAMPLES = re.search(r"\n## Data\n(.*?)\n## ", (ROOT / "docs/finetuning.md").read_text(encoding="utf-8"), re.DOTALL)
EXAMPLES = re.findall(r"```json\n(.*?)```", EXAMPLES.group(1), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_row_of_the_documentation_is_one(example, read, folder):
    for name in set(re.findall(r'"([\w./-]+\.(?:png|jpg))"', example)):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "a.png", folder / name)
    text = example.replace("iVBORw0KGgo…", base64.b64encode(picture_bytes()).decode())
    assert read(text if text.startswith("[") else f"[{text}]")


def test_each_layout_has_its_row_in_the_documentation(read):
    fields = {layout.fields for layout in (*MARKS.values(), ORIGINAL, COMPLETION)}
    shown = {name for example in EXAMPLES for name in re.findall(r'"(\w+)":', example)}
    assert [names for names in fields if not set(names) & shown] == []
    assert len(EXAMPLES) > len(fields) - 1


# ---------------------------------------------------------------- the same rows again


def test_rows_and_pictures_are_known_again_by_what_they_are(read, encoder, folder):
    def digest_of(rows):
        return digest([example for row in read(rows, convert=encoder) for example in row])

    first = digest_of([GOOD])
    shutil.copy(folder / "a.png", folder / "b.png")
    assert digest_of([{**GOOD, "img": "b.png"}]) == first
    assert digest_of([{**GOOD, "label": "草。"}]) != first
    Image.new("RGB", (8, 8), (0, 0, 0)).save(folder / "c.png")
    assert digest_of([{**GOOD, "img": "c.png"}]) != first


def test_held_out_rows_that_are_trained_on_are_counted(read, encoder):
    rows = [GOOD, {"prompt": "x", "label": "y"}, {"prompt": "x", "label": "z"}]
    examples = [example for row in read(rows, convert=encoder) for example in row]
    assert count_shared(examples, examples[:2]) == 2


def names_of_one_picture(folder):
    """The same picture by all that rows may call it."""
    (folder / "inner").mkdir()
    (folder / "link.png").symlink_to("a.png")
    shutil.copy(folder / "a.png", folder / "copy.png")
    text = base64.b64encode((folder / "a.png").read_bytes()).decode()
    uri = f"data:image/png;base64,{text}"
    return ["a.png", "./a.png", "inner/../a.png", str(folder / "a.png"), "link.png", "copy.png", text, uri]


def test_a_picture_is_the_same_whatever_it_is_called(read, encoder, folder):
    names = names_of_one_picture(folder)
    examples = [example for [example] in read([{**GOOD, "img": name} for name in names], convert=encoder)]
    for example in examples:
        assert count_shared(examples, [example]) == len(names)
    rows = [{**GOOD, "img": name, "label": f"答案{number}"} for number, name in enumerate(names)]
    warning = describe_contradictions([example for [example] in read(rows, convert=encoder)])
    assert warning.startswith("1 question(s)") and warning.count("rows.json, row") == len(names)


def test_of_endless_answers_to_one_question_not_all_rows_are_named(read, encoder):
    examples = [example for [example] in read([{**GOOD, "label": f"{n}"} for n in range(500)], convert=encoder)]
    assert describe_contradictions(examples).endswith(", rows.json, row 10 and 490 more.")
