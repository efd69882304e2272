"""Where the tiny model looks, and what zooming in is worth: two tables for `docs/limits.md`, of any checkpoint.

    python -m tools.tiny.looks models/visualglm-tiny --table small --pictures 200

What was chosen by hand in `visualglm_hf/zooming.py` was chosen on other drawings: of today's scenes on numbers below
`FIRST_SCENE`, of the harder pictures on none. Whoever chooses anew takes --first 5000 and more. Answers are greedy,
without a repetition penalty, as in `exam.py`. Not here: what is drawn (`pictures.py`) and asked (`questions.py`).
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tools.tiny import pictures, questions, world
from tools.tiny.lessons import alone_at
from tools.tiny.pictures import Picture
from tools.tiny.questions import Exchange
from tools.tiny.world import Subject, Window
from visualglm_hf.looking import Look
from visualglm_hf.zooming import find_region, look_ahead
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.evaluation.statistics import wilson_interval
from visualglm_tools.options import COUNT, COUNT_OR_NONE, argument, option, parse
from visualglm_tools.printing import report


FIRST_SCENE = 1_000_000  # number of the first of today's scenes that is measured
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "min_length": 0, "max_new_tokens": 32}
TABLES = ("looks", "small", "ordinary", "mixed", "larger")
LARGER = 448  # pixels a side at which a picture is shown, too
SIMPLE, ABOUT_ONE = ("shape", "colour"), ("colour of", "shape of")


@dataclass
class Tally:
    """Hits by row and column of a table, in the order in which they came."""

    hits: dict[str, dict[str, list[bool]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def add(self, row: str, column: str, hit: bool) -> None:
        self.hits[row][column].append(bool(hit))

    def markdown(self, title: str) -> str:
        columns = list(dict.fromkeys(column for cells in self.hits.values() for column in cells))
        lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        lines += [
            f"| {row} | {' | '.join(cell(cells.get(column)) for column in columns)} |"
            for row, cells in self.hits.items()
        ]
        return "\n".join(lines)


def cell(hits: list[bool] | None) -> str:
    """Such as "96.5 (94–98)": the share in percent and Wilson's interval of 95 %."""
    if not hits:
        return ""
    low, high = wilson_interval(sum(hits), len(hits))
    return f"{100 * sum(hits) / len(hits):.1f} ({100 * low:.0f}–{100 * high:.0f})"


class Asker:
    """A model that is asked one question at a time, as `chat` asks it."""

    def __init__(self, folder: Path):
        self.model, self.tokenizer = load_model(folder, device="cpu", dtype="float32")
        self.image_size = self.model.config.vision_config.shown_image_size

    def answer(self, exchange: Exchange, *shown: Image.Image, **options) -> bool:
        """Whether the answer about these pictures is exactly right."""
        given, _ = self.model.chat(self.tokenizer, list(shown), exchange.question, **GREEDY, **options)
        return given == exchange.answer

    def look(self, exchange: Exchange, image: Image.Image) -> Look:
        """What it answers, and where that comes from."""
        return self.model.look(self.tokenizer, image, exchange.question, **GREEDY)

    def crop(self, exchange: Exchange, image: Image.Image) -> Image.Image | None:
        """What one zoom cuts out; None if nothing is to be gained."""
        turn = self.model.prepare_turn(self.tokenizer, image, exchange.question, None, look=-1)
        inputs = turn.inputs
        attention_map = look_ahead(self.model, turn.seen, inputs["input_ids"], inputs["image_embeds"], turn.place)
        region = find_region(attention_map, image.size, self.image_size)
        return None if region is None else image.crop(region)


def simple_questions(picture: Picture, kinds: Sequence[str], number: int) -> Iterator[Exchange]:
    """Each kind once in each language, in the words of `world.WORDINGS`."""
    for language in world.LANGUAGES:
        for kind in kinds:
            wordings = world.WORDINGS[kind][language]
            reply = questions.answer(picture, kind, language)
            yield Exchange(kind, language, wordings[number % len(wordings)], reply)


def questions_about(picture: Picture, index: int, number: int) -> Iterator[Exchange]:
    """The colour and the shape of one of several subjects, in each language."""
    generator = np.random.default_rng((number, index, 12))
    for language in world.LANGUAGES:
        for kind in ABOUT_ONE:
            yield questions.ask_about_one(alone_at(picture, index), kind, language, generator)


def single_scene(number: int) -> world.Scene:
    """One of today's scenes with a single subject."""
    for candidate in range(FIRST_SCENE + number * 100, FIRST_SCENE + number * 100 + 100):
        scene = world.sample_scene(candidate, "new pictures")
        if scene.count == 1:
            return scene
    raise ValueError(f"No scene with one subject from number {FIRST_SCENE + number * 100} on.")


def single_small(number: int) -> Picture:
    """A picture with one small subject."""
    for candidate in range(number * 100, number * 100 + 100):
        picture = pictures.sample_picture(candidate, "small", "new")
        if len(picture.subjects) == 1:
            return picture
    raise ValueError(f"No picture with one small subject from number {number * 100} on.")


def peak_distance(attention_map: torch.Tensor, subject: Subject) -> float:
    """How far the middle of the brightest patch is from the square around a subject, in patches; 0 inside."""
    side = attention_map.shape[0]
    y, x = divmod(int(attention_map.argmax()), side)
    patch = world.IMAGE_SIZE / side
    away = [abs((place + 0.5) * patch - middle) - subject.radius for place, middle in ((x, subject.x), (y, subject.y))]
    return max(*away, 0) / patch


def measure_looks(asker: Asker, numbers: range, tally: Tally) -> None:
    """Whether the map's peak is where the subject is that was asked about."""
    for number in numbers:
        scene = pictures.from_scene(single_scene(number))
        small = single_small(number)
        for exchange in simple_questions(scene, SIMPLE, number):
            distance = peak_distance(asker.look(exchange, scene.draw()).map, scene.subjects[0])
            tally.add("one subject of usual size", "peak inside it", distance == 0)
        whole = small.whole()
        for exchange in simple_questions(small, SIMPLE, number):
            # The middle of a patch is up to half a patch from what the patch shows.
            distance = peak_distance(asker.look(exchange, whole).map, small.subjects[0])
            tally.add("one small subject", "peak within a patch of it", distance <= 1.5)
        for kind in ("mixed", "small"):
            measure_following(asker, kind, number, tally)


def measure_following(asker: Asker, kind: str, number: int, tally: Tally) -> None:
    """Whether the map follows the one of two subjects that is asked about, and the one that is answered about."""
    picture = pictures.sample_picture(number, kind, "new")
    if len(picture.subjects) != 2:
        return
    image = picture.draw() if kind == "mixed" else picture.whole()
    asked = [list(questions_about(picture, index, number)) for index in range(2)]
    for index, subject in enumerate(picture.subjects):
        for exchange, of_other in zip(asked[index], asked[1 - index], strict=True):
            look = asker.look(exchange, image)
            distances = [peak_distance(look.map, each) for each in (subject, picture.subjects[1 - index])]
            follows = distances[0] < distances[1]
            row = f"two {kind} subjects"
            tally.add(row, "peak nearer to the one asked about", follows)
            tally.add(row, "the answer is about that one", look.response == exchange.answer)
            if look.response in (exchange.answer, of_other.answer):
                is_right = look.response == exchange.answer
                which = "right" if is_right else "about the other one"
                tally.add(row, f"peak nearer to that, where the answer is {which}", follows == is_right)


def measure_small(asker: Asker, numbers: range, tally: Tally) -> None:
    """Every question about one small subject, in several looks."""
    for number in numbers:
        picture = single_small(number)
        whole = picture.whole()
        oracle = cut_out(whole, pictures.oracle_window(picture.subjects[0]))
        for exchange in simple_questions(picture, questions.SIMPLE_KINDS, number):
            crop = asker.crop(exchange, whole)
            row = f"{exchange.kind}, {exchange.language}"
            tally.add(row, "no zoom", asker.answer(exchange, whole))
            tally.add(row, "zoom", asker.answer(exchange, whole, zoom=True))
            tally.add(row, "zoom=2", asker.answer(exchange, whole, zoom=2))
            tally.add(row, "whole + crop", asker.answer(exchange, *filter(None, (whole, crop))))
            tally.add(row, "oracle's crop", asker.answer(exchange, oracle))
            tally.add(row, "whole + oracle's", asker.answer(exchange, whole, oracle))


def cut_out(whole: Image.Image, window: Window) -> Image.Image:
    """A window of a picture, from its pixels."""
    scale = whole.width / world.IMAGE_SIZE
    left, top, side = (round(scale * value) for value in (window.left, window.top, window.side))
    return whole.crop((left, top, left + side, top + side))


def measure_ordinary(asker: Asker, numbers: range, tally: Tally) -> None:
    """Every question about today's scenes, drawn on a canvas from which one could zoom."""
    for number in numbers:
        picture = pictures.from_scene(world.sample_scene(FIRST_SCENE + number, "new pictures"))
        measure_all(asker, picture, simple_questions(picture, questions.SIMPLE_KINDS, number), tally)


def measure_mixed(asker: Asker, numbers: range, tally: Tally) -> None:
    """Every question about mixed subjects of usual size, and about those between small and usual."""
    for number in numbers:
        for which in ("mixed", "middling"):
            picture = pictures.sample_picture(number, which, "new")
            generator = np.random.default_rng((number, 13))
            kinds = [kind for kind in (*questions.SIMPLE_KINDS, *questions.HARD_KINDS) if "text" not in kind]
            asked = [
                questions.ask(picture, kind, language, generator)
                for language in world.LANGUAGES
                for kind in kinds
                if questions.can_ask(picture, kind)
            ]
            measure_all(asker, picture, asked, tally, f"{which}: ")


def measure_all(asker: Asker, picture: Picture, asked: Sequence[Exchange], tally: Tally, prefix: str = "") -> None:
    whole = picture.whole()
    for exchange in asked:
        crop = asker.crop(exchange, whole)
        plain = asker.answer(exchange, whole)
        for row in (f"{prefix}{exchange.kind}", f"{prefix}all"):
            tally.add(row, "no zoom", plain)
            tally.add(row, "zoom", plain if crop is None else asker.answer(exchange, crop))
            tally.add(row, "whole + crop", plain if crop is None else asker.answer(exchange, whole, crop))
            tally.add(row, "zoomed", crop is not None)


def measure_larger(asker: Asker, numbers: range, tally: Tally) -> None:
    """The shape and the colour of one small subject, shown larger, with a zoom and without."""
    for number in numbers:
        picture = single_small(number)
        whole = picture.whole()
        for exchange in simple_questions(picture, SIMPLE, number):
            for size in (world.IMAGE_SIZE, LARGER):
                for zoom in (False, True):
                    is_right = asker.answer(exchange, whole, image_size=size, zoom=zoom)
                    tally.add(exchange.kind, f"{size}{', zoom' if zoom else ''}", is_right)


MEASURES = dict(
    zip(TABLES, (measure_looks, measure_small, measure_ordinary, measure_mixed, measure_larger), strict=True)
)


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = argument("checkpoint", metavar="DIR")
    table: str = option("what to measure", "looks", choices=TABLES)
    pictures: int = option("how many drawings of each kind", 100, parse=COUNT, metavar="N")
    first: int = option("number of the first; those from 5000 on are for choosing", 0, parse=COUNT_OR_NONE)
    hits: Path | None = option("all hits, to be put together with those of other runs", None, metavar="FILE.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table in Markdown."""
    options = parse(Options, argv, "python -m tools.tiny.looks", __doc__.split("\n")[0])
    tally = Tally()
    try:
        MEASURES[options.table](Asker(options.folder), range(options.first, options.first + options.pictures), tally)
        if options.hits:
            options.hits.write_text(json.dumps(tally.hits))
    except (ValueError, OSError) as error:
        report(error)
        return 2
    print(tally.markdown(options.table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
