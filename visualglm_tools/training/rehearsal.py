"""A run that is tried only: lengths, memory, steps, and the time that all of it would take, by ten measured steps.

It loads the model, trains in a temporary folder, and leaves nothing behind.

Not here: the run itself (`run.py`).
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_tools.benchmarking.timing import free_memory
from visualglm_tools.training.asking import SHARE_OF_ASKING, choose_kept, estimate_seconds, ordinary_questions
from visualglm_tools.training.encoding import Collator, Encoder, Example
from visualglm_tools.training.memory import estimate_most, in_words
from visualglm_tools.training.output import check_free, check_no_input, is_unsaved_run
from visualglm_tools.training.progress import describe_memory
from visualglm_tools.training.remedies import describe_remedies, explained_memory, lengths_of, step_of
from visualglm_tools.training.report import measure
from visualglm_tools.training.run import (
    Data,
    Plan,
    build_encoder,
    describe_model,
    load_trainer,
    make_plan,
    read_data,
    said_once,
    train,
    training_arguments,
)
from visualglm_tools.training.settings import Settings
from visualglm_tools.training.stopping import ended_by_signals
from visualglm_tools.training.watching import WATCHED


WARM_UP, MEASURED = 2, 10  # steps
QUESTIONS = 8  # that are asked, where a run may ask more
MEASURED_ROWS = 8  # whose answers are measured


@dataclass(frozen=True)
class Times:
    """Seconds of the steps that were measured, and of what the run would do besides."""

    steps: Sequence[float]
    asking: float
    measuring: float


class Clock(TrainerCallback):
    """Notes when each step has ended."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(perf_counter())

    def steps(self) -> list[float]:
        """Seconds of each step after those that warm up."""
        return [after - before for before, after in zip(self.times[WARM_UP - 1 :], self.times[WARM_UP:], strict=False)]


def rehearse(settings: Settings, say: Callable[[str], None]) -> None:
    """Try a run, and say what it would take.

    Args:
        settings: of the run.
        say: called with each line that the user should read.

    Raises:
        ValueError: what would end the run before or in its first steps.
    """
    plan = make_plan(settings)
    check_no_input(plan.settings.save, plan.settings.inputs)
    if not is_unsaved_run(plan.settings.save):
        check_free(plan.settings.save)
    say = said_once(say, plan)
    encoder = build_encoder(plan.settings, plan.config)
    data = read_data(plan.settings, encoder, say)
    say(describe_lengths(data.train, plan.settings))
    say(describe_steps(plan, len(data.train)))
    with (
        ended_by_signals(),
        explained_memory(plan.settings, plan.config, data.train, plan.arguments.device, lambda: data.kept),
        tempfile.TemporaryDirectory() as folder,
    ):
        clock = Clock()
        short = shortened(plan, Path(folder) / "run")
        trainer = load_trainer(short, replace(data, valid=[]), Collator(encoder.processor), [clock])
        say(describe_model(trainer.model))
        free = free_memory(trainer.model.device)
        asking = time_asking(trainer, plan.settings, short.settings, data, encoder)
        train(trainer, short.settings, None)
        times = Times(clock.steps(), asking, time_measuring(trainer, plan.settings, data))
        say(describe_needed(plan.settings, plan.config, data, free, trainer.model.device))
    say(describe_times(times, plan.settings))
    say("Nothing was kept: leave --dry-run out to train.")


def shortened(plan: Plan, folder: Path) -> Plan:
    """The plan of a few steps in another folder, with nothing to be evaluated."""
    settings = replace(
        plan.settings,
        save=folder,
        train_iters=WARM_UP + MEASURED,
        save_interval=WARM_UP + MEASURED,
        log_interval=1,  # which waits for the device
        keep_questions=QUESTIONS if plan.settings.asks_itself else None,
        valid_data=(),
        old_data=(),
        tensorboard=False,
    )
    return replace(plan, settings=settings, arguments=training_arguments(settings))


def time_asking(trainer: Trainer, settings: Settings, short: Settings, data: Data, encoder: Encoder) -> float:
    """Have a trainer keep a few answers; returns the seconds that a run would take to ask for all of its own.

    The answers are added to those of the data that are kept.
    """
    if not settings.keeps_answers:
        return 0.0
    budget = SHARE_OF_ASKING * estimate_seconds(trainer, settings, data.train)
    begin = perf_counter()
    kept = choose_kept(trainer, short, data.train, data.kept[:QUESTIONS], encoder, lambda line: None)
    seconds = (perf_counter() - begin) / max(1, len(kept))
    given = seconds * sum(not example.conversation.is_answered for example in data.kept)
    data.kept = [*data.kept, *kept]
    if not settings.asks_itself:
        return given
    if settings.keep_questions:
        return given + seconds * settings.keep_questions
    return given + min(budget, seconds * len(ordinary_questions(data.train)))


def time_measuring(trainer: Trainer, settings: Settings, data: Data) -> float:
    """The seconds in which a run would measure losses and right answers, by those of a few rows."""
    rows = data.train[:MEASURED_ROWS]
    for _ in range(2):  # once to warm up
        begin = perf_counter()
        measure(trainer.model, trainer.data_collator, rows, settings.eval_batch_size)
        seconds = (perf_counter() - begin) / len(rows)
    points = math.ceil(settings.train_iters / settings.steps_between_evaluations)
    kept = settings.answers if settings.keeps_answers else 0  # at most; measured where there are no old rows
    lists = [min(count, settings.answers) for count in (len(data.valid), len(data.old) or kept)]
    counted = sum(2 * count + points * min(count, WATCHED) for count in lists)
    return seconds * (counted + (points + 1) * len(data.valid))


# ---------------------------------------------------------------- what is said


def describe_lengths(examples: Sequence[Example], settings: Settings) -> str:
    lengths = sorted(len(example.input_ids) for example in examples)
    source, target = (max(getattr(each, name) for each in examples) for name in ("source_length", "target_length"))
    return (
        f"Lengths: {lengths[0]} to {lengths[-1]} tokens, half of the examples up to {lengths[len(lengths) // 2]}; "
        f"sources up to {source} of --max_source_length {settings.max_source_length}, answers up to {target} of "
        f"--max_target_length {settings.max_target_length}."
    )


def describe_steps(plan: Plan, count: int) -> str:
    settings, processes = plan.settings, plan.arguments.world_size
    at_once = {"at once": settings.batch_size, "times": settings.gradient_accumulation_steps, "processes": processes}
    rows = math.prod(at_once.values())
    parts = ", ".join(f"{number} {name}" for name, number in at_once.items() if number > 1)
    kept = f"; {settings.keep_rows} kept rows beside them" if settings.keeps_answers else ""
    return (
        f"Steps: {settings.train_iters} of {rows} rows{f' ({parts})' if parts else ''}, which is each row "
        f"{settings.train_iters * rows / count:.3g} times{kept}."
    )


def describe_needed(settings: Settings, config: VisualGLMConfig, data: Data, free: int, device: torch.device) -> str:
    """The memory that a step takes, computed and as it was, and what would take less if there is too little."""
    lengths = lengths_of(data.train, settings, data.kept)
    needed = estimate_most(config, step_of(settings, config, lengths))
    names = ("weights", "adapter", "activations", "workspace")
    parts = ", ".join(f"{name} {in_words(getattr(needed, name))}" for name in names)
    in_use = describe_memory(device)
    line = f"Memory: a step takes {in_words(needed.total)}, computed ({parts})"
    line += f"; at most {in_use} were in use" if in_use else ""
    line += f"; {in_words(free)} were free beside the weights."
    if needed.total - needed.weights > free:
        line += f" That is too little. {describe_remedies(settings, config, lengths, device.type != 'cpu')}"
    return line


def describe_times(times: Times, settings: Settings) -> str:
    median = statistics.median(times.steps)
    total = median * settings.train_iters
    shown = {"for all steps": total, "of asking before": times.asking, "of measuring": times.measuring}
    told = ", ".join(f"{tqdm.format_interval(seconds)} {what}" for what, seconds in shown.items() if seconds)
    return (
        f"Time: {median:.3g} s a step, the median of {len(times.steps)} of {min(times.steps):.3g} to "
        f"{max(times.steps):.3g} s; {told}: {tqdm.format_interval(total + times.asking + times.measuring)} in all, "
        "without loading."
    )
