"""One fine-tuning run: check everything, train, keep what is worth keeping.

In the folder `save`:

    adapter/        the result: adapter_config.json, adapter_model.safetensors, base_model.json
    checkpoint-N/   states to resume from, each an adapter too; one without the file `complete` was cut short
    settings.json, curves.png, report.json

Not here: data (`dataset.py`, `encoding.py`), models and adapters (`adapters.py`), figures and tables (`report.py`).
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from adapter_files import BASE_FILE, CONFIG_FILE, WEIGHT_FILE, fingerprint, first_line, write_fingerprint
from filelock import FileLock, Timeout
from model_folder import check_folder
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from training.adapters import (
    add_adapter,
    count_targets,
    load_base,
    load_processor,
    lora_config,
    prefix_config,
    resolve_layers,
)
from training.dataset import read_dataset
from training.encoding import Collator, Encoder, Example, describe_truncation
from training.report import measure, plot_curves, write_json
from visualglm_hf.configuration_visualglm import VisualGLMConfig


METHODS = ("lora", "qlora", "ptuning")
COMPLETE = "complete"  # a checkpoint without this file was cut short
ADAPTER = "adapter"
UNFINISHED = ".adapter.unfinished"
SETTINGS_FILE = "settings.json"
SAVING_ERRORS = (OSError, RuntimeError, SafetensorError)
# What may differ when a run is resumed: where and how, but not what is computed.
FREE_TO_CHANGE = {"resume", "save", "log_interval", "save_interval", "keep", "tensorboard", "num_workers", "answers"}


@dataclass(frozen=True)
class Settings:
    """What a run does; the defaults are the original's."""

    model: Path
    train_data: tuple[Path, ...]
    method: str
    save: Path = Path("checkpoints")
    valid_data: tuple[Path, ...] = ()
    old_data: tuple[Path, ...] = ()
    resume: bool = False
    lora_rank: int = 10
    lora_alpha: float = 1.0
    lora_dropout: float = 0.0
    layer_range: tuple[str, ...] = ("0", "14")
    train_qformer: bool = False
    train_projection: bool = False
    bits: int | None = None
    qlora_backend: str = "lowbit"
    pre_seq_len: int = 4
    max_source_length: int = 64
    max_target_length: int = 256
    english: bool | None = None
    strict: bool = False
    train_iters: int = 300
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    lr: float = 1e-4
    lr_decay_style: str = "cosine"
    warmup: float = 0.02
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    checkpoint_activations: bool = False
    precision: str = "float32"
    save_interval: int = 300
    eval_interval: int = 10000
    eval_iters: int | None = None
    eval_batch_size: int = 8
    log_interval: int = 10
    keep: int = 3
    answers: int = 100
    num_workers: int = 0
    tensorboard: bool = False
    cpu: bool = False
    seed: int = 1234

    def as_json(self) -> dict:
        return json.loads(json.dumps(asdict(self), default=str))


@dataclass
class Data:
    """Everything read and checked: examples to train on, and named lists to measure on."""

    train: list[Example]
    valid: list[Example] = field(default_factory=list)
    old: list[Example] = field(default_factory=list)


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
            that cannot be written, after which the last complete one is still there.
    """
    check_folder(settings.model)
    config = VisualGLMConfig.from_pretrained(settings.model)
    adapter = choose_adapter(settings, config)
    arguments = training_arguments(settings)
    say = say if arguments.process_index == 0 else lambda line: None
    with held(settings.save, arguments):
        checkpoint = prepare_output(settings, arguments)
        encoder = build_encoder(settings, config)
        data = read_data(settings, encoder, say)
        set_seed(settings.seed)
        base = load_base(
            settings.model, dtype_of(settings.precision), choose_bits(settings, config), settings.qlora_backend
        )
        samples = fingerprint(base)
        trainer = build_trainer(settings, arguments, base, adapter, data, Collator(encoder.processor), callbacks)
        say(describe_model(trainer.model))
        if arguments.should_save:
            write_json(settings.save / SETTINGS_FILE, settings.as_json())  # from here on, --save is in use
        report = run(trainer, settings, data, checkpoint, say)
        save_adapter(trainer, settings.save, samples)
        if arguments.should_save:
            plot_curves(trainer.state.log_history, settings.save / "curves.png")
            write_json(settings.save / "report.json", report)
    say(f"The adapter is in {settings.save / ADAPTER}, the curves are in {settings.save / 'curves.png'}.")
    return report


# ---------------------------------------------------------------- before anything is loaded


def choose_adapter(settings: Settings, config: VisualGLMConfig) -> PeftConfig:
    """PEFT's description of what is trained; a `ValueError` for a rank, layer or length that cannot be."""
    if settings.method == "ptuning":
        return prefix_config(settings.pre_seq_len, config)
    layers = resolve_layers(settings.layer_range, config.text_config.num_hidden_layers)
    return lora_config(
        settings.lora_rank,
        layers,
        settings.lora_alpha,
        settings.lora_dropout,
        settings.train_qformer,
        settings.train_projection,
    )


def choose_bits(settings: Settings, config: VisualGLMConfig) -> int | None:
    """The bits to quantize to while loading; None for a checkpoint that has few already."""
    if settings.method != "qlora" or config.quantization_bit:
        return None
    return settings.bits or 4


def dtype_of(precision: str) -> torch.dtype:
    return getattr(torch, precision)


def training_arguments(settings: Settings) -> TrainingArguments:
    """The settings as transformers' `Trainer` takes them."""
    selects_best = is_selecting(settings)
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
        save_steps=settings.save_interval,
        save_total_limit=settings.keep,
        eval_strategy="steps" if selects_best else "no",
        eval_steps=settings.eval_interval,
        load_best_model_at_end=selects_best,
        metric_for_best_model="eval_loss" if selects_best else None,
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


def is_selecting(settings: Settings) -> bool:
    """Whether the run evaluates as it goes, and so ends with its best checkpoint.

    Raises:
        ValueError: it would evaluate at steps that are not saved.
    """
    if not settings.valid_data or settings.eval_interval > settings.train_iters:
        return False
    if settings.save_interval % settings.eval_interval:
        raise ValueError(
            f"--save-interval {settings.save_interval} must be a multiple of --eval-interval {settings.eval_interval}, "
            "so that the best of the evaluated checkpoints is there in the end."
        )
    return True


@contextmanager
def held(folder: Path, arguments: TrainingArguments):
    """Keep other runs out of the folder while this one writes there."""
    if not arguments.should_save:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another run; wait for it or choose another --save.") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder} cannot be a folder: there is a file of that name. Choose another --save."
        ) from error


def prepare_output(settings: Settings, arguments: TrainingArguments) -> Path | None:
    """See what is in the output folder, and clean up after a run that was cut short.

    Returns:
        The checkpoint to resume from; None to begin.

    Raises:
        ValueError: results that would be overwritten, nothing to resume from, or other settings than then.
    """
    if not settings.resume:
        found = sorted(path.name for path in settings.save.glob("*") if not path.name.startswith("."))
        if found and arguments.should_save:
            raise ValueError(
                f"{settings.save} is in use: it holds {', '.join(found[:4])}. Choose another --save, or go on with "
                "--resume."
            )
        return None
    checkpoints = complete_checkpoints(settings.save)
    if not checkpoints:
        raise ValueError(f"{settings.save} has no complete checkpoint to resume from.")
    check_same_settings(settings, settings.save / SETTINGS_FILE)
    if arguments.should_save:
        remove_incomplete(settings.save)
    return checkpoints[-1]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to the end, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete what a run that was cut short has left half-written; returns what that was."""
    incomplete = [path for path in folder.glob("checkpoint-*") if not (path / COMPLETE).is_file()]
    for path in [*incomplete, folder / UNFINISHED]:
        shutil.rmtree(path, ignore_errors=True)
    return incomplete


def check_same_settings(settings: Settings, file: Path) -> None:
    """Raise a `ValueError` if a resumed run would not be the one that was interrupted."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, so nothing can be resumed: {error}") from error
    now = settings.as_json()
    changed = [name for name in now if name not in FREE_TO_CHANGE and now[name] != before.get(name)]
    if changed:
        told = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
        raise ValueError(f"--resume continues the same run, but {told}. Give the same options, or another --save.")


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

    def read(files: Sequence[Path]) -> list[Example]:
        examples = [example for row in read_dataset(list(files), encoder) for example in row]
        truncation = describe_truncation(examples, encoder) if examples else None
        if truncation and settings.strict:
            raise ValueError(f"{', '.join(map(str, files))}: {truncation}")
        if truncation:
            say(f"{', '.join(map(str, files))}: {truncation}")
        return examples

    data = Data(*(read(files) for files in (settings.train_data, settings.valid_data, settings.old_data)))
    trained = sum(min(example.target_length, settings.max_target_length) for example in data.train)
    say(f"{len(data.train)} training examples with {trained} tokens of answers.")
    return data


# ---------------------------------------------------------------- training


class Keeper(TrainerCallback):
    """Marks complete checkpoints, draws the curves at each, and stops a run whose loss is no number."""

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            plot_curves(state.log_history, Path(args.output_dir) / "curves.png")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise ValueError(
                f"The loss is {logs['loss']} at step {state.global_step}: training has failed. Lower --lr, or train in "
                "bfloat16 or float32."
            )


def build_trainer(
    settings: Settings,
    arguments: TrainingArguments,
    base: torch.nn.Module,
    adapter: PeftConfig,
    data: Data,
    collator: Collator,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    evaluated = data.valid
    if settings.eval_iters is not None:
        evaluated = Subset(evaluated, range(min(len(evaluated), settings.eval_iters * settings.eval_batch_size)))
    return Trainer(
        model=add_adapter(base, adapter),
        args=arguments,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=evaluated if len(evaluated) else None,
        callbacks=[Keeper(), *callbacks],
    )


def describe_model(model: PeftModel) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    where = ", ".join(f"{count} matrices of the {part}" for part, count in count_targets(model).items() if count)
    return f"Training {trainable:,} of {total:,} parameters{': LoRA on ' + where if where else ', a prefix'}."


def run(trainer: Trainer, settings: Settings, data: Data, checkpoint: Path | None, say: Callable[[str], None]) -> dict:
    """Measure, train, measure again."""
    lists = {"held out": data.valid, "old abilities": data.old}
    lists = {name: examples[: settings.answers] for name, examples in lists.items() if examples and settings.answers}
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and lists:
        say("Answers are not measured before and after: the model is divided among processes.")
        lists = {}
    with trainer.model.disable_adapter():
        before = {
            name: measure(trainer.model, trainer.data_collator, rows, settings.eval_batch_size)
            for name, rows in lists.items()
        }
    train(trainer, settings, checkpoint)
    after = {
        name: measure(trainer.model, trainer.data_collator, rows, settings.eval_batch_size)
        for name, rows in lists.items()
    }
    measured = {
        name: {"examples": len(rows), "before": before[name], "after": after[name]} for name, rows in lists.items()
    }
    for name, figures in measured.items():
        say(describe_change(name, figures))
    best = trainer.state.best_model_checkpoint
    if best:
        say(f"The best of the evaluated checkpoints is {Path(best).name}, loss {trainer.state.best_metric:.4f}.")
    return {
        "settings": settings.as_json(),
        "steps": trainer.state.global_step,
        "best_checkpoint": Path(best).name if best else None,
        "measured": measured,
        "log": trainer.state.log_history,
    }


def describe_change(name: str, figures: dict) -> str:
    before, after = figures["before"], figures["after"]
    return (
        f"{name}: {before['right']} of {figures['examples']} answers right before, {after['right']} after; "
        f"loss {before['loss']:.3f} before, {after['loss']:.3f} after."
    )


def train(trainer: Trainer, settings: Settings, checkpoint: Path | None) -> None:
    """Train to the end.

    Raises:
        ValueError: a checkpoint that cannot be written, which is removed (the error says what is left), or a device
            with too little memory.
    """
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"The memory of the device is too small: {first_line(error)} Try --checkpoint-activations, a smaller "
            "--batch-size with more --gradient-accumulation-steps, or --use_qlora."
        ) from error
    except SAVING_ERRORS as error:
        incomplete = remove_incomplete(settings.save) if trainer.args.should_save else []
        if not incomplete:
            raise
        raise ValueError(describe_lost(settings.save, incomplete[0].name, error)) from error


def describe_lost(folder: Path, name: str, error: Exception) -> str:
    left = complete_checkpoints(folder)
    remedy = f"Make room and go on from {left[-1].name} with --resume." if left else "Make room and begin again."
    return f"{name} could not be written: {first_line(error)}. {remedy}"


def save_adapter(trainer: Trainer, folder: Path, samples: dict) -> None:
    """Write the adapter alone; the folder appears whole or not at all, in the place of one that was there."""
    unfinished = folder / UNFINISHED
    try:
        trainer.save_model(str(unfinished))  # in all processes: the parts of a divided model are gathered
        if not trainer.args.should_save:
            return
        write_fingerprint(unfinished, samples)
        for path in unfinished.iterdir():
            if path.name not in (CONFIG_FILE, WEIGHT_FILE, BASE_FILE):
                path.unlink()
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        unfinished.rename(folder / ADAPTER)
    except SAVING_ERRORS as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(describe_lost(folder, ADAPTER, error)) from error
