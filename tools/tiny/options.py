"""What `python -m tools.tiny` may be told. Not here: what comes of it (`__main__.py`)."""

from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.options import AMOUNT, COUNT, COUNT_OR_NONE, POSITIVE, one_of, option


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path = option("folder of the model", Path("models/visualglm-tiny"), metavar="FOLDER")
    task: str = one_of(
        {
            "evaluate": ("evaluate", "only measure the model in --output"),
            "refresh": ("refresh", "only write today's code and settings beside the weights in --output"),
        },
        "train",
    )
    lessons: str = option(
        "first: today's scenes of equal shapes; second: those and the harder pictures; third: the same, and places; "
        "fourth: the same, and more about one of several",
        "fourth",
        choices=("first", "second", "third", "fourth"),
    )
    start: Path | None = option(
        "folder of a tiny model to begin with", None, metavar="FOLDER", unset="first weights of its own"
    )
    font: Path | None = option(
        "file of a font with Chinese characters", None, metavar="FILE", unset="one of the system's"
    )
    card: bool = option("with --evaluate: write the measured accuracy into the model card", False)
    pictures: int = option("pictures per split in the evaluation", 200, parse=COUNT, metavar="N")
    seed: int = option("of the first weights, the pictures and the dialogues", 0, parse=COUNT_OR_NONE, metavar="N")
    steps: int = option("of the whole training", 3600, parse=COUNT, metavar="N")
    last_step: int | None = option("end after this one", None, parse=COUNT, metavar="N", unset="that of --steps")
    vision_steps: int = option("for the image encoder alone, of --steps", 2500, parse=COUNT_OR_NONE, metavar="N")
    batch_size: int = option("pictures per step", 32, parse=COUNT, metavar="N")
    learning_rate: float = option("at its highest", 2e-3, parse=POSITIVE, metavar="X")
    exam_weight: float = option("of the easy questions in the second phase", 0.3, parse=AMOUNT, metavar="X")
    threads: int = option("for the model; drawing has a process of its own", 1, parse=COUNT, metavar="N")
