"""What is trained: the base model, full or in low bits, and PEFT's LoRA or prefix on it.

Not here: loading checkpoints and trained adapters (`visualglm_tools/checkpoints`), data, and how training goes
(`run.py`).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_tools.checkpoints.loading import load_weights
from visualglm_tools.training.settings import Settings


DECODER_LINEARS = "query_key_value|dense"  # as in the original; the MLP stays as it is
QFORMER_LINEARS = "query_key_value|dense|query|key_value"


def choose_adapter(settings: Settings, config: VisualGLMConfig) -> PeftConfig:
    """PEFT's description of what is trained; a `ValueError` for a rank, layer or length that cannot be."""
    if settings.method == "ptuning":
        return prefix_config(settings.pre_seq_len, config)
    layers = resolve_layers(settings.layer_range, config.text_config.num_hidden_layers)
    return lora_config(
        settings.lora_rank,
        layers,
        settings.lora_alpha,
        settings.lora_dropout,
        settings.train_qformer,
        settings.train_projection,
    )


def choose_bits(settings: Settings, config: VisualGLMConfig) -> int | None:
    """The bits to quantize to while loading; None for a checkpoint that has few already.

    Raises:
        ValueError: other bits are asked for than the checkpoint has.
    """
    if settings.method != "qlora":
        return None
    found = config.quantization_bit
    if found and (settings.bits not in (None, found) or settings.qlora_backend != "lowbit"):
        raise ValueError(
            f"{str(settings.model)!r} has {found} bits already, of this package. Leave --bits and --qlora_backend out, "
            "or give the folder with the full weights as --model."
        )
    return None if found else settings.bits or 4


def dtype_of(precision: str) -> torch.dtype:
    return getattr(torch, precision)


def load_base(
    folder: Path, dtype: torch.dtype, bits: int | None = None, backend: str = "lowbit"
) -> VisualGLMForConditionalGeneration:
    """Load the model to train on; arguments and errors are those of `load_weights`."""
    model = load_weights(folder, dtype, bits, backend)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In its first evaluation on a CPU, bitsandbytes packs the codes in a way that it cannot train with.
            module.support_avx512bf16_for_cpu = False
    return model


def resolve_layers(layer_range: Sequence[str], num_layers: int) -> list[int]:
    """The indices of the layers to adapt, in order.

    Args:
        layer_range: indices as in SwissArmyTransformer (`0 14` are two layers, no range), or the one word "all".
        num_layers: of the decoder.

    Raises:
        ValueError: something that is no index of a layer.
    """
    if list(layer_range) == ["all"]:
        return list(range(num_layers))
    if "all" in layer_range:
        raise ValueError(f"--layer_range {' '.join(layer_range)}: give indices of layers, or the one word 'all'.")
    for text in layer_range:
        if not text.isascii() or not text.isdigit() or int(text) >= num_layers:
            raise ValueError(
                f"--layer_range {' '.join(layer_range)}: there is no layer {text!r}, the decoder has layers 0 to "
                f"{num_layers - 1}. Give indices of layers, or 'all'."
            )
    return sorted({int(text) for text in layer_range})


def lora_config(
    rank: int,
    layers: Sequence[int],
    alpha: float = 1,
    dropout: float = 0.0,
    train_qformer: bool = False,
    train_projection: bool = False,
) -> LoraConfig:
    """LoRA on the attention of some layers of the decoder; of the image encoder only what is asked for.

    The pattern is matched against whole names: `query_key_value` alone would adapt the ViT and the Q-Former too.

    Args:
        rank: r, at least 1.
        layers: indices of decoder layers.
        alpha: the product of the two matrices is scaled by alpha / r. The original has 1.
        dropout: on the input of the adapter.
        train_qformer: adapt the attention of the Q-Former too.
        train_projection: adapt the projection to the decoder too.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"--lora_rank must be 1 or more, found {rank}.")
    numbers = "|".join(map(str, layers))
    targets = [rf"transformer\.layers\.({numbers})\.attention\.({DECODER_LINEARS})"]
    if train_qformer:
        targets.append(rf"image_encoder\.qformer\..*attention\.({QFORMER_LINEARS})")
    if train_projection:
        targets.append(r"image_encoder\.glm_proj")
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(targets),
    )


def prefix_config(pre_seq_len: int, config: VisualGLMConfig) -> PrefixTuningConfig:
    """P-tuning v2: `pre_seq_len` trained keys and values before those of the prompt, in each layer of the decoder."""
    if pre_seq_len < 1:
        raise ValueError(f"--pre_seq_len must be 1 or more, found {pre_seq_len}.")
    text = config.text_config
    return PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=pre_seq_len,
        token_dim=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_transformer_submodules=1,
    )


def add_adapter(model: VisualGLMForConditionalGeneration, adapter: PeftConfig) -> PeftModel:
    """Freeze the model and put an untrained adapter on it, in float32 whatever the model's own dtype."""
    adapted = get_peft_model(model, adapter)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def count_targets(model: PeftModel) -> dict[str, int]:
    """How many matrices are adapted in each part of the model."""
    found = [name for name, _ in model.named_modules() if re.search(r"lora_A$", name)]
    parts = {"decoder": r"\.transformer\.layers", "Q-Former": r"qformer", "projection": r"glm_proj", "ViT": r"\.vit\."}
    return {
        part: sum(bool(re.search(pattern, name)) for name in found if part != "decoder" or "image_encoder" not in name)
        for part, pattern in parts.items()
    }
