"""Fold a trained adapter into the weights it was trained on.

    visualglm merge BASE ADAPTER DST

BASE is the checkpoint with full weights, an original or a prepared one, ADAPTER the folder that `visualglm finetune` or
PEFT wrote: LoRA, or the prefix of P-tuning. DST will be a checkpoint of its own that loads without PEFT and can be
quantized with `visualglm quantize`. Weights that the adapter does not touch stay on the disk until they are copied.
Everything is checked before anything is written, and DST appears when it is complete or not at all.
"""

from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.checkpoints.folder import check_new, check_source, read_adapter_config
from visualglm_tools.commands.options import READY, describe_command, target_argument, tokenizer_option
from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import argument


# torch, transformers and PEFT are imported in `run`: `-h` and typing errors shall not wait for them.

EXTRA = "train"


@dataclass(frozen=True, kw_only=True)
class Options:
    base: Path = argument("folder with the full weights that the adapter was trained on", metavar="BASE")
    adapter: Path = argument("folder of the adapter", metavar="ADAPTER")
    target: Path = target_argument()
    tokenizer: Path | None = tokenizer_option("BASE")


def run(options: Options) -> None:
    """Write DST; a `ValueError` says why it cannot be written."""
    check_source(options.base, "the original checkpoint")
    read_adapter_config(options.adapter)
    check_new(options.target)
    with heavy_imports():
        from visualglm_tools.checkpoints.files import readable
        from visualglm_tools.checkpoints.merging import merge

    with readable():
        merge(options.base, options.adapter, options.target, options.tokenizer, describe_command("merge", options))
    print(READY.format(options.target))
