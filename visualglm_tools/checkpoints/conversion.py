"""Checkpoints on the way between three layouts: the original's for Hugging Face, ours, and SwissArmyTransformer's.

`visualglm convert` is the command. What a SAT checkpoint holds is known in `sat.py`, what ours does in `prepared.py`.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from visualglm_tools.checkpoints.cards import PEFT, SAT, Card, describe_weights, read_origin
from visualglm_tools.checkpoints.files import LM_HEAD, Weights
from visualglm_tools.checkpoints.manifest import write_manifest
from visualglm_tools.checkpoints.prepared import (
    MAX_SHARD_SIZE,
    SPARE_BYTES,
    Checkpoint,
    check_space,
    check_target,
    kept_entries,
    read_checkpoint,
    total_bytes,
    write_description,
    write_weights,
    written_whole,
)
from visualglm_tools.checkpoints.sat import (
    MODEL_CONFIG,
    TRACKER,
    check_writable,
    describe_written,
    read_sat,
    write_adapter,
    write_sat,
)
from visualglm_tools.checkpoints.sat_layout import BLOCKS, LoraPair


ADAPTER_FOLDER = "adapter"
NO_SPACE = "Make room, take another disk, or use --link, which copies no weights."


def convert(
    source: Path,
    target: Path,
    vocabulary: Path | None = None,
    max_shard_size: str | None = None,
    use_links: bool = False,
    origin: str | None = None,
    destination: str = "hf",
    version: str | None = None,
    lora: str | None = None,
    command: str = "visualglm convert",
) -> list[str]:
    """Convert the checkpoint in `source` into the new folder `target`.

    Args:
        source: folder of the checkpoint.
        target: folder to be; may exist if it is empty.
        vocabulary: an ice_text.model, or a folder that has it; `source` by default.
        max_shard_size: such as "800MB"; "5GB" by default.
        use_links: link the weight files of `source` instead of writing new ones.
        origin: what `source` is, "hf" or "sat"; None for what it looks like.
        destination: what `target` will be, "hf" or "sat".
        version: of SAT, "0.3" or "0.4", which decides the order of fused rows; None to find it out in `source`, or for
            the later one in `target`.
        lora: what to do with a LoRA in a SAT checkpoint: "adapter", the default, writes it for PEFT into
            `target`/adapter, "merge" folds it into the weights, "only" makes `target` the adapter, without weights.
        command: what the model card says of how this was done.

    Returns:
        Lines about what the user should know.

    Raises:
        ValueError: something is missing, damaged, does not belong together, or cannot be known; nothing was written.
    """
    target = target.resolve()
    check_target(target)
    origin = origin or guess_origin(source)
    check_options(origin, destination, max_shard_size, use_links, version, lora)
    notes, adapter = [], {}
    if origin == "sat":
        found = read_sat(source, vocabulary, version, lora or "adapter")
        checkpoint, adapter, version, notes = found.checkpoint, found.adapter, found.version, [*found.notes]
    else:
        checkpoint = read_checkpoint(source, vocabulary)
    if not checkpoint.is_tied and checkpoint.entries[LM_HEAD].dtype.is_floating_point:
        notes.append("warning: lm_head and the word embeddings differ, unlike the original's; both are kept.")
    card = describe_converted(source, target.name, checkpoint, command)
    if lora == "only":
        with written_whole(target) as folder:
            write_adapter(folder, adapter)
            describe_adapter(card).write(folder)
    elif destination == "sat":
        write_for_sat(target, checkpoint, version or BLOCKS, card)
        notes += describe_written(checkpoint.config)
    else:
        write_prepared(target, checkpoint, max_shard_size or MAX_SHARD_SIZE, use_links, adapter, card)
    return notes


def guess_origin(source: Path) -> str:
    is_sat = any((source / name).exists() for name in (MODEL_CONFIG, TRACKER)) and not (source / "config.json").exists()
    return "sat" if is_sat else "hf"


def check_options(
    origin: str, destination: str, max_shard_size: str | None, use_links: bool, version: str | None, lora: str | None
) -> None:
    """Raise a `ValueError` for options that contradict each other or would have no effect."""
    formats = (origin, destination)
    if use_links and "sat" in formats:
        raise ValueError("--link keeps weight files as they are, but SAT's are different ones: leave it out.")
    if max_shard_size and destination == "sat":
        raise ValueError("--max-shard-size is of safetensors files; SAT has one file: leave it out.")
    if version and "sat" not in formats:
        raise ValueError("--sat-version goes with --from sat or --to sat.")
    if lora and origin != "sat":
        raise ValueError("--lora is about a LoRA in a SAT checkpoint: it goes with --from sat.")
    if formats == ("sat", "sat") and lora != "merge":
        raise ValueError("From SAT to SAT no adapter can be kept; use --lora merge.")


def describe_converted(source: Path, name: str, checkpoint: Checkpoint, command: str) -> Card:
    """The card of a folder called `name` with the weights of `source`, for transformers."""
    return Card(
        title=name,
        summary="A VisualGLM for today's transformers, with the code that loads it.",
        origin=read_origin(source, checkpoint.config),
        command=command,
        weights=describe_weights(checkpoint.config, kept_entries(checkpoint).values()),
        bits=checkpoint.config.quantization_bit,
    )


def describe_adapter(card: Card) -> Card:
    """The card of the LoRA alone that was in what another card is of."""
    summary = "A LoRA of SwissArmyTransformer for VisualGLM, as an adapter of PEFT."
    return replace(card, summary=summary, weights="", bits=None, library=PEFT, relation="adapter", tags=("lora",))


def write_prepared(
    target: Path, checkpoint: Checkpoint, max_shard_size: str, use_links: bool, adapter: dict[str, LoraPair], card: Card
) -> None:
    """Write a folder for transformers; an adapter goes into a folder of its own inside."""
    entries = kept_entries(checkpoint)
    check_space(target, SPARE_BYTES + (0 if use_links else total_bytes(entries)), NO_SPACE)
    for part in (checkpoint.config, checkpoint.config.text_config):
        part.tie_word_embeddings = checkpoint.is_tied
    with written_whole(target) as folder:
        if use_links:
            link_weights(folder, checkpoint.weights)
        else:
            write_weights(folder, entries, max_shard_size)
        write_description(folder, checkpoint.config, checkpoint.tokenizer)
        card.write(folder)
        if adapter:
            write_adapter(folder / ADAPTER_FOLDER, adapter)
            replace(describe_adapter(card), title=f"{card.title}/{ADAPTER_FOLDER}").write(folder / ADAPTER_FOLDER)
            write_manifest(folder / ADAPTER_FOLDER)


def write_for_sat(target: Path, checkpoint: Checkpoint, version: str, card: Card) -> None:
    check_writable(checkpoint)
    check_space(target, SPARE_BYTES + 2 * total_bytes(checkpoint.entries))  # with the scratch files
    with written_whole(target) as folder:
        write_sat(folder, checkpoint, version)
        replace(card, summary="A VisualGLM for SwissArmyTransformer.", library=SAT).write(folder)


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
