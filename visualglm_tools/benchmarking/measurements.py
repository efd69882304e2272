"""The measurements of one model: encoding, prompts and decoding, over batches and contexts.

What does not fit into the memory, or would take longer than a measurement may, is not tried; the reason is kept.

`generate` decodes on caches that are filled, not computed, and is told to go on from there:

- dynamic: a cache that grows by concatenation, transformers' default.
- static: a cache of the final size, nothing compiled.
- compiled: the compiled step and the cache that `generate(compile=True)` takes, which has no place for a filled one; on
  CUDA it is recorded.
- recorded: the same, recorded as a CUDA graph and not compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, CompileConfig, StaticCache
from transformers.utils import ModelOutput

from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.compilation import GRAPHS_ALONE, bucket_length, compile_call, resolve_compile_config
from visualglm_hf.growing_cache import make_cache
from visualglm_tools.benchmarking.engines import FilledRunner, ModelEngine, Prompts, Runner, fill_cache, random_states
from visualglm_tools.benchmarking.models import cache_bytes
from visualglm_tools.benchmarking.settings import Settings
from visualglm_tools.benchmarking.timing import GIB, Clock, TokenTimes, announce, collect, free_memory, summarise


SPARE_CACHE = 1.1  # times the cache: a layer's keys and values are twice there while they grow
PRODUCTS = "products alone"  # what is left of a step without all that is around its matrices
WARMUP_TOKENS = 4  # of `generate`, after which everything is compiled and recorded
# Whose step is compiled or recorded -> how; see `resolve_compile_config`.
STEPS = {"compiled": True, "recorded": CompileConfig(backend=GRAPHS_ALONE)}


@dataclass
class Bench:
    """What all measurements share."""

    settings: Settings
    model: VisualGLMForConditionalGeneration
    clock: Clock
    # Part -> how many pictures or tokens of a prompt took how many milliseconds, as far as known.
    known: dict[str, dict[int, float]] = field(default_factory=dict)

    def prompts(self, batch: int) -> Prompts:
        return Prompts(self.model, batch)

    def runner(self, batch: int) -> Runner:
        return Runner(ModelEngine(self.model), self.prompts(batch), self.clock)


@dataclass(frozen=True)
class Case:
    """One measurement: which part, how, how many rows, after how many tokens."""

    part: str  # "encode", "prefill" or "decode"
    batch: int
    context: int = 0
    path: str = ""  # of decoding: PRODUCTS, "forward", "generate, … cache", or with "compiled"

    @property
    def units(self) -> int:
        """Pictures, or tokens of the prompts."""
        return self.batch if self.part == "encode" else self.batch * self.context

    def describe(self) -> str:
        words = [self.part, self.path and f"({self.path})", self.context and f"at {self.context} tokens"]
        return " ".join(str(word) for word in (*words, f"batch {self.batch}") if word)

    def fields(self) -> dict[str, Any]:
        always = ("part", "batch", "context") if self.part == "decode" else ("part", "batch")
        return {name: value for name, value in vars(self).items() if name in always or value}


def list_cases(settings: Settings) -> list[Case]:
    """List what is to be measured, cheap batches first."""
    cases = []
    paths = ["forward"]
    for cache in settings.cache:  # what `generate` has compiled, the step alone needs not compile again
        paths += [path_name(cache), *([step_name(cache)] if cache in STEPS else [])]
    for batch in settings.batch:
        if "encode" in settings.parts:
            cases.append(Case("encode", batch))
        if "prefill" in settings.parts:
            cases += [Case("prefill", batch, context) for context in settings.contexts]
        if "decode" in settings.parts:
            cases.append(Case("decode", batch, path=PRODUCTS))
            cases += [Case("decode", batch, context, path) for context in settings.contexts for path in paths]
    return cases


def path_name(cache: str) -> str:
    return f"generate, {cache}" if cache in STEPS else f"generate, {cache} cache"


def step_name(cache: str) -> str:
    return f"forward, {cache}"


def warm_up(bench: Bench) -> None:
    """Touch every weight once: memory-mapped weights are read from the disk at their first use."""
    announce("warming up")
    prompts = bench.prompts(1)
    bench.model.get_image_features(prompts.pictures())
    runner = FilledRunner(ModelEngine(bench.model), prompts, bench.clock)
    runner.start(min(bench.settings.contexts))
    runner.step()


def measure_all(bench: Bench) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure every case; return the rows and, with reasons, what was left out."""
    rows, skipped = [], []
    for case in list_cases(bench.settings):
        reason = obstacle(bench, case)
        if reason is None:
            announce(case.describe())
            samples = measure(bench, case)
            reason = None if samples else f"one token takes more than --row-seconds, {bench.settings.row_seconds:g}"
        if reason is None:
            rows.append({**case.fields(), "ms": summarise(samples)})
        else:
            announce(f"{case.describe()} is not measured: {reason}")
            skipped.append({**case.fields(), "reason": reason})
    return rows, skipped


def obstacle(bench: Bench, case: Case) -> str | None:
    """Say why a case cannot be measured; None if it can."""
    needed, free = needed_memory(bench, case), free_memory(bench.clock.device)
    if needed > free:
        return f"needs {needed / GIB:.1f} GiB beside the weights, {free / GIB:.1f} GiB are free"
    seconds = expect(bench.known.get(case.part, {}), case.units) / 1000
    if seconds > bench.settings.row_seconds:
        return f"one sample would take about {seconds:,.0f} s, --row-seconds is {bench.settings.row_seconds:g}"
    return None


def expect(known: dict[int, float], units: int) -> float:
    """Return the milliseconds that `units` will take, on the line through the last two that are known; 0 for none."""
    points = list(known.items())[-2:]
    if not points:
        return 0.0
    last, ms = points[-1]
    slope = ms / last
    if len(points) == 2:  # low bits are unpacked once per prompt, however long it is
        slope = (ms - points[0][1]) / (last - points[0][0])
    return ms + max(slope, 0.0) * (units - last)


def needed_memory(bench: Bench, case: Case) -> float:
    """Return the bytes that a case needs beside the weights: its cache, and the activations of a prompt."""
    if case.part == "encode":
        return 0
    tokens = case.batch * (case.context + bench.settings.new_tokens + 2)
    needed = tokens * cache_bytes(bench.model) * SPARE_CACHE
    if case.part == "prefill":
        config = bench.model.config.text_config
        wide = 3 * config.intermediate_size + 8 * config.hidden_size + 2 * case.context  # the mask, too
        needed += case.batch * case.context * wide * bench.model.dtype.itemsize
    return needed


def measure(bench: Bench, case: Case) -> list[float]:
    """Return the milliseconds of a case, of one token if it decodes; none if even one takes too long."""
    settings = bench.settings
    how = {"repeats": settings.repeats, "seconds": settings.row_seconds}
    if case.part == "encode":
        pictures = bench.prompts(case.batch).pictures()
        samples = bench.clock.sample(lambda: bench.model.get_image_features(pictures), warmup=bench.clock.warmup, **how)
        bench.known.setdefault("encode", {})[case.units] = samples[-1]
        return samples
    if case.part == "prefill":
        runner = bench.runner(case.batch)
        samples = collect(lambda: runner.start(case.context), warmup=bench.clock.warmup, **how)
        bench.known.setdefault("prefill", {})[case.units] = samples[-1]
        return samples
    if case.path == PRODUCTS:
        return measure_products(bench, case)
    if case.path == "forward":
        return measure_forward(bench, case)
    if case.path in map(step_name, STEPS):
        return measure_step(bench, case)
    return measure_generate(bench, case)


def products_of(model: VisualGLMForConditionalGeneration, batch: int) -> Callable[[], None]:
    """Return a function that multiplies with every matrix of a decode step, one after the other, and nothing else."""
    layers = [each for each in model.transformer.layers.modules() if isinstance(each, torch.nn.Linear)]
    layers.append(model.lm_head)
    widths = {layer.in_features for layer in layers}
    inputs = {width: torch.randn(batch, 1, width, device=model.device).to(model.dtype) for width in widths}

    def multiply() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return multiply


def measure_products(bench: Bench, case: Case) -> list[float]:
    how = {"repeats": bench.settings.new_tokens, "seconds": bench.settings.row_seconds}
    return bench.clock.sample(products_of(bench.model, case.batch), warmup=1, **how)


def measure_forward(bench: Bench, case: Case) -> list[float]:
    """Decode by bare forward steps with a dynamic cache."""
    runner = FilledRunner(ModelEngine(bench.model), bench.prompts(case.batch), bench.clock)
    runner.start(case.context)
    return collect(runner.step, bench.settings.new_tokens, warmup=1, seconds=bench.settings.row_seconds)


class NotedCall:
    """A call that remembers what it was given last."""

    def __init__(self, call: Callable[..., ModelOutput]):
        self.call, self.inputs = call, {}

    def __call__(self, model: VisualGLMForConditionalGeneration, **inputs) -> ModelOutput:
        self.inputs = inputs
        return self.call(model, **inputs)


def make_step(bench: Bench, case: Case) -> NotedCall | None:
    """Return the step that `generate` takes for a case, if it is compiled or recorded."""
    device = bench.model.device
    how = next((how for name, how in STEPS.items() if case.path in (path_name(name), step_name(name))), None)
    return None if how is None else NotedCall(compile_call(resolve_compile_config(how, device), device))


def make_cache_for(bench: Bench, case: Case) -> Cache:
    """Return the empty cache that `generate` has in a case."""
    config = bench.model.config.text_config
    if case.path == path_name("dynamic"):
        return make_cache(config, bench.model.device)
    length = case.context + bench.settings.new_tokens + 2
    if case.path != path_name("static"):
        length = bucket_length(length + WARMUP_TOKENS, config.max_position_embeddings)
    return StaticCache(config=config, max_cache_len=length)


def measure_generate(bench: Bench, case: Case) -> list[float]:
    """Decode greedily through `generate`, from a filled cache."""
    model, new_tokens, step = bench.model, bench.settings.new_tokens, make_step(bench, case)
    options = {"disable_compile": True, **({"compiled_call": step} if step else {})}
    if step:
        torch.compiler.reset()  # or the code for other sizes makes this one's general, and slower
    cache, input_ids = make_cache_for(bench, case), bench.prompts(case.batch).answered(case.context)
    if step or bench.clock.warmup:
        generate_from(model, cache, input_ids, min(WARMUP_TOKENS, new_tokens + 1), **options)
    return generate_from(model, cache, input_ids, new_tokens + 1, max_time=bench.settings.row_seconds, **options)


def measure_step(bench: Bench, case: Case) -> list[float]:
    """Decode by compiled or recorded steps alone, each with the inputs that `generate` gave the last one it took."""
    model, step = bench.model, make_step(bench, case)
    cache, input_ids = make_cache_for(bench, case), bench.prompts(case.batch).answered(case.context)
    generate_from(model, cache, input_ids, WARMUP_TOKENS, compiled_call=step, disable_compile=True)
    how = {"repeats": bench.settings.new_tokens, "seconds": bench.settings.row_seconds}
    return bench.clock.sample(lambda: step.call(model, **step.inputs), **how)


def generate_from(
    model: VisualGLMForConditionalGeneration, cache: Cache, input_ids: torch.Tensor, new_tokens: int, **options
) -> list[float]:
    """Continue [B, S] by `new_tokens` after filling `cache` for all but the last; return the milliseconds per token.

    `options` are `generate`'s; fewer tokens come where they say so.
    """
    batch, length = input_ids.shape
    cache.reset()  # the same object again: graphs that were captured know its tensors
    fill_cache(cache, random_states(model, batch, length - 1))
    streamer = TokenTimes()
    model.generate(
        input_ids,
        cache=cache,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        streamer=streamer,
        **options,
    )
    return streamer.intervals()
