"""A checkpoint with full weights -> one in 4 or 8 bits, one weight file after the other.

`visualglm quantize` is the command.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.quantization import quantize_tensor, record
from visualglm_tools.checkpoints.cards import Card, describe_weights, read_origin
from visualglm_tools.checkpoints.files import Entry, expected_tensors, map_tensors
from visualglm_tools.checkpoints.prepared import (
    SPARE_BYTES,
    WEIGHT_FILE,
    Checkpoint,
    check_space,
    check_target,
    keep_generation_config,
    kept_entries,
    read_checkpoint,
    save_safetensors,
    write_description,
    write_json,
    written_whole,
)


Codes = dict[str, tuple[torch.Tensor, torch.Tensor]]  # and scales, by the key of the matrix


def plan(checkpoint: Checkpoint, bits: int, group_size: int | None, image_encoder: bool) -> dict[str, Entry]:
    """Write the quantization into the checkpoint's config; returns what its tensors will then be.

    Raises:
        ValueError: other bits, a group size that does not fit, a checkpoint that is quantized already.
    """
    config = checkpoint.config
    if config.quantization_bit:
        raise ValueError(
            f"The weights have {config.quantization_bit} bits already. Give the folder with the full weights."
        )
    for part in (config, config.text_config):
        part.tie_word_embeddings = checkpoint.is_tied
    record(config, bits, group_size, lm_head=False, image_encoder=image_encoder)
    return expected_tensors(config)


def quantize_shard(
    entries: dict[str, Entry], file: Path, planned: dict[str, Entry], config: VisualGLMConfig, codes: Codes
) -> dict:
    """Map one weight file and quantize what is planned, if there are no codes for it; the rest stays as it is."""
    mapped, tensors = map_tensors(file), {}
    for key in (key for key, entry in entries.items() if entry.file == file):
        if key in codes:
            tensors[key], tensors[f"{key}_scale"] = codes[key]
        elif f"{key}_scale" in planned:
            weight = mapped.pop(key)
            bits = 8 if planned[key].shape == weight.shape else 4
            group_size = config.quantization_group_size if bits == config.quantization_bit else None
            tensors[key], tensors[f"{key}_scale"] = quantize_tensor(weight, bits, group_size or -1)
        else:
            tensors[key] = mapped.pop(key).contiguous()
    return tensors


def write_shards(
    folder: Path, entries: dict[str, Entry], planned: dict[str, Entry], config: VisualGLMConfig, codes: Codes
) -> None:
    """Write one file for each file of the source."""
    files = list(dict.fromkeys(entry.file for entry in entries.values()))
    weight_map, total = {}, 0
    with tqdm(total=sum(entry.num_bytes for entry in entries.values()), unit="B", unit_scale=True) as progress:
        for number, file in enumerate(files, start=1):
            suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
            name = WEIGHT_FILE.format(suffix=suffix)
            progress.set_description(name)
            tensors = quantize_shard(entries, file, planned, config, codes)
            save_safetensors(folder / name, tensors)
            weight_map.update(dict.fromkeys(tensors, name))
            total += sum(tensor.nbytes for tensor in tensors.values())
            progress.update(sum(entry.num_bytes for entry in entries.values() if entry.file == file))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{WEIGHT_FILE.format(suffix='')}.index.json", index)


def planned_bytes(entries: dict[str, Entry], planned: dict[str, Entry]) -> int:
    """Size of the weights to be written; what is not quantized keeps its dtype."""
    scales = [f"{key}_scale" for key in entries if f"{key}_scale" in planned]
    kept = [planned[key] if f"{key}_scale" in planned else entry for key, entry in entries.items()]
    return sum(entry.num_bytes for entry in (*kept, *(planned[key] for key in scales)))


def quantize_checkpoint(
    source: Path,
    target: Path,
    bits: int,
    group_size: int | None = None,
    vocabulary: Path | None = None,
    choose_codes: Callable[[Checkpoint], Codes] | None = None,
    image_encoder: bool = False,
    command: str = "visualglm quantize",
) -> Checkpoint:
    """Quantize the checkpoint in `source` into the new folder `target`.

    Args:
        source: folder with full weights, an original's or a prepared one.
        target: folder to be; may exist if it is empty.
        bits: 4 or 8.
        group_size: columns that share a scale, for 4 bits; None for 64, -1 for one scale per row as in the original.
        vocabulary: an ice_text.model, or a folder that has it; `source` by default.
        choose_codes: gives codes and scales that are better than those of the weights alone; called when all checks
            have passed.
        image_encoder: quantize the image encoder too, to 8 bits.
        command: what the model card says of how this was done.

    Raises:
        ValueError: something is missing or damaged, does not belong together, or cannot be quantized so.
    """
    target = target.resolve()
    check_target(target)
    checkpoint = read_checkpoint(source, vocabulary)
    planned = plan(checkpoint, bits, group_size, image_encoder)
    entries = kept_entries(checkpoint)
    check_space(target, SPARE_BYTES + planned_bytes(entries, planned))
    codes = choose_codes(checkpoint) if choose_codes else {}
    with written_whole(target) as folder:
        write_shards(folder, entries, planned, checkpoint.config, codes)
        write_description(folder, checkpoint.config, checkpoint.tokenizer)
        keep_generation_config(source, folder)
        describe_quantized(source, target.name, checkpoint.config, entries, command).write(folder)
    return checkpoint


def describe_quantized(
    source: Path, name: str, config: VisualGLMConfig, entries: dict[str, Entry], command: str
) -> Card:
    """The card of a folder called `name` with the weights of `source` in low bits."""
    return Card(
        title=name,
        summary=f"A VisualGLM for transformers, quantized to {config.quantization_bit} bits.",
        origin=read_origin(source, config),
        command=command,
        weights=describe_weights(config, entries.values()),
        bits=config.quantization_bit,
        relation="quantized",
    )
