"""The GPU memory that training takes, computed: nothing is allocated, and no GPU is asked.

The model is built without weights, at full size, and run on shapes alone; what autograd would keep is counted. Not
counted: the CUDA context (about 0.5 GB), the allocator's gaps, and what mixed precision keeps in float32.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps

import torch
from torch.autograd.graph import saved_tensors_hooks

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_hf.quantization import record
from visualglm_tools.training.adapters import add_adapter, lora_config
from visualglm_tools.training.keeping import TOKENS_AT_ONCE


GIGABYTE = 1e9
DTYPE = torch.float16
BYTES_PER_TRAINED = 16  # float32: the parameter, its gradient, and two averages of AdamW
RANK, LAYERS, ANSWER_LENGTH, LENGTH = 10, (0, 14), 256, 64 + 256  # the defaults
CASES = (  # name, bits (0: float16), batch size and as many kept rows beside it, checkpointing
    ("LoRA", 0, 4, False),
    ("LoRA, `--checkpoint-activations`", 0, 4, True),
    ("QLoRA, 8 bits", 8, 1, False),
    ("QLoRA, 8 bits, `--checkpoint-activations`", 8, 1, True),
    ("QLoRA, 4 bits", 4, 1, False),
    ("QLoRA, 4 bits, `--checkpoint-activations`", 4, 1, True),
)


@dataclass(frozen=True)
class Memory:
    """Bytes of the parts: `workspace` lives only for a moment of the step."""

    weights: int
    adapter: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.workspace


def once(compute: Callable[..., int]) -> Callable[..., int]:
    """Compute once for equal configurations and other arguments: to build a full-size model takes a while."""
    known: dict[str, int] = {}

    @wraps(compute)
    def recall(config: VisualGLMConfig, *arguments, **named) -> int:
        key = repr((config.to_json_string(), arguments, named))
        if key not in known:
            known[key] = compute(config, *arguments, **named)
        return known[key]

    return recall


def estimate(
    config: VisualGLMConfig, bits: int, batch_size: int, length: int, checkpointing: bool, layers: Sequence[int]
) -> Memory:
    """Compute the memory of one training step with LoRA.

    Args:
        config: of the model.
        bits: 4 or 8, 0 for float16.
        batch_size, length: B and S.
        checkpointing: keep only the input of each layer, and compute the rest again.
        layers: with an adapter.
    """
    text = config.text_config
    activations = count_activations(config, learn, batch_size, length, checkpointing, layers)
    # The gradients of the logits, in float32 and in float16.
    workspace = batch_size * length * text.vocab_size * (torch.float32.itemsize + DTYPE.itemsize)
    return with_weights(config, bits, layers, activations, workspace)


def estimate_kept(
    config: VisualGLMConfig, bits: int, rows: int, length: int, checkpointing: bool, layers: Sequence[int]
) -> Memory:
    """Compute the memory of what keeps answers in a training step; it comes after the rest, so the larger counts.

    Args:
        config, bits, length, checkpointing, layers: see `estimate`.
        rows: whose answers are kept.
    """
    vocab_size = config.text_config.vocab_size
    activations = count_activations(config, keep, rows, length, checkpointing, layers)
    # Of the answers' tokens the logits, what was predicted, and gradients, before and after they are put together; of
    # all tokens the gradients; of a few tokens logarithms, what was predicted, and the gradients of both in float32.
    tokens = 4 * rows * min(length, ANSWER_LENGTH) + rows * length
    workspace = vocab_size * (tokens * DTYPE.itemsize + 4 * TOKENS_AT_ONCE * torch.float32.itemsize)
    return with_weights(config, bits, layers, activations, workspace)


def with_weights(config: VisualGLMConfig, bits: int, layers: Sequence[int], activations: int, workspace: int) -> Memory:
    one_matrix = config.text_config.hidden_size * config.text_config.intermediate_size * DTYPE.itemsize  # in full
    workspace += one_matrix if bits else 0
    return Memory(weight_bytes(config, bits), BYTES_PER_TRAINED * count_trained(config, layers), activations, workspace)


@once
def count_trained(config: VisualGLMConfig, layers: Sequence[int]) -> int:
    """Numbers in an adapter on `layers`."""
    return sum(parameter.numel() for parameter in build(config, layers).parameters() if parameter.requires_grad)


@once
def count_activations(
    config: VisualGLMConfig,
    propagate: Callable,
    batch_size: int,
    length: int,
    checkpointing: bool,
    layers: Sequence[int],
) -> int:
    """Bytes that are kept from a forward pass to its backward pass; the same whatever the bits of the weights."""
    model = build(config, layers)
    if not checkpointing:
        return saved_bytes(model, propagate, batch_size, length)
    activations = count_activations(config, propagate, batch_size, length, False, layers)
    text = config.text_config
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    outside = saved_bytes(model, propagate, batch_size, length)
    one_layer = (activations - outside) // text.num_hidden_layers
    inputs = text.num_hidden_layers * batch_size * length * text.hidden_size * DTYPE.itemsize
    return outside + inputs + one_layer


def learn(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
    model(**inputs, labels=labels)


def keep(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
    model(**inputs)  # the divergence is computed again


def build(config: VisualGLMConfig, layers: Sequence[int] = ()) -> torch.nn.Module:
    """The model of shapes alone, with an adapter on `layers` if there are any, ready to train."""
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(config).to(DTYPE)
        model.tie_weights()
        return add_adapter(model, lora_config(RANK, layers)).train() if layers else model


@once
def weight_bytes(config: VisualGLMConfig, bits: int) -> int:
    """Bytes of the weights, tied ones counted once."""
    config = copy.deepcopy(config)
    if bits:
        record(config, bits, None, lm_head=False)
    model = build(config)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def saved_bytes(model: torch.nn.Module, propagate: Callable, batch_size: int, length: int) -> int:
    """Bytes that autograd keeps between forward and backward; weights, and what is computed again, do not count."""
    config = model.config.get_text_config()
    weights = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
    seen = {id(storage): storage for storage in weights}
    kept = []

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage  # keeps it alive, and its id its own
            kept.append(storage.nbytes())
        return tensor

    inputs_embeds = torch.empty(batch_size, length, config.hidden_size, dtype=DTYPE, device="meta")
    positions = torch.empty(batch_size, 2, length, dtype=torch.long, device="meta")
    labels = torch.empty(batch_size, length, dtype=torch.long, device="meta")
    with saved_tensors_hooks(see, lambda tensor: tensor):
        propagate(model, {"inputs_embeds": inputs_embeds, "position_ids": positions}, labels)
    return sum(kept)


def memory_table() -> str:
    """The table of the documentation, in Markdown, for VisualGLM-6B and the default lengths, rank and layers."""
    lines = [
        "| | batch | weights | adapter | activations | workspace | computed | with kept rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, bits, batch_size, checkpointing in CASES:
        memory, kept = (
            compute(VisualGLMConfig(), bits, batch_size, LENGTH, checkpointing, LAYERS)
            for compute in (estimate, estimate_kept)
        )
        parts = (memory.weights, memory.adapter, memory.activations, memory.workspace, memory.total)
        cells = " | ".join(f"{part / GIGABYTE:.2f} GB" for part in parts)
        most = max(memory.total, kept.total) / GIGABYTE
        lines.append(f"| {name} | {batch_size} | {cells} | {most:.2f} GB |")
    return "\n".join(lines)
