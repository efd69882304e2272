# SPDX-License-Identifier: Apache-2.0
"""The pictures that a caller of `chat()` gives: opened, read and encoded, none of them twice.

Not here: where a picture comes from (`fetching.py`), how it becomes pixels (`image_processing_visualglm.py`), and what
a conversation remembers (`history.py`).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from .fetching import fetch_picture
from .history import AnsweredTurn, ChatHistory, RememberedImage
from .image_processing_visualglm import VisualGLMImageProcessor, open_picture
from .soft_prompts import SoftPromptMixin
from .text_in_pictures import read_picture


@dataclass(frozen=True)
class GivenImage:
    """A picture that a caller gives: a digest of its pixels, its pixel values [1, 3, H, W], and what it was."""

    digest: str
    pixel_values: torch.Tensor
    picture: Image.Image | None = None  # with all its pixels, where they are needed


class PicturesMixin(SoftPromptMixin):
    """Pictures as `chat()` takes them, for a model with `get_image_features`, `input_device` and a VisualGLM config."""

    def open_images(self, image_path, image_size: int | None = None, keep_pixels: bool = False) -> list[GivenImage]:
        """The picture or the list of pictures that a caller gives; None and "" are none.

        Args:
            image_path, image_size: see `chat`.
            keep_pixels: whether the pictures themselves are needed, too.
        """
        vision = self.config.vision_config
        side = vision.shown_image_size if image_size is None else image_size
        vision.check_image_size(side)
        if image_path is None or (isinstance(image_path, str) and not image_path):
            return []
        sources = image_path if isinstance(image_path, (list, tuple)) else [image_path]
        if not sources:
            return []
        image_processor = VisualGLMImageProcessor(size={"height": side, "width": side})
        pictures = [fetch_picture(source) for source in sources]
        if keep_pixels:  # an array may be several pictures
            pictures = [each for some in pictures for each in (some if getattr(some, "ndim", 0) == 4 else [some])]
            pictures = list(map(open_picture, pictures))
        pixel_values = image_processor(pictures, return_tensors="pt")["pixel_values"]
        kept = pictures if keep_pixels else [None] * len(pixel_values)
        return [
            GivenImage(hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), pixels[None], picture)
            for pixels, picture in zip(pixel_values, kept, strict=True)
        ]

    def read_images(
        self, tokenizer: PreTrainedTokenizerBase, given: Iterable[GivenImage], history: ChatHistory
    ) -> dict[str, str]:
        """What is written in the pictures that a caller gives, by their digests.

        Those that stand in the history get it there, unless they have it.
        """

        def count_tokens(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

        readings = {image.digest: image.reading for image in history.images if image.reading is not None}
        for image in given:
            if image.digest not in readings:
                readings[image.digest] = read_picture(image.picture, count_tokens)
        for place, turn in enumerate(history):
            images = [replace(image, reading=readings.get(image.digest)) for image in turn.images]
            history[place] = AnsweredTurn(turn, images)
        return readings

    def remember_images(
        self, images: Iterable[GivenImage], known: Mapping[str, torch.Tensor], readings: Mapping[str, str]
    ) -> tuple[RememberedImage, ...]:
        """Pictures with their soft prompts, of which no digest is encoded twice.

        Args:
            images: pixel values [1, 3, H, W] each.
            known: digests and their soft prompts, [1, num_query_tokens, C] each.
            readings: digests and what was read.
        """
        embeds = dict(known)
        for image in images:
            if image.digest not in embeds:
                with torch.no_grad():
                    pixel_values = image.pixel_values.to(self.input_device)
                    embeds[image.digest] = self.encode_pictures(pixel_values, interpolate_pos_encoding=True)
        return tuple(
            RememberedImage(image.digest, embeds[image.digest], reading=readings.get(image.digest)) for image in images
        )

    def check_embeds(self, history: ChatHistory) -> None:
        """Raise a `ValueError` if another model has encoded a picture of the history."""
        expected = (1, self.config.qformer_config.num_query_tokens, self.config.text_config.hidden_size)
        for image in history.images:
            if tuple(image.embeds.shape) != expected:
                raise ValueError(
                    f"The picture before history[{image.turn}] was encoded by another model: its embeddings have the "
                    f"shape {tuple(image.embeds.shape)}, this model's {expected}. Pass list(map(tuple, history)) as "
                    "history, and the picture again."
                )
