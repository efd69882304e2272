#!/usr/bin/env python
"""Prepare a checkpoint of the original VisualGLM-6B for today's transformers.

    python scripts/convert_checkpoint.py SRC DST

SRC is the original folder: config.json, ice_text.model and the weights, .bin or .safetensors, sharded or not. DST will
be a folder that loads with `trust_remote_code=True`: our code, configuration, tokenizer, processor, and the weights as
safetensors, or, with --link, SRC's own weight files without a copy. Everything is checked before anything is written,
weights are written shard by shard, and DST appears when it is complete or not at all.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from checkpoint_files import (
    IGNORED,
    LM_HEAD,
    VOCABULARY_FILE,
    Entry,
    Weights,
    are_tied,
    check_tensors,
    check_vocabulary,
    find_weights,
    map_tensors,
    read_config,
    read_tokenizer,
    survey,
)
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.image_processing_visualglm import VisualGLMImageProcessor
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_hf.processing_visualglm import VisualGLMProcessor
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer


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
WEIGHT_FILE = "model{suffix}.safetensors"
MAX_SHARD_SIZE = "5GB"
SHARD_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]?B", re.IGNORECASE)
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
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give the folder of the original checkpoint.")
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
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder. Name a new one; nothing is overwritten.")


def check_space(target: Path, num_bytes: int) -> None:
    """Raise a `ValueError` if the disk cannot take `num_bytes` more."""
    place = next(folder for folder in (target, *target.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ValueError(
            f"{target} needs {num_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left. Make room, take another "
            "disk, or use --link, which copies no weights."
        )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` if the block succeeds and disappears if it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    unfinished.mkdir()
    try:
        yield unfinished
        if target.exists():
            target.rmdir()  # empty, see check_target
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


def write_weights(folder: Path, entries: dict[str, Entry], max_shard_size: str) -> None:
    """Write safetensors shards; at most one of them is in memory at a time."""
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.num_bytes,
        filename_pattern=WEIGHT_FILE,
        max_shard_size=max_shard_size,
    )
    total = sum(entry.num_bytes for entry in entries.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for name, keys in split.filename_to_tensors.items():
            write_shard(folder / name, {key: entries[key] for key in keys})
            progress.update(sum(entries[key].num_bytes for key in keys))
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / f"{WEIGHT_FILE.format(suffix='')}.index.json", index)


def write_shard(path: Path, entries: dict[str, Entry]) -> None:
    tensors = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        mapped = map_tensors(file)
        tensors.update({key: mapped[key].contiguous() for key, entry in entries.items() if entry.file == file})
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors leaves it readable to its owner alone


def link_weights(folder: Path, weights: Weights) -> None:
    """Put the source's weight files into `folder` without copying them; only the index is copied."""
    for file in weights.files:
        link(file.resolve(), folder / file.name)
    if weights.index is not None:
        shutil.copyfile(weights.index, folder / weights.index.name)


def link(existing: Path, name: Path) -> None:
    """Hard link, so that the source may be deleted; between file systems a symbolic link, so that it may not."""
    try:
        name.hardlink_to(existing)
    except OSError:
        name.symlink_to(existing)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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

    image_size = config.vision_config.image_size
    image_processor = VisualGLMImageProcessor(size={"height": image_size, "width": image_size})
    processor = VisualGLMProcessor(image_processor, tokenizer, num_query_tokens=config.qformer_config.num_query_tokens)
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)  # the preprocessor_config.json, which the processor does without


def convert(
    source: Path,
    target: Path,
    vocabulary: Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    use_links: bool = False,
) -> Checkpoint:
    """Convert `source` into the new folder `target`.

    Args:
        source: folder of the original checkpoint.
        target: folder to be; may exist if it is empty.
        vocabulary: an ice_text.model, or a folder that has it; `source` by default.
        max_shard_size: such as "5GB" or "800MB".
        use_links: link the weight files of `source` instead of writing new ones.

    Raises:
        ValueError: something is missing, damaged or does not belong together; nothing was written.
    """
    target = target.resolve()
    check_target(target)
    checkpoint = read_checkpoint(source, vocabulary)
    entries = kept_entries(checkpoint)
    check_space(target, SPARE_BYTES + (0 if use_links else sum(entry.num_bytes for entry in entries.values())))
    checkpoint.config.tie_word_embeddings = checkpoint.is_tied
    checkpoint.config.text_config.tie_word_embeddings = checkpoint.is_tied
    with written_whole(target) as folder:
        if use_links:
            link_weights(folder, checkpoint.weights)
        else:
            write_weights(folder, entries, max_shard_size)
        write_description(folder, checkpoint.config, checkpoint.tokenizer)
    return checkpoint


def shard_size(text: str) -> str:
    if not SHARD_SIZE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"a size is a number and KB, MB or GB, such as {MAX_SHARD_SIZE}; found {text!r}"
        )
    return text.upper()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the original checkpoint")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER_OR_FILE", type=Path, help="where ice_text.model is, if it is not in SRC"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", type=shard_size, default=MAX_SHARD_SIZE, help="default: %(default)s"
    )
    parser.add_argument("--link", action="store_true", help="link SRC's weight files instead of writing new ones")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        checkpoint = convert(
            arguments.source, arguments.target, arguments.tokenizer, arguments.max_shard_size, arguments.link
        )
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not checkpoint.is_tied and checkpoint.entries[LM_HEAD].dtype.is_floating_point:
        print("warning: lm_head and the word embeddings differ, unlike the original's; both are kept.", file=sys.stderr)
    print(f"{arguments.target} is ready: load it with trust_remote_code=True, check it with scripts/selftest.py.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
