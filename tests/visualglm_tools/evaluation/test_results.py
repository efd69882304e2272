"""What is counted of many judgements, and the tables that show it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visualglm_tools.evaluation.references import Question
from visualglm_tools.evaluation.results import Result, Tally, as_report, compare_all, judge_all, tally_all
from visualglm_tools.evaluation.tables import write_comparison, write_results, write_table
from visualglm_tools.serving.questions import Row


def question(number: int, reference: str, kind: str = "presence", language: str = "en") -> Question:
    row = Row(number, {"id": number, "text": "Is there a cat?", "reference": reference})
    return Question(row, (reference,), kind, language)


def judged(*pairs: tuple[str, str | None]) -> list[Result]:
    """The results of (reference, answer), None for no answer."""
    questions = [question(number, reference) for number, (reference, _) in enumerate(pairs, 1)]
    answers = {str(number): {"answer": answer} for number, (_, answer) in enumerate(pairs, 1) if answer is not None}
    return judge_all(questions, answers, "auto")


def test_a_confusion_is_counted_as_popes_authors_do_and_what_is_neither_is_no_yes():
    pairs = [("yes", "Yes")] * 6 + [("yes", "No")] * 2 + [("yes", "Red")] * 2 + [("no", "Yes")] * 3 + [("no", "no")] * 7
    tally = Tally.of(judged(*pairs, ("yes", None)))
    assert (tally.rows, tally.answered, tally.missing, tally.right, tally.unread) == (21, 20, 1, 13, 2)
    assert tally.accuracy == 13 / 20
    assert (tally.precision, tally.recall) == (6 / 9, 6 / 10)
    assert tally.f1 == pytest.approx(2 * (6 / 9) * 0.6 / (6 / 9 + 0.6))
    assert tally.yes_ratio == 9 / 20


def test_a_share_of_nothing_is_none():
    tally = Tally.of(judged(("no", "No")))
    assert tally.precision is None and tally.recall is None and tally.f1 is None and tally.accuracy == 1
    tally = Tally.of(judged(("no", None)))
    assert tally.accuracy is None and tally.yes_ratio is None and tally.interval == (0, 1)
    assert tally.as_json()["accuracy"] is None


ANSWERS = st.lists(st.tuples(st.sampled_from(("yes", "no")), st.sampled_from(("Yes", "No", "Red", None))))


@given(ANSWERS)
def test_f1_is_the_harmonic_mean_and_every_row_is_somewhere(pairs):
    tally = Tally.of(judged(*pairs))
    assert tally.answered + tally.missing == tally.rows == len(pairs)
    if tally.precision and tally.recall:
        assert tally.f1 == pytest.approx(2 / (1 / tally.precision + 1 / tally.recall))
    assert tally.right + tally.unread <= tally.answered


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(("zh", "en")), st.booleans()), min_size=1))
def test_groups_come_as_they_first_appear_and_add_up(rows):
    questions = [question(number, "x", kind, language) for number, (kind, language, _) in enumerate(rows)]
    answers = {str(number): {"answer": "x" if is_right else "y"} for number, (*_, is_right) in enumerate(rows)}
    results = judge_all(questions, answers, "auto")
    groups = tally_all(results)
    names = [(kind, language) for kind, language, _ in groups]
    kinds = list(dict.fromkeys(kind for kind, *_ in rows))
    assert list(dict.fromkeys(kind for kind, _ in names if kind != "all")) == kinds
    assert len(names) == len(set(names))
    single = [tally for kind, language, tally in groups if "all" not in (kind, language)]
    assert sum(tally.rows for tally in single) == len(rows)
    assert groups[-1][2] == Tally.of(results)


def test_two_settings_are_compared_on_the_rows_that_both_have_answered():
    pairs = [("yes", "Yes", "No"), ("yes", "Yes", "Red"), ("no", "Yes", "No"), ("no", "No", "No"), ("no", "No", None)]
    now = judged(*((reference, answer) for reference, answer, _ in pairs))
    before = judged(*((reference, other) for reference, _, other in pairs))
    ((_, _, compared),) = compare_all(now, before)
    assert compared.as_json() == {"rows": 4, "right": 3, "before": 2, "better": 2, "worse": 1, "p_value": 1.0}
    ((_, _, turned),) = compare_all(before, now)
    assert (turned.better, turned.worse) == (compared.worse, compared.better)
    assert write_comparison(compare_all(now, before)).splitlines()[2] == (
        "| presence | en | 4 | 50.0 % | 75.0 % | 2 | 1 | 1 |"
    )
    assert "| 0 |  |  | 0 | 0 | 1 |" in write_comparison(compare_all(judged(("yes", None)), judged(("yes", "yes"))))


def test_a_table_has_the_columns_that_have_something_in_them():
    open_question = judge_all([question(1, "red")], {"1": {"answer": "Red.", "finish_reason": "stop"}}, "auto")
    table = write_results(tally_all(open_question)).splitlines()
    assert table == [
        "| kind | language | rows | right | accuracy | 95 % |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| presence | en | 1 | 1 | 100.0 % | 20.7–100.0 |",
    ]
    cut = judge_all([question(1, "red")], {"1": {"answer": "Red re", "finish_reason": "length"}}, "auto")
    assert write_results(tally_all(cut)).splitlines()[2].endswith("| 0.0 % | 0.0–79.3 | 1 |")
    head, _, row = write_results(tally_all(judged(("yes", "Yes"), ("no", None)))).splitlines()
    assert head.endswith("| yes | precision | recall | F1 | neither yes nor no | no answer |")
    assert row.endswith("| 100.0 % | 100.0 % | 100.0 % | 100.0 % | 0 | 1 |")


def test_names_from_the_data_spoil_no_table_and_no_terminal():
    table = write_table(["kind", "language", "n"], [["a|b\n\x1b[2J", "\\|", 1]])
    assert table.splitlines()[2] == r"| a\|b [2J | \\\| | 1 |"


def test_the_report_says_of_each_row_what_was_judged_how():
    results = judged(("yes", "Yes."), ("red", "Blue."), ("no", None))
    others = judged(("yes", "Red."), ("red", None), ("no", "No."))
    report = json.loads(json.dumps(as_report(results, others)))
    first, second, third = report["rows"]
    assert (first["way"], first["said"], first["is_right"], first["other_is_right"]) == ("yes-no", "yes", True, False)
    assert (second["way"], second["is_right"], second["answer"], second["other"]) == ("exact", False, "Blue.", None)
    assert third["answer"] is None and "is_right" not in third and third["references"] == ["no"]
    assert report["compared"][0]["rows"] == 1 and report["groups"][0]["yes_no"]["answered"] == 1
    assert "compared" not in as_report(results, None)
