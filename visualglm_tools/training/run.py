"""One fine-tuning run: check everything, train, keep what is worth keeping.

Not here: options (`settings.py`), data (`dataset.py`, `encoding.py`), models and adapters (`adapters.py`), what is in
the folder of results (`output.py`), signals (`stopping.py`), figures and curves (`report.py`, `watching.py`), progress
(`progress.py`), too little memory (`remedies.py`), the adapter's card (`card.py`), a run that is tried only
(`rehearsal.py`).
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.conversation import is_english
from visualglm_tools.checkpoints.adapters import (
    BASE_FILE,
    fingerprint,
    write_fingerprint,
)
from visualglm_tools.checkpoints.cards import read_origin, write_card
from visualglm_tools.checkpoints.folder import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHT_FILE, check_folder
from visualglm_tools.checkpoints.loading import load_processor
from visualglm_tools.checkpoints.manifest import write_manifest
from visualglm_tools.checkpoints.picture_size import PICTURES_FILE, set_image_size, write_image_size
from visualglm_tools.training.adapters import (
    add_adapter,
    choose_adapter,
    choose_bits,
    count_targets,
    dtype_of,
    load_base,
)
from visualglm_tools.training.asking import choose_kept, is_divided, say_greedily
from visualglm_tools.training.card import describe_adapter
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import (
    IGNORED,
    Collator,
    Encoder,
    Example,
    count_shared,
    describe_contradictions,
    describe_truncation,
    digest,
)
from visualglm_tools.training.keeping import KeepAnswers
from visualglm_tools.training.output import (
    ADAPTER,
    COMPLETE,
    CURVES_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    UNFINISHED,
    as_begun,
    check_free,
    check_no_input,
    check_same_run,
    complete_checkpoints,
    describe_lost,
    explained_stops,
    held,
    remove_incomplete,
    remove_old,
    remove_unsaved_run,
    written,
)
from visualglm_tools.training.progress import Progress
from visualglm_tools.training.remedies import explained_memory, foresee_memory
from visualglm_tools.training.report import HELD_OUT, KEPT_ANSWERS, OLD, Measurement, measure, plot_curves, write_json
from visualglm_tools.training.settings import Settings
from visualglm_tools.training.stopping import StopAfterStep, Stopped, ended_by_signals
from visualglm_tools.training.watching import Watch


SHOWN_CHANGES = 3  # answers that are not what they were
SAVING_ERRORS = (OSError, RuntimeError, SafetensorError)


@dataclass
class Data:
    """Everything read and checked: examples to train on, and named lists to measure on."""

    train: list[Example]
    valid: list[Example] = field(default_factory=list)
    old: list[Example] = field(default_factory=list)
    kept: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of the files: layouts, and what of their rows is not learned


@dataclass(frozen=True)
class Plan:
    """What follows from the settings of a run before its data are read.

    Attributes:
        settings: resolved.
        config: of the base model.
        adapter: as PEFT describes it.
        bits: to quantize to while loading; None: none.
        arguments: as transformers' `Trainer` takes them.
        notes: what the user should read of the settings.
    """

    settings: Settings
    config: VisualGLMConfig
    adapter: PeftConfig
    bits: int | None
    arguments: TrainingArguments
    notes: list[str]


def finetune(
    settings: Settings,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    callbacks: Sequence[TrainerCallback] = (),
) -> dict:
    """Train an adapter.

    Args:
        settings: what to do.
        say: called with each line that the user should read.
        callbacks: more of transformers' callbacks.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: bad settings or data, named before the weights are loaded; a loss that is no number; a checkpoint
            that cannot be written, after which the last complete one is still there; too little memory.
        Stopped: Ctrl-C or SIGTERM; the error says whether there is a checkpoint to resume from.
    """
    plan = make_plan(settings)
    settings, arguments = plan.settings, plan.arguments
    say = said_once(say, plan)
    place = held(settings.save) if arguments.should_save else nullcontext()
    with place, explained_stops(settings.save), ended_by_signals():
        record = settings.as_json() | {"processes": arguments.world_size * max(1, arguments.n_gpu)}
        checkpoint = prepare_output(settings, record, arguments, say)
        encoder = build_encoder(settings, plan.config)
        data = read_data(settings, encoder, say)
        record["rows and pictures"] = digest([*data.train, *data.valid])
        check_resumed(settings, record)
        with explained_memory(settings, plan.config, data.train, arguments.device, lambda: data.kept):
            trainer = load_trainer(plan, data, Collator(encoder.processor), [Progress(say), *callbacks])
            samples = fingerprint(trainer.model.get_base_model())
            record["base weights"] = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
            check_resumed(settings, record)
            say(describe_model(trainer.model))
            is_short = warn_of_shortage(trainer, plan, data, say)
            if not settings.resume:
                save_record(settings, record, arguments)
            data.kept = choose_kept(trainer, settings, data.train, data.kept, encoder, say)
            if settings.keeps_answers:
                record["kept rows and pictures"] = digest(data.kept)
                check_resumed(settings, record)
            save_record(settings, record, arguments)
            if not is_short:
                warn_of_shortage(trainer, plan, data, say)  # what is kept may be longer than what is learned
            report = run(trainer, settings, data, encoder, checkpoint, say)
        bits = plan.bits or plan.config.quantization_bit or None
        card = describe_adapter(replace(settings, bits=bits), read_origin(settings.model, plan.config), report)
        save_adapter(trainer, settings.save, samples, card)
        if arguments.should_save:
            with written(settings.save, CURVES_FILE):
                plot_curves(trainer.state.log_history, settings.save / CURVES_FILE)
            with written(settings.save, REPORT_FILE):
                write_json(settings.save / REPORT_FILE, report)
    say(f"The adapter is in {settings.save / ADAPTER}, the curves are in {settings.save / CURVES_FILE}.")
    return report


# ---------------------------------------------------------------- before anything is loaded


def make_plan(settings: Settings) -> Plan:
    """Check the settings, and find out what follows from them."""
    settings.check()
    settings = as_begun(settings)
    check_folder(settings.model)
    config = VisualGLMConfig.from_pretrained(settings.model)
    if settings.image_size is not None:
        set_image_size(config, settings.image_size)
    has_gpu = torch.cuda.is_available() and not settings.cpu
    text = config.text_config
    settings, notes = settings.resolved(text.num_hidden_layers, has_gpu, text.hidden_size)
    adapter, bits = choose_adapter(settings, config), choose_bits(settings, config)
    return Plan(settings, config, adapter, bits, training_arguments(settings), notes)


def said_once(say: Callable[[str], None], plan: Plan) -> Callable[[str], None]:
    """What to say things with in each of a run's processes; the notes of the plan are said."""
    if plan.arguments.process_index:
        return lambda line: None
    for line in plan.notes:
        say(line)
    return say


def training_arguments(settings: Settings) -> TrainingArguments:
    """The settings as transformers' `Trainer` takes them."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    on_cpu = settings.cpu or not torch.accelerator.is_available()
    return TrainingArguments(
        output_dir=str(settings.save),
        max_steps=settings.train_iters,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_decay_style,
        warmup_steps=math.ceil(settings.warmup * settings.train_iters),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip_grad,
        fp16=settings.precision == "float16",
        bf16=settings.precision == "bfloat16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=min(settings.log_interval, settings.train_iters),
        logging_nan_inf_filter=False,
        disable_tqdm=True,  # `Progress` says how it goes
        save_steps=settings.save_interval,
        eval_strategy="steps" if settings.valid_data else "no",
        eval_steps=settings.steps_between_evaluations,
        eval_on_start=bool(settings.valid_data) and not settings.selects_best and not settings.resume,
        load_best_model_at_end=settings.selects_best,
        metric_for_best_model="eval_loss" if settings.selects_best else None,
        report_to=["tensorboard"] if settings.tensorboard else [],
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.num_workers,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        **(checkpointing if settings.checkpoint_activations else {}),
        # A batch without pictures leaves adapters of the image encoder without a gradient.
        ddp_find_unused_parameters=settings.train_qformer or settings.train_projection,
    )


def prepare_output(
    settings: Settings, record: dict, arguments: TrainingArguments, say: Callable[[str], None]
) -> Path | None:
    """See what is in the output folder, and clean up after a run that was cut short.

    Returns:
        The checkpoint to resume from; None to begin.

    Raises:
        ValueError: results that would be overwritten, nothing to resume from, or other settings than then.
    """
    if not settings.resume:
        if arguments.should_save:
            check_no_input(settings.save, settings.inputs)
            remove_unsaved_run(settings.save, say)
            check_free(settings.save)
        return None
    checkpoints = complete_checkpoints(settings.save)
    if not checkpoints:
        raise ValueError(
            f"{settings.save} has no complete checkpoint to resume from. Leave --resume out to begin, or give the "
            "--save of the run that was interrupted."
        )
    check_resumed(settings, record)
    if arguments.should_save:
        remove_incomplete(settings.save)
    return checkpoints[-1]


def save_record(settings: Settings, record: dict, arguments: TrainingArguments) -> None:
    """Write down what the run is, in one of its processes."""
    if arguments.should_save:
        with written(settings.save, SETTINGS_FILE):
            write_json(settings.save / SETTINGS_FILE, record)


def check_resumed(settings: Settings, record: dict) -> None:
    if settings.resume:
        check_same_run(settings.save, record)


def build_encoder(settings: Settings, config: VisualGLMConfig) -> Encoder:
    return Encoder(
        load_processor(settings.model, config),
        settings.max_source_length,
        settings.max_target_length,
        config.text_config.max_position_embeddings,
        settings.english,
    )


def read_data(settings: Settings, encoder: Encoder, say: Callable[[str], None]) -> Data:
    """Read and check all files; what is cut or left out is said.

    Raises:
        ValueError: names every bad row; with `strict` also what would be truncated.
    """

    notes = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    def read(files: Sequence[Path], needs_answers: bool = True) -> list[Example]:
        return [example for row in read_dataset(list(files), encoder, needs_answers, note) for example in row]

    data = Data(
        read(settings.train_data),
        read(settings.valid_data),
        read(settings.old_data),
        read(settings.keep_data, False),
        notes,
    )
    # Of all files at once: lengths that are good for one may be too small for another.
    truncation = describe_truncation([*data.train, *data.valid, *data.old, *data.kept], encoder)
    if truncation and settings.strict:
        raise ValueError(truncation)
    for line in filter(None, (truncation, describe_contradictions(data.train))):
        note(line)
    trained = sum(min(example.target_length, settings.max_target_length) for example in data.train)
    say(f"{len(data.train)} training examples with {trained} tokens of answers.")
    languages = describe_languages(data)
    if languages and not settings.asks_itself:
        say(languages)
    taught = count_shared(data.kept, data.train, by_question=True)
    if taught:
        say(
            f"{taught} of {len(data.kept)} rows of --keep-data ask what is trained on: their old answers are kept "
            "against the new ones. Leave them out."
        )
    shared = count_shared(data.valid, data.train)
    if shared:
        say(f"{shared} of {len(data.valid)} held-out examples are trained on too: their loss says nothing of new ones.")
    return data


def describe_languages(data: Data) -> str | None:
    """Say so if what is kept and what is trained share no language: the answers in the trained one are not kept."""
    names = {True: "English", False: "Chinese"}
    kept, trained = ({is_english(each.conversation.question) for each in rows} for rows in (data.kept, data.train))
    if not kept or kept & trained:
        return None
    return (
        f"All rows of --keep-data are {names[kept.pop()]} and all that are trained on {names[trained.pop()]}: training "
        "changes what is said in that language most. Add rows in it, or --keep self."
    )


# ---------------------------------------------------------------- training


class Keeper(TrainerCallback):
    """Marks complete checkpoints, draws the curves at each, and stops a run whose loss is no number.

    Args:
        keep: how many complete checkpoints stay, the last ones; the best stays in any case.
    """

    def __init__(self, keep: int):
        self.keep = keep

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run has these of the checkpoint; they are free to change, and so is the name of the folder.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        if state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        best = math.inf if state.best_metric is None else state.best_metric
        if args.load_best_model_at_end and metrics["eval_loss"] < best:
            control.should_save = True  # else there would be nothing to load at the end

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            check_finite(kwargs["model"], state.global_step)
            write_image_size(checkpoint, kwargs["model"])
            (checkpoint / COMPLETE).touch()
            remove_old(folder, self.keep, state.best_global_step)
            plot_curves(state.log_history, folder / CURVES_FILE)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise ValueError(describe_failure(f"The loss is {logs['loss']} at step {state.global_step}"))


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Raise a `ValueError` if what was trained is no number any more: the next loss would be none, if one came."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    if not all(torch.isfinite(parameter).all() for parameter in trained):
        raise ValueError(describe_failure(f"The adapter has values that are no numbers after step {step}"))


def describe_failure(what: str) -> str:
    return f"{what}: training has failed. Lower --lr, or train in bfloat16 or float32."


class PerTokenTrainer(KeepAnswers, Trainer):
    """Evaluates to the loss per token, as it trains; `Trainer` takes the mean of the batches, whatever is in them."""

    @cached_property
    def usual_tokens(self) -> float:
        return count_learned([example.labels for example in self.eval_dataset])

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss * count_learned(inputs["labels"].tolist()) / self.usual_tokens, logits, labels


def count_learned(labels: Sequence[Sequence[int]]) -> float:
    """Tokens with a loss, on average over the rows."""
    return sum(label != IGNORED for row in labels for label in row) / len(labels)


def load_trainer(plan: Plan, data: Data, collator: Collator, callbacks: Sequence[TrainerCallback]) -> Trainer:
    """Load the base model, put the untrained adapter on it, and make a trainer of both."""
    settings = plan.settings
    set_seed(settings.seed)
    base = load_base(settings.model, dtype_of(settings.precision), plan.bits, settings.qlora_backend)
    base.config.vision_config.preferred_image_size = plan.config.vision_config.preferred_image_size
    evaluated = data.valid
    if settings.eval_iters is not None:
        evaluated = Subset(evaluated, range(min(len(evaluated), settings.eval_iters * settings.eval_batch_size)))
    trainer = PerTokenTrainer(
        model=add_adapter(base, plan.adapter),
        args=plan.arguments,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=evaluated if len(evaluated) else None,
        callbacks=[Keeper(settings.keep_checkpoints), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def describe_model(model: PeftModel) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    where = ", ".join(f"{count} matrices of the {part}" for part, count in count_targets(model).items() if count)
    return f"Training {trainable:,} of {total:,} parameters{': LoRA on ' + where if where else ', a prefix'}."


def warn_of_shortage(trainer: Trainer, plan: Plan, data: Data, say: Callable[[str], None]) -> bool:
    """Say so if training will take more memory than there is; returns whether it will."""
    shortage = foresee_memory(plan.settings, plan.config, data.train, trainer.model, data.kept)
    if shortage is None or is_divided(trainer):
        return False
    say(shortage)
    return True


def run(
    trainer: Trainer,
    settings: Settings,
    data: Data,
    encoder: Encoder,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> dict:
    """Measure, train, measure again; what is forgotten is measured on kept answers if there are no old ones."""
    lists = {HELD_OUT: data.valid} | ({OLD: data.old} if data.old else {KEPT_ANSWERS: data.kept})
    lists = {name: examples[: settings.answers] for name, examples in lists.items() if examples and settings.answers}
    if is_divided(trainer) and lists:
        say("Answers are not measured before and after: the model is divided among processes.")
        lists = {}
    with trainer.model.disable_adapter():
        before = {
            name: measure(trainer.model, trainer.data_collator, rows, settings.eval_batch_size)
            for name, rows in lists.items()
        }
    trainer.add_callback(Watch(trainer, lists, before, settings.steps_between_evaluations, settings.eval_batch_size))
    train(trainer, settings, checkpoint)
    after = {
        name: measure(trainer.model, trainer.data_collator, rows, settings.eval_batch_size)
        for name, rows in lists.items()
    }
    for name in lists:
        if math.isfinite(before[name].loss) and not math.isfinite(after[name].loss):
            raise ValueError(describe_failure(f"The loss of what is {name} is {after[name].loss} after training"))
    measured = {
        name: {"examples": len(rows), "before": before[name].figures, "after": after[name].figures}
        for name, rows in lists.items()
    }
    for name, figures in measured.items():
        say(describe_change(name, figures))
        if name != HELD_OUT:
            figures["changed"] = show_changes(trainer, encoder, find_lost(lists[name], before[name], after[name]))
            for change in figures["changed"]:
                say("  {question} was answered {before!r}, and is now answered {after!r}.".format(**change))
    best = trainer.state.best_model_checkpoint
    if best:
        say(f"The best of the evaluated checkpoints is {Path(best).name}, loss {trainer.state.best_metric:.4f}.")
    return {
        "settings": settings.as_json(),
        "steps": trainer.state.global_step,
        "best_checkpoint": Path(best).name if best else None,
        "measured": measured,
        "data": data.notes,
        "log": trainer.state.log_history,
    }


def find_lost(rows: Sequence[Example], before: Measurement, after: Measurement) -> list[Example]:
    """The rows that were answered rightly, and are not any more."""
    return [row for row, was, is_now in zip(rows, before.is_right, after.is_right, strict=True) if was and not is_now]


def show_changes(trainer: Trainer, encoder: Encoder, lost: Sequence[Example]) -> list[dict]:
    """Some questions that are answered otherwise than before, with both answers."""
    shown = [example.conversation for example in lost[:SHOWN_CHANGES]]
    trainer.model.eval()
    answers = say_greedily(trainer.model, encoder, trainer.data_collator, shown) if shown else []
    return [
        {"question": row.question, "before": row.answer, "after": answer}
        for row, answer in zip(shown, answers, strict=True)
    ]


def describe_change(name: str, figures: dict) -> str:
    before, after = figures["before"], figures["after"]
    return (
        f"{name}: {before['right']} of {figures['examples']} answers right before, {after['right']} after; "
        f"loss {before['loss']:.3f} before, {after['loss']:.3f} after."
    )


def train(trainer: Trainer, settings: Settings, checkpoint: Path | None) -> None:
    """Train to the end.

    Raises:
        ValueError: a checkpoint that cannot be written, which is removed; the error says what is left.
        Stopped: a signal has come; the step was saved.
    """
    stop = StopAfterStep()
    trainer.add_callback(stop)
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except SAVING_ERRORS as error:
        incomplete = remove_incomplete(settings.save) if trainer.args.should_save else []
        if not incomplete:
            raise
        raise ValueError(describe_lost(settings.save, incomplete[0].name, error)) from error
    if stop.asked_by is not None:
        raise Stopped(number=stop.asked_by)


def save_adapter(trainer: Trainer, folder: Path, samples: dict, card: tuple[dict, str]) -> None:
    """Write the adapter with its card; the folder appears whole or not at all, in the place of one that was there."""
    unfinished = folder / UNFINISHED
    try:
        trainer.save_model(str(unfinished))  # in all processes: the parts of a divided model are gathered
        if not trainer.args.should_save:
            return
        write_fingerprint(unfinished, samples)
        write_image_size(unfinished, trainer.model)
        for path in unfinished.iterdir():
            if path.name not in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHT_FILE, BASE_FILE, PICTURES_FILE):
                path.unlink()
        mode = (unfinished / ADAPTER_CONFIG_FILE).stat().st_mode
        (unfinished / ADAPTER_WEIGHT_FILE).chmod(mode)  # safetensors leaves it readable to its owner alone
        write_card(unfinished, *card)
        write_manifest(unfinished)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        unfinished.rename(folder / ADAPTER)
    except SAVING_ERRORS as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(describe_lost(folder, ADAPTER, error)) from error
