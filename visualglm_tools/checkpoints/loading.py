"""A checkpoint folder -> a model and its tokenizer: the one place from which the tools have a model that is stored.

`load_model` gives one for answering, on the device and in the number format that suit this machine; `load_weights` is
what it and all others load with, so that all refuse the same: a folder without a VisualGLM, damaged files, weights that
are missing, bits that contradict.

Not here: options and prompts of a door, and how quantization works.
"""

import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import HF_MODULES_CACHE

from visualglm_hf import (
    ChatGLMTokenizer,
    LowBitConfig,
    VisualGLMConfig,
    VisualGLMForConditionalGeneration,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
)
from visualglm_tools.checkpoints.adapters import attach_adapter
from visualglm_tools.checkpoints.folder import check_folder
from visualglm_tools.checkpoints.picture_size import image_size_of, override_image_size, set_image_size
from visualglm_tools.checkpoints.precision import faster_dtype
from visualglm_tools.packages import install
from visualglm_tools.printing import first_line


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUR_CODE = "modeling_visualglm.py"  # a folder with this file brings its own, current code
SPARE_MEMORY = 1.2  # times the weights: activations, cache, the rest of the process
SMALL = 2**30  # bytes of weights that are multiplied in no time
NO_CACHE = (
    ". A copy of the checkpoint's code is kept there; name a folder that can be written with the environment variable "
    "HF_HOME, or HF_MODULES_CACHE for the code alone."
)
DAMAGE = (OSError, EOFError, ImportError, RuntimeError, SafetensorError, pickle.UnpicklingError)


def load_model(
    folder: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quant: int | None = None,
    adapter: str | Path | None = None,
    quant_image_encoder: bool = False,
    image_size: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint for answering; what was chosen for "auto" is said on stderr.

    The folder's own code runs if that is ours; the original's does not run any more.

    Args:
        folder: a prepared folder with our code beside the weights, or the original's as it was downloaded.
        device: "cuda", "cuda:1", "mps" or "cpu"; "auto" takes the first of them that is there.
        dtype: "float32", "float16" or "bfloat16"; "auto" takes float16 on an accelerator, and on a CPU float32 or
            bfloat16, see `choose_dtype`.
        quant: 4 or 8 to quantize the language model to that many bits while it is loaded, unless it is stored so.
        adapter: folder with a PEFT adapter that was trained on this checkpoint, see `attach_adapter`.
        quant_image_encoder: with `quant`, quantize the image encoder too, to 8 bits, unless it is stored so.
        image_size: pixels a side at which pictures are shown; None for what the adapter was trained with, or else the
            checkpoint.

    Raises:
        ValueError: as `load_weights`; an adapter that does not fit, a device that is not there, or a size of pictures
            that is not whole patches.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    if image_size is not None:
        set_image_size(VisualGLMConfig.from_pretrained(folder), image_size)  # before the weights are loaded
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device, folder)
    bits = f", {quant} bits{', image encoder 8' if quant_image_encoder else ''}" if quant else ""
    print(f"Loading {folder} ({str(chosen_dtype).removeprefix('torch.')} on {chosen_device}{bits})", file=sys.stderr)
    own_code = (folder / OUR_CODE).is_file()
    tokenizer = load_tokenizer(folder, own_code)
    model = load_weights(folder, chosen_dtype, quant, own_code=own_code, image_encoder=quant_image_encoder)
    if adapter:
        attach_adapter(model, adapter)
    if image_size is not None:
        override_image_size(model, image_size)
    return model.to(chosen_device).eval(), tokenizer


def load_weights(
    folder: Path,
    dtype: torch.dtype,
    bits: int | None = None,
    backend: str = "lowbit",
    own_code: bool = False,
    image_encoder: bool = False,
) -> PreTrainedModel:
    """Load the model of a checkpoint, on the CPU.

    Args:
        folder: prepared, or the original's.
        dtype: of everything that is not quantized.
        bits: 4 or 8, of the decoder's matrices: quantized while they are loaded, or stored so. None: as it is stored.
        backend: "lowbit" for this package's own linear layers, "nf4" for those of bitsandbytes (4 bits).
        own_code: run the code beside the weights instead of this package's.
        image_encoder: with `bits`, quantize the image encoder too, to 8 bits, or it is stored so.

    Raises:
        ValueError: no VisualGLM in the folder, damaged or missing weights, weights that are stored in other bits, or
            bits that the backend does not have; bitsandbytes is not installed; an image encoder that is asked for in 8
            bits without a decoder in low bits.
    """
    folder = folder.expanduser()
    check_folder(folder)
    loader, options = (AutoModel, {"trust_remote_code": True}) if own_code else (VisualGLMForConditionalGeneration, {})
    if image_encoder and not bits:
        raise ValueError("An image encoder in 8 bits goes with a language model in 8 or 4 bits. Say how many.")
    if bits and not is_stored_in(folder, bits, backend, image_encoder):
        options["quantization_config"] = quantization(bits, backend, dtype, image_encoder)
    with damage_refused(folder):
        model, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} weights, among them {missing[0]}; they would be random. Is the "
            "download complete?"
        )
    return model


def load_tokenizer(folder: Path, own_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; arguments and errors as those of `load_weights`."""
    with damage_refused(folder):
        if own_code:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        return ChatGLMTokenizer.from_pretrained(folder)


def load_processor(folder: Path, config: VisualGLMConfig) -> VisualGLMProcessor:
    """The processor that fits a checkpoint, an original or a prepared one."""
    return make_processor(load_tokenizer(folder), config)


def make_processor(tokenizer: PreTrainedTokenizerBase, config: VisualGLMConfig) -> VisualGLMProcessor:
    """The processor of a model whose tokenizer is known."""
    side = image_size_of(config)
    image_processor = VisualGLMImageProcessor(size={"height": side, "width": side})
    return VisualGLMProcessor(image_processor, tokenizer, num_query_tokens=config.qformer_config.num_query_tokens)


@contextmanager
def damage_refused(folder: Path) -> Iterator[None]:
    """What libraries raise for files that cannot be read is a `ValueError` of one line."""
    try:
        yield
    except DAMAGE as error:
        advice = NO_CACHE if isinstance(error, OSError) and is_of_cache(error.filename) else ""
        raise ValueError(f"cannot load {str(folder)!r}: {first_line(error)}{advice}") from error


def is_of_cache(path: str | None) -> bool:
    """Whether a path belongs to where transformers keeps copies of a checkpoint's code, or leads there."""
    if not isinstance(path, str) or not path:
        return False
    cache, found = Path(HF_MODULES_CACHE).absolute(), Path(path).absolute()
    return cache.is_relative_to(found) or found.is_relative_to(cache)


# ---------------------------------------------------------------- bits


def is_stored_in(folder: Path, bits: int, backend: str, image_encoder: bool = False) -> bool:
    """Whether the weights have so many bits already; False for full ones, a `ValueError` for others."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_bit")
    if stored and (stored != bits or backend != "lowbit"):
        wanted = f"{bits}" if backend == "lowbit" else f"{bits} in {backend}"
        raise ValueError(f"{str(folder)!r} has weights of {stored} bits, not of {wanted}.")
    if stored and image_encoder and not config.get("quantization_image_encoder"):
        raise ValueError(
            f"{str(folder)!r} has a full image encoder beside its weights of {stored} bits. Quantize the full weights "
            "anew, with --quant-image-encoder."
        )
    return bool(stored)


def quantization(
    bits: int, backend: str, dtype: torch.dtype, image_encoder: bool = False
) -> LowBitConfig | BitsAndBytesConfig:
    """What transformers is to do while loading; see `load_weights`."""
    if backend == "lowbit":
        return LowBitConfig(bits, image_encoder=image_encoder)
    if image_encoder:
        raise ValueError("bitsandbytes leaves the image encoder as it is: only the backend lowbit has 8 bits for it.")
    if bits != 4:
        raise ValueError(
            f"--qlora_backend nf4 has 4 bits, not {bits}; leave --bits out or take --qlora_backend lowbit."
        )
    try:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["image_encoder", "lm_head"],
        )
    except ImportError as error:
        raise ValueError(f"--qlora_backend nf4 needs bitsandbytes: {install('train', 'quant')}") from error


# ---------------------------------------------------------------- what suits this machine


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the best there is for "auto"; a `ValueError` if this machine lacks it."""
    present = [
        kind for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.mps.is_available())) if there
    ]
    present.append("cpu")
    if name == "auto":
        return torch.device(present[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device is called {name!r}; this machine has {', '.join(present)}.") from error
    too_high = device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count()
    if device.type not in present or too_high:
        raise ValueError(f"device {name!r} is not available; this machine has {', '.join(present)}.")
    return device


def choose_dtype(name: str, device: torch.device, folder: Path) -> torch.dtype:
    """The number format called `name`.

    "auto" is float16 on an accelerator. On a CPU it is bfloat16 where float32 does not fit into the free memory or is
    clearly slower, else float32; a model that is small is in float32 without asking.
    """
    if name != "auto":
        return DTYPES[name]
    dtype = choose_exact_dtype(device, folder)
    return faster_dtype() if dtype == torch.float32 and size_in_float32(folder) >= SMALL else dtype


def choose_exact_dtype(device: torch.device, folder: Path) -> torch.dtype:
    """The most exact format in which a checkpoint can be computed with: on a CPU float32, if that fits."""
    if device.type != "cpu":
        return torch.float16
    fits = size_in_float32(folder) * SPARE_MEMORY < psutil.virtual_memory().available
    return torch.float32 if fits else torch.bfloat16


def size_in_float32(folder: Path) -> int:
    """Bytes that the weights would take in float32."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("dtype") or config.get("torch_dtype")
    return sum(file.stat().st_size for file in files) * (1 if stored == "float32" else 2)
