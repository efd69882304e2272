"""What is asked about the harder pictures of the tiny world, in two languages, with exactly one right answer each.

Which colour has the star, which shape is the red one, where is it; yes or no, with absent objects chosen at random, by
how common they are or by the company they keep, as POPE (2305.10355) chooses them; questions about what is not there,
about what is written on a sign. All work for today's scenes as well (`pictures.from_scene`).

A word is read by no model of 224 pixels: the answer is in the prompt, where `reading_line` puts it, or else
`UNREADABLE`. Not here: the pictures (`pictures.py`), and which question comes how often (`lessons.py`).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tools.tiny import world
from tools.tiny.pictures import HABITS, OFTEN, STRANGERS, USUAL, Picture
from tools.tiny.world import BACKGROUNDS, COLOURS, COUNTS, POSITIONS, SHAPES, Exchange, Scene, Subject
from visualglm_hf.conversation import CHINESE_READING, ENGLISH_READING


# As people also ask; `world.WORDINGS` has those that the model's older figures were measured with.
MORE_WORDINGS = {
    "describe": {
        "zh": ("用一句话描述这张图片。", "图中有什么？", "你看到了什么？", "请描述图片。"),
        "en": (
            "What does the picture show?",
            "Describe what you see.",
            "What can you see in the picture?",
            "Describe the picture.",
            "Please describe the image.",
        ),
    },
    "shape": {
        "zh": ("它们是什么形状？", "图片中有什么形状？", "这是什么形状？", "图形是什么形状？"),
        "en": (
            "What shapes are in the picture?",
            "What shapes are there?",
            "What shape are they?",
            "What is the shape?",
        ),
    },
    "colour": {
        "zh": ("图形是什么颜色？", "它们是什么颜色的？", "图片里的图形是什么颜色的？", "颜色呢？"),
        "en": (
            "What colour are the shapes?",
            "What color are the shapes?",
            "What colour are they?",
            "What color are they?",
            "What colours do you see?",
            "What is the colour?",
        ),
    },
    "count": {
        "zh": ("图片里有几个图形？", "有多少个图形？", "数一数有几个图形。"),
        "en": ("How many shapes are in the picture?", "How many shapes do you see?", "How many objects are there?"),
    },
    "position": {
        "zh": ("它们在哪里？", "图形在哪里？"),
        "en": ("Where are they?", "Where are the shapes?", "Where is the object?"),
    },
    "background": {
        "zh": ("背景里有什么？", "背景是什么样的？"),
        "en": ("What is behind the shapes?", "What background does the picture have?", "What is behind it?"),
    },
    "place": {"zh": ("这是哪里？", "这是什么地方？"), "en": ("Where is this?", "What place is this?")},
}
ABOUT_ONE = {  # kind of question about one of several: wordings
    "colour of": {
        "zh": ("{0}是什么颜色？", "{0}是什么颜色的？", "图片中的{0}是什么颜色？", "图里的{0}是什么颜色的？"),
        "en": (
            "What colour is the {0}?",
            "What color is the {0}?",
            "What color is the {0} in the picture?",
            "Which colour does the {0} have?",
        ),
    },
    "shape of": {
        "zh": ("{0}的图形是什么形状？", "{0}的是什么形状？", "图片中{0}的图形是什么形状？", "什么图形是{0}的？"),
        "en": ("What shape is the {0} one?", "What is the {0} shape?", "Which shape is {0}?", "What is {0}?"),
    },
    "place of": {
        "zh": ("{0}在哪里？", "{0}在图片的什么位置？", "{0}在什么位置？"),
        "en": ("Where is the {0}?", "Where in the picture is the {0}?"),
    },
}
PRESENCE = {
    "zh": ("图片中有{0}吗？", "图里有{0}吗？", "图片里有没有{0}？", "这张图片里有{0}吗？"),
    "en": (
        "Is there {0} in the picture?",
        "Is there {0} in the image?",
        "Is there {0}?",
        "Do you see {0}?",
        "Can you see {0} in the picture?",
    ),
}
IS_COLOUR = {"zh": ("{0}是{1}的吗？", "{0}是不是{1}的？"), "en": ("Is the {0} {1}?",)}
ARE_COLOUR = {"zh": ("图形是{1}的吗？", "它是{1}的吗？"), "en": ("Are the shapes {1}?", "Is it {1}?")}
IS_BACKGROUND = {
    "zh": ("背景是{0}吗？", "图片的背景是{0}吗？"),
    "en": ("Is the background {0}?", "Is {0} in the background?"),
}
TEXT = {
    "zh": (
        "图片上写着什么？",
        "图里写着什么？",
        "牌子上写着什么？",
        "图片中的文字是什么？",
        "写了什么？",
        "图里写的是什么字？",
    ),
    "en": (
        "What does the sign say?",
        "What does it say?",
        "What is written in the picture?",
        "What is written on the sign?",
        "What text is in the picture?",
        "Read the sign.",
        "What is the text?",
    ),
}
ANY_TEXT = {
    "zh": ("图片上有文字吗？", "图片中有文字吗？", "图片中有牌子吗？"),
    "en": ("Is there any text in the picture?", "Is there text in the picture?", "Is there a sign in the picture?"),
}
YES_NO = {"zh": (("有。", "没有。"), ("是的。", "不是。")), "en": (("Yes.", "No."), ("Yes.", "No."))}
ABSENT = {"zh": "图片中没有{0}。", "en": "There is no {0} in the picture."}
READ_OUT = {"zh": "图片上写着“{0}”。", "en": 'It says "{0}".'}
UNREADABLE = {"zh": "我看不清图片上的文字。", "en": "I cannot read the text in the picture."}
NO_TEXT = {"zh": "图片上没有文字。", "en": "There is no text in the picture."}
READING = {"zh": CHINESE_READING, "en": ENGLISH_READING}  # what was read in a picture, before the question

SIMPLE_KINDS = tuple(world.WORDINGS)
STRATEGIES = ("random", "popular", "adversarial")
HARD_KINDS = (*ABOUT_ONE, "absent", "presence", "presence of a pair", "is colour", "is background", "any text", "text")


def reading_line(text: str, language: str) -> str:
    """What stands before a question in the prompt where an OCR engine has read `text`."""
    return READING[language].format(text)


def name_of(table: dict, name: str, language: str) -> str:
    """A shape's or a colour's name."""
    return table[name][0] if language == "zh" else name


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def pair_name(colour: str, shape: str, language: str) -> str:
    """Such as 红色的圆形 or "red circle"."""
    return f"{COLOURS[colour][0]}的{SHAPES[shape][0]}" if language == "zh" else f"{colour} {shape}"


def is_alike(picture: Picture) -> bool:
    """Whether all subjects have one shape and one colour, as in today's scenes, and there is nothing else."""
    return picture.sign is None and len({(each.shape, each.colour) for each in picture.subjects}) == 1


def scene_of(picture: Picture) -> Scene:
    """The scene of equal shapes that such a picture is."""
    first, places = picture.subjects[0], tuple((each.x, each.y, each.radius) for each in picture.subjects)
    position = picture.sides[0] if picture.sides and len(places) == 1 else None
    return Scene(first.shape, first.colour, picture.background, places, position, picture.seed[:2])


def in_order(picture: Picture) -> list[Subject]:
    """The subjects as they are named: from left to right, or from top to bottom where they stand so."""
    if picture.sides and picture.sides[0] in ("top", "bottom"):
        return sorted(picture.subjects, key=lambda subject: subject.y)
    return sorted(picture.subjects, key=lambda subject: subject.x)


def list_up(names: Sequence[str], language: str) -> str:
    """Such as "a, b and c"."""
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    return last.join(filter(None, (comma.join(names[:-1]), names[-1])))


def describe(picture: Picture, language: str) -> str:
    """Return the caption."""
    if is_alike(picture):
        return world.answer(scene_of(picture), "describe", language)
    subjects, background = in_order(picture), BACKGROUNDS[picture.background]
    if language == "zh":
        names = [f"一个{pair_name(each.colour, each.shape, 'zh')}" for each in subjects]
        names += ["一块牌子"] if picture.sign else []
        return f"图片中有{list_up(names, 'zh')}，背景是{background[0]}。"
    names = [f"one {pair_name(each.colour, each.shape, 'en')}" for each in subjects] + ["a sign"] * bool(picture.sign)
    listed = list_up(names, "en")
    return f"{listed[0].upper()}{listed[1:]} {background[3]}."


def answer(picture: Picture, kind: str, language: str) -> str:
    """Return the one right answer to a question of `SIMPLE_KINDS`."""
    if is_alike(picture) or kind in ("background", "place"):
        return world.answer(scene_of(picture), kind, language)
    subjects = in_order(picture)
    if kind == "describe":
        return describe(picture, language)
    if kind == "count":
        return f"{COUNTS[len(subjects)][language == 'en']}{'。' if language == 'zh' else '.'}"
    if kind == "position":
        several = len(subjects) > 1
        return (world.SEVERAL_PLACES if several else POSITIONS[picture.sides[0]])[language == "en"]
    if language == "zh":
        table = SHAPES if kind == "shape" else COLOURS
        return f"{list_up([table[getattr(each, kind)][0] for each in subjects], 'zh')}。"
    names = [with_article(each.shape) if kind == "shape" else each.colour for each in subjects]
    listed = list_up(names, "en")
    return f"{listed[0].upper()}{listed[1:]}."


def pick(generator: np.random.Generator, items: Sequence):
    return items[int(generator.integers(len(items)))]


def company(shape: str, other: str) -> float:
    """How often two shapes are together in mixed pictures in training, beside other pairs."""
    pair = frozenset({shape, other})
    return OFTEN if pair in HABITS else 0.0 if pair in STRANGERS else 1.0


COMMON = sorted(SHAPES, key=lambda shape: -sum(company(shape, other) for other in SHAPES if other != shape))


def absent_shape(picture: Picture, strategy: str, generator: np.random.Generator) -> str | None:
    """A shape that is not there: any, the most common one, or the one that most often keeps such company."""
    present = {each.shape for each in picture.subjects}
    absent = [shape for shape in COMMON if shape not in present]
    if strategy == "random":
        return pick(generator, absent)
    if strategy == "popular":
        return absent[0]
    return max(absent, key=lambda shape: sum(company(shape, other) for other in present))


def absent_pair(picture: Picture, strategy: str, generator: np.random.Generator) -> tuple[str, str]:
    """A colour and a shape that are not there together: any, a common one, or one thing's colour, another's shape."""
    present = {(each.colour, each.shape) for each in picture.subjects}
    if strategy == "adversarial":
        colours, shapes = ({each[index] for each in present} for index in range(2))
        pairs = [pair for pair in itertools.product(sorted(colours), sorted(shapes)) if pair not in present]
        if not pairs:  # all alike: the same shape in the colour that is usual here, or another
            pairs = [(colour, present_shape) for colour in COLOURS for _, present_shape in present]
            pairs = [pair for pair in pairs if pair not in present]
    elif strategy == "popular":
        pairs = [(USUAL[picture.background], shape) for shape in COMMON]
        pairs = [pair for pair in pairs if pair not in present][:2]
    else:
        pairs = [pair for pair in itertools.product(COLOURS, SHAPES) if pair not in present]
    return pick(generator, pairs)


def ask_presence(
    picture: Picture, language: str, generator: np.random.Generator, is_there: bool, strategy: str
) -> Exchange:
    """Ask whether a shape is there."""
    shape = pick(generator, picture.subjects).shape if is_there else absent_shape(picture, strategy, generator)
    name = name_of(SHAPES, shape, language)
    question = pick(generator, PRESENCE[language]).format(name if language == "zh" else with_article(name))
    return Exchange("presence", language, question, YES_NO[language][0][not is_there])


def ask_pair(
    picture: Picture, language: str, generator: np.random.Generator, is_there: bool, strategy: str
) -> Exchange:
    """Ask whether a shape is there in a colour."""
    subject = pick(generator, picture.subjects)
    pair = (subject.colour, subject.shape) if is_there else absent_pair(picture, strategy, generator)
    name = pair_name(*pair, language)
    question = pick(generator, PRESENCE[language]).format(name if language == "zh" else with_article(name))
    return Exchange("presence of a pair", language, question, YES_NO[language][0][not is_there])


def ask_colour(picture: Picture, language: str, generator: np.random.Generator) -> Exchange:
    """Ask whether something has a colour: its own, another thing's, or any."""
    subject, is_right = pick(generator, picture.subjects), generator.random() < 0.5
    others = [each.colour for each in picture.subjects if each.colour != subject.colour]
    if not others or generator.random() < 0.4:
        others = [colour for colour in COLOURS if colour != subject.colour]
    colour = subject.colour if is_right else pick(generator, others)
    wordings = ARE_COLOUR if is_alike(picture) and generator.random() < 0.6 else IS_COLOUR
    names = name_of(SHAPES, subject.shape, language), name_of(COLOURS, colour, language)
    question = pick(generator, wordings[language]).format(*names)
    return Exchange("is colour", language, question, YES_NO[language][1][not is_right])


def ask_background(picture: Picture, language: str, generator: np.random.Generator) -> Exchange:
    """Ask whether something is the background."""
    is_right = generator.random() < 0.5
    others = [name for name in BACKGROUNDS if name != picture.background]
    name = picture.background if is_right else pick(generator, others)
    question = pick(generator, IS_BACKGROUND[language]).format(BACKGROUNDS[name][0 if language == "zh" else 2])
    return Exchange("is background", language, question, YES_NO[language][1][not is_right])


def ask_about_one(picture: Picture, kind: str, language: str, generator: np.random.Generator) -> Exchange:
    """Ask for the colour, the shape or the place of one of the subjects."""
    index = int(generator.integers(len(picture.subjects)))
    subject = picture.subjects[index]
    table, name = (COLOURS, subject.colour) if kind == "shape of" else (SHAPES, subject.shape)
    question = pick(generator, ABOUT_ONE[kind][language]).format(name_of(table, name, language))
    if kind == "place of":
        reply = POSITIONS[picture.sides[index]][language == "en"]
    elif kind == "colour of":
        reply = f"{COLOURS[subject.colour][0]}。" if language == "zh" else f"{subject.colour.capitalize()}."
    else:
        reply = f"{SHAPES[subject.shape][0]}。" if language == "zh" else f"{with_article(subject.shape).capitalize()}."
    return Exchange(kind, language, question, reply)


def ask_absent(picture: Picture, language: str, generator: np.random.Generator) -> Exchange:
    """Ask for the colour or the place of what is not there."""
    name = name_of(SHAPES, absent_shape(picture, pick(generator, STRATEGIES), generator), language)
    wordings = ABOUT_ONE[pick(generator, ("colour of", "colour of", "place of"))][language]
    return Exchange("absent", language, pick(generator, wordings).format(name), ABSENT[language].format(name))


def ask_text(picture: Picture, language: str, generator: np.random.Generator, reading: str | None = None) -> Exchange:
    """Ask what is written; `reading` is what stands in the prompt of it, if anything does."""
    question = pick(generator, TEXT[language])
    if reading is not None:
        return Exchange("text", language, question, READ_OUT[language].format(reading))
    reply = UNREADABLE if picture.sign else NO_TEXT
    return Exchange("text", language, question, reply[language])


def ask_any_text(picture: Picture, language: str, generator: np.random.Generator) -> Exchange:
    """Ask whether there is anything to read."""
    question = pick(generator, ANY_TEXT[language])
    return Exchange("any text", language, question, YES_NO[language][0][picture.sign is None])


def ask_simple(picture: Picture, kind: str, language: str, generator: np.random.Generator) -> Exchange:
    """Ask one of the questions that today's scenes are asked, in old words or new ones."""
    wordings = [*world.WORDINGS[kind][language], *MORE_WORDINGS[kind][language]]
    return Exchange(kind, language, pick(generator, wordings), answer(picture, kind, language))


def ask(picture: Picture, kind: str, language: str, generator: np.random.Generator) -> Exchange:
    """Ask a question of `SIMPLE_KINDS` or `HARD_KINDS`.

    Raises:
        ValueError: the picture has no such answer: see `can_ask`.
    """
    if not can_ask(picture, kind):
        raise ValueError(f"A picture of kind {picture.kind!r} has no answer of kind {kind!r}.")
    if kind in SIMPLE_KINDS:
        return ask_simple(picture, kind, language, generator)
    if kind in ABOUT_ONE:
        return ask_about_one(picture, kind, language, generator)
    if kind in ("presence", "presence of a pair"):
        ask_yes_no = ask_presence if kind == "presence" else ask_pair
        return ask_yes_no(picture, language, generator, bool(generator.random() < 0.5), pick(generator, STRATEGIES))
    others: dict[str, Callable] = {
        "absent": ask_absent,
        "is colour": ask_colour,
        "is background": ask_background,
        "any text": ask_any_text,
        "text": ask_text,
    }
    return others[kind](picture, language, generator)


def can_ask(picture: Picture, kind: str) -> bool:
    """Whether a question of this kind has exactly one right answer for the picture."""
    if kind in ("place of", "position"):
        return picture.sides is not None or (kind == "position" and len(picture.subjects) > 1)
    return kind in SIMPLE_KINDS or kind in HARD_KINDS


def ask_blindly(language: str, generator: np.random.Generator) -> Exchange:
    """Ask one of the new questions without a picture."""
    shape, colour = (name_of(table, pick(generator, list(table)), language) for table in (SHAPES, COLOURS))
    shapes = [*PRESENCE[language], *ABOUT_ONE["colour of"][language], *ABOUT_ONE["place of"][language]]
    colours = [*ABOUT_ONE["shape of"][language], *ARE_COLOUR[language]]
    plain = [
        *TEXT[language],
        *ANY_TEXT[language],
        *itertools.chain(*(each[language] for each in MORE_WORDINGS.values())),
    ]
    question = pick(generator, pick(generator, (shapes, colours, plain)))
    name = shape if "{1}" in question or question in shapes else colour
    if question in PRESENCE[language] and language == "en":
        name = with_article(name)
    return Exchange("no picture", language, question.format(name, colour), world.NO_PICTURE[language])


def ask_as_pope(picture: Picture, language: str, strategy: str, generator: np.random.Generator) -> list[Exchange]:
    """Four questions, two to be answered with yes: about shapes, and about shapes in colours."""
    return [
        ask_yes_no(picture, language, generator, is_there, strategy)
        for ask_yes_no in (ask_presence, ask_pair)
        for is_there in (True, False)
    ]


def all_texts() -> list[str]:
    """Return texts that have every word of this file, for the vocabulary; those of `world.py` come with its own."""
    texts = []
    for language in world.LANGUAGES:
        tables = [MORE_WORDINGS, ABOUT_ONE]
        wordings = [each for table in tables for kind in table.values() for each in kind[language]]
        for table in (PRESENCE, IS_COLOUR, ARE_COLOUR, IS_BACKGROUND, TEXT, ANY_TEXT):
            wordings += table[language]
        texts += [each.format("", "") for each in wordings]
        texts += [reply for pair in YES_NO[language] for reply in pair]
        fixed = (ABSENT, READ_OUT, UNREADABLE, NO_TEXT, READING)
        texts += [table[language].format("") for table in fixed]
    texts += ["图片中有一个红色的圆形、一个蓝色的正方形和一块牌子，背景是草地。"]
    texts += ["One red circle, one blue square and a sign on grass.", "Is there an orange circle and a star?"]
    return list(dict.fromkeys(texts))
