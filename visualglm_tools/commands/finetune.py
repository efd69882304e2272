#!/usr/bin/env python
"""Fine-tune VisualGLM on your own pictures: LoRA, QLoRA or P-tuning, in one process or under `accelerate launch`.

    visualglm finetune --use_lora --model FOLDER --train-data dataset.json --save out
    visualglm finetune --memory

The result is an adapter in `out/adapter`: `--adapter out/adapter` uses it in the other doors, and `merge_lora.py` folds
it into the weights. All of the data is checked before the model is loaded. The options and defaults are those of the
original's scripts, in either spelling (`--train-iters`, `--train_iters`).
"""

import argparse
import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from visualglm_tools.checkpoints.folder import check_folder
from visualglm_tools.commands.options import COUNT, DEFAULT_MODEL, number
from visualglm_tools.printing import printable


# torch, transformers and PEFT are imported in `run`: `-h` and typing errors shall not wait for them.

QLORA_DEFAULTS = {"batch_size": 1, "gradient_accumulation_steps": 4}  # of the original's QLoRA script

# Options that some methods have no use for. The original's scripts give theirs with every method.
LORA = ("lora", "qlora")
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

# Options of the original's scripts that have no meaning here any more, and what takes their place.
OBSOLETE_FLAGS = {
    "--skip-init": "weights are never initialised before they are loaded",
    "--resume-dataloader": "--resume continues with the same data",
}
OBSOLETE_VALUES = {
    "--experiment-name": "results go to --save",
    "--split": "the rows to evaluate on are --valid-data",
    "--distributed-backend": "chosen by the launcher: NCCL on GPUs, Gloo on CPUs",
    "--zero-stage": "ZeRO is set in accelerate's DeepSpeed configuration, see docs/finetuning.md",
    "--local_rank": "read from the launcher's environment",
}


COUNT_OR_NONE = number(int, lambda value: value >= 0, "a whole number, 0 or more")
RATE = number(float, lambda value: 0 < value < float("inf"), "above 0")
SHARE = number(float, lambda value: 0 <= value < 1, "from 0 to below 1")
WEIGHT = number(float, lambda value: 0 <= value < float("inf"), "0 or more")


class Obsolete(argparse.Action):
    """Takes an option that has no meaning any more, and remembers to say so."""

    def __init__(self, *args, reason: str, **kwargs):
        super().__init__(*args, help=argparse.SUPPRESS, **kwargs)
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.obsolete = [*getattr(namespace, "obsolete", []), f"{option_string} has no effect: {self.reason}."]


def adder(target):
    """`add_argument` that also takes an option with the other of `-` and `_`."""

    def add(*names: str, **kwargs):
        inner = [(name[2:].replace("-", "_"), name[2:].replace("_", "-")) for name in names]
        both = [f"--{spelling}" for name, pair in zip(names, inner, strict=True) for spelling in (name[2:], *pair)]
        return target.add_argument(*dict.fromkeys(both), **kwargs)

    return add


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s (--use_lora | --use_qlora | --use_ptuning) --train-data FILE [options]",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    add = adder(parser)
    add_what(add, parser)
    add_data(add)
    add_training(add)
    add_output(add)
    for name, reason in OBSOLETE_FLAGS.items():
        add(name, action=Obsolete, nargs=0, reason=reason)
    for name, reason in OBSOLETE_VALUES.items():
        add(name, action=Obsolete, reason=reason)
    add("--mode", choices=("finetune",), default="finetune", help=argparse.SUPPRESS)
    add("--model-parallel-size", type=COUNT, default=1, help=argparse.SUPPRESS)
    return parser


def add_what(add: Callable, parser: argparse.ArgumentParser) -> None:
    method = adder(parser.add_mutually_exclusive_group())
    for name, text in {
        "lora": "train low-rank additions to the attention of --layer_range",
        "qlora": "the same on a decoder of 4 bits (or --bits 8)",
        "ptuning": "train --pre_seq_len keys and values before the prompt, in each layer",
    }.items():
        method(f"--use_{name}", dest="method", action="store_const", const=name, help=text)
    method("--memory", action="store_true", help="print the memory that training takes at full size, and end")
    add(
        "--model",
        "--from_pretrained",
        type=Path,
        default=DEFAULT_MODEL,
        metavar="FOLDER",
        help="checkpoint to train on",
    )
    add("--lora_rank", type=int, default=10, metavar="R", help="(default: %(default)s)")
    add(
        "--lora_alpha", type=RATE, default=1.0, metavar="A", help="additions are scaled by A / R (default: %(default)s)"
    )
    add("--lora_dropout", type=SHARE, default=0.0, metavar="P", help="(default: %(default)s)")
    add(
        "--layer_range",
        nargs="+",
        metavar="N",
        help="indices of the decoder's layers, no range; or 'all' (default: the first and the middle one, 0 14 of 28)",
    )
    add("--train_qformer", action="store_true", help="LoRA on the Q-Former too")
    add("--train_projection", action="store_true", help="LoRA on the projection to the decoder too")
    add("--bits", type=int, choices=(4, 8), help="of --use_qlora (default: 4)")
    add(
        "--qlora_backend",
        choices=("lowbit", "nf4"),
        default="lowbit",
        help="this package's linear layers, or those of bitsandbytes (default: %(default)s)",
    )
    add("--pre_seq_len", type=int, default=4, metavar="N", help="of --use_ptuning (default: %(default)s)")


def add_data(add: Callable) -> None:
    add("--train-data", nargs="+", type=Path, metavar="FILE", help=".json or .jsonl; see docs/finetuning.md")
    add("--valid-data", nargs="+", type=Path, default=[], metavar="FILE", help="rows to evaluate on")
    add("--old-data", nargs="+", type=Path, default=[], metavar="FILE", help="rows to see what is forgotten")
    add("--max_source_length", type=COUNT, default=64, metavar="N", help="tokens with pictures (default: %(default)s)")
    add("--max_target_length", type=COUNT, default=256, metavar="N", help="tokens of an answer (default: %(default)s)")
    add("--strict", action="store_true", help="fail if anything is too long, instead of cutting its end")
    add(
        "--prompt_language",
        choices=("auto", "zh", "en"),
        default="auto",
        help="prompt with 问：/答：, or Q:/A:; auto: by the question's language, as chat() does (the original: zh)",
    )


def add_training(add: Callable) -> None:
    add("--train-iters", type=COUNT, default=300, metavar="N", help="steps of the optimizer (default: %(default)s)")
    add("--lr", type=RATE, default=1e-4, metavar="RATE", help="(default: %(default)s)")
    add("--lr-decay-style", choices=("constant", "linear", "cosine"), default="cosine", help="(default: %(default)s)")
    add("--warmup", type=SHARE, default=0.02, metavar="SHARE", help="of the steps (default: %(default)s)")
    add("--weight-decay", type=WEIGHT, default=0.01, metavar="W", help="(default: %(default)s)")
    add("--clip-grad", type=WEIGHT, default=1.0, metavar="NORM", help="(default: %(default)s)")
    add("--batch-size", type=COUNT, metavar="N", help="per process (default: 4; QLoRA 1)")
    add("--gradient-accumulation-steps", type=COUNT, metavar="N", help="batches per step (default: 1; QLoRA 4)")
    add("--checkpoint-activations", "--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--fp16", action="store_true", help="float16, on a GPU")
    add("--bf16", action="store_true", help="bfloat16")
    add("--cpu", action="store_true", help="even if there is a GPU")
    add("--seed", type=COUNT_OR_NONE, default=1234, metavar="N", help="(default: %(default)s)")
    add("--num-workers", type=COUNT_OR_NONE, default=0, metavar="N", help="processes that open pictures")


def add_output(add: Callable) -> None:
    add("--save", type=Path, default=Path("checkpoints"), metavar="FOLDER", help="results (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last complete checkpoint in --save")
    add("--save-interval", type=COUNT, default=300, metavar="N", help="steps (default: %(default)s)")
    add(
        "--eval-interval",
        type=COUNT,
        default=10000,
        metavar="N",
        help="steps; more than the run has: ten times in it (default: %(default)s)",
    )
    add("--eval-iters", type=COUNT, metavar="N", help="batches to evaluate on (default: all)")
    add("--eval-batch-size", type=COUNT, default=8, metavar="N", help="(default: %(default)s)")
    add("--log-interval", type=COUNT, default=10, metavar="N", help="steps (default: %(default)s)")
    add("--keep", type=COUNT, default=3, metavar="N", help="checkpoints (default: %(default)s)")
    add(
        "--answers",
        type=COUNT_OR_NONE,
        default=100,
        metavar="N",
        help="rows to count right answers on, before and after",
    )
    add("--tensorboard", action="store_true", help="write events into --save/runs")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a usage error where options contradict each other."""
    if arguments.memory:
        return
    if arguments.method is None:
        parser.error("choose what to train: --use_lora, --use_qlora or --use_ptuning")
    if not arguments.train_data:
        parser.error("--train-data is missing: the file with the rows to train on")
    if arguments.fp16 and arguments.bf16:
        parser.error("--fp16 and --bf16 exclude each other")
    if arguments.model_parallel_size > 1:
        parser.error(
            f"--model-parallel-size {arguments.model_parallel_size}: a model is divided among GPUs by FSDP or "
            "DeepSpeed, see docs/finetuning.md"
        )
    for line in of_other_methods(arguments, METHODS_WITH):
        parser.error(line)


def of_other_methods(arguments: argparse.Namespace, methods_with: dict[str, tuple[str, ...]]) -> list[str]:
    """What to say of each option that was given, and that the chosen method has no use for."""
    return [
        f"--{name} belongs to --use_{' and --use_'.join(methods)}"
        for name, methods in methods_with.items()
        if arguments.method not in methods and is_given(arguments, name)
    ]


def is_given(arguments: argparse.Namespace, name: str) -> bool:
    return getattr(arguments, name) != build_parser().get_default(name)


def describe_unused(arguments: argparse.Namespace) -> list[str]:
    """What to say of options that change nothing in this run."""
    unused = [f"{line}, and has no effect." for line in of_other_methods(arguments, ORIGINAL_METHODS_WITH)]
    for name in ONLY_WITH_VALID_DATA:
        if is_given(arguments, name) and not arguments.valid_data:
            unused.append(f"--{name.replace('_', '-')} has no effect: there is no --valid-data.")
    return unused


def read_settings(arguments: argparse.Namespace, say: Callable[[str], None]):
    """The run's settings; where an option cannot be honoured on this machine, that is said."""
    import torch

    from visualglm_hf.configuration_visualglm import VisualGLMConfig
    from visualglm_tools.training.adapters import usual_layers
    from visualglm_tools.training.run import Settings

    values = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__}
    usual = QLORA_DEFAULTS if arguments.method == "qlora" else {"batch_size": 4, "gradient_accumulation_steps": 1}
    values.update({name: usual[name] for name in usual if values[name] is None})
    values.update({name: tuple(value) for name, value in values.items() if isinstance(value, list)})
    if arguments.layer_range is None:
        num_layers = VisualGLMConfig.from_pretrained(arguments.model).text_config.num_hidden_layers
        values["layer_range"] = usual_layers(num_layers)
        if arguments.method in LORA:
            say(f"LoRA on layers {' and '.join(values['layer_range'])} of {num_layers}; --layer_range chooses others.")
    values["english"] = {"auto": None, "zh": False, "en": True}[arguments.prompt_language]
    values["precision"] = "float16" if arguments.fp16 else "bfloat16" if arguments.bf16 else "float32"
    if arguments.fp16 and (arguments.cpu or not torch.cuda.is_available()):
        say("--fp16 has no effect: a CPU trains in float32 (or --bf16).")
        values["precision"] = "float32"
    if arguments.checkpoint_activations and arguments.method == "ptuning":
        say("--checkpoint-activations has no effect: PEFT's prefixes need the activations.")
        values["checkpoint_activations"] = False
    for line in describe_unused(arguments):
        say(line)
    return Settings(**values)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    if is_main_process():
        print(printable(line), file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> None:
    needed = {"peft": "-e '.[train]'", "matplotlib": "-e '.[train]'"}
    needed |= {"tensorboard": "tensorboard"} if arguments.tensorboard else {}
    for package, remedy in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install {remedy}")
    warnings.filterwarnings("ignore", category=FutureWarning)  # names of options that change within transformers 5
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that it lacks optional kernels
    if arguments.memory:
        from visualglm_tools.training.memory import memory_table

        print(memory_table())
        return
    check_folder(arguments.model)
    from visualglm_tools.training.run import finetune

    for line in getattr(arguments, "obsolete", []):
        say(line)
    finetune(read_settings(arguments, say), say)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        say(f"({str(stop) or 'stopped before anything was begun'})")
        return 128 + getattr(stop, "number", signal.SIGINT)  # as shells have it
    return 0


if __name__ == "__main__":
    sys.exit(main())
