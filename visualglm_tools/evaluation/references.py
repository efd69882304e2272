"""Questions with their references: in this package's layout, in POPE's or COCO's as they are published.

A row is one of `visualglm batch` with more in it:

    {"id": 1, "text": "图里有猫吗？", "image": "1.jpeg", "reference": "有", "kind": "presence", "language": "zh"}

`reference` is the right answer or a list of answers that all are; `kind` and `language` group the table, and may be
missing. POPE's rows (Li et al., arXiv 2305.10355) have `question_id`, and `label`, which is "yes" or "no".
A row that asks for a caption has `objects` instead of a reference: all that are in the picture, of those whose names
are looked for; COCO's instances are such rows. Not here: what makes an answer right (`scoring.py`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualglm_tools.evaluation.objects import Vocabulary, rows_of_coco
from visualglm_tools.evaluation.scoring import HAN, verdict_of, way_of
from visualglm_tools.serving.questions import Problem, Row, read_rows


POPE = {"question_id": "id", "label": "reference"}
SHOWN_COMPLAINTS = 4  # of a file; there may be one for each line


@dataclass(frozen=True)
class Question:
    """A row of an exam.

    Args:
        row: what is asked.
        references: the right answers, at least one; of a caption none.
        kind: what its answer counts for.
        language: of the question.
        objects: all that are in the picture, if a caption is asked for; otherwise None.
    """

    row: Row
    references: tuple[str, ...]
    kind: str
    language: str
    objects: tuple[str, ...] | None = None


def read_exam(path: Path, match: str, vocabulary: Vocabulary | None = None) -> list[Question]:
    """The questions of a file, all of whose lines must be right: an exam is not to become another one unnoticed.

    Raises:
        ValueError: it cannot be read, has no questions, or lines that are none, have no reference or one that cannot be
            compared as `match` says.
    """
    pictures = rows_of_coco(path)
    if pictures is None:
        rows, problems = read_rows(path, from_pope)
    else:
        rows, problems = [Row(number, content) for number, content in enumerate(pictures, 1)], []
    questions = [question_of(row, path.stem, match, vocabulary) for row in rows]
    problems += [each for each in questions if isinstance(each, Problem)]
    if problems:
        raise ValueError(f"{str(path)!r} is no exam: {'; '.join(describe(problems))}")
    if not questions:
        raise ValueError(f'{str(path)!r} has no questions. Write rows of {{"id", "text", "image", "reference"}} to it.')
    return questions


def from_pope(content: Any) -> Any:
    """A row of POPE's with this package's names beside its own; any other as it is."""
    if not isinstance(content, dict) or not POPE.keys() <= content.keys() or "reference" in content:
        return content
    return {**{POPE.get(name, name): value for name, value in content.items()}, **content}


def question_of(row: Row, name: str, match: str, vocabulary: Vocabulary | None) -> Question | Problem:
    """A row with what is said of its answer; the file's name is the kind of those that have none."""
    content = row.content
    try:
        objects = objects_of(content, vocabulary)
        references = references_of(content) if objects is None else ()
        if references:
            way_of(references, match)
        if "label" in content and verdict_of(references) is None:
            raise ValueError(f'"label" must be "yes" or "no", found {content["label"]!r}.')
        kind = text_of(content, "kind") or text_of(content, "category") or name
        language = text_of(content, "language") or language_of(row.question)
        return Question(row, references, kind, language, objects)
    except ValueError as error:
        return Problem.of(row, error)


def references_of(content: dict) -> tuple[str, ...]:
    """The right answers of a row, at least one."""
    found = content.get("reference")
    references = [found] if isinstance(found, str) else found
    is_list = isinstance(references, list) and references
    if not is_list or not all(isinstance(each, str) and each.strip() for each in references):
        raise ValueError(f'"reference" must be the right answer, or a list of such, found {found!r}.')
    return tuple(references)


def objects_of(content: dict, vocabulary: Vocabulary | None) -> tuple[str, ...] | None:
    """The objects in a caption's picture; None for a row that has a reference."""
    found = content.get("objects")
    if found is None or "reference" in content:
        return None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f'"objects" must be a list of the objects in the picture, found {found!r}.')
    if vocabulary is None:
        raise ValueError('"objects" are looked for by their names: give --objects FILE, a line of synonyms for each.')
    if unknown := [each for each in found if vocabulary.object_called(each) is None]:
        raise ValueError(f'"objects" has {unknown[0]!r}, which is none of the names in the file of --objects.')
    return tuple(found)


def text_of(content: dict, name: str) -> str:
    """A field that is a text; "" if it is missing."""
    value = content.get(name)
    if not isinstance(value, (str, type(None))):
        raise ValueError(f'"{name}" must be a text, found {value!r}.')
    return (value or "").strip()


def language_of(text: str) -> str:
    """ "zh" or "en", as a question is written."""
    return "zh" if re.search(f"[{HAN}]", text) else "en"


def describe(problems: Sequence[Problem]) -> Iterator[str]:
    """What is wrong with the first few lines, and with how many more."""
    in_order = sorted(problems, key=lambda problem: problem.number)
    for problem in in_order[:SHOWN_COMPLAINTS]:
        yield f"line {problem.number}: {problem.error}".rstrip(".")
    if len(in_order) > SHOWN_COMPLAINTS:
        yield f"and {len(in_order) - SHOWN_COMPLAINTS} more lines"
