"""Measure how fast VisualGLM runs here and how much memory it takes; the last line of the output is one JSON object.

    visualglm bench --geometry full --dtype bfloat16 --contexts 64 1024     # random weights, full size
    visualglm bench --model models/visualglm-6b --quant 4 --device cuda
    visualglm bench --variants bf16 int8 int4 --cache dynamic compiled --peer "llama.cpp=llama-bench …"
    visualglm bench --parts decode --contexts 64 256 512 1024 1536 1984 --batch 1 4 16      # growth
    visualglm bench --report docs/benchmarks.md docs/benchmarks/*.json

What is measured:

- load: building or loading the model, imports not counted. Random weights come into being in their final format.
- encode: pictures, pixel values to 32 soft prompt embeddings each.
- prefill: prompts of the given length in which a picture stands, without the encoding, up to the logits of the next
  token. Almost all of it is matrix products, 2 FLOP per weight and token; the limit is this machine's GEMM rate.
- decode: one more token per row at a given context, as a bare forward step and through `generate`. Every weight of the
  decoder is read once per step, and the cache of every row, so the limit of small batches is this machine's read
  bandwidth. The context is not computed before: its keys and values are random numbers, which cost the same to read.
  With --cache compiled or recorded (a CUDA graph), generate's step is measured alone, too.
- growth: from the decode steps, if there are four contexts or more.

Without --variants, the one configuration that the options describe is measured in this process. With it, each variant
(weights fp32, fp16, bf16, int8 or int4; -torch: without our kernels; =FOLDER: a checkpoint of its own) is measured in
a process of its own, and peers after them, in turns if there are several --rounds.

Limits are measured beside every variant. Figures are medians with the smallest and the largest sample beside them;
ratios to the original's code are taken pair by pair from alternating samples. Peak memory is that of the process
(Linux: VmHWM) or of CUDA's allocator. What does not fit into the memory or into --row-seconds is left out, with its
reason.

Not here: what is measured how, and the original's way of computing (`benchmarking/`); and whether answers are right
(the tests).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.benchmarking.settings import RunSettings
from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import option, part


# torch, transformers and the model are imported in `run`: `-h` and typing errors shall not wait for them.

TEMPLATE = Path("benchmarks", "page.md")  # beside the page that is written


@dataclass(frozen=True, kw_only=True)
class Options(RunSettings):
    report: tuple[Path, ...] = option(
        "write a page, the first file, of the runs in the others", (), metavar="FILE", group="instead of measuring"
    )


def run(options: Options) -> int:
    """Measure, or write a page; returns 1 where something could not be measured."""
    options.check()
    return write_report(options.report) if options.report else measure(part(options, RunSettings))


def write_report(files: tuple[Path, ...]) -> int:
    from visualglm_tools.benchmarking.report import write_page

    page, *runs = files
    write_page(page, page.parent / TEMPLATE, runs)
    print(f"{page} has {len(runs)} runs")
    return 0


def measure(settings: RunSettings) -> int:
    with heavy_imports():
        from visualglm_tools.benchmarking.report import render_run, write_run
        from visualglm_tools.benchmarking.run import make_report

    report = make_report(settings)
    if settings.save:
        write_run(report, settings.save)
    print(render_run(report))
    print(json.dumps(report, ensure_ascii=False))
    return 1 if report["failed"] else 0
