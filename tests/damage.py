"""What may be wrong with a copy of the tiny original, whose weights are in two files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch


FIRST, LAST = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
EMBEDDINGS = "transformer.word_embeddings.weight"


def change_shard(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `change` modify the tensors of one .bin file."""
    tensors = torch.load(folder / name, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / name)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def promise_quantization(folder: Path) -> None:
    change_config(folder, quantization_bit=4)


def shrink_vocabulary(folder: Path) -> None:
    change_config(folder, vocab_size=1500)


def remove_shard(folder: Path) -> None:
    (folder / LAST).unlink()


def cut_shard(folder: Path) -> None:
    os.truncate(folder / LAST, 300_000)


def remove_tokenizer(folder: Path) -> None:
    (folder / "ice_text.model").unlink()


def cut_tokenizer(folder: Path) -> None:
    os.truncate(folder / "ice_text.model", 1000)
