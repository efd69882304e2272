# SPDX-License-Identifier: Apache-2.0
"""Better codes in the same bytes: a decoder is quantized layer by layer, and each matrix makes up for its own errors.

Not here: the format, and how scales are searched (`lowbit_format.py`, `lowbit_codes.py`); a model quantized so is any
other quantized one. What it takes is a few prompts such as people will ask, and minutes instead of seconds.

Rounding a column of a matrix changes the product; the columns that are not yet rounded can take some of that back, as
far as their inputs go together. How they do is what the calibration measures: the products X^T X of the inputs of each
matrix, which come from the layers below as they are after quantizing. With X^T X = L D L^T, L lower and of unit
diagonal, the columns are rounded from the last to the first, each with the errors E of those after it:

    w_k <- w_k + sum over i > k of E_i L_ik

and then a unit of squared error of column k costs D_k. That is GPTQ (arXiv 2210.17323) in the form of QuIP's LDLQ
(arXiv 2307.13304, theorem 6), without inverting anything. Scales are searched as always, for what the group has become,
with errors that cost D_k; so a column that matters is met better.

Shapes: M tokens, N outputs, K inputs, G columns of a group, n = K / G groups of a row, R rows at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .lowbit_codes import GROUP_CODES, nonzero, search_scales
from .lowbit_format import pack_int4
from .quantization import (
    QuantizedLinear,
    check_layers,
    check_unquantized,
    find_linears,
    quantize_,
    quantize_output_embeddings_,
    record,
    resolve_group_size,
)


# Of the mean of X^T X's diagonal, added to it: what is known from few tokens is believed so much less.
DAMPING = 0.1
COLUMNS = 64  # rounded between two products with all errors so far
ROWS = 2048  # quantized at a time, so that it takes less memory than X^T X


class Call(NamedTuple):
    """What a block is called with besides its hidden states, and which of these are of tokens, not of padding."""

    arguments: tuple
    keywords: dict
    is_token: torch.Tensor | None  # [B S]

    def run(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return block(states, *self.arguments, **self.keywords)

    def tokens_of(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, K] -> [M, K]"""
        x = x.flatten(0, -2)
        return x if self.is_token is None else x[self.is_token.to(x.device)]


def quantize_calibrated(
    model: nn.Module,
    calibration: Iterable[Mapping[str, Any]],
    bits: int = 4,
    group_size: int | None = None,
    lm_head: bool = False,
    image_encoder: bool = False,
) -> nn.Module:
    """Quantize the linear layers of a transformers model's decoder to 4 bits, calibrated with prompts.

    Memory: besides the model, X^T X of one layer and the factor of one matrix at a time (1.2 and 1 GiB at full size),
    some rows of the matrix, and the hidden states of all prompts.

    Args:
        model: has a decoder with `layers`, each called with its hidden states first.
        calibration: inputs of the model, such as a processor makes them, on its device; 32 prompts are enough.
        bits: 4. The error of 8 is too small to be worth it.
        group_size, lm_head, image_encoder: see `quantize_model`; with one scale per row it is searched for, too. The
            decoder is calibrated with what the quantized image encoder makes of pictures.

    Returns:
        The same model.

    Raises:
        ValueError: as `quantize_model`; also 8 bits, no prompts, or hidden states that are not finite.
    """
    check_unquantized(model)
    if resolve_group_size(bits, group_size) is None and bits == 8:
        raise ValueError("8 bits gain nothing from calibration: their error is small. Leave it out, or take 4 bits.")
    decoder = model.get_decoder()
    check_layers(find_linears(decoder), bits, group_size)
    if image_encoder:
        quantize_(model.get_encoder("image"), bits=8)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            quantize_blocks_(model, decoder.layers, calibration, group_size)
    finally:
        model.train(was_training)
    quantize_(decoder, bits, group_size)  # what is in no block
    if lm_head:
        quantize_output_embeddings_(model)
    record(model.config, bits, group_size, lm_head, image_encoder)
    return model


def quantize_blocks_(
    model: nn.Module, blocks: nn.ModuleList, calibration: Iterable[Mapping[str, Any]], group_size: int | None
) -> None:
    """Quantize one block after the other, each with the hidden states that those before it give now."""
    states, calls = record_calls(model, blocks, calibration)
    for index, block in enumerate(blocks):
        try:
            quantize_block_(block, states, [call[index] for call in calls], group_size)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        states = [call[index].run(block, state) for state, call in zip(states, calls, strict=True)]


def record_calls(
    model: nn.Module, blocks: nn.ModuleList, calibration: Iterable[Mapping[str, Any]]
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """Run the model on each prompt; the hidden states that enter the first block, and the calls of all blocks."""
    states, calls = [], []
    for inputs in calibration:
        if not isinstance(inputs, Mapping):
            raise ValueError(f"A prompt to calibrate with must be a mapping of inputs, not a {type(inputs).__name__}.")
        mask = inputs.get("attention_mask")
        is_token = mask.bool().flatten() if mask is not None and mask.dim() == 2 else None
        found: list[tuple] = []
        with hooked(blocks, lambda module, arguments, keywords, found=found: found.append((arguments, keywords))):
            model(**{**inputs, "use_cache": False, "logits_to_keep": 1})
        states.append(found[0][0][0])
        calls.append([Call(arguments[1:], keywords, is_token) for arguments, keywords in found])
    if not states:
        raise ValueError("There are no prompts to calibrate with. Give some; 32 with pictures are enough.")
    return states, calls


@contextmanager
def hooked(modules: Iterable[nn.Module], hook) -> Iterator[None]:
    """Call a hook before each module is, with its arguments and keywords."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantize_block_(block: nn.Module, states: list[torch.Tensor], calls: list[Call], group_size: int | None) -> None:
    """Put calibrated low-bit layers in the places of a block's linear ones."""
    linears = find_linears(block)
    hessians = measure(block, linears, states, calls)
    for name, linear in linears.items():
        codes, scales = quantize_with_feedback(linear.weight.detach(), hessians.pop(name), group_size)
        block.set_submodule(name, QuantizedLinear.from_codes(linear, codes, scales, 4, group_size))


def measure(
    block: nn.Module, linears: dict[str, nn.Linear], states: list[torch.Tensor], calls: list[Call]
) -> dict[str, torch.Tensor]:
    """Run a block on all prompts, and add up X^T X [K, K] of the inputs of each of its linear layers, in float32."""
    names = {linear: name for name, linear in linears.items()}
    hessians = {
        name: torch.zeros(linear.in_features, linear.in_features, dtype=torch.float32, device=linear.weight.device)
        for name, linear in linears.items()
    }
    for state, call in zip(states, calls, strict=True):

        def add(module: nn.Module, arguments: tuple, keywords: dict, call: Call = call) -> None:
            x = call.tokens_of(arguments[0]).float()
            hessians[names[module]].addmm_(x.T, x)

        with hooked(linears.values(), add):
            call.run(block, state)
    return hessians


def quantize_with_feedback(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int | None = None, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix [N, K] to 4 bits so that products with inputs of X^T X [K, K] change little.

    Args:
        weight: floating point.
        hessian: float32; written to.
        group_size: see `quantize_tensor`.
        damping: see `DAMPING`.

    Returns:
        Codes and scales, as `quantize_tensor`.

    Raises:
        ValueError: weights or inputs that are not finite, or weights too large for float16 scales.
    """
    group_size = resolve_group_size(4, group_size)
    factor, costs = decompose(hessian, damping)
    parts = [round_with_feedback(rows.float(), factor, costs, group_size) for rows in weight.split(ROWS)]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    if not scales.isfinite().all():
        raise ValueError("The weights are not finite, or too large for a scale in float16.")
    return codes, scales if group_size is not None else scales[:, 0]


def decompose(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """L [K, K], lower and of unit diagonal, and D [K], of which X^T X with its damping is L D L^T."""
    mean = hessian.diagonal().mean()
    if not mean.isfinite():
        raise ValueError("The inputs of a linear layer are not finite. Calibrate in bfloat16 or float32.")
    added = nonzero(mean * damping)
    while True:
        hessian.diagonal().add_(added)
        factor, info = torch.linalg.cholesky_ex(hessian)
        if info.item() == 0:
            break
        added = 10 * added  # rounding errors were larger
    roots = factor.diagonal().clone()
    return factor.div_(roots), roots.square()


def round_with_feedback(
    weight: torch.Tensor, factor: torch.Tensor, costs: torch.Tensor, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows [R, K], column by column from the last, with the errors of those after it.

    Returns:
        Codes as they are stored, and scales float16 [R, n].
    """
    columns = weight.shape[1]
    size = group_size or columns
    values = weight.T.contiguous()  # a column is a row in memory
    codes, errors, scales = torch.empty_like(values), torch.empty_like(values), []
    for end in range(columns, 0, -size):
        group = slice(end - size, end)
        targets = values[group] + factor[end:, group].T @ errors[end:]
        scale = search_scales(targets.T.contiguous(), costs[group])
        codes[group], errors[group] = round_group(targets, values[group], factor[group, group], scale[:, 0])
        scales.append(scale.half())
    return pack_int4(codes.T), torch.cat(scales[::-1], dim=1)


def round_group(
    targets: torch.Tensor, values: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a group [G, R] with its own errors; `targets` have those of the columns after it.

    Returns:
        Codes and errors, both [G, R].
    """
    codes, errors, divisor = torch.empty_like(values), torch.empty_like(values), nonzero(scale)
    for end in range(len(values), 0, -COLUMNS):
        start = max(0, end - COLUMNS)
        block = targets[start:end] + factor[end:, start:end].T @ errors[end:]
        for column in range(end - 1, start - 1, -1):
            later = slice(column + 1, end)
            target = block[column - start] + factor[later, column] @ errors[later]
            codes[column] = (target / divisor).round_().clamp_(*GROUP_CODES)
            errors[column] = values[column] - codes[column] * scale
    return codes, errors
