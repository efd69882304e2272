# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`chat()` and `stream_chat()`: pictures and words in, words out.

Not here: what a prompt looks like (`conversation.py`), and how tokens are chosen (transformers' `generate`).
Source: `chat`, `stream_chat` and their defaults in the original `modeling_chatglm.py`.
"""

import hashlib
import inspect
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .compilation import resolve_compile_config
from .conversation import build_prompt, check_history, check_query, clean_response, expand_images
from .fetching import fetch_picture
from .generation_options import check_chat_options, resolve_chat_options
from .image_processing_visualglm import VisualGLMImageProcessor


MAX_BYTE_TOKENS = 4  # of one UTF-8 character
NO_OPTIONS = ("self", "tokenizer", "image_path", "query", "history", "english")  # arguments that are not `generate`'s


@dataclass(frozen=True)
class RememberedImage:
    """A picture of a conversation: the turn it stands before, a digest of its pixels, its soft prompt [1, 32, C]."""

    turn: int
    digest: str
    embeds: torch.Tensor


class ChatHistory(list):
    """The (query, response) pairs of a conversation: equal to the plain list, but it remembers the pictures."""

    def __init__(self, turns: Iterable[tuple[str, str]] = (), images: Iterable[RememberedImage] = ()):
        super().__init__(turns)
        self.images = tuple(images)


@dataclass
class Turn:
    """One question on its way to an answer: the inputs of `generate`, and what the history will remember."""

    inputs: BatchFeature
    query: str
    history: list[tuple[str, str]]
    images: tuple[RememberedImage, ...]

    @property
    def prompt_length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def finish(self, text: str) -> tuple[str, ChatHistory]:
        response = clean_response(text)
        return response, ChatHistory([*self.history, (self.query, response)], self.images)


class RefuseNan(LogitsProcessor):
    """Stop with an error where the original would have answered token 5 for ever."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if torch.isnan(scores).any():
            raise ValueError(
                "The model computed NaN: its weights are damaged or half precision overflowed. Check the checkpoint "
                "with scripts/selftest.py, or load it with dtype=torch.bfloat16 or torch.float32."
            )
        return scores


class StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class TokenQueue(BaseStreamer):
    """Hands the new tokens of one sequence from the thread of `generate` to the one that iterates.

    Args:
        streamer: the caller's own, which gets all that `generate` gives; None for none.
    """

    def __init__(self, streamer: BaseStreamer | None = None):
        self.queue = queue.SimpleQueue()
        self.is_prompt = True
        self.streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(value)
        if not self.is_prompt:  # the first call carries the prompt
            self.queue.put(value.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
        self.close()

    def close(self) -> None:
        """Nothing more will come, whether `generate` has ended or failed."""
        self.queue.put(None)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.queue.get, None)


class IncrementalDecoder:
    """Text of a growing list of tokens, in time linear in its length: each call decodes only the last few tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.text = ""  # of whole characters, before clean-up
        self.window, self.read = 0, 0  # decode from `window`; `text` covers the tokens before `read`

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)

    def add(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        end = self.end_of_whole_characters()
        known = self.decode(self.token_ids[self.window : self.read])
        now = self.decode(self.token_ids[self.window : end])
        if len(now) > len(known):
            self.text += now[len(known) :]
            if now[len(known) :].strip():  # sentencepiece drops all blanks at the start of a window
                self.window = self.read
            self.read = end

    def end_of_whole_characters(self) -> int:
        """How many tokens have text that later ones will not change: no half character at the end, unless broken."""
        end = len(self.token_ids)
        while end > self.read and self.decode(self.token_ids[self.window : end]).endswith("\ufffd"):
            end -= 1
        return max(end, len(self.token_ids) - MAX_BYTE_TOKENS + 1)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config) -> None:
    """Raise a `ValueError` if the tokenizer is not the checkpoint's: ChatGLM-6B had two vocabularies."""
    for name, token_id in (("bos_token", config.bos_token_id), ("eos_token", config.eos_token_id)):
        found = tokenizer.convert_tokens_to_ids(getattr(tokenizer, name))
        if found != token_id:
            raise ValueError(
                f"The tokenizer's {name} is {found}, the model's {token_id}. Load the tokenizer (ice_text.model) that "
                "belongs to this checkpoint."
            )


def notes_given(method: Callable) -> Callable:
    """Tell a method, as its keyword `given`, which of its arguments the caller gave, by name.

    So its signature can show the values that hold by default, and an option that was left open is still told from one
    that was given that value.
    """
    signature = inspect.signature(method)
    shown = [parameter for name, parameter in signature.parameters.items() if name != "given"]
    signature = signature.replace(parameters=shown)

    @wraps(method)
    def call(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        options = {name: value for name, value in given.items() if name not in ("kwargs", *NO_OPTIONS)}
        return method(*args, **kwargs, given=options | given.get("kwargs", {}))

    call.__signature__ = signature
    return call


class ChatMixin:
    """Conversation for a model with `generate`, `encode_pictures`, `input_device` and a VisualGLM config."""

    @notes_given
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_path=None,
        query: str | None = None,
        history: Iterable[tuple[str, str]] | None = None,
        max_length: int = 1024,
        min_length: int | None = None,
        do_sample: bool = True,
        top_p: float = 0.4,
        top_k: int = 100,
        temperature: float = 0.8,
        repetition_penalty: float = 1.2,
        logits_processor: LogitsProcessorList | None = None,
        english: bool | None = None,
        *,
        given: dict[str, Any],
        **kwargs,
    ) -> tuple[str, ChatHistory]:
        """Answer one question.

        `chat(tokenizer, image, query, history=history)` asks about a picture; `chat(tokenizer, query, history=history)`
        goes on about the pictures that the history returned by an earlier call remembers, and without such a history is
        a conversation without pictures. A picture that the history already has is not encoded again; a new one joins
        the conversation at this turn; with a plain list as history it stands in front of it, as in the original.

        Args:
            tokenizer: the checkpoint's tokenizer.
            image_path: a path, an http(s) URL, a `data:` URI, a PIL image, bytes, an array, or None or "" for none.
            query: the question.
            history: (query, response) pairs, oldest first; not changed.
            max_length: of prompt and answer, in tokens.
            min_length: of prompt and answer, in tokens; None takes the generation config's, or else the original's 100.
            do_sample, top_p, top_k, temperature, repetition_penalty, logits_processor: as in `generate`. What a
                `generation_config` among the keywords sets holds instead, unless it is given here, too; the defaults,
                which are the original's, hold instead of those of the model's own `generation_config`.
            english: whether to prompt with `Q:`/`A:` instead of `问：`/`答：`; None follows the query's language.
            **kwargs: anything else that `generate` takes. `max_new_tokens` replaces `max_length`, `min_new_tokens`
                `min_length`; `compile=True` makes all answers but the first faster, for which the step from token to
                token is compiled.

        Returns:
            The answer, and the history with this turn.

        Raises:
            ValueError: an unusable query, history, picture, tokenizer or length; an option that is unknown or cannot be
                kept; NaN in the logits.
        """
        # The options are taken from `given`: which of them were left open is known there only.
        options = self.generation_options(tokenizer, **given)
        turn = self.prepare_turn(tokenizer, image_path, query, history, english, options.get("max_length"))
        output = self.generate(**turn.inputs, **options)
        sequences = output.sequences if isinstance(output, ModelOutput) else output
        return turn.finish(tokenizer.decode(sequences[0, turn.prompt_length :].tolist()))

    @notes_given
    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_path=None,
        query: str | None = None,
        history: Iterable[tuple[str, str]] | None = None,
        max_length: int = 1024,
        min_length: int | None = None,
        do_sample: bool = True,
        top_p: float = 0.4,
        top_k: int = 100,
        temperature: float = 0.8,
        repetition_penalty: float = 1.2,
        logits_processor: LogitsProcessorList | None = None,
        english: bool | None = None,
        *,
        given: dict[str, Any],
        **kwargs,
    ) -> Iterator[tuple[str, ChatHistory]]:
        """[`~ChatMixin.chat`] that yields the growing answer.

        Yields whenever the text has grown by whole characters, and last what `chat` would return, with the last token,
        which the original lost. When the caller stops iterating, the model stops within one token.
        """
        tokens = TokenQueue(given.pop("streamer", None))
        options = self.generation_options(tokenizer, **given, streamer=tokens)
        turn = self.prepare_turn(tokenizer, image_path, query, history, english, options.get("max_length"))
        return self.stream_turn(tokenizer, turn, options)

    def stream_turn(self, tokenizer, turn: Turn, options: dict) -> Iterator[tuple[str, ChatHistory]]:
        """Yield the growing response of a turn; `options` are those of `generate`, with a `TokenQueue` as streamer."""
        tokens, decoder, stop = options["streamer"], IncrementalDecoder(tokenizer), threading.Event()
        criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or ()), StopWhenSet(stop)])
        last = None
        with ThreadPoolExecutor(1) as pool:
            worker = pool.submit(self.generate, **turn.inputs, **options, stopping_criteria=criteria)
            worker.add_done_callback(lambda _: tokens.close())  # also when it failed before its streamer ended
            try:
                for token_ids in tokens:
                    decoder.add(token_ids)
                    response, history = turn.finish(tokenizer.clean_up_tokenization(decoder.text))
                    if response and response != last:
                        last = response
                        yield response, history
            finally:
                stop.set()
                wait([worker])
        worker.result()  # raises what `generate` raised
        response, history = turn.finish(tokenizer.decode(decoder.token_ids))
        if response != last:
            yield response, history

    def prepare_turn(
        self, tokenizer, image_path, query, history, english: bool | None = None, max_length: int | None = None
    ) -> Turn:
        """Check everything that is cheap to check, then encode the picture, if it is a new one."""
        if query is None:
            image_path, query = None, image_path
            if not history and isinstance(query, str) and os.path.isfile(query):
                raise ValueError(f"There is a picture, {query!r}, but no query: chat(tokenizer, image_path, query).")
        check_query(query)
        check_tokenizer(tokenizer, self.config.text_config)
        images = list(getattr(history, "images", ()))
        history = check_history(history or ())
        new_image = self.open_new_image(image_path, images)

        image_turns = [min(image.turn, len(history)) for image in images]
        if new_image is not None:
            image_turns.append(len(history) if images else 0)
        prompt = build_prompt(query, history, image_turns, english)
        inputs = self.tokenize_prompt(tokenizer, prompt, len(image_turns), max_length)
        if new_image is not None:
            digest, pixel_values = new_image
            with torch.no_grad():
                embeds = self.encode_pictures(pixel_values.to(self.input_device))
            images.append(RememberedImage(image_turns[-1], digest, embeds))
        if images:
            inputs["image_embeds"] = torch.cat([image.embeds.to(self.input_device) for image in images])
        return Turn(inputs, query, history, tuple(images))

    def open_new_image(self, image_path, images: list[RememberedImage]) -> tuple[str, torch.Tensor] | None:
        """Digest and pixel values [1, 3, H, W] of the picture; None if there is none or it is among `images`."""
        if image_path is None or (isinstance(image_path, str) and not image_path):
            return None
        image_size = self.config.vision_config.image_size
        image_processor = VisualGLMImageProcessor(size={"height": image_size, "width": image_size})
        pixel_values = image_processor(fetch_picture(image_path), return_tensors="pt")["pixel_values"]
        digest = hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest()
        return None if any(image.digest == digest for image in images) else (digest, pixel_values)

    def tokenize_prompt(self, tokenizer, prompt: str, num_images: int, max_length: int | None) -> BatchFeature:
        """`input_ids` and `attention_mask` [1, S]; a `ValueError` if there is no room for an answer."""
        prompt = expand_images(prompt, num_images, self.config.qformer_config.num_query_tokens)
        # Special tokens that a user types are text: only the marks of the prompt stand for special tokens.
        inputs = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).to(self.input_device)
        length = inputs["input_ids"].shape[1]
        self.check_length(length)
        if max_length is not None and length >= max_length:
            raise ValueError(
                f"The prompt is {length} tokens long, so max_length={max_length} leaves no room for an answer. Raise "
                "max_length or shorten the history."
            )
        return inputs

    def generation_options(self, tokenizer: PreTrainedTokenizerBase, **given) -> dict[str, Any]:
        """`generate`'s keywords for the options that a call of `chat` gave; see there which one wins.

        Raises:
            ValueError: an option that `chat` does not have, or that cannot be kept.
        """
        options = resolve_chat_options(given, self.generation_config)
        if options.get("compile"):
            options["compile"] = resolve_compile_config(options["compile"], self.input_device)
        options["tokenizer"] = tokenizer
        options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or ()), RefuseNan()])
        check_chat_options(options, self.generation_config)
        return options
