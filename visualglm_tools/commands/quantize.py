"""Quantize a checkpoint to 4 or 8 bits on disk, shard by shard.

    visualglm quantize SRC DST --bits 4

SRC is a folder that `visualglm convert` made, or an original one. DST will be the same model with the decoder's linear
layers in low bits, ready to load with `trust_remote_code=True`; the full weights are never built. Each of SRC's weight
files becomes one of DST, so that one of them is in memory at a time. Everything is checked before anything is written,
and DST appears when it is complete or not at all.
"""

from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.commands.options import READY, target_argument, tokenizer_option
from visualglm_tools.options import argument, option


# torch, transformers and what is built on them are imported in `run`: `-h` and typing errors shall not wait for them.


@dataclass(frozen=True, kw_only=True)
class Options:
    source: Path = argument("folder with the full weights", metavar="SRC")
    target: Path = target_argument()
    bits: int = option("bits per weight", choices=(4, 8))
    group_size: int | None = option(
        "columns that share a scale, of 4 bits; -1: per row", None, metavar="N", unset="64 for 4 bits"
    )
    tokenizer: Path | None = tokenizer_option()


def run(options: Options) -> None:
    """Write DST; a `ValueError` says why it cannot be written."""
    from visualglm_tools.checkpoints.files import readable
    from visualglm_tools.checkpoints.quantizing import quantize_checkpoint

    with readable():
        quantize_checkpoint(options.source, options.target, options.bits, options.group_size, options.tokenizer)
    print(READY.format(options.target))
