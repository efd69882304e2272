"""An adapter and the weights it was trained on -> a checkpoint of its own.

`visualglm merge` is the command; `adapters.py` knows adapters, `prepared.py` what is written.
"""

import warnings
from pathlib import Path

import torch

from visualglm_hf.adapters import check_plain, is_tied, record_untied
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_hf.quantization import check_mergeable
from visualglm_tools.checkpoints.adapters import load_adapter, note_merged
from visualglm_tools.checkpoints.cards import Card, describe_weights, read_origin
from visualglm_tools.checkpoints.files import LM_HEAD, Entry, read_tensors
from visualglm_tools.checkpoints.folder import read_adapter_config
from visualglm_tools.checkpoints.prepared import (
    SPARE_BYTES,
    Checkpoint,
    check_space,
    check_target,
    keep_generation_config,
    kept_entries,
    read_checkpoint,
    total_bytes,
    write_description,
    write_weights,
    written_whole,
)


def map_model(checkpoint: Checkpoint) -> VisualGLMForConditionalGeneration:
    """The model with its weights mapped from their files, which takes no memory until they are used.

    Raises:
        ValueError: the weights are quantized.
    """
    config = checkpoint.config
    for part in (config, config.text_config):
        part.tie_word_embeddings = checkpoint.is_tied
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(config)
    check_mergeable(model)
    weights = read_tensors(kept_entries(checkpoint))
    if checkpoint.is_tied:
        weights[LM_HEAD] = weights["transformer.word_embeddings.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def fold(adapted: torch.nn.Module) -> VisualGLMForConditionalGeneration:
    """Fold the layers of an adapter into those below them, each in float32 and rounded once.

    Raises:
        ValueError: the result has NaN or infinite numbers, or PEFT cannot fold such an adapter.
    """
    from peft import PeftModel

    if not isinstance(adapted, PeftModel):
        return adapted  # with a prefix, which has its own place in the model
    kind = adapted.active_peft_config.peft_type.value
    if adapted.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{kind} trains tokens before the prompt, for which weights have no place. Keep the adapter as it is."
        )
    try:
        return fold_layers(adapted)
    except NotImplementedError as error:
        raise ValueError(f"PEFT cannot fold {kind} into weights. Keep the adapter as it is.") from error


def fold_layers(adapted: torch.nn.Module) -> VisualGLMForConditionalGeneration:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in (module for module in adapted.modules() if isinstance(module, BaseTunerLayer)):
        weight = layer.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)
    return adapted.merge_and_unload()  # what is merged stays so; whole layers that were trained take their places


def merge(
    base: Path, adapter: Path, target: Path, vocabulary: Path | None = None, command: str = "visualglm merge"
) -> None:
    """Fold `adapter` into the weights of `base` and write them into the new folder `target`.

    Args:
        base: folder with full weights, an original's or a prepared one.
        adapter: folder of the adapter, with PEFT's adapter_config.json and adapter_model.safetensors.
        target: folder to be; may exist if it is empty.
        vocabulary: an ice_text.model, or a folder that has it; `base` by default.
        command: what the model card says of how this was done.

    Raises:
        ValueError: something is missing or damaged, the weights are quantized, the adapter is another model's or
            is in them already, or PEFT is not installed; nothing was written.
    """
    target = target.resolve()
    check_target(target)
    checkpoint = read_checkpoint(base, vocabulary)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks; what matters of them is an error here
        model = fold(load_adapter(map_model(checkpoint), adapter))
    check_plain(model)
    note_merged(adapter, model)
    if not is_tied(model):  # the adapter may have untied them
        record_untied(model)
    entries = {
        key: Entry(tuple(tensor.shape), tensor.dtype, compute=tensor.detach)
        for key, tensor in model.state_dict().items()
        if not (is_tied(model) and key == LM_HEAD)
    }
    check_space(target, SPARE_BYTES + total_bytes(entries))
    with written_whole(target) as folder:
        write_weights(folder, entries)
        write_description(folder, model.config, checkpoint.tokenizer)
        keep_generation_config(base, folder)
        card = Card(
            title=target.name,
            summary=f"A VisualGLM for transformers, with the adapter `{adapter.resolve().name}` "
            f"({read_adapter_config(adapter).get('peft_type')}) merged into its weights.",
            origin=read_origin(base, model.config),
            command=command,
            weights=describe_weights(model.config, entries.values()),
            relation="finetune",
        )
        card.write(folder)
