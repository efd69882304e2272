"""What the tiny model is taught: dialogues about pictures of the world, as batches of tokens, pixels and labels.

Everything is a function of the seed and the step. Every prompt comes from `visualglm_hf.conversation`. Not here: what
can be drawn and said (`world.py`), and what is done with a batch (`train.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset

from tools.tiny import world
from tools.tiny.model import NUM_QUERY_TOKENS, PATCHES_PER_SIDE
from tools.tiny.world import Exchange, Scene
from visualglm_hf import ChatGLMTokenizer, VisualGLMImageProcessor
from visualglm_hf.conversation import END_MARK, build_prompt, expand_images, is_english


ROWS_PER_PICTURE = 2
ROWS_WITHOUT_PICTURE = 4  # per step
ROWS_PER_GROUP = 18  # rows of like length go through the decoder together

SHAPES, COLOURS, BACKGROUNDS = (list(table) for table in (world.SHAPES, world.COLOURS, world.BACKGROUNDS))
POSITIONS = [*world.POSITIONS, None]
KINDS = [*world.WORDINGS]


@dataclass(frozen=True)
class Dialogue:
    """A question after a history, its answer, and the pictures (numbers in the batch) with the turns they precede."""

    kind: str
    language: str
    history: tuple[tuple[str, str], ...]
    question: str
    answer: str
    pictures: tuple[int, ...] = ()
    image_turns: tuple[int, ...] = ()

    def prompt(self) -> str:
        english = is_english(self.question.rpartition("\n")[2])  # not of what was read in the picture
        text = build_prompt(self.question, self.history, self.image_turns, english)
        return expand_images(text, len(self.pictures), NUM_QUERY_TOKENS)


def pick(generator: np.random.Generator, items: Sequence):
    """Return one of `items`."""
    return items[generator.integers(len(items))]


def scribble(question: str, generator: np.random.Generator) -> str:
    """Write a question as people type it: sometimes without its last mark, sometimes without a capital letter."""
    if generator.random() < 0.15:
        question = question.rstrip("。？！.?!")
    if generator.random() < 0.1:
        question = question[0].lower() + question[1:]
    return question


def ask(scene: Scene, language: str, generator: np.random.Generator, kind: str | None = None) -> Exchange:
    """Ask something about a picture, or rarely make conversation instead.

    Captions come twice as often as the rest, and positions three times where there is one, since most scenes have none.
    """
    if kind is None and generator.random() < 0.06:
        return pick(generator, world.small_talk(language))
    kind = kind or pick(generator, [*KINDS, "describe", *(["position"] * 2 if scene.position else [])])
    question = pick(generator, world.WORDINGS[kind][language])
    return Exchange(kind, language, question, world.answer(scene, kind, language))


def ask_blindly(language: str, generator: np.random.Generator) -> Exchange:
    """Make conversation, or ask about a picture that is not there."""
    source = world.small_talk if generator.random() < 0.6 else world.blind_exchanges
    return pick(generator, source(language))


def finish(
    turns: list[Exchange],
    generator: np.random.Generator,
    pictures: tuple[int, ...] = (),
    image_turns: tuple[int, ...] = (),
) -> Dialogue:
    """Make a dialogue of its turns, the last being the question; now and then ask to repeat the last answer instead."""
    *history, last = turns
    pairs = [(scribble(turn.question, generator), turn.answer) for turn in history]
    if history and generator.random() < 0.07:
        question = pick(generator, world.REPEAT[last.language])
        last = Exchange("repeat", last.language, question, history[-1].answer)
        image_turns = tuple(min(turn, len(history) - 1) for turn in image_turns)  # the question is not about a picture
    question = scribble(last.question, generator)
    return Dialogue(last.kind, last.language, tuple(pairs), question, last.answer, pictures, image_turns)


def sample_dialogue(scenes: list[Scene], number: int, generator: np.random.Generator) -> Dialogue:
    """Return a dialogue about picture `number`, rarely with another picture or with small talk before it."""
    language = pick(generator, world.LANGUAGES)
    before: list[Exchange] = []
    pictures, image_turns = (number,), (0,)
    chance = generator.random()
    if chance < 0.05:
        other = int(generator.integers(len(scenes)))
        before = [ask(scenes[other], language, generator) for _ in range(generator.integers(1, 3))]
        pictures, image_turns = (other, number), (0, len(before))
    elif chance < 0.1:
        before = [ask_blindly(language, generator) for _ in range(generator.integers(1, 3))]
        image_turns = (len(before),)
    length = 1 + generator.choice(4, p=(0.55, 0.25, 0.14, 0.06)) if not before else generator.integers(1, 3)
    turns = []
    for _ in range(length):
        other_language = world.LANGUAGES[language == "zh"]
        turns.append(ask(scenes[number], other_language if generator.random() < 0.04 else language, generator))
    return finish([*before, *turns], generator, pictures, image_turns)


def sample_blind_dialogue(generator: np.random.Generator) -> Dialogue:
    """Return a dialogue without a picture."""
    language = pick(generator, world.LANGUAGES)
    return finish([ask_blindly(language, generator) for _ in range(generator.integers(1, 4))], generator)


def encode_dialogues(tokenizer: ChatGLMTokenizer, dialogues: list[Dialogue]) -> dict[str, torch.Tensor]:
    """Return left-padded `input_ids` and `attention_mask`, `labels` for the last columns, and `picture_rows`."""
    texts = [dialogue.prompt() + dialogue.answer + END_MARK for dialogue in dialogues]
    batch = tokenizer(texts, split_special_tokens=True, padding=True, return_tensors="pt")
    starts = (batch["input_ids"] == tokenizer.bos_token_id).int().argmax(1)
    first = int(starts.min())
    columns = torch.arange(first + 1, batch["input_ids"].shape[1])
    labels = batch["input_ids"][:, first + 1 :].masked_fill(columns <= starts[:, None], -100)
    picture_rows = torch.tensor([number for dialogue in dialogues for number in dialogue.pictures], dtype=torch.long)
    return {**batch, "labels": labels, "picture_rows": picture_rows}


def picture_labels(scene: Scene) -> list[int]:
    """Return what the `Examiner` asks about a picture."""
    names = (
        (SHAPES, scene.shape),
        (COLOURS, scene.colour),
        (BACKGROUNDS, scene.background),
        (POSITIONS, scene.position),
    )
    shape, colour, background, position = (table.index(name) for table, name in names)
    return [shape, colour, scene.count - 1, background, position]


def patch_labels(scene: Scene) -> np.ndarray:
    """Return 256 numbers: 0 outside the objects, 1 inside, 2 where a centre is."""
    side = world.IMAGE_SIZE // PATCHES_PER_SIDE
    middles = (np.arange(PATCHES_PER_SIDE) + 0.5) * side
    labels = np.zeros((PATCHES_PER_SIDE, PATCHES_PER_SIDE), dtype=np.int64)
    for x, y, radius in scene.objects:
        labels[(middles - x) ** 2 + (middles[:, None] - y) ** 2 < (0.8 * radius) ** 2] = 1
    for x, y, _ in scene.objects:
        labels[int(y // side), int(x // side)] = 2
    return labels.ravel()


class TrainingData(IterableDataset):
    """Endless batches, each a function of the seed and the step alone, so that a resumed run sees the same ones."""

    def __init__(self, tokenizer: ChatGLMTokenizer, seed: int, batch_size: int, first_step: int, vision_steps: int):
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        self.first_step, self.vision_steps = first_step, vision_steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        first = (self.seed * 1_000_000 + step) * self.batch_size
        scenes = [world.sample_scene(first + index) for index in range(self.batch_size)]
        pixels = np.stack([np.asarray(world.draw(scene)) for scene in scenes])
        batch = {
            "pixels": torch.from_numpy(pixels),
            "patch_labels": torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])),
            "picture_labels": torch.tensor([picture_labels(scene) for scene in scenes]),
        }
        if step < self.vision_steps:
            return batch
        generator = np.random.default_rng((self.seed, step))
        dialogues = [
            sample_dialogue(scenes, number, generator) for number in range(len(scenes)) for _ in range(ROWS_PER_PICTURE)
        ]
        dialogues += [sample_blind_dialogue(generator) for _ in range(ROWS_WITHOUT_PICTURE)]
        dialogues.sort(key=lambda dialogue: len(dialogue.prompt()))
        groups = [dialogues[row : row + ROWS_PER_GROUP] for row in range(0, len(dialogues), ROWS_PER_GROUP)]
        return {**batch, "groups": [encode_dialogues(self.tokenizer, group) for group in groups]}


def normalise(pixels: torch.Tensor, image_processor: VisualGLMImageProcessor) -> torch.Tensor:
    """Do what the image processor does to a picture of 224 x 224, for a batch [B, 224, 224, 3] of bytes at once."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
