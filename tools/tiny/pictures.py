"""The harder pictures of the tiny world: mixed, small, contradicting, and with drawn words.

A `Picture` has subjects of different shapes and colours, and perhaps a sign with a word. It is drawn at any size, and
so is any window of it: the whole as the model sees it (224), as a camera gives it (1344), or what a zoom cuts out. All
follows from a seed. What goes together in training, and what never does, is in `HABITS`, `STRANGERS`, `USUAL` and
`UNUSUAL`: there the model can learn to expect what is not in the picture.

Not here: what is asked about them (`questions.py`), a file with one (`show.py`), and equal shapes (`world.py`).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.tiny import world
from tools.tiny.words import NEW_WORDS, TRAINED_WORDS
from tools.tiny.world import BACKGROUNDS, CLASHES, COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, WHOLE, Subject, Window


CANVAS = 1344  # pixels: the size at which a small subject can be told from its own pixels
SMALLEST, LARGEST_SMALL = 0.003, 0.01  # of the picture: what the square around a small subject takes
MIDDLING = (0.02, 0.06)  # the same for subjects between small and usual

# Shapes that are often in one mixed picture in training, and such as never are.
HABITS = (frozenset({"circle", "star"}), frozenset({"square", "triangle"}), frozenset({"triangle", "heart"}))
STRANGERS = (frozenset({"circle", "heart"}), frozenset({"square", "star"}))
# background: the colour that is most often on it in mixed pictures in training, and the one that never is.
USUAL = {"sky": "red", "grass": "white", "sea": "yellow", "sand": "black", "night": "orange", "paper": "purple"}
UNUSUAL = {"sky": "black", "grass": "purple", "sea": "orange", "sand": "green", "night": "red", "paper": "yellow"}
OFTEN = 4.0  # times as often as others

KINDS = ("mixed", "small", "middling", "contradicting", "sign")
SPLITS = {"training": 0, "new": 1}  # number mixed into the seed: no two splits share a picture
# Fonts with Chinese characters, by the names under which systems have them.
CHINESE_FONTS = ("wqy-zenhei.ttc", "wqy-microhei.ttc", "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc")
PLATES = (("white", (246, 246, 240), (20, 20, 20)), ("blue", (24, 60, 150), (250, 250, 250)))


@dataclass(frozen=True)
class Sign:
    """A plate with a word on it: its centre, width and height in pixels of a drawing of 224 x 224."""

    word: str
    plate: int  # in `PLATES`
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Picture:
    """What a harder picture shows. Without `sides`, nothing is asked about where its subjects are."""

    kind: str
    subjects: tuple[Subject, ...]
    background: str
    seed: tuple[int, ...]
    sides: tuple[str, ...] | None = None  # for each subject, one of `POSITIONS`
    sign: Sign | None = None

    def draw(self, window: Window = WHOLE, font: str | Path | None = None) -> Image.Image:
        """Draw a window of the picture, RGB; `font` is a file with the characters of its sign, see `load_font`."""
        generator = np.random.default_rng((*self.seed, 2))
        image = world.draw_background(self.background, generator, window)
        world.place_subjects(image, self.subjects, generator, window)
        if self.sign is not None:
            draw_sign(image, self.sign, window, font)
        return world.add_noise(image, generator, int(generator.integers(1, 7)))

    def whole(self, size: int = CANVAS, font: str | Path | None = None) -> Image.Image:
        """Draw all of the picture, `size` pixels wide."""
        return self.draw(Window(size=size), font)

    def box(self, subject: Subject, size: int = CANVAS) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the square around a subject, in pixels of a picture `size` wide."""
        scale = size / IMAGE_SIZE
        x, y, radius = subject.x * scale, subject.y * scale, subject.radius * scale
        return (x - radius, y - radius, x + radius, y + radius)


def clip_window(x: float, y: float, side: float, size: int = IMAGE_SIZE) -> Window:
    """A window around a point, moved into the picture where it would lean out, and no larger than it."""
    side = min(side, IMAGE_SIZE)
    left, top = (min(max(0.0, centre - side / 2), IMAGE_SIZE - side) for centre in (x, y))
    return Window(left, top, side, size)


def oracle_window(subject: Subject, size: int = IMAGE_SIZE) -> Window:
    """The window that somebody would choose who knows where the subject is: twice as wide as the subject."""
    return clip_window(subject.x, subject.y, 4 * subject.radius, size)


def load_font(height: float, text: str, font: str | Path | None = None) -> ImageFont.FreeTypeFont:
    """Return a font whose letters are about `height` pixels high: `font`, or Pillow's own, or one of the system's.

    Raises:
        ValueError: the text has Chinese characters and no font at hand has any.
    """
    if font is None and text.isascii():
        return ImageFont.load_default(round(height))
    found = font or find_chinese_font()
    if found is None:
        raise ValueError(
            f"No font with Chinese characters was found for {text!r}. Give one with --font FILE, or install one, such "
            "as Debian's fonts-wqy-zenhei."
        )
    return ImageFont.truetype(str(found), round(height))


@functools.cache
def find_chinese_font() -> str | None:
    """The name of a font of this system that has Chinese characters; None if there is none."""
    for name in CHINESE_FONTS:
        try:
            ImageFont.truetype(name, 10)
        except OSError:
            continue
        return name
    return None


def draw_sign(image: Image.Image, sign: Sign, window: Window, font: str | Path | None = None) -> None:
    """Draw a plate and its word, as large as the plate allows."""
    _, paint, ink = PLATES[sign.plate]
    scale, pencil = window.scale, ImageDraw.Draw(image)
    x, y = (sign.x - window.left) * scale, (sign.y - window.top) * scale
    width, height = sign.width * scale, sign.height * scale
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    pencil.rectangle(box, fill=paint, outline=ink, width=max(1, round(scale)))
    letters = load_font(height * 0.7, sign.word, font)
    room = width * 0.88
    if (length := letters.getlength(sign.word)) > room:
        letters = load_font(height * 0.7 * room / length, sign.word, font)
    pencil.text((x, y), sign.word, fill=ink, font=letters, anchor="mm")


def choose(generator: np.random.Generator, weights: dict[str, float]) -> str:
    """Return a key, each as often as its weight says."""
    names, sizes = list(weights), np.array(list(weights.values()))
    return names[generator.choice(len(names), p=sizes / sizes.sum())]


def choose_shapes(generator: np.random.Generator, count: int) -> list[str]:
    """Return different shapes, as training mixes them: in the usual company, never with a stranger."""
    groups = [
        group
        for group in itertools.combinations(SHAPES, count)
        if not any(frozenset(pair) in STRANGERS for pair in itertools.combinations(group, 2))
    ]
    has_habit = [any(frozenset(pair) in HABITS for pair in itertools.combinations(group, 2)) for group in groups]
    weights = np.where(has_habit, OFTEN, 1.0)
    group = groups[generator.choice(len(groups), p=weights / weights.sum())]
    return [str(shape) for shape in generator.permutation(group)]


def choose_colours(generator: np.random.Generator, background: str, count: int) -> list[str]:
    """Return different colours for a background, as training mixes them."""
    weights = {
        colour: OFTEN if colour == USUAL[background] else 1.0
        for colour in COLOURS
        if (colour, background) not in CLASHES and colour != UNUSUAL[background]
    }
    chosen: list[str] = []
    for _ in range(count):
        chosen.append(choose(generator, {colour: weights[colour] for colour in weights if colour not in chosen}))
    return chosen


def place_apart(
    generator: np.random.Generator, radii: Sequence[float]
) -> tuple[list[tuple[float, float]], tuple[str, ...] | None]:
    """Return centres that keep circles apart, and the side that each is on: two mostly face each other."""
    if len(radii) == 2 and generator.random() < 0.75:
        sides = (("left", "right"), ("top", "bottom"))[generator.integers(2)]
        sides = sides if generator.random() < 0.5 else sides[::-1]
        shifts = generator.uniform(-10, 10, size=(2, 2))
        places = np.array([POSITIONS[side][2:] for side in sides]) + shifts
        return [(x, y) for x, y in places.tolist()], sides
    edge = max(radii) + 6
    while True:
        centres = generator.uniform(edge, IMAGE_SIZE - edge, size=(len(radii), 2)).tolist()
        pairs = itertools.combinations(range(len(radii)), 2)
        if all(math.dist(centres[a], centres[b]) > 1.15 * (radii[a] + radii[b]) for a, b in pairs):
            return centres, None


def make_picture(
    kind: str,
    generator: np.random.Generator,
    seed: tuple[int, ...],
    shapes: Sequence[str],
    colours: Sequence[str],
    background: str,
    radii: Sequence[float],
) -> Picture:
    """Place subjects; a single one is near one of the five `POSITIONS`."""
    if len(shapes) == 1:
        side = str(generator.choice(list(POSITIONS)))
        dx, dy = generator.uniform(-14, 14, size=2).tolist()
        centres, sides = [(POSITIONS[side][2] + dx, POSITIONS[side][3] + dy)], (side,)
    else:
        centres, sides = place_apart(generator, radii)
    subjects = [
        Subject(shape, colour, *centre, radius)
        for shape, colour, centre, radius in zip(shapes, colours, centres, radii, strict=True)
    ]
    return Picture(kind, tuple(subjects), background, seed, sides)


def radius_of(share: float) -> float:
    """The radius of a subject whose square takes this share of a drawing of 224 x 224."""
    return IMAGE_SIZE * math.sqrt(share) / 2


def sample_mixed(generator: np.random.Generator, seed: tuple[int, ...]) -> Picture:
    count = 2 if generator.random() < 0.75 else 3
    background = str(generator.choice(list(BACKGROUNDS)))
    low, high = (24, 38) if count == 2 else (22, 32)
    radii = generator.uniform(low, high, size=count).tolist()
    shapes, colours = choose_shapes(generator, count), choose_colours(generator, background, count)
    return make_picture("mixed", generator, seed, shapes, colours, background, radii)


def sample_small(
    generator: np.random.Generator,
    seed: tuple[int, ...],
    kind: str = "small",
    shares: tuple[float, float] = (SMALLEST, LARGEST_SMALL),
) -> Picture:
    """One or two subjects that take little of the picture."""
    count = 1 if generator.random() < 0.6 else 2
    background = str(generator.choice(list(BACKGROUNDS)))
    radii = [radius_of(math.exp(generator.uniform(*map(math.log, shares)))) for _ in range(count)]
    shapes, colours = choose_shapes(generator, count), choose_colours(generator, background, count)
    return make_picture(kind, generator, seed, shapes, colours, background, radii)


def sample_middling(generator: np.random.Generator, seed: tuple[int, ...]) -> Picture:
    return sample_small(generator, seed, "middling", MIDDLING)


def sample_contradicting(generator: np.random.Generator, seed: tuple[int, ...]) -> Picture:
    """Two strangers, one of them in the colour that is never on this background in training."""
    background = str(generator.choice(list(BACKGROUNDS)))
    pair = sorted(STRANGERS[generator.integers(len(STRANGERS))])
    shapes = [str(shape) for shape in generator.permutation(pair)]
    other = [
        colour
        for colour in COLOURS
        if (colour, background) not in CLASHES and colour not in (USUAL[background], UNUSUAL[background])
    ]
    colours = [UNUSUAL[background], str(generator.choice(other))]
    radii = generator.uniform(24, 38, size=2).tolist()
    return make_picture("contradicting", generator, seed, shapes, colours, background, radii)


def sample_sign(generator: np.random.Generator, seed: tuple[int, ...]) -> Picture:
    """One subject, and above, below or beside it a plate with a word."""
    words = NEW_WORDS if seed[1] == SPLITS["new"] else TRAINED_WORDS
    script = words[generator.choice(list(words))]
    word = str(script[generator.integers(len(script))])
    background = str(generator.choice(list(BACKGROUNDS)))
    side = ("top", "bottom")[generator.integers(2)]
    place = POSITIONS["bottom" if side == "top" else "top"]
    dx, dy = generator.uniform(-10, 10, size=2).tolist()
    width, height = generator.uniform(110, 180), generator.uniform(42, 56)
    sign = Sign(word, int(generator.integers(len(PLATES))), place[2] + dx, place[3] + dy, width, height)
    dx, dy = generator.uniform(-10, 10, size=2).tolist()
    shape, (colour,) = str(generator.choice(list(SHAPES))), choose_colours(generator, background, 1)
    subject = Subject(shape, colour, POSITIONS[side][2] + dx, POSITIONS[side][3] + dy, generator.uniform(28, 38))
    return Picture("sign", (subject,), background, seed, (side,), sign)


SAMPLERS = {
    "mixed": sample_mixed,
    "small": sample_small,
    "middling": sample_middling,
    "contradicting": sample_contradicting,
    "sign": sample_sign,
}


def sample_picture(number: int, kind: str = "mixed", split: str = "training") -> Picture:
    """Return picture `number` of a kind and a split ("training" or "new").

    Raises:
        ValueError: there is no such kind or split.
    """
    for value, known in ((kind, SAMPLERS), (split, SPLITS)):
        if value not in known:
            raise ValueError(f"There is no {value!r}; choose one of {', '.join(known)}.")
    seed = (10 + KINDS.index(kind), SPLITS[split], number)
    generator = np.random.default_rng(seed)
    while True:
        picture = SAMPLERS[kind](generator, seed)
        if kind == "contradicting" or not has_held_out(picture):
            return picture


def has_held_out(picture: Picture) -> bool:
    """Whether a subject is of a combination that is kept from training, see `world.is_held_out`."""
    return any(world.is_held_out(each.shape, each.colour, picture.background) for each in picture.subjects)


def from_scene(scene: world.Scene) -> Picture:
    """One of today's scenes of equal shapes, to look at more closely."""
    return Picture(
        "simple", scene.subjects, scene.background, scene.seed, (scene.position,) if scene.position else None
    )
