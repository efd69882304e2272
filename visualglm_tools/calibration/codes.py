"""Prompts of the user's own -> better codes for the checkpoint that is being quantized, and how much better they are.

Not here: how codes are calibrated (`visualglm_hf/calibration.py`) and written (`checkpoints/quantizing.py`).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from visualglm_hf import VisualGLMForConditionalGeneration, VisualGLMProcessor
from visualglm_hf.calibration import ANSWER_TOKENS
from visualglm_hf.quantization import find_quantized
from visualglm_tools.checkpoints.loading import choose_device, choose_exact_dtype, load_weights, make_processor
from visualglm_tools.checkpoints.prepared import Checkpoint
from visualglm_tools.checkpoints.quantizing import Codes
from visualglm_tools.layer_bar import counted_layers
from visualglm_tools.messages import Name
from visualglm_tools.printing import one_line
from visualglm_tools.serving.engine.prompts import arrange
from visualglm_tools.serving.questions import UNPREPARED, Pictures, Row, read_rows


QUESTION = "描述这张图片。"  # about each picture of a folder
MOST_PROMPTS = 128  # more take longer and tell no more
HELD_OUT = 4  # one prompt in so many, if the error is to be measured
# Through each layer: the full model's, twice; one to measure each of its four matrices, and one to go on to the next.
PASSES = 7


class Question(NamedTuple):
    """What is asked, as messages with bare places for the pictures, and their names; a name of its own for errors."""

    name: str
    messages: list[dict]
    pictures: list[Name]


class Errors(NamedTuple):
    """Relative errors of the logits after prompts that were not calibrated with, and how many of these there were."""

    prompts: int
    plain: float
    calibrated: float

    def __str__(self) -> str:
        ratio = f" ({self.calibrated / self.plain:.2f} of it)" if self.plain else ""
        return (
            f"Relative error of the logits after {self.prompts} prompts that were held out: "
            f"{100 * self.plain:.2f} % plain, {100 * self.calibrated:.2f} % calibrated{ratio}."
        )


def say(text: str) -> None:
    print(one_line(text), file=sys.stderr)


def find_questions(place: Path) -> tuple[list[Question], Pictures]:
    """The questions of a JSON Lines file, or one about each picture of a folder.

    Raises:
        ValueError: there is no such place, or nothing in it.
    """
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
        asked = [Row(number, {"text": QUESTION, "image": str(file.resolve())}) for number, file in enumerate(files, 1)]
        questions = [Question(file.name, *row.conversation()) for file, row in zip(files, asked, strict=True)]
    elif place.is_file():
        rows, problems = read_rows(place)
        for problem in problems:
            say(f"line {problem.number} is left out: {one_line(problem.error)}")
        questions = [Question(f"line {row.number}", *row.conversation()) for row in rows]
    else:
        raise ValueError(f"{place} does not exist. Give a folder of pictures, or JSON Lines of text and image.")
    if not questions:
        raise ValueError(f"{place} has nothing to calibrate with. Give pictures, or questions; 32 are enough.")
    return questions, Pictures(place if place.is_dir() else place.parent, allow_urls=False)


def read_prompts(place: Path, processor: VisualGLMProcessor) -> list[dict[str, torch.Tensor]]:
    """The first questions of a place as inputs of the model; what is wrong with a picture is said, and it is left out.

    Raises:
        ValueError: there is none whose picture can be read.
    """
    questions, pictures = find_questions(place)
    prompts = []
    for question in questions:
        if len(prompts) == MOST_PROMPTS:
            say(f"{place} has more than {MOST_PROMPTS} prompts; the first {MOST_PROMPTS} are taken.")
            break
        try:
            images = [pictures.open(name) for name in question.pictures]
        except UNPREPARED as error:
            say(f"{question.name} is left out: {one_line(str(error))}")
            continue
        text = processor.apply_chat_template(arrange(question.messages, None), add_generation_prompt=True)
        prompts.append(dict(processor(text=[text], images=images or None, return_tensors="pt")))
    if not prompts:
        raise ValueError(f"No picture of {place} can be read. Give others; 32 are enough.")
    return prompts


class Calibration:
    """The checkpoint in `source`, and the prompts of a place, some of them held out if the error is to be measured.

    Raises:
        ValueError: see `read_prompts`; also too few prompts to hold some out.
    """

    def __init__(self, source: Path, checkpoint: Checkpoint, place: Path, is_measured: bool):
        self.source = source
        self.device = choose_device("auto")
        self.dtype = choose_exact_dtype(self.device, source)
        processor = make_processor(checkpoint.tokenizer, checkpoint.config)
        prompts = [self.move(prompt) for prompt in read_prompts(place, processor)]
        if is_measured and len(prompts) < HELD_OUT:
            raise ValueError(
                f"{len(prompts)} prompts are too few to hold some out. Give {HELD_OUT}, better 32, or more."
            )
        self.held_out = prompts[HELD_OUT - 1 :: HELD_OUT] if is_measured else []
        self.shown = [prompt for prompt in prompts if not any(prompt is other for other in self.held_out)]

    def move(self, prompt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A prompt on the device, its picture in the model's number format."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in prompt.items()
        }

    def load(self) -> VisualGLMForConditionalGeneration:
        model = load_weights(self.source, self.dtype)
        return model.to(self.device).eval()

    def choose_codes(self, group_size: int | None, image_encoder: bool = False) -> tuple[Codes, Errors | None]:
        """Calibrate, and measure if that was asked for: then the checkpoint is loaded twice, one time after another."""
        plain = expected = None
        if self.held_out:
            model = self.load()
            expected = self.logits_of(model)
            plain = difference(self.logits_of(model.quantize(4, group_size, image_encoder=image_encoder)), expected)
            del model
        model = self.load()
        with progress_of(model, len(self.shown)):
            model.quantize(4, group_size, calibration=self.shown, image_encoder=image_encoder)
        errors = None
        if expected is not None:
            errors = Errors(len(self.held_out), plain, difference(self.logits_of(model), expected))
        decoder = model.get_decoder()
        layers = {name: decoder.get_submodule(name) for name in find_quantized(decoder)}
        return {
            f"transformer.{name}.weight": (layer.weight.detach().cpu(), layer.weight_scale.cpu())
            for name, layer in layers.items()
        }, errors

    @torch.no_grad()
    def logits_of(self, model: VisualGLMForConditionalGeneration) -> torch.Tensor:
        """What the model thinks comes after each prompt that was held out, [prompts, vocabulary]."""
        return torch.cat([model(**prompt, logits_to_keep=1).logits[:, -1].float() for prompt in self.held_out])


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


@contextmanager
def progress_of(model: VisualGLMForConditionalGeneration, prompts: int) -> Iterator[None]:
    """Draw how far the layers of a model have come with so many prompts; answers may be shorter than they might."""
    total = len(model.get_decoder().layers) * prompts * (ANSWER_TOKENS + PASSES)
    with tqdm(total=total, desc="calibrating", unit="pass") as progress, counted_layers(model, progress):
        yield
        progress.total = progress.n
