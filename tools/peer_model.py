"""Write a model of VisualGLM's widths for llama.cpp, to be measured beside ours: random weights in one GGUF file.

    python -m tools.peer_model /tmp/peer.gguf
    visualglm bench --variants int4 --peer "llama.cpp Q4_0=llama-bench -m /tmp/peer.gguf -p 64 -n 0 -t 2 -r 3 -o json"

llama.cpp has no VisualGLM. Its GPT-NeoX has the same matrices in each layer: query, key and value in one, the output of
attention, and two around a GELU, all with biases. They are in 4.5 bits per weight (Q4_0: 32 codes and a float16 scale),
the output layer in float16, as ours. A step and a prompt take as long whatever the numbers are.

Not here: anything that could answer a question. There are no image encoder, no positions of GLM and no words.
"""

import argparse
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy
from transformers import PreTrainedConfig

from visualglm_hf import VisualGLMConfig


MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, FLOAT32, BOOL, STRING = 4, 6, 7, 8  # kinds of values
F32, F16, Q4_0 = 0, 1, 2  # kinds of tensors
Q4_0_COLUMNS, Q4_0_BYTES = 32, 18  # of a block
WEIGHT_STD, CODE_STD = 0.02, 4.6  # of weights, and of codes that are as likely as each other
Shapes = dict[str, tuple[int, tuple[int, ...]]]  # name -> kind and shape, the columns last


def list_values(config: PreTrainedConfig) -> dict[str, str | bool | int | float]:
    """The values that llama.cpp wants to know of a GPT-NeoX."""
    return {
        "general.architecture": "gptneox",
        "gptneox.context_length": config.max_position_embeddings,
        "gptneox.embedding_length": config.hidden_size,
        "gptneox.block_count": config.num_hidden_layers,
        "gptneox.feed_forward_length": config.intermediate_size,
        "gptneox.attention.head_count": config.num_attention_heads,
        "gptneox.attention.layer_norm_epsilon": config.layer_norm_eps,
        "gptneox.rope.dimension_count": config.head_dim,
        "gptneox.use_parallel_residual": False,
        "gptneox.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }


def list_tensors(config: PreTrainedConfig) -> Shapes:
    """The tensors of the model, in the order of the file."""
    hidden, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    matrices = {
        "attn_qkv": (3 * hidden, hidden),
        "attn_output": (hidden, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    tensors: Shapes = {"token_embd.weight": (Q4_0, (vocabulary, hidden))}
    for layer in range(config.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            tensors |= {f"blk.{layer}.{norm}.{part}": (F32, (hidden,)) for part in ("weight", "bias")}
        for name, shape in matrices.items():
            tensors[f"blk.{layer}.{name}.weight"] = (Q4_0, shape)
            tensors[f"blk.{layer}.{name}.bias"] = (F32, shape[:1])
    tensors |= {f"output_norm.{part}": (F32, (hidden,)) for part in ("weight", "bias")}
    return {**tensors, "output.weight": (F16, (vocabulary, hidden))}


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(content: str | bool | int | float) -> bytes:
    """A value with its kind."""
    if isinstance(content, str):
        return struct.pack("<I", STRING) + string(content)
    kinds = {bool: (BOOL, "?"), int: (UINT32, "I"), float: (FLOAT32, "f")}
    kind, form = kinds[type(content)]
    return struct.pack(f"<I{form}", kind, content)


def count_bytes(kind: int, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor."""
    count = int(numpy.prod(shape))
    return count // Q4_0_COLUMNS * Q4_0_BYTES if kind == Q4_0 else count * {F32: 4, F16: 2}[kind]


def padding(length: int) -> int:
    """Bytes after so many, up to where the next tensor may begin."""
    return -length % ALIGNMENT


def header(values: dict, tensors: Shapes) -> bytes:
    """All that stands before the tensors."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    parts += [string(name) + value(content) for name, content in values.items()]
    at = 0
    for name, (kind, shape) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [string(name), sizes, struct.pack("<IQ", kind, at)]
        at += count_bytes(kind, shape) + padding(count_bytes(kind, shape))
    written = b"".join(parts)
    return written + bytes(padding(len(written)))


def random_tensor(kind: int, shape: tuple[int, ...], random: numpy.random.Generator) -> Iterator[bytes]:
    """The bytes of a tensor, a row at a time, of which a few are repeated: numbers for each would take minutes."""
    rows, columns = shape if len(shape) == 2 else (1, *shape)
    known = []
    for _ in range(min(rows, 61)):  # a prime, so that no thread has the same rows in each of its chunks
        if kind == Q4_0:
            blocks = numpy.empty(columns // Q4_0_COLUMNS, [("scale", "<f2"), ("codes", "u1", Q4_0_COLUMNS // 2)])
            blocks["scale"], blocks["codes"] = WEIGHT_STD / CODE_STD, random.integers(0, 256, blocks["codes"].shape)
            known.append(blocks.tobytes())
        else:
            numbers = random.standard_normal(columns, numpy.float32) * WEIGHT_STD
            known.append(numbers.astype({F32: "<f4", F16: "<f2"}[kind]).tobytes())
    return (known[row % len(known)] for row in range(rows))


def write_model(file: BinaryIO, config: PreTrainedConfig) -> None:
    """Write the whole file."""
    tensors, random = list_tensors(config), numpy.random.default_rng(0)
    file.write(header(list_values(config), tensors))
    for kind, shape in tensors.values():
        for row in random_tensor(kind, shape, random):
            file.write(row)
        file.write(bytes(padding(count_bytes(kind, shape))))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what is written, 4.5 GB for the full size")
    parser.add_argument("--layers", type=int, default=28, help="of the model's 28")
    options = parser.parse_args(arguments)
    with options.file.open("wb") as file:
        write_model(file, VisualGLMConfig(text_config={"num_hidden_layers": options.layers}).text_config)
    print(f"{options.file}: {options.file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
