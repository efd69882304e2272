"""Who waits for an engine and who is being answered: the queue, which all threads ask and one thread empties.

Not here: what is done for those that are taken (`engine.py`).
"""

import collections
import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence

from visualglm_tools.serving.engine.answers import Answer, Completion, EngineClosed, Limits, QueueFull, late
from visualglm_tools.serving.engine.metrics import Metrics


class Queue:
    """The answers that an engine has taken on, until each has ended.

    Args:
        limits: how many.
        metrics: where they are counted.
    """

    def __init__(self, limits: Limits, metrics: Metrics):
        self.limits, self.metrics = limits, metrics
        self._changed = threading.Condition()  # guards the next four
        self._waiting: collections.deque[Answer] = collections.deque()
        self._unfinished: set[Answer] = set()  # those that wait and those that are being generated
        self._preparing = 0  # answers that `room_for` has promised a place
        self._end: str | None = None  # why it takes no more requests
        self._usual_seconds = 1.0  # that an answer takes

    @property
    def capacity(self) -> int:
        """How many answers there may be at a time."""
        return self.limits.max_batch_size + self.limits.max_waiting

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def check_alive(self) -> None:
        """Raise `EngineClosed` if it takes no requests any more."""
        if self._end is not None:
            raise EngineClosed(self._end)

    def check_room(self, requests: int = 1) -> None:
        """Raise `QueueFull` or `EngineClosed` if there is no place for so many."""
        self.check_alive()
        if len(self._unfinished) + self._preparing + requests > self.capacity:
            self.metrics.requests.labels("refused").inc(requests)
            turns = 1 + len(self._waiting) / self.limits.max_batch_size
            raise QueueFull(len(self._waiting), min(60, math.ceil(self._usual_seconds * turns)))

    @contextlib.contextmanager
    def room_for(self, requests: int) -> Iterator[None]:
        """Keep a place for so many answers for a while; raises as `check_room`."""
        with self._changed:
            self.check_room(requests)
            self._preparing += requests
        try:
            yield
        finally:
            with self._changed:
                self._preparing -= requests

    def add(self, answers: Sequence[Answer]) -> None:
        """Take on all of them or, raising as `check_room`, none."""
        with self._changed:
            self.check_room(len(answers))
            self._waiting.extend(answers)
            self._unfinished.update(answers)
            self._update_gauges()
            self._changed.notify_all()

    def take(self, running: int) -> list[Answer] | None:
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

    def finish(self, answer: Answer, result: Completion | Exception, outcome: str) -> None:
        """End an answer; `outcome` is what is counted."""
        seconds = time.monotonic() - answer.asked_at
        with self._changed:
            self._unfinished.discard(answer)
            self._usual_seconds += 0.1 * (seconds - self._usual_seconds)
            self._update_gauges()
        self.metrics.requests.labels(outcome).inc()
        self.metrics.seconds.observe(seconds)
        answer.finish(result)

    def withdraw(self, answer: Answer) -> None:
        """A cancelled answer that still waits ends here; one that is being generated, after its next token."""
        with self._changed:
            if answer not in self._waiting:
                return
            self._waiting.remove(answer)
        self.finish(answer, Completion("", "cancelled", len(answer.prompt.token_ids), 0), "cancelled")

    def drop_late(self) -> None:
        """End the requests that waited too long."""
        now = time.monotonic()
        with self._changed:
            too_late = [answer for answer in self._waiting if now >= answer.deadline]
            for answer in too_late:
                self._waiting.remove(answer)
        for answer in too_late:
            self.finish(answer, late(self.limits.timeout), "timeout")

    def close(self, reason: str) -> None:
        """Take no more requests; those that were taken go on."""
        with self._changed:
            self._end = self._end or reason
            self._changed.notify_all()

    def cancel(self) -> None:
        """Cancel all that is unfinished."""
        for answer in tuple(self._unfinished):
            answer.cancel()

    def abandon(self, reason: str) -> None:
        """End all that is unfinished with an error: nobody shall wait for ever."""
        with self._changed:
            self._end = self._end or reason
            self._waiting.clear()
        for answer in tuple(self._unfinished):
            self.finish(answer, EngineClosed(self._end), "error")

    def _update_gauges(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.running.set(len(self._unfinished) - len(self._waiting))
