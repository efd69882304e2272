"""Check a VisualGLM-6B checkpoint, the original's or a converted one, without trusting that it only looks right.

    visualglm check [FOLDER] [--generate] [--kernels]
    visualglm check FOLDER --copy-code
    visualglm check FOLDER --verify

Checks the configuration, the tokenizer against ids known from the real one, every weight's name, shape and values, and
with --generate that the model answers. With --kernels it also tells which way the model's work goes on this machine,
and why not a faster one. With --copy-code it first writes the model's code into the folder: where links to it could not
be made, or where the code is of an older version. With --verify it compares each file with the folder's manifest.json
and the code with that of this release instead, of any folder that convert, quantize, merge or finetune wrote, and loads
nothing. Exit code 0 if all is well, 1 if not, with what to do about it.
"""

from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.checkpoints.manifest import MANIFEST_FILE, renew_manifest, verify, write_manifest
from visualglm_tools.checkpoints.remote_code import copy_code
from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import argument, option
from visualglm_tools.printing import one_line
from visualglm_tools.shipped import DEFAULT_MODEL
from visualglm_tools.versions import OWN, version_of


# torch, transformers and what is built on them are imported in `run`: `-h` and typing errors shall not wait for them.


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = argument("the checkpoint", DEFAULT_MODEL, metavar="FOLDER")
    generate: bool = option("also load the model and let it describe a picture", False)
    copy_code: bool = option("first write this version's code into the folder, instead of links or older code", False)
    kernels: bool = option("also load the model and tell which kernels it uses", False)
    verify: bool = option("only compare files with manifest.json, and code with this release's", False)
    write_manifest: bool = option("first write manifest.json anew, of the files that are there now", False)

    def check(self) -> None:
        """Raise a `ValueError` for options that do not go together, or a folder that is none."""
        if not self.folder.is_dir():
            raise ValueError(f"{str(self.folder)!r} is no folder; give the folder with the checkpoint.")
        if self.verify and (self.generate or self.kernels):
            raise ValueError("--verify loads nothing: leave --generate and --kernels to a check of its own.")


def run(options: Options) -> int:
    """Tell the outcome of each check; returns the exit code."""
    options.check()
    prepare(options)
    if options.verify:
        return tell_verdict(options.folder)
    with heavy_imports():
        from visualglm_tools.checkpoints.checks import CHECKS, GENERATION, KERNELS, run_checks

    checks = (*CHECKS, *[GENERATION] * options.generate, *[KERNELS] * options.kernels)
    failed = 0
    for outcome in run_checks(options.folder, checks):
        print(f"{outcome.name:<17}{outcome.verdict:<9}{outcome.detail}", flush=True)
        failed += outcome.verdict == "FAILED"
    print(f"{failed} of {len(checks)} checks FAILED." if failed else f"All {len(checks)} checks passed.")
    return 1 if failed else 0


def prepare(options: Options) -> None:
    """Write into the folder what was asked for."""
    if options.copy_code:
        names = copy_code(options.folder)
        if not options.write_manifest:
            renew_manifest(options.folder, names)
        print(f"{len(names)} files of code written to {options.folder}", flush=True)
    if options.write_manifest:
        write_manifest(options.folder)
        print(f"{MANIFEST_FILE} written to {options.folder}", flush=True)


def tell_verdict(folder: Path) -> int:
    """Say whether a folder is what was written, by the release that is installed; returns the exit code."""
    verdict = verify(folder)
    for problem in verdict.problems:
        print(one_line(problem), flush=True)
    if verdict.problems:
        is_known = (folder / MANIFEST_FILE).exists()
        failed = f"FAILED: {folder} is not what was written, or not by this release."
        print(one_line(failed if is_known else f"UNKNOWN: nothing says what was written to {folder}."))
        return 1
    print(
        one_line(f"{verdict.num_files} files, {verdict.num_bytes:,} bytes, are as {OWN} {verdict.writer} wrote them.")
    )
    print(f"All code among them is that of this release, {version_of(OWN)}.")
    print(f"SHA-256 of {MANIFEST_FILE}, by which the folder is known: {verdict.sha256}")
    return 0
