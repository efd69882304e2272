"""Exams as they are written: this package's rows, POPE's, and files that are no exam."""

import json
from pathlib import Path

import pytest

from tests.paths import ROOT
from visualglm_tools.evaluation.references import language_of, read_exam


def write(path: Path, *rows: dict | str) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_row_says_what_is_right_and_what_it_counts_for(tmp_path):
    exam = write(
        tmp_path / "mine.jsonl",
        {"id": 1, "text": "有几只猫？", "reference": ["两只", "2"], "kind": "count", "language": "Chinese"},
        "",
        {"id": "1", "text": "有几只猫？", "reference": " 两只 "},
        {"id": 2, "text": "How many?", "reference": "2", "kind": None, "category": "adversarial", "mine": [1]},
    )
    questions = read_exam(exam, "auto")
    assert [each.references for each in questions] == [("两只", "2"), (" 两只 ",), ("2",)]
    assert [(each.kind, each.language) for each in questions] == [
        ("count", "Chinese"),
        ("mine", "zh"),
        ("adversarial", "en"),
    ]
    assert [each.row.number for each in questions] == [1, 3, 4]
    assert questions[0].row.line == exam.read_text(encoding="utf-8").splitlines()[0]


def test_popes_rows_are_read_as_they_are_published(tmp_path):
    published = (
        '{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?", '
        '"label": "yes"}\n'
        '{"question_id": 2, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dining table in the image?", '
        '"label": "no"}\n'
    )
    file = tmp_path / "coco_pope_popular.json"
    file.write_text(published)
    questions = read_exam(file, "auto")
    assert [each.references for each in questions] == [("yes",), ("no",)]
    assert {(each.kind, each.language) for each in questions} == {("coco_pope_popular", "en")}
    row = questions[0].row
    assert row.key == "1" and json.loads(row.as_json()) == row.content
    assert row.content.items() >= json.loads(published.splitlines()[0]).items()  # its own fields come out, too


def test_a_row_that_has_our_reference_is_ours_whatever_else_is_in_it(tmp_path):
    row = {"id": 3, "question_id": 1, "label": "yes", "text": "有猫吗？", "reference": "没有"}
    (question,) = read_exam(write(tmp_path / "a.jsonl", row), "auto")
    assert question.row.content == row and question.references == ("没有",)


GOOD = {"id": 0, "text": "a", "reference": "b"}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "has no questions"),
        (["", " "], "has no questions"),
        ([GOOD, {"id": 1, "text": "a"}], 'line 2: "reference" must be the right answer, or a list of such, found None'),
        ([GOOD, "", {"id": 1, "text": "a", "reference": []}], 'line 3: "reference"'),
        ([{"id": 1, "text": "a", "reference": [1]}], 'line 1: "reference"'),
        ([{"id": 1, "text": "a", "reference": ["b", " "]}], 'line 1: "reference"'),
        ([{"id": 1, "text": "a", "reference": {"b": 1}}], 'line 1: "reference"'),
        ([{"id": 1, "text": "a", "reference": 3}], "found 3"),
        ([GOOD, {"id": 0, "text": "b", "reference": "c"}], "line 2: The id 0 is in line 1 already"),
        ([{"id": 1, "text": "a", "reference": "b", "kind": 3}], 'line 1: "kind" must be a text, found 3'),
        ([{"id": 1, "text": "a", "reference": "b", "language": ["zh"]}], '"language" must be a text'),
        ([{"id": 1, "reference": "b"}], '"text" must be the question'),
        ([GOOD, "no JSON"], "line 2: No JSON"),
        (["[1]"], "A row must be an object"),
        ([{**GOOD, "answer": "b"}], '"answer" is what will be added'),
        ([{"question_id": 1, "text": "a", "label": "maybe"}], '"label" must be "yes" or "no", found \'maybe\''),
        ([{"question_id": 1, "text": "a", "label": 1}], "found 1"),
        ([{"id": each, "text": "a"} for each in range(9)], "and 5 more lines"),
    ],
)
def test_a_file_that_is_no_exam_is_refused_with_its_lines(rows, complaint, tmp_path):
    with pytest.raises(ValueError, match="exam.jsonl") as error:
        read_exam(write(tmp_path / "exam.jsonl", *rows), "auto")
    assert complaint in str(error.value)


def test_references_must_fit_how_they_are_compared(tmp_path):
    exam = write(tmp_path / "a.jsonl", {**GOOD, "reference": "yes"}, {**GOOD, "id": 1, "reference": "red"})
    assert len(read_exam(exam, "auto")) == 2
    with pytest.raises(ValueError, match="line 2: \"reference\" must be a yes or a no for --match yes-no, found 'red'"):
        read_exam(exam, "yes-no")


@pytest.mark.parametrize(
    ("text", "language"), [("图?", "zh"), ("Is it 红 or blue?", "zh"), ("¿Qué?", "en"), ("〇", "zh")]
)
def test_the_language_is_that_of_the_question(text, language):
    assert language_of(text) == language


def test_the_example_is_an_exam_of_both_languages_and_several_kinds():
    questions = read_exam(ROOT / "examples" / "exam.jsonl", "auto")
    assert 12 <= len(questions) <= 20
    assert {each.language for each in questions} == {"zh", "en"}
    assert len({each.kind for each in questions}) >= 5
    for each in questions:
        assert (ROOT / "examples" / each.row.content["image"]).is_file()
