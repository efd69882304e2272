"""Ctrl-C, SIGTERM and a closed terminal: while training, the step is finished and saved before the run ends.

Not here: what a checkpoint is, and what is said about it (`run.py`).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from transformers import TrainerCallback


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STDERR = 2
STOPPING = b"\nStopping: this step is finished and saved.\n"
AGAIN = b"Once more ends the run at once, without saving.\n"


class Stopped(KeyboardInterrupt):
    """A signal has ended the run; the text says what is left of it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, text: str = "", number: int = signal.SIGINT):
        super().__init__(text)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and a closed terminal end a run as Ctrl-C does: what is temporary goes, and what is left is said.

    Not under a launcher: a process may be waiting for another one, where it hears nothing.
    """
    if threading.current_thread() is not threading.main_thread() or "WORLD_SIZE" in os.environ:
        yield
        return
    with handled(SIGNALS[1:], end_at_once):
        yield


def end_at_once(number: int, frame) -> None:
    raise Stopped(number=number)


@contextmanager
def handled(numbers: Iterable[int], handler: Callable) -> Iterator[None]:
    """Give some signals a handler. A shell has background jobs ignore Ctrl-C, and that stays so."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)


class StopAfterStep(TrainerCallback):
    """While it listens, the first signal has the step finished and saved, and a second one ends the run at once.

    Attributes:
        asked_by: the number of the first signal; None while there was none. The same in all processes of a run.
    """

    def __init__(self):
        self.asked_by: int | None = None
        self.process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # signals are handled in that one alone
            yield
            return
        with handled(SIGNALS, self.hear):
            yield

    def hear(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # it opens pictures: the process that trains says when to end
            return
        # Launchers pass on what the terminal has sent already, and kill later.
        is_alone = "WORLD_SIZE" not in os.environ
        if self.asked_by is None:
            self.asked_by = number
            with suppress(OSError):  # the terminal may be gone
                # Not `print`: the signal may have come while a line was being printed.
                os.write(STDERR, STOPPING + AGAIN if is_alone else STOPPING)
        elif is_alone:
            raise Stopped(number=number)

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_asked(args):
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def is_asked(self, args) -> bool:
        """Whether a signal has come to any of the run's processes: all must end after the same step."""
        if args.world_size > 1:
            number = torch.tensor(self.asked_by or 0, device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.asked_by = number.item() or None
        return self.asked_by is not None
