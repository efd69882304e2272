"""Looking into checkpoint folders: which files hold the weights, what is in them, and whether it is a VisualGLM.

Shared by the doors that read one. Tensors are mapped from their files, never loaded as a whole.
Every complaint is a `ValueError` of one line that says what was found, what was expected, and what to do.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from visualglm_hf.chat import check_tokenizer
from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_hf.modeling_visualglm import VisualGLMForConditionalGeneration
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer


EMBEDDINGS = "transformer.word_embeddings.weight"
LM_HEAD = "lm_head.weight"
VOCABULARY_FILE = "ice_text.model"
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # the original saves it beside each layer and never reads it
EARLY_CHATGLM_ROWS = 150528
LFS_POINTER = b"version https://git-lfs"
ZIP_MAGIC = b"PK\x03\x04"
BROKEN_PICKLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, pickle.UnpicklingError)
ASKED_FOR = re.compile(r"GLOBAL ([\w.]+)")  # in the complaint of torch's unpickler
MAX_LISTED = 4  # keys per kind in one message, which is to be a line

AGAIN = "Copy or download it again."


@contextmanager
def readable() -> Iterator[None]:
    """What safetensors says of a damaged file is a `ValueError`, as everything is that is said of one here."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder, in the order of their names."""

    files: tuple[Path, ...]
    index: Path | None = None  # of a sharded checkpoint

    def weight_map(self) -> dict[str, str]:
        """Key to file name as the index has it; empty for a single file."""
        return {} if self.index is None else read_json(self.index)["weight_map"]


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor without reading it, and where it is: in a file, or to be computed from others."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None
    compute: Callable[[], torch.Tensor] | None = field(default=None, compare=False)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors both
        raise ValueError(f"{path} is no JSON file ({error}). {AGAIN}") from error


def read_config(folder: Path) -> VisualGLMConfig:
    """Read config.json, ours or the original's."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a VisualGLM checkpoint.")
    read_json(path)  # for its message
    try:
        return VisualGLMConfig.from_pretrained(folder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tokenizer(place: Path) -> ChatGLMTokenizer:
    """Read the tokenizer of a folder, or an ice_text.model alone."""
    if place.is_file():
        return ChatGLMTokenizer(vocab_file=str(place))
    if not (place / VOCABULARY_FILE).is_file():
        raise ValueError(f"{place} has no {VOCABULARY_FILE}. Copy the one of the original visualglm-6b there.")
    return ChatGLMTokenizer.from_pretrained(place)


def check_vocabulary(tokenizer: ChatGLMTokenizer, config: VisualGLMConfig) -> None:
    """Raise a `ValueError` if the tokenizer is another model's."""
    check_tokenizer(tokenizer, config.text_config)
    if tokenizer.vocab_size > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size:,} pieces, the model rows for {config.text_config.vocab_size:,}. "
            f"Use the {VOCABULARY_FILE} that belongs to this checkpoint."
        )


def find_weights(folder: Path) -> Weights:
    """Find the weight files, safetensors before .bin as transformers does; all shards of the index must be there."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return find_shards(index)
        if (folder / name).is_file():
            return Weights((folder / name,))
    shards = sorted(path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
    if shards:
        raise ValueError(f"{folder} has {', '.join(shards)} but no index (*.index.json). Copy or download it too.")
    raise ValueError(f"{folder} has no weights, neither model*.safetensors nor pytorch_model*.bin.")


def find_shards(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map. {AGAIN}")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"{index.parent} lacks {', '.join(missing)}, {len(missing)} of the {len(files)} files that {index.name} "
            "lists. Copy or download what is missing."
        )
    return Weights(tuple(files), index)


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of one file into memory; pages are read when they are used."""
    check_no_pointer(path)
    if path.suffix == ".safetensors":
        return map_safetensors(path)
    tensors = map_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds something other than tensors by name. Give a Hugging Face checkpoint.")
    return tensors


def check_no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` beside it.")


def map_pickle(path: Path) -> object:
    """Map what `torch.save` wrote, without executing anything that the file asks for."""
    is_zip = zipfile.is_zipfile(path)  # what is not was saved before PyTorch 1.6, and cannot be mapped
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC and not is_zip:
            raise ValueError(f"{path} ({path.stat().st_size:,} bytes) ends too early; it was truncated. {AGAIN}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except BROKEN_PICKLE as error:
        if asked := ASKED_FOR.search(str(error)):
            raise ValueError(
                f"{path} cannot be read as a PyTorch file of tensors: loading it would run {asked[1]}, which weights "
                "do not need. Nothing was run; take the file from where it came from in the first place."
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a PyTorch file of tensors: {reason} {AGAIN}") from error


def map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is damaged or truncated: {error}. {AGAIN}") from error


def each_tensor(weights: Weights) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield (file, key, tensor), one file after the other."""
    for path in weights.files:
        for key, tensor in map_tensors(path).items():
            yield path, key, tensor


def read_tensors(entries: dict[str, Entry]) -> dict[str, torch.Tensor]:
    """Map or compute tensors, each file once."""
    tensors = {key: entry.compute() for key, entry in entries.items() if entry.compute is not None}
    for file in dict.fromkeys(entry.file for entry in entries.values() if entry.compute is None):
        mapped = map_tensors(file)
        tensors.update({key: mapped[key] for key, entry in entries.items() if entry.file == file})
    return tensors


def survey(weights: Weights) -> dict[str, Entry]:
    """List all tensors, and raise a `ValueError` where the index says otherwise."""
    found = {}
    for path, key, tensor in each_tensor(weights):
        if key in found:
            raise ValueError(f"{key} is in {found[key].file.name} and in {path.name}. Remove the file left over.")
        found[key] = Entry(tuple(tensor.shape), tensor.dtype, path)
    listed = weights.weight_map()
    wrong = [key for key, name in listed.items() if key in found and found[key].file.name != name]
    wrong += [key for key in found if listed and key not in listed]
    if wrong:
        raise ValueError(f"{weights.index.name} does not describe the files beside it: {some(wrong)}. {AGAIN}")
    return found


def expected_tensors(config: VisualGLMConfig) -> dict[str, Entry]:
    """The keys, shapes and types of the model that `config` describes; takes no memory."""
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(config)
    return {key: Entry(tuple(tensor.shape), tensor.dtype) for key, tensor in model.state_dict().items()}


def check_tensors(found: dict[str, Entry], config: VisualGLMConfig) -> None:
    """Raise a `ValueError` that lists every missing, unexpected and mis-shaped key."""
    expected = expected_tensors(config)
    check_rows(found, config.text_config.vocab_size)
    optional = {LM_HEAD} if config.tie_word_embeddings else set()
    missing = [key for key in expected if key not in found and key not in optional]
    unexpected = [key for key in found if key not in expected and not IGNORED.search(key)]
    misfits = [
        f"{key} is {found[key]} instead of {entry}"
        for key, entry in expected.items()
        if not fits(found.get(key), entry)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of a wrong shape or type": misfits}
    problems = [f"{len(keys)} keys are {kind}: {some(keys)}" for kind, keys in kinds.items() if keys]
    if problems:
        raise ValueError(
            f"The weights are not those of config.json: {'; '.join(problems)}. {advise(missing, unexpected)}"
        )


def check_rows(found: dict[str, Entry], vocab_size: int) -> None:
    """Raise a `ValueError` if the embeddings are for another vocabulary than config.json's."""
    rows = {found[key].shape[0] for key in (EMBEDDINGS, LM_HEAD) if key in found and found[key].shape}
    if rows <= {vocab_size}:
        return
    early = f" {EARLY_CHATGLM_ROWS:,} is the vocabulary of the early ChatGLM-6B." if EARLY_CHATGLM_ROWS in rows else ""
    raise ValueError(
        f"The embeddings have {', '.join(f'{number:,}' for number in sorted(rows))} rows, config.json says "
        f"vocab_size {vocab_size:,}: weights and config.json belong to different models.{early} "
        "Take both, and the tokenizer, from the same VisualGLM-6B folder."
    )


def fits(found: Entry | None, expected: Entry) -> bool:
    """Whether a tensor can stand for the expected one; any floating-point type can stand for any other."""
    if found is None:
        return True  # reported as missing
    is_same_kind = found.dtype == expected.dtype or found.dtype.is_floating_point and expected.dtype.is_floating_point
    return found.shape == expected.shape and is_same_kind


def advise(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    if any(key.endswith("weight_scale") for key in unexpected):
        return "These weights are quantized: config.json must say so with quantization_bit 4 or 8."
    if any(key.endswith("weight_scale") for key in missing):
        return (
            "config.json promises quantized weights with quantization_bit: set it to what the weights are, 0 for none."
        )
    if any(key.startswith("image_encoder.") for key in missing) and not any(
        key.startswith("transformer.") for key in missing
    ):
        return "Without image_encoder this is a ChatGLM-6B, not a VisualGLM-6B."
    return "Take weights and config.json from the same folder."


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def are_tied(found: dict[str, Entry]) -> bool:
    """Whether `lm_head` and the word embeddings are, or can be, one tensor."""
    if LM_HEAD not in found:
        return True
    head, embeddings = (read_tensors({key: found[key]})[key] for key in (LM_HEAD, EMBEDDINGS))
    return head.dtype == embeddings.dtype and torch.equal(head, embeddings)
