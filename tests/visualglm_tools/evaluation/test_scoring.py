"""Answers of every kind, judged in both languages."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visualglm_tools.evaluation.scoring import MATCHES, contains, judge, normalise, verdict_of, way_of, yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  On the LEFT. ", "on the left"),
        ("ＡＢＣ１２３！", "abc123"),
        ("背景是 草地 。", "背景是草地"),
        ("“红色”", "红色"),
        ("有 3 只", "有3只"),
        ("a red-and-white cat", "a red and white cat"),
        ("3.5 m", "3.5 m"),
        ("1,000 people, 2", "1000 people 2"),
        ("-5 ℃", "-5 c"),
        ("−5", "-5"),
        ("3-5", "3 5"),
        ("Straße", "strasse"),
        ("café", "café"),
        ("No.1", "no 1"),
        ("……", ""),
        ("", ""),
    ],
)
def test_case_width_punctuation_and_spaces_do_not_count(text, expected):
    assert normalise(text) == unicodedata.normalize("NFKC", expected)


PARTS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("中一。，-−.,  05５aİŉ\u0301"))


@given(st.lists(PARTS).map("".join))
def test_what_is_normal_stays_as_it_is(text):
    once = normalise(text)
    assert normalise(once) == once


@given(st.text("中猫 aB1.-", min_size=1), st.sampled_from(("", "。", " ", "!", "\n")))
def test_an_answer_is_itself_whatever_stands_around_it(text, around):
    assert judge(f"{around}{text}{around}".upper(), [text], "exact").is_right


@pytest.mark.parametrize(
    ("answer", "references", "match", "is_right"),
    [
        ("红色。", ["红色"], "auto", True),
        ("红 色", ["红色"], "exact", True),
        ("深红色", ["红色"], "exact", False),
        ("深红色", ["红色"], "contains", True),
        ("A red circle.", ["Red"], "contains", True),
        ("A tired man.", ["red"], "contains", False),
        ("12 cats", ["2", "two"], "contains", False),
        ("2只猫", ["2"], "contains", True),
        ("图中有12只猫", ["2"], "contains", False),
        ("un café", ["caf"], "contains", False),
        ("ABC猫", ["abc"], "contains", True),
        ("2.5", ["2"], "contains", False),
        ("it is -5", ["5"], "contains", False),
        ("It is 5.", ["5"], "contains", True),
        ("Two.", ["2", "two"], "exact", True),
        ("-5", ["5"], "exact", False),
        ("3.5", ["35"], "exact", False),
        ("", ["red"], "contains", False),
        ("anything", ["!"], "contains", False),
        ("Yes.", ["yes", "a star"], "auto", True),
    ],
)
def test_an_answer_is_compared_as_text(answer, references, match, is_right):
    judgement = judge(answer, references, match)
    assert judgement.is_right is is_right
    assert judgement.way == ("exact" if match == "auto" else match) and judgement.said is None


def test_a_decimal_is_not_in_another_one():
    assert not contains("12.5", "2.5") and contains("it is 2.5 m", "2.5")


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "Yes.",
            "yes, it is",
            "YES!",
            "ＹＥＳ",
            "Yeah",
            "**Yes**",
            '"Yes"',
            "1. Yes",
            "The answer is yes.",
            "Answer: Yes",
        ),
        *("True", "Correct.", "Of course.", "Yes是的", "Yes, not far from the door.", "Is there a cat? Yes."),
        *(
            "是的。",
            "是",
            "有",
            "有的，在左边。",
            "对",
            "对的",
            "没错",
            "不错，有一只",
            "能",
            "可以",
            "嗯，有的",
        ),
        *("答：有", "答案是有", "答案：是的", "有没有猫？有。", "存在", "会", "正确", "Yes。没有狗。"),
    ],
)
def test_a_yes_is_read(answer):
    assert yes_or_no(answer) == "yes"


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "No.",
            "no, it isn't",
            "NO",
            "Nope",
            "No, but yes to the other one",
            "The answer is no.",
            "Not at all.",
            "False",
        ),
        *(
            "There is no cat.",
            "There isn’t any.",
            "It's not black.",
            "I can't see a cat.",
            "I do not see one.",
            "None.",
        ),
        *("Of course not.", "Certainly not!", "Neither.", "I don't think so.", "Is there a cat? No.", "dont think so"),
        *(
            "没有。",
            "没",
            "不是",
            "不是的",
            "否",
            "不，图里有狗",
            "图中没有猫。",
            "不对",
            "不能",
            "不存在",
            "没看到",
            "无",
        ),
        *(
            "并没有",
            "并不是",
            "看不到猫",
            "看不见狗",
            "不可能",
            "答案是没有",
            "有没有猫？没有。",
            "未见猫",
            "抱歉，图片中没有猫。",
        ),
    ],
)
def test_a_no_is_read(answer):
    assert yes_or_no(answer) == "no"


@pytest.mark.parametrize(
    "answer",
    [
        *("", "?", "……", "Red.", "A star.", "Notice the cat.", "Yesterday", "Norway", "Nobel", "There is a cat."),
        *(
            "I am not sure.",
            "Not sure.",
            "I cannot tell.",
            "No idea.",
            "Maybe.",
            "Perhaps yes",
            "It is unclear.",
            "Unknown",
        ),
        *(
            "It is hard to say",
            "I can't see the picture.",
            "No doubt",
            "Is there a cat?",
            "It might be a cat, not a dog",
        ),
        *(
            "不知道",
            "不确定。",
            "不清楚",
            "无法判断",
            "可能有",
            "有可能",
            "可能没有",
            "也许",
            "看不清",
            "不能确定",
            "不一定",
        ),
        *(
            "红色。",
            "对不起，我看不到图片。",
            "对称的",
            "对于这个问题",
            "能否",
            "是否",
            "不止一只",
            "请先给我一张图片。",
        ),
        *("有没有猫？", "是不是猫我不知道", "无法看出"),
    ],
)
def test_what_says_neither_is_neither(answer):
    assert yes_or_no(answer) == ""
    for reference in ("yes", "no"):
        assert not judge(answer, [reference]).is_right


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("Is there a cat in the image?", "There is a black cat on the sofa.", "yes"),
        ("Is there a cat in the image?", "There is a dog.", ""),
        ("Is there a cat in the image? Answer with yes or no.", "A cat is asleep.", "yes"),
        ("Is the cat black?", "The cat is white.", ""),
        ("Is the cat black?", "The cat is not black.", "no"),
        ("Are there three cats?", "There are two cats.", ""),
        ("图里有猫吗？", "图中有一只黑猫。", "yes"),
        ("图里有猫吗？", "图中有一只狗。", ""),
        ("图里有猫吗？", "有一只猫", "yes"),
        ("图里有猫吗？", "有一只狗", ""),
        ("图里能看到猫吗？", "可以看到一只猫", "yes"),
        ("图形是红色的吗？", "图形是红色的", "yes"),
        ("图形是红色的吗？", "是蓝色的", ""),
        ("背景是草地吗？", "背景是草地。", "yes"),
        ("背景是大海吗？", "背景是草地。", ""),
        ("Is it?", "It is.", ""),
        ("", "There is a cat.", ""),
    ],
)
def test_a_statement_is_a_yes_if_it_has_all_that_was_asked_about(question, answer, said):
    assert yes_or_no(answer, question) == said


@pytest.mark.parametrize(
    ("references", "verdict"),
    [
        (["yes"], "yes"),
        (["Yes.", "是的", "有"], "yes"),
        (["No"], "no"),
        (["没有", "不是"], "no"),
        (["yes", "no"], None),
        (["yes", "a cat"], None),
        (["none"], None),
        (["有猫"], None),
        (["无"], "no"),
    ],
)
def test_references_are_a_yes_or_a_no_if_they_are_nothing_else(references, verdict):
    assert verdict_of(references) == verdict
    assert way_of(references) == ("yes-no" if verdict else "exact")
    if verdict is None:
        with pytest.raises(ValueError, match="must be a yes or a no"):
            way_of(references, "yes-no")


def test_a_yes_counts_as_such_in_either_language():
    for answer, reference in (("是的", "yes"), ("Yes", "有"), ("没有", "No"), ("no", "不是")):
        judgement = judge(answer, [reference])
        assert judgement.is_right and judgement.way == "yes-no" and judgement.said == judgement.wanted
    assert not judge("是的", ["no"]).is_right
    assert not judge("Yes, there is.", ["yes"], "exact").is_right


@given(st.text(), st.text(min_size=1), st.sampled_from(("auto", "exact", "contains")), st.text())
def test_whatever_is_answered_is_judged(answer, reference, match, question):
    assert judge(answer, [reference], match, question).way in MATCHES


@given(st.text("是不没有对能猫yesno .,?!。，"), st.text("猫狗?？ab "))
def test_reading_does_not_depend_on_case_width_and_space_around(answer, question):
    said = yes_or_no(answer, question)
    assert said == yes_or_no(f" {answer.upper()}\n", question)
    wide = "".join(chr(ord(each) + 0xFEE0) if "!" <= each <= "~" else each for each in answer)
    assert said == yes_or_no(wide, question)
