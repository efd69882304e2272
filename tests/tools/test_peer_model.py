"""The model that llama.cpp is given to be measured beside ours: a GGUF file, read back by the format's description."""

import io
import struct

import numpy
import pytest

from tools.peer_model import header, list_tensors, list_values, write_model
from visualglm_hf import VisualGLMConfig
from visualglm_tools.benchmarking.models import TINY


SMALL = VisualGLMConfig(**TINY).text_config


def read(file: io.BytesIO, form: str) -> int | float | bool:
    (content,) = struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
    return content


def read_string(file: io.BytesIO) -> str:
    return file.read(read(file, "Q")).decode()


def read_model(content: bytes) -> tuple[dict, dict]:
    """The values, and the bytes of each tensor from where it begins, by its kind and shape."""
    file = io.BytesIO(content)
    assert (file.read(4), read(file, "I")) == (b"GGUF", 3)
    tensors, values = read(file, "Q"), read(file, "Q")
    kinds = {4: lambda: read(file, "I"), 6: lambda: read(file, "f"), 7: lambda: read(file, "?"), 8: None}
    known = {}
    for _ in range(values):
        name, kind = read_string(file), read(file, "I")
        known[name] = read_string(file) if kind == 8 else kinds[kind]()
    places = {}
    for _ in range(tensors):
        name = read_string(file)
        shape = [read(file, "Q") for _ in range(read(file, "I"))]
        places[name] = (read(file, "I"), tuple(reversed(shape)), read(file, "Q"))
    start = file.tell() + -file.tell() % 32
    return known, {name: (kind, shape, content[start + at :]) for name, (kind, shape, at) in places.items()}


@pytest.fixture(scope="module")
def model() -> tuple[dict, dict]:
    file = io.BytesIO()
    write_model(file, SMALL)
    return read_model(file.getvalue())


def test_the_file_says_what_widths_the_model_has(model):
    values, tensors = model
    assert values["general.architecture"] == "gptneox"
    assert (values["gptneox.embedding_length"], values["gptneox.block_count"]) == (64, 3)
    assert values["gptneox.use_parallel_residual"] is False
    assert tensors["blk.1.attn_qkv.weight"][:2] == (2, (192, 64))
    assert tensors["blk.1.ffn_down.weight"][:2] == (2, (64, 256))
    assert tensors["output.weight"][:2] == (1, (256, 64))
    assert len(tensors) == 3 * 12 + 4


def test_every_tensor_is_where_the_file_says_and_has_finite_numbers(model):
    _, tensors = model
    for kind, shape, content in tensors.values():
        count = int(numpy.prod(shape))
        if kind == 2:
            blocks = numpy.frombuffer(content, [("scale", "<f2"), ("codes", "u1", 16)], count // 32)
            assert (blocks["scale"] == numpy.float16(0.02 / 4.6)).all()
            assert len(set(blocks["codes"].ravel())) > 100
        else:
            numbers = numpy.frombuffer(content, {0: "<f4", 1: "<f2"}[kind], count)
            assert 0.01 < numbers.std() < 0.03


def test_the_full_size_is_what_is_published():
    config = VisualGLMConfig().text_config
    _, (kind, shape, _) = list(read_model(header(list_values(config), list_tensors(config)))[1].items())[-1]
    assert (kind, shape) == (1, (130528, 4096))
