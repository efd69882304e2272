"""Clocks, samples and peak memory; nothing here knows a model."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


GIB = 1024**3


def digits(value: float) -> float:
    """Keep four digits."""
    return float(f"{value:.4g}")


def summarise(samples: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest, number of samples and the samples themselves, all to four digits."""
    figures = {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
    figures = {name: digits(value) for name, value in figures.items()}
    return {**figures, "n": len(samples), "samples": [digits(sample) for sample in samples]}


def announce(what: str) -> None:
    """Say on stderr what is being done; a full-size run takes a while on a CPU."""
    print(f"benchmark: {time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


class Clock:
    """Milliseconds of a call on a device, everything that the call started there included."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def __call__(self, call: Callable, *args, **kwargs) -> tuple[float, Any]:
        """Return the milliseconds and the result of `call`."""
        self.synchronize()
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        self.synchronize()
        return (time.perf_counter() - begin) * 1000, result

    def sample(self, call: Callable, repeats: int, warmup: int = 0, seconds: float = math.inf) -> list[float]:
        """Collect the milliseconds of `call`, see `collect`."""
        return collect(lambda: self(call)[0], repeats, warmup, seconds)

    @property
    def warmup(self) -> int:
        """Samples of a prompt to throw away: on an accelerator each new shape chooses its kernels first."""
        return 0 if self.device.type == "cpu" else 1


def collect(measure: Callable[[], Any], repeats: int, warmup: int = 0, seconds: float = math.inf) -> list[Any]:
    """Return what `measure` gives `repeats` times after `warmup` more.

    After `seconds` no new sample begins, but there is always one.
    """
    for _ in range(warmup):
        measure()
    begin, samples = time.perf_counter(), [measure()]
    while len(samples) < repeats and time.perf_counter() - begin < seconds:
        samples.append(measure())
    return samples


class TokenTimes:
    """A streamer for `generate` that notes when each token is there; [B] tokens come at once."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
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


def memory_figures(device: torch.device) -> dict[str, float | None]:
    peak = peak_memory()
    figures = {"peak_rss_gib": None if peak is None else digits(peak / GIB)}
    if device.type == "cuda":
        figures["peak_cuda_gib"] = digits(torch.cuda.max_memory_allocated(device) / GIB)
    return figures


def free_memory(device: torch.device) -> int:
    """Return the bytes that could still be had on `device`."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil

    return psutil.virtual_memory().available
