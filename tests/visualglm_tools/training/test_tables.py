"""Tables of `datasets`, parquet files and folders: the same examples as rows of JSON, pictures left on the disk."""

import json
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.training_helpers import At, adapter_in, interrupt, is_same, short_run, silent
from tests.training_rows import said, turn
from visualglm_tools.tables import PictureInTable
from visualglm_tools.training.asking import write_rows
from visualglm_tools.training.dataset import digest_picture, read_dataset
from visualglm_tools.training.encoding import Collator, Encoder, digest
from visualglm_tools.training.run import finetune


datasets = pytest.importorskip("datasets")

QUESTION = "这是什么？"
COLORS = {"a.png": (200, 30, 30), "b.png": (30, 30, 200)}
LIST, PICTURE, TEXT = datasets.List, datasets.Image(), datasets.Value("string")
TURN = {"role": TEXT, "content": TEXT}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor, 256, 64, 2048)


def save(rows, features, folder, kind):
    """Write a table; its features say which columns are pictures."""
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    if kind == "folder":
        table.save_to_disk(folder / "table")
        return folder / "table"
    table.to_parquet(folder / "table.parquet")
    return folder / "table.parquet"


def read(place, convert=lambda conversation: conversation, **options):
    lines = []
    return read_dataset([place], convert, say=lines.append, **options), lines


# The columns of a table, its rows, and the rows of JSON that are the same.
PART = {"type": TEXT, "text": TEXT, "image": PICTURE}
TABLES = {
    "messages": (
        {"messages": LIST(TURN), "images": LIST(PICTURE)},
        [
            {"messages": [turn("user", "<image>比较<image>"), turn("assistant", "y")], "images": ["a.png", "b.png"]},
            {"messages": [turn("user", "你好"), turn("assistant", "你好！")], "images": []},
        ],
    ),
    "parts": (
        {"messages": LIST({"role": TEXT, "content": LIST(PART)})},
        [
            {
                "messages": [
                    turn("user", [{"type": "image", "image": "b.png"}, {"type": "text", "text": QUESTION}]),
                    turn("assistant", [{"type": "text", "text": "y"}]),
                ]
            }
        ],
    ),
    "conversations": (
        {"id": TEXT, "image": PICTURE, "conversations": LIST({"from": TEXT, "value": TEXT})},
        [
            {"id": "0", "image": "a.png", "conversations": [said("human", "<image>\nx"), said("gpt", "y")]},
            {"id": "1", "conversations": [said("human", "x"), said("gpt", "y")]},
        ],
    ),
    "prompts and completions": (
        {"image": PICTURE, "prompt": LIST(TURN), "completion": LIST(TURN)},
        [{"image": "b.png", "prompt": [turn("user", "x")], "completion": [turn("assistant", "y")]}],
    ),
    "questions and answers": (
        {"image": PICTURE, "question": TEXT, "answer": TEXT},
        [{"image": "a.png", "question": QUESTION, "answer": "y"}, {"image": "b.png", "question": "x", "answer": "y"}],
    ),
    "captions": (
        {"image": PICTURE, "text": TEXT},
        [{"image": "a.png", "text": "A sea."}, {"image": "b.png", "text": "海。"}],
    ),
    "the original's layout": (
        {"img": PICTURE, "prompt": TEXT, "label": TEXT},
        [{"img": "a.png", "prompt": "x", "label": "y"}, {"prompt": "x", "label": "y"}],
    ),
}


def with_bytes(value, folder):
    """Rows with the pictures themselves in the place of their names."""
    if isinstance(value, dict):
        return {name: with_bytes(each, folder) for name, each in value.items()}
    if isinstance(value, list):
        return [with_bytes(each, folder) for each in value]
    return {"bytes": (folder / value).read_bytes(), "path": value} if value in COLORS else value


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("layout", TABLES)
def test_a_table_is_the_same_examples_as_rows_of_json(layout, kind, folder, encoder):
    features, rows = TABLES[layout]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    expected, _ = read(folder / "rows.json", encoder)
    found, [line] = read(save(with_bytes(rows, folder), features, folder, kind), encoder)
    name = "messages" if layout == "parts" else layout
    assert line == f"table{'.parquet' * (kind == 'parquet')}: {len(rows)} row{'s' * (len(rows) > 1)}, {name}."
    found, expected = ([each for row in rows for each in row] for rows in (found, expected))
    assert [example.conversation.source.split(", ")[1] for example in found] == [
        f"row {n + 1}" for n in range(len(rows))
    ]
    for example, same in zip(found, expected, strict=True):
        assert (example.input_ids, example.labels) == (same.input_ids, same.labels)
        assert [digest_picture(picture) for picture in example.pictures] == [*map(digest_picture, same.pictures)]
    batches = [Collator(encoder.processor)(examples) for examples in (found, expected)]
    assert torch.equal(*(batch["pixel_values"] for batch in batches))
    assert digest(found) == digest(expected)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_pictures_stay_on_the_disk(kind, folder, encoder):
    rows = with_bytes([{"image": name, "question": "x", "answer": "y"} for name in COLORS], folder)
    conversations, _ = read(save(rows, TABLES["questions and answers"][0], folder, kind))
    for conversation, name in zip(conversations, COLORS, strict=True):
        [picture] = conversation.pictures
        assert isinstance(picture, PictureInTable)
        again = pickle.loads(pickle.dumps(picture))  # as a process that opens pictures gets it
        assert again == picture and again.read_bytes() == (folder / name).read_bytes()
        assert len(pickle.dumps(picture)) < 5000


def test_columns_that_mean_nothing_are_named(folder):
    rows = with_bytes([{"image": "a.png", "caption": "x", "sha256": "00", "id": "1"}], folder)
    place = save(rows, {"image": PICTURE, "caption": TEXT, "sha256": TEXT, "id": TEXT}, folder, "parquet")
    assert read(place)[1] == ["table.parquet: 1 row, captions; its columns 'sha256' mean nothing here."]


def test_a_row_of_a_table_may_lack_its_answer_where_it_is_not_needed(folder):
    rows = with_bytes([{"image": "a.png", "question": "x", "answer": each} for each in (None, "y")], folder)
    place = save(rows, TABLES["questions and answers"][0], folder, "parquet")
    conversations, _ = read(place, needs_answers=False)
    assert [each.is_answered for each in conversations] == [False, True]
    with pytest.raises(ValueError, match="^1 bad row(.|\n)*table.parquet, row 1: the field 'answer' is missing"):
        read(place)


def test_answers_to_questions_about_a_table_are_rows_of_their_own(folder):
    rows = with_bytes([{"image": "b.png", "question": "x", "answer": "y"}], folder)
    [conversation], _ = read(save(rows, TABLES["questions and answers"][0], folder, "parquet"))
    write_rows([conversation], folder / "kept.jsonl")
    [again], _ = read(folder / "kept.jsonl")
    assert again.messages == conversation.messages
    assert [*map(digest_picture, again.pictures)] == [*map(digest_picture, conversation.pictures)]


def test_a_run_on_a_table_opens_its_pictures_in_other_processes_and_goes_on(folder):
    """Pickled as they are; the rows of a run that goes on are known again."""
    rows = [{"image": name, "question": "x", "answer": "y"} for name in COLORS] * 4
    place = save(with_bytes(rows, folder), TABLES["questions and answers"][0], folder, "parquet")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    usual = {"train_iters": 3, "save_interval": 1, "answers": 0}
    finetune(short_run(folder / "json", train_data=(folder / "rows.json",), **usual), silent)
    settings = short_run(folder / "table", train_data=(place,), num_workers=1, **usual)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, silent, [At(1, interrupt)])
    report = finetune(replace(settings, resume=True), silent)
    assert report["data"] == ["table.parquet: 8 rows, questions and answers."]
    assert is_same(adapter_in(folder / "table"), adapter_in(folder / "json"))


# ---------------------------------------------------------------- bad input


def table_of(columns, folder):
    datasets.Dataset.from_dict(columns).to_parquet(folder / "table.parquet")
    return folder / "table.parquet"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["x"], "answer": ["y"], "image_id": [3]}, "questions and answers, but no pictures. .* 'image'"),
        ({"caption": ["x"]}, "has the columns 'caption': captions, but no pictures"),
        ({"url": ["x"], "height": [3]}, "columns 'url', 'height', none of which means anything here. Rename them"),
        ({"caption": [], "image": []}, "has no rows"),
        ({"caption": ["x"], "image": [b"no picture"]}, "table.parquet, row 1: .*is not a picture"),
        ({"caption": ["x"], "image": [None]}, "row 1: a caption needs its picture"),
        ({"caption": ["x"], "image": ["gone.png"]}, "row 1: there is no picture 'gone.png'"),
        ({"caption": ["x"], "image": [3]}, r"row 1: pictures must be given as file names, found 3"),
    ],
)
def test_a_table_of_something_else_says_what_it_has(columns, message, folder):
    with pytest.raises(ValueError, match=message) as caught:
        read(table_of(columns, folder))
    assert len(str(caught.value)) < 1000


def test_a_table_in_words_is_one_and_says_so(folder):
    place = table_of({"prompt": ["你好"], "completion": ["你好！"]}, folder)
    assert read(place)[1] == ["table.parquet: 1 row, prompts and completions; none shows a picture."]


def test_pictures_in_a_table_may_be_bytes_or_names(folder):
    content = (folder / "a.png").read_bytes()
    for picture in (content, "a.png"):
        [conversation], _ = read(table_of({"caption": ["x"], "image": [picture]}, folder))
        assert digest_picture(conversation.pictures[0]) == digest_picture(content)


def test_a_damaged_table_is_one_error(folder):
    whole = table_of({"caption": ["x"], "image": ["a.png"]}, folder).read_bytes()
    for content in (whole[: len(whole) // 2], b"PAR1", b""):
        (folder / "half.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"half.parquet cannot be read as a table: .* Write it again"):
            read(folder / "half.parquet")


def test_a_damaged_folder_is_one_error(folder):
    place = save([{"prompt": "x", "label": "y"}], {"prompt": TEXT, "label": TEXT}, folder, "folder")
    for file in ("data-00000-of-00001.arrow", "state.json"):
        (place / file).write_bytes(b"{}")
        with pytest.raises(ValueError, match=r"table cannot be read as a table: .* Write it again"):
            read(place)


def test_a_folder_of_several_tables_names_them(folder):
    table = datasets.Dataset.from_dict({"prompt": ["x"], "label": ["y"]})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder / "tables")
    with pytest.raises(ValueError, match="tables has several tables: give one of them, test or train, as its folder"):
        read(folder / "tables")
    assert len(read(folder / "tables" / "train")[0]) == 1


def test_a_missing_package_is_named_with_its_command(folder, monkeypatch):
    place = table_of({"prompt": ["x"], "label": ["y"]}, folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets is missing: pip install 'visualglm-hf\[data\]'"):
        read(place)
