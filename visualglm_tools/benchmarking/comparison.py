"""Beside what: plain reads, the original's way of computing on our weights, the original's own blocks; each in turns.

Ratios are taken pair by pair. Not here: that way and the driver of those blocks (`original_formulation.py`); other
programs (`peers.py`).
"""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_tools.benchmarking.engines import Contestant, Engine, FilledRunner, ModelEngine, Prompts, Runner
from visualglm_tools.benchmarking.limits import PlainRead
from visualglm_tools.benchmarking.measurements import PRODUCTS, Bench, products_of
from visualglm_tools.benchmarking.models import TINY, build_model, model_figures
from visualglm_tools.benchmarking.original_formulation import OriginalFormulation
from visualglm_tools.benchmarking.settings import Settings
from visualglm_tools.benchmarking.timing import Clock, announce, collect, digits, summarise


DRIVER = Path(__file__).with_name("original_formulation.py")
# Largest difference of two correct ways to compute the logits, as a fraction of the largest logit.
DEVIATIONS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
VERIFIED_STEPS = 3


class ShortStack:
    """A contestant: the first blocks of our decoder on random embeddings, masks and positions included."""

    def __init__(self, model: VisualGLMForConditionalGeneration, layers: int, batch: int, clock: Clock):
        self.decoder = copy.copy(model.transformer)
        self.decoder._modules = dict(model.transformer._modules)  # else the copy shortens the model, too
        self.decoder.layers = torch.nn.ModuleList(model.transformer.layers[:layers])
        self.shape, self.dtype, self.clock = (batch, model.config.text_config.hidden_size), model.dtype, clock

    def start(self, context: int) -> float:
        self.context, self.length, self.cache = context, context, DynamicCache()
        row = torch.arange(context)
        return self.advance(torch.stack((row.clamp(max=context - 2), (row == context - 1).long())))

    def step(self) -> float:
        self.length += 1
        return self.advance(torch.tensor([[self.context - 2], [self.length - self.context + 1]]))

    def advance(self, positions: torch.Tensor) -> float:
        """Process random embeddings at `positions`, [2, S]."""
        batch, hidden_size = self.shape
        states = torch.randn(batch, positions.shape[1], hidden_size).to(self.clock.device, self.dtype)
        positions = positions.expand(batch, -1, -1).to(self.clock.device)
        return self.clock(self.decoder, states, positions, cache=self.cache, use_cache=True)[0]


class ReferenceProcess:
    """A contestant: the original's own blocks in an interpreter of the user's that can import them."""

    def __init__(self, settings: Settings, model: VisualGLMForConditionalGeneration):
        config = model.config.text_config
        self.layers = min(settings.layers, config.num_hidden_layers)
        fields = ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps")
        task = {
            "folder": str(settings.reference.resolve()),
            "geometry": {name: getattr(config, name) for name in fields},
            "layers": self.layers,
            "batch": min(settings.batch),
            "dtype": settings.dtype,
            "device": settings.device,
            "threads": settings.threads,
        }
        command = [settings.reference_python or sys.executable, str(DRIVER), json.dumps(task)]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot start --reference-python: {error}") from error
        self.versions = self.receive()["versions"]

    def receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise ValueError(
                f"the original's code in --reference ended with exit status {code}; its own message is above. It needs "
                "modeling_chatglm.py, configuration_chatglm.py, and by --reference-python a transformers of its time."
            )
        return json.loads(line)

    def ask(self, **request) -> float:
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.process.stdin = None  # `receive` says why
        return self.receive()["ms"]

    def start(self, context: int) -> float:
        return self.ask(start=context)

    def step(self) -> float:
        return self.ask(step=True)

    def close(self) -> None:
        self.process.communicate()


def compare(bench: Bench, ours: Contestant, theirs: Contestant) -> dict[str, list[dict[str, Any]]]:
    """Time two contestants in turns; the ratio of each pair of samples is ours / original, below 1 is faster.

    Both process the prompts whose tokens they then continue. Prompts that would take longer than a measurement may are
    left out.
    """
    results: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": [], "skipped": []}
    settings, batch, pace = bench.settings, min(bench.settings.batch), 0.0
    for context in settings.contexts:
        seconds = pace * context
        if seconds > settings.row_seconds:
            reason = f"a pair of prompts would take about {seconds:,.0f} s, --row-seconds is {settings.row_seconds:g}"
            results["skipped"].append({"batch": batch, "context": context, "reason": reason})
            continue
        announce(f"{context} tokens in turns with the yardstick")
        prefill = collect(
            lambda context=context: (ours.start(context), theirs.start(context)),
            settings.repeats,
            bench.clock.warmup,
            settings.row_seconds,
        )
        pace = sum(prefill[-1]) / 1000 / context
        decode = collect(lambda: (ours.step(), theirs.step()), settings.new_tokens, 1, settings.row_seconds)
        for part, pairs in (("prefill", prefill), ("decode", decode)):
            results[part].append(
                {
                    "batch": batch,
                    "context": context,
                    "ours_ms": summarise([pair[0] for pair in pairs]),
                    "original_ms": summarise([pair[1] for pair in pairs]),
                    "ours_over_original": summarise([pair[0] / pair[1] for pair in pairs]),
                }
            )
    return results


def compare_reading(bench: Bench) -> list[dict[str, Any]]:
    """Time decode steps of one row in turns with plain reads; the ratio of each pair is that of their bytes per second.

    A step's bytes are all weights and the cache, once. A machine whose speed changes from minute to minute changes that
    of both.
    """
    settings, figures = bench.settings, model_figures(bench.model)
    read = PlainRead(bench.clock, settings.bandwidth_gib)
    products = products_of(bench.model, batch=1)
    rows = []
    for path, context in ((PRODUCTS, 0), *(("forward", context) for context in settings.contexts)):
        announce(f"decode ({path}) at {context} tokens in turns with plain reads")
        if path == PRODUCTS:
            step = partial(bench.clock.sample, products, repeats=1)
        else:
            runner = FilledRunner(ModelEngine(bench.model), bench.prompts(1), bench.clock)
            runner.start(context)
            step = partial(collect, runner.step, repeats=1)
        gigabytes = figures["token_gb"] + context * figures["cache_gb_per_token"]
        pairs = collect(lambda step=step: (step()[0], read.rate()), settings.new_tokens, 1, settings.row_seconds)
        ratios = summarise([gigabytes / ms * 1000 / rate for ms, rate in pairs])
        rates = summarise([rate for _, rate in pairs])
        rows.append({"path": path, "batch": 1, "context": context, "read_gb_per_s": rates, "of_reading": ratios})
    return rows


def deviation(engine: Engine, yardstick: Engine, prompts: Prompts, context: int) -> float:
    """Return the largest difference of two engines' logits, of a prompt and some tokens, over the largest logit."""
    input_ids, image_embeds = prompts.ids(context), prompts.image_embeds
    ours, theirs = engine.prefill(input_ids, image_embeds), yardstick.prefill(input_ids, image_embeds)
    worst = 0.0
    for step in range(VERIFIED_STEPS + 1):
        if step:
            ours, theirs = engine.decode(input_ids), yardstick.decode(input_ids)
        ours, theirs = ours[:, -1:].float(), theirs[:, -1:].float()
        worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max()).item())
        input_ids = torch.cat((input_ids, ours.argmax(-1)), dim=1)
    engine.forget()
    yardstick.forget()
    return worst


def check_deviation(found: float, dtype: str) -> float:
    if not found <= DEVIATIONS[dtype]:
        raise ValueError(
            f"the original's formulation differs from ours by {found:.1e} of the largest logit in {dtype}, more than "
            f"{DEVIATIONS[dtype]:.0e}: its times would say nothing."
        )
    return digits(found)


def compare_formulation(bench: Bench) -> dict[str, Any]:
    """Time the original's formulation on our weights, after both gave the same logits, in float32 to 1e-3."""
    small = build_model(TINY, torch.float32, bench.clock.device).eval()
    exact = deviation(ModelEngine(small), OriginalFormulation(small), Prompts(small, batch=2), context=40)
    ours, theirs, prompts = ModelEngine(bench.model), OriginalFormulation(bench.model), bench.prompts(1)
    found = deviation(ours, theirs, prompts, min(bench.settings.contexts))
    prompts = bench.prompts(min(bench.settings.batch))
    return {
        "deviation_float32": check_deviation(exact, "float32"),
        "deviation": check_deviation(found, bench.settings.dtype),
        **compare(bench, *(Runner(engine, prompts, bench.clock) for engine in (ours, theirs))),
    }


def compare_reference(bench: Bench) -> dict[str, Any]:
    """Time the original's own blocks beside as many of ours; other weights, the same geometry."""
    theirs = ReferenceProcess(bench.settings, bench.model)
    try:
        stack = ShortStack(bench.model, theirs.layers, min(bench.settings.batch), bench.clock)
        results = compare(bench, stack, theirs)
    finally:
        theirs.close()
    return {"layers": theirs.layers, "versions": theirs.versions, **results}
