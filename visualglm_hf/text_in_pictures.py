# SPDX-License-Identifier: Apache-2.0
"""Text in pictures, read by RapidOCR: the model itself sees 224 x 224 pixels and has learnt to read no Chinese.

RapidOCR (PP-OCRv6 through ONNX Runtime, Apache-2.0) is an optional package that carries its models: nothing is
downloaded, and what is read stays on this machine. Not here: where what was read stands in the prompt
(`conversation.py`), and pictures as files (`image_processing_visualglm.py`).

Lines are found in the whole picture, then read one after the other until there is enough for the prompt: a page full of
small print takes as long as its beginning.
"""

import functools
import numbers
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from .conversation import LINE_BREAK, MORE, brief, one_line_of


LONGEST_SIDE = 1600  # pixels; a larger picture is reduced. Read in 0.9 GB; with 2,000 pixels it is 1.1
USUAL_SIDE = 960  # pixels, in which lines are looked for first: a lone sign in a larger picture is not found there
SHORTEST_SIDE = 8  # pixels: no text is lower, and the detector takes no narrower strips
FEW = 2  # characters, which shapes and patterns may look like
SURE, SURE_OF_FEW = 0.7, 0.95  # RapidOCR's confidence from which a line counts, and one of few characters
MOST_LINES = 64
MOST_TOKENS = 256  # of a picture in the prompt: an eighth of what the model takes
TALL = 1.5  # heights of a line to its width, from where it is taken for one that was turned
SILENT = "critical"  # its log has a line for each model
MODELS = {"Det": "*_det_*.onnx", "Rec": "*_rec_*.onnx", "Cls": "*_cls_*.onnx"}  # RapidOCR's name of a part: its file
MISSING = (
    "Reading text in pictures needs RapidOCR and ONNX Runtime, and {} is not installed. Get them with "
    "pip install rapidocr onnxruntime, or leave read_text out."
)


def is_wanted(read_text) -> bool:
    """Whether the text in pictures is to be read; a `ValueError` for what is neither true nor false, such as "no"."""
    is_truth = isinstance(read_text, (numbers.Integral, np.bool_)) and read_text in (0, 1)
    if read_text is not None and not is_truth:
        raise ValueError(f"read_text must be True or False, found {brief(read_text)}.")
    return bool(read_text)


class TextReader:
    """RapidOCR for one process; its sessions may run in any thread, but its settings are shared: one at a time."""

    def __init__(self, engine):
        self.engine = engine
        self.lock = threading.Lock()

    def lines(self, picture: Image.Image) -> Iterator[str]:
        """The lines of an upright RGB picture, from the top to the bottom, each read when it is asked for."""
        picture = reduced(picture, LONGEST_SIDE)
        if min(picture.size) < SHORTEST_SIDE:
            return
        for corners in self.find(picture):
            if text := self.read(straightened(picture, corners)):
                yield text

    def find(self, picture: Image.Image) -> list[np.ndarray]:
        """The corners of each line, [4, 2] from its upper left one clockwise: large ones first, then what is small."""
        small = reduced(picture, USUAL_SIDE)
        found = [corners * picture.width / small.width for corners in self.find_at(small)]
        if small.size != picture.size:
            found += [each for each in self.find_at(picture) if not any(is_within(each, other) for other in found)]
        return sorted(found, key=lambda corners: (corners[:, 1].min(), corners[:, 0].min()))

    def find_at(self, picture: Image.Image) -> list[np.ndarray]:
        with self.lock:
            found = self.engine(as_bgr(picture), use_det=True, use_cls=False, use_rec=False)
        return [] if found.boxes is None else list(found.boxes)

    def read(self, line: Image.Image) -> str:
        with self.lock:
            found = self.engine(as_bgr(line), use_det=False, use_cls=True, use_rec=True)
        text = found.txts[0].strip() if found.txts else ""
        least = SURE if len(text) > FEW else SURE_OF_FEW
        return text if any(map(str.isalnum, text)) and found.scores[0] >= least else ""


def import_reader() -> tuple[ModuleType, ModuleType, dict[str, Path]]:
    """ONNX Runtime, RapidOCR and the files of its parts by their names; a `ValueError` if one of them is missing."""
    try:
        import onnxruntime
        import rapidocr
    except ImportError as error:
        raise ValueError(MISSING.format(error.name or "one of them")) from error
    folder = Path(rapidocr.__file__).parent / "models"
    models = {part: sorted(folder.glob(pattern)) for part, pattern in MODELS.items()}
    if missing := [pattern for part, pattern in MODELS.items() if not models[part]]:
        raise ValueError(
            f"RapidOCR in {str(folder.parent)!r} has no model {', '.join(missing)}: it would have to be downloaded. "
            "Install a release that has its models in it: pip install 'rapidocr>=3.10'."
        )
    return onnxruntime, rapidocr, {part: found[-1] for part, found in models.items()}


@functools.cache
def load_reader() -> TextReader:
    """The reader of this process; a `ValueError` as in `import_reader`."""
    onnxruntime, rapidocr, models = import_reader()
    # Named, so that nothing is looked up, let alone downloaded. Six lines at a time took twice the memory.
    paths = {f"{part}.model_path": str(path) for part, path in models.items()}
    engine = rapidocr.RapidOCR(params={"Global.log_level": SILENT, "Rec.rec_batch_num": 1, **paths})
    onnxruntime.set_default_logger_severity(4)  # fatal errors alone
    return TextReader(engine)


def read_picture(picture: Image.Image, count_tokens: Callable[[str], int], most_tokens: int = MOST_TOKENS) -> str:
    """What is written in a picture, as it stands in the prompt, and no more of it than fits: then it ends with `MORE`.

    Args:
        picture: upright RGB, with all its pixels.
        count_tokens: of a text.
        most_tokens: that the text may take.

    Raises:
        ValueError: RapidOCR is not installed.
    """
    lines = []
    for line in load_reader().lines(picture):
        lines.append(line)
        text = one_line_of(lines)
        if count_tokens(text) > most_tokens or len(lines) > MOST_LINES:
            return shortened(text, count_tokens, most_tokens)
    return one_line_of(lines)


def shortened(text: str, count_tokens: Callable[[str], int], most_tokens: int) -> str:
    """The longest beginning that, with `MORE` behind it, takes so many tokens at most."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens(text[:middle] + MORE) <= most_tokens else (low, middle - 1)
    return text[:low].rstrip(LINE_BREAK) + MORE


def reduced(picture: Image.Image, longest_side: int) -> Image.Image:
    """The picture, or a smaller one of at most so many pixels a side."""
    scale = longest_side / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(scale * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def is_within(corners: np.ndarray, other: np.ndarray) -> bool:
    """Whether the middle of a line is in the upright frame of another one."""
    middle = corners.mean(0)
    return bool((other.min(0) <= middle).all() and (middle <= other.max(0)).all())


def straightened(picture: Image.Image, corners: np.ndarray) -> Image.Image:
    """The line between four corners as an upright rectangle."""
    upper_left, upper_right, lower_right, lower_left = np.asarray(corners, dtype=float)
    width = max(1, round(max(length(upper_right - upper_left), length(lower_right - lower_left))))
    height = max(1, round(max(length(lower_left - upper_left), length(lower_right - upper_right))))
    quad = np.concatenate((upper_left, lower_left, lower_right, upper_right)).tolist()
    line = picture.transform((width, height), Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)
    return line.transpose(Image.Transpose.ROTATE_90) if height >= TALL * width else line


def length(vector: np.ndarray) -> float:
    return float(np.hypot(*vector))


def as_bgr(picture: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
