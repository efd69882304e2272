"""A run over a file of questions, as a command does it: one at a time, alone or under a launcher, stopped and gone on.

Here locks are taken, processes meet, and progress is drawn on standard error. Not here: what becomes of each question
(`questions.py`), and what is made of the answers (the commands).
"""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

from visualglm_tools.imports import heavy_imports
from visualglm_tools.output_files import behind_links, is_stream, is_written_for, locked
from visualglm_tools.printing import one_line
from visualglm_tools.serving.options import FileOptions
from visualglm_tools.tables import is_parquet, is_saved_table


# torch, transformers and the model are imported in `answer_file`: `-h` and typing errors shall not wait for them.

# As tqdm's own, and what a row's tokens come to.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_noinv_fmt}{postfix}]"
MAGIC_BYTES = 12
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # as their files begin
LONGEST_WAIT = timedelta(days=30)  # of a process for the slowest one


def run(options: FileOptions, read: Callable | None = None) -> int:
    """Answer what is not answered yet; returns the exit code, 1 if rows could not be answered.

    Args:
        options: of the command.
        read: gives the rows of the input and the problems with its other lines; by default as they stand there.

    Raises:
        ValueError: the input, the output or the model cannot be used; with how to go on where answers are kept.
    """
    try:
        check_paths(options)
        options.check()
        options.check_looking()
        # Standard output is for answers alone.
        with termination_as_interrupt(), alone(options), contextlib.redirect_stdout(sys.stderr):
            return answer_file(options, read)
    except OSError as error:  # the disk is full, nobody reads the output any more, ...
        where = str(error.filename or options.output or "standard output")
        raise ValueError(
            f"{error.strerror or error}: {where!r}. When that is mended, give the same command again."
        ) from error
    except KeyboardInterrupt as interrupt:
        say("Stopped. Give the same command again to go on.")
        return exit_code(interrupt)


def answer_file(options: FileOptions, read: Callable | None = None) -> int:
    """Answer what is not answered yet, alone or as one of several processes; returns the exit code."""
    with heavy_imports():
        from accelerate import PartialState
        from transformers.utils import logging

        from visualglm_tools.serving.questions import read_rows
        from visualglm_tools.serving.table_output import open_output

    logging.set_verbosity_error()
    rows, unread = (read or read_rows)(options.input)
    # accelerate's launcher says how many processes there are; without it, there is one.
    state = PartialState(cpu=options.device == "cpu", timeout=LONGEST_WAIT)
    with open_output(options.output, rows, len(unread), options.input) as output:
        try:
            if state.is_main_process:
                start(output, unread)
            state.wait_for_everyone()
            answer(options, rows, output, state)
            state.wait_for_everyone()
            return finish(output, len(rows) + len(unread)) if state.is_main_process else 0
        except KeyboardInterrupt as interrupt:
            if state.is_main_process:
                say(f"Stopped: {output.count()} of {len(rows) + len(unread)} rows are answered. {output.how_to_go_on}")
            return exit_code(interrupt)


def start(output, unread: list) -> None:
    """Take over what an earlier run has left, and say what is wrong with the input."""
    outdated = output.start(unread)
    if outdated:
        say(f"{outdated} rows have changed since they were answered; they are asked again.")
    for problem in unread:
        say(describe(problem))


def answer(options: FileOptions, rows: list, output, state) -> None:
    """Answer this process's share of the rows that have no answer yet."""
    from visualglm_tools.serving.engine.engine import Engine, EngineError, Limits
    from visualglm_tools.serving.questions import MAX_PICTURE_BYTES, SORTED, Pictures, answer_rows, by_length

    done = output.read()
    waiting = [row for row in rows if row.key not in done]
    mine = waiting[state.process_index :: state.num_processes]
    if not mine:
        return
    if state.is_main_process:
        tell_unlooked(options, waiting)
    loading = options.loading()
    if state.num_processes > 1 and loading["device"] == "auto":
        loading["device"] = str(state.device)
    limits = Limits(options.batch_size, len(rows), max_picture_bytes=MAX_PICTURE_BYTES, timeout=math.inf)
    folder = options.input.parent if options.input else Path()
    try:
        with (
            Engine.load(options.model, limits, **loading) as engine,
            progress_of(len(mine), is_shown=state.is_main_process) as progress,
        ):
            engine.start_decoders()
            asking = asking_of(options)
            pictures = Pictures(folder, options.allow_urls, partial(engine.decode_picture, **asking.looking))
            part = output.part(state.process_index, state.num_processes)
            # What can be put in order afterwards is answered in the order that is quickest.
            in_turn = by_length(mine, SORTED * options.batch_size) if part.is_ordered_at_the_end else mine
            part.write(answer_rows(engine, in_turn, pictures, asking), partial(draw, progress))
    except EngineError as error:
        raise ValueError(f"{error} {output.how_to_go_on}") from error


def tell_unlooked(options: FileOptions, rows: list) -> None:
    """Say how many of the rows have no picture to look at in the way that was asked for."""
    switches, without = options.looking_switches(), sum(not row.content.get("image") for row in rows)
    if switches and without:
        say(f"{without} of {len(rows)} rows have no picture: {' and '.join(switches)} cannot change their answers.")


def finish(output, total: int) -> int:
    """Put the output together and say what is in it; returns the exit code."""
    problems = output.finish()
    answered = output.count()
    say(f"{answered} of {total} rows are answered.")
    if problems:
        say(f"The others are listed in {output.errors_path}." if output.errors_path else "The others are named above.")
    missing = total - answered - problems
    if missing > 0:
        say(f"{missing} answers were taken out of the output while it was written. {output.how_to_go_on}")
    return int(answered < total)


def asking_of(options: FileOptions):
    """How the rows are asked, as `questions.Asking`."""
    from visualglm_tools.serving.engine.sampling import Settings
    from visualglm_tools.serving.questions import Asking

    names = ("max_length", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    settings = Settings(**{name: getattr(options, name) for name in names})
    return Asking(settings, options.seed, options.looking(), options.system)


def progress_of(total: int, is_shown: bool):
    """A bar of rows: how many there are, rows and tokens per second, and the time that is left."""
    from tqdm import tqdm

    progress = tqdm(total=total, unit=" rows", disable=not is_shown, bar_format=BAR)
    progress.tokens = 0
    return progress


def draw(progress, result) -> None:
    """Draw the progress; a row's problem stays above it."""
    from visualglm_tools.serving.questions import Problem

    if isinstance(result, Problem):
        progress.write(describe(result), file=sys.stderr)
    else:
        progress.tokens += result.completion_tokens
        seconds = progress.format_dict["elapsed"]
        progress.set_postfix_str(f"{progress.tokens / seconds:.1f} tokens/s" if seconds else "", refresh=False)
    progress.update()


def describe(problem) -> str:
    return f"line {problem.number}: {one_line(problem.error)}"


def say(line: str) -> None:
    print(line, file=sys.stderr)


def writes_stream(options: FileOptions) -> bool:
    return options.output is None or is_stream(options.output)


def check_paths(options: FileOptions) -> None:
    """Raise a `ValueError` for an input and an output that do not go together."""
    source, output = options.input, options.output
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        check_shared(options)
    if source is not None:
        check_source(source)
    if output is None:
        return
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {str(output.parent)!r} for the output.")
    if not is_stream(output) and source is not None and is_written_for(source, output):
        raise ValueError(f"the output {str(output)!r} must be another file than the input, and than those beside it.")


def check_source(source: Path) -> None:
    """Raise a `ValueError` for an input that cannot be one of rows, before any library is waited for."""
    if not source.exists():
        raise ValueError(f"cannot read {str(source)!r}: No such file or directory")
    if is_saved_table(source) or is_parquet(source):
        return
    if source.is_dir():
        raise ValueError(f"{str(source)!r} is a folder. Give a file with one JSON object in each line, or a table.")
    if source.is_file():  # what is no plain file could not be read again
        with open(source, "rb") as file:
            beginning = file.read(MAGIC_BYTES)
        if beginning.startswith(PICTURES):
            raise ValueError(
                f"{str(source)!r} is a picture. Give a file with one JSON object in each line, which names it as "
                '"image"; visualglm chat --image asks about one.'
            )


def check_shared(options: FileOptions) -> None:
    if options.input is None or not options.input.is_file():
        raise ValueError("several processes cannot share what can be read only once. Give a file as the input.")
    if writes_stream(options):
        raise ValueError("several processes cannot write to one stream. Give a file as the output.")


def alone(options: FileOptions) -> contextlib.AbstractContextManager:
    """Nobody else may write the output meanwhile; of several processes the first sees to that."""
    if os.environ.get("RANK", "0") != "0" or writes_stream(options):
        return contextlib.nullcontext()
    return locked(behind_links(options.output))


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM be a `KeyboardInterrupt` that carries its number."""

    def interrupt(number: int, frame) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As shells say it."""
    return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
