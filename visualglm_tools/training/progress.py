"""How a run goes, in one line: steps, losses, time left and memory. In a terminal it is renewed in its place.

Not here: what is measured of answers (`watching.py`), and what a run says before and after (`run.py`).
"""

import sys
from collections.abc import Callable
from time import perf_counter

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from visualglm_tools.benchmarking.timing import peak_memory
from visualglm_tools.training.memory import in_words


SHOWN = {"loss": "loss", "keep_loss": "kept", "eval_loss": "held out"}  # of a trainer's log


class Progress(TrainerCallback):
    """Says in one line how training goes.

    Args:
        say: called with a line each time that the trainer logs a loss, where no terminal is.
        in_place: whether one line of stderr is renewed instead; None: if that is a terminal.
    """

    def __init__(self, say: Callable[[str], None], in_place: bool | None = None):
        self.say, self.in_place = say, sys.stderr.isatty() if in_place is None else in_place
        self.figures: dict[str, float] = {}
        self.bar: tqdm | None = None
        self.begin, self.first_step = 0.0, 0

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        self.begin, self.first_step = perf_counter(), state.global_step
        if self.in_place and state.is_world_process_zero:
            self.bar = tqdm(bar_format="{desc}", dynamic_ncols=True)

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        self.figures |= {name: logs[name] for name in SHOWN if name in (logs or {})}
        if self.bar is None and state.is_world_process_zero and "loss" in (logs or {}):
            self.say(self.describe(args, state))

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if self.bar is not None:
            self.bar.set_description_str(self.describe(args, state))

    def on_train_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if self.bar is not None:
            self.bar.set_description_str(self.describe(args, state))
            self.bar.close()
            self.bar = None

    def describe(self, args, state: TrainerState) -> str:
        """ "step 120 of 300: loss 0.0291, kept 0.0818, held out 0.0179; 0:25 left; 1.24 GB"."""
        done = state.global_step - self.first_step
        left = (perf_counter() - self.begin) / max(1, done) * (state.max_steps - state.global_step)
        losses = ", ".join(f"{name} {self.figures[key]:.4g}" for key, name in SHOWN.items() if key in self.figures)
        parts = [losses, f"{tqdm.format_interval(left)} left" if done else "", describe_memory(args.device)]
        return f"step {state.global_step} of {state.max_steps}: {'; '.join(filter(None, parts))}"


def describe_memory(device: torch.device) -> str:
    """The most that was in use so far: on a GPU of its memory, else of this process."""
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return "" if most is None else in_words(most)
