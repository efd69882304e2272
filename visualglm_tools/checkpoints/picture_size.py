"""The size at which pictures are shown to a model: its own, that of an adapter's training, or another one.

It is `preferred_image_size` of the model's vision config, which all that shows pictures goes by, and which a merged
model is saved with; beside an adapter it stands in `pictures.json`. Not here: how a picture becomes so large.
"""

import json
import sys
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from visualglm_tools.checkpoints.folder import read_object


PICTURES_FILE = "pictures.json"


def image_size_of(config: PreTrainedConfig) -> int:
    """Pixels a side; older code, as a folder may bring it, shows pictures at one size alone."""
    vision = config.vision_config
    return getattr(vision, "shown_image_size", vision.image_size)


def set_image_size(config: PreTrainedConfig, image_size: int) -> None:
    """Have pictures of so many pixels a side shown to a model.

    Raises:
        ValueError: that is not whole patches, or the model's code is older than this.
    """
    vision = config.vision_config
    if not hasattr(vision, "check_image_size"):
        raise ValueError(
            f"image_size={image_size}: the code in the model's folder is of an older version, which shows pictures at "
            f"{vision.image_size} alone. Renew it: visualglm check FOLDER --copy-code"
        )
    vision.check_image_size(image_size)
    vision.preferred_image_size = image_size


def override_image_size(model: PreTrainedModel, image_size: int) -> None:
    """`set_image_size` against what a model or its adapter was trained with, which is said."""
    trained = image_size_of(model.config)
    set_image_size(model.config, image_size)
    if image_size != trained:
        told = f"Pictures are shown at {image_size} × {image_size} pixels; the model was trained at {trained}."
        print(told, file=sys.stderr)


def write_image_size(folder: Path, model: PreTrainedModel) -> None:
    """Note beside an adapter at which size it was shown its pictures, if that is not its model's own."""
    image_size = image_size_of(model.config)
    if image_size != model.config.vision_config.image_size:
        (folder / PICTURES_FILE).write_text(json.dumps({"image_size": image_size}) + "\n", encoding="utf-8")


def adopt_image_size(folder: Path, model: PreTrainedModel) -> None:
    """Show a model pictures at the size that its adapter was trained with, if it says so."""
    if (folder / PICTURES_FILE).is_file():
        set_image_size(model.config, read_object(folder / PICTURES_FILE).get("image_size"))
