#!/usr/bin/env python
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

Not here: the original's way of computing (`original_formulation.py`), what is measured how (`benchmarking/`), and
whether answers are right (the tests).
"""

import argparse
import json
import sys
from pathlib import Path

from visualglm_tools.commands.options import COUNT, number


# torch, transformers and the model are imported in `main`: `-h` and typing errors shall not wait for them.

DTYPES = ("float32", "float16", "bfloat16")
GEOMETRIES = ("full", "tiny")
PARTS = ("load", "encode", "prefill", "decode")
CACHES = ("dynamic", "static", "compiled", "recorded")
TEMPLATE = Path("benchmarks", "page.md")  # beside the page that is written
POSITIVE = number(float, lambda value: 0 < value < float("inf"), "above 0")


def turn_options() -> argparse.ArgumentParser:
    """The options of a run with several subjects, which its children must not see."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    turns = parser.add_argument_group("several in one run")
    turns.add_argument("--variants", nargs="+", metavar="WEIGHTS", default=[], help="such as bf16 int8 int4 int4-torch")
    turns.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="prints llama-bench's JSON")
    turns.add_argument("--rounds", type=COUNT, default=1, help="how often each has its turn (1)")
    turns.add_argument("--save", type=Path, metavar="FILE", help="write the report there, too")
    return parser


def yardstick_options() -> argparse.ArgumentParser:
    """The options that compare with the original's code, for the first variant alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    yardsticks = parser.add_argument_group("beside the original")
    yardsticks.add_argument("--against", choices=("formulation",), help="the original's way on the same weights")
    yardsticks.add_argument("--reference", type=Path, metavar="PATH", help="the folder of the original's code")
    yardsticks.add_argument("--reference-python", default=sys.executable, help="the interpreter that can import it")
    yardsticks.add_argument("--layers", type=COUNT, default=4, help="blocks compared with --reference (4)")
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[turn_options(), yardstick_options()],
    )
    subject = parser.add_argument_group("what is measured")
    subject.add_argument("--geometry", choices=GEOMETRIES, default="full", help="random weights of this size (full)")
    subject.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint instead of random weights")
    subject.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (bfloat16)")
    subject.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …, auto (cpu)")
    subject.add_argument("--quant", type=int, choices=(4, 8), help="quantize the decoder to that many bits")
    subject.add_argument("--attn", choices=("sdpa", "eager"), default="sdpa", help="attention implementation (sdpa)")
    subject.add_argument("--cache", nargs="+", choices=CACHES, default=["dynamic"], help="in `generate` (dynamic)")
    how = parser.add_argument_group("how")
    how.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all; the model is always loaded)")
    how.add_argument("--contexts", nargs="+", type=COUNT, default=[64, 1024], metavar="N", help="tokens (64 1024)")
    how.add_argument("--batch", nargs="+", type=COUNT, default=[1], metavar="B", help="rows, each with a picture (1)")
    how.add_argument("--new-tokens", type=COUNT, default=16, help="decode samples per context (16)")
    how.add_argument("--repeats", type=COUNT, default=3, help="encode and prefill samples (3)")
    how.add_argument("--row-seconds", type=POSITIVE, default=600.0, metavar="S", help="for one measurement (600)")
    how.add_argument("--threads", type=COUNT, help="CPU threads (torch's choice)")
    how.add_argument("--bandwidth-gib", type=POSITIVE, default=1.25, help="buffer that is read for the limit (1.25)")
    how.add_argument("--bandwidth-repeats", type=COUNT, default=5)
    page = parser.add_argument_group("instead of measuring")
    page.add_argument("--report", nargs="+", type=Path, metavar=("PAGE", "JSON"), help="write the page of these runs")
    return parser


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    settings = parser.parse_args(argv)
    if settings.reference and not (settings.reference / "modeling_chatglm.py").is_file():
        parser.error(f"--reference: {str(settings.reference)!r} has no modeling_chatglm.py.")
    if settings.variants and settings.quant:
        parser.error("--quant is for one model; name its weights in --variants instead.")
    if settings.model:
        settings.geometry = None
    settings.argv = argv
    settings.child_options = turn_options().parse_known_args(yardstick_options().parse_known_args(argv)[1])[1]
    return settings


def parse_subjects(settings: argparse.Namespace) -> None:
    """Put what is named by text in its place: variants, peers, and the options that the first variant gets besides."""
    from visualglm_tools.benchmarking.peers import parse_peer
    from visualglm_tools.benchmarking.run import Variant, variant_name

    if settings.peer and not settings.variants:
        settings.variants = [variant_name(settings)]
    settings.variants = [Variant.parse(text) for text in settings.variants]
    settings.peer = [parse_peer(text) for text in settings.peer]
    names = [subject.name for subject in (*settings.variants, *settings.peer)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{twice!r} is named twice in --variants and --peer.")
    settings.yardstick_options = ["--against", settings.against] if settings.against else []
    if settings.reference:
        chosen = (settings.reference, settings.reference_python, settings.layers)
        names = ("--reference", "--reference-python", "--layers")
        settings.yardstick_options += [str(word) for pair in zip(names, chosen, strict=True) for word in pair]


def write_report(files: list[Path]) -> int:
    from visualglm_tools.benchmarking.report import write_page

    page, *runs = files
    write_page(page, page.parent / TEMPLATE, runs)
    print(f"{page} has {len(runs)} runs")
    return 0


def measure(settings: argparse.Namespace) -> int:
    from visualglm_tools.benchmarking.report import render_run, write_run
    from visualglm_tools.benchmarking.run import make_report

    parse_subjects(settings)
    report = make_report(settings)
    if settings.save:
        write_run(report, settings.save)
    print(render_run(report))
    print(json.dumps(report, ensure_ascii=False))
    return 1 if report["failed"] else 0


def main(argv: list[str] | None = None) -> int:
    settings = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        return write_report(settings.report) if settings.report else measure(settings)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
