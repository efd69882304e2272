"""Prepare a checkpoint of the original VisualGLM-6B for today's transformers, or bring one from or to SAT.

    visualglm convert SRC DST
    visualglm convert --from sat --tokenizer ice_text.model SRC DST
    visualglm convert --to sat SRC DST

SRC is the original folder: config.json, ice_text.model and the weights, .bin or .safetensors, sharded or not; or a
folder of SwissArmyTransformer (SAT): model_config.json, `latest` and mp_rank_00_model_states.pt in the folder of its
iteration. DST will be a folder that loads with `trust_remote_code=True`: our code, configuration, tokenizer, processor,
and the weights as safetensors, or, with --link, SRC's own weight files without a copy; with --to sat, a folder for SAT.
Everything is checked before anything is written, weights are written shard by shard, and DST appears when it is
complete or not at all.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.checkpoints.folder import check_new, check_source
from visualglm_tools.commands.options import READY, describe_command, target_argument, tokenizer_option
from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import argument, option
from visualglm_tools.printing import one_line


# torch, transformers and what is built on them are imported in `run`: `-h` and typing errors shall not wait for them.

SAT_VERSION = re.compile(r"0\.(\d+)(\.\d+)?")
SHARD_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]?B", re.IGNORECASE)
FORMATS = ("hf", "sat")


def shard_size(text: str) -> str:
    if not SHARD_SIZE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"a size is a number and KB, MB or GB, such as 5GB; found {text!r}")
    return text.upper()


def sat_version(text: str) -> str:
    if not (match := SAT_VERSION.fullmatch(text)):
        raise argparse.ArgumentTypeError(f"a version of SAT is 0.3 or 0.4, or in full such as 0.3.6; found {text!r}")
    return "0.3" if int(match[1]) < 4 else "0.4"


@dataclass(frozen=True, kw_only=True)
class Options:
    source: Path = argument("folder of the original checkpoint", metavar="SRC")
    target: Path = target_argument()
    tokenizer: Path | None = tokenizer_option()
    max_shard_size: str | None = option("of the safetensors files", None, parse=shard_size, metavar="SIZE", unset="5GB")
    link: bool = option("link SRC's weight files instead of writing new ones", False)
    origin: str | None = option("what SRC is", None, name="from", choices=FORMATS, unset="what it looks like")
    destination: str = option("what DST will be", "hf", name="to", choices=FORMATS)
    sat_version: str | None = option(
        "SAT's side: 0.3 (rows of query_key_value per head) or 0.4 (in blocks)",
        None,
        parse=sat_version,
        metavar="VERSION",
        unset="found out, or 0.4",
    )
    lora: str | None = option(
        "a LoRA in a SAT checkpoint becomes a PEFT adapter in DST/adapter, is merged, or is all of DST",
        None,
        choices=("adapter", "merge", "only"),
        unset="adapter",
    )


def describe_use(options: Options) -> str:
    """What DST is good for, in a sentence."""
    if options.destination == "sat":
        return f"{options.target} is ready: load it with SwissArmyTransformer."
    if options.lora == "only":
        return f"{options.target} is ready: load it with peft, on the weights that it was trained on."
    return READY.format(options.target)


def run(options: Options) -> None:
    """Write DST; a `ValueError` says why it cannot be written."""
    check_source(options.source, "a SAT checkpoint" if options.origin == "sat" else "the original checkpoint")
    check_new(options.target)
    with heavy_imports():
        from visualglm_tools.checkpoints.conversion import convert
        from visualglm_tools.checkpoints.files import readable

    with readable():
        notes = convert(
            options.source,
            options.target,
            options.tokenizer,
            options.max_shard_size,
            options.link,
            options.origin,
            options.destination,
            options.sat_version,
            options.lora,
            describe_command("convert", options),
        )
    for note in notes:
        print(one_line(note), file=sys.stderr)
    print(describe_use(options))
