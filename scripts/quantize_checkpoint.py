#!/usr/bin/env python
"""Quantize a checkpoint to 4 or 8 bits on disk, shard by shard.

    python scripts/quantize_checkpoint.py SRC DST --bits 4

SRC is a folder that convert_checkpoint.py made, or an original one. DST will be the same model with the decoder's
linear layers in low bits, ready to load with `trust_remote_code=True`; the full weights are never built, but to be
calibrated. Each of SRC's weight files becomes one of DST, so that one of them is in memory at a time. Everything is
checked before anything is written, and DST appears when it is complete or not at all.
"""

import argparse
import sys
from pathlib import Path

from printing import report


# torch, transformers and what is built on them are imported in `main`: `-h` and typing errors shall not wait for them.


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="folder with the full weights")
    add("target", metavar="DST", type=Path, help="folder to write; must not exist, or be empty")
    add("--bits", type=int, choices=(4, 8), required=True, help="bits per weight")
    add("--group-size", metavar="N", type=int, help="columns that share a scale (4 bits; default 64; -1: per row)")
    add("--tokenizer", metavar="FOLDER_OR_FILE", type=Path, help="where ice_text.model is, if it is not in SRC")
    add(
        "--calibrate",
        metavar="FOLDER_OR_JSONL",
        type=Path,
        help="pictures, or rows of text and image as batch_infer.py reads them, to find better codes with (4 bits; 32 "
        "are enough; takes minutes and the memory of the full weights)",
    )
    add("--measure", action="store_true", help="hold out a quarter of these prompts, and say how large the error is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    from checkpoint_quantization import quantize_checkpoint
    from safetensors import SafetensorError

    try:
        quantize_checkpoint(
            arguments.source,
            arguments.target,
            arguments.bits,
            arguments.group_size,
            arguments.tokenizer,
            arguments.calibrate,
            arguments.measure,
        )
    except (ValueError, OSError, SafetensorError) as error:
        report(error)
        return 2
    print(f"{arguments.target} is ready: load it with trust_remote_code=True, check it with scripts/selftest.py.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
