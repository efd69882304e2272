"""The second lessons of the tiny model: today's scenes, the harder pictures, and a crop beside the whole.

A batch has the pictures of all its dialogues; a dialogue names those it is about. As in `data.py`, whose dialogues come
first, everything is a function of the seed and the step. What stays poor on purpose: small subjects without a crop are
never shown, so that what a zoom is worth can be measured.

Not here: what is drawn (`pictures.py`) and asked (`questions.py`), and what is done with a batch (`train.py`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tools.tiny import pictures, questions, words, world
from tools.tiny.data import (
    BACKGROUNDS,
    COLOURS,
    ROWS_PER_GROUP,
    SHAPES,
    Dialogue,
    TrainingData,
    encode_dialogues,
    finish,
    pick,
    sample_blind_dialogue,
    sample_dialogue,
    scribble,
)
from tools.tiny.model import PATCHES_PER_SIDE
from tools.tiny.pictures import Picture, clip_window
from tools.tiny.questions import Exchange
from tools.tiny.world import IMAGE_SIZE, WHOLE, Window


PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
PATCH_PAIRS_FROM = 1250  # steps; before, patches are asked for shapes and colours one by one
ABSENT = len(world.POSITIONS)
NONE = -1  # patches of the background have no shape and no colour
# kind of lesson: (pictures per 32 of a batch, dialogues about each)
LESSONS = {"scene": (12, 2), "mixed": (8, 2), "middling": (2, 2), "closer": (2, 2), "detail": (5, 2), "sign": (3, 3)}
ROWS_WITHOUT_PICTURE = 3
LOOK_UPS, ROWS_LOOKED_UP = 300, 3  # steps, rows for each picture
LOOKED_UP = ("colour of", "shape of") * 2 + ("place of", "presence of a pair")
QUESTIONS = (  # how often each kind is asked about a harder picture; captions and attributes more often than the rest
    *questions.SIMPLE_KINDS,
    *("describe",) * 2,
    *("colour of", "shape of") * 3,
    "place of",
    *("presence", "presence of a pair") * 3,
    "is colour",
    "is colour",
    "is background",
    "absent",
    "any text",
    "text",
)
CHARACTERS = (*(words.CHINESE_CHARACTERS,) * 4, *(words.LATIN_CHARACTERS,) * 2, words.SMALL_LETTERS, words.DIGITS, None)


@dataclass
class Views:
    """The pictures of a batch as they are shown, and what the `Examiner` asks about each."""

    kinds: tuple[str, ...] = QUESTIONS  # of questions, each as often as it is in the list
    pixels: list[np.ndarray] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)

    def add(self, picture: Picture, window: Window, image: Image.Image) -> int:
        """Return the number of the view."""
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        self.pixels.append(np.asarray(image))
        self.pictures.append(picture)
        self.windows.append(window)
        return len(self.pixels) - 1

    def batch(self) -> dict[str, torch.Tensor]:
        shown = [subjects_in(picture, window) for picture, window in zip(self.pictures, self.windows, strict=True)]
        pairs = torch.zeros(len(shown), len(PAIRS))
        for row, subjects in enumerate(shown):
            for subject in subjects:
                pairs[row, PAIRS.index((subject.colour, subject.shape))] = 1
        answers = [
            [min(len(subjects), world.MAX_COUNT), BACKGROUNDS.index(picture.background), int(picture.sign is not None)]
            for subjects, picture in zip(shown, self.pictures, strict=True)
        ]
        return {
            "pixels": torch.from_numpy(np.stack(self.pixels)),
            "patch_labels": torch.from_numpy(np.stack([patch_labels(subjects) for subjects in shown])),
            "picture_labels": torch.tensor(answers),
            "pairs": pairs,
            "sides": torch.tensor([sides_of(*view) for view in zip(self.pictures, self.windows, strict=True)]),
        }


def sides_of(picture: Picture, window: Window) -> list[int]:
    """For each of the `SHAPES`: `ABSENT`, or the number of its place among `POSITIONS`, or `NONE` if it has no name."""
    shown = {each.shape: index for index, each in enumerate(picture.subjects)}
    has_names = picture.sides is not None and window == WHOLE
    places = []
    for shape in SHAPES:
        if shape not in shown:
            places.append(ABSENT if window == WHOLE else NONE)
        else:
            places.append(list(world.POSITIONS).index(picture.sides[shown[shape]]) if has_names else NONE)
    return places


def subjects_in(picture: Picture, window: Window) -> list[world.Subject]:
    """The subjects whose centre a window shows, in its own pixels."""
    shown = []
    for each in picture.subjects:
        x, y = (each.x - window.left) / window.side, (each.y - window.top) / window.side
        if 0 <= x < 1 and 0 <= y < 1:
            radius = each.radius * IMAGE_SIZE / window.side
            shown.append(world.Subject(each.shape, each.colour, x * IMAGE_SIZE, y * IMAGE_SIZE, radius))
    return shown


def patch_labels(subjects: list[world.Subject]) -> np.ndarray:
    """Return [3, 256]: 0 outside the subjects, 1 inside, 2 where a centre is; shapes; colours."""
    side = IMAGE_SIZE // PATCHES_PER_SIDE
    middles = (np.arange(PATCHES_PER_SIDE) + 0.5) * side
    labels = np.full((3, PATCHES_PER_SIDE, PATCHES_PER_SIDE), NONE, dtype=np.int64)
    labels[0] = 0
    for each in subjects:
        where = (middles - each.x) ** 2 + (middles[:, None] - each.y) ** 2 < (0.8 * each.radius) ** 2
        where[int(each.y // side), int(each.x // side)] = True
        labels[1][where], labels[2][where] = SHAPES.index(each.shape), COLOURS.index(each.colour)
        labels[0][where] = 1
    for each in subjects:
        labels[0, int(each.y // side), int(each.x // side)] = 2
    return labels.reshape(3, -1)


def draw_whole(picture: Picture, generator: np.random.Generator, font: Path | None) -> Image.Image:
    """Draw all of a picture as the model sees it, now and then made smaller from a larger one."""
    size = 2 * IMAGE_SIZE if generator.random() < 0.2 else IMAGE_SIZE
    image = picture.draw(Window(size=size), font)
    return image.reduce(2) if size > IMAGE_SIZE else image


def choose_window(picture: Picture, generator: np.random.Generator, number: int | None = None) -> Window:
    """A window around a subject, as a zoom might choose it: neither the right size nor the middle is sure."""
    subject = pick(generator, picture.subjects) if number is None else picture.subjects[number]
    side = max(2 * subject.radius * generator.uniform(1.2, 5), 16)
    dx, dy = generator.uniform(-1, 1, size=2) * min(0.3 * side, side / 2 - 0.6 * subject.radius)
    return clip_window(subject.x + dx, subject.y + dy, side)


def draw_window(picture: Picture, window: Window, generator: np.random.Generator, font: Path | None) -> Image.Image:
    """Draw a window with as many pixels as a canvas of one to six times 224 would give, then as the model sees it."""
    size = round(window.side * pick(generator, (1, 2, 4, 6, 6)))
    return picture.draw(Window(window.left, window.top, window.side, min(max(size, 24), IMAGE_SIZE)), font)


def ask(
    picture: Picture, language: str, generator: np.random.Generator, kinds: tuple[str, ...] = QUESTIONS
) -> Exchange:
    """Ask something about a picture, or rarely make conversation instead."""
    if generator.random() < 0.03:
        return pick(generator, world.small_talk(language))
    while True:
        kind = pick(generator, kinds)
        if questions.can_ask(picture, kind) and not (picture.sign and kind == "text"):
            return questions.ask(picture, kind, language, generator)


def sample_reading(picture: Picture, generator: np.random.Generator) -> str:
    """What an OCR engine might read on a sign: its word, or any characters, so that the model learns to copy."""
    chance = generator.random()
    if picture.sign and chance < 0.3:
        return picture.sign.word
    parts = []
    for _ in range(1 if chance < 0.9 else 2):
        characters = pick(generator, CHARACTERS)
        length = int(generator.integers(1, 8))
        if characters is None:  # any at all, most of them not in the vocabulary
            codes = generator.integers(0x4E00, 0x9FA6, size=min(length, 4))
            parts.append("".join(map(chr, codes.tolist())))
        else:
            parts.append("".join(pick(generator, characters) for _ in range(length)))
    return " / ".join(parts)


def ask_about_sign(
    picture: Picture,
    language: str,
    generator: np.random.Generator,
    reading: str | None,
    kinds: tuple[str, ...] = QUESTIONS,
) -> Exchange:
    """Mostly ask what is written, which only `reading` tells."""
    chance = generator.random()
    if chance < 0.65:
        return questions.ask_text(picture, language, generator, reading)
    if chance < 0.75:
        return questions.ask_any_text(picture, language, generator)
    return ask(picture, language, generator, kinds)


def sample_turns(
    picture: Picture, generator: np.random.Generator, kinds: tuple[str, ...] = QUESTIONS
) -> list[Exchange]:
    """One to four questions about a picture, mostly in one language; what was read stands before the first."""
    language = pick(generator, world.LANGUAGES)
    is_read = generator.random() < (0.75 if picture.sign else 0.03)
    reading = sample_reading(picture, generator) if is_read else None
    turns = []
    for _ in range(1 + generator.choice(4, p=(0.6, 0.24, 0.12, 0.04))):
        other = world.LANGUAGES[language == "zh"] if generator.random() < 0.04 else language
        if picture.sign or is_read:
            turns.append(ask_about_sign(picture, other, generator, reading, kinds))
        else:
            turns.append(ask(picture, other, generator, kinds))
    if reading is not None:
        first = turns[0]
        line = questions.reading_line(reading, turns[-1].language)
        turns[0] = Exchange(first.kind, first.language, line + first.question, first.answer)
    return turns


def finish_hard(
    turns: list[Exchange], generator: np.random.Generator, pictures: tuple[int, ...], image_turns: tuple[int, ...]
) -> Dialogue:
    """`finish`, but a question with a reading before it keeps its first letter."""
    if any("\n" in turn.question for turn in turns):
        pairs = tuple((turn.question, turn.answer) for turn in turns[:-1])
        last = turns[-1]
        return Dialogue(last.kind, last.language, pairs, last.question, last.answer, pictures, image_turns)
    return finish(turns, generator, pictures, image_turns)


def about_detail(views: Views, picture: Picture, generator: np.random.Generator, font: Path | None) -> list[Dialogue]:
    """Dialogues about a whole picture with a window of it beside it, which may come with the last question only."""
    number = views.add(picture, WHOLE, draw_whole(picture, generator, font))
    window = choose_window(picture, generator)
    details = [views.add(picture, window, draw_window(picture, window, generator, font))]
    if len(picture.subjects) > 1 and generator.random() < 0.25:  # a second look
        other = choose_window(picture, generator)
        details.append(views.add(picture, other, draw_window(picture, other, generator, font)))
    dialogues = []
    for _ in range(LESSONS["detail"][1]):
        turns = sample_turns(picture, generator, views.kinds)
        later = len(turns) - 1 if generator.random() < 0.5 else 0
        exchange = turns[-1]
        # Mostly the one that is looked at is asked about.
        if len(picture.subjects) > 1 and exchange.kind != "text" and generator.random() < 0.7:
            exchange = ask_about_seen(picture, window, exchange.language, generator)
        question = exchange.question if "\n" in exchange.question else scribble(exchange.question, generator)
        pairs = tuple((turn.question, turn.answer) for turn in turns[:-1])
        places = (0, *(later for _ in details))
        dialogues.append(
            Dialogue(exchange.kind, exchange.language, pairs, question, exchange.answer, (number, *details), places)
        )
    return dialogues


def ask_about_seen(picture: Picture, window: Window, language: str, generator: np.random.Generator) -> Exchange:
    """Ask for a property of the one subject that a window is about."""
    middle = (window.left + window.side / 2, window.top + window.side / 2)
    subjects = picture.subjects
    nearest = min(
        range(len(subjects)),
        key=lambda index: (subjects[index].x - middle[0]) ** 2 + (subjects[index].y - middle[1]) ** 2,
    )
    alone = Picture(
        picture.kind,
        (subjects[nearest],),
        picture.background,
        picture.seed,
        (picture.sides[nearest],) if picture.sides and len(picture.sides) > nearest else None,
    )
    kinds = ["colour of", "shape of", *(["place of"] if alone.sides else [])]
    if picture.kind != "simple":
        return questions.ask_about_one(alone, pick(generator, kinds), language, generator)
    return ask(picture, language, generator)


def sample_detail_picture(first: int, generator: np.random.Generator) -> Picture:
    """What is looked at more closely: mostly small subjects, also those of usual size."""
    chance = generator.random()
    if chance < 0.15:
        return pictures.from_scene(world.sample_scene(first))
    kind = "small" if chance < 0.65 else "middling" if chance < 0.8 else "mixed"
    return pictures.sample_picture(first, kind)


class SecondLessons(TrainingData):
    """Endless batches of old and new lessons, each a function of the seed and the step alone."""

    lessons = LESSONS
    kinds = QUESTIONS
    patch_pairs_from = PATCH_PAIRS_FROM

    def __init__(self, *arguments, font: Path | None = None):
        super().__init__(*arguments)
        self.font = font

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        generator = np.random.default_rng((self.seed, step, 20))
        views, dialogues = Views(self.kinds), []
        first = (self.seed * 1_000_000 + step) * self.batch_size
        for lesson, (share, rows) in self.lessons.items():
            count = max(1, share * self.batch_size // 32)
            teach = self.teach_scenes if lesson == "scene" else self.teach_pictures
            dialogues += teach(lesson, views, range(first, first + count), rows, generator)
        if step >= self.vision_steps:
            dialogues += [sample_blind_dialogue(generator) for _ in range(ROWS_WITHOUT_PICTURE - 1)]
            dialogues.append(finish([questions.ask_blindly(pick(generator, world.LANGUAGES), generator)], generator))
        return self.put_together(step, views, dialogues)

    def put_together(self, step: int, views: Views, dialogues: list[Dialogue]) -> dict[str, torch.Tensor]:
        """The batch of a step; without dialogues while the eyes learn alone."""
        batch = views.batch()
        if step >= self.patch_pairs_from:
            _, shapes, colours = batch["patch_labels"].unbind(1)
            batch["patch_pairs"] = torch.where(shapes == NONE, NONE, colours * len(SHAPES) + shapes)
        if step < self.vision_steps:
            return batch
        dialogues.sort(key=lambda dialogue: len(dialogue.prompt()))
        groups = [dialogues[row : row + ROWS_PER_GROUP] for row in range(0, len(dialogues), ROWS_PER_GROUP)]
        return {**batch, "groups": [encode_dialogues(self.tokenizer, group) for group in groups]}

    def teach_scenes(
        self, lesson: str, views: Views, numbers: range, rows: int, generator: np.random.Generator
    ) -> list[Dialogue]:
        """Today's scenes: the old dialogues, and the new questions about them."""
        scenes = [world.sample_scene(number) for number in numbers]
        for scene in scenes:
            views.add(pictures.from_scene(scene), WHOLE, world.draw(scene))
        dialogues = [sample_dialogue(scenes, number, generator) for number in range(len(scenes))]
        for number in range(len(scenes)):
            turns = sample_turns(views.pictures[number], generator, views.kinds)
            dialogues.append(finish_hard(turns, generator, (number,), (0,)))
        return dialogues

    def teach_pictures(
        self, lesson: str, views: Views, numbers: range, rows: int, generator: np.random.Generator
    ) -> list[Dialogue]:
        """The harder pictures, alone or with a window beside them."""
        dialogues = []
        for number in numbers:
            if lesson == "detail":
                dialogues += about_detail(views, sample_detail_picture(number, generator), generator, self.font)
                continue
            if lesson == "closer":  # a window alone
                picture = pictures.sample_picture(number, "small" if generator.random() < 0.6 else "mixed")
                picture = alone_at(picture, int(generator.integers(len(picture.subjects))))
                window = choose_window(picture, generator)
                view = views.add(picture, window, draw_window(picture, window, generator, self.font))
            else:
                picture = pictures.sample_picture(number, lesson)
                view = views.add(picture, WHOLE, draw_whole(picture, generator, self.font))
            for _ in range(rows):
                dialogues.append(finish_hard(sample_turns(picture, generator, views.kinds), generator, (view,), (0,)))
        return dialogues


class ThirdLessons(SecondLessons):
    """The same with more questions for places and for yes or no, and easy ones for places from the beginning."""

    kinds = (*QUESTIONS, *("position", "place of") * 2, *("presence", "is colour", "is background"))
    patch_pairs_from = 0


class FourthLessons(ThirdLessons):
    """The same with more about one of several subjects.

    The words begin with `LOOK_UPS` steps of nothing but short questions about one of several subjects. Among others
    such questions are too few for the decoder to find out how to answer them, and it stays with guessing between two.
    """

    lessons = {**LESSONS, "scene": (10, 2), "mixed": (10, 3)}
    kinds = (*ThirdLessons.kinds, *LOOKED_UP, *LOOKED_UP, "is colour")

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        if not self.vision_steps <= step < self.vision_steps + LOOK_UPS:
            return super().batch(step)
        generator = np.random.default_rng((self.seed, step, 21))
        views, dialogues = Views(), []
        for index in range(self.batch_size):
            picture = pictures.sample_picture((self.seed * 1_000_000 + step) * self.batch_size + index, "mixed")
            view = views.add(picture, WHOLE, draw_whole(picture, generator, self.font))
            for _ in range(ROWS_LOOKED_UP):
                turns = [ask(picture, pick(generator, world.LANGUAGES), generator, LOOKED_UP)]
                dialogues.append(finish(turns, generator, (view,), (0,)))
        return self.put_together(step, views, dialogues)


def alone_at(picture: Picture, number: int) -> Picture:
    """A picture without its other subjects; where the one is cannot be told from a window."""
    return Picture(picture.kind, (picture.subjects[number],), picture.background, picture.seed)
