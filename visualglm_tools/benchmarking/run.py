"""A run from its options to its report: one variant in this process, or several and their peers in turns.

A variant is our model with weights in one format, and with our kernels or without them. Where there are several, each
is measured in a process of its own, so that its loading time and its peak memory are its own, and nothing of it is left
when the next one begins.
"""

import datetime
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.compilation import resolve_compile_config
from visualglm_tools.benchmarking.comparison import compare_formulation, compare_reading, compare_reference
from visualglm_tools.benchmarking.engines import Prompts
from visualglm_tools.benchmarking.growth import measure_growth
from visualglm_tools.benchmarking.limits import add_rates, measure_limits
from visualglm_tools.benchmarking.machine import describe_machine, describe_settings, describe_versions, public_command
from visualglm_tools.benchmarking.measurements import STEPS, Bench, measure_all, warm_up
from visualglm_tools.benchmarking.models import GEOMETRIES, build_model, model_figures
from visualglm_tools.benchmarking.peers import Peer, parse_peer, run_peer
from visualglm_tools.benchmarking.pieces import measure_pieces
from visualglm_tools.benchmarking.programs import run_program
from visualglm_tools.benchmarking.settings import RunSettings, Settings
from visualglm_tools.benchmarking.timing import Clock, announce, digits, memory_figures, summarise
from visualglm_tools.checkpoints.loading import choose_device, load_weights
from visualglm_tools.options import part, words


DOOR = ("-m", "visualglm_tools", "bench")
SHORT_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
WITHOUT_KERNELS = "-torch"
ENCODER_TOO = "-encoder"  # which is in 8 bits


# ---------------------------------------------------------------- one variant, here


def make_model(settings: Settings, device: torch.device) -> VisualGLMForConditionalGeneration:
    """Build or load what the options ask for, on its device."""
    dtype = getattr(torch, settings.dtype)
    if settings.model:
        model = load_weights(settings.model, dtype, settings.quant, image_encoder=settings.quant_image_encoder)
    else:
        geometry = GEOMETRIES[settings.geometry]
        model = build_model(geometry, dtype, device, settings.quant, settings.quant_image_encoder)
    model.set_attn_implementation(settings.attn)
    return model.to(device).eval().requires_grad_(False)


def measure_variant(settings: Settings) -> dict[str, Any]:
    """Measure everything that the options ask for on one model.

    Raises:
        ValueError: the options do not fit the model, the machine or the original's code.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    clock = Clock(device)
    for how in (STEPS[cache] for cache in settings.cache if cache in STEPS):
        resolve_compile_config(how, device)  # a compiler is missing now or not at all
    with torch.no_grad():
        announce("building or loading the model")
        load_ms, model = clock(make_model, settings, device)
        variant: dict[str, Any] = {"name": variant_name(settings), "model": model_figures(model)}
        variant["load"] = {
            "how": "loaded" if settings.model else "built",
            "s": summarise([load_ms / 1000]),
            **memory_figures(device),
        }
        bench = Bench(settings, model, clock)
        Prompts(model, batch=1).check(settings.contexts, settings.new_tokens)
        warm_up(bench)
        variant["rows"], variant["skipped"] = measure_all(bench)
        variant["end"] = memory_figures(device)  # before the yardsticks and limits, which take memory of their own
        if "decode" in settings.parts:
            variant["reading"] = compare_reading(bench)
            variant["pieces"] = measure_pieces(bench)
        if settings.against == "formulation":
            variant["against_formulation"] = compare_formulation(bench)
        if settings.reference:
            variant["against_reference"] = compare_reference(bench)
        variant["limits"] = measure_limits(model, clock, settings.bandwidth_gib, settings.bandwidth_repeats)
    return conclude(variant)


def variant_name(settings: Settings) -> str:
    """Return what the variant is called in reports: int4, bf16, int4-torch, …"""
    name = f"int{settings.quant}" if settings.quant else SHORT_NAMES[settings.dtype]
    name += ENCODER_TOO if settings.quant_image_encoder else ""
    return name + (WITHOUT_KERNELS if os.environ.get("VISUALGLM_KERNELS") == "torch" else "")


def conclude(variant: dict[str, Any]) -> dict[str, Any]:
    """Add what follows from the samples."""
    for row in variant["rows"]:
        add_rates(row, variant["model"], variant["limits"])
    variant["growth"] = measure_growth(variant["rows"])
    return variant


# ---------------------------------------------------------------- several, in turns


@dataclass(frozen=True)
class Variant:
    """What `--variants` names: the format of the weights, with our kernels or not, and a checkpoint of its own."""

    weights: str
    has_kernels: bool = True
    folder: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Read WEIGHTS, WEIGHTS-torch or either with =FOLDER; raises a `ValueError` for other weights."""
        name, _, folder = text.partition("=")
        weights = name.removesuffix(WITHOUT_KERNELS)
        known = [*SHORT_NAMES.values(), "int8", "int4"]
        if weights not in known:
            raise ValueError(f"must be one of {', '.join(known)}, perhaps with {WITHOUT_KERNELS}; found {text!r}")
        return cls(weights, weights == name, Path(folder) if folder else None)

    @property
    def name(self) -> str:
        name = self.weights + ("" if self.has_kernels else WITHOUT_KERNELS)
        return f"{name} of {self.folder.name}" if self.folder else name

    @property
    def bits(self) -> int | None:
        return int(self.weights.removeprefix("int")) if self.weights.startswith("int") else None

    def settings(self, run: RunSettings, is_beside_original: bool) -> Settings:
        """Return what its own process measures, of what the whole run does."""
        long_names = {short: long for long, short in SHORT_NAMES.items()}
        settings = replace(
            part(run, Settings),
            dtype=long_names.get(self.weights, run.dtype),
            quant=self.bits,
            model=self.folder or run.model,
        )
        return settings if is_beside_original else replace(settings, against=None, reference=None)


def list_subjects(settings: RunSettings) -> list[Variant | Peer]:
    """Return what has its turns: variants, then peers; a run with peers alone has its own model as a variant.

    Raises:
        ValueError: what is no variant or peer, or a name for two of them.
    """
    variants = settings.variants or ((variant_name(settings),) if settings.peer else ())
    subjects = [*map(Variant.parse, variants), *map(parse_peer, settings.peer)]
    names = [subject.name for subject in subjects]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{twice!r} is named twice in --variants and --peer.")
    return subjects


def measure_apart(variant: Variant, settings: Settings) -> dict[str, Any]:
    """Measure one variant in a process of its own.

    Raises:
        ValueError: it could not be measured; with its own message.
    """
    environment = {**os.environ, **({} if variant.has_kernels else {"VISUALGLM_KERNELS": "torch"})}
    printed = run_program(variant.name, [sys.executable, *DOOR, *words(settings)], environment)
    return {**json.loads(printed.splitlines()[-1])["variants"][0], "name": variant.name}


def measure_in_turns(settings: RunSettings, subjects: list[Variant | Peer]) -> dict[str, Any]:
    """Measure every variant and every peer, round by round; return the sections of the report.

    What the original's code is compared with is the first variant, in the first round. Whoever fails is left out, with
    a message in its place, and does not cost the others their figures.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for number in range(settings.rounds):
        for index, subject in enumerate(subjects):
            if subject.name in failed:
                continue
            announce(f"round {number + 1} of {settings.rounds}: {subject.name}")
            try:
                if isinstance(subject, Peer):
                    result = run_peer(subject)
                else:
                    result = measure_apart(subject, subject.settings(settings, number == index == 0))
            except ValueError as error:
                failed[subject.name] = str(error)
                announce(str(error))
            else:
                found.setdefault(subject.name, []).append(result)
    peers = [subject.name for subject in subjects if isinstance(subject, Peer)]
    pooled = {name: pool(results) for name, results in found.items()}
    return {
        "variants": [conclude(result) for name, result in pooled.items() if name not in peers],
        "peers": [result for name, result in pooled.items() if name in peers],
        "failed": [{"name": name, "message": message} for name, message in failed.items()],
    }


def pool(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the samples of several rounds of one subject together; limits and peaks are the highest of any round."""
    pooled = dict(rounds[0])
    pooled["rows"] = pool_rows([row for result in rounds for row in result["rows"]])
    if "limits" in pooled:
        pooled["limits"] = highest([result["limits"] for result in rounds])
        pooled["end"] = highest([result["end"] for result in rounds])
        seconds = [sample for result in rounds for sample in result["load"]["s"]["samples"]]
        pooled["load"] = {**highest([result["load"] for result in rounds]), "s": summarise(seconds)}
    if "reading" in pooled:
        pooled["reading"] = pool_reading([result["reading"] for result in rounds])
    return pooled


def pool_reading(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put the samples of `compare_reading` together, row by row."""
    return [
        {
            **rows[0],
            **{
                name: summarise([sample for row in rows for sample in row[name]["samples"]])
                for name in ("read_gb_per_s", "of_reading")
            },
        }
        for rows in zip(*rounds, strict=True)
    ]


def pool_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the rows that measure the same, in the order in which they first appear."""
    merged: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("part", "path", "batch", "context"))
        known = merged.get(key)
        ms = summarise((known["ms"]["samples"] if known else []) + row["ms"]["samples"])
        merged[key] = {**row, "ms": ms}
        if "tokens_per_s" in row:  # a peer's; ours are computed anew
            merged[key]["tokens_per_s"] = digits(row["tokens_per_s"] * row["ms"]["median"] / ms["median"])
    return list(merged.values())


def highest(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the largest of each number; what is no number is taken from the first."""
    return {
        name: max(figure[name] for figure in figures) if isinstance(value, (int, float)) else value
        for name, value in figures[0].items()
    }


# ---------------------------------------------------------------- the report


def make_report(settings: RunSettings) -> dict[str, Any]:
    """Measure, and say on what, when and by which command.

    Raises:
        ValueError: as in `measure_variant`; nothing at all could be measured.
    """
    command = words(settings)
    subjects = list_subjects(settings)
    settings = replace(settings, device=str(choose_device(settings.device)))
    if subjects:
        sections = measure_in_turns(settings, subjects)
        if not sections["variants"] and not sections["peers"]:
            raise ValueError("nothing could be measured; the messages are above.")
    else:
        sections = {"variants": [measure_variant(settings)], "peers": [], "failed": []}
    if settings.threads:
        torch.set_num_threads(settings.threads)  # also where others have measured
    return {
        "benchmark": "visualglm-hf",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"visualglm bench {public_command(command)}",
        "machine": describe_machine(torch.device(settings.device)),
        "versions": describe_versions(),
        "settings": describe_settings(settings),
        **sections,
    }
