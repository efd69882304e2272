"""How many answers are right while a run goes on: of what is new to the model, and of what it knew.

Not here: what counts as right, and how it is drawn (`report.py`).
"""

from collections.abc import Mapping, Sequence

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from visualglm_tools.training.encoding import Example
from visualglm_tools.training.report import RIGHT, Measurement, measure


WATCHED = 30  # rows of a list; all are measured before and after


class Watch(TrainerCallback):
    """Measures the first rows of some lists every few steps, and puts the share of right answers into the log.

    Args:
        trainer: whose model is measured.
        lists: what is measured, by name.
        before: what all rows of these were before training.
        interval: steps from one time to the next.
        batch_size: rows at once.
    """

    def __init__(
        self,
        trainer: Trainer,
        lists: Mapping[str, Sequence[Example]],
        before: Mapping[str, Measurement],
        interval: int,
        batch_size: int,
    ):
        self.trainer, self.interval, self.batch_size = trainer, interval, batch_size
        self.lists = {name: list(rows[:WATCHED]) for name, rows in lists.items()}
        self.before = before

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if self.lists and not state.global_step:
            note(state, {name: self.before[name].is_right[:WATCHED] for name in self.lists})

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if self.lists and (state.global_step % self.interval == 0 or state.global_step >= state.max_steps):
            model, collator = self.trainer.model, self.trainer.data_collator
            measured = {name: measure(model, collator, rows, self.batch_size) for name, rows in self.lists.items()}
            note(state, {name: each.is_right for name, each in measured.items()})


def note(state: TrainerState, is_right: Mapping[str, Sequence[bool]]) -> None:
    """Put shares into the log. Not through the trainer, who would then take the step's loss for logged."""
    shares = {RIGHT + name: sum(rows) / len(rows) for name, rows in is_right.items()}
    state.log_history.append({"step": state.global_step} | shares)
