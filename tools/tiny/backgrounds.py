"""Draw the fine-tuning example: 20 pictures with backgrounds that `models/visualglm-tiny` has never seen.

    python -m tools.tiny.backgrounds examples/background

The backgrounds are those of the tiny world in colours that they never have there (`TINTS`), and the caption says so.
Writes the pictures, `dataset.json` to train on, `held_out.json` for the pictures kept apart, and `old_abilities.json`:
questions about the pictures one folder up that the model answers already, to see what it forgets.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny import world
from tools.tiny.world import Scene
from visualglm_tools.options import argument, parse
from visualglm_tools.printing import report


QUESTION = "这张图片的背景里有什么内容？"
PICTURES_PER_TINT = 4
TRAINED_PER_TINT = 3  # of these; the others are held out
SPLIT = 4  # mixed into the seed: no picture of the tiny world has this number
COLOURS_OF_OBJECTS = ("blue", "white", "black")  # visible on every tinted background
JPEG_QUALITY = 85
OLD_PICTURES = {  # in the folder above: number in the tiny world's "new pictures"
    "orange_triangles_on_sand.png": 480,
    "red_circles_on_grass.png": 663,
    "yellow_star_at_night.png": 491,
}


@dataclass(frozen=True)
class Tint:
    """A colour for a background: `matrix` [3, 3] makes red, green and blue of those of the tiny world."""

    background: str
    colour: str
    matrix: tuple[tuple[float, float, float], ...]


TINTS = (
    Tint("sky", "橙色", ((0.0, 0.0, 1.0), (0.0, 0.85, 0.0), (0.6, 0.0, 0.0))),
    Tint("grass", "黄色", ((0.0, 1.35, 0.0), (0.0, 1.15, 0.0), (0.0, 0.0, 0.9))),
    Tint("sea", "绿色", ((0.6, 0.0, 0.0), (0.0, 0.0, 0.95), (0.0, 0.5, 0.0))),
    Tint("sand", "红色", ((0.9, 0.0, 0.0), (0.0, 0.4, 0.0), (0.0, 0.0, 0.45))),
    Tint("night", "紫色", ((0.0, 0.0, 1.7), (0.0, 0.8, 0.0), (0.0, 0.0, 2.2))),
)


def sample_picture(tint: Tint, number: int) -> Image.Image:
    """Draw picture `number` of a tinted background, with one to three objects on it."""
    seed = (SPLIT + TINTS.index(tint), number)
    generator = np.random.default_rng((*seed, 3))
    shape = str(generator.choice(list(world.SHAPES)))
    colour = str(generator.choice(COLOURS_OF_OBJECTS))
    objects = world.scatter(generator, int(generator.integers(2, world.MAX_COUNT + 1)))
    scene = Scene(shape, colour, tint.background, objects, None, seed)
    background = world.draw_background(tint.background, generator)
    matrix = [weight for row in tint.matrix for weight in (*row, 0.0)]
    image = world.place_subjects(background.convert("RGB", matrix), scene.subjects, generator)
    return world.add_noise(image, generator)


def caption(tint: Tint) -> str:
    """Say what is in the background."""
    return f"这张图片的背景是{tint.colour}的{world.BACKGROUNDS[tint.background][0]}。"


def old_rows() -> list[dict]:
    """Ask what the model knew before: each kind of question about three pictures, and small talk, in two languages."""
    rows = []
    for language in world.LANGUAGES:
        for name, number in OLD_PICTURES.items():
            scene = world.sample_scene(number, "new pictures")
            for kind, wordings in world.WORDINGS.items():
                answer = world.answer(scene, kind, language)
                rows.append({"img": f"../{name}", "prompt": wordings[language][0], "label": answer})
        rows += [{"prompt": each.question, "label": each.answer} for each in world.small_talk(language)[::2]]
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def draw_all(folder: Path) -> None:
    """Write the pictures and the three lists of questions and answers."""
    trained, held_out = [], []
    for number in range(PICTURES_PER_TINT):
        for tint in TINTS:
            name = f"{tint.background}_{number + 1}.jpg"
            sample_picture(tint, number).save(folder / name, quality=JPEG_QUALITY)
            row = {"img": name, "prompt": QUESTION, "label": caption(tint)}
            (trained if number < TRAINED_PER_TINT else held_out).append(row)
    write_rows(folder / "dataset.json", trained)
    write_rows(folder / "held_out.json", held_out)
    write_rows(folder / "old_abilities.json", old_rows())


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = argument("folder to write, such as examples/background", metavar="FOLDER")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the example into a folder."""
    options = parse(
        Options, argv, "python -m tools.tiny.backgrounds", "Draw the fine-tuning example: 20 pictures and captions."
    )
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        draw_all(options.folder)
    except OSError as error:
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
