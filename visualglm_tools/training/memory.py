"""The GPU memory that training takes, computed: nothing is allocated, and no GPU is asked.

The model is built without weights, at full size, and run on shapes alone; what autograd would keep is counted. Not
counted: the CUDA context (about 0.5 GB), the allocator's gaps, and what mixed precision keeps in float32.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_hf.quantization import record
from visualglm_tools.training.adapters import add_adapter, lora_config


GIGABYTE = 1e9
DTYPE = torch.float16
BYTES_PER_TRAINED = 16  # float32: the parameter, its gradient, and two averages of AdamW
RANK, LAYERS, LENGTH = 10, (0, 14), 64 + 256  # the defaults
CASES = (  # name, bits (0: float16), batch size, checkpointing
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
    model = build(config, layers)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    activations = saved_bytes(model, batch_size, length)  # the same whatever the bits of the weights
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        outside = saved_bytes(model, batch_size, length)
        one_layer = (activations - outside) // text.num_hidden_layers
        inputs = text.num_hidden_layers * batch_size * length * text.hidden_size * DTYPE.itemsize
        activations = outside + inputs + one_layer
    # The gradients of the logits, in float32 and in float16; and one matrix that was in low bits.
    workspace = batch_size * length * text.vocab_size * (torch.float32.itemsize + DTYPE.itemsize)
    workspace += text.hidden_size * text.intermediate_size * DTYPE.itemsize if bits else 0
    return Memory(weight_bytes(config, bits), BYTES_PER_TRAINED * trained, activations, workspace)


def build(config: VisualGLMConfig, layers: Sequence[int] = ()) -> torch.nn.Module:
    """The model of shapes alone, with an adapter on `layers` if there are any, ready to train."""
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(config).to(DTYPE)
        model.tie_weights()
        return add_adapter(model, lora_config(RANK, layers)).train() if layers else model


def weight_bytes(config: VisualGLMConfig, bits: int) -> int:
    """Bytes of the weights, tied ones counted once."""
    config = copy.deepcopy(config)
    if bits:
        record(config, bits, None, lm_head=False)
    model = build(config)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def saved_bytes(model: torch.nn.Module, batch_size: int, length: int) -> int:
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
        model(inputs_embeds=inputs_embeds, position_ids=positions, labels=labels)
    return sum(kept)


def memory_table() -> str:
    """The table of the documentation, in Markdown, for VisualGLM-6B and the default lengths, rank and layers."""
    lines = [
        "| | batch | weights | adapter | activations | workspace | computed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, bits, batch_size, checkpointing in CASES:
        memory = estimate(VisualGLMConfig(), bits, batch_size, LENGTH, checkpointing, LAYERS)
        parts = (memory.weights, memory.adapter, memory.activations, memory.workspace, memory.total)
        cells = " | ".join(f"{part / GIGABYTE:.2f} GB" for part in parts)
        lines.append(f"| {name} | {batch_size} | {cells} |")
    return "\n".join(lines)
