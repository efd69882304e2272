# SPDX-License-Identifier: Apache-2.0
"""Ways of torch for what the image encoder does on a CPU, of which the fastest is measured on each machine.

Not here: the encoder (`modeling_image_encoder.py`), and kernels of our own, of which there are none for full weights.

- A linear layer: for float32 `F.linear` takes the BLAS that torch was built with, which multiplies half as fast as
  oneDNN where it does not know the processor's widest vectors; and bias and GELU are passes of their own.
- Attention in bfloat16: the fused one multiplies in small blocks, slowly without matrix instructions. For as few
  tokens as a picture has, two products and a softmax take less time. Scores are in float32, as in the fused one: scores
  that are rounded to bfloat16 make two to seven times its error.

Gradients, other devices and number formats, tracers and compilers get what torch does by itself.

Shapes: B pictures, S query tokens, T key tokens, H heads, D head dimension, K inputs, N outputs.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .measured_choice import measure_seconds, recall_choice


MEMORY_FILE = "encoder_ways.json"
TOKENS, WIDTH, HEADS = 257, 1408, 16  # of a picture in the ViT
MOST_TOKENS = 512  # whose scores are written out


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are numbers on a CPU that nobody else wants to see."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu" for each in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


class Question(NamedTuple):
    """What is to be measured.

    Args:
        own, other: what torch does by itself, and the other way to the same result.
        example: makes what both are called with.
        share: of the time of `own`, below which the other one is taken.
    """

    own: Callable[..., torch.Tensor]
    other: Callable[..., torch.Tensor]
    example: Callable[[], tuple]
    share: float


@cache
def choose_way(question: str, num_threads: int) -> str:
    """The name of the way to take for one of `QUESTIONS`; with another number of threads it may be another one."""
    names = [way.__name__ for way in QUESTIONS[question][:2]]
    return recall_choice(MEMORY_FILE, question, names, lambda: measure_way(question))


def measure_way(question: str) -> str:
    """The name of the way that is faster now."""
    own, other, make_example, share = QUESTIONS[question]
    with torch.inference_mode(), torch.device("cpu"):
        example = make_example()
        try:
            seconds = measure_seconds(lambda: own(*example), lambda: other(*example))
        except RuntimeError:  # torch was built without it, or its library lacks it for this processor
            return own.__name__
    return (other if seconds[1] < share * seconds[0] else own).__name__


# ---------------------------------------------------------------- linear layers


def linear_by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, has_gelu: bool) -> torch.Tensor:
    out = F.linear(x, weight, bias)
    return F.gelu(out) if has_gelu else out


def linear_by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, has_gelu: bool) -> torch.Tensor:
    activation = ("gelu", [], "none") if has_gelu else ("none", [], "")  # the exact GELU
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)


def takes_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype == weight.dtype
        and x.dtype in LINEAR_QUESTIONS
        and is_plain(x, weight)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and choose_way(LINEAR_QUESTIONS[x.dtype], torch.get_num_threads()) == linear_by_onednn.__name__
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, has_gelu: bool = False) -> torch.Tensor:
    """Compute x @ weight.T + bias, or the exact GELU of that, [..., K] and [N, K] -> [..., N]."""
    return (linear_by_onednn if takes_onednn(x, weight) else linear_by_torch)(x, weight, bias, has_gelu)


# ---------------------------------------------------------------- attention


def attend_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2)


def attend_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """softmax(scaling query key^T) value, [B, H, S or T, D] -> [B, S, H, D], of one picture after the other."""
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for picture, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        weights = F.softmax(torch.matmul(q.float().mul_(scaling), k.float().transpose(1, 2)), dim=-1)
        out[picture] = torch.matmul(weights.to(v.dtype), v).transpose(0, 1)
    return out


def attends_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend_by_products` is what to take instead of torch's fused attention, without dropout."""
    return (
        query.dtype == torch.bfloat16
        and is_plain(query, key, value)
        and key.shape[2] <= MOST_TOKENS
        and choose_way("attention in bfloat16", torch.get_num_threads()) == attend_by_products.__name__
    )


def linear_example(dtype: torch.dtype) -> tuple:
    tensors = (torch.ones(shape, dtype=dtype) for shape in ((TOKENS, WIDTH), (WIDTH, WIDTH), (WIDTH,)))
    return (*tensors, True)


def attention_example() -> tuple:
    states = torch.ones(1, TOKENS, HEADS, WIDTH // HEADS, dtype=torch.bfloat16).transpose(1, 2)
    return states, states, states, 1.0


LINEAR_QUESTIONS = {torch.float32: "linear in float32", torch.bfloat16: "linear in bfloat16"}
QUESTIONS = {
    "linear in float32": Question(linear_by_torch, linear_by_onednn, partial(linear_example, torch.float32), 0.8),
    # The same library either way: it has nothing to lose.
    "linear in bfloat16": Question(linear_by_torch, linear_by_onednn, partial(linear_example, torch.bfloat16), 1.0),
    "attention in bfloat16": Question(attend_fused, attend_by_products, attention_example, 0.8),
}
