"""Checkpoints of SwissArmyTransformer (SAT): read with everything that may be in them, and written as SAT reads them.

`sat_layout.py` knows the layout. A SAT folder has model_config.json, `latest` with the number of an iteration, and the
folder of that number with mp_rank_00_model_states.pt, one such file for each model-parallel process. DeepSpeed puts
optimizer and random states into the same pickle; they are not needed, and nothing of them is executed.
"""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils import is_peft_available

from visualglm_hf.configuration_visualglm import VisualGLMConfig, VisualGLMTextConfig
from visualglm_hf.modeling_visualglm import VisualGLMPrefixEncoder, inverse_frequencies
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer
from visualglm_tools.checkpoints.files import (
    EMBEDDINGS,
    LM_HEAD,
    Entry,
    Weights,
    are_tied,
    check_no_pointer,
    check_tensors,
    check_vocabulary,
    expected_tensors,
    map_pickle,
    read_json,
    read_tensors,
    read_tokenizer,
    some,
)
from visualglm_tools.checkpoints.folder import check_source
from visualglm_tools.checkpoints.prepared import Checkpoint, kept_entries, save_safetensors, write_json
from visualglm_tools.checkpoints.sat_layout import (
    BLOCKS,
    DECODER_QKV,
    INV_FREQ,
    LORA_MATRIX,
    PER_HEAD,
    POSITION_EMBEDDINGS,
    PREFIX,
    PREFIX_EMBEDDING,
    PREFIX_ENCODER,
    LoraPair,
    from_prefix_embedding,
    guess_row_order,
    has_native_alpha,
    join,
    lora_delta,
    our_key,
    read_model_config,
    sat_key,
    to_blocks,
    to_heads,
    to_peft,
    to_prefix_embedding,
    write_model_config,
)
from visualglm_tools.packages import install


MODEL_CONFIG, TRACKER = "model_config.json", "latest"
PART = "mp_rank_{:02d}_model_states.pt"
PART_NUMBER = re.compile(r"mp_rank_(\d+)_model_states\.pt")
WRITTEN_ITERATION = "1"
# What DeepSpeed, numpy and bitsandbytes leave in a checkpoint beside the weights. Read as an empty shell of it.
BOOKKEEPING = (
    "_codecs.encode",
    "argparse.Namespace",
    "bitsandbytes.functional.QuantState",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)


class Shell:
    """Stands for an object that is not wanted: takes whatever its pickle gives it, and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


@dataclass
class SatContent:
    """The tensors of a SAT checkpoint, sorted by what they are for; each is a list of its parts."""

    weights: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    lora: dict[str, dict[str, list[torch.Tensor]]] = field(default_factory=lambda: defaultdict(dict))
    prefixes: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)  # keys that SAT stores and never uses
    quantized: list[str] = field(default_factory=list)  # keys of bitsandbytes' 4-bit weights
    has_indexed_lora: bool = False


@dataclass(frozen=True)
class SatCheckpoint:
    """A SAT checkpoint that has passed all checks, in our layout, and what became of it."""

    checkpoint: Checkpoint
    adapter: dict[str, LoraPair]  # by our module names
    version: str
    notes: tuple[str, ...]


def find_parts(folder: Path) -> tuple[Path, list[Path]]:
    """The model_config.json and the weight files, in order, of a SAT folder or of the folder of one iteration.

    Raises:
        ValueError: something is missing.
    """
    iteration = folder
    if (folder / TRACKER).is_file():
        tag = (folder / TRACKER).read_text(encoding="utf-8").strip()
        iteration = folder / tag
        if not tag or Path(tag).name != tag or not iteration.is_dir():
            raise ValueError(f"{folder / TRACKER} names the iteration {tag!r}, but {folder} has no such folder.")
    numbers = {int(match[1]): path for path in iteration.glob("*") if (match := PART_NUMBER.fullmatch(path.name))}
    if not numbers:
        raise ValueError(f"{iteration} has no {PART.format(0)}; give the SAT folder with {MODEL_CONFIG} and {TRACKER}.")
    configs = [place / MODEL_CONFIG for place in (folder, iteration, folder.parent)]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise ValueError(f"{folder} has no {MODEL_CONFIG}. Copy the one that SAT wrote beside {TRACKER} there.")
    size = max(len(numbers), read_json(config).get("model_parallel_size") or 1)
    missing = [PART.format(number) for number in range(size) if number not in numbers]
    if missing:
        raise ValueError(f"{iteration} lacks {', '.join(missing)} of {size} model-parallel parts. Copy all of them.")
    return config, [numbers[number] for number in range(size)]


def read_module(path: Path) -> dict[str, object]:
    """Map the weights of one part. Nothing in the file is executed: what is no tensor becomes an empty shell.

    Raises:
        ValueError: the file is damaged, asks for the execution of something, or has no weights.
    """
    check_no_pointer(path)
    with torch.serialization.safe_globals([(Shell, name) for name in BOOKKEEPING]):
        content = map_pickle(path)
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not module:
        raise ValueError(f"{path} has no 'module' with weights; SAT writes them there.")
    return module


def sort_content(modules: list[dict[str, object]]) -> SatContent:
    """Sort the tensors of all parts by what they are for.

    Raises:
        ValueError: the parts do not have the same keys.
    """
    different = sorted(set().union(*modules).difference(*(set(modules[0]) & set(module) for module in modules)))
    if different:
        raise ValueError(f"The model-parallel parts do not have the same keys: {some(different)}.")
    content = SatContent()
    for key in sorted(modules[0]):
        sort_tensor(content, key, [module[key] for module in modules])
    return content


def sort_tensor(content: SatContent, key: str, parts: list) -> None:
    if not isinstance(parts[0], torch.Tensor):
        content.quantized.append(key)
    elif key == POSITION_EMBEDDINGS:
        content.dropped.append(key)
    elif key.startswith(PREFIX):
        content.prefixes[int(key.removeprefix(PREFIX))] = parts
    elif match := LORA_MATRIX.fullmatch(key):
        content.lora[match["module"]].setdefault(match["side"], []).append(parts[0])
        content.has_indexed_lora |= match["index"] is not None and match["module"].endswith(".dense")
    elif key != INV_FREQ:
        content.weights[key] = parts


def detect_version(content: SatContent, config: VisualGLMConfig) -> str:
    """The SAT version whose row order the decoder's fused matrices have.

    Raises:
        ValueError: nothing in the file tells.
    """
    if any(module.endswith(".dense") for module in content.lora):
        return BLOCKS if content.has_indexed_lora else PER_HEAD  # SAT 0.3's LoRA had no index
    layers = fused_matrices(content, config.text_config.num_hidden_layers)
    version = guess_row_order(layers, config.text_config.head_dim)
    if version is None:
        raise ValueError(
            "These weights do not tell how SAT ordered the rows of query_key_value. Say which SAT wrote them with "
            "--sat-version: 0.3 for the files of May and June 2023, 0.4 for later ones. Convert once with each if you "
            "do not know; with the wrong one the model talks nonsense."
        )
    return version


def fused_matrices(content: SatContent, num_layers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for layer in range(num_layers):
        module = f"transformer.layers.{layer}.attention.query_key_value"
        names = (f"{module}.weight", f"{module}.bias")
        if all(name in content.weights for name in names):
            yield tuple(content.weights[name][0] for name in names)


def build_tensor(
    key: str, parts: list, expected: tuple | None, version: str, head_dim: int, delta: dict | None = None
) -> torch.Tensor:
    """Our tensor for SAT's parts of it, with a LoRA folded in as SAT does: in float32, rounded once."""
    tensor = join(key, parts, expected, version)
    if delta is not None:
        tensor = (tensor.float() + lora_rows(key, delta, version, head_dim)).to(tensor.dtype)
    is_in_blocks = version == BLOCKS and DECODER_QKV.match(key)
    return to_heads(tensor, head_dim) if is_in_blocks else tensor


def lora_rows(key: str, matrices: dict, version: str, head_dim: int) -> torch.Tensor:
    """What a LoRA adds, with its rows in the order of the weight. SAT 0.3's LoRA knew the order of its base."""
    rows = lora_delta(matrices)
    return to_heads(rows, head_dim) if version == PER_HEAD and DECODER_QKV.match(key) else rows


def build_prefix(prefixes: dict[int, list[torch.Tensor]], num_heads: int, version: str) -> torch.Tensor:
    """Our table of prefixes [P, layers * 2 * H * D]."""
    layers = []
    for layer, parts in sorted(prefixes.items()):
        whole = (2, num_heads, *parts[0].shape[2:])
        layers.append(join(f"{PREFIX}{layer}", parts, whole, version))
    return to_prefix_embedding(layers)


def plan_entries(content: SatContent, config: VisualGLMConfig, version: str, is_merged: bool) -> dict[str, Entry]:
    """What our tensors will be; each is computed when it is asked for.

    Raises:
        ValueError: parts contradict each other.
    """
    expected, head_dim = expected_tensors(config), config.text_config.head_dim
    entries = {}
    for key, parts in content.weights.items():
        ours, plain = our_key(key), key.replace(".original.", ".")
        shape = expected[ours].shape if ours in expected else None
        whole = join(plain, [part.to("meta") for part in parts], shape, version)  # its shape, without reading it
        if whole.shape == parts[0].shape:
            join(plain, parts, shape, version)  # all parts have it, which must be alike
        module, _, kind = plain.rpartition(".")
        delta = content.lora.get(module) if is_merged and kind == "weight" else None
        compute = partial(build_tensor, plain, parts, shape, version, head_dim, delta)
        entries[ours] = Entry(tuple(whole.shape), whole.dtype, compute=compute)
    if content.prefixes:
        compute = partial(build_prefix, content.prefixes, config.text_config.num_attention_heads, version)
        table = compute()
        entries[PREFIX_EMBEDDING] = Entry(tuple(table.shape), table.dtype, compute=compute)
    return entries


def check_content(content: SatContent, num_parts: int, lora: str) -> None:
    """Raise a `ValueError` for what cannot be converted."""
    if content.lora and num_parts > 1:
        raise ValueError(
            "A LoRA in several model-parallel parts cannot be converted: in SAT each part then computes something "
            "else. Convert a checkpoint of one process."
        )
    packed = [key for key, parts in content.weights.items() if not parts[0].is_floating_point()]
    if (packed or content.quantized) and lora != "only":
        remedy = "Keep its LoRA with --lora only" if content.lora else "Convert the checkpoint it was made from"
        raise ValueError(
            f"The weights are bitsandbytes' 4-bit ones ({some(packed or content.quantized)}), which are rounded "
            f"copies. {remedy}, and use it on the full weights."
        )
    if lora == "only" and not content.lora:
        raise ValueError("--lora only needs a checkpoint with LoRA matrices; this one has none.")
    broken = [module for module, sides in content.lora.items() if len(sides.get("A", ())) != len(sides.get("B", ()))]
    if broken:
        raise ValueError(f"The LoRA lacks a matrix_A or a matrix_B of {some(broken)}.")


def check_lora(lora: dict[str, LoraPair], config: VisualGLMConfig) -> None:
    """Raise a `ValueError` if the matrices of a LoRA are not for this model."""
    expected = expected_tensors(config)
    for module, pair in lora.items():
        found = (len(pair.second), pair.first.shape[1])
        weight = expected.get(f"{module}.weight")
        if weight is None or weight.shape != found:
            wanted = "there is no such layer" if weight is None else f"the layer is {list(weight.shape)}"
            raise ValueError(f"The LoRA of {module} is for a layer of {list(found)}, but {wanted}.")


def read_sat(
    source: Path, vocabulary: Path | None = None, version: str | None = None, lora: str = "adapter"
) -> SatCheckpoint:
    """Read a SAT checkpoint into our layout.

    Args:
        source: SAT folder, or the folder of one iteration in it.
        vocabulary: an ice_text.model, or a folder that has it; `source` by default.
        version: "0.3" or "0.4", which decides the order of fused rows; None to find out.
        lora: "adapter" to keep a LoRA beside the weights, "merge" to fold it in, "only" for the LoRA without weights.

    Raises:
        ValueError: something is missing, damaged, does not belong together, or cannot be known.
    """
    check_source(source, "a SAT checkpoint")
    config_file, files = find_parts(source)
    tokenizer = read_vocabulary(vocabulary or source)
    config = translate_config(config_file, tokenizer)
    content = sort_content([read_module(file) for file in files])
    check_content(content, len(files), lora)
    head_dim = config.text_config.head_dim
    adapter = {our_key(name): to_peft(name, matrices, head_dim) for name, matrices in content.lora.items()}
    check_lora(adapter, config)
    if adapter and lora != "merge":
        check_peft()
    if lora == "only":
        return SatCheckpoint(Checkpoint(config, tokenizer, Weights(tuple(files)), {}, True), adapter, BLOCKS, ())

    version = version or detect_version(content, config)
    if content.prefixes:
        config.text_config.pre_seq_len = next(iter(content.prefixes.values()))[0].shape[2]
    entries = plan_entries(content, config, version, lora == "merge")
    check_tensors(entries, config)
    config.dtype = entries[EMBEDDINGS].dtype
    checkpoint = Checkpoint(config, tokenizer, Weights(tuple(files)), entries, are_tied(entries))
    adapter = {} if lora == "merge" else adapter
    return SatCheckpoint(checkpoint, adapter, version, tuple(describe(content, config, version, adapter)))


def translate_config(file: Path, tokenizer: ChatGLMTokenizer) -> VisualGLMConfig:
    """Our configuration for a model_config.json, which leaves the end of an answer to the tokenizer."""
    fields = read_json(file)
    try:
        config = read_model_config(fields, tokenizer.convert_tokens_to_ids(tokenizer.eos_token))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    check_vocabulary(tokenizer, config)
    return config


def read_vocabulary(place: Path) -> ChatGLMTokenizer:
    try:
        return read_tokenizer(place)
    except ValueError as error:
        raise ValueError(f"{error} Or name a folder that has it with --tokenizer FOLDER_OR_FILE.") from error


def describe(content: SatContent, config: VisualGLMConfig, version: str, adapter: dict) -> Iterator[str]:
    """Lines about what was found, for the user."""
    order = "in blocks" if version == BLOCKS else "per head"
    yield f"query_key_value rows are {order}, as SAT {version} has them."
    for key in content.dropped:
        yield f"{key} is dropped: SAT stores it and never uses it."
    if adapter:
        yield f"A LoRA of {len(adapter)} layers is kept as a PEFT adapter beside the weights."
    if content.prefixes:
        yield f"P-tuning prefixes of {config.text_config.pre_seq_len} positions are carried over."


def check_peft() -> None:
    """Raise a `ValueError` if there is no PEFT, which writes adapters."""
    if not is_peft_available():
        raise ValueError(f"A LoRA is kept as a PEFT adapter: {install('train')}, or use --lora merge.")


def write_adapter(folder: Path, adapter: dict[str, LoraPair]) -> None:
    """Write a LoRA as a PEFT adapter."""
    from peft import LoraConfig

    folder.mkdir(exist_ok=True)
    first = next(iter(adapter.values()))
    LoraConfig(
        task_type="CAUSAL_LM",
        r=len(first.first),
        lora_alpha=first.alpha,
        # One expression: as suffixes, the decoder's names would also be those of layers of the image encoder.
        target_modules="|".join(map(re.escape, adapter)),
        rank_pattern={re.escape(module): len(pair.first) for module, pair in adapter.items()},
        alpha_pattern={re.escape(module): pair.alpha for module, pair in adapter.items()},
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {}
    for module, pair in adapter.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.first.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.second.contiguous()
    save_safetensors(folder / "adapter_model.safetensors", tensors)


def write_sat(folder: Path, checkpoint: Checkpoint, version: str) -> None:
    """Write a SAT folder for one process.

    Tensors whose rows change place lie in scratch files until `torch.save` has read them, so that memory never holds
    more than one.
    """
    (folder / WRITTEN_ITERATION).mkdir()
    with TemporaryDirectory(dir=folder) as scratch:
        module = sat_module(checkpoint, version, partial(spill, Path(scratch)))
        torch.save({"module": module}, folder / WRITTEN_ITERATION / PART.format(0))
        del module  # some systems do not remove files that are mapped
    (folder / TRACKER).write_text(WRITTEN_ITERATION, encoding="utf-8")
    write_json(folder / MODEL_CONFIG, write_model_config(checkpoint.config))
    checkpoint.tokenizer.save_vocabulary(str(folder))  # SAT does without; for the way back


def spill(scratch: Path, tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, on disk."""
    file = scratch / str(len(list(scratch.iterdir())))
    copy = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def sat_module(checkpoint: Checkpoint, version: str, spill: Callable[[torch.Tensor], torch.Tensor]) -> OrderedDict:
    """SAT's state dict; everything that is not simply mapped goes through `spill`."""
    entries, text = kept_entries(checkpoint), checkpoint.config.text_config
    mapped = read_tensors({key: entry for key, entry in entries.items() if entry.compute is None})
    module = OrderedDict({INV_FREQ: inverse_frequencies(text)})
    for key in (key for key in entries if not key.startswith(PREFIX_ENCODER)):
        tensor = mapped[key] if key in mapped else spill(entries[key].compute())
        is_moved = version == BLOCKS and DECODER_QKV.match(key)
        module[sat_key(key)] = spill(to_blocks(tensor, text.head_dim)) if is_moved else tensor
    if checkpoint.is_tied:
        module[sat_key(LM_HEAD)] = module[sat_key(EMBEDDINGS)]
    if text.pre_seq_len:
        table = prefix_table(entries, text)
        for layer, prefix in enumerate(from_prefix_embedding(table, text.num_hidden_layers, text.num_attention_heads)):
            module[f"{PREFIX}{layer}"] = prefix.contiguous()
    return module


def prefix_table(entries: dict[str, Entry], text: VisualGLMTextConfig) -> torch.Tensor:
    """The prefixes of all layers; a network that computes them is folded into what it computes."""
    tensors = read_tensors({key: entry for key, entry in entries.items() if key.startswith(PREFIX_ENCODER)})
    encoder = VisualGLMPrefixEncoder(text)
    encoder.load_state_dict({key.removeprefix(PREFIX_ENCODER): tensor for key, tensor in tensors.items()})
    with torch.no_grad():
        return encoder.compute_table().to(tensors[PREFIX_EMBEDDING].dtype)


def check_writable(checkpoint: Checkpoint) -> None:
    """Raise a `ValueError` if SAT could not have such a checkpoint."""
    if checkpoint.config.quantization_bit:
        raise ValueError(
            f"The weights have {checkpoint.config.quantization_bit} bits, which SAT cannot read. Convert the full ones."
        )


def describe_written(config: VisualGLMConfig) -> Iterator[str]:
    """Lines about what SAT will do differently, for the user."""
    if not has_native_alpha(config.text_config):
        yield (
            f"warning: the residual factor of this model is {config.text_config.residual_alpha:.4f}; SAT computes "
            f"sqrt(2 * num_layers) and will answer differently. {MODEL_CONFIG} records it for the way back."
        )
    if config.text_config.prefix_projection:
        yield "The network that computes the P-tuning prefix is folded into the prefix, as SAT has it."
