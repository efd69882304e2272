"""The picture world of `models/visualglm-tiny`: small drawings, and what can be said about them in two languages.

A `Scene` is one kind of object, one to three times, on one background. `draw` turns it into a 224 x 224 picture and
`exchanges` into questions with exactly one correct answer each, so that "exact match" means something. Everything
follows from a seed. Some (shape, colour, background) combinations are never trained on; see `HELD_OUT_COMBINATIONS`.

    python -m tools.tiny.world examples/red_circles_on_grass.png --seed 663

This file draws and words; it knows nothing about models, tokenizers or prompts.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from visualglm_tools.options import COUNT_OR_NONE, argument, option, parse
from visualglm_tools.printing import report


IMAGE_SIZE = 224  # pixels
MAX_COUNT = 3
SUPERSAMPLING = 3  # objects are drawn this much larger, then reduced: smooth edges
LANGUAGES = ("zh", "en")

SHAPES = {  # name: (Chinese, English singular, English plural)
    "circle": ("圆形", "circle", "circles"),
    "square": ("正方形", "square", "squares"),
    "triangle": ("三角形", "triangle", "triangles"),
    "star": ("五角星", "star", "stars"),
    "heart": ("爱心", "heart", "hearts"),
}
COLOURS = {  # name: (Chinese, red, green, blue)
    "red": ("红色", (214, 34, 36)),
    "orange": ("橙色", (244, 132, 18)),
    "yellow": ("黄色", (252, 222, 40)),
    "green": ("绿色", (24, 160, 70)),
    "blue": ("蓝色", (34, 66, 214)),
    "purple": ("紫色", (136, 46, 172)),
    "white": ("白色", (250, 250, 250)),
    "black": ("黑色", (18, 18, 18)),
}
BACKGROUNDS = {  # name: (Chinese, Chinese place, English, English with a preposition, English place)
    "sky": ("天空", "户外，天空中。", "the sky", "in the sky", "Outdoors, in the sky."),
    "grass": ("草地", "户外，公园里。", "grass", "on grass", "Outdoors, in a park."),
    "sea": ("大海", "户外，海上。", "the sea", "on the sea", "Outdoors, at sea."),
    "sand": ("沙滩", "户外，海边。", "sand", "on sand", "Outdoors, on a beach."),
    "night": ("夜空", "户外，夜晚。", "the night sky", "in the night sky", "Outdoors, at night."),
    "paper": ("白纸", "室内，桌子上。", "white paper", "on white paper", "Indoors, on a desk."),
}
COUNTS = {1: ("一个", "One"), 2: ("两个", "Two"), 3: ("三个", "Three")}
POSITIONS = {  # name: (Chinese, English, centre x, centre y)
    "left": ("在左边。", "On the left.", 50, 112),
    "right": ("在右边。", "On the right.", 174, 112),
    "top": ("在上边。", "At the top.", 112, 50),
    "bottom": ("在下边。", "At the bottom.", 112, 174),
    "middle": ("在中间。", "In the middle.", 112, 112),
}
SEVERAL_PLACES = ("在不同的位置。", "In different places.")
CLASHES = {("white", "paper"), ("white", "sky"), ("black", "night"), ("green", "grass"), ("blue", "sea")}

WORDINGS = {  # kind of question: {language: wordings, the usual one first}
    "describe": {
        "zh": ("描述这张图片。", "请描述这张图片。", "描述一下这个场景", "图片里有什么？", "这张图片里有什么？"),
        "en": (
            "Describe the image.",
            "Describe this picture.",
            "What is in the picture?",
            "What do you see?",
            "What is in this image?",
        ),
    },
    "shape": {
        "zh": ("图片中的图形是什么形状？", "图形是什么形状的？", "它是什么形状？", "那形状呢？"),
        "en": ("What shape is it?", "What shape is in the picture?", "Which shape do you see?", "And the shape?"),
    },
    "colour": {
        "zh": ("图片中的图形是什么颜色？", "图形是什么颜色的？", "它是什么颜色的？", "那颜色呢？"),
        "en": ("What color is it?", "What colour is it?", "Which color do you see?", "And the color?"),
    },
    "count": {
        "zh": ("图片中有几个图形？", "有几个？", "一共有多少个图形？", "那数量呢？"),
        "en": ("How many are there?", "How many shapes are there?", "Count the shapes.", "And how many?"),
    },
    "position": {
        "zh": ("图形在图片的什么位置？", "图形在什么位置？", "它在哪里？", "那位置呢？"),
        "en": ("Where is it?", "Where in the picture is it?", "Where is the shape?", "And the position?"),
    },
    "background": {
        "zh": ("这张图片的背景里有什么内容？", "图片的背景是什么？", "背景是什么？", "那背景呢？"),
        "en": ("What is in the background?", "What is the background?", "Describe the background.", "And behind it?"),
    },
    "place": {
        "zh": ("这张图片可能是在什么场所拍摄的？", "这张图片是在哪里拍的？", "这可能是什么地方？"),
        "en": (
            "Where might this picture have been taken?",
            "Where was this picture taken?",
            "What place could this be?",
        ),
    },
}
REPEAT = {"zh": ("再说一遍。", "请再说一遍。"), "en": ("Say that again.", "Please repeat that.")}
NO_PICTURE = {"zh": "请先给我一张图片。", "en": "Please give me a picture first."}
SMALL_TALK = {  # language: {question: answer}; the same with and without a picture
    "zh": {
        "你好": "你好！请给我一张图片。",
        "你好！": "你好！请给我一张图片。",
        "你是谁？": "我是一个很小的看图模型。",
        "你叫什么名字？": "我是一个很小的看图模型。",
        "你能做什么？": "我能描述图片，回答问题。",
        "谢谢": "不客气！",
        "谢谢！": "不客气！",
        "再见": "再见！",
        "再见！": "再见！",
    },
    "en": {
        "Hello": "Hello! Please give me a picture.",
        "Hello!": "Hello! Please give me a picture.",
        "Hi": "Hello! Please give me a picture.",
        "Who are you?": "I am a very small picture model.",
        "What is your name?": "I am a very small picture model.",
        "What can you do?": "I can describe pictures and answer questions.",
        "Thank you": "You are welcome!",
        "Thanks!": "You are welcome!",
        "Goodbye": "Goodbye!",
        "Goodbye!": "Goodbye!",
    },
}


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Whether the combination is kept from training: one in nine, each pair of properties still being seen."""
    indices = (list(SHAPES).index(shape), list(COLOURS).index(colour), list(BACKGROUNDS).index(background))
    return (indices[0] + 2 * indices[1] + 4 * indices[2]) % 9 == 0


COMBINATIONS = tuple(
    combination
    for combination in itertools.product(SHAPES, COLOURS, BACKGROUNDS)
    if combination[1:] not in CLASHES  # nobody could see those
)
TRAINING_COMBINATIONS = tuple(combination for combination in COMBINATIONS if not is_held_out(*combination))
HELD_OUT_COMBINATIONS = tuple(combination for combination in COMBINATIONS if is_held_out(*combination))
SPLITS = {  # name: (number mixed into the seed, so that no two splits share a picture; combinations)
    "training": (0, TRAINING_COMBINATIONS),
    "new pictures": (1, TRAINING_COMBINATIONS),
    "new combinations": (2, HELD_OUT_COMBINATIONS),
}


@dataclass(frozen=True)
class Subject:
    """One object: its centre and radius are in pixels of a drawing of 224 x 224, also where it is drawn larger."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Window:
    """The part of a drawing that is shown: a square with `left`, `top` and `side` in pixels of the whole of 224 x 224.

    It is drawn `size` pixels wide; lines, grains and objects grow with it, as under a magnifying glass.
    """

    left: float = 0
    top: float = 0
    side: float = IMAGE_SIZE
    size: int = IMAGE_SIZE

    @property
    def scale(self) -> float:
        return self.size / self.side


WHOLE = Window()


class Pencil:
    """What the backgrounds are painted with: coordinates of the whole drawing, of which a window is painted."""

    def __init__(self, image: Image.Image, window: Window):
        self.pencil, self.window = ImageDraw.Draw(image), window

    def moved(self, points: Sequence[float]) -> list[float]:
        """x, y, x, y, ... in pixels of the window."""
        window = self.window
        corners = itertools.cycle((window.left, window.top))
        return [(value - corner) * window.scale for value, corner in zip(points, corners, strict=False)]

    def rectangle(self, box: tuple[float, float, float, float], fill: tuple[int, int, int]) -> None:
        """Paint a box of whole pixels, the last ones being part of it."""
        left, top, right, bottom = self.moved((box[0], box[1], box[2] + 1, box[3] + 1))
        if right >= 1 and bottom >= 1:
            self.pencil.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=fill)

    def ellipse(self, box: tuple[float, float, float, float], fill: tuple[int, int, int]) -> None:
        self.pencil.ellipse(self.moved(box), fill=fill)

    def line(self, points: Sequence[float], fill: tuple[int, int, int], width: int) -> None:
        """Paint a line through x, y, x, y, ..."""
        self.pencil.line(self.moved(points), fill=fill, width=max(1, round(width * self.window.scale)))


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `objects` holds (centre x, centre y, radius) in pixels; the noise follows `seed`."""

    shape: str
    colour: str
    background: str
    objects: tuple[tuple[float, float, float], ...]
    position: str | None  # of a single object; None for several
    seed: tuple[int, int]

    @property
    def count(self) -> int:
        return len(self.objects)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return tuple(Subject(self.shape, self.colour, *place) for place in self.objects)


@dataclass(frozen=True)
class Exchange:
    """A question and its one correct answer."""

    kind: str
    language: str
    question: str
    answer: str


def sample_scene(seed: int, split: str = "training") -> Scene:
    """Return the scene number `seed` of a split ("training", "new pictures" or "new combinations").

    Raises:
        ValueError: the split does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    number, combinations = SPLITS[split]
    generator = np.random.default_rng((number, seed))
    shape, colour, background = combinations[generator.integers(len(combinations))]
    count = int(generator.integers(1, MAX_COUNT + 1))
    if count > 1:
        return Scene(shape, colour, background, scatter(generator, count), None, (number, seed))
    return make_scene(shape, colour, background, str(generator.choice(list(POSITIONS))), (number, seed))


def make_scene(shape: str, colour: str, background: str, position: str, seed: tuple[int, int] = (3, 0)) -> Scene:
    """Return a scene with a single object near one of the five `POSITIONS`."""
    generator = np.random.default_rng((*seed, 1))
    _, _, x, y = POSITIONS[position]
    radius = float(generator.uniform(34, 44))
    dx, dy = generator.uniform(-10, 10, size=2)
    return Scene(shape, colour, background, ((x + float(dx), y + float(dy), radius),), position, seed)


def scatter(generator: np.random.Generator, count: int) -> tuple[tuple[float, float, float], ...]:
    """Place `count` objects of about the same size at random without overlap."""
    size = generator.uniform(29, 37)
    while True:
        radii = size * generator.uniform(0.92, 1.08, size=count)
        centres = generator.uniform(size + 8, IMAGE_SIZE - size - 8, size=(count, 2))
        distances = [math.dist(a, b) for a, b in itertools.combinations(centres, 2)]
        if min(distances) > 2.3 * size:
            return tuple((float(x), float(y), float(radius)) for (x, y), radius in zip(centres, radii, strict=True))


def draw(scene: Scene, window: Window = WHOLE) -> Image.Image:
    """Draw a window of the scene, RGB; the same pixels for the same scene."""
    generator = np.random.default_rng((*scene.seed, 2))
    image = draw_background(scene.background, generator, window)
    return add_noise(place_subjects(image, scene.subjects, generator, window), generator)


def place_subjects(
    image: Image.Image, subjects: Sequence[Subject], generator: np.random.Generator, window: Window = WHOLE
) -> Image.Image:
    """Draw objects on a background."""
    for subject in subjects:
        base = np.array(COLOURS[subject.colour][1])
        shade = tuple(int(value) for value in np.clip(base + generator.integers(-14, 15, size=3), 0, 255))
        degrees = generator.uniform(-8, 8)
        x, y = ((subject.x - window.left) * window.scale, (subject.y - window.top) * window.scale)
        radius = subject.radius * window.scale
        if min(x, y) + 2 * radius < 0 or max(x, y) - 2 * radius > window.size:
            continue  # outside
        mask = draw_mask(subject.shape, radius, degrees)
        image.paste(shade, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    return image


def add_noise(image: Image.Image, generator: np.random.Generator, strength: int = 6) -> Image.Image:
    """Let each pixel be lighter or darker by at most `strength`."""
    noise = generator.integers(-strength, strength + 1, size=(image.height, image.width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8))


def draw_mask(shape: str, radius: float, degrees: float) -> Image.Image:
    """Return the object's silhouette, tilted by `degrees`: 0 outside, 255 inside."""
    side = math.ceil(2 * radius) * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    tilt = math.radians(degrees)
    points = [
        (
            side / 2 * (1 + x * math.cos(tilt) - y * math.sin(tilt)),
            side / 2 * (1 + x * math.sin(tilt) + y * math.cos(tilt)),
        )
        for x, y in outline(shape)
    ]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.reduce(SUPERSAMPLING)


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the shape's corners inside the unit circle, y pointing down."""
    if shape == "circle":
        return [(0.9 * math.cos(turn), 0.9 * math.sin(turn)) for turn in np.linspace(0, 2 * math.pi, 48)]
    if shape == "square":
        return [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]
    if shape == "triangle":
        return [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "star":
        radii = [0.98, 0.4] * 5
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    turns = np.linspace(0, 2 * math.pi, 48)  # the usual heart curve
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17)
        for t in turns
    ]


def draw_background(name: str, generator: np.random.Generator, window: Window = WHOLE) -> Image.Image:
    """Draw a window of one of the `BACKGROUNDS`."""
    image = Image.new("RGB", (window.size, window.size))
    pencil = Pencil(image, window)
    light = int(generator.integers(-12, 13))
    painters = {
        "sky": paint_sky,
        "grass": paint_grass,
        "sea": paint_sea,
        "sand": paint_sand,
        "night": paint_night,
        "paper": paint_paper,
    }
    painters[name](pencil, generator, light)
    return image


def lighten(colour: tuple[int, int, int], light: int) -> tuple[int, int, int]:
    """Add `light` to each channel."""
    return tuple(max(0, min(255, value + light)) for value in colour)


def paint_sky(pencil: Pencil, generator: np.random.Generator, light: int) -> None:
    """Light blue, paler towards the bottom, with clouds."""
    for y in range(0, IMAGE_SIZE, 4):
        pencil.rectangle((0, y, IMAGE_SIZE, y + 3), fill=lighten((118 + y // 4, 180 + y // 6, 238), light))
    for x, y in generator.integers(0, IMAGE_SIZE, size=(4, 2)).tolist():
        for dx, dy, radius in ((-14, 3, 9), (0, 0, 12), (15, 3, 9)):
            box = (x + dx - 1.4 * radius, y + dy - 0.7 * radius, x + dx + 1.4 * radius, y + dy + 0.7 * radius)
            pencil.ellipse(box, fill=(232, 240, 248))


def paint_grass(pencil: Pencil, generator: np.random.Generator, light: int) -> None:
    """Green with upright blades."""
    pencil.rectangle((0, 0, IMAGE_SIZE, IMAGE_SIZE), fill=lighten((108, 158, 62), light))
    for x, y, lean in generator.integers(0, IMAGE_SIZE, size=(170, 3)).tolist():
        shade = lighten((84, 130, 44) if lean % 2 else (136, 186, 84), light)
        pencil.line((x, y + 10, x + lean % 7 - 3, y), fill=shade, width=2)


def paint_sea(pencil: Pencil, generator: np.random.Generator, light: int) -> None:
    """Deep blue-green with rows of waves."""
    pencil.rectangle((0, 0, IMAGE_SIZE, IMAGE_SIZE), fill=lighten((22, 92, 138), light))
    for y in range(6, IMAGE_SIZE, 18):
        shift = float(generator.uniform(0, 28))
        wave = [each for x in range(0, IMAGE_SIZE + 4, 4) for each in (x, y + 4 * math.sin((x + shift) * 0.22))]
        pencil.line(wave, fill=lighten((92, 162, 196), light), width=2)


def paint_sand(pencil: Pencil, generator: np.random.Generator, light: int) -> None:
    """Beige with dark and pale grains."""
    pencil.rectangle((0, 0, IMAGE_SIZE, IMAGE_SIZE), fill=lighten((222, 198, 150), light))
    for x, y, grain in generator.integers(0, IMAGE_SIZE, size=(260, 3)).tolist():
        pencil.rectangle((x, y, x + 1, y + 1), fill=lighten((176, 146, 98) if grain % 3 else (244, 228, 194), light))


def paint_night(pencil: Pencil, generator: np.random.Generator, light: int) -> None:
    """Nearly black blue with tiny stars."""
    pencil.rectangle((0, 0, IMAGE_SIZE, IMAGE_SIZE), fill=lighten((20, 20, 52), light))
    for x, y, size in generator.integers(0, IMAGE_SIZE, size=(60, 3)).tolist():
        pencil.rectangle((x, y, x + size % 2, y + size % 2), fill=(236, 232, 200))


def paint_paper(pencil: Pencil, generator: np.random.Generator, light: int) -> None:
    """White with faint ruled lines."""
    pencil.rectangle((0, 0, IMAGE_SIZE, IMAGE_SIZE), fill=lighten((243, 243, 243), light))
    for y in range(int(generator.integers(6, 26)), IMAGE_SIZE, 26):
        pencil.line((0, y, IMAGE_SIZE, y), fill=lighten((206, 214, 228), light), width=1)


def answer(scene: Scene, kind: str, language: str) -> str:
    """Return the one correct answer to a question of `kind` (a key of `WORDINGS`) about the scene."""
    return (answer_chinese if language == "zh" else answer_english)(scene, kind)


def answer_chinese(scene: Scene, kind: str) -> str:
    """Word an answer in Chinese."""
    shape, colour, count = SHAPES[scene.shape][0], COLOURS[scene.colour][0], COUNTS[scene.count][0]
    background, place = BACKGROUNDS[scene.background][:2]
    return {
        "describe": f"图片中有{count}{colour}的{shape}，背景是{background}。",
        "shape": f"{shape}。",
        "colour": f"{colour}。",
        "count": f"{count}。",
        "position": POSITIONS[scene.position][0] if scene.position else SEVERAL_PLACES[0],
        "background": f"背景是{background}。",
        "place": place,
    }[kind]


def answer_english(scene: Scene, kind: str) -> str:
    """Word an answer in English."""
    _, singular, plural = SHAPES[scene.shape]
    _, _, background, where, place = BACKGROUNDS[scene.background]
    count = COUNTS[scene.count][1]
    return {
        "describe": f"{count} {scene.colour} {singular if scene.count == 1 else plural} {where}.",
        "shape": f"A {singular}." if scene.count == 1 else f"{plural.capitalize()}.",
        "colour": f"{scene.colour.capitalize()}.",
        "count": f"{count}.",
        "position": POSITIONS[scene.position][1] if scene.position else SEVERAL_PLACES[1],
        "background": f"{background[0].upper()}{background[1:]}.",
        "place": place,
    }[kind]


def exchanges(scene: Scene, language: str) -> list[Exchange]:
    """Return every question about the scene in every wording, each with its answer."""
    return [
        Exchange(kind, language, wording, answer(scene, kind, language))
        for kind, wordings in WORDINGS.items()
        for wording in wordings[language]
    ]


def small_talk(language: str) -> list[Exchange]:
    """Return the exchanges that need no picture."""
    return [Exchange("small talk", language, question, reply) for question, reply in SMALL_TALK[language].items()]


def blind_exchanges(language: str) -> list[Exchange]:
    """Return the questions about a picture as they are answered when there is none."""
    return [
        Exchange("no picture", language, wording, NO_PICTURE[language])
        for wordings in WORDINGS.values()
        for wording in wordings[language]
    ]


def all_texts() -> list[str]:
    """Return every text of the world once, questions and answers, in a fixed order."""
    texts = []
    for language, (shape, colour, background), count in itertools.product(
        LANGUAGES, COMBINATIONS, range(1, MAX_COUNT + 1)
    ):
        positions = POSITIONS if count == 1 else (None,)
        for position in positions:
            scene = Scene(shape, colour, background, ((0.0, 0.0, 1.0),) * count, position, (0, 0))
            texts += [text for each in exchanges(scene, language) for text in (each.question, each.answer)]
    for language in LANGUAGES:
        others = small_talk(language) + blind_exchanges(language)
        texts += [text for each in others for text in (each.question, each.answer)]
        texts += REPEAT[language]
    return list(dict.fromkeys(texts))


@dataclass(frozen=True, kw_only=True)
class Options:
    file: Path = argument("picture to write, such as scene.png", metavar="FILE")
    split: str = option("of the scenes", "new pictures", choices=tuple(SPLITS))
    seed: int = option("number of the scene in its split", 0, parse=COUNT_OR_NONE, metavar="N")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one scene into a file and print its captions."""
    options = parse(
        Options, argv, "python -m tools.tiny.world", "Draw one scene of the tiny world and print its captions."
    )
    scene = sample_scene(options.seed, options.split)
    try:
        draw(scene).save(options.file, optimize=True)
    except (ValueError, OSError) as error:  # a name that is of no picture, a folder that is not there
        report(error)
        return 2
    for language in LANGUAGES:
        print(answer(scene, "describe", language))
    return 0


if __name__ == "__main__":
    sys.exit(main())
