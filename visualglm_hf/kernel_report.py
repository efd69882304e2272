# SPDX-License-Identifier: Apache-2.0
"""Which way the work of a model goes on this machine, and why not a faster one.

Not here: the choices. Products (`lowbit_products.py`), attention (`cpu_attention.py`) and the decode step
(`cpu_decoder.py`) are asked as the layers ask them, so that what is reported is what is done. For that, kernels that
have not been needed before are compiled and checked.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapters import unwrap
from .cpu_attention import CPU_ATTENTION, query_obstacle, states_obstacle
from .cpu_decoder import CpuDecoder, call_obstacle, step_obstacle
from .cpu_language import HALVES
from .cpu_many_rows import find_instructions
from .cpu_quantizing import quantizing_obstacle
from .growing_cache import make_cache
from .kernel_choice import name_of, read_choice
from .quantization import DEFAULT_GROUP_SIZE


ROWS = (1, 4, 256)  # of activations: a token's, a token's of a few sequences, a prompt's
LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


class Outcome(NamedTuple):
    """The way that something goes, and the faster ones with their obstacles."""

    way: str
    obstacles: tuple[tuple[str, str], ...] = ()


class Row(NamedTuple):
    """What is done where, and how."""

    what: str
    where: str
    outcome: Outcome


class KernelReport(NamedTuple):
    """What [`VisualGLMForConditionalGeneration.kernel_report`] returns, to be printed."""

    machine: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        widths = [max(len(row[column]) for row in self.rows) + 3 for column in (0, 1)]
        lines = [self.machine]
        for what, where, outcome in self.rows:
            lines.append(f"{what:<{widths[0]}}{where:<{widths[1]}}{outcome.way}")
            lines += [f"{'':<{sum(widths)}}  not {way}: {obstacle}" for way, obstacle in outcome.obstacles]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


@torch.no_grad()
def report_kernels(model: nn.Module, decoder: CpuDecoder) -> KernelReport:
    """Report on a `VisualGLMForConditionalGeneration`, whose decode steps `decoder` does where it can."""
    text, dtype, device = model.get_decoder(), model.dtype, model.device
    head = unwrap(model.get_output_embeddings())
    rows = report_products(lambda count: ask_layers(text.layers, lambda layer: ask_linear(layer, dtype, count)))
    rows += report_products(lambda count: [("output layer", ask_linear(head, dtype, count))])
    if model.config.quantization_bit and device.type == "cpu":
        rows += ask_instructions()
    rows.append(Row("attention of 1 query", name_layers(text.layers), ask_attention(text.config, dtype, device)))
    steps = ask_step(text, decoder, dtype, device)
    rows += [Row("decode step", name_layers(blocks), outcome) for outcome, blocks in steps]
    group_size = model.config.quantization_group_size if model.config.quantization_bit else DEFAULT_GROUP_SIZE
    quantizing = ask_layers(text.layers, lambda layer: ask_quantizing(layer, dtype, device, group_size))
    rows += [Row("quantizing", *each) for each in quantizing]
    return KernelReport(describe_machine(model), tuple(rows))


def report_products(ask: Callable[[int], Iterable[tuple[str, Outcome]]]) -> list[Row]:
    """Report on products, of which `ask` says where they go how with so many rows, those that go alike together."""
    alike: dict[tuple[str, Outcome], list[str]] = defaultdict(list)
    for count in ROWS:
        for key in ask(count):
            alike[key].append(str(count))
    return [Row(f"products of {', '.join(counts)} rows", *key) for key, counts in alike.items()]


def describe_machine(model: nn.Module) -> str:
    bits = model.config.quantization_bit
    weights = f"{name_of(model.dtype)}{f' and {bits} bits' if bits else ''}"
    threads = f", threads: {torch.get_num_threads()}" if model.device.type == "cpu" else ""
    return f"{weights} on {model.device}{threads}, VISUALGLM_KERNELS: {read_choice()}"


def ask_layers(blocks: Iterable[nn.Module], ask: Callable[[nn.Module], Outcome]) -> Iterator[tuple[str, Outcome]]:
    """Ask the matrices of all layers which way something goes; those that it goes alike for have one name."""
    places: dict[Outcome, dict[str, list[nn.Module]]] = defaultdict(lambda: defaultdict(list))
    for block in blocks:
        for name in LINEARS:
            places[ask(unwrap(block.get_submodule(name)))][name].append(block)
    for outcome, by_name in places.items():
        names: dict[str, list[str]] = defaultdict(list)
        for name, having in by_name.items():
            names[name_layers(having)].append(name.partition(".")[2])
        for where, found in names.items():
            yield where if len(found) == len(LINEARS) else f"{', '.join(found)} of {where}", outcome


def ask_linear(layer: nn.Module, dtype: torch.dtype, rows: int) -> Outcome:
    """Ask a linear layer which way so many rows of activations go."""
    if hasattr(layer, "find_way"):
        reasons: dict[str, str] = {}
        way = layer.find_way(dtype, rows, reasons.__setitem__)
        return Outcome(way, tuple(reasons.items()))
    if type(layer) is not nn.Linear:
        return Outcome(type(layer).__name__, (("our kernel", "a layer of another library"),))
    obstacle = f"{name_of(layer.weight.dtype)} weights"
    if layer.weight.dtype in HALVES:
        obstacle += ", which have one in the program of a decode step alone"
    return Outcome("torch", (("our kernel", obstacle),))


def ask_quantizing(layer: nn.Linear, dtype: torch.dtype, device: torch.device, group_size: int | None) -> Outcome:
    """Ask which way codes are chosen for a linear layer, from weights of a dtype on a device."""
    size = (layer.out_features, layer.in_features) if device.type == "cpu" else (1, 1)
    obstacle = quantizing_obstacle(torch.empty(size, dtype=dtype, device=device), group_size)
    return Outcome("our kernel") if obstacle is None else Outcome("torch", (("our kernel", obstacle),))


def ask_instructions() -> Iterator[Row]:
    """Ask what the kernels for many rows, which have been asked for, multiply with."""
    instructions = find_instructions()
    if instructions is not None:
        name, (matrix, obstacle) = instructions
        obstacles = ((matrix.name, obstacle),) if obstacle else ()
        yield Row("products of many rows", "instructions", Outcome(name, obstacles))


def ask_attention(config: Any, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Ask which way the attention of one query goes, without padding."""
    shape = (1, config.num_attention_heads, 1, config.head_dim)
    query = torch.zeros(shape, dtype=dtype, device=device)
    obstacle = (
        query_obstacle(config._attn_implementation, query, None)
        or states_obstacle(query, query, query, None)
        or CPU_ATTENTION.obstacle()
    )
    if obstacle is None:
        return Outcome("our kernel")
    return Outcome(config._attn_implementation, (("our kernel", obstacle),))


def ask_step(
    text: nn.Module, decoder: CpuDecoder, dtype: torch.dtype, device: torch.device
) -> list[tuple[Outcome, list[nn.Module]]]:
    """Ask how a decode step of one sequence is done, and by which layers alike."""
    hidden_states = torch.zeros(1, 1, text.config.hidden_size, dtype=dtype, device=device)
    obstacle = call_obstacle(text.config, text.prefix_encoder, {}) or step_obstacle(
        text.config, hidden_states, make_cache(text.config, device)
    )
    if obstacle is not None:
        return [(step_outcome(obstacle), list(text.layers))]
    alike: dict[str | None, list[nn.Module]] = defaultdict(list)
    for section in decoder.divide(text, 1, dtype):
        alike[section.obstacle] += section.blocks
    return [(step_outcome(each), blocks) for each, blocks in alike.items()]


def step_outcome(obstacle: str | None) -> Outcome:
    return Outcome("in one call") if obstacle is None else Outcome("layer by layer", (("in one call", obstacle),))


def name_layers(blocks: Iterable[nn.Module]) -> str:
    """Name layers by their numbers, such as "layers 0-3, 5"."""
    spans: list[list[int]] = []
    numbers = sorted(block.attention.layer_idx for block in blocks)
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return f"layer{'s'[: len(numbers) - 1]} {', '.join('-'.join(map(str, span)) for span in spans)}"
