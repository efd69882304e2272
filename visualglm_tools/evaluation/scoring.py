"""Whether an answer is right: compared as text, or read as a yes or a no, in Chinese and in English.

Not here: where questions and references come from (`references.py`), and what many judgements say (`results.py`).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


MATCHES = ("auto", "exact", "contains", "yes-no")
HAN = r"\u3005-\u3007\u3400-\u9fff\U00020000-\U0003ffff"  # written without spaces between words
WORD_PART = rf"[^\W{HAN}]"  # of words that have spaces between them

# References that are nothing but a yes or a no, as `normalise` leaves them.
YES_WORDS = frozenset({"yes", "true", "是", "是的", "有", "有的", "对", "对的", "能", "会", "可以", "存在", "正确"})
NO_WORDS = frozenset(
    {"no", "false", "否", "不", "不是", "没有", "没", "无", "不对", "不能", "不会", "不可以", "不存在", "错误"}
)

# How an answer begins that says it at once. "有一只狗" does not: it may have been asked about a cat.
YES = re.compile(
    r"(?:(?:yes|yeah|yep|yup|true|correct|indeed|(?:certainly|of course)(?! not))(?![a-z])"
    r"|是的|没错|不错|正确|嗯|(?:是|有|对|能|会|可以|存在)[的啊呀]?(?=\W|$))"
)
NO = re.compile(
    r"(?:(?:nope|nah|false|incorrect|wrong|never|neither|none|no(?! (?:doubt|problem|wonder|matter)(?![a-z]))"
    r"|not(?! (?:only|just)(?![a-z])))(?![a-z])"
    r"|没有|没(?=\W|$|看|见|发现)|不(?=\W|$|是|存在|在|能|可以|可能|会|对|行)|否|无(?!法|疑|论)|并[没不非]|未[见发包]|错误)"
)
OPENING = re.compile(r"[\W_]*(?:(?:the )?answer(?: is)?(?![a-z])\W*|答案?(?:[是为:]\W*))?")
# That nothing is said: a model that does not know has not said no.
UNDECIDED = re.compile(
    r"\bnot (?:sure|certain|clear|possible|enough|able)\b|\bno idea\b|\bun(?:sure|certain|clear|known|able)\b"
    r"|\b(?:hard|difficult|impossible) to \w+|\b(?:maybe|perhaps|possibly|probably|might|may)\b"
    r"|(?:n't|\bcannot|\bcan not|\bdo not) (?:tell|say|know|determine|answer|be (?:determined|answered))\b"
    r"|(?:n't|\bcannot|\bcan not|\bnot) see (?:the|this|any|your)? ?(?:image|picture|photo)\b"
    r"|不知道|不确定|不清楚|不一定|不好说|说不准|看不清|看不出|看不[到见](?:这|那|您?的?|你的?)?[张幅]?(?:图|照)"
    r"|(?:无法|不能|难以|没法|没办法|不太?好)(?:确定|确认|判断|看|回答|辨|识|得知|知道)|(?<!不)可能|也许|或许|大概"
)
DENIAL = re.compile(
    r"\b(?:no(?! (?:doubt|problem|wonder|matter)\b)|not(?! (?:only|just)\b)|none|neither|nor|never|nothing|nobody)\b"
    r"|\b(?:cannot|isnt|arent|dont|doesnt)\b|n't\b"
    r"|没有|没[看见发]|(?<!是)不是|不存在|不在|不含|不包|看不[到见]|未[见发包]|并[非无没]|无(?!法|疑|论)"
)
SENTENCE = re.compile(r"[^.!?。\n]+[.!?。]?")
# What questions have in common: the rest is what they ask about.
FILLING = re.compile(
    r"a|an|the|is|are|was|were|am|be|do|does|did|has|have|can|could|there|it|this|that|these|those|any|some|in|on|of|at|to"
    r"|i|you|we|see|image|picture|photo|here|shown|visible|[图片照中里上有是吗呢么没不否的了这那张幅一只个到能看得见会在你我它请问]"
)


@dataclass(frozen=True)
class Judgement:
    """What was made of an answer.

    Args:
        way: how it was compared: "exact", "contains", "yes-no", or "objects" for a caption.
        is_right: whether it is one of the references.
        wanted: "yes" or "no" for "yes-no", otherwise None.
        said: the same of the answer, "" if neither could be read.
    """

    way: str
    is_right: bool
    wanted: str | None = None
    said: str | None = None


def normalise(text: str) -> str:
    """Text without case, width, punctuation, and spaces beside Chinese; of numbers, sign and decimal point stay."""
    for _ in range(2):  # folding case can undo the compatible form, and the other way round
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.replace("\u2212", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    number = rf"(?<=\d)\.(?=\d)|(?<!{WORD_PART})-(?=\d)"
    kept = {match.start() for match in re.finditer(number, text)}
    text = "".join(
        each if unicodedata.category(each)[0] in "LNM" or place in kept else " " for place, each in enumerate(text)
    )
    return re.sub(rf"(?<=[{HAN}]) | (?=[{HAN}])", "", " ".join(text.split()))


def verdict_of(references: Sequence[str]) -> str | None:
    """ "yes" or "no" if that is all that the references say, otherwise None."""
    words = {normalise(each) for each in references}
    return "yes" if words <= YES_WORDS else "no" if words <= NO_WORDS else None


def way_of(references: Sequence[str], match: str = "auto") -> str:
    """How answers are compared with these references.

    Raises:
        ValueError: as a yes or a no, but that is not what they say.
    """
    verdict = verdict_of(references)
    if match == "yes-no" and verdict is None:
        raise ValueError(
            f'"reference" must be a yes or a no for --match yes-no, found {", ".join(map(repr, references))}.'
        )
    return match if match != "auto" else "exact" if verdict is None else "yes-no"


def judge(answer: str, references: Sequence[str], match: str = "auto", question: str = "") -> Judgement:
    """Compare an answer with its references.

    Args:
        answer: the model's.
        references: the right ones.
        match: "exact" (after `normalise`), "contains" (a reference is part of the answer, as whole words), "yes-no", or
            "auto": yes-no where the references are nothing else, and exact elsewhere.
        question: what was asked, with which a yes may be said that has no such word in it.
    """
    way = way_of(references, match)
    if way == "yes-no":
        wanted, said = verdict_of(references), yes_or_no(answer, question)
        return Judgement(way, wanted == said, wanted, said)
    found = normalise(answer)
    is_same = contains if way == "contains" else str.__eq__
    return Judgement(way, any(is_same(found, normalise(each)) for each in references))


def contains(text: str, part: str) -> bool:
    """Whether `part` is in `text`, both normalised; what has spaces between words, as whole ones, and whole numbers."""
    before = f"(?<!{WORD_PART})(?<![.-])" if re.match(WORD_PART, part) else ""
    after = rf"(?!{WORD_PART}|\.)" if re.search(f"{WORD_PART}$", part) else ""
    return bool(part) and re.search(before + re.escape(part) + after, text) is not None


def yes_or_no(answer: str, question: str = "") -> str:
    """ "yes", "no", or "" for neither, by the first sentence that is no question.

    Its first word decides. Without one that does, it is neither if it says that this is not known, a no if it denies,
    and a yes if it states all that was asked about ("There is a black cat." of "Is there a cat?").
    """
    sentence = first_statement(answer)
    sentence = sentence[OPENING.match(sentence).end() :]
    if not UNDECIDED.match(sentence):
        for said, pattern in (("no", NO), ("yes", YES)):
            if pattern.match(sentence):
                return said
    if UNDECIDED.search(sentence):
        return ""
    if DENIAL.search(sentence):
        return "no"
    asked = subjects_of(question_in(question))
    return "yes" if asked and asked <= subjects_of(sentence) else ""


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, folded for comparison, with their ends."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return [each.strip() for each in SENTENCE.findall(folded) if re.search(r"[^\W\d_]", each)]


def first_statement(text: str) -> str:
    """The first sentence that is no question: models like to repeat what they were asked."""
    sentences = sentences_of(text)
    return next((each for each in sentences if not each.endswith("?")), "")


def question_in(text: str) -> str:
    """The question of a prompt that may also say how to answer; the whole prompt if none has a question mark."""
    return next((each for each in sentences_of(text) if each.endswith("?")), text)


def subjects_of(text: str) -> set[str]:
    """What a sentence is about: its words, of Chinese its characters, without those of any question."""
    words = re.findall(rf"[{HAN}]|{WORD_PART}+", normalise(text))
    return {each for each in words if not FILLING.fullmatch(each)}
