#!/usr/bin/env python
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
from pathlib import Path

from visualglm_tools.printing import one_line, report


# torch, transformers and what is built on them are imported in `main`: `-h` and typing errors shall not wait for them.

SAT_VERSION = re.compile(r"0\.(\d+)(\.\d+)?")
SHARD_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]?B", re.IGNORECASE)


def shard_size(text: str) -> str:
    if not SHARD_SIZE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"a size is a number and KB, MB or GB, such as 5GB; found {text!r}")
    return text.upper()


def sat_version(text: str) -> str:
    if not (match := SAT_VERSION.fullmatch(text)):
        raise argparse.ArgumentTypeError(f"a version of SAT is 0.3 or 0.4, or in full such as 0.3.6; found {text!r}")
    return "0.3" if int(match[1]) < 4 else "0.4"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the original checkpoint")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER_OR_FILE", type=Path, help="where ice_text.model is, if it is not in SRC"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", type=shard_size, help="of the safetensors files; default: 5GB"
    )
    parser.add_argument("--link", action="store_true", help="link SRC's weight files instead of writing new ones")
    formats = {"choices": ("hf", "sat"), "metavar": "hf|sat"}
    parser.add_argument("--from", dest="origin", **formats, help="what SRC is; default: what it looks like")
    parser.add_argument("--to", dest="destination", **formats, default="hf", help="what DST will be; default: hf")
    parser.add_argument(
        "--sat-version",
        metavar="VERSION",
        type=sat_version,
        help="SAT's side: 0.3 (rows of query_key_value per head) or 0.4 (in blocks); default: found out, or 0.4",
    )
    parser.add_argument(
        "--lora",
        choices=("adapter", "merge", "only"),
        help="a LoRA in a SAT checkpoint becomes a PEFT adapter in DST/adapter (default), is merged, or is all of DST",
    )
    return parser.parse_args(argv)


def describe_use(arguments: argparse.Namespace) -> str:
    if arguments.destination == "sat":
        return "load it with SwissArmyTransformer."
    if arguments.lora == "only":
        return "load it with peft, on the weights that it was trained on."
    return "load it with trust_remote_code=True, check it with visualglm check."


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    from safetensors import SafetensorError

    from visualglm_tools.checkpoints.conversion import convert

    try:
        notes = convert(
            arguments.source,
            arguments.target,
            arguments.tokenizer,
            arguments.max_shard_size,
            arguments.link,
            arguments.origin,
            arguments.destination,
            arguments.sat_version,
            arguments.lora,
        )
    except (ValueError, OSError, SafetensorError) as error:
        report(error)
        return 2
    for note in notes:
        print(one_line(note), file=sys.stderr)
    print(f"{arguments.target} is ready: {describe_use(arguments)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
