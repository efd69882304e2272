"""The engine behind every door that serves several people at once: one model, one queue, batches that form as requests
arrive.

    with Engine.load("models/visualglm-tiny", device="cpu") as engine:
        prompt = engine.prepare([{"role": "user", "content": [
            {"type": "image", "image": picture}, {"type": "text", "text": "描述这张图片。"}]}])
        answer = engine.submit(prompt, Settings(temperature=0))
        for text in answer: ...            # the growing text; in a coroutine: `async for`
        completion = answer.result()       # the whole; in a coroutine: `await answer.completion()`
        answer.cancel()                    # at any time; the model stops within one token

`prepare` and `submit` are for any thread (`prepare` decodes pictures: not in an event loop). One thread of the engine
owns the model. Not here: HTTP, who waits and whether there is room (`waiting.py`), and how a batch advances
(`batching.py`).
"""

import asyncio
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from visualglm_hf.attention_maps import see
from visualglm_hf.chat import check_tokenizer
from visualglm_hf.text_in_pictures import is_wanted
from visualglm_hf.zooming import count_looks, look_ahead, zoom_in
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.layer_bar import counted_layers
from visualglm_tools.printing import first_line
from visualglm_tools.serving.engine.answers import Answer, Completion, EngineError, Limits, late
from visualglm_tools.serving.engine.batching import Batch, Row, advance, merge, start
from visualglm_tools.serving.engine.grammar import Grammar, GrammarCompiler
from visualglm_tools.serving.engine.metrics import Metrics
from visualglm_tools.serving.engine.prompt_cache import PromptCache
from visualglm_tools.serving.engine.prompts import OpenedPicture, Prompt, PromptBuilder
from visualglm_tools.serving.engine.sampling import Chooser, Settings, TokenLogprob
from visualglm_tools.serving.engine.slots import Slots
from visualglm_tools.serving.engine.text import GrowingText, RawText
from visualglm_tools.serving.engine.vocabulary import Vocabulary
from visualglm_tools.serving.engine.waiting import Queue


JOIN_EVERY = 4  # tokens: a pause costs about one, so those who come meanwhile join together
REMEMBERED_PICTURES = 64  # of the real model, 256 KiB each in half precision

Prepared = TypeVar("Prepared")


class Engine:
    """See the module's docstring.

    Args:
        model: in evaluation mode, on its device; the engine's alone from now on.
        tokenizer: the checkpoint's.
        limits: what it takes on.
        compile: `generate`'s: whether, or how, the step of all answers is compiled or recorded.

    Raises:
        ValueError: a tokenizer that is not the model's, or a step that cannot be compiled here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits | None = None,
        compile: bool | CompileConfig = False,
    ):
        config = model.config.text_config
        check_tokenizer(tokenizer, config)
        self.model, self.tokenizer = model, tokenizer
        # Each answer has its own settings; those of the checkpoint's generation_config.json shall not come between.
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        self.limits = limits or Limits()
        self.context_length, self.eos_token_id = config.max_position_embeddings, config.eos_token_id
        self.metrics = Metrics()
        self.vocabulary = Vocabulary(tokenizer)
        self._grammars = GrammarCompiler(self.vocabulary, self.eos_token_id)
        self._prompts = PromptBuilder(model, tokenizer, self.limits.max_pictures, self.limits.max_picture_bytes)
        model.image_cache.capacity = max(model.image_cache.capacity, REMEMBERED_PICTURES)
        self.queue = Queue(self.limits, self.metrics)
        self._slots = Slots(model, compile, self.limits.max_batch_size) if compile else None
        self._merge = self._slots.merge if compile else functools.partial(merge, model)
        self._known = PromptCache(self.limits.prompt_cache_bytes)
        self._steps = 0  # since the batch last paused
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    @classmethod
    def load(
        cls, folder: str | Path, limits: Limits | None = None, compile: bool | CompileConfig = False, **options
    ) -> "Engine":
        """An engine for a checkpoint folder; `options` are those of `load_model`: device, dtype, ...

        Raises:
            ValueError: as `load_model`, and a step that cannot be compiled here.
        """
        return cls(*load_model(folder, **options), limits, compile)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close(drain=not any(error))

    def prepare(
        self,
        messages: Sequence[Mapping],
        english: bool | None = None,
        read_text: bool = False,
        zoom: bool | int = False,
        is_shown: bool = False,
    ) -> Prompt:
        """Make a prompt of a conversation: check it, open its pictures, tokenize.

        Args:
            messages: `{"role", "content"}` of "system", "user" and "assistant", the user's last; see
                `prompts.arrange` for their order. A content is a text or a list of `{"type": "text", "text": ...}` and
                `{"type": "image", "image": ...}`: a PIL image, bytes, an array or a `data:` URI, never a path or a URL.
            english: whether to prompt with `Q:`/`A:` instead of `问：`/`答：`; None follows the last question.
            read_text: whether to read the text in the pictures, and to put it before their questions; what was read
                is told by the prompt.
            zoom: as `chat`'s: whether, or how often, to look into the last picture before the answer.
            is_shown: whether the answer shall have an `attention_map` of the last picture, if there is one.

        Raises:
            ValueError: anything wrong with the messages or their pictures, or more tokens than the model takes.
        """
        return self._prompts.build(messages, english, read_text, zoom, is_shown)

    async def prepare_in_time(
        self,
        messages: Sequence[Mapping],
        asked_at: float,
        english: bool | None = None,
        fetch: Callable[[str], Awaitable[bytes]] | None = None,
        read_text: bool = False,
        zoom: bool | int = False,
    ) -> Prompt:
        """`prepare` for coroutines, beside their loop and beside others that are being prepared.

        Args:
            messages, english, read_text, zoom: see `prepare`.
            asked_at: when the time of the request began, by `time.monotonic`.
            fetch: what reads a picture given by its address; None refuses addresses.

        Raises:
            ValueError: as `prepare`.
            AnswerTimeout: the prompt was not ready in time.
        """
        return await self._in_time(self._prompts.build_async(messages, english, fetch, read_text, zoom), asked_at)

    async def prepare_text_in_time(self, text: str, asked_at: float, **how: bool) -> Prompt:
        """`prepare_in_time` for a text that is the whole prompt, as it stands.

        Args:
            text, how: see `PromptBuilder.build_text_async`, which raises too.
            asked_at: when the time of the request began, by `time.monotonic`.
        """
        return await self._in_time(self._prompts.build_text_async(text, **how), asked_at)

    async def compile_in_time(self, schema: Mapping, asked_at: float) -> Grammar:
        """The grammar of a JSON schema, for `Settings`; see `GrammarCompiler.compile`, and `prepare_in_time`."""
        return await self._in_time(self._grammars.compile_async(schema), asked_at)

    async def _in_time(self, preparing: Awaitable[Prepared], asked_at: float) -> Prepared:
        try:
            return await asyncio.wait_for(preparing, asked_at + self.limits.timeout - time.monotonic())
        except asyncio.TimeoutError as error:
            self.metrics.requests.labels("timeout").inc()
            raise late(self.limits.timeout) from error
        except RuntimeError:  # of threads and decoders that `close` has stopped
            self.check_alive()
            raise

    def start_decoders(self) -> None:
        """Start the processes that decode pictures now, so that the first picture does not wait for them."""
        self._prompts.pictures.start()

    def decode_picture(
        self, data: bytes, name: str | None = None, read_text: bool = False, zoom: bool | int = False
    ) -> OpenedPicture:
        """An encoded picture, decoded apart from this process; `prepare` takes it as an image.

        Args:
            data: PNG, JPEG, ...
            name: of the picture, in errors.
            read_text: whether to read the text in it, too.
            zoom: whether to keep its own pixels, for `prepare` with `zoom` or `is_shown`.

        Raises:
            ValueError: a picture that cannot be read, or that takes more bytes, memory or time than there are.
        """
        return self._prompts.decode(data, name, is_wanted(read_text), bool(count_looks(zoom)))

    def submit(self, prompt: Prompt, settings: Settings | None = None) -> Answer:
        """Ask for an answer; see `submit_all`."""
        return self.submit_all(prompt, [settings or Settings()])[0]

    def submit_all(self, prompt: Prompt, settings: Sequence[Settings], asked_at: float | None = None) -> list[Answer]:
        """Ask for one answer for each of the `settings`; all are taken or none. Does not wait.

        Args:
            prompt: made by `prepare`.
            settings: of each answer.
            asked_at: when their time began, by `time.monotonic`; None for now.

        Raises:
            ValueError: settings beyond the limits, or that leave no room for an answer.
            QueueFull: too many requests are waiting.
            EngineClosed: `close` was called, or the engine has failed.
        """
        for each in settings:
            self.limits.check(each, len(prompt.token_ids))
        answers = [Answer(prompt, each, self.limits.timeout, self.queue.withdraw, asked_at) for each in settings]
        self.queue.add(answers)
        return answers

    @property
    def capacity(self) -> int:
        """How many answers it takes on at a time."""
        return self.queue.capacity

    def room_for(self, requests: int) -> contextlib.AbstractContextManager[None]:
        """Keep a place for so many answers while their prompt is prepared; raises as `check_room`."""
        return self.queue.room_for(requests)

    def check_room(self, requests: int = 1) -> None:
        """Raise `QueueFull` or `EngineClosed` if `submit` would now: worth asking before work for a request is done."""
        self.queue.check_room(requests)

    def check_alive(self) -> None:
        """Raise `EngineClosed` if it takes no requests any more."""
        self.queue.check_alive()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those that were taken are answered, or cancelled without `drain`.

        Args:
            timeout: seconds after which what is still unfinished is cancelled.
        """
        self.queue.close("The server is shutting down.")
        if drain:
            self._worker.join(timeout)
        self.queue.cancel()
        self._worker.join()
        self._prompts.close()
        self._grammars.close()

    # What follows runs in the worker's thread.

    def _work(self) -> None:
        batch: Batch | None = None
        try:
            while (newcomers := self.queue.take(len(batch.live) if batch else 0)) is not None:
                batch = self._merge([*([batch] if batch else []), *self._start(newcomers)])
                if batch is not None:
                    self._advance(batch)
                    if not batch.live:  # its cache shall not wait for the next request
                        batch = self._merge([])
        finally:  # closed, with nothing left; or failed, and nobody shall wait for ever
            self.queue.abandon("The engine has failed.")

    @torch.no_grad()
    def _start(self, answers: Sequence[Answer]) -> list[Batch]:
        rows = [self._row(answer) for answer in answers]
        with self._failing(rows):
            seen: dict[int, torch.Tensor | None] = {}  # by prompt: its choices look once, but for maps of their own
            for row, answer in zip(rows, answers, strict=True):
                if (key := id(answer.prompt)) not in seen or answer.prompt.is_shown:
                    seen[key] = self._look(answer, self._encode(answer.prompt.pixel_values))
                row.image_embeds = seen[key]
            before = self._known.num_read
            with counted_layers(self.model, Reading(answers, len(self.model.get_decoder().layers))):
                batches = start(self.model, rows, self._known)
            self.metrics.prompts.inc(self._known.num_read - before)
            return batches
        return []

    def _row(self, answer: Answer) -> Row:
        prompt, settings = answer.prompt, answer.settings
        length = len(prompt.token_ids)
        new_tokens = settings.max_new_tokens or self.limits.max_new_tokens or self.context_length
        max_length = min(self.context_length, settings.max_length or self.context_length, length + new_tokens)
        delivery = Delivery(answer, self)
        self.metrics.prompt_tokens.inc(length)
        return Row(
            prompt.token_ids,
            Chooser(settings, length, len(self.tokenizer), self.eos_token_id, self.model.device),
            self.eos_token_id,
            max_length,
            delivery.on_token,
            delivery.on_finish,
        )

    @torch.no_grad()
    def _encode(self, pixel_values: torch.Tensor | None) -> torch.Tensor | None:
        """Soft prompts [pictures, num_query_tokens, C]; a picture that was asked about lately is not encoded again."""
        if pixel_values is None:
            return None
        cache, device = self.model.image_cache, self.model.device
        known = cache.num_encoded
        # One by one, so that a picture's features do not depend on its neighbours.
        embeds = [self.model.encode_pictures(picture[None].to(device)) for picture in pixel_values]
        self.metrics.pictures.inc(cache.num_encoded - known)
        return torch.cat(embeds)

    @torch.no_grad()
    def _look(self, answer: Answer, image_embeds: torch.Tensor | None) -> torch.Tensor | None:
        """The soft prompts, with the part of the last picture that matters in its place if that was asked for."""
        prompt = answer.prompt
        if prompt.picture is None:
            return image_embeds
        seen = see(self.model, prompt.picture, prompt.pixel_values[-1:])
        input_ids, place = torch.tensor([prompt.token_ids], device=self.model.device), len(image_embeds) - 1
        if prompt.is_shown:
            answer.attention_map = look_ahead(self.model, seen, input_ids, image_embeds, place)
        if not prompt.looks:
            return image_embeds
        return zoom_in(self.model, seen, input_ids, image_embeds, place, prompt.looks)

    def _advance(self, batch: Batch) -> None:
        """Generate until there is something else to do."""
        self._steps = 0
        options = {} if self._slots is None else {"compile": self._slots.step}
        with self._failing(batch.rows):
            advance(self.model, batch, lambda: self._should_pause(batch), **options)

    @contextlib.contextmanager
    def _failing(self, rows: Sequence[Row]) -> Iterator[None]:
        """Let an error of torch (such as no memory) or of `generate` end these rows alone: others may fare better."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            print(f"error: {first_line(error)}", file=sys.stderr)
            for row in rows:
                if row.is_live:
                    row.fail(EngineError(first_line(error)))

    def _should_pause(self, batch: Batch) -> bool:
        """Whether others can join, or so many rows are done that it pays to go on without them."""
        self.queue.drop_late()
        self._steps += 1
        live = len(batch.live)
        can_join = self.queue.has_waiting and live < self.limits.max_batch_size and self._steps >= JOIN_EVERY
        return can_join or live <= len(batch.rows) // 2


class Reading:
    """Tells those who asked how far their prompts are: a bar of `counted_layers`."""

    def __init__(self, answers: Sequence[Answer], layers: int):
        self.answers, self.layers, self.done = answers, layers, 0

    def update(self) -> None:
        self.done += 1
        for answer in self.answers:
            answer.read(self.done / self.layers)


class Delivery:
    """Brings what a row becomes to the one who asked."""

    def __init__(self, answer: Answer, engine: Engine):
        self.answer, self.engine = answer, engine
        settings = answer.settings
        is_raw = settings.is_raw or settings.grammar is not None
        kind, words = (RawText, engine.vocabulary) if is_raw else (GrowingText, engine.tokenizer)
        self.text = kind(words, settings.stop)

    def on_token(self, row: Row) -> str | None:
        answer, now = self.answer, time.monotonic()
        if len(row.token_ids) == row.prompt_length + 1:
            self.engine.metrics.first_token_seconds.observe(now - answer.asked_at)
        if answer.is_cancelled:
            return "cancelled"
        if now > answer.deadline:
            return "timeout"
        answer.logprobs = row.chooser.logprobs
        if answer.is_watched or answer.settings.stop:
            self.text.update(row.answer_ids)
            answer.publish(self.text.shown)
        return "stop" if self.text.is_stopped else None

    def on_finish(self, row: Row) -> None:
        self.engine.metrics.completion_tokens.inc(len(row.answer_ids))
        self.engine.queue.finish(self.answer, self.outcome(row), row.finish_reason)

    def outcome(self, row: Row) -> Completion | Exception:
        if row.error is not None:
            return row.error
        if row.finish_reason == "timeout":
            return late(self.engine.limits.timeout)
        text, is_stopped = self.text.final(row.answer_ids)
        reason = "stop" if is_stopped else row.finish_reason
        logprobs = self.logprobs_of(row, text) if row.chooser.logprobs else ()
        return Completion(text, reason, row.prompt_length, len(row.answer_ids), logprobs)

    def logprobs_of(self, row: Row, text: str) -> tuple[TokenLogprob, ...]:
        """Of the tokens without which there would be less of the `text`: not of the end token, and of no stop text."""
        token_ids = row.answer_ids
        count = len(token_ids) - (token_ids[-1] == row.eos_token_id)
        while self.text.stops and count and self.text.final(token_ids[: count - 1])[0] == text:
            count -= 1
        return tuple(row.chooser.logprobs[:count])
