#!/usr/bin/env python
"""Fold a trained adapter into the weights it was trained on.

    visualglm merge BASE ADAPTER DST

BASE is the checkpoint with full weights, an original or a prepared one, ADAPTER the folder that finetune_visualglm.py
or PEFT wrote: LoRA, or the prefix of P-tuning. DST will be a checkpoint of its own that loads without PEFT and can be
quantized with quantize_checkpoint.py. Weights that the adapter does not touch stay on the disk until they are copied.
Everything is checked before anything is written, and DST appears when it is complete or not at all.
"""

import argparse
import sys
from pathlib import Path

from visualglm_tools.printing import report


# torch, transformers and PEFT are imported in `main`: `-h` and typing errors shall not wait for them.


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", metavar="BASE", type=Path, help="folder with the full weights that the adapter was trained on")
    add("adapter", metavar="ADAPTER", type=Path, help="folder of the adapter")
    add("target", metavar="DST", type=Path, help="folder to write; must not exist, or be empty")
    add("--tokenizer", metavar="FOLDER_OR_FILE", type=Path, help="where ice_text.model is, if it is not in BASE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    from safetensors import SafetensorError

    from visualglm_tools.checkpoints.merging import merge

    try:
        merge(arguments.base, arguments.adapter, arguments.target, arguments.tokenizer)
    except (ValueError, OSError, SafetensorError) as error:
        report(error)
        return 2
    print(f"{arguments.target} is ready: load it with trust_remote_code=True, check it with visualglm check.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
