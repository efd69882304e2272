"""A checkpoint folder -> a model and its tokenizer, on the device and in the number format that suit this machine.

Not here: options and prompts of a door, and how quantization works (`model.quantize`).
"""

import json
import pickle
import sys
from pathlib import Path

import psutil
import torch
from visualglm_tools.checkpoints.adapters import attach_adapter
from visualglm_tools.checkpoints.folder import check_folder
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from visualglm_hf import ChatGLMTokenizer, VisualGLMForConditionalGeneration


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUR_CODE = "modeling_visualglm.py"  # a folder with this file brings its own, current code
SPARE_MEMORY = 1.2  # times the weights: activations, cache, the rest of the process


def load_model(
    folder: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quant: int | None = None,
    adapter: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint for answering; what was chosen for "auto" is said on stderr.

    Args:
        folder: a prepared folder with our code beside the weights, or the original's as it was downloaded.
        device: "cuda", "cuda:1", "mps" or "cpu"; "auto" takes the first of them that is there.
        dtype: "float32", "float16" or "bfloat16"; "auto" takes float16 on an accelerator, and on a CPU float32 where
            it fits into the free memory, else bfloat16.
        quant: 4 or 8 to quantize the language model to that many bits, before it moves to the device.
        adapter: folder with a PEFT adapter that was trained on this checkpoint, see `attach_adapter`.

    Raises:
        ValueError: no VisualGLM in the folder, damaged or missing weights, an adapter that does not fit, or a device
            that is not there.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device, folder)
    bits = f", {quant} bits" if quant else ""
    print(f"Loading {folder} ({str(chosen_dtype).removeprefix('torch.')} on {chosen_device}{bits})", file=sys.stderr)
    try:
        model, tokenizer = load_checkpoint(folder, chosen_dtype)
    except (OSError, EOFError, ImportError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot load {str(folder)!r}: {first_line(error)}") from error
    if quant:
        model = model.quantize(quant)
    if adapter:
        attach_adapter(model, adapter)
    return model.to(chosen_device).eval(), tokenizer


def load_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load with the folder's own code if that is ours; the original's does not run any more."""
    if (folder / OUR_CODE).is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype, output_loading_info=True)
    else:
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
        model, info = VisualGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} weights, among them {missing[0]}; they would be random. Is the "
            "download complete?"
        )
    return model, tokenizer


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
    """The number format called `name`; for "auto" see `load_model`."""
    if name != "auto":
        return DTYPES[name]
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


def first_line(error: Exception) -> str:
    """What an error of a library says, without its paragraphs of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
