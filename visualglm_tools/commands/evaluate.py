"""Ask an exam and judge the answers: accuracy by kind and language, and how sure it is.

    visualglm evaluate examples/exam.jsonl exam_answers.jsonl --model path/to/prepared
    visualglm evaluate examples/exam.jsonl exam_answers_int4.jsonl --quant 4 --against exam_answers.jsonl
    accelerate launch --num_processes 2 -m visualglm_tools evaluate ...    # one process per GPU, the rows shared out

A row is one of visualglm batch with the right answer, or a list of such:
`{"id": 1, "text": "图里有猫吗？", "image": "1.jpeg", "reference": "有", "kind": "presence"}`; POPE's files are read as
they are published. A caption's row has the picture's `"objects"` instead, and --objects their synonyms, as for CHAIR.
Answers are written as visualglm batch writes them: a run that was stopped goes on where it was, and where ANSWERS has
all of them, they are judged and no model is loaded. An exam is greedy and has no repetition penalty unless options say
otherwise. The table is Markdown on standard output.
"""

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.evaluation.scoring import MATCHES
from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import argument, option
from visualglm_tools.output_files import behind_links, is_same_file, is_stream, is_written_for, replace_file
from visualglm_tools.serving import runs
from visualglm_tools.serving.options import (
    FileOptions,
    limit_option,
    path_or_standard,
    penalty_option,
    temperature_option,
)


# What reads and judges imports the engine, and so torch: `-h` and typing errors shall not wait for it.

EXTRA = "train"  # has matplotlib


@dataclass(frozen=True, kw_only=True)
class Options(FileOptions):
    input: Path | None = argument(
        'rows of {"id", "text", "image", "reference"}, POPE\'s, or COCO\'s instances',
        parse=path_or_standard,
        metavar="QUESTIONS",
    )
    output: Path | None = argument(
        "where a run goes on if there are answers already", parse=path_or_standard, metavar="ANSWERS"
    )
    match: str = option(
        "how an answer is compared; auto: as a yes or a no where the reference is one, else exact",
        "auto",
        choices=MATCHES,
        group="judging",
    )
    objects: Path | None = option(
        "names of the objects that captions may invent, as CHAIR's synonyms.txt",
        None,
        metavar="FILE.txt",
        group="judging",
    )
    against: Path | None = option(
        "answers to the same questions with other settings, compared row by row",
        None,
        metavar="ANSWERS",
        group="judging",
    )
    report: Path | None = option("all figures, and how each row was judged", None, metavar="FILE.json", group="judging")
    chart: Path | None = option("the accuracies as a picture", None, metavar="FILE.png", group="judging")
    # An exam asks what the model knows. Sampling would add chance to it, and the penalty makes each token of the
    # question less likely in the answer: that of "red or blue?", too.
    max_new_tokens: int | None = limit_option(256)
    temperature: float = temperature_option(0)
    repetition_penalty: float = penalty_option(1)


def run(options: Options) -> int:
    """Ask what is not answered yet, and judge; returns the exit code, 1 if rows could not be answered.

    Raises:
        ValueError: the questions, the answers or the files to write cannot be used.
    """
    check_files(options)
    with heavy_imports():
        from visualglm_tools.evaluation.objects import read_vocabulary
        from visualglm_tools.evaluation.references import read_exam
        from visualglm_tools.evaluation.results import judge_all, read_answers

    vocabulary = read_vocabulary(options.objects) if options.objects else None
    questions = read_exam(options.input, options.match, vocabulary)
    others = read_others(options, questions)
    answers, code = read_answers(options.output, questions), 0
    is_complete, is_first = len(answers) == len(questions), os.environ.get("RANK", "0") == "0"
    if not is_complete:
        code = runs.run(options, lambda path: ([each.row for each in questions], []))
    if code > 1 or not is_first:  # it was stopped; or the first of several processes judges for all
        return code
    if is_complete:
        runs.say(f"All {len(answers)} rows were answered already: nothing is asked, no model is loaded.")
    answers = read_answers(options.output, questions)
    results, before = (judge_all(questions, each, options.match, vocabulary) for each in (answers, others))
    show(options, results, before if options.against else None)
    return code


def check_files(options: Options) -> None:
    """Raise a `ValueError` for files that do not go together, before anything is read."""
    if options.input is None or options.output is None or is_stream(options.output):
        raise ValueError("questions and answers are read more than once. Give plain files.")
    if options.output.suffix.lower() == ".parquet":
        raise ValueError("answers to an exam are JSON Lines. Give ANSWERS another ending.")
    runs.check_paths(options)
    written = [path for path in (options.report, options.chart) if path]
    for path in written:
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} for {path.name!r}.")
        behind_links(path)
    read = [options.input, *filter(None, (options.against, options.objects))]
    for number, path in enumerate(written):
        for other in (*read, *written[:number]):
            check_other(path, other)
    for path in (*written, *read[1:]):
        if is_written_for(path, options.output):
            raise ValueError(f"{str(path)!r} must be another file than the answers, and than those beside them.")
    if options.chart:
        check_chart(options.chart)


def check_other(path: Path, other: Path) -> None:
    if is_same_file(path, other):
        raise ValueError(f"{str(path)!r} would be written over {str(other)!r}. Give another name.")


def check_chart(path: Path) -> None:
    """What draws must be there before hours of answers, not behind them; its absence is told by `__main__`."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--chart must be the name of a .png file, found {str(path)!r}.")
    importlib.import_module("matplotlib")


def read_others(options: Options, questions: list) -> dict[str, dict]:
    """The answers with other settings; a `ValueError` if there are none to these questions."""
    from visualglm_tools.evaluation.results import read_answers

    if options.against is None:
        return {}
    if not options.against.is_file():
        raise ValueError(f"there is no file {str(options.against)!r} of answers to compare with.")
    others = read_answers(options.against, questions)
    if not others:
        raise ValueError(f"{str(options.against)!r} has no answers to these questions.")
    return others


def show(options: Options, results: list, others: list | None) -> None:
    """Write what was asked for, and print the tables: their reader may have enough of them before the end."""
    from visualglm_tools.evaluation.results import as_report, compare_all, tally_all
    from visualglm_tools.evaluation.tables import write_comparison, write_results

    groups = tally_all(results)
    tables = [write_results(groups), *([write_comparison(compare_all(results, others))] if others else [])]
    if options.report:
        files = {"questions": options.input, "answers": options.output, "against": options.against}
        head = {name: str(path) for name, path in files.items() if path} | {"match": options.match}
        content = head | as_report(results, others)
        replace_file(behind_links(options.report), [json.dumps(content, indent=2, ensure_ascii=False) + "\n"])
    if options.chart:
        from visualglm_tools.evaluation.chart import draw_results

        draw_results(groups, options.chart)
    print("\n".join(tables), end="", flush=True)
