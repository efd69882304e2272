"""The memory that training takes, computed: nothing is allocated, and no GPU is asked.

The model is built without weights, at its size, and run on shapes alone; what autograd would keep is counted. Not
counted: the CUDA context (about 0.5 GB), the allocator's gaps, what mixed precision keeps in float32, and what adapters
of the image encoder keep.

Not here: which options take less of it (`remedies.py`).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig
from torch.autograd.graph import saved_tensors_hooks

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_hf.quantization import record
from visualglm_tools.training.adapters import add_adapter, lora_config
from visualglm_tools.training.keeping import TOKENS_AT_ONCE


MEGABYTE, GIGABYTE = 1e6, 1e9
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


@dataclass(frozen=True)
class Step:
    """What there is to hold in a training step.

    Attributes:
        adapter: as PEFT describes it.
        rows, length: B and S of a micro-batch.
        kept_rows: whose answers are kept beside it.
        answer_length: tokens of the longest of these answers.
        bits: 4 or 8; 0 for weights in `dtype`.
        checkpointing: keep only the input of each layer, and compute the rest again.
        dtype: of what has no few bits.
        kept_length: S of the kept rows; None: as `length`.
    """

    adapter: PeftConfig
    rows: int
    length: int = LENGTH
    kept_rows: int = 0
    answer_length: int = ANSWER_LENGTH
    bits: int = 0
    checkpointing: bool = False
    dtype: torch.dtype = DTYPE
    kept_length: int | None = None


def default_step(bits: int, rows: int, checkpointing: bool) -> Step:
    """With LoRA of the default rank on the default layers, and as many kept rows as others."""
    return Step(lora_config(RANK, LAYERS), rows, kept_rows=rows, bits=bits, checkpointing=checkpointing)


def estimate(config: VisualGLMConfig, step: Step) -> Memory:
    """Compute what it takes to learn the rows of a step."""
    return memory_of(config, step, [learning])


def estimate_kept(config: VisualGLMConfig, step: Step) -> Memory:
    """Compute what it takes to keep answers in a step; it comes after the rest, so the larger counts."""
    return memory_of(config, step, [keeping])


def estimate_most(config: VisualGLMConfig, step: Step) -> Memory:
    """Compute what a step takes, kept rows and all."""
    return memory_of(config, step, [learning, keeping] if step.kept_rows else [learning])


def memory_of(config: VisualGLMConfig, step: Step, parts: Sequence[Callable]) -> Memory:
    """The memory of the largest part of a step."""
    model = build(in_full(config), step.dtype, step.adapter)
    activations, workspace = max((part(model, config, step) for part in parts), key=sum)
    text = config.text_config
    workspace += text.hidden_size * text.intermediate_size * step.dtype.itemsize if step.bits else 0  # a matrix in full
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Memory(weight_bytes(config, step.bits, step.dtype), BYTES_PER_TRAINED * trained, activations, workspace)


def learning(model: torch.nn.Module, config: VisualGLMConfig, step: Step) -> tuple[int, int]:
    """Bytes of activations, and of workspace."""
    # The gradients of the logits, in float32 and as they are.
    bytes_per_logit = torch.float32.itemsize + step.dtype.itemsize
    workspace = step.rows * step.length * config.text_config.vocab_size * bytes_per_logit
    return count_activations(model, config, step, learn, (step.rows, step.length)), workspace


def keeping(model: torch.nn.Module, config: VisualGLMConfig, step: Step) -> tuple[int, int]:
    """Bytes of activations, and of workspace."""
    # Of the answers' tokens the logits, what was predicted, and gradients, before and after they are put together; of
    # all tokens the gradients; of a few tokens logarithms, what was predicted, and the gradients of both in float32.
    length = step.kept_length or step.length
    tokens = 4 * step.kept_rows * min(length, step.answer_length) + step.kept_rows * length
    of_few = 4 * TOKENS_AT_ONCE * torch.float32.itemsize
    workspace = config.text_config.vocab_size * (tokens * step.dtype.itemsize + of_few)
    return count_activations(model, config, step, keep, (step.kept_rows, length)), workspace


def count_activations(
    model: torch.nn.Module, config: VisualGLMConfig, step: Step, propagate: Callable, shape: tuple[int, int]
) -> int:
    """Bytes that are kept from a forward pass of [B, S] to its backward pass; the same whatever the weights' bits."""
    rows, length = shape
    activations = saved_bytes(model, propagate, rows, length)
    if not step.checkpointing:
        return activations
    text = config.text_config
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    outside = saved_bytes(model, propagate, rows, length)
    model.gradient_checkpointing_disable()
    one_layer = (activations - outside) // text.num_hidden_layers
    inputs = text.num_hidden_layers * rows * length * text.hidden_size * step.dtype.itemsize
    return outside + inputs + one_layer


def learn(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
    model(**inputs, labels=labels)


def keep(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
    model(**inputs)  # the divergence is computed again


def build(config: VisualGLMConfig, dtype: torch.dtype = DTYPE, adapter: PeftConfig | None = None) -> torch.nn.Module:
    """The model of shapes alone, with an adapter if there is one, ready to train."""
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(config).to(dtype)
        model.tie_weights()
        return add_adapter(model, adapter).train() if adapter else model


def weight_bytes(config: VisualGLMConfig, bits: int, dtype: torch.dtype = DTYPE) -> int:
    """Bytes of the weights, tied ones counted once."""
    if config.quantization_bit != bits:
        config = in_full(config)
        if bits:
            record(config, bits, None, lm_head=False)
    model = build(config, dtype)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def in_full(config: VisualGLMConfig) -> VisualGLMConfig:
    """The config of the same model without low bits."""
    config = copy.deepcopy(config)
    config.quantization_bit, config.quantization_group_size = 0, None
    config.quantization_lm_head = config.quantization_image_encoder = False
    return config


def saved_bytes(model: torch.nn.Module, propagate: Callable, rows: int, length: int) -> int:
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

    dtype = model.get_input_embeddings().weight.dtype
    inputs_embeds = torch.empty(rows, length, config.hidden_size, dtype=dtype, device="meta")
    positions = torch.empty(rows, 2, length, dtype=torch.long, device="meta")
    labels = torch.empty(rows, length, dtype=torch.long, device="meta")
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
        step = default_step(bits, batch_size, checkpointing)
        memory, kept = (compute(VisualGLMConfig(), step) for compute in (estimate, estimate_kept))
        parts = (memory.weights, memory.adapter, memory.activations, memory.workspace, memory.total)
        cells = " | ".join(f"{part / GIGABYTE:.2f} GB" for part in parts)
        most = max(memory.total, kept.total) / GIGABYTE
        lines.append(f"| {name} | {batch_size} | {cells} | {most:.2f} GB |")
    return "\n".join(lines)


def in_words(num_bytes: float) -> str:
    """Bytes as people read them: "7.07 GB", "12 MB"."""
    return f"{num_bytes / GIGABYTE:.2f} GB" if num_bytes >= GIGABYTE / 10 else f"{num_bytes / MEGABYTE:.0f} MB"
