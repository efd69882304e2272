#!/usr/bin/env python
"""Prepare a checkpoint of the original VisualGLM-6B for today's transformers, or bring one from or to SAT.

    python scripts/convert_checkpoint.py SRC DST
    python scripts/convert_checkpoint.py --from sat --tokenizer ice_text.model SRC DST
    python scripts/convert_checkpoint.py --to sat SRC DST

SRC is the original folder: config.json, ice_text.model and the weights, .bin or .safetensors, sharded or not; or a
folder of SwissArmyTransformer (SAT): model_config.json, `latest` and mp_rank_00_model_states.pt in the folder of its
iteration. DST will be a folder that loads with `trust_remote_code=True`: our code, configuration, tokenizer, processor,
and the weights as safetensors, or, with --link, SRC's own weight files without a copy; with --to sat, a folder for SAT.
Everything is checked before anything is written, weights are written shard by shard, and DST appears when it is
complete or not at all.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from checkpoint_files import LM_HEAD, Entry, Weights, read_tensors
from huggingface_hub import split_state_dict_into_shards_factory
from prepared_folder import (
    SPARE_BYTES,
    WEIGHT_FILE,
    Checkpoint,
    check_space,
    check_target,
    kept_entries,
    read_checkpoint,
    save_safetensors,
    write_description,
    write_json,
    written_whole,
)
from safetensors import SafetensorError
from sat_checkpoint import (
    MODEL_CONFIG,
    TRACKER,
    SatCheckpoint,
    check_writable,
    describe_written,
    read_sat,
    write_adapter,
    write_sat,
)
from sat_layout import BLOCKS, PER_HEAD, LoraPair
from tqdm import tqdm


MAX_SHARD_SIZE = "5GB"
ADAPTER_FOLDER = "adapter"
SAT_VERSION = re.compile(r"0\.(\d+)(\.\d+)?")
SHARD_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]?B", re.IGNORECASE)


def write_weights(folder: Path, entries: dict[str, Entry], max_shard_size: str) -> None:
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
    write_prepared(target, checkpoint, max_shard_size, use_links)
    return checkpoint


def write_prepared(
    target: Path,
    checkpoint: Checkpoint,
    max_shard_size: str = MAX_SHARD_SIZE,
    use_links: bool = False,
    adapter: dict[str, LoraPair] | None = None,
) -> None:
    """Write a folder for transformers; an adapter goes into a folder of its own inside."""
    entries = kept_entries(checkpoint)
    check_space(target, SPARE_BYTES + (0 if use_links else total_bytes(entries)))
    checkpoint.config.tie_word_embeddings = checkpoint.is_tied
    checkpoint.config.text_config.tie_word_embeddings = checkpoint.is_tied
    with written_whole(target) as folder:
        if use_links:
            link_weights(folder, checkpoint.weights)
        else:
            write_weights(folder, entries, max_shard_size)
        write_description(folder, checkpoint.config, checkpoint.tokenizer)
        if adapter:
            write_adapter(folder / ADAPTER_FOLDER, adapter)


def convert_from_sat(
    source: Path,
    target: Path,
    vocabulary: Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    version: str | None = None,
    lora: str = "adapter",
) -> SatCheckpoint:
    """Convert a SAT checkpoint into the new folder `target`.

    Args:
        source: SAT folder, or the folder of one iteration in it.
        target, vocabulary, max_shard_size: as in `convert`.
        version: "0.3" or "0.4", which decides the order of fused rows; None to find out.
        lora: what to do with a LoRA: "adapter" writes it for PEFT into `target`/adapter, "merge" folds it into the
            weights, "only" makes `target` the adapter, without weights.

    Raises:
        ValueError: something is missing, damaged, does not belong together, or cannot be known; nothing was written.
    """
    target = target.resolve()
    check_target(target)
    found = read_sat(source, vocabulary, version, lora)
    if lora == "only":
        with written_whole(target) as folder:
            write_adapter(folder, found.adapter)
    else:
        write_prepared(target, found.checkpoint, max_shard_size, adapter=found.adapter)
    return found


def convert_to_sat(checkpoint: Checkpoint, target: Path, version: str = BLOCKS) -> None:
    """Write a checkpoint that was read as a new SAT folder.

    Args:
        checkpoint: from `read_checkpoint`.
        target: folder to be; may exist if it is empty.
        version: "0.3" or "0.4", which decides the order of fused rows.

    Raises:
        ValueError: SAT could not read it; nothing was written.
    """
    target = target.resolve()
    check_target(target)
    check_writable(checkpoint)
    check_space(target, SPARE_BYTES + 2 * total_bytes(checkpoint.entries))  # with the scratch files
    with written_whole(target) as folder:
        write_sat(folder, checkpoint, version)


def total_bytes(entries: dict[str, Entry]) -> int:
    return sum(entry.num_bytes for entry in entries.values())


def looks_like_sat(source: Path) -> bool:
    return not (source / "config.json").exists() and any((source / name).exists() for name in (MODEL_CONFIG, TRACKER))


def shard_size(text: str) -> str:
    if not SHARD_SIZE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"a size is a number and KB, MB or GB, such as {MAX_SHARD_SIZE}; found {text!r}"
        )
    return text.upper()


def sat_version(text: str) -> str:
    if not (match := SAT_VERSION.fullmatch(text)):
        raise argparse.ArgumentTypeError(f"a version of SAT is 0.3 or 0.4, or in full such as 0.3.6; found {text!r}")
    return PER_HEAD if int(match[1]) < 4 else BLOCKS


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
    formats = {"choices": ("hf", "sat"), "metavar": "hf|sat"}
    parser.add_argument("--from", dest="origin", **formats, help="what SRC is; default: what it looks like")
    parser.add_argument("--to", dest="destination", **formats, default="hf", help="what DST will be; default: hf")
    parser.add_argument(
        "--sat-version",
        metavar="VERSION",
        type=sat_version,
        help="SAT's side: 0.3 (rows of query_key_value per head) or 0.4 (in blocks); default: found out, or 0.4",
    )
    parser.add_argument(
        "--lora",
        choices=("adapter", "merge", "only"),
        default="adapter",
        help="a LoRA in a SAT checkpoint becomes a PEFT adapter in DST/adapter (default), is merged, or is all of DST",
    )
    arguments = parser.parse_args(argv)
    arguments.origin = arguments.origin or ("sat" if looks_like_sat(arguments.source) else "hf")
    if arguments.link and "sat" in (arguments.origin, arguments.destination):
        parser.error("--link keeps weight files as they are; SAT's are different ones.")
    if arguments.destination == "sat" and arguments.origin == "sat" and arguments.lora != "merge":
        parser.error("from SAT to SAT a checkpoint keeps no adapter; use --lora merge.")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Convert as the arguments say, and say what the user should know."""
    size, version = arguments.max_shard_size, arguments.sat_version
    notes: list[str] = []
    if arguments.destination == "sat":
        if arguments.origin == "sat":
            found = read_sat(arguments.source, arguments.tokenizer, version, arguments.lora)
            checkpoint, version, notes = found.checkpoint, found.version, [*found.notes]
        else:
            checkpoint = read_checkpoint(arguments.source, arguments.tokenizer)
        convert_to_sat(checkpoint, arguments.target, version or BLOCKS)
        notes += describe_written(checkpoint.config)
    elif arguments.origin == "sat":
        found = convert_from_sat(arguments.source, arguments.target, arguments.tokenizer, size, version, arguments.lora)
        checkpoint, notes = found.checkpoint, [*found.notes]
    else:
        checkpoint = convert(arguments.source, arguments.target, arguments.tokenizer, size, arguments.link)
    if not checkpoint.is_tied and checkpoint.entries[LM_HEAD].dtype.is_floating_point:
        notes.append("warning: lm_head and the word embeddings differ, unlike the original's; both are kept.")
    for note in notes:
        print(note, file=sys.stderr)


def describe_use(arguments: argparse.Namespace) -> str:
    if arguments.destination == "sat":
        return "load it with SwissArmyTransformer."
    if arguments.lora == "only":
        return "load it with peft, on the weights that it was trained on."
    return "load it with trust_remote_code=True, check it with scripts/selftest.py."


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{arguments.target} is ready: {describe_use(arguments)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
