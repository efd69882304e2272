"""What this machine can do at most, and which part of it each measurement reaches."""

from typing import Any

import torch

from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.encoder_ways import linear
from visualglm_tools.benchmarking.timing import GIB, Clock, announce, collect, digits


GEMM_ROWS = 512
GEMM_REPEATS = 5


def measure_limits(
    model: VisualGLMForConditionalGeneration, clock: Clock, gib: float, repeats: int
) -> dict[str, float]:
    announce("measuring the machine's limits")
    return {"read_gb_per_s": measure_bandwidth(clock, gib, repeats), "gemm_gflop_per_s": measure_gemm(model, clock)}


class PlainRead:
    """Reads a buffer larger than any cache, by the better of two plain sums."""

    def __init__(self, clock: Clock, gib: float):
        self.clock, self.numbers = clock, torch.ones(int(gib * GIB) // 8 * 2, device=clock.device)
        first, second = self.numbers.chunk(2)
        self.calls = (self.numbers.sum, lambda: torch.dot(first, second))

    def rate(self) -> float:
        """Read once, in either way; return the better one's GB/s."""
        return self.numbers.nbytes / min(self.clock(call)[0] for call in self.calls) / 1e6


def measure_bandwidth(clock: Clock, gib: float, repeats: int) -> float:
    """Return the GB/s at which this machine reads at best."""
    read = PlainRead(clock, gib)
    return digits(max(collect(read.rate, repeats, warmup=1)))


def measure_gemm(model: VisualGLMForConditionalGeneration, clock: Clock) -> float:
    """Return the GFLOP/s of the MLP's first product on `GEMM_ROWS` tokens, without its bias.

    In the model's dtype or in float32, whichever is faster: a processor may have no instructions for half precision. In
    float32 by the library that is faster.
    """
    return max(measure_gemm_in(dtype, model, clock) for dtype in {model.dtype, torch.float32})


def measure_gemm_in(dtype: torch.dtype, model: VisualGLMForConditionalGeneration, clock: Clock) -> float:
    config, options = model.config.text_config, {"device": clock.device, "dtype": dtype}
    rows = torch.full((GEMM_ROWS, config.hidden_size), 0.5, **options)
    weight = torch.full((config.intermediate_size, config.hidden_size), 0.5, **options)
    best = min(clock.sample(lambda: linear(rows, weight, None), GEMM_REPEATS, warmup=1))
    return digits(2 * GEMM_ROWS * weight.numel() / best / 1e6)


def add_rates(row: dict[str, Any], model: dict[str, Any], limits: dict[str, float]) -> None:
    """Add to a measurement what it did per second, and which part of the nearest limit that is.

    A picture is multiplied with the matrices of the image encoder, whose own time for reading is far from a limit. A
    prompt multiplies each of its tokens with each matrix; a token of an answer multiplies once and reads every
    weight, and the keys and values of all tokens before it. Whichever of reading and multiplying takes longer at the
    machine's best rate is the limit.
    """
    if row["part"] == "encode":
        pictures = row["batch"] * 1000 / row["ms"]["median"]
        row["pictures_per_s"] = digits(pictures)
        row["gflop_per_s"] = digits(pictures * model["picture_gflop"])
        row["limit"], row["fraction_of_limit"] = "GEMM", digits(row["gflop_per_s"] / limits["gemm_gflop_per_s"])
        return
    seconds, batch, context = row["ms"]["median"] / 1000, row["batch"], row["context"]
    tokens = batch * context if row["part"] == "prefill" else batch
    cached = 0 if row["part"] == "prefill" else batch * context
    gflop = tokens * model["block_gflop"] + batch * model["head_gflop"]
    gigabytes = model["token_gb"] + cached * model["cache_gb_per_token"]
    row["tokens_per_s"] = digits(tokens / seconds)
    row["gflop_per_s"] = digits(gflop / seconds)
    row["gb_per_s"] = digits(gigabytes / seconds)
    least = {"GEMM": gflop / limits["gemm_gflop_per_s"], "reading": gigabytes / limits["read_gb_per_s"]}
    row["limit"] = max(least, key=least.get)
    row["fraction_of_limit"] = digits(least[row["limit"]] / seconds)
