"""Tables of questions in, tables of answers out: no row is lost, and none is asked twice."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.json_lines import read_lines, write_lines
from tests.paths import PICTURES
from visualglm_tools.serving import runs
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.questions import read_rows


datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXT, PICTURE = datasets.Value("string"), datasets.Image()
FEATURES = {"id": datasets.Value("int64"), "text": TEXT, "image": PICTURE, "score": datasets.Value("float32")}
SHORT = ("--max-new-tokens", "3")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows_of(count: int) -> list[dict]:
    """Every third without a picture."""
    return [
        {
            "id": number,
            "text": "描述这张图片。" if number % 3 else "你好" * (number + 1),
            "image": str(PICTURES[number % 3]) if number % 3 else None,
            "score": number / 8,
        }
        for number in range(count)
    ]


def write_table(rows: list[dict], name: str = "in.parquet", features: dict = FEATURES) -> Path:
    """A table as `datasets` writes it, the pictures' bytes in it."""
    rows = [{**row, "image": row["image"] and {"bytes": Path(row["image"]).read_bytes()}} for row in rows]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(name)
    return Path(name)


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_a_table_is_answered_as_its_rows_are(batch_door):
    rows = rows_of(7)
    source = write_table(rows)
    code, _, said = batch_door(source, "out.parquet", *SHORT)
    assert code == 0 and "7 of 7 rows are answered." in said
    assert batch_door(write_lines("in.jsonl", *rows), "out.jsonl", *SHORT)[0] == 0
    before, after = pq.read_table(source), pq.read_table("out.parquet")
    assert after.column_names == [*before.column_names, "answer", "finish_reason"]
    assert after.drop_columns(["answer", "finish_reason"]).equals(before)
    assert after.column("answer").to_pylist() == [row["answer"] for row in read_lines("out.jsonl")]
    assert after.column("finish_reason").to_pylist() == [row["finish_reason"] for row in read_lines("out.jsonl")]
    loaded = datasets.Dataset.from_parquet("out.parquet")
    assert isinstance(loaded.features["image"], datasets.Image) and loaded[1]["image"].size
    assert files() == ["in.jsonl", "in.parquet", "out.jsonl", "out.parquet"]


def test_a_table_that_is_complete_is_not_asked_again(batch_door, monkeypatch):
    source = write_table(rows_of(4))
    assert batch_door(source, "out.parquet", *SHORT)[0] == 0
    before = pq.read_table("out.parquet")
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("it was asked again"))
    code, _, said = batch_door(source, "out.parquet", *SHORT)
    assert code == 0 and "4 of 4 rows are answered." in said
    assert pq.read_table("out.parquet").equals(before)


def test_what_has_changed_in_a_table_is_asked_again(batch_door):
    rows = rows_of(5)
    assert batch_door(write_table(rows), "out.parquet", *SHORT)[0] == 0
    rows[1]["image"], rows[3]["text"], rows[4]["score"] = str(PICTURES[2]), "What is it?", 1.0
    code, _, said = batch_door(write_table(rows), "out.parquet", *SHORT)
    assert code == 0 and "2 rows have changed since they were answered" in said
    assert pq.read_table("out.parquet").column("score").to_pylist() == [row["score"] for row in rows]


def test_a_run_over_a_table_that_is_stopped_goes_on(batch_door, monkeypatch):
    source, draw, drawn = write_table(rows_of(20)), runs.draw, []

    def draw_and_stop(progress, result):
        draw(progress, result)
        drawn.append(result)
        if len(drawn) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "draw", draw_and_stop)
        assert batch_door(source, "out.parquet", *SHORT)[0] == 143
    there = len(read_lines("out.parquet.answers.jsonl"))
    assert 5 <= there < 20 and not Path("out.parquet").exists()
    with open("out.parquet.answers.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": 19, "te')  # as if killed while writing
    code, _, said = batch_door(source, "out.parquet", *SHORT)
    assert code == 0 and f"/{20 - there} [" in said
    assert batch_door(source, "whole.parquet", *SHORT)[0] == 0
    assert pq.read_table("out.parquet").equals(pq.read_table("whole.parquet"))
    assert files() == ["in.parquet", "out.parquet", "whole.parquet"]


def test_bad_rows_of_a_table_are_named_and_the_rest_is_answered(batch_door):
    rows = [*rows_of(4), {"id": 3, "text": "你好"}, {"id": 5, "text": " "}, {"text": "你好"}]
    rows = [{"image": None, "score": None, "id": None, **row} for row in rows]
    source = write_table(rows)
    table = pq.read_table(source).to_pylist()
    table[1]["image"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(table, pq.read_schema(source)), source)
    code, _, said = batch_door(source, "out.parquet", *SHORT)
    assert code == 1 and "3 of 7 rows are answered." in said
    assert pq.read_table("out.parquet").column("id").to_pylist() == [0, 2, 3]
    problems = read_lines("out.parquet.errors.jsonl")
    assert [problem["line"] for problem in problems] == [2, 5, 6, 7]
    assert "in row 2" in problems[0]["error"] and "sha256:" in problems[0]["row"]
    assert batch_door(write_table(rows[:4]), "out.parquet", *SHORT)[0] == 0
    assert pq.read_table("out.parquet").column("id").to_pylist() == [0, 1, 2, 3]
    assert files() == ["in.parquet", "out.parquet"]


def test_an_answer_to_a_row_that_was_spoiled_later_waits_beside_the_table(batch_door):
    rows = rows_of(3)
    assert batch_door(write_table(rows), "out.parquet", *SHORT)[0] == 0
    before = pq.read_table("out.parquet")
    assert batch_door(write_table([rows[0], {**rows[1], "text": ""}, rows[2]]), "out.parquet", *SHORT)[0] == 1
    assert pq.read_table("out.parquet").column("id").to_pylist() == [0, 2]
    code, _, said = batch_door(write_table(rows), "out.parquet", *SHORT)
    assert code == 0 and "rows/s" not in said  # nothing was asked
    assert pq.read_table("out.parquet").equals(before)
    assert files() == ["in.parquet", "out.parquet"]


def test_lines_become_a_table_and_a_table_becomes_lines(batch_door):
    messages = [{"role": "user", "content": [{"type": "text", "text": "你好"}]}]
    rows = [{"id": "a", "text": "你好", "mine": 1}, {"id": "b", "messages": messages, "mine": 2.5}]
    assert batch_door(write_lines("in.jsonl", *rows), "out.parquet", *SHORT)[0] == 0
    table = pq.read_table("out.parquet")
    assert table.column_names == ["id", "text", "mine", "messages", "answer", "finish_reason"]
    assert table.column("messages").to_pylist() == [None, messages]
    assert table.column("mine").to_pylist() == [1, 2.5]
    code, _, said = batch_door("in.jsonl", "out.parquet", *SHORT)
    assert code == 0 and "rows/s" not in said
    source = table.drop_columns(["answer", "finish_reason"])
    pq.write_table(source, "in.parquet")
    assert batch_door("in.parquet", "out.jsonl", *SHORT)[0] == 0
    assert [row["answer"] for row in read_lines("out.jsonl")] == table.column("answer").to_pylist()


def test_a_picture_in_a_table_is_its_digest_in_lines(batch_door):
    import hashlib

    assert batch_door(write_table(rows_of(2)), "out.jsonl", *SHORT)[0] == 0
    shown = read_lines("out.jsonl")[1]["image"]
    assert shown["bytes"] == f"sha256:{hashlib.sha256(PICTURES[1].read_bytes()).hexdigest()}"
    assert len(Path("out.jsonl").read_bytes()) < 1000


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"id": 1, "text": "a"}, {"id": "b", "text": "a"}], "'id'"),
        ([{"id": 1, "text": "a", "mine": 2**70}], "'mine'"),
        ([{"id": 1, "text": "a", "mine": {}}], "'mine'"),
    ],
    ids=["two types", "a large number", "an empty object"],
)
def test_rows_that_cannot_be_a_table_are_refused_before_anything_is_asked(rows, found, batch_door, monkeypatch):
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("it went on"))
    code, _, said = batch_door(write_lines("in.jsonl", *rows), "out.parquet")
    line = said.splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and "out.parquet' cannot be a table: " in line and found in line
    assert "Write JSON Lines instead." in line and files() == ["in.jsonl"]


def test_a_table_of_something_else_is_left_alone(batch_door, monkeypatch):
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("it went on"))
    source = write_table(rows_of(2))
    other = write_table(rows_of(2), "other.parquet")
    before = other.read_bytes()
    code, _, said = batch_door(source, other)
    assert code == 2 and "line 1: no answer to a row" in said
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    code, _, said = batch_door("broken.parquet", "out.parquet")
    assert code == 2 and "cannot be read as a table" in said
    code, _, said = batch_door(source, source)
    assert code == 2 and "another file" in said
    assert other.read_bytes() == before
    assert files() == ["broken.parquet", "in.parquet", "other.parquet"]


def test_no_picture_of_a_table_is_kept_in_memory(tmp_path):
    rows = [{"id": number, "text": "a", "image": str(PICTURES[0]), "score": 0.0} for number in range(3)]
    source = write_table(rows, str(tmp_path / "in.parquet"))
    found, problems = read_rows(source)
    assert problems == []
    [[name]] = {tuple(row.conversation()[1]) for row in found[:1]}
    assert name.read_bytes() == PICTURES[0].read_bytes()
    assert all(len(json.dumps(row.line)) < 300 for row in found)
