"""What an exam has brought: each answer judged, counted by kind and language, and compared with another setting's.

Not here: what makes one answer right (`scoring.py`), and how the figures are shown (`tables.py`, `chart.py`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from visualglm_tools.evaluation.objects import Mentions, Vocabulary
from visualglm_tools.evaluation.references import Question
from visualglm_tools.evaluation.scoring import Judgement, judge
from visualglm_tools.evaluation.statistics import mcnemar_p_value, wilson_interval
from visualglm_tools.serving.outputs import Output


ALL = "all"


@dataclass(frozen=True)
class Result:
    """A question with what became of it; one that has no answer has no judgement."""

    question: Question
    answer: str | None = None
    judgement: Judgement | None = None
    is_cut: bool = False  # by a limit of tokens
    mentions: Mentions | None = None  # of a caption; it is right if none is invented


@dataclass(frozen=True)
class Tally:
    """The counts of a group, and the shares that follow from them; a share of nothing is None.

    Args:
        rows: how many questions.
        answered: to how many there is an answer. Only these are judged.
        right: of these.
        cut: answers that a limit of tokens ended.
        verdicts: (wanted, said) of the answers that should be a yes or a no.
        captions: what each caption names.
    """

    rows: int
    answered: int
    right: int
    cut: int
    verdicts: tuple[tuple[str | None, str | None], ...]
    captions: tuple[Mentions, ...] = ()

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Tally":
        judgements = [each.judgement for each in results if each.judgement]
        verdicts = tuple((each.wanted, each.said) for each in judgements if each.way == "yes-no")
        right, cut = sum(each.is_right for each in judgements), sum(each.is_cut for each in results)
        captions = tuple(each.mentions for each in results if each.mentions)
        return cls(len(results), len(judgements), right, cut, verdicts, captions)

    @property
    def missing(self) -> int:
        return self.rows - self.answered

    @property
    def accuracy(self) -> float | None:
        return share(self.right, self.answered)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.answered)

    @property
    def unread(self) -> int:
        """How many answers could be read neither as a yes nor as a no; these are wrong."""
        return sum(said == "" for _, said in self.verdicts)

    @property
    def yes_ratio(self) -> float | None:
        return share(sum(said == "yes" for _, said in self.verdicts), len(self.verdicts))

    @property
    def precision(self) -> float | None:
        """How many of those that were answered with yes should be."""
        wanted = [wanted for wanted, said in self.verdicts if said == "yes"]
        return share(wanted.count("yes"), len(wanted))

    @property
    def recall(self) -> float | None:
        """How many of those that should be answered with yes were."""
        said = [said for wanted, said in self.verdicts if wanted == "yes"]
        return share(said.count("yes"), len(said))

    @property
    def f1(self) -> float | None:
        counted = [(wanted == "yes") + (said == "yes") for wanted, said in self.verdicts]
        return share(2 * counted.count(2), sum(counted))

    @property
    def chair_s(self) -> float | None:
        """How many captions name an object that is not there."""
        return share(sum(bool(each.invented) for each in self.captions), len(self.captions))

    @property
    def chair_i(self) -> float | None:
        """How many of the objects that are named, each as often as it is, are not there."""
        named = sum(len(each.named) for each in self.captions)
        return share(sum(len(each.invented) for each in self.captions), named)

    @property
    def object_recall(self) -> float | None:
        """How many of the objects that are there are named."""
        return share(sum(each.found for each in self.captions), sum(len(each.present) for each in self.captions))

    def as_json(self) -> dict:
        """All figures by their names."""
        figures = {"rows": self.rows, "answered": self.answered, "right": self.right, "cut": self.cut}
        figures |= {"accuracy": self.accuracy, "interval": list(self.interval)}
        if self.verdicts:
            shares = {"yes_ratio": self.yes_ratio, "precision": self.precision, "recall": self.recall, "f1": self.f1}
            figures["yes_no"] = {"answered": len(self.verdicts), "unread": self.unread} | shares
        if self.captions:
            named = sum(len(each.named) for each in self.captions)
            shares = {"chair_s": self.chair_s, "chair_i": self.chair_i, "recall": self.object_recall}
            figures["captions"] = {"answered": len(self.captions), "named": named} | shares
        return figures


@dataclass(frozen=True)
class Comparison:
    """Two settings on the rows that both have answered.

    Args:
        rows: how many these are.
        right: by the setting that is judged.
        before: right by the other one.
        better: wrong by the other one and right now.
        worse: the other way round.
    """

    rows: int
    right: int
    before: int
    better: int
    worse: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[Judgement, Judgement]]) -> "Comparison":
        right = [(now.is_right, before.is_right) for now, before in pairs]
        sums = (sum(now for now, _ in right), sum(before for _, before in right))
        return cls(len(right), *sums, right.count((True, False)), right.count((False, True)))

    @property
    def p_value(self) -> float:
        return mcnemar_p_value(self.better, self.worse)

    def as_json(self) -> dict:
        names = ("rows", "right", "before", "better", "worse", "p_value")
        return {name: getattr(self, name) for name in names}


def share(count: int, total: int) -> float | None:
    return count / total if total else None


def read_answers(path: Path, questions: Sequence[Question]) -> dict[str, dict]:
    """The answers of a file, and of parts that a stopped run has left beside it, by their rows' keys.

    Those to a text or a picture that has changed since are left out.

    Raises:
        ValueError: it holds something else than answers to these questions.
    """
    rows = [each.row for each in questions]
    lines = Output(path, rows).answers()
    current = [row for row in rows if row.key in lines and row.is_answered_by(lines[row.key])]
    if lines and not current:
        raise ValueError(f"{str(path)!r} has answers to other questions. Give another file, or remove this one.")
    answers = {row.key: json.loads(lines[row.key]) for row in current}
    for content in answers.values():
        if not isinstance(content["answer"], str):
            raise ValueError(
                f'{str(path)!r}: "answer" must be a text, found {content["answer"]!r} for the id {content["id"]!r}.'
            )
    return answers


def judge_all(
    questions: Sequence[Question], answers: Mapping[str, dict], match: str, vocabulary: Vocabulary | None = None
) -> list[Result]:
    """Each question with the judgement of its answer, in their order; `vocabulary` is for captions."""

    def result(question: Question) -> Result:
        found = answers.get(question.row.key)
        if found is None:
            return Result(question)
        is_cut = found.get("finish_reason") == "length"
        if question.objects is not None:
            mentions = vocabulary.judge(found["answer"], question.objects)
            return Result(question, found["answer"], Judgement("objects", not mentions.invented), is_cut, mentions)
        judgement = judge(found["answer"], question.references, match, question.row.question)
        return Result(question, found["answer"], judgement, is_cut)

    return list(map(result, questions))


def groups_of(results: Sequence[Result]) -> Iterator[tuple[str, str, Callable[[Result], bool]]]:
    """Kind and language of each group, and what belongs to it: as they first appear, the sums of several last."""
    kinds = list(dict.fromkeys(each.question.kind for each in results))
    languages = list(dict.fromkeys(each.question.language for each in results))
    found = {(each.question.kind, each.question.language) for each in results}
    groups = [group for group in product(kinds, languages) if group in found]
    if len(kinds) > 1:
        groups += [(None, language) for language in languages]
    if len(languages) > 1:
        groups.append((None, None))
    for kind, language in groups:

        def belongs(result: Result, kind: str | None = kind, language: str | None = language) -> bool:
            question = result.question
            return kind in (None, question.kind) and language in (None, question.language)

        yield kind or ALL, language or ALL, belongs


def tally_all(results: Sequence[Result]) -> list[tuple[str, str, Tally]]:
    """The counts of each group."""
    return [
        (kind, language, Tally.of(list(filter(belongs, results)))) for kind, language, belongs in groups_of(results)
    ]


def compare_all(results: Sequence[Result], others: Sequence[Result]) -> list[tuple[str, str, Comparison]]:
    """The comparison of each group, with the same questions' results of another setting."""
    pairs = [each for each in zip(results, others, strict=True) if each[0].judgement and each[1].judgement]
    return [
        (kind, language, Comparison.of([(now.judgement, before.judgement) for now, before in pairs if belongs(now)]))
        for kind, language, belongs in groups_of(results)
    ]


def row_as_json(result: Result, other: Result | None) -> dict:
    """What was judged how, for the report."""
    question, judgement = result.question, result.judgement
    content = {"id": question.row.content["id"], "line": question.row.number, "kind": question.kind}
    content |= {"language": question.language, "references": list(question.references), "answer": result.answer}
    if judgement:
        content |= {"way": judgement.way, "is_right": judgement.is_right}
        content |= {"is_cut": result.is_cut} | ({"said": judgement.said} if judgement.way == "yes-no" else {})
    if result.mentions:
        content |= {"named": list(result.mentions.named), "invented": list(result.mentions.invented)}
        content["objects"] = list(result.mentions.present)
    if other:
        content["other"] = other.answer
        content |= {"other_is_right": other.judgement.is_right} if other.judgement else {}
    return content


def as_report(results: Sequence[Result], others: Sequence[Result] | None) -> dict:
    """All figures of an exam, and of each row what was judged how; with another setting's results, also these."""
    content: dict = {"groups": named(tally_all(results))}
    if others:
        content["compared"] = named(compare_all(results, others))
    content["rows"] = [row_as_json(*pair) for pair in zip(results, others or [None] * len(results), strict=True)]
    return content


def named(groups: Sequence[tuple[str, str, Tally | Comparison]]) -> list[dict]:
    return [{"kind": kind, "language": language} | figures.as_json() for kind, language, figures in groups]
