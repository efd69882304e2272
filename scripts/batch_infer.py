"""Answer a file of questions about pictures: JSON Lines in, JSON Lines out.

    python scripts/batch_infer.py examples/example_inputs.jsonl answers.jsonl --model path/to/prepared
    accelerate launch --num_processes 2 scripts/batch_infer.py ...    # one process per GPU, the rows shared out

A row is `{"id": 1, "text": "描述一下这个场景", "image": "1.jpeg"}`; `image` may be missing or empty. A relative path is
looked up beside the file and in the working directory, and must be in one of them only. Each row comes out as it was,
with `answer` and `finish_reason` added. Given the same command again, a run that was stopped goes on where it was; rows
that cannot be answered are listed in OUTPUT.errors.jsonl.

This door parses options and draws the progress; the work is in `serving/batch.py`.
"""

import argparse
import math
import sys
from datetime import timedelta
from pathlib import Path

from command_line import COUNT, add_model_options, loading_options, number
from model_folder import check_folder


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
    parser.add_argument("input", type=Path, metavar="INPUT", help='rows of {"id", "text", "image"}')
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="where a run goes on if there are answers already")
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


def run(arguments: argparse.Namespace) -> int:
    """Answer what is not answered yet; returns the exit code, 1 if rows could not be answered."""
    from accelerate import PartialState
    from serving.batch import Output, Pictures, answer_rows, read_rows
    from serving.engine import Engine, Limits
    from serving.sampling import Settings
    from tqdm import tqdm
    from transformers.utils import logging

    logging.set_verbosity_error()
    rows, unread = read_rows(arguments.input)
    names = ("max_length", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    output = Output(arguments.output, rows)
    # accelerate's launcher says how many processes there are; without it, there is one.
    state = PartialState(cpu=arguments.device == "cpu", timeout=LONGEST_WAIT)
    if state.is_main_process:
        output.start(unread)
    state.wait_for_everyone()
    done = output.read()
    mine = [row for row in rows if row.key not in done][state.process_index :: state.num_processes]
    if mine:
        options = loading_options(arguments)
        if state.num_processes > 1 and options["device"] == "auto":
            options["device"] = str(state.device)
        limits = Limits(arguments.batch_size, max_waiting=len(rows), max_picture_bytes=sys.maxsize, timeout=math.inf)
        pictures = Pictures(arguments.input.parent, arguments.allow_urls)
        with (
            Engine.load(arguments.model, limits, **options) as engine,
            tqdm(total=len(mine), unit="row", disable=not state.is_main_process) as progress,
        ):
            outcomes = answer_rows(engine, mine, pictures, settings, arguments.seed)
            part = output.part(state.process_index, state.num_processes)
            part.write(outcomes, lambda row, problem: report(progress, problem))
    state.wait_for_everyone()
    if not state.is_main_process:
        return 0
    problems = output.finish()
    print(f"{len(rows) + len(unread) - len(problems)} of {len(rows) + len(unread)} rows are answered.", file=sys.stderr)
    if problems:
        print(f"The others are listed in {output.errors_path}.", file=sys.stderr)
    return int(bool(problems))


def report(progress, problem) -> None:
    """Draw the progress; a row's problem stays above it."""
    if problem is not None:
        progress.write(f"line {problem.number}: {problem.error}", file=sys.stderr)
    progress.update()


def check_paths(arguments: argparse.Namespace) -> None:
    folder = arguments.output.parent
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} for the output.")
    if arguments.output.is_dir() or arguments.output.resolve() == arguments.input.resolve():
        raise ValueError(f"the output {str(arguments.output)!r} must be another file than the input.")


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        check_paths(arguments)
        check_folder(arguments.model)
        return run(arguments)
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
