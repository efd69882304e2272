"""Draw pictures whose one subject takes little of them, and questions about it: does a model see more of larger ones?

    python -m tools.tiny.small_subjects small
    visualglm evaluate small/exam.jsonl plain.jsonl
    visualglm evaluate small/exam.jsonl larger.jsonl --image-size 448 --against plain.jsonl
    visualglm finetune --use_lora --train_qformer --train_projection --train_data small/dataset.json --image-size 448

Backgrounds and subjects are the tiny world's, on a canvas four times as wide; the square around a subject takes
0.3 to 1 %. Writes the pictures, `dataset.json` to train on, and `exam.jsonl` with others: shape and colour, in two
languages. Not here: asking and training, which are commands of their own.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny import world
from tools.tiny.world import Scene
from visualglm_tools.options import COUNT, COUNT_OR_NONE, argument, option, parse
from visualglm_tools.printing import report


CANVAS = 4 * world.IMAGE_SIZE
SMALLEST, LARGEST = 0.003, 0.01  # of the picture, for the square around the subject
KINDS = ("shape", "colour")
SPLITS = {"train": 30, "exam": 31}  # number mixed into the seed: no picture of the tiny world has these


def sample_subject(number: int, split: str) -> Scene:
    """Return the scene number `number` of a split; its one object is in pixels of the canvas."""
    seed = (SPLITS[split], number)
    generator = np.random.default_rng(seed)
    combinations = world.TRAINING_COMBINATIONS
    shape, colour, background = combinations[generator.integers(len(combinations))]
    share = math.exp(generator.uniform(math.log(SMALLEST), math.log(LARGEST)))
    radius = CANVAS * math.sqrt(share) / 2
    x, y = generator.uniform(2 * radius, CANVAS - 2 * radius, size=2).tolist()
    return Scene(shape, colour, background, ((x, y, radius),), None, seed)


def draw(scene: Scene) -> Image.Image:
    """Draw the canvas: the background four times as large, the subject in its own pixels, noise on both."""
    generator = np.random.default_rng((*scene.seed, 2))
    background = world.draw_background(scene.background, generator)
    image = background.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    ((x, y, radius),) = scene.objects
    base = np.array(world.COLOURS[scene.colour][1])
    shade = tuple(int(value) for value in np.clip(base + generator.integers(-14, 15, size=3), 0, 255))
    mask = world.draw_mask(scene.shape, radius, generator.uniform(-8, 8))
    image.paste(shade, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    noise = generator.integers(-6, 7, size=(CANVAS, CANVAS, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8))


def questions(scene: Scene) -> list[tuple[str, str, str, str]]:
    """(kind, language, question, answer) for what is asked about a scene."""
    return [
        (kind, language, world.WORDINGS[kind][language][0], world.answer(scene, kind, language))
        for kind in KINDS
        for language in world.LANGUAGES
    ]


def draw_into(folder: Path, split: str, count: int) -> Iterator[tuple[str, Scene]]:
    """Write the pictures of a split; yields the name of each and what it shows."""
    for number in range(count):
        scene, name = sample_subject(number, split), f"{split}_{number}.png"
        draw(scene).save(folder / name, compress_level=1)
        yield name, scene


def write_all(folder: Path, trained: int, examined: int) -> None:
    """Write the pictures and the two files of questions."""
    dataset = [
        {"img": name, "prompt": question, "label": answer}
        for name, scene in draw_into(folder, "train", trained)
        for _, _, question, answer in questions(scene)
    ]
    exam = [
        {"id": f"{name} {kind} {language}", "text": question, "image": name, "reference": answer}
        | {"kind": kind, "language": language}
        for name, scene in draw_into(folder, "exam", examined)
        for kind, language, question, answer in questions(scene)
    ]
    (folder / "dataset.json").write_text(json.dumps(dataset, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in exam)
    (folder / "exam.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = argument("folder to write", metavar="FOLDER")
    trained: int = option("pictures to train on", 300, parse=COUNT_OR_NONE, metavar="N")
    examined: int = option("pictures to ask about", 200, parse=COUNT, metavar="N")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(
        Options, argv, "python -m tools.tiny.small_subjects", "Draw pictures with small subjects, and write questions."
    )
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        write_all(options.folder, options.trained, options.examined)
    except OSError as error:
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
