"""Fine-tune VisualGLM on your own pictures: LoRA, QLoRA or P-tuning, in one process or under `accelerate launch`.

    visualglm finetune --use_lora --model FOLDER --train-data dataset.json --save out
    visualglm finetune --use_lora --model FOLDER --train-data dataset.json --dry-run
    visualglm finetune --memory

The result is an adapter in `out/adapter`: `--adapter out/adapter` uses it in the other commands, and `visualglm merge`
folds it into the weights. All of the data is checked before the model is loaded. The options and defaults are those of
the original's scripts, in either spelling (`--train-iters`, `--train_iters`); those of theirs that have no meaning any
more are taken, and what replaces them is said.
"""

import importlib.util
import os
import signal
import sys
import warnings
from dataclasses import dataclass

from visualglm_tools.checkpoints.folder import check_folder, quieten_peft
from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import COUNT, describe_obsolete, obsolete, option, part
from visualglm_tools.printing import printable
from visualglm_tools.training.settings import HOW, WHAT, Settings


# torch, transformers and PEFT are imported in `run`: `-h` and typing errors shall not wait for them.

EXTRA = "train"


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The settings of a run, and what the command line has besides: options of the original's scripts, most of all."""

    dry_run: bool = option(
        "tell lengths, memory, steps and time from ten measured steps; leave nothing behind", False, **HOW
    )
    memory: bool = option("print the memory that training takes at full size, and end", False, **WHAT)
    skip_init: bool = obsolete("weights are never initialised before they are loaded", False)
    resume_dataloader: bool = obsolete("--resume continues with the same data", False)
    experiment_name: str | None = obsolete("results go to --save")
    split: str | None = obsolete("the rows to evaluate on are --valid-data")
    distributed_backend: str | None = obsolete("chosen by the launcher: NCCL on GPUs, Gloo on CPUs")
    zero_stage: str | None = obsolete("ZeRO is set in accelerate's DeepSpeed configuration, see docs/finetuning.md")
    local_rank: str | None = obsolete("read from the launcher's environment")
    mode: str = obsolete("training is all that is done here", "finetune", choices=("finetune",))
    model_parallel_size: int = obsolete("FSDP or DeepSpeed divide a model", 1, parse=COUNT)

    def check(self) -> None:
        if self.memory:
            if self.method is not None:
                raise ValueError("--memory trains nothing: leave it or --use_lora, --use_qlora and --use_ptuning out")
            return
        if self.model_parallel_size > 1:
            raise ValueError(
                f"--model-parallel-size {self.model_parallel_size}: a model is divided among GPUs by FSDP or "
                "DeepSpeed, see docs/finetuning.md"
            )
        super().check()
        if self.dry_run and self.resume:
            raise ValueError("--dry-run tries a run from its beginning: leave it or --resume out")


def say(line: str) -> None:
    """Tell the user, in one of a run's processes."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr, flush=True)


def carry_out(options: Options) -> None:
    """Print the table of memory, try a run, or train.

    Raises:
        ValueError: options or data with which nothing can be trained, or training that has failed.
    """
    options.check()
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard is not installed: pip install tensorboard")
    warnings.filterwarnings("ignore", category=FutureWarning)  # names of options that change within transformers 5
    quieten_peft()
    if options.memory:
        from visualglm_tools.training.memory import memory_table

        print(memory_table())
        return
    check_folder(options.model)
    for place in options.inputs:
        if not place.exists():
            raise ValueError(f"{place} cannot be read: No such file or directory.")
    for line in describe_obsolete(options):
        say(line)
    if options.dry_run:
        with heavy_imports():
            from visualglm_tools.training.rehearsal import rehearse

        rehearse(part(options, Settings), say)
        return
    with heavy_imports():
        from visualglm_tools.training.run import finetune

    finetune(part(options, Settings), say)


def run(options: Options) -> int:
    """Train; returns the exit code. Errors are told here: by one of the processes, and bad rows line by line."""
    try:
        carry_out(options)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        say(f"({str(stop) or 'stopped before anything was begun'})")
        return 128 + getattr(stop, "number", signal.SIGINT)  # as shells have it
    return 0
