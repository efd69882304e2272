"""What an engine gives for a request: an answer that grows and ends, or an error that says why there is none.

Not here: the engine, and who is answered when (`waiting.py`).
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from visualglm_tools.serving.engine.prompts import Prompt
from visualglm_tools.serving.engine.sampling import Settings, TokenLogprob


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
        prompt_cache_bytes: of what was computed for the last prompts, so that the same are not read again.
    """

    max_batch_size: int = 8
    max_waiting: int = 64
    max_new_tokens: int | None = None
    max_pictures: int = 8
    max_picture_bytes: int = 20 * 2**20
    timeout: float = 300
    prompt_cache_bytes: int = 256 * 2**20

    def check(self, settings: Settings, prompt_length: int) -> None:
        """Raise a `ValueError` for settings beyond these limits, or that leave no room for an answer."""
        wanted, limit = settings.max_new_tokens, self.max_new_tokens
        if wanted is not None and limit is not None and wanted > limit:
            raise ValueError(f"{wanted} new tokens were asked for; this server gives at most {limit}.")
        if settings.max_length is not None and prompt_length >= settings.max_length:
            raise ValueError(
                f"The prompt is {prompt_length} tokens long, so max_length={settings.max_length} leaves no room for an "
                "answer. Raise max_length or shorten the conversation."
            )


@dataclass(frozen=True)
class Completion:
    """A complete answer.

    Args:
        text: cleaned up as the original does, unless its settings say otherwise.
        finish_reason: "stop" (the model ended it, or a stop text), "length" (a limit) or "cancelled".
        prompt_tokens, completion_tokens: how many there were, image tokens and the end token included.
        logprobs: of the tokens of the text, if they were asked for; the end token is none of them.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


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
        self.logprobs: Sequence[TokenLogprob] = ()  # of the tokens so far, the end token included
        self.share_read = 0.0
        self.attention_map = None  # [side, side] over the last picture, once the answer has begun, if that was wanted
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
        shown = ""
        async for text in self._states():
            if text != shown:
                shown = text
                yield shown

    async def watch(self, patience: float) -> AsyncIterator[tuple[str, float]]:
        """As iterating, for those who also want to see the first word come.

        Args:
            patience: seconds after which the prompt is told about, while there is no text.

        Yields:
            The text so far, and the share of the prompt that has been read, 0 to 1.
        """
        impatient_at, shown = time.monotonic() + patience, None
        async for text in self._states(patience):
            now = (text, self.share_read)
            if now != shown and (text or time.monotonic() >= impatient_at):
                shown = now
                yield now

    async def _states(self, patience: float | None = None) -> AsyncIterator[str]:
        """The text so far whenever something may have changed, in the end the whole; once after `patience` seconds."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        self._listen(lambda: loop.is_closed() or loop.call_soon_threadsafe(changed.set))
        is_done = False
        while not is_done:
            try:
                await asyncio.wait_for(changed.wait(), patience)
            except asyncio.TimeoutError:
                patience = None
            changed.clear()
            text, is_done = self._current()
            yield text

    def read(self, share: float) -> None:
        """For the engine: so much of the prompt has been read."""
        self.share_read = share
        self._notify()

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


def late(timeout: float) -> AnswerTimeout:
    return AnswerTimeout(f"The answer was not complete after {timeout:g} s. Ask for fewer tokens, or again later.")
