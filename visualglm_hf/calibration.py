# SPDX-License-Identifier: Apache-2.0
"""Better codes in the same bytes: a decoder is quantized layer by layer, and each matrix makes up for its own errors.

Not here: the format, and how scales are searched (`lowbit_format.py`, `lowbit_codes.py`); a model quantized so is any
other quantized one. What it takes is a few prompts such as people will ask, and minutes instead of seconds.

Rounding a column of a matrix changes the product; the columns that are not yet rounded can take some of that back, as
far as their inputs go together. How they do is what the calibration measures: the products X^T X of the inputs of each
matrix, which come from everything before it as it is after quantizing. With X^T X = L D L^T, L lower and of unit
diagonal, the columns are rounded from the last to the first, each with the errors E of those after it:

    w_k <- w_k + sum over i > k of E_i L_ik

and then a unit of squared error of column k costs D_k. That is GPTQ (arXiv 2210.17323) in the form of QuIP's LDLQ
(arXiv 2307.13304, theorem 6), without inverting anything. Scales are searched as always, for what the group has become,
with errors that cost D_k; so a column that matters is met better.

What is aimed at is what the full model has there, not what the full matrix makes of inputs that are off already: before
it is rounded, a matrix becomes the one that comes nearest to that by least squares, W + Y^T X (X^T X)^-1, where Y is
what its outputs lack. So errors do not add up from layer to layer. (GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629,
aim at the full model's outputs of each matrix; here the last matrix of a block aims at the block's, residual included.)

Prompts are calibrated with the answers that the full model gives, since that is where errors count.

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
ANSWER_TOKENS = 16  # of the answers that prompts are calibrated with
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

    Memory: besides the model, X^T X of one matrix and its factor (2 GiB at most at full size), some rows of it and what
    they lack, all inputs of one block, and the hidden states of all prompts twice.

    Args:
        model: has a decoder with `layers`, each called with its hidden states first; the output of the last matrix
            that a layer calls is added to the layer's own.
        calibration: inputs of the model, such as a processor makes them, on its device; 32 prompts are enough. They
            are continued by what the model answers, `ANSWER_TOKENS` at most.
        bits: 4. The error of 8 is too small to be worth it.
        group_size, lm_head, image_encoder: see `quantize_model`; with one scale per row it is searched for, too. The
            decoder then makes up for errors of the quantized image encoder, too.

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
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            prompts = [answer(model, inputs) for inputs in calibration]
            full, calls = record_calls(model, decoder.layers, prompts)
            states = full
            if image_encoder:
                quantize_(model.get_encoder("image"), bits=8)
                states, calls = record_calls(model, decoder.layers, prompts)
            quantize_blocks_(decoder.layers, full, states, calls, group_size)
    finally:
        model.train(was_training)
    quantize_(decoder, bits, group_size)  # what is in no block
    if lm_head:
        quantize_output_embeddings_(model)
    record(model.config, bits, group_size, lm_head, image_encoder)
    return model


def answer(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Continue a prompt, given as `input_ids`, by the beginning of the model's answer; of several, by the shortest."""
    if not isinstance(inputs, Mapping):
        raise ValueError(f"A prompt to calibrate with must be a mapping of inputs, not a {type(inputs).__name__}.")
    ids = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    if ids is None or mask is not None and mask.dim() != 2:
        return inputs
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    answered = model.generate(**asked, max_new_tokens=ANSWER_TOKENS, do_sample=False, num_beams=1)
    length = (answered[:, ids.shape[1] :] != model.config.get_text_config().pad_token_id).sum(1).min().item()
    answered = answered[:, : ids.shape[1] + length]
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask, mask.new_ones(len(ids), length)], dim=1)
    return {**asked, "input_ids": answered, "attention_mask": mask}


def quantize_blocks_(
    blocks: nn.ModuleList,
    full: list[torch.Tensor],
    states: list[torch.Tensor],
    calls: list[list[Call]],
    group_size: int | None,
) -> None:
    """Quantize one block after the other.

    Args:
        blocks: are called one after the other.
        full: hidden states of each prompt that enter the first block of the full model.
        states: and those of the model as it is.
        calls: of each prompt, of all blocks.
        group_size: see `quantize_tensor`.
    """
    for index, block in enumerate(blocks):
        own = [call[index] for call in calls]
        try:
            full = quantize_block_(block, full, states, own, group_size)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        states = [call.run(block, state) for state, call in zip(states, own, strict=True)]


def record_calls(
    model: nn.Module, blocks: nn.ModuleList, calibration: Iterable[Mapping[str, Any]]
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """Run the model on each prompt; the hidden states that enter the first block, and the calls of all blocks."""
    states, calls = [], []
    for inputs in calibration:
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


def quantize_block_(
    block: nn.Module,
    full: list[torch.Tensor],
    states: list[torch.Tensor],
    calls: list[Call],
    group_size: int | None,
) -> list[torch.Tensor]:
    """Put calibrated low-bit layers in the places of a block's linear ones, in the order in which it calls them.

    Returns:
        What the full block makes of the hidden states `full`.
    """
    inputs, outputs = watch(block, full, calls)
    last = next(reversed(inputs), None)
    for name in list(inputs):
        aim = outputs if name == last else None
        hessian, lack = measure(block, name, states, calls, inputs.pop(name), aim)
        linear = block.get_submodule(name)
        codes, scales = quantize_with_feedback(linear.weight.detach(), hessian, group_size, lack=lack)
        block.set_submodule(name, QuantizedLinear.from_codes(linear, codes, scales, 4, group_size))
    return outputs


def watch(
    block: nn.Module, states: list[torch.Tensor], calls: list[Call]
) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
    """Run a block on all prompts; the inputs [M, K] of its linear layers, as they are called, and its outputs."""
    names = {linear: name for name, linear in find_linears(block).items()}
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs = []
    for state, call in zip(states, calls, strict=True):

        def keep(module: nn.Module, arguments: tuple, keywords: dict, call: Call = call) -> None:
            inputs.setdefault(names[module], []).append(call.tokens_of(arguments[0]))

        with hooked(names, keep):
            outputs.append(call.run(block, state))
    return inputs, outputs


def measure(
    block: nn.Module,
    name: str,
    states: list[torch.Tensor],
    calls: list[Call],
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a block on all prompts, and measure one of its linear layers.

    Args:
        block: with the layers before that one quantized.
        name: of the layer.
        states, calls: of the prompts.
        inputs: of that layer in the full model, [M, K] of each prompt.
        outputs: of the block in the full model; None to aim at those of the layer.

    Returns:
        X^T X [K, K] of the inputs X of the layer, and X^T Y [K, N] with what its outputs lack, Y, in float32.
    """
    linear = block.get_submodule(name)
    hessian = drift = None
    for index, (state, call) in enumerate(zip(states, calls, strict=True)):
        found: list[torch.Tensor] = []
        with hooked([linear], lambda module, arguments, keywords, found=found: found.append(arguments[0])):
            output = call.run(block, state)
        x = call.tokens_of(found[0]).float()
        aim = inputs[index] if outputs is None else call.tokens_of(outputs[index])
        off = aim.float() - (x if outputs is None else call.tokens_of(output).float())
        hessian, drift = add_product(hessian, x, x), add_product(drift, x, off)
    return hessian, drift @ linear.weight.float().T if outputs is None else drift


def add_product(total: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`total` + x.T @ y, in place if there is one yet."""
    return x.T @ y if total is None else total.addmm_(x.T, y)


def quantize_with_feedback(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int | None = None,
    damping: float = DAMPING,
    lack: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix [N, K] to 4 bits so that products with inputs of X^T X [K, K] come near to what they shall be.

    Args:
        weight: floating point.
        hessian: float32; written to.
        group_size: see `quantize_tensor`.
        damping: see `DAMPING`.
        lack: X^T Y [K, N], where Y is what they lack now, before it is quantized; None if they are as they shall be.

    Returns:
        Codes and scales, as `quantize_tensor`.

    Raises:
        ValueError: weights or inputs that are not finite, or weights too large for float16 scales.
    """
    group_size = resolve_group_size(4, group_size)
    factor, costs = decompose(hessian, damping)
    parts = []
    for start in range(0, len(weight), ROWS):
        rows = weight[start : start + ROWS].float()
        if lack is not None:
            rows = rows + solve(factor, costs, lack[:, start : start + ROWS]).T
        parts.append(round_with_feedback(rows, factor, costs, group_size))
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


def solve(factor: torch.Tensor, costs: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solution [K, R] of L D L^T x = right."""
    half = torch.linalg.solve_triangular(factor, right, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(factor.T, half / costs[:, None], upper=True, unitriangular=True)


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
