"""Check a VisualGLM-6B checkpoint, the original's or a converted one, without trusting that it only looks right.

    visualglm check [FOLDER] [--generate] [--kernels]
    visualglm check FOLDER --copy-code

Checks the configuration, the tokenizer against ids known from the real one, every weight's name, shape and values, and
with --generate that the model answers. With --kernels it also tells which way the model's work goes on this machine,
and why not a faster one. With --copy-code it first writes the model's code into the folder: where links to it could not
be made, or where the code is of an older version. Exit code 0 if all is well, 1 if not, with what to do about it.
"""

from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.checkpoints.remote_code import copy_code
from visualglm_tools.options import argument, option
from visualglm_tools.shipped import DEFAULT_MODEL


# torch, transformers and what is built on them are imported in `run`: `-h` and typing errors shall not wait for them.


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = argument("the checkpoint", DEFAULT_MODEL, metavar="FOLDER")
    generate: bool = option("also load the model and let it describe a picture", False)
    copy_code: bool = option("first write this version's code into the folder, instead of links or older code", False)
    kernels: bool = option("also load the model and tell which kernels it uses", False)


def run(options: Options) -> int:
    """Tell the outcome of each check; returns the exit code."""
    if not options.folder.is_dir():
        raise ValueError(f"{str(options.folder)!r} is no folder; give the folder with the checkpoint.")
    if options.copy_code:
        print(f"{copy_code(options.folder)} files of code written to {options.folder}", flush=True)
    from visualglm_tools.checkpoints.checks import CHECKS, GENERATION, KERNELS, run_checks

    checks = (*CHECKS, *[GENERATION] * options.generate, *[KERNELS] * options.kernels)
    failed = 0
    for outcome in run_checks(options.folder, checks):
        print(f"{outcome.name:<17}{outcome.verdict:<9}{outcome.detail}", flush=True)
        failed += outcome.verdict == "FAILED"
    print(f"{failed} of {len(checks)} checks FAILED." if failed else f"All {len(checks)} checks passed.")
    return 1 if failed else 0
