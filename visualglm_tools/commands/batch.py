"""Answer a file of questions about pictures: JSON Lines in, JSON Lines out.

    visualglm batch examples/example_inputs.jsonl answers.jsonl --model path/to/prepared
    cat questions.jsonl | visualglm batch - - > answers.jsonl
    accelerate launch --num_processes 2 -m visualglm_tools batch ...    # one process per GPU, the rows shared out

A row is `{"id": 1, "text": "描述一下这个场景", "image": "1.jpeg"}`; `image` may be missing or empty. A relative path is
looked up beside the file and in the working directory, and must be in one of them only. Each row comes out as it was,
with `answer` and `finish_reason` added. Given the same command again, a run that was stopped goes on where it was; rows
that cannot be answered are listed in OUTPUT.errors.jsonl.
"""

from dataclasses import dataclass

from visualglm_tools.serving import runs
from visualglm_tools.serving.options import FileOptions


@dataclass(frozen=True, kw_only=True)
class Options(FileOptions):
    """Those of a run, and no more."""


def run(options: Options) -> int:
    """Answer what is not answered yet; returns the exit code."""
    return runs.run(options)
