#!/usr/bin/env python
"""Prepare a checkpoint of the original VisualGLM-6B for today's transformers.

    python scripts/convert_checkpoint.py SRC DST

SRC is the original folder: config.json, ice_text.model and the weights, .bin or .safetensors, sharded or not. DST will
be a folder that loads with `trust_remote_code=True`: our code, configuration, tokenizer, processor, and the weights as
safetensors, or, with --link, SRC's own weight files without a copy. Everything is checked before anything is written,
weights are written shard by shard, and DST appears when it is complete or not at all.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import safetensors.torch
from checkpoint_files import LM_HEAD, Entry, Weights, map_tensors
from huggingface_hub import split_state_dict_into_shards_factory
from prepared_folder import (
    SPARE_BYTES,
    WEIGHT_FILE,
    Checkpoint,
    check_space,
    check_target,
    kept_entries,
    read_checkpoint,
    write_description,
    write_json,
    written_whole,
)
from safetensors import SafetensorError
from tqdm import tqdm


MAX_SHARD_SIZE = "5GB"
SHARD_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]?B", re.IGNORECASE)


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
