"""What a fine-tuning run does, each option declared once: the parser, the documentation's table and `settings.json`
come from here, and what follows from the options is computed here.

Not here: what only the command line has (`commands/finetune.py`), and what is done (`run.py`).
"""

import argparse
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from visualglm_tools.options import AMOUNT, COUNT, COUNT_OR_NONE, POSITIVE, SHARE, is_given, one_of, option
from visualglm_tools.shipped import DEFAULT_MODEL


# torch, transformers and PEFT are not imported: `-h` and typing errors shall not wait for them.

CURVE_POINTS = 10  # evaluations in a run, where no interval is asked for
LANGUAGES = {"auto": None, "zh": False, "en": True}  # whether a prompt is English; None: by its question
ORIGINAL_WIDTH = 4096  # of VisualGLM-6B's decoder
# What is known to do, by the decoder's width: for LoRA the original's, for P-tuning ChatGLM-6B's, and what was measured
# with the tiny model (docs/finetuning.md). Between them it is a straight line of logarithms.
USUAL_RANKS = {ORIGINAL_WIDTH: 10, 128: 32}
OF_LORA, OF_PTUNING = {ORIGINAL_WIDTH: 1e-4, 128: 2e-2}, {ORIGINAL_WIDTH: 2e-2, 128: 1e-1}
USUAL_RATES = {"lora": OF_LORA, "qlora": OF_LORA, "ptuning": OF_PTUNING}
LOW_RATE = 0.2  # of the usual one: a prefix has learned nothing with less
USUAL_BATCHES = {"qlora": (1, 4)}  # rows at once, batches in a step: of the original's QLoRA script
OTHER_BATCHES = (4, 1)

# Options that some methods have no use for. The original's scripts give theirs with every method.
LORA = ("lora", "qlora")
METHODS = (*LORA, "ptuning")
METHODS_WITH = {
    "lora_alpha": LORA,
    "lora_dropout": LORA,
    "train_qformer": LORA,
    "train_projection": LORA,
    "bits": ("qlora",),
    "qlora_backend": ("qlora",),
}
ORIGINAL_METHODS_WITH = {"lora_rank": LORA, "layer_range": LORA, "pre_seq_len": ("ptuning",)}
ONLY_WITH_VALID_DATA = ("eval_interval", "eval_iters")

SELF, NONE = "self", "none"  # of --keep
ONLY_WITH_QUESTIONS, ONLY_WITH_KEEPING = ("keep_questions",), ("keep_rows", "keep_weight")


def what_to_keep(text: str) -> str | int:
    """A `parse` for `--keep`, which was the number of checkpoints once."""
    if text in (SELF, NONE):
        return text
    if text.isdecimal():
        return COUNT(text)
    raise argparse.ArgumentTypeError(f"must be {SELF!r} or {NONE!r}, found {text[:60]!r}")


WHAT = {"group": "what is trained"}
DATA = {"group": "data"}
HOW = {"group": "how"}
RESULTS = {"group": "results"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does; names and defaults are the original's.

    `finetune` takes them as they are said, and goes by those that are `resolved`.
    """

    method: str | None = one_of(
        {
            "use-lora": ("lora", "train low-rank additions to the attention of --layer-range"),
            "use-qlora": ("qlora", "the same on a decoder of 4 bits (or --bits 8)"),
            "use-ptuning": ("ptuning", "train --pre-seq-len keys and values before the prompt, in each layer"),
        },
        None,
        **WHAT,
    )
    model: Path = option("checkpoint to train on", DEFAULT_MODEL, names=("from_pretrained",), metavar="FOLDER", **WHAT)
    lora_rank: int | None = option(
        "columns of the additions' matrices",
        None,
        metavar="R",
        unset="10; more for a decoder that is narrower than VisualGLM-6B's, up to 32",
        **WHAT,
    )
    lora_alpha: float = option("additions are scaled by A / R", 1.0, parse=POSITIVE, metavar="A", **WHAT)
    lora_dropout: float = option(
        "part of the additions' inputs that is left out", 0.0, parse=SHARE, metavar="P", **WHAT
    )
    layer_range: tuple[str, ...] | None = option(
        "indices of the decoder's layers, no range; or 'all'",
        None,
        metavar="N",
        unset="the first and the middle one, 0 14 of 28",
        **WHAT,
    )
    train_qformer: bool = option("LoRA on the Q-Former too", False, **WHAT)
    train_projection: bool = option("LoRA on the projection to the decoder too", False, **WHAT)
    bits: int | None = option("bits per weight, of --use-qlora", None, choices=(4, 8), unset="4", **WHAT)
    qlora_backend: str = option(
        "this package's linear layers, or those of bitsandbytes", "lowbit", choices=("lowbit", "nf4"), **WHAT
    )
    pre_seq_len: int = option("keys and values in each layer, of --use-ptuning", 4, metavar="N", **WHAT)

    train_data: tuple[Path, ...] = option(
        "rows, or pictures with captions; see docs/finetuning.md", (), metavar="FILE", **DATA
    )
    valid_data: tuple[Path, ...] = option("rows to evaluate on", (), metavar="FILE", **DATA)
    old_data: tuple[Path, ...] = option("rows to see what is forgotten", (), metavar="FILE", **DATA)
    image_size: int | None = option(
        "pixels a side at which pictures are shown, a multiple of 14; saved with the adapter",
        None,
        parse=COUNT,
        metavar="PIXELS",
        unset="the model's, 224",
        **DATA,
    )
    keep_data: tuple[Path, ...] = option(
        "rows whose answers shall stay as they are; they need no labels", (), metavar="FILE", **DATA
    )
    keep: str | int | None = option(
        "'self': ask the model ordinary questions before training, and keep its answers; 'none': keep nothing",
        None,
        parse=what_to_keep,
        metavar="WHAT",
        unset="self; only --keep-data, if that is given",
        **DATA,
    )
    keep_questions: int | None = option(
        "ordinary questions to ask",
        None,
        parse=COUNT,
        metavar="N",
        unset="as many as take a quarter of the run's time",
        **DATA,
    )
    keep_rows: int = option("kept rows beside the rows of a step", 4, parse=COUNT, metavar="N", **DATA)
    keep_weight: float = option(
        "of the divergence from the kept answers, beside the loss", 0.7, parse=POSITIVE, metavar="W", **DATA
    )
    max_source_length: int = option("tokens with pictures", 64, parse=COUNT, metavar="N", **DATA)
    max_target_length: int = option("tokens of an answer", 256, parse=COUNT, metavar="N", **DATA)
    strict: bool = option("fail if anything is too long, instead of shortening it", False, **DATA)
    prompt_language: str = option(
        "prompt with 问：/答：, or Q:/A:; auto: by the question's language, as chat() does (the original: zh)",
        "auto",
        choices=tuple(LANGUAGES),
        **DATA,
    )

    train_iters: int = option("steps of the optimizer", 300, parse=COUNT, metavar="N", **HOW)
    lr: float | None = option(
        "learning rate",
        None,
        parse=POSITIVE,
        metavar="RATE",
        unset="1e-4, with --use-ptuning 0.02; more for a decoder that is narrower than VisualGLM-6B's",
        **HOW,
    )
    lr_decay_style: str = option(
        "how the learning rate falls", "cosine", choices=("constant", "linear", "cosine"), **HOW
    )
    warmup: float = option(
        "part of the steps in which the learning rate rises", 0.02, parse=SHARE, metavar="SHARE", **HOW
    )
    weight_decay: float = option("of AdamW", 0.01, parse=AMOUNT, metavar="W", **HOW)
    clip_grad: float = option("the gradient's largest norm", 1.0, parse=AMOUNT, metavar="NORM", **HOW)
    batch_size: int | None = option(
        "rows at once, per process", None, parse=COUNT, metavar="N", unset="4; QLoRA 1", **HOW
    )
    gradient_accumulation_steps: int | None = option(
        "batches per step", None, parse=COUNT, metavar="N", unset="1; QLoRA 4", **HOW
    )
    checkpoint_activations: bool = option("less memory, more time", False, names=("gradient_checkpointing",), **HOW)
    precision: str = one_of(
        {"fp16": ("float16", "float16, on a GPU"), "bf16": ("bfloat16", "bfloat16")}, "float32", **HOW
    )
    cpu: bool = option("even if there is a GPU", False, **HOW)
    seed: int = option("of the order of the rows, and of what is random", 1234, parse=COUNT_OR_NONE, metavar="N", **HOW)
    num_workers: int = option("processes that open pictures", 0, parse=COUNT_OR_NONE, metavar="N", **HOW)

    save: Path = option("folder of the results", Path("checkpoints"), metavar="FOLDER", **RESULTS)
    resume: bool = option("go on from the last complete checkpoint in --save", False, **RESULTS)
    save_interval: int = option("steps between checkpoints", 300, parse=COUNT, metavar="N", **RESULTS)
    eval_interval: int = option(
        "steps between evaluations; more than the run has: ten of them in it",
        10000,
        parse=COUNT,
        metavar="N",
        **RESULTS,
    )
    eval_iters: int | None = option("batches to evaluate on", None, parse=COUNT, metavar="N", unset="all", **RESULTS)
    eval_batch_size: int = option("rows at once in an evaluation", 8, parse=COUNT, metavar="N", **RESULTS)
    log_interval: int = option("steps between lines of the log", 10, parse=COUNT, metavar="N", **RESULTS)
    keep_checkpoints: int = option(
        "checkpoints that stay, the last ones; also as --keep N", 3, parse=COUNT, metavar="N", **RESULTS
    )
    answers: int = option(
        "rows to count right answers on, before and after", 100, parse=COUNT_OR_NONE, metavar="N", **RESULTS
    )
    tensorboard: bool = option("write events into --save/runs", False, **RESULTS)

    @property
    def english(self) -> bool | None:
        """Whether prompts are English; None: by their questions."""
        return LANGUAGES[self.prompt_language]

    @property
    def asks_itself(self) -> bool:
        """Whether the model is asked ordinary questions before it is trained, whose answers are kept."""
        return self.keep == SELF

    @property
    def keeps_answers(self) -> bool:
        return self.asks_itself or bool(self.keep_data)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files and folders of rows."""
        return (*self.train_data, *self.valid_data, *self.old_data, *self.keep_data)

    @property
    def selects_best(self) -> bool:
        """Whether the result is the checkpoint with the lowest loss on held-out rows, and not the last one."""
        return bool(self.valid_data) and self.eval_interval <= self.train_iters

    @property
    def steps_between_evaluations(self) -> int:
        """As asked for; an interval beyond the run, such as the original's, gives `CURVE_POINTS` in it."""
        if self.eval_interval <= self.train_iters:
            return self.eval_interval
        return math.ceil(self.train_iters / CURVE_POINTS)

    def as_json(self) -> dict:
        """The settings as `settings.json` has them, whatever else a subclass knows."""
        return json.loads(
            json.dumps({field.name: getattr(self, field.name) for field in fields(Settings)}, default=str)
        )

    def check(self) -> None:
        """Raise a `ValueError` for options that are missing or contradict each other."""
        if self.method not in METHODS:
            raise ValueError("choose what to train: --use_lora, --use_qlora or --use_ptuning")
        if not self.train_data:
            raise ValueError("--train-data is missing: the file with the rows to train on")
        for line in self.of_other_methods(METHODS_WITH):
            raise ValueError(line)
        if self.keep == NONE and self.keep_data:
            raise ValueError("--keep none and --keep-data contradict each other: leave one of them out")
        if self.selects_best and self.save_interval % self.eval_interval:
            multiple = self.eval_interval * max(1, self.save_interval // self.eval_interval)
            raise ValueError(
                f"--save-interval {self.save_interval} must be a multiple of --eval-interval {self.eval_interval}, "
                f"such as {multiple}, so that the best of the evaluated checkpoints is there in the end."
            )

    def of_other_methods(self, methods_with: dict[str, tuple[str, ...]]) -> list[str]:
        """What to say of each option that was given, and that the chosen method has no use for."""
        return [
            f"--{name} belongs to --use_{' and --use_'.join(methods)}"
            for name, methods in methods_with.items()
            if self.method not in methods and is_given(self, name)
        ]

    def unused(self) -> list[str]:
        """What to say of options of the original's scripts that change nothing in this run."""
        lines = [f"{line}, and has no effect." for line in self.of_other_methods(ORIGINAL_METHODS_WITH)]
        for name in ONLY_WITH_VALID_DATA:
            if is_given(self, name) and not self.valid_data:
                lines.append(f"--{name.replace('_', '-')} has no effect: there is no --valid-data.")
        for name in ONLY_WITH_QUESTIONS:
            if is_given(self, name) and not self.asks_itself:
                lines.append(f"--{name.replace('_', '-')} has no effect without --keep self.")
        for name in ONLY_WITH_KEEPING:
            if is_given(self, name) and not self.keeps_answers:
                lines.append(f"--{name.replace('_', '-')} has no effect: nothing is kept.")
        return lines

    def resolved(self, num_layers: int, has_gpu: bool, width: int = ORIGINAL_WIDTH) -> tuple["Settings", list[str]]:
        """What depends on the method, the model and the machine, filled in.

        Args:
            num_layers: of the model's decoder.
            has_gpu: whether the run has a GPU that computes in float16.
            width: of the decoder.

        Returns:
            The settings without None but where it says something, and what the user should read of them.
        """
        lines, changes = [], {}
        batches = USUAL_BATCHES.get(self.method, OTHER_BATCHES)
        for name, usual in zip(("batch_size", "gradient_accumulation_steps"), batches, strict=True):
            changes[name] = getattr(self, name) or usual
        if self.layer_range is None:
            changes["layer_range"] = usual_layers(num_layers)
            if self.method in LORA:
                names = " and ".join(changes["layer_range"])
                lines.append(f"LoRA on layers {names} of {num_layers}; --layer_range chooses others.")
        if self.lora_rank is None:
            changes["lora_rank"] = usual_rank(width)
        rate = usual_rate(self.method, width)
        if self.lr is None:
            changes["lr"] = rate
        elif self.method == "ptuning" and self.lr < LOW_RATE * rate:
            lines.append(f"--lr {self.lr:g} is low for P-tuning, which may learn nothing; without --lr it is {rate:g}.")
        if self.precision == "float16" and not has_gpu:
            lines.append("--fp16 has no effect: a CPU trains in float32 (or --bf16).")
            changes["precision"] = "float32"
        if self.checkpoint_activations and self.method == "ptuning":
            lines.append("--checkpoint-activations has no effect: PEFT's prefixes need the activations.")
            changes["checkpoint_activations"] = False
        if isinstance(self.keep, int):
            changes["keep_checkpoints"] = self.keep
            lines.append(f"--keep {self.keep} is --keep-checkpoints {self.keep} today.")
        if self.keep is None or isinstance(self.keep, int):
            changes["keep"] = NONE if self.keep_data else SELF
        given = replace(self, keep=changes.get("keep", self.keep))  # and not what is filled in above
        return replace(self, **changes), [*lines, *given.unused()]


def usual_layers(num_layers: int) -> tuple[str, ...]:
    """Where the original puts its LoRA: the first layer and the middle one, 0 and 14 of its 28."""
    return tuple(dict.fromkeys(("0", str(num_layers // 2))))


def usual_rank(width: int) -> int:
    """The rank of LoRA on a decoder of some width, where none is given."""
    return round(between(USUAL_RANKS, width))


def usual_rate(method: str, width: int) -> float:
    """The learning rate of a method, where none is given, to two digits.

    Args:
        method: one of `METHODS`.
        width: of the decoder.
    """
    return float(f"{between(USUAL_RATES[method], width):.2g}")


def between(known: dict[int, float], width: int) -> float:
    """What to take at a width: as at the nearer of two that are known, or on the line of logarithms between them."""
    (wide, at_wide), (narrow, at_narrow) = known.items()
    place = (math.log(wide) - math.log(min(max(width, narrow), wide))) / (math.log(wide) - math.log(narrow))
    return at_wide * (at_narrow / at_wide) ** place


def in_todays_names(record: dict) -> dict:
    """What `settings.json` of an earlier version says of a run, as `Settings.as_json` says it.

    There was `english`, true, false or null, in the place of `prompt_language`, the option that it came from; and
    nothing was kept: `keep` was the number of checkpoints.
    """
    if isinstance(record.get("keep"), int):
        record = record | {"keep": NONE, "keep_checkpoints": record["keep"]}
    if "english" not in record:
        return record
    language = next((name for name, english in LANGUAGES.items() if english is record["english"]), None)
    return {name: value for name, value in record.items() if name != "english"} | {"prompt_language": language}
