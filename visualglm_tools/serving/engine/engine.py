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
owns the model. Not here: HTTP, and how a batch advances (`batching.py`).
"""

import asyncio
import collections
import contextlib
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from visualglm_hf.chat import check_tokenizer
from visualglm_tools.checkpoints.loading import first_line, load_model
from visualglm_tools.serving.engine.batching import Batch, Row, advance, merge, prefill
from visualglm_tools.serving.engine.metrics import Metrics
from visualglm_tools.serving.engine.prompts import Prompt, PromptBuilder
from visualglm_tools.serving.engine.sampling import Chooser, Settings
from visualglm_tools.serving.engine.text import GrowingText


JOIN_EVERY = 4  # tokens: a pause costs about one, so those who come meanwhile join together
REMEMBERED_PICTURES = 64  # of the real model, 256 KiB each in half precision


class EngineError(RuntimeError):
    """The engine, not the request, is why there is no answer."""


class QueueFull(EngineError):
    """As many requests wait as may.

    Args:
        retry_after: seconds after which to try again.
    """

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already. Try again in {retry_after} s.")
        self.retry_after = retry_after


class EngineClosed(EngineError):
    """The engine takes no more requests."""


class AnswerTimeout(EngineError):
    """The answer was not complete in time."""


@dataclass(frozen=True)
class Limits:
    """What the engine takes on.

    Args:
        max_batch_size: answers generated at a time; of the real model in half precision, each takes up to 0.94 GB.
        max_waiting: requests that may wait beyond these.
        max_new_tokens: of an answer; None for what the context leaves.
        max_pictures: of a conversation.
        max_picture_bytes: of one encoded picture. Its pixels are limited by `visualglm_hf`'s image processor.
        timeout: seconds from the request, or from `submit`, to the end of the answer.
    """

    max_batch_size: int = 8
    max_waiting: int = 64
    max_new_tokens: int | None = None
    max_pictures: int = 8
    max_picture_bytes: int = 20 * 2**20
    timeout: float = 300


@dataclass(frozen=True)
class Completion:
    """A complete answer.

    Args:
        text: cleaned up as the original does.
        finish_reason: "stop" (the model ended it, or a stop text), "length" (a limit) or "cancelled".
        prompt_tokens, completion_tokens: how many there were, image tokens and the end token included.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Answer:
    """An answer that was asked for. Iterate for its growing text, or wait for its `result`."""

    def __init__(
        self, prompt: Prompt, settings: Settings, timeout: float, on_cancel: Callable, asked_at: float | None = None
    ):
        self.prompt, self.settings = prompt, settings
        self.asked_at = time.monotonic() if asked_at is None else asked_at
        self.deadline = self.asked_at + timeout
        self.first_token_at: float | None = None
        self.is_cancelled = False
        self.is_watched = False
        self.text = ""
        self.future: Future[Completion] = Future()
        self._on_cancel = on_cancel
        self._lock = threading.Lock()
        self._listeners: list[Callable] = []

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the complete answer.

        Raises:
            ValueError: the model computed NaN.
            EngineError: the engine could not finish it; `AnswerTimeout` if it took too long.
            TimeoutError: `timeout` seconds have passed; the answer goes on.
        """
        return self.future.result(timeout)

    async def completion(self) -> Completion:
        """`result` for coroutines; cancelling the task does not cancel the answer."""
        return await asyncio.shield(asyncio.wrap_future(self.future))

    def cancel(self) -> None:
        """Let the answer end with what it has; the model stops within one token."""
        self.is_cancelled = True
        self._on_cancel(self)

    def __iter__(self) -> Iterator[str]:
        """The text so far, whenever it has grown; each begins with the one before, the last is that of `result`."""
        changed, shown = threading.Event(), ""
        self._listen(changed.set)
        while True:
            changed.wait()
            changed.clear()
            text, is_done = self._current()
            if text != shown:
                shown = text
                yield shown
            if is_done:
                return

    async def __aiter__(self) -> AsyncIterator[str]:
        changed, shown = asyncio.Event(), ""
        loop = asyncio.get_running_loop()
        self._listen(lambda: loop.is_closed() or loop.call_soon_threadsafe(changed.set))
        while True:
            await changed.wait()
            changed.clear()
            text, is_done = self._current()
            if text != shown:
                shown = text
                yield shown
            if is_done:
                return

    def publish(self, text: str) -> None:
        """For the engine: the text so far."""
        if text != self.text:
            self.text = text
            self._notify()

    def finish(self, outcome: Completion | Exception) -> None:
        """For the engine: the end."""
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)
        self._notify()

    def _current(self) -> tuple[str, bool]:
        """The text so far, and whether it is the whole; raises what `result` raises."""
        return (self.result().text, True) if self.future.done() else (self.text, False)

    def _listen(self, listener: Callable) -> None:
        with self._lock:
            self._listeners.append(listener)
        self.is_watched = True
        listener()

    def _notify(self) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()


class Engine:
    """See the module's docstring.

    Args:
        model: in evaluation mode, on its device; the engine's alone from now on.
        tokenizer: the checkpoint's.
        limits: what it takes on.

    Raises:
        ValueError: a tokenizer that is not the model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits | None = None):
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
        self._prompts = PromptBuilder(model, tokenizer, self.limits.max_pictures, self.limits.max_picture_bytes)
        model.image_cache.capacity = max(model.image_cache.capacity, REMEMBERED_PICTURES)
        self._changed = threading.Condition()  # guards the next four
        self._waiting: collections.deque[Answer] = collections.deque()
        self._unfinished: set[Answer] = set()  # those that wait and those that are being generated
        self._preparing = 0  # answers that `room_for` has promised a place
        self._end: str | None = None  # why it takes no more requests
        self._usual_seconds = 1.0  # that an answer takes
        self._steps = 0  # since the batch last paused
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    @classmethod
    def load(cls, folder: str | Path, limits: Limits | None = None, **options) -> "Engine":
        """An engine for a checkpoint folder; `options` are those of `load_model`: device, dtype, quant, adapter.

        Raises:
            ValueError: as `load_model`.
        """
        model, tokenizer = load_model(folder, **options)
        return cls(model, tokenizer, limits)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close(drain=not any(error))

    def prepare(self, messages: Sequence[Mapping], english: bool | None = None) -> Prompt:
        """Make a prompt of a conversation: check it, open its pictures, tokenize.

        Args:
            messages: `{"role", "content"}` of "system", "user" and "assistant", the user's last; see
                `prompts.arrange` for their order. A content is a text or a list of `{"type": "text", "text": ...}` and
                `{"type": "image", "image": ...}`: a PIL image, bytes, an array or a `data:` URI, never a path or a URL.
            english: whether to prompt with `Q:`/`A:` instead of `问：`/`答：`; None follows the last question.

        Raises:
            ValueError: anything wrong with the messages or their pictures, or more tokens than the model takes.
        """
        return self._prompts.build(messages, english)

    async def prepare_in_time(
        self,
        messages: Sequence[Mapping],
        asked_at: float,
        english: bool | None = None,
        fetch: Callable[[str], Awaitable[bytes]] | None = None,
    ) -> Prompt:
        """`prepare` for coroutines, beside their loop and beside others that are being prepared.

        Args:
            messages, english: see `prepare`.
            asked_at: when the time of the request began, by `time.monotonic`.
            fetch: what reads a picture given by its address; None refuses addresses.

        Raises:
            ValueError: as `prepare`.
            AnswerTimeout: the prompt was not ready in time.
        """
        preparing = self._prompts.build_async(messages, english, fetch)
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

    def decode_picture(self, data: bytes, name: str | None = None) -> Image.Image:
        """An encoded picture as the model sees it, decoded apart from this process; `prepare` takes it as an image.

        Args:
            data: PNG, JPEG, ...
            name: of the picture, in errors.

        Raises:
            ValueError: a picture that cannot be read, or that takes more bytes, memory or time than there are.
        """
        return self._prompts.decode(data, name)

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
            self._check_settings(prompt, each)
        answers = [Answer(prompt, each, self.limits.timeout, self._withdraw, asked_at) for each in settings]
        with self._changed:
            self.check_room(len(answers))
            self._waiting.extend(answers)
            self._unfinished.update(answers)
            self._update_gauges()
            self._changed.notify_all()
        return answers

    @property
    def capacity(self) -> int:
        """How many answers it takes on at a time."""
        return self.limits.max_batch_size + self.limits.max_waiting

    @contextlib.contextmanager
    def room_for(self, requests: int) -> Iterator[None]:
        """Keep a place for so many answers while their prompt is prepared; raises as `check_room`."""
        with self._changed:
            self.check_room(requests)
            self._preparing += requests
        try:
            yield
        finally:
            with self._changed:
                self._preparing -= requests

    def check_room(self, requests: int = 1) -> None:
        """Raise `QueueFull` or `EngineClosed` if `submit` would now: worth asking before work for a request is done."""
        self.check_alive()
        if len(self._unfinished) + self._preparing + requests > self.capacity:
            self.metrics.requests.labels("refused").inc(requests)
            turns = 1 + len(self._waiting) / self.limits.max_batch_size
            raise QueueFull(len(self._waiting), min(60, math.ceil(self._usual_seconds * turns)))

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those that were taken are answered, or cancelled without `drain`.

        Args:
            timeout: seconds after which what is still unfinished is cancelled.
        """
        with self._changed:
            self._end = self._end or "The server is shutting down."
            self._changed.notify_all()
        if drain:
            self._worker.join(timeout)
        for answer in tuple(self._unfinished):
            answer.cancel()
        self._worker.join()
        self._prompts.close()

    def check_alive(self) -> None:
        """Raise `EngineClosed` if it takes no requests any more."""
        if self._end is not None:
            raise EngineClosed(self._end)

    def _check_settings(self, prompt: Prompt, settings: Settings) -> None:
        wanted, limit = settings.max_new_tokens, self.limits.max_new_tokens
        if wanted is not None and limit is not None and wanted > limit:
            raise ValueError(f"{wanted} new tokens were asked for; this server gives at most {limit}.")
        length = len(prompt.token_ids)
        if settings.max_length is not None and length >= settings.max_length:
            raise ValueError(
                f"The prompt is {length} tokens long, so max_length={settings.max_length} leaves no room for an "
                "answer. Raise max_length or shorten the conversation."
            )

    def _withdraw(self, answer: Answer) -> None:
        """A cancelled answer that still waits ends here; one that is being generated, after its next token."""
        with self._changed:
            if answer not in self._waiting:
                return
            self._waiting.remove(answer)
        self._finish(answer, Completion("", "cancelled", len(answer.prompt.token_ids), 0), "cancelled")

    def _finish(self, answer: Answer, result: Completion | Exception, outcome: str) -> None:
        seconds = time.monotonic() - answer.asked_at
        with self._changed:
            self._unfinished.discard(answer)
            self._usual_seconds += 0.1 * (seconds - self._usual_seconds)
            self._update_gauges()
        self.metrics.requests.labels(outcome).inc()
        self.metrics.seconds.observe(seconds)
        answer.finish(result)

    def _update_gauges(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.running.set(len(self._unfinished) - len(self._waiting))

    # What follows runs in the worker's thread.

    def _work(self) -> None:
        batch: Batch | None = None
        try:
            while (newcomers := self._take(len(batch.rows) if batch else 0)) is not None:
                batch = merge(self.model, [each for each in (batch, self._start(newcomers)) if each is not None])
                if batch is not None:
                    self._advance(batch)
                    batch = merge(self.model, [batch])
        finally:  # closed, with nothing left; or failed, and nobody shall wait for ever
            with self._changed:
                self._end = self._end or "The engine has failed."
                self._waiting.clear()
            for answer in tuple(self._unfinished):
                self._finish(answer, EngineClosed(self._end), "error")

    def _take(self, running: int) -> list[Answer] | None:
        """The requests that can join `running` others; waits if there is nothing to do; None when closed and done."""
        with self._changed:
            while not self._waiting and not running:
                if self._end is not None:
                    return None
                self._changed.wait()
            free = self.limits.max_batch_size - running
            taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._update_gauges()
        return taken

    def _start(self, answers: Sequence[Answer]) -> Batch | None:
        if not answers:
            return None
        rows = [self._row(answer) for answer in answers]
        with self._failing(rows):
            for row, answer in zip(rows, answers, strict=True):
                row.image_embeds = self._encode(answer.prompt.pixel_values)
            return prefill(self.model, rows)
        return None

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

    def _advance(self, batch: Batch) -> None:
        """Generate until there is something else to do."""
        self._steps = 0
        with self._failing(batch.rows):
            advance(self.model, batch, lambda: self._should_pause(batch))

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
        self._drop_late()
        self._steps += 1
        live = len(batch.live)
        can_join = bool(self._waiting) and live < self.limits.max_batch_size and self._steps >= JOIN_EVERY
        return can_join or live <= len(batch.rows) // 2

    def _drop_late(self) -> None:
        """End the requests that waited too long."""
        now = time.monotonic()
        with self._changed:
            too_late = [answer for answer in self._waiting if now >= answer.deadline]
            for answer in too_late:
                self._waiting.remove(answer)
        for answer in too_late:
            self._finish(answer, late(self.limits.timeout), "timeout")


class Delivery:
    """Brings what a row becomes to the one who asked."""

    def __init__(self, answer: Answer, engine: Engine):
        self.answer, self.engine = answer, engine
        self.text = GrowingText(engine.tokenizer, answer.settings.stop)

    def on_token(self, row: Row) -> str | None:
        answer, now = self.answer, time.monotonic()
        if len(row.token_ids) == row.prompt_length + 1:
            self.engine.metrics.first_token_seconds.observe(now - answer.asked_at)
        if answer.is_cancelled:
            return "cancelled"
        if now > answer.deadline:
            return "timeout"
        if answer.is_watched or answer.settings.stop:
            self.text.update(row.answer_ids)
            answer.publish(self.text.shown)
        return "stop" if self.text.is_stopped else None

    def on_finish(self, row: Row) -> None:
        self.engine.metrics.completion_tokens.inc(len(row.answer_ids))
        self.engine._finish(self.answer, self.outcome(row), row.finish_reason)

    def outcome(self, row: Row) -> Completion | Exception:
        if row.error is not None:
            return row.error
        if row.finish_reason == "timeout":
            return late(self.engine.limits.timeout)
        text, is_stopped = self.text.final(row.answer_ids)
        reason = "stop" if is_stopped else row.finish_reason
        return Completion(text, reason, row.prompt_length, len(row.answer_ids))


def late(timeout: float) -> AnswerTimeout:
    return AnswerTimeout(f"The answer was not complete after {timeout:g} s. Ask for fewer tokens, or again later.")
