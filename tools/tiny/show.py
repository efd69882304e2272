"""One of the tiny world's harder pictures as a file, with its captions and where its subjects are.

python -m tools.tiny.show small.png --kind small --seed 3 --size 1344
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.tiny import pictures, world
from tools.tiny.questions import describe
from visualglm_tools.options import COUNT, COUNT_OR_NONE, argument, option, parse
from visualglm_tools.printing import report


@dataclass(frozen=True, kw_only=True)
class Options:
    file: Path = argument("picture to write, such as small.png", metavar="FILE")
    kind: str = option("of the picture", "mixed", choices=pictures.KINDS)
    split: str = option("of the pictures", "new", choices=tuple(pictures.SPLITS))
    seed: int = option("number of the picture", 0, parse=COUNT_OR_NONE, metavar="N")
    size: int = option("pixels, in width and height", pictures.CANVAS, parse=COUNT, metavar="N")
    font: Path | None = option("file of a font for words", None, metavar="FILE", unset="one that is found")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one picture into a file; print its captions, and left, top, right and bottom of each subject in pixels."""
    options = parse(
        Options, argv, "python -m tools.tiny.show", "Draw a harder picture of the tiny world; print captions and boxes."
    )
    picture = pictures.sample_picture(options.seed, options.kind, options.split)
    try:
        picture.whole(options.size, options.font).save(options.file)
    except (ValueError, OSError) as error:
        report(error)
        return 2
    for language in world.LANGUAGES:
        print(describe(picture, language))
    for each in picture.subjects:
        print(each.colour, each.shape, *(round(edge) for edge in picture.box(each, options.size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
