#!/usr/bin/env python
"""Measure how fast VisualGLM runs here and how much memory it takes; the last line of the output is one JSON object.

    python scripts/benchmark.py --geometry full --dtype bfloat16 --contexts 64 1024     # random weights, full size
    python scripts/benchmark.py --model models/visualglm-6b --quant 4 --device cuda
    python scripts/benchmark.py --geometry full --against formulation                   # beside the original's way

One run is one configuration in one process, so that its peak memory is its own. What is measured:

- load: building or loading the model, imports not counted. Random weights come into being in their final dtype.
- encode: one picture, pixel values to 32 soft prompt embeddings.
- prefill: a prompt of the given length in which a picture stands, without the encoding, up to the logits of the next
  token. Almost all of it is matrix products, 2 FLOP per weight and token; the limit is this machine's GEMM rate.
- decode: one more token at a given context, as a bare forward step and through `generate`, whose prefill is not
  counted. Every weight of the decoder is read once per token, so the limit is this machine's read bandwidth: ms/token
  >= weight bytes / bandwidth. The bytes of the cache come on top and are not counted.

Both limits are measured in the same run. Figures are medians with the smallest and the largest sample beside them;
ratios are taken pair by pair from alternating samples. Peak memory is that of the process (Linux: VmHWM) or of CUDA's
allocator.

Not here: the original's way of computing (`original_formulation.py`), and whether answers are right (the tests).
"""

import argparse
import copy
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol


# torch, transformers and the model are imported where they are used: `-h` shall not wait for them.
if TYPE_CHECKING:
    import torch

    from visualglm_hf import VisualGLMForConditionalGeneration

DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("load", "encode", "prefill", "decode")
# A geometry with every part of the real one, for tests of this file.
TINY = {
    "text_config": {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "mask_token_id": 250,
        "gmask_token_id": 251,
        "bos_token_id": 254,
        "eos_token_id": 255,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 56,
    },
    "qformer_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_query_tokens": 8,
        "encoder_hidden_size": 32,
    },
}
GEOMETRIES = {"full": {}, "tiny": TINY}
# A prime, so that the rows of a matrix filled with copies of the block start at different places and are not equal.
BLOCK_LENGTH = 1_048_573
BLOCKS = 4096  # so many tensors start with different values
WEIGHT_STD = 0.02
SPARE_MEMORY = 1.1  # times the weights: imports, activations, cache
GEMM_ROWS = 512
# Largest difference of two correct ways to compute the logits, as a fraction of the largest logit.
DEVIATIONS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
VERIFIED_STEPS = 3
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
FLAGS += ("asimd", "bf16", "i8mm", "sve")
GIB = 1024**3


# ---------------------------------------------------------------- samples


def summarise(samples: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and number of samples, which are kept to four digits."""
    figures = {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
    return {**{name: digits(value) for name, value in figures.items()}, "n": len(samples)}


def digits(value: float) -> float:
    return float(f"{value:.4g}")


class Clock:
    """Milliseconds of a call on a device, everything that the call started there included."""

    def __init__(self, device: "torch.device"):
        self.device = device

    def synchronize(self) -> None:
        import torch

        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def __call__(self, call: Callable, *args, **kwargs) -> tuple[float, Any]:
        """Return the milliseconds and the result of `call`."""
        self.synchronize()
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        self.synchronize()
        return (time.perf_counter() - begin) * 1000, result

    def sample(self, call: Callable, repeats: int, warmup: int) -> list[float]:
        return [self(call)[0] for _ in range(warmup + repeats)][warmup:]

    @property
    def warmup(self) -> int:
        """Samples of a prompt to throw away: on an accelerator each new shape chooses its kernels first."""
        return 0 if self.device.type == "cpu" else 1


class TokenTimes:
    """A streamer for `generate` that notes when each token is there; [B] tokens come at once."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: "torch.Tensor") -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def intervals(self) -> list[float]:
        """Milliseconds per token: without the prompt's call and without the first token, which is the prefill."""
        times = self.times[1:]
        return [(after - before) * 1000 for before, after in zip(times[:-1], times[1:], strict=True)]


def peak_memory() -> int | None:
    """Return the largest resident memory of this process so far in bytes; None where nobody says."""
    status = Path("/proc/self/status")
    if status.is_file():
        peak = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(peak[0].split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_figures(device: "torch.device") -> dict[str, float | None]:
    import torch

    peak = peak_memory()
    figures = {"peak_rss_gib": None if peak is None else digits(peak / GIB)}
    if device.type == "cuda":
        figures["peak_cuda_gib"] = digits(torch.cuda.max_memory_allocated(device) / GIB)
    return figures


# ---------------------------------------------------------------- the model


def fill(tensor: "torch.Tensor", block: "torch.Tensor") -> "torch.Tensor":
    """Fill `tensor` in place with copies of `block`, the last one cut short."""
    flat = tensor.view(-1)
    whole = flat.numel() // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])
    return tensor


def materialise(model: "torch.nn.Module", device: "torch.device") -> None:
    """Give the meta parameters of `model` random values in their own dtype, one tensor at a time; ties are kept."""
    import torch

    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(BLOCK_LENGTH + BLOCKS, generator=generator).mul_(WEIGHT_STD).to(device)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                start = len(made) % BLOCKS
                filled = fill(torch.empty_like(parameter, device=device), numbers[start : start + BLOCK_LENGTH])
                if isinstance(module, torch.nn.LayerNorm) and name == "weight":
                    filled += 1
                made[id(parameter)] = torch.nn.Parameter(filled, requires_grad=False)
            setattr(module, name, made[id(parameter)])


def build_model(
    geometry: dict[str, Any], dtype: "torch.dtype", device: "torch.device"
) -> "VisualGLMForConditionalGeneration":
    """Build a model with random weights, which never exist in another dtype.

    Raises:
        ValueError: the weights do not fit into the free memory.
    """
    import psutil
    import torch

    from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration

    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(VisualGLMConfig(**geometry)).to(dtype)
    needed = sum(parameter.nbytes for parameter in model.parameters()) * SPARE_MEMORY
    free = psutil.virtual_memory().available if device.type == "cpu" else needed
    if needed > free:
        raise ValueError(f"the model needs {needed / GIB:.1f} GiB in {dtype}, but only {free / GIB:.1f} GiB are free.")
    materialise(model, device)
    return model


def load_model(folder: Path, dtype: "torch.dtype") -> "VisualGLMForConditionalGeneration":
    from visualglm_hf import VisualGLMForConditionalGeneration

    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json. Give the folder with the weights as --model.")
    try:
        return VisualGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    except OSError as error:
        raise ValueError(f"cannot load {str(folder)!r}: {error}") from error


def make_model(settings: argparse.Namespace, device: "torch.device") -> "VisualGLMForConditionalGeneration":
    """Build or load what the options ask for, quantized and on its device."""
    import torch

    dtype = getattr(torch, settings.dtype)
    if settings.model:
        model = load_model(settings.model, dtype)
    else:
        # A model to be quantized starts in the main memory, where the doors quantize it too.
        model = build_model(GEOMETRIES[settings.geometry], dtype, torch.device("cpu") if settings.quant else device)
    if settings.quant:
        if not hasattr(model, "quantize"):
            raise ValueError("this version of visualglm_hf cannot quantize; run without --quant.")
        model = model.quantize(settings.quant)
    model.set_attn_implementation(settings.attn)
    return model.to(device).eval().requires_grad_(False)


def token_bytes(model: "VisualGLMForConditionalGeneration") -> int:
    """Return the bytes of weights that one token reads: the blocks, the last LayerNorm and lm_head."""
    parts = (model.transformer.layers, model.transformer.final_layernorm, model.lm_head)
    tensors = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def prefill_flop(model: "VisualGLMForConditionalGeneration", tokens: int) -> int:
    """Return the multiplications and additions of the blocks' weight matrices; attention and lm_head are left out."""
    config = model.config.text_config
    per_token = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return 2 * tokens * config.num_hidden_layers * per_token


# ---------------------------------------------------------------- who is measured


class Engine(Protocol):
    """A way to compute logits, with a cache inside; `OriginalFormulation` is one."""

    def forget(self) -> None: ...

    def prefill(self, input_ids: "torch.Tensor", image_embeds: "torch.Tensor | None") -> "torch.Tensor": ...

    def decode(self, input_ids: "torch.Tensor") -> "torch.Tensor": ...


class Contestant(Protocol):
    """What can be timed: a prompt of `context` tokens, then single tokens; both return milliseconds."""

    def start(self, context: int) -> float: ...

    def step(self) -> float: ...


class ModelEngine:
    """Our model, step by step; logits are those of the last token, [B, 1, V]."""

    def __init__(self, model: "VisualGLMForConditionalGeneration"):
        self.model = model
        self.forget()

    def forget(self) -> None:
        self.cache = None

    def prefill(self, input_ids: "torch.Tensor", image_embeds: "torch.Tensor | None") -> "torch.Tensor":
        outputs = self.model(input_ids=input_ids, image_embeds=image_embeds, use_cache=True, logits_to_keep=1)
        self.cache = outputs.past_key_values
        return outputs.logits

    def decode(self, input_ids: "torch.Tensor") -> "torch.Tensor":
        """Process the last token of [B, S]. The positions come from the whole sequence, as under `generate`."""
        from visualglm_hf.modeling_visualglm import build_glm_position_ids

        positions = build_glm_position_ids(input_ids, None, self.model.config.text_config)
        return self.model(
            input_ids=input_ids[:, -1:],
            glm_position_ids=positions[..., -1:],
            past_key_values=self.cache,
            use_cache=True,
        ).logits


class Prompts:
    """Inputs: pixel values, and prompts of any length around the soft prompt of one picture per row."""

    def __init__(self, model: "VisualGLMForConditionalGeneration", batch: int):
        import torch

        self.config, self.batch, self.device = model.config, batch, model.device
        queries = self.config.qformer_config.num_query_tokens
        shape = (batch, queries, self.config.text_config.hidden_size)
        self.image_embeds = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * WEIGHT_STD).to(
            self.device, model.dtype
        )

    def check(self, contexts: Sequence[int], new_tokens: int) -> None:
        """Raise a `ValueError` for a context without room for the picture or for the new tokens."""
        least = self.image_embeds.shape[1] + 4
        limit = self.config.text_config.max_position_embeddings
        if min(contexts) < least or max(contexts) + new_tokens + 1 > limit:
            raise ValueError(
                f"contexts must be {least} or more, for the picture, and with {new_tokens} new tokens at most "
                f"{limit - new_tokens - 1}; found {sorted(contexts)}. Change --contexts or --new-tokens."
            )

    def ids(self, length: int) -> "torch.Tensor":
        """Return [B, length]: a word, the picture, words, [gMASK], <sop>."""
        import torch

        text = self.config.text_config
        specials = (text.mask_token_id, text.gmask_token_id, text.bos_token_id, text.eos_token_id)
        first_word = max(text.pad_token_id, self.config.image_token_id) + 1
        words = torch.arange(length) * 7919 % (min(specials) - first_word) + first_word
        words[1 : 1 + self.image_embeds.shape[1]] = self.config.image_token_id
        words[-2], words[-1] = text.gmask_token_id, text.bos_token_id
        return words.repeat(self.batch, 1).to(self.device)

    def picture(self) -> "torch.Tensor":
        """Return the pixel values of one picture, [1, 3, image_size, image_size]."""
        import torch

        vision = self.config.vision_config
        return torch.rand(1, vision.num_channels, vision.image_size, vision.image_size).to(self.device)


class Runner:
    """A contestant: an engine that answers prompts greedily."""

    def __init__(self, engine: Engine, prompts: Prompts, clock: Clock):
        self.engine, self.prompts, self.clock = engine, prompts, clock
        self.input_ids = None

    def start(self, context: int) -> float:
        self.engine.forget()  # before the new cache exists, else the peak has both
        self.input_ids = self.prompts.ids(context)
        return self.advance(self.engine.prefill, self.input_ids, self.prompts.image_embeds)

    def step(self) -> float:
        return self.advance(self.engine.decode, self.input_ids)

    def advance(self, call: Callable, *args) -> float:
        import torch

        ms, logits = self.clock(call, *args)
        self.input_ids = torch.cat((self.input_ids, logits[:, -1:].argmax(-1)), dim=1)
        return ms


class ShortStack:
    """A contestant: the first blocks of our decoder on random embeddings, masks and positions included."""

    def __init__(self, model: "VisualGLMForConditionalGeneration", layers: int, batch: int, clock: Clock):
        import torch

        self.decoder = copy.copy(model.transformer)
        self.decoder._modules = dict(model.transformer._modules)  # else the copy shortens the model, too
        self.decoder.layers = torch.nn.ModuleList(model.transformer.layers[:layers])
        self.shape, self.dtype, self.clock = (batch, model.config.text_config.hidden_size), model.dtype, clock

    def start(self, context: int) -> float:
        import torch

        self.context, self.length, self.cache = context, context, None
        row = torch.arange(context)
        return self.advance(torch.stack((row.clamp(max=context - 2), (row == context - 1).long())))

    def step(self) -> float:
        import torch

        self.length += 1
        return self.advance(torch.tensor([[self.context - 2], [self.length - self.context + 1]]))

    def advance(self, positions: "torch.Tensor") -> float:
        """Process random embeddings at `positions`, [2, S]."""
        import torch

        batch, hidden_size = self.shape
        states = torch.randn(batch, positions.shape[1], hidden_size).to(self.clock.device, self.dtype)
        positions = positions.expand(batch, -1, -1).to(self.clock.device)
        ms, outputs = self.clock(self.decoder, states, positions, past_key_values=self.cache, use_cache=True)
        self.cache = outputs.past_key_values
        return ms


class ReferenceProcess:
    """A contestant: the original's own blocks in an interpreter of the user's that can import them."""

    def __init__(self, settings: argparse.Namespace, model: "VisualGLMForConditionalGeneration"):
        config = model.config.text_config
        self.layers = min(settings.layers, config.num_hidden_layers)
        fields = ("hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps")
        task = {
            "folder": str(settings.reference.resolve()),
            "geometry": {name: getattr(config, name) for name in fields},
            "layers": self.layers,
            "batch": settings.batch,
            "dtype": settings.dtype,
            "device": settings.device,
            "threads": settings.threads,
        }
        driver = Path(__file__).with_name("original_formulation.py")
        command = [settings.reference_python, str(driver), json.dumps(task)]
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


# ---------------------------------------------------------------- measurements


@dataclass
class Bench:
    """What all measurements share."""

    settings: argparse.Namespace
    model: "VisualGLMForConditionalGeneration"
    clock: Clock
    prompts: Prompts


def announce(what: str) -> None:
    """Say on stderr what is being done; a full-size run takes a while on a CPU."""
    print(f"benchmark: {time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def warm_up(bench: Bench) -> None:
    """Touch every weight once: memory-mapped weights are read from the disk at their first use."""
    announce("warming up")
    bench.model.get_image_features(bench.prompts.picture())
    runner = Runner(ModelEngine(bench.model), bench.prompts, bench.clock)
    runner.start(min(bench.settings.contexts))
    runner.step()


def measure_encode(bench: Bench) -> dict[str, Any]:
    announce("encoding a picture")
    picture = bench.prompts.picture()
    samples = bench.clock.sample(lambda: bench.model.get_image_features(picture), bench.settings.repeats, warmup=1)
    return {"pictures": 1, "ms": summarise(samples)}


def measure_prefill(bench: Bench, context: int) -> dict[str, Any]:
    announce(f"prefill of {context} tokens")
    runner = Runner(ModelEngine(bench.model), bench.prompts, bench.clock)
    samples = [runner.start(context) for _ in range(bench.clock.warmup + bench.settings.repeats)][bench.clock.warmup :]
    figures, tokens = summarise(samples), bench.settings.batch * context
    return {
        "context": context,
        "ms": figures,
        "tokens_per_s": digits(tokens * 1000 / figures["median"]),
        "gflop_per_s": digits(prefill_flop(bench.model, tokens) / figures["median"] / 1e6),
    }


def decode_figures(bench: Bench, context: int, path: str, samples: Sequence[float]) -> dict[str, Any]:
    figures = summarise(samples)
    return {
        "context": context,
        "path": path,
        "ms_per_token": figures,
        "tokens_per_s": digits(bench.settings.batch * 1000 / figures["median"]),
        "gb_per_s": digits(token_bytes(bench.model) / figures["median"] / 1e6),
    }


def measure_forward(bench: Bench, context: int) -> dict[str, Any]:
    """Decode by bare forward steps with a dynamic cache."""
    announce(f"decoding by forward steps at {context} tokens")
    runner = Runner(ModelEngine(bench.model), bench.prompts, bench.clock)
    runner.start(context)
    samples = [runner.step() for _ in range(1 + bench.settings.new_tokens)][1:]
    return decode_figures(bench, context, "forward", samples)


def measure_generate(bench: Bench, context: int, cache: str) -> dict[str, Any]:
    """Decode greedily through `generate`, which compiles the step on an accelerator if the cache is static."""
    announce(f"decoding by generate at {context} tokens, {cache} cache")
    new_tokens = bench.settings.new_tokens
    for _ in range(bench.clock.warmup + 1):
        streamer = TokenTimes()
        bench.model.generate(
            bench.prompts.ids(context),
            image_embeds=bench.prompts.image_embeds,
            do_sample=False,
            min_new_tokens=new_tokens + 1,
            max_new_tokens=new_tokens + 1,
            cache_implementation=None if cache == "dynamic" else cache,
            streamer=streamer,
        )
    return decode_figures(bench, context, f"generate, {cache} cache", streamer.intervals())


def measure_decode(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for context in bench.settings.contexts:
        rows.append(measure_forward(bench, context))
        rows += [measure_generate(bench, context, cache) for cache in bench.settings.cache]
    return rows


def measure_bandwidth(bench: Bench) -> float:
    """Return the GB/s at which this machine reads a buffer larger than any cache, by the better of two plain sums."""
    import torch

    announce("measuring the machine's limits")
    numbers = torch.ones(int(bench.settings.bandwidth_gib * GIB) // 8 * 2, device=bench.clock.device)
    first, second = numbers.chunk(2)
    best = min(
        min(bench.clock.sample(call, bench.settings.bandwidth_repeats, warmup=1))
        for call in (numbers.sum, lambda: torch.dot(first, second))
    )
    return digits(numbers.nbytes / best / 1e6)


def measure_gemm(bench: Bench) -> float:
    """Return the GFLOP/s of the MLP's first product on `GEMM_ROWS` tokens, without its bias, in the run's dtype."""
    import torch

    config, options = bench.model.config.text_config, {"device": bench.clock.device, "dtype": bench.model.dtype}
    rows = torch.full((GEMM_ROWS, config.hidden_size), 0.5, **options)
    weight = torch.full((config.intermediate_size, config.hidden_size), 0.5, **options)
    best = min(bench.clock.sample(lambda: torch.nn.functional.linear(rows, weight), 5, warmup=1))
    return digits(2 * GEMM_ROWS * weight.numel() / best / 1e6)


def compare(bench: Bench, ours: Contestant, theirs: Contestant) -> dict[str, list[dict[str, Any]]]:
    """Time two contestants in turns; the ratio of each pair of samples is ours / original, below 1 is faster."""
    results: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
    settings, warmup = bench.settings, bench.clock.warmup
    for context in settings.contexts:
        announce(f"{context} tokens in turns with the yardstick")
        prefill = [(ours.start(context), theirs.start(context)) for _ in range(warmup + settings.repeats)][warmup:]
        decode = [(ours.step(), theirs.step()) for _ in range(1 + settings.new_tokens)][1:]
        for part, pairs in (("prefill", prefill), ("decode", decode)):
            results[part].append(
                {
                    "context": context,
                    "ours_ms": summarise([pair[0] for pair in pairs]),
                    "original_ms": summarise([pair[1] for pair in pairs]),
                    "ours_over_original": summarise([pair[0] / pair[1] for pair in pairs]),
                }
            )
    return results


def deviation(engine: Engine, yardstick: Engine, prompts: Prompts, context: int) -> float:
    """Return the largest difference of two engines' logits, of a prompt and some tokens, over the largest logit."""
    import torch

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
    import torch
    from original_formulation import OriginalFormulation

    small = build_model(TINY, torch.float32, bench.clock.device).eval()
    exact = deviation(ModelEngine(small), OriginalFormulation(small), Prompts(small, batch=2), context=40)
    ours, theirs = ModelEngine(bench.model), OriginalFormulation(bench.model)
    found = deviation(ours, theirs, bench.prompts, min(bench.settings.contexts))
    return {
        "yardstick": "formulation",
        "deviation_float32": check_deviation(exact, "float32"),
        "deviation": check_deviation(found, bench.settings.dtype),
        **compare(bench, *(Runner(engine, bench.prompts, bench.clock) for engine in (ours, theirs))),
    }


def compare_reference(bench: Bench) -> dict[str, Any]:
    """Time the original's own blocks beside as many of ours; other weights, the same geometry."""
    theirs = ReferenceProcess(bench.settings, bench.model)
    try:
        results = compare(bench, ShortStack(bench.model, theirs.layers, bench.settings.batch, bench.clock), theirs)
    finally:
        theirs.close()
    return {"yardstick": "reference", "layers": theirs.layers, "versions": theirs.versions, **results}


def relate_to_limits(results: dict[str, Any], limits: dict[str, float]) -> None:
    """Add to each row which fraction of the machine's limit it reaches."""
    for row in results.get("prefill", []):
        row["fraction_of_gemm"] = digits(row["gflop_per_s"] / limits["gemm_gflop_per_s"])
    for row in results.get("decode", []):
        row["fraction_of_bandwidth"] = digits(row["gb_per_s"] / limits["read_gb_per_s"])


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Run every measurement that the options ask for; return the "results" of the report.

    Raises:
        ValueError: the options do not fit the model, the machine or the original's code.
    """
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    importlib.import_module("visualglm_hf")  # or `load` would pay for it
    device = torch.device(settings.device)
    clock = Clock(device)
    with torch.no_grad():
        announce("building or loading the model")
        load_ms, model = clock(make_model, settings, device)
        how = "loaded" if settings.model else "built"
        results: dict[str, Any] = {"model": model_figures(model)}
        results["load"] = {"how": how, "s": digits(load_ms / 1000), **memory_figures(device)}
        bench = Bench(settings, model, clock, Prompts(model, settings.batch))
        bench.prompts.check(settings.contexts, settings.new_tokens)
        warm_up(bench)
        if "encode" in settings.parts:
            results["encode"] = measure_encode(bench)
        if "prefill" in settings.parts:
            results["prefill"] = [measure_prefill(bench, context) for context in settings.contexts]
        if "decode" in settings.parts:
            results["decode"] = measure_decode(bench)
        results["end"] = memory_figures(device)  # before the yardsticks and limits, which take memory of their own
        if settings.against == "formulation":
            results["against_formulation"] = compare_formulation(bench)
        if settings.reference:
            results["against_reference"] = compare_reference(bench)
        results["limits"] = {"read_gb_per_s": measure_bandwidth(bench), "gemm_gflop_per_s": measure_gemm(bench)}
    relate_to_limits(results, results["limits"])
    return results


def model_figures(model: "VisualGLMForConditionalGeneration") -> dict[str, Any]:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_gib": digits(sum(tensor.nbytes for tensor in tensors.values()) / GIB),
        "token_gb": digits(token_bytes(model) / 1e9),
        "layers": model.config.text_config.num_hidden_layers,
    }


# ---------------------------------------------------------------- the report


def cpu_info() -> dict[str, Any]:
    """Return the processor's name and those of its features that decide how fast matrices are multiplied."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    features = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    return {"cpu": name, "cpu_flags": [flag for flag in FLAGS if flag in features]}


def describe_machine(device: "torch.device") -> dict[str, Any]:
    import psutil
    import torch

    machine = {
        **cpu_info(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": digits(psutil.virtual_memory().total / GIB),
        "system": platform.system(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def describe_versions() -> dict[str, str | None]:
    import torch
    import transformers

    try:
        ours = metadata.version("visualglm-hf")
    except metadata.PackageNotFoundError:  # run from a checkout
        ours = None
    return {
        "visualglm-hf": ours,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe_settings(settings: argparse.Namespace) -> dict[str, Any]:
    """Return the options; of a path only its last name, since reports are published."""
    names = {name: value.name if isinstance(value, Path) else value for name, value in vars(settings).items()}
    names["reference_python"] = None  # a path of this machine; its versions stand beside the figures
    return names


def make_report(settings: argparse.Namespace) -> dict[str, Any]:
    """Measure, and say on what and when."""
    import torch
    from serving.loading import choose_device

    settings.device = str(choose_device(settings.device))
    results = measure(settings)
    return {
        "benchmark": "visualglm-hf",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(torch.device(settings.device)),
        "versions": describe_versions(),
        "settings": describe_settings(settings),
        "results": results,
    }


def ms_cells(figures: dict[str, float]) -> list[str]:
    return [f"{figures[name]:,.4g}" for name in ("median", "min", "max")]


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return what, context, median, min, max and a remark for each measurement."""
    rows = []
    if "encode" in results:
        rows.append(["encode 1 picture, ms", "", *ms_cells(results["encode"]["ms"]), ""])
    for row in results.get("prefill", []):
        remark = (
            f"{row['tokens_per_s']:,g} tok/s, {row['gflop_per_s']:,g} GFLOP/s, {row['fraction_of_gemm']:.0%} of GEMM"
        )
        rows.append(["prefill, ms", str(row["context"]), *ms_cells(row["ms"]), remark])
    for row in results.get("decode", []):
        remark = (
            f"{row['tokens_per_s']:,g} tok/s, {row['gb_per_s']:,g} GB/s, {row['fraction_of_bandwidth']:.0%} of reading"
        )
        rows.append([f"decode ({row['path']}), ms/token", str(row["context"]), *ms_cells(row["ms_per_token"]), remark])
    for name in ("against_formulation", "against_reference"):
        for part in ("prefill", "decode"):
            for row in results.get(name, {}).get(part, []):
                ours, theirs = row["ours_ms"]["median"], row["original_ms"]["median"]
                label = f"{part}, ours / original's {name.removeprefix('against_')}"
                cells = ms_cells(row["ours_over_original"])
                rows.append([label, str(row["context"]), *cells, f"{ours:,g} ms / {theirs:,g} ms"])
    return rows


def print_table(report: dict[str, Any]) -> None:
    results, machine = report["results"], report["machine"]
    model, load, limits = results["model"], results["load"], results["limits"]
    print(f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, {' '.join(machine['cpu_flags'])}")
    print(f"{model['parameters']:,} parameters, {model['weights_gib']} GiB, {load['how']} in {load['s']} s")
    print(f"reads {limits['read_gb_per_s']} GB/s, multiplies {limits['gemm_gflop_per_s']} GFLOP/s")
    print(f"peak memory after loading: {memory_text(load)}; at the end: {memory_text(results['end'])}")
    rows = [["", "context", "median", "min", "max", ""], *table_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for what, *numbers, remark in rows:
        cells = [what.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True))]
        print("  ".join([*cells, remark]).rstrip())


def memory_text(figures: dict[str, Any]) -> str:
    names = {"peak_rss_gib": "process", "peak_cuda_gib": "CUDA"}
    known = [f"{name} {figures[key]} GiB" for key, name in names.items() if figures.get(key) is not None]
    return ", ".join(known) or "unknown"


# ---------------------------------------------------------------- options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {text}")
    return value


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    subject = parser.add_argument_group("what is measured")
    subject.add_argument("--geometry", choices=GEOMETRIES, default="full", help="random weights of this size (full)")
    subject.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint instead of random weights")
    subject.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    subject.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …, auto (cpu)")
    subject.add_argument("--quant", type=int, choices=(4, 8), help="quantize the decoder to that many bits")
    subject.add_argument("--attn", choices=("sdpa", "eager"), default="sdpa", help="attention implementation (sdpa)")
    subject.add_argument("--cache", nargs="+", choices=("dynamic", "static"), default=["dynamic"], help="in `generate`")
    subject.add_argument("--batch", type=positive, default=1, help="rows, each with a picture (1)")
    how = parser.add_argument_group("how")
    how.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all; the model is always loaded)")
    how.add_argument("--contexts", nargs="+", type=positive, default=[64, 1024], metavar="N", help="tokens (64 1024)")
    how.add_argument("--new-tokens", type=positive, default=16, help="decode samples per context (16)")
    how.add_argument("--repeats", type=positive, default=3, help="encode and prefill samples (3)")
    how.add_argument("--threads", type=positive, help="CPU threads (torch's choice)")
    how.add_argument("--bandwidth-gib", type=float, default=1.25, help="buffer that is read for the limit (1.25)")
    how.add_argument("--bandwidth-repeats", type=positive, default=5)
    yardsticks = parser.add_argument_group("beside what")
    yardsticks.add_argument("--against", choices=("formulation",), help="the original's way on the same weights")
    yardsticks.add_argument("--reference", type=Path, metavar="PATH", help="the folder of the original's code")
    yardsticks.add_argument("--reference-python", default=sys.executable, help="the interpreter that can import it")
    yardsticks.add_argument("--layers", type=positive, default=4, help="blocks compared with --reference (4)")
    settings = parser.parse_args(argv)
    if settings.bandwidth_gib <= 0:
        parser.error("--bandwidth-gib must be positive.")
    if settings.reference and not (settings.reference / "modeling_chatglm.py").is_file():
        parser.error(f"--reference: {str(settings.reference)!r} has no modeling_chatglm.py.")
    if settings.model:
        settings.geometry = None
    return settings


def main(argv: list[str] | None = None) -> int:
    settings = parse_options(argv)
    try:
        report = make_report(settings)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    print_table(report)
    print(json.dumps(report, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
