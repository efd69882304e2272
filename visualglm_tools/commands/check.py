#!/usr/bin/env python
"""Check a VisualGLM-6B checkpoint, the original's or a converted one, without trusting that it only looks right.

    visualglm check FOLDER [--generate] [--kernels]

Checks the configuration, the tokenizer against ids known from the real one, every weight's name, shape and values, and
with --generate that the model answers. With --kernels it also tells which way the model's work goes on this machine,
and why not a faster one. Exit code 0 if all is well, 1 if not, with what to do about it.
"""

import argparse
import sys
from pathlib import Path


# torch, transformers and what is built on them are imported in `main`: `-h` and typing errors shall not wait for them.


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the checkpoint")
    parser.add_argument("--generate", action="store_true", help="also load the model and let it describe a picture")
    parser.add_argument("--kernels", action="store_true", help="also load the model and tell which kernels it uses")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is no folder")
    from visualglm_tools.checkpoints.checks import CHECKS, GENERATION, KERNELS, run_checks

    checks = (*CHECKS, *[GENERATION] * arguments.generate, *[KERNELS] * arguments.kernels)
    failed = 0
    for outcome in run_checks(arguments.folder, checks):
        print(f"{outcome.name:<17}{outcome.verdict:<9}{outcome.detail}", flush=True)
        failed += outcome.verdict == "FAILED"
    print(f"{failed} of {len(checks)} checks FAILED." if failed else f"All {len(checks)} checks passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
