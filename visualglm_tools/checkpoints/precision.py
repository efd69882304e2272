"""The number format in which this CPU multiplies faster: measured once on each machine, and remembered.

Some processors multiply bfloat16 many times as fast as float32, others many times as slowly, and no list of features
says which. Not here: whether float32 fits into the memory (`loading.py`).
"""

import torch

from visualglm_hf.measured_choice import measure_seconds, recall_choice


FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # the more exact one first
ROWS, WIDTH = 64, 1536  # of a prompt, and of a matrix
CLEARLY = 0.8  # of float32's time: what is only about as fast is not worth its rounding


def faster_dtype() -> torch.dtype:
    """float32, or bfloat16 if this processor multiplies it clearly faster; to find out takes less than 0.1 s, once."""
    capability = torch.backends.cpu.get_cpu_capability()
    return FORMATS[recall_choice("precision.json", capability, FORMATS, measure_faster)]


def measure_faster() -> str:
    """The name of the format that is faster now."""
    seconds = {name: measure(dtype) for name, dtype in FORMATS.items()}
    return "bfloat16" if seconds["bfloat16"] < CLEARLY * seconds["float32"] else "float32"


@torch.inference_mode()
def measure(dtype: torch.dtype) -> float:
    """Seconds of a product of a short prompt with a matrix, the shortest of a few."""
    x, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    (seconds,) = measure_seconds(lambda: torch.nn.functional.linear(x, weight))
    return seconds
