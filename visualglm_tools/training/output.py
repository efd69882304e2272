"""The folder `--save` of a run: who may write there, what there is to resume from, and what is left of a run cut short.

    adapter/        the result: adapter_config.json, adapter_model.safetensors, base_model.json, manifest.json
    checkpoint-N/   states to resume from, each an adapter too; one without the file `complete` was cut short
    settings.json   what the run is: another one cannot be resumed from its checkpoints
    kept/           rows whose answers are kept, with these, and what the model predicts there without the adapter
    curves.png, report.json, runs/

A folder with neither an adapter nor a complete checkpoint of a run is free for the next one.

Not here: training (`run.py`).
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from visualglm_tools.printing import first_line
from visualglm_tools.training.settings import NONE, SELF, Settings, in_todays_names
from visualglm_tools.training.stopping import Stopped


ADAPTER = "adapter"
COMPLETE = "complete"
UNFINISHED = ".adapter.unfinished"
SETTINGS_FILE = "settings.json"
CURVES_FILE = "curves.png"
REPORT_FILE = "report.json"
EVENTS = "runs"  # TensorBoard's
KEPT = "kept"
# What may differ when a run is resumed: where and how, but not what is computed.
FREE_TO_CHANGE = {
    "resume",
    "save",
    "log_interval",
    "save_interval",
    "keep_checkpoints",
    "tensorboard",
    "num_workers",
    "answers",
}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it while this one writes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another run; wait for it or choose another --save.") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder} cannot be a folder: there is a file of that name. Choose another --save."
        ) from error


@contextmanager
def explained_stops(folder: Path) -> Iterator[None]:
    """Have a Ctrl-C say what is left of the run."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(describe_stop(folder), getattr(error, "number", signal.SIGINT)) from error


def describe_stop(folder: Path) -> str:
    saved = complete_checkpoints(folder)
    if saved:
        return f"stopped; {saved[-1]} is saved, and the same command with --resume goes on from there"
    return f"stopped before anything was saved; {folder} is free for the same command"


def check_free(folder: Path) -> None:
    """Raise a `ValueError` if something would be overwritten or mixed with the results."""
    found = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    if found:
        raise ValueError(
            f"{folder} is in use: it holds {', '.join(found[:4])}. Choose another --save, or go on with --resume."
        )


def check_no_input(folder: Path, files: Sequence[Path]) -> None:
    """Raise a `ValueError` if one of the files to be read would be removed with what an unsaved run has left."""
    inside = [file for file in files if file.resolve().is_relative_to(folder.resolve())]
    if inside and is_unsaved_run(folder):
        raise ValueError(
            f"{inside[0]} is left of a run in {folder} that ended before it had saved anything, and would be removed "
            "with it. Move it elsewhere first, or choose another --save."
        )


def remove_unsaved_run(folder: Path, say: Callable[[str], None]) -> None:
    """Remove what a run has left that ended before its first complete checkpoint: there is nothing to lose in it."""
    if not is_unsaved_run(folder):
        return
    incomplete = remove_incomplete(folder)
    (folder / CURVES_FILE).unlink(missing_ok=True)
    for name in (EVENTS, KEPT):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / SETTINGS_FILE).unlink()
    names = [SETTINGS_FILE, *(path.name for path in incomplete)]
    say(f"Removed {', '.join(names)} of a run in {folder} that ended before it had saved anything.")


def is_unsaved_run(folder: Path) -> bool:
    """Whether there is what a run has left that ended before it had saved anything."""
    is_saved = complete_checkpoints(folder) or (folder / ADAPTER).exists()
    return not is_saved and is_record(folder / SETTINGS_FILE)


def is_record(file: Path) -> bool:
    """Whether a file holds the settings of a run, and is no other program's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"method", "train_data", "train_iters"} <= content.keys()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to the end, oldest first."""
    return [path for path in all_checkpoints(folder) if (path / COMPLETE).is_file()]


def all_checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if step_of(path).isdigit()]
    return sorted(found, key=lambda path: int(step_of(path)))


def step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete what a run that was cut short has left half-written; returns what that was."""
    incomplete = [path for path in all_checkpoints(folder) if not (path / COMPLETE).is_file()]
    for path in [*incomplete, folder / UNFINISHED]:
        shutil.rmtree(path, ignore_errors=True)
    return incomplete


def as_begun(settings: Settings) -> Settings:
    """The settings of a resumed run: what is not said is as it was, whatever today's defaults are.

    Earlier versions had other rates and ranks, and kept no answers: `keep` was the number of checkpoints.
    """
    if not settings.resume:
        return settings
    try:
        before = json.loads((settings.save / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return settings  # `check_same_run` says so
    unsaid = [name for name in ("lr", "lora_rank") if getattr(settings, name) is None]
    settings = replace(settings, **{name: before.get(name) for name in unsaid})
    if settings.keep_data or settings.keep in (SELF, NONE) or not isinstance(before.get("keep"), int):
        return settings
    return replace(settings, keep=NONE, keep_checkpoints=settings.keep or settings.keep_checkpoints)


def check_same_run(folder: Path, record: dict) -> None:
    """Raise a `ValueError` if a resumed run would not be the one that was interrupted.

    Args:
        folder: of the interrupted run.
        record: what is known by now of the resumed one, as `SETTINGS_FILE` has it.
    """
    file = folder / SETTINGS_FILE
    try:
        before = in_todays_names(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, so nothing can be resumed: {error}") from error
    changed = [
        name for name in record if name in before and name not in FREE_TO_CHANGE and record[name] != before[name]
    ]
    if changed:
        told = ", ".join(f"{name} was {before[name]!r} and is {record[name]!r}" for name in changed)
        raise ValueError(
            f"--resume continues the same run, but {told}. Give the same options and data, or another --save."
        )


def remove_old(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all complete checkpoints but the last ones and the best; not before the new one is complete."""
    for checkpoint in complete_checkpoints(folder)[:-keep]:
        if step_of(checkpoint) != str(best_step):
            (checkpoint / COMPLETE).unlink()  # first, so that half of it is never taken for all
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def written(folder: Path, name: str) -> Iterator[None]:
    """Have an error of writing something into a run's folder say what that was, and what is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(describe_lost(folder, name, error)) from error


def describe_lost(folder: Path, name: str, error: Exception) -> str:
    left = complete_checkpoints(folder)
    remedy = f"Make room and go on from {left[-1].name} with --resume." if left else "Make room and begin again."
    return f"{name} could not be written: {first_line(error)}. {remedy}"
