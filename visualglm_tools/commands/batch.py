"""Answer a file of questions about pictures: JSON Lines in, JSON Lines out.

    visualglm batch examples/example_inputs.jsonl answers.jsonl --model path/to/prepared
    cat questions.jsonl | visualglm batch - - > answers.jsonl
    accelerate launch --num_processes 2 -m visualglm_tools batch ...    # one process per GPU, the rows shared out

A row is `{"id": 1, "text": "描述一下这个场景", "image": "1.jpeg"}`; `image` may be missing or empty. A relative path is
looked up beside the file and in the working directory, and must be in one of them only. Each row comes out as it was,
with `answer` and `finish_reason` added. Given the same command again, a run that was stopped goes on where it was; rows
that cannot be answered are listed in OUTPUT.errors.jsonl.

This door parses options and draws the progress; the work is in `serving/batch.py`.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from visualglm_tools.checkpoints.folder import check_folder
from visualglm_tools.commands.options import COUNT, add_model_options, loading_options, number
from visualglm_tools.output_files import behind_links, is_stream, is_written_for, locked
from visualglm_tools.printing import one_line, report


# torch, transformers and the model are imported in `run`: `-h` and typing errors shall not wait for them.

PROBABILITY = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
AMOUNT = number(float, lambda value: 0 <= value < math.inf, "0 or more")
POSITIVE = number(float, lambda value: 0 < value < math.inf, "above 0")
COUNT_OR_NONE = number(int, lambda value: value >= 0, "a whole number, 0 or more")
LONGEST_WAIT = timedelta(days=30)  # of a process for the slowest one


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s INPUT OUTPUT [options]",
        description="Answer a file of questions about pictures: JSON Lines in, JSON Lines out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("input", type=path_or_standard, metavar="INPUT", help='rows of {"id", "text", "image"}; -: standard input')
    add(
        "output",
        type=path_or_standard,
        metavar="OUTPUT",
        help="where a run goes on if there are answers already; -: standard output",
    )
    add_model_options(parser)
    parser.add_argument("--batch-size", type=COUNT, default=8, metavar="N", help="rows answered at a time")
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from http(s) addresses")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--max-length", type=COUNT, default=2048, metavar="N", help="of question and answer in tokens")
    answers.add_argument("--max-new-tokens", type=COUNT, metavar="N", help="of an answer")
    answers.add_argument("--temperature", type=AMOUNT, default=0.8, metavar="T", help="0: always the likeliest token")
    answers.add_argument("--top-p", type=PROBABILITY, default=0.4, metavar="P")
    answers.add_argument("--top-k", type=COUNT_OR_NONE, default=100, metavar="K", help="0 for all tokens")
    answers.add_argument("--repetition-penalty", type=POSITIVE, default=1.2, metavar="R", help="1 for none")
    answers.add_argument("--seed", type=COUNT_OR_NONE, default=0, metavar="N", help="from which each row has its own")
    return parser


def path_or_standard(text: str) -> Path | None:
    """An argparse type: a path, or None for `-`, the standard stream."""
    return None if text == "-" else Path(text)


def run(arguments: argparse.Namespace) -> int:
    """Answer what is not answered yet; returns the exit code, 1 if rows could not be answered."""
    from accelerate import PartialState
    from transformers.utils import logging

    from visualglm_tools.serving.questions import open_output, read_rows

    logging.set_verbosity_error()
    rows, unread = read_rows(arguments.input)
    # accelerate's launcher says how many processes there are; without it, there is one.
    state = PartialState(cpu=arguments.device == "cpu", timeout=LONGEST_WAIT)
    with open_output(arguments.output, rows, len(unread)) as output:
        try:
            if state.is_main_process:
                start(output, unread)
            state.wait_for_everyone()
            answer(arguments, rows, output, state)
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


def answer(arguments: argparse.Namespace, rows: list, output, state) -> None:
    """Answer this process's share of the rows that have no answer yet."""
    from tqdm import tqdm

    from visualglm_tools.serving.engine.engine import Engine, EngineError, Limits
    from visualglm_tools.serving.engine.sampling import Settings
    from visualglm_tools.serving.questions import MAX_PICTURE_BYTES, Pictures, answer_rows

    names = ("max_length", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    done = output.read()
    mine = [row for row in rows if row.key not in done][state.process_index :: state.num_processes]
    if not mine:
        return
    options = loading_options(arguments)
    if state.num_processes > 1 and options["device"] == "auto":
        options["device"] = str(state.device)
    limits = Limits(arguments.batch_size, len(rows), max_picture_bytes=MAX_PICTURE_BYTES, timeout=math.inf)
    folder = arguments.input.parent if arguments.input else Path()
    try:
        with (
            Engine.load(arguments.model, limits, **options) as engine,
            tqdm(total=len(mine), unit="row", disable=not state.is_main_process) as progress,
        ):
            engine.start_decoders()
            pictures = Pictures(folder, arguments.allow_urls, engine.decode_picture)
            outcomes = answer_rows(engine, mine, pictures, settings, arguments.seed)
            part = output.part(state.process_index, state.num_processes)
            part.write(outcomes, lambda row, problem: draw(progress, problem))
    except EngineError as error:
        raise ValueError(f"{error} {output.how_to_go_on}") from error


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


def draw(progress, problem) -> None:
    """Draw the progress; a row's problem stays above it."""
    if problem is not None:
        progress.write(describe(problem), file=sys.stderr)
    progress.update()


def describe(problem) -> str:
    return f"line {problem.number}: {one_line(problem.error)}"


def say(line: str) -> None:
    print(line, file=sys.stderr)


def writes_stream(arguments: argparse.Namespace) -> bool:
    return arguments.output is None or is_stream(arguments.output)


def check_paths(arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for an input and an output that do not go together."""
    source, output = arguments.input, arguments.output
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        check_shared(arguments)
    if output is None:
        return
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {str(output.parent)!r} for the output.")
    if not is_stream(output) and source is not None and is_written_for(source, output):
        raise ValueError(f"the output {str(output)!r} must be another file than the input, and than those beside it.")


def check_shared(arguments: argparse.Namespace) -> None:
    if arguments.input is None or not arguments.input.is_file():
        raise ValueError("several processes cannot share what can be read only once. Give a file as the input.")
    if writes_stream(arguments):
        raise ValueError("several processes cannot write to one stream. Give a file as the output.")


def alone(arguments: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Nobody else may write the output meanwhile; of several processes the first sees to that."""
    if os.environ.get("RANK", "0") != "0" or writes_stream(arguments):
        return contextlib.nullcontext()
    return locked(behind_links(arguments.output))


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


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        check_paths(arguments)
        check_folder(arguments.model)
        # Standard output is for answers alone.
        with termination_as_interrupt(), alone(arguments), contextlib.redirect_stdout(sys.stderr):
            return run(arguments)
    except ValueError as error:
        report(error)
        return 2
    except OSError as error:  # the disk is full, nobody reads the output any more, ...
        where = str(error.filename or arguments.output or "standard output")
        report(f"{error.strerror or error}: {where!r}. When that is mended, give the same command again.")
        return 2
    except KeyboardInterrupt as interrupt:
        say("Stopped. Give the same command again to go on.")
        return exit_code(interrupt)


if __name__ == "__main__":
    sys.exit(main())
