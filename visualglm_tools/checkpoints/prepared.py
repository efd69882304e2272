"""A prepared folder: what belongs in it, and how it appears whole or not at all.

Shared by the doors that write one. `files.py` reads and checks what they start from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.image_processing_visualglm import VisualGLMImageProcessor
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_hf.processing_visualglm import VisualGLMProcessor
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer
from visualglm_tools.checkpoints.files import (
    IGNORED,
    LM_HEAD,
    VOCABULARY_FILE,
    Entry,
    Weights,
    are_tied,
    check_tensors,
    check_vocabulary,
    find_weights,
    read_config,
    read_tensors,
    read_tokenizer,
    survey,
)
from visualglm_tools.checkpoints.folder import check_new, check_source
from visualglm_tools.checkpoints.manifest import write_manifest
from visualglm_tools.checkpoints.picture_size import image_size_of


MODEL = "modeling_visualglm.VisualGLMForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_visualglm.VisualGLMConfig",
    "AutoModel": MODEL,  # with its head, as in the original
    "AutoModelForCausalLM": MODEL,
    "AutoModelForImageTextToText": MODEL,
    "AutoModelForMultimodalLM": MODEL,
    "AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None],
    "AutoImageProcessor": "image_processing_visualglm.VisualGLMImageProcessor",
    "AutoProcessor": "processing_visualglm.VisualGLMProcessor",
}
MAX_SHARD_SIZE = "5GB"
CONFIG_FILE = "config.json"  # without it, a folder holds no checkpoint
GENERATION_FILE = "generation_config.json"
WEIGHT_FILE = "model{suffix}.safetensors"
SPARE_BYTES = 16 * 1024**2  # for everything that is no weight


@dataclass(frozen=True)
class Checkpoint:
    """A source that has passed all checks."""

    config: VisualGLMConfig
    tokenizer: ChatGLMTokenizer
    weights: Weights
    entries: dict[str, Entry]
    is_tied: bool


def read_checkpoint(source: Path, vocabulary: Path | None = None) -> Checkpoint:
    """Read all of a Hugging Face folder but its weights, and check that the parts belong together."""
    check_source(source, "the original checkpoint")
    config = read_config(source)
    if vocabulary is None and not (source / VOCABULARY_FILE).is_file():
        raise ValueError(
            f"{source} has no {VOCABULARY_FILE}. Name it, or a folder that has it, with --tokenizer FOLDER_OR_FILE."
        )
    tokenizer = read_tokenizer(vocabulary or source)
    check_vocabulary(tokenizer, config)
    weights = find_weights(source)
    entries = survey(weights)
    check_tensors(entries, config)
    return Checkpoint(config, tokenizer, weights, entries, are_tied(entries))


def check_target(target: Path) -> None:
    """Raise a `ValueError` if there is something already, or nothing can be."""
    check_new(target)
    for place in (nearest(target), nearest(target.parent)):
        try:
            os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=place))
        except OSError as error:
            raise ValueError(
                f"{target} cannot be written: {place} takes no new folder ({error.strerror}). Name another place."
            ) from error


def nearest(target: Path) -> Path:
    """What there is of a path: itself, or the folder in which it would be made."""
    return next(folder for folder in (target, *target.parents) if folder.exists())


def check_space(target: Path, num_bytes: int, remedy: str = "Make room or take another disk.") -> None:
    """Raise a `ValueError` if the disk cannot take `num_bytes` more."""
    free = shutil.disk_usage(nearest(target)).free
    if free < num_bytes:
        raise ValueError(f"{target} needs {num_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left. {remedy}")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder that becomes `target`, with its manifest, if the block succeeds, and disappears if it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    unfinished.mkdir()
    try:
        yield unfinished
        write_manifest(unfinished)
        if target.exists():  # empty, see check_target; a shell may stand in it
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == CONFIG_FILE):
                file.rename(target / file.name)
        else:
            unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def kept_entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    """The tensors worth writing: not the original's unread buffers, and one tensor for two that are tied."""
    return {
        key: entry
        for key, entry in checkpoint.entries.items()
        if not IGNORED.search(key) and not (checkpoint.is_tied and key == LM_HEAD)
    }


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors to a file as readable as any new one."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors leaves it readable to its owner alone


def total_bytes(entries: dict[str, Entry]) -> int:
    return sum(entry.num_bytes for entry in entries.values())


def write_weights(folder: Path, entries: dict[str, Entry], max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write safetensors shards; at most one of them is in memory at a time."""
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.num_bytes,
        filename_pattern=WEIGHT_FILE,
        max_shard_size=max_shard_size,
    )
    total = total_bytes(entries)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for name, keys in split.filename_to_tensors.items():
            tensors = read_tensors({key: entries[key] for key in keys})
            save_safetensors(folder / name, {key: tensor.contiguous() for key, tensor in tensors.items()})
            progress.update(sum(entries[key].num_bytes for key in keys))
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / f"{WEIGHT_FILE.format(suffix='')}.index.json", index)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def keep_generation_config(source: Path, folder: Path) -> None:
    """Take the source's defaults of `generate` over, where it has any."""
    if (source / GENERATION_FILE).is_file():
        GenerationConfig.from_pretrained(source)  # only a readable one is worth keeping
        shutil.copyfile(source / GENERATION_FILE, folder / GENERATION_FILE)


def write_description(folder: Path, config: VisualGLMConfig, tokenizer: ChatGLMTokenizer) -> None:
    """Write everything but the weights: code, configuration, token ids, tokenizer, processor."""
    # Makes `save_pretrained` write the auto_map and copy the code with all that it imports.
    for cls in (VisualGLMConfig, ChatGLMTokenizer, VisualGLMImageProcessor, VisualGLMProcessor):
        cls.register_for_auto_class()
    custom_object_save(VisualGLMForConditionalGeneration, folder)

    config.architectures = [VisualGLMForConditionalGeneration.__name__]
    config.auto_map = dict(AUTO_MAP)
    config.save_pretrained(folder)
    text = config.text_config
    token_ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # No sampling defaults: the original's generate() was greedy, and its chat() brings its own.
    GenerationConfig(**token_ids).save_pretrained(folder)

    image_size = image_size_of(config)
    image_processor = VisualGLMImageProcessor(size={"height": image_size, "width": image_size})
    processor = VisualGLMProcessor(image_processor, tokenizer, num_query_tokens=config.qformer_config.num_query_tokens)
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)  # the preprocessor_config.json, which the processor does without
