# SPDX-License-Identifier: Apache-2.0
"""`look()`: an answer, and where in the picture the model looked when it gave it.

Not here: how that is computed (`attention_maps.py`), and what is done with it to see small things (`zooming.py`).
"""

import base64
import html
import io
import numbers
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .attention_maps import map_answer
from .history import ChatHistory


# From dark blue over grey to yellow, evenly lighter all the way: read alike with and without colour blindness. Five
# colours of cividis (Nuñez, Anderton and Renslow, 2018), with straight lines between them.
PALETTE = np.array([(0, 32, 77), (65, 77, 107), (124, 123, 120), (188, 175, 111), (255, 234, 70)], dtype=np.float32)
LONGEST_SHOWN = 512  # pixels of a side in a notebook


def colour(values: np.ndarray) -> np.ndarray:
    """Numbers 0..1, [H, W], as the colours of `PALETTE`, float32 [H, W, 3] in 0..255."""
    places = np.linspace(0, 1, len(PALETTE))
    return np.stack([np.interp(values, places, channel) for channel in PALETTE.T], axis=-1).astype(np.float32)


@dataclass(frozen=True, repr=False)
class Look:
    """An answer, and where the model looked. In a notebook it shows itself.

    Attributes:
        map: float32 [side, side] over the whole picture, a number for each patch of 14 x 14 pixels that the model saw
            ([16, 16] of 224 x 224), upper row first; sums to 1.
        response: the answer.
        history: with this turn, as `chat` returns it.
        picture: that was looked at, in its full pixels.
    """

    map: torch.Tensor
    response: str
    history: ChatHistory
    picture: Image.Image

    def overlay(self, opacity: float = 0.6, longest: int | None = None) -> Image.Image:
        """The picture in grey with the map over it in colour: yellow where the model looked most, blue where least.

        Args:
            opacity: of the map, from 0 to 1.
            longest: side that the result has at most, in pixels; None for the picture's own.

        Raises:
            ValueError: another opacity, or no such side.
        """
        if not isinstance(opacity, numbers.Real) or not 0 <= opacity <= 1:
            raise ValueError(f"opacity must be from 0 to 1, found {opacity!r}.")
        is_number = isinstance(longest, numbers.Integral) and not isinstance(longest, bool)
        if longest is not None and (not is_number or longest < 1):
            raise ValueError(f"longest must be a number of pixels, 1 or more, found {longest!r}.")
        picture = self.picture.convert("L").convert("RGB")
        if longest is not None:
            picture.thumbnail((longest, longest))
        values = Image.fromarray((self.map / self.map.max()).numpy().astype(np.float32))
        values = np.asarray(values.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
        colours = Image.fromarray(colour(values).round().astype(np.uint8))
        return Image.blend(picture, colours, opacity)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.overlay(longest=LONGEST_SHOWN).save(file, "PNG")
        return file.getvalue()

    def to_html(self) -> str:
        """The overlay and under it the answer, which is text whatever it is."""
        picture = base64.b64encode(self._repr_png_()).decode()
        response = html.escape(self.response)
        return (
            f'<figure><img src="data:image/png;base64,{picture}" alt="Where the model looked">'
            f"<figcaption>{response}</figcaption></figure>"
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        y, x = divmod(int(self.map.argmax()), self.map.shape[1])
        return f"Look(response={self.response!r}, peak=(row {y}, column {x}) of {list(self.map.shape)})"


class LookMixin:
    """For a model that has `chat`'s `prepare_turn` and `generation_options`."""

    @torch.no_grad()
    def look(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_path,
        query: str,
        history: Iterable[tuple[str, str]] | None = None,
        english: bool | None = None,
        read_text: bool = False,
        *,
        number: int = -1,
        image_size: int | None = None,
        do_sample: bool = False,
        **options,
    ) -> Look:
        """Answer a question as `chat` does, and tell where in the picture the answer comes from.

        The answer is the one of `chat(..., do_sample=False)`; after it, prompt and answer are computed once more, with
        gradients.

        Args:
            tokenizer, image_path, query, history, english, read_text, image_size: as in `chat`. The picture must be
                given, also if the history remembers it.
            number: of the picture that the map belongs to, if several are given; the last by default.
            do_sample: whether to choose tokens at random, as `chat` does.
            **options: the others of `chat`.

        Raises:
            ValueError: as in `chat`; no picture, or none of this number; a model that is divided among processes.
        """
        if options.pop("zoom", False):
            raise ValueError("look() tells where in the whole picture the model looks. Leave zoom out.")
        if number is None:  # prepare_turn's word for a picture that nobody looks into
            raise ValueError("number must be that of one of the pictures given, found None. Leave it out for the last.")
        options = self.generation_options(tokenizer, do_sample=do_sample, **options)
        shown = {"read_text": read_text, "look": number, "image_size": image_size}
        turn = self.prepare_turn(tokenizer, image_path, query, history, english, options.get("max_length"), **shown)
        output = self.generate(**turn.inputs, **options)
        sequences = output.sequences if isinstance(output, ModelOutput) else output
        response, history = turn.finish(tokenizer.decode(sequences[0, turn.prompt_length :].tolist()))
        attention_map = map_answer(
            self, sequences[:1], turn.inputs["image_embeds"], turn.place, turn.prompt_length, turn.seen.sources
        )
        return Look(attention_map, response, history, turn.seen.picture)
