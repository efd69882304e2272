# SPDX-License-Identifier: Apache-2.0
"""Ways of torch for a linear layer of the image encoder on a CPU, of which the faster is measured on each machine.

Not here: the encoder (`modeling_image_encoder.py`), and kernels of our own, of which there are none for full weights.

For float32 `F.linear` takes the BLAS that torch was built with, which multiplies half as fast as oneDNN where it does
not know the processor's widest vectors; and bias and GELU are passes of their own, in bfloat16 too. Gradients, other
devices and number formats, tracers and compilers get what torch does by itself.

Shapes: K inputs, N outputs.
"""

from functools import cache

import torch
import torch.nn.functional as F

from .measured_choice import measure_seconds, recall_choice


MEMORY_FILE = "encoder_ways.json"
TOKENS, WIDTH = 257, 1408  # of a picture in the ViT
# Of the time of torch's own way, below which the other one is taken: in bfloat16 it is the same library.
SHARES = {torch.float32: 0.8, torch.bfloat16: 1.0}


def linear_by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, has_gelu: bool) -> torch.Tensor:
    out = F.linear(x, weight, bias)
    return F.gelu(out) if has_gelu else out


def linear_by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, has_gelu: bool) -> torch.Tensor:
    activation = ("gelu", [], "none") if has_gelu else ("none", [], "")  # the exact GELU
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)


WAYS = {way.__name__: way for way in (linear_by_torch, linear_by_onednn)}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, has_gelu: bool = False) -> torch.Tensor:
    """Compute x @ weight.T + bias, or the exact GELU of that, [..., K] and [N, K] -> [..., N]."""
    return (linear_by_onednn if takes_onednn(x, weight) else linear_by_torch)(x, weight, bias, has_gelu)


def takes_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype == weight.dtype
        and x.dtype in SHARES
        and is_plain(x, weight)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and choose_way(x.dtype, torch.get_num_threads()) == linear_by_onednn.__name__
    )


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


@cache
def choose_way(dtype: torch.dtype, num_threads: int) -> str:
    """The name of the way to take; with another number of threads it may be another one."""
    return recall_choice(MEMORY_FILE, str(dtype), WAYS, lambda: measure_way(dtype))


def measure_way(dtype: torch.dtype) -> str:
    """The name of the way that is faster now."""
    with torch.inference_mode(), torch.device("cpu"):
        example = [torch.ones(shape, dtype=dtype) for shape in ((TOKENS, WIDTH), (WIDTH, WIDTH), (WIDTH,))]
        try:
            own, other = measure_seconds(*(lambda way=way: way(*example, has_gelu=True) for way in WAYS.values()))
        except RuntimeError:  # torch was built without it, or its library lacks it for this processor
            return linear_by_torch.__name__
    return (linear_by_onednn if other < SHARES[dtype] * own else linear_by_torch).__name__
