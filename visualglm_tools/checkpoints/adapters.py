"""A PEFT adapter's folder: whether it is one, whether it belongs to a model, and putting it on.

Beside PEFT's own two files there may be `base_model.json` with a few numbers of the model that the adapter was trained
on. Shapes alone do not tell two models apart; these do, whatever the number format or the quantization.
Not here: what else may stand beside it, the size of its pictures (`picture_size.py`).
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from visualglm_hf.modeling_visualglm import VisualGLMPrefixEncoder
from visualglm_tools.checkpoints.folder import ADAPTER_WEIGHT_FILE, quieten_peft, read_adapter_config, read_object
from visualglm_tools.checkpoints.manifest import sha256_of
from visualglm_tools.checkpoints.picture_size import adopt_image_size
from visualglm_tools.packages import missing
from visualglm_tools.printing import first_line


BASE_FILE = "base_model.json"
SAMPLES = 8  # numbers of each tensor
MERGED = "merged_adapters"  # in a config: digests of the adapters that are in the weights
TOLERANCE = 0.02  # of the largest sample: two roundings to bfloat16


def fingerprint(model: PreTrainedModel) -> dict[str, list[float]]:
    """A few numbers by which to know a base model again: of tensors that neither adapters nor quantization change."""
    tensors = {
        "transformer.word_embeddings.weight": model.get_input_embeddings().weight,
        "transformer.final_layernorm.weight": model.get_decoder().final_layernorm.weight,
        "image_encoder.qformer.transformer.word_embeddings.weight": model.image_encoder.qformer.transformer[
            "word_embeddings"
        ].weight,
    }
    return {name: sample(tensor) for name, tensor in tensors.items()}


def sample(tensor: torch.Tensor) -> list[float]:
    """Numbers from all over a tensor."""
    flat = tensor.detach().flatten()
    return [round(value, 5) for value in flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().tolist()]


def write_fingerprint(folder: Path, samples: dict[str, list[float]]) -> None:
    (folder / BASE_FILE).write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")


def check_fingerprint(folder: Path, model: PreTrainedModel) -> None:
    """Raise a `ValueError` if the adapter says that it was trained on another model; not all adapters say so."""
    if not (folder / BASE_FILE).is_file():
        return
    expected, found = read_object(folder / BASE_FILE), fingerprint(model)
    for name, values in found.items():
        wanted = expected.get(name, [])
        limit = TOLERANCE * max(map(abs, values), default=0)
        if len(wanted) != len(values) or any(abs(a - b) > limit for a, b in zip(wanted, values, strict=True)):
            raise ValueError(
                f"The adapter in {str(folder)!r} was trained on another base model: {name} differs. Give the folder "
                f"that it was trained on, which was {read_adapter_config(folder).get('base_model_name_or_path')!r}."
            )


def digest_of(folder: Path) -> str:
    """By which an adapter's weights are known again, whatever they have changed."""
    return sha256_of(folder / ADAPTER_WEIGHT_FILE)


def check_not_merged(folder: Path, model: PreTrainedModel) -> None:
    """Raise a `ValueError` if the model's weights have the adapter in them already, as `visualglm merge` notes."""
    if digest_of(folder) in getattr(model.config, MERGED, ()):
        raise ValueError(
            f"The adapter in {str(folder)!r} is merged into these weights already, and would count twice. Take them as "
            f"they are, or give the folder that it was trained on, which was "
            f"{read_adapter_config(folder).get('base_model_name_or_path')!r}."
        )


def note_merged(folder: Path, model: PreTrainedModel) -> None:
    """Note in a model's config that the adapter is in its weights."""
    setattr(model.config, MERGED, [*getattr(model.config, MERGED, ()), digest_of(folder)])


def attach_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put an adapter on a model, for answering.

    Args:
        model: the base model that the adapter was trained on, quantized or not.
        folder: with `adapter_config.json` and `adapter_model.safetensors`, of LoRA or prefix tuning.

    Returns:
        The same model, whose `chat`, `stream_chat` and `generate` now use the adapter.

    Raises:
        ValueError: no adapter there, a damaged one, one of another base model, or one that is merged into the weights
            already; PEFT is not installed.
    """
    load_adapter(model, Path(folder).expanduser())
    return model.eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Put an adapter on a model as `attach_adapter` does; returns PEFT's model around it, or for a prefix the model."""
    config = read_adapter_config(folder)
    check_fingerprint(folder, model)
    check_not_merged(folder, model)
    adopt_image_size(folder, model)
    attach = attach_prefix if config.get("peft_type") == "PREFIX_TUNING" else attach_layers
    try:
        return attach(model, folder)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"The adapter in {str(folder)!r} does not fit this model: {first_line(error)}") from error


def attach_prefix(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Give the prefix that PEFT has trained to the model's own prefix encoder, which all of `generate` knows."""
    table = load_file(folder / ADAPTER_WEIGHT_FILE)["prompt_embeddings"]
    config = model.config.get_text_config()
    config.pre_seq_len, config.prefix_projection = len(table), False
    encoder = VisualGLMPrefixEncoder(config).to(model.device, torch.float32)
    encoder.embedding.load_state_dict({"weight": table})
    model.get_decoder().prefix_encoder = encoder
    return model


def attach_layers(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Let PEFT put additions beside the model's layers; a `ValueError` if not all of them find their place.

    Returns:
        PEFT's model around `model`.
    """
    quieten_peft()
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(missing("peft", "train")) from error
    with safe_open(folder / ADAPTER_WEIGHT_FILE, framework="pt") as file:
        stored = set(file.keys())
    adapted = PeftModel.from_pretrained(model, folder)
    # PEFT may save the weights below an adapter of the head, too.
    differing = sorted(key for key in stored ^ set(get_peft_model_state_dict(adapted)) if ".base_layer." not in key)
    if differing:
        raise ValueError(f"{differing[0]} and {len(differing) - 1} more are in the adapter or in the model alone")
    return adapted
