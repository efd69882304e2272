# SPDX-License-Identifier: Apache-2.0
"""`chat()` and `stream_chat()`: pictures and words in, words out.

Not here: what a prompt looks like (`conversation.py`), and how tokens are chosen (transformers' `generate`).
Source: `chat`, `stream_chat` and their defaults in the original `modeling_chatglm.py`.
"""

import inspect
import numbers
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .attention_maps import SeenPicture, see
from .compilation import resolve_compile_config
from .conversation import build_prompt, check_history, check_query, clean_response, expand_images, uncleaned
from .generation_options import check_chat_options, resolve_chat_options
from .history import AnsweredTurn, ChatHistory, RememberedImage, joining_turn, shown_last
from .text_in_pictures import is_wanted
from .zooming import count_looks, zoom_in


MAX_BYTE_TOKENS = 4  # of one UTF-8 character
# Arguments that are not `generate`'s.
NO_OPTIONS = ("self", "tokenizer", "image_path", "query", "history", "english", "read_text", "zoom", "image_size")


@dataclass
class Turn:
    """One question on its way to an answer: the inputs of `generate`, and what the history will remember."""

    inputs: BatchFeature
    query: str
    history: ChatHistory
    images: tuple[RememberedImage, ...]  # those that stand before the query
    seen: SeenPicture | None = None  # the one that is looked into, if one is
    place: int = 0  # of that among the pictures of the prompt

    @property
    def prompt_length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def finish(self, text: str) -> tuple[str, ChatHistory]:
        response = clean_response(text)
        return response, ChatHistory([*self.history, AnsweredTurn((self.query, response), self.images)])


class RefuseNan(LogitsProcessor):
    """Stop with an error where the original would have answered token 5 for ever."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if torch.isnan(scores).any():
            raise ValueError(
                "The model computed NaN: its weights are damaged or half precision overflowed. Check the checkpoint "
                "with visualglm check, or load it with dtype=torch.bfloat16 or torch.float32."
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
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise ValueError(
            f"chat() needs the tokenizer first, found {type(tokenizer).__name__}. Load it with AutoTokenizer, or pass "
            "processor.tokenizer."
        )
    for name, token_id in (("bos_token", config.bos_token_id), ("eos_token", config.eos_token_id)):
        found = tokenizer.convert_tokens_to_ids(getattr(tokenizer, name))
        if found != token_id:
            raise ValueError(
                f"The tokenizer's {name} is {found}, the model's {token_id}. Load the tokenizer (ice_text.model) that "
                "belongs to this checkpoint."
            )


def choose_image(images: Sequence, number: int, has_history: bool):
    """The given picture of this number; a `ValueError` if there is none."""
    if not images:
        again = "again: the history remembers only what the model made of it" if has_history else "before the query"
        raise ValueError(f"look() and zoom need the picture itself. Pass it {again}.")
    is_number = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not is_number or not -len(images) <= number < len(images):
        raise ValueError(f"number must be that of one of the {len(images)} pictures given, found {number!r}.")
    return images[number]


def place_of(image, before: Sequence, joining: Sequence) -> int:
    """Where among the pictures of the history and those that join it a given one stands, the last time if it does not
    join again."""
    for place, each in enumerate(joining, len(before)):
        if each is image:
            return place
    return max(place for place, each in enumerate(before) if each.digest == image.digest)


def check_readings(history: ChatHistory) -> None:
    """Raise a `ValueError` if there is no picture to read, and none that was read before."""
    if all(image.reading is None for image in history.images):
        found, remedy = "none", "Give one"
        if history.images:
            found, remedy = "only what the model made of those in the history", "Give it again"
        raise ValueError(f"read_text=True reads the text in pictures, and there is {found}. {remedy}, or leave it out.")


def checked_turns(history: Iterable | None) -> list[Sequence[str]]:
    """The turns of what a caller has for a history, None for none; a `ValueError` as in `check_history`."""
    if history is None or isinstance(history, Iterator):
        history = list(history or ())
    pairs = check_history(history)
    return [turn if hasattr(turn, "images") else pair for turn, pair in zip(history, pairs, strict=True)]


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
    """Conversation for a model with `generate`, `PicturesMixin` and a VisualGLM config."""

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
        read_text: bool = False,
        zoom: bool | int = False,
        *,
        image_size: int | None = None,
        given: dict[str, Any],
        **kwargs,
    ) -> tuple[str, ChatHistory]:
        """Answer one question.

        `chat(tokenizer, image, query, history=history)` asks about a picture; `chat(tokenizer, query, history=history)`
        goes on about the pictures that the history returned by an earlier call remembers, and without such a history is
        a conversation without pictures. A picture joins the conversation at this turn, unless it is the one that was
        shown last; no picture is encoded twice. With a plain list as history it stands in front of it, as in the
        original.

        Args:
            tokenizer: the checkpoint's tokenizer.
            image_path: a path, an http(s) URL, a `data:` URI, base64 text, a PIL image, bytes, an open file, an array
                or a dict with "bytes" or "path"; a list of these for several pictures; None or "" for none.
            query: the question.
            history: (query, response) pairs, oldest first; not changed. Each pair that an earlier call returned carries
                the pictures that stand before it, into whatever list it is put (see `ChatHistory`).
            max_length: of prompt and answer, in tokens.
            min_length: of prompt and answer, in tokens; None takes the generation config's, or else the original's 100.
            do_sample, top_p, top_k, temperature, repetition_penalty, logits_processor: as in `generate`. What a
                `generation_config` among the keywords sets holds instead, unless it is given here, too; the defaults,
                which are the original's, hold instead of those of the model's own `generation_config`.
            english: whether to prompt with `Q:`/`A:` instead of `问：`/`答：`; None follows the query's language.
            read_text: whether to read the text in the pictures of this turn, with RapidOCR, and to put it before the
                question. What was read is in `history[-1].readings`, and stays in the conversation. Without text, the
                prompt is as without `read_text`.
            zoom: whether to answer from the part of the picture that matters to the question, cropped from its full
                pixels; a number looks so many times, each time into what was cropped. The picture must be given, also
                if the history remembers it; of several, the last is looked into. The history remembers the whole one.
            image_size: pixels a side at which the given pictures are shown, a multiple of the patch size, 14; None for
                what the model was made for, 224, or fine-tuned for.
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
        shown = {"read_text": read_text, "zoom": zoom, "image_size": image_size}
        turn = self.prepare_turn(tokenizer, image_path, query, history, english, options.get("max_length"), **shown)
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
        read_text: bool = False,
        zoom: bool | int = False,
        *,
        image_size: int | None = None,
        given: dict[str, Any],
        **kwargs,
    ) -> Iterator[tuple[str, ChatHistory]]:
        """[`~ChatMixin.chat`] that yields the growing answer.

        Yields whenever the text has grown by whole characters, and last what `chat` would return, with the last token,
        which the original lost. When the caller stops iterating, the model stops within one token.
        """
        tokens = TokenQueue(given.pop("streamer", None))
        options = self.generation_options(tokenizer, **given, streamer=tokens)
        shown = {"read_text": read_text, "zoom": zoom, "image_size": image_size}
        turn = self.prepare_turn(tokenizer, image_path, query, history, english, options.get("max_length"), **shown)
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
        self,
        tokenizer,
        image_path,
        query,
        history,
        english: bool | None = None,
        max_length: int | None = None,
        *,
        read_text: bool = False,
        zoom: bool | int = False,
        look: int | None = None,
        image_size: int | None = None,
    ) -> Turn:
        """Check everything that is cheap to check, then encode the pictures that are new.

        Args:
            read_text, zoom, image_size: see `chat`.
            look: the number of the given picture that will be looked into; None for none, or for the last one if there
                is a zoom.
        """
        turns, looks, read_text = checked_turns(history), count_looks(zoom), is_wanted(read_text)
        if query is None:
            image_path, query = None, image_path
            if not turns and isinstance(query, str) and os.path.isfile(query):
                raise ValueError(f"There is a picture, {query!r}, but no query: chat(tokenizer, image_path, query).")
        check_query(query)
        check_tokenizer(tokenizer, self.config.text_config)
        place, history = joining_turn(turns), ChatHistory(turns)
        self.check_embeds(history)
        look = -1 if look is None and looks else look
        given = self.open_images(image_path, image_size, keep_pixels=read_text or look is not None)
        looked_into = None if look is None else choose_image(given, look, has_history=bool(history.images))
        if read_text and not given:
            check_readings(history)
        joining = [image for image in given if image.digest not in shown_last(history)]
        readings = self.read_images(tokenizer, given, history) if read_text else {}

        before = history.images
        image_turns = [*(image.turn for image in before), *[place] * len(joining)]
        in_order = [*(image.reading or "" for image in before), *(readings.get(each.digest, "") for each in joining)]
        prompt = build_prompt(query, history, image_turns, english, in_order)
        inputs = self.tokenize_prompt(tokenizer, prompt, len(image_turns), max_length)
        known, seen = {image.digest: image.embeds for image in before}, None
        if looked_into is not None:
            seen = see(self, looked_into.picture, looked_into.pixel_values)
            known.setdefault(looked_into.digest, seen.embeds)
        images = self.remember_images(joining, known, readings)
        if embeds := [image.embeds.to(self.input_device) for image in (*before, *images)]:
            inputs["image_embeds"] = torch.cat(embeds)
        if place < len(history):  # in front of a plain list
            history[place], images = AnsweredTurn(history[place], images), ()
        turn = Turn(inputs, query, history, images, seen)
        if looked_into is not None:
            turn.place = place_of(looked_into, before, joining)
        if looks:
            input_ids, image_embeds = inputs["input_ids"], inputs["image_embeds"]
            inputs["image_embeds"] = zoom_in(self, seen, input_ids, image_embeds, turn.place, looks)
        return turn

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
        stops = options.get("stop_strings") or self.generation_config.stop_strings
        if stops:  # callers take them from answers that are cleaned
            options["stop_strings"] = [uncleaned(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
        options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or ()), RefuseNan()])
        check_chat_options(options, self.generation_config)
        return options
