"""The examination of the tiny model on the harder pictures: exact match, and yes or no as POPE counts it.

Small subjects are on a canvas of 1344 x 1344 and come to the model three ways: the whole at 224, a crop from the
canvas that somebody placed who knows where the subject is, and both. Not here: today's scenes (`exam.py`).
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny import pictures, questions, world
from tools.tiny.data import Dialogue
from tools.tiny.lessons import alone_at
from tools.tiny.pictures import CANVAS
from tools.tiny.questions import Exchange


KINDS = (*questions.SIMPLE_KINDS, *(kind for kind in questions.HARD_KINDS if kind not in ("text", "any text")))
LOOKS = ("whole at 224", "oracle's crop", "whole and crop")
COMPARED = ("mixed", "contradicting")


class Paper:
    """Questions with the pictures that they are about; `groups` names the cell of a table for each."""

    def __init__(self):
        self.images: list[Image.Image] = []
        self.dialogues: list[Dialogue] = []
        self.groups: list[tuple[str, ...]] = []

    def show(self, image: Image.Image) -> int:
        self.images.append(image)
        return len(self.images) - 1

    def ask(self, exchange: Exchange, numbers: tuple[int, ...], *group: str) -> None:
        turns = (0,) * len(numbers)
        question, answer = exchange.question, exchange.answer
        self.dialogues.append(Dialogue(exchange.kind, exchange.language, (), question, answer, numbers, turns))
        self.groups.append((*group, exchange.language))


def every_kind(paper: Paper, count: int, seed: int) -> None:
    """Each kind of question once for each mixed and each contradicting picture."""
    for which in COMPARED:
        for number in range(count):
            picture = pictures.sample_picture(number, which, "new")
            shown = (paper.show(picture.draw()),)
            for language in world.LANGUAGES:
                generator = np.random.default_rng((seed, number, 8))
                for kind in filter(lambda kind: questions.can_ask(picture, kind), KINDS):
                    paper.ask(questions.ask(picture, kind, language, generator), shown, "kinds", which, kind)


def yes_or_no(paper: Paper, count: int, seed: int) -> None:
    """POPE's three ways of choosing what is not there; as many questions to be answered with yes as with no."""
    for which in COMPARED:
        for number in range(count):
            picture = pictures.sample_picture(number, which, "new")
            shown = (paper.show(picture.draw()),)
            for strategy in questions.STRATEGIES:
                for language in world.LANGUAGES:
                    generator = np.random.default_rng((seed, number, 9))
                    for exchange in questions.ask_as_pope(picture, language, strategy, generator):
                        paper.ask(exchange, shown, "yes or no", which, strategy)


def small_subjects(paper: Paper, count: int, seed: int) -> None:
    """The colour and the shape of a small subject, in three looks."""
    for number in range(count):
        picture = pictures.sample_picture(number, "small", "new")
        canvas = picture.whole(CANVAS)
        window = pictures.oracle_window(picture.subjects[0])
        box = np.array((window.left, window.top, window.left + window.side, window.top + window.side))
        crop = canvas.crop(tuple(np.round(box * CANVAS / world.IMAGE_SIZE).astype(int).tolist()))
        whole, detail = (paper.show(resize(image)) for image in (canvas, crop))
        looks = dict(zip(LOOKS, ((whole,), (detail,), (whole, detail)), strict=True))
        for language in world.LANGUAGES:
            generator = np.random.default_rng((seed, number, 10))
            for kind in ("colour of", "shape of"):
                exchange = questions.ask_about_one(alone_at(picture, 0), kind, language, generator)
                for look, shown in looks.items():
                    paper.ask(exchange, shown, "small", look, kind)


def written_words(paper: Paper, count: int, seed: int, font: Path | None) -> None:
    """What new words on signs say, read in the prompt or not; Chinese words only where there is a font for them."""
    has_font = bool(font or pictures.find_chinese_font())
    for number in range(count):
        picture = pictures.sample_picture(number, "sign", "new")
        if not (has_font or picture.sign.word.isascii()):
            continue
        shown = (paper.show(picture.draw(font=font)),)
        for language in world.LANGUAGES:
            generator = np.random.default_rng((seed, number, 11))
            paper.ask(questions.ask_text(picture, language, generator), shown, "words", "not read", "all")
            exchange = questions.ask_text(picture, language, generator, picture.sign.word)
            line = questions.reading_line(picture.sign.word, language)
            exchange = Exchange(exchange.kind, language, line + exchange.question, exchange.answer)
            paper.ask(exchange, shown, "words", "read", script_of(picture.sign.word))


def script_of(word: str) -> str:
    return "digits" if word.isdigit() else "Latin" if word.isascii() else "Chinese"


def resize(image: Image.Image) -> Image.Image:
    """As the image processor does it."""
    return image.resize((world.IMAGE_SIZE, world.IMAGE_SIZE), Image.Resampling.BICUBIC)


def write_paper(count: int, seed: int, font: Path | None) -> Paper:
    """Return all questions about `count` pictures of each kind, half as many where each is asked many."""
    paper = Paper()
    every_kind(paper, count // 2, seed)
    yes_or_no(paper, count // 2, seed)
    small_subjects(paper, count, seed)
    written_words(paper, count, seed, font)
    return paper


def mark(paper: Paper, answers: list[str]) -> dict:
    """Return {table: {row: {column: {language: share of exactly right answers}}}}, and "yes" shares where asked."""
    right, said_yes = defaultdict(list), defaultdict(list)
    for group, dialogue, given in zip(paper.groups, paper.dialogues, answers, strict=True):
        right[group].append(given == dialogue.answer)
        if group[0] == "yes or no":
            said_yes[group].append(given == questions.YES_NO[dialogue.language][0][0])
    marks: dict = {}
    for (table, row, column, language), hits in right.items():
        cell = marks.setdefault(table, {}).setdefault(row, {}).setdefault(column, {})
        cell[language] = round(sum(hits) / len(hits), 4)
    for (_, row, column, language), yes in said_yes.items():
        cell = marks.setdefault("yes ratio", {}).setdefault(row, {}).setdefault(column, {})
        cell[language] = round(sum(yes) / len(yes), 4)
    return marks
