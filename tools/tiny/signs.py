"""Signs to be read: pictures with a word in each, an exam about them, and how many RapidOCR itself reads.

    python -m tools.tiny.signs /tmp/signs --font /usr/share/fonts/truetype/wqy/wqy-zenhei.ttc --read
    visualglm evaluate /tmp/signs/exam.jsonl /tmp/signs/plain.jsonl --model FOLDER --match contains
    visualglm evaluate /tmp/signs/exam.jsonl /tmp/signs/read.jsonl --model FOLDER --match contains --read-text \\
        --against /tmp/signs/plain.jsonl

Words are Chinese, Latin and digits, in any colour, on any other, level or a little turned, from 3 % to a sixth of a
canvas' height, on canvases from 224 to 1,344 pixels a side. Everything follows from the seed. Half of the questions are
Chinese. Of ten pictures one has no word: there, the two answers must be the same. Not here: how answers are judged.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.tiny.questions import TEXT
from tools.tiny.world import COLOURS
from visualglm_hf.text_in_pictures import read_picture
from visualglm_tools.evaluation.scoring import contains, normalise
from visualglm_tools.evaluation.statistics import wilson_interval
from visualglm_tools.options import COUNT, COUNT_OR_NONE, argument, option, parse
from visualglm_tools.printing import report


WORDS = {
    "chinese": (
        "出口",
        "入口",
        "停车场",
        "禁止吸烟",
        "小心地滑",
        "请勿入内",
        "营业中",
        "洗手间",
        "图书馆",
        "地铁站",
        "药店",
        "邮局",
    ),
    "latin": ("EXIT", "STOP", "OPEN", "Parking", "Library", "Bakery", "Hotel", "TAXI", "Cinema", "School"),
    "digits": ("24", "108", "2026", "60", "315", "7402"),
}
QUESTIONS = {language: wordings[0] for language, wordings in TEXT.items()}  # which the tiny model has learned
NO_WORD = {"zh": "描述这张图片。", "en": "Describe the image."}
SIDES = (224, 448, 896, 1344)  # pixels
HEIGHTS = (0.03, 1 / 6)  # of a word, of the canvas' height
SMALLEST = 12  # pixels
TURN = 12  # degrees to either side
CONTRAST = 200  # sum of the differences of red, green and blue


@dataclass(frozen=True)
class Sign:
    """A picture, the word in it, "" for none, and what kind of word it is."""

    picture: Image.Image
    word: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = argument("where the pictures and exam.jsonl are written", metavar="FOLDER")
    font: Path = option("a font with Chinese, such as of fonts-wqy-zenhei", metavar="FILE")
    count: int = option("pictures", 200, parse=COUNT, metavar="N")
    seed: int = option("from which everything follows", 0, parse=COUNT_OR_NONE, metavar="N")
    read: bool = option("let RapidOCR read them and count what it gets right", False)


def draw_sign(generator: np.random.Generator, font: Path, kind: str) -> Sign:
    """A word of this kind somewhere in a picture; of another kind than `WORDS` has, none."""
    side = int(generator.choice(SIDES))
    ground, ink = pick_colours(generator)
    word = str(generator.choice(WORDS[kind])) if kind in WORDS else ""
    height = max(SMALLEST, round(side * generator.uniform(*HEIGHTS)))
    face = ImageFont.truetype(str(font), height)
    while face.getlength(word) > 0.8 * side:
        height -= 1
        face = ImageFont.truetype(str(font), height)
    picture = Image.new("RGB", (side, side), ground)
    margin = face.getlength(word) / 2 + height
    x, y = (generator.uniform(margin, side - margin) if 2 * margin < side else side / 2 for _ in range(2))
    ImageDraw.Draw(picture).text((x, y), word, ink, face, anchor="mm")
    angle = float(generator.uniform(-TURN, TURN))
    return Sign(picture.rotate(angle, Image.Resampling.BICUBIC, center=(x, y), fillcolor=ground), word, kind)


def pick_colours(generator: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of the ground and of the word, that can be told apart."""
    colours = [rgb for _, rgb in COLOURS.values()]
    while True:
        first, second = generator.choice(len(colours), 2, replace=False)
        ground, ink = colours[first], colours[second]
        if sum(abs(one - other) for one, other in zip(ground, ink, strict=True)) >= CONTRAST:
            return ground, ink


def make_exam(options: Options) -> list[Sign]:
    """Draw the signs, and write their pictures and the questions about them."""
    generator = np.random.default_rng(options.seed)
    kinds = ["none", *(kind for kind in WORDS for _ in range(3))]
    signs = [draw_sign(generator, options.font, kinds[number % len(kinds)]) for number in range(options.count)]
    options.folder.mkdir(parents=True, exist_ok=True)
    with open(options.folder / "exam.jsonl", "w", encoding="utf-8") as file:
        for number, sign in enumerate(signs):
            name = f"{number}.png"
            sign.picture.save(options.folder / name)
            language = ("zh", "en")[number // len(kinds) % 2]
            asked = (QUESTIONS if sign.word else NO_WORD)[language]
            row = {"id": number, "text": asked, "image": name, "reference": sign.word or "-", "kind": sign.kind}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return signs


def count_read(signs: Sequence[Sign]) -> list[str]:
    """A line for each kind: how many signs are read right, or have nothing read in them if there is nothing."""
    right, total = Counter(), Counter()
    for sign in signs:
        read = normalise(read_picture(sign.picture, len))
        right[sign.kind] += contains(read, normalise(sign.word)) if sign.word else not read
        total[sign.kind] += 1
    lines = []
    for kind, number in total.items():
        low, high = wilson_interval(right[kind], number)
        share = right[kind] / number
        lines.append(f"{kind}: {right[kind]} of {number}, {share:.1%} (95 %: {low:.1%} to {high:.1%})")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(Options, argv, "python -m tools.tiny.signs", __doc__)
    try:
        signs = make_exam(options)
        print("\n".join(count_read(signs)) if options.read else f"{len(signs)} signs are in {options.folder}.")
    except (ValueError, OSError) as error:
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
