"""What tests of several rooms compare with."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch


FLOAT32_TOLERANCE = 2e-5  # of the array's scale: another order of summation
HALF_LOGITS_TOLERANCE = 0.11  # absolute: what float16 rounding does to logits of standard deviation 1
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of a value's own size
SUBNORMAL = 2.0**-25  # half of float16's smallest step


@contextmanager
def changed(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    """Another value of a setting that all share, for a while."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def torch_threads(number: int) -> AbstractContextManager[None]:
    """Let torch compute with so many threads."""
    return changed(torch.get_num_threads, torch.set_num_threads, number)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Another default dtype of torch."""
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


# Of a model whose layers the kernels and programs for a CPU take.
SMALL_CONFIG = {
    "text_config": {
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 384,
        "max_position_embeddings": 512,
        "mask_token_id": 250,
        "gmask_token_id": 251,
        "bos_token_id": 254,
        "eos_token_id": 255,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
    },
    "qformer_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_query_tokens": 4,
        "encoder_hidden_size": 32,
    },
}


def make_small_model(dtype: torch.dtype = torch.bfloat16, bits: int | None = 4, **quantization):
    """A model of `SMALL_CONFIG` whose norms, biases and matrices all matter."""
    from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration

    torch.manual_seed(0)
    model = VisualGLMForConditionalGeneration(VisualGLMConfig(**copy.deepcopy(SMALL_CONFIG))).eval()
    with torch.no_grad():
        for parameter in model.transformer.layers.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.dim() == 1 else 0.1)
    model = model.to(dtype)
    return model.quantize(bits, **quantization) if bits else model


def load_float32(folder, **options):
    """The model of a checkpoint in float32, in which our tests compare it with others."""
    from visualglm_hf import VisualGLMForConditionalGeneration

    return VisualGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_lowbit_problem(
    bits: int, outputs: int, inputs: int, groups: int, rows: int, dtype=torch.float32, seed: int = 0
):
    """Activations with outliers, codes and scales of a product in low bits."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=random).mul_(10 ** torch.randn(inputs, generator=random)).to(dtype)
    codes = torch.randint(-128, 128, (outputs, inputs * bits // 8), generator=random).to(torch.int8)
    scale = torch.rand((outputs, groups) if groups > 1 else (outputs,), generator=random).sub_(0.5).div_(100).half()
    return x, codes, scale


def weight_family(name: str, rows: int, columns: int) -> torch.Tensor:
    """Matrices of several families: normal; Student's t with 5 degrees of freedom; like a language model's.

    The last has rows and columns of log-normal size (sigma 0.3 and 0.25) and one weight in 3,333 eight times too large.
    """
    generator = seeded(0)
    weight = torch.randn(rows, columns, generator=generator)
    if name == "t5":
        weight = weight / torch.randn(5, rows, columns, generator=generator).square().mean(0).sqrt()
    if name == "llm":
        weight = weight * (0.3 * torch.randn(rows, 1, generator=generator)).exp()
        weight = weight * (0.25 * torch.randn(1, columns, generator=generator)).exp()
        weight = torch.where(torch.rand(rows, columns, generator=generator) < 0.0003, 8 * weight, weight)
    return 0.02 * weight


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error as a fraction of the norm of what is expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def relative_error(actual, expected) -> float:
    """Largest difference as a fraction of the largest expected value."""
    actual, expected = (np.asarray(value, dtype=np.float64) for value in (torch.as_tensor(actual).cpu(), expected))
    if actual.shape != expected.shape:
        raise ValueError(f"Cannot compare {actual.shape} with {expected.shape}.")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_product_is_exact(
    out: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    inputs: int,
    sum_error: float,
) -> None:
    """Each element is within the rounding of its own value, and `sum_error` of the sum of its products' magnitudes."""
    from visualglm_hf.lowbit_format import dequantize_naive

    matrix = dequantize_naive(codes, scale, bits, inputs, torch.float64)
    expected = x.double() @ matrix.T
    magnitude = x.double().abs() @ matrix.abs_().T
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    tolerance = ROUNDING[x.dtype] * expected.abs() + sum_error * magnitude + SUBNORMAL
    assert ((out.double() - expected).abs() <= tolerance).all()


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, and under each of them the same tensor: to the last bit, and in the same dtype."""
    assert found.keys() == expected.keys()
    pairs = ((key, found[key], tensor) for key, tensor in expected.items())
    assert [key for key, one, other in pairs if one.dtype != other.dtype or not torch.equal(one, other)] == []


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Two models have the same names and the same numbers."""
    assert_same(model.state_dict(), other.state_dict())


def user(*content: Any) -> dict:
    """A message of the user: one text, or parts."""
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def assistant(content: Any) -> dict:
    """A message of the model."""
    return {"role": "assistant", "content": content}


def kept_positions(case: dict, dtype: str) -> int:
    """How many last positions of a golden case's logits were kept ("last 12")."""
    return int(case[f"logits.{dtype}.positions"].split()[-1])


def visible_text(responses: list[str]) -> list[str]:
    """What a stream of whole, growing answers shows: no half characters, nothing twice."""
    seen: list[str] = []
    for response in responses:
        if response and not response.endswith("\ufffd") and response not in seen[-1:]:
            seen.append(response)
    return seen


def skip_without_cpu_kernels() -> None:
    """Skip a file of tests where there can be no kernels: no llvmlite, or a processor that lacks what they need."""
    from visualglm_hf.cpu_runtime import check_processor, load_llvm
    from visualglm_hf.kernel_choice import KernelError

    llvm = load_llvm()
    if llvm is None:
        pytest.skip("no llvmlite", allow_module_level=True)
    try:
        check_processor(llvm.get_host_cpu_features())
    except KernelError as error:
        pytest.skip(str(error), allow_module_level=True)


def assemble(source: str, triple: str, processor: str) -> str:
    """Compile LLVM code as our kernels are, to assembly for any processor; skips the test if this LLVM has no such."""
    machine, module = compile_for(source, triple, processor)
    return machine.emit_assembly(module)


def compile_for(source: str, triple: str, processor: str):
    """LLVM's machine of any processor, and our kernels' code as it is optimized for that; skips if there is no such."""
    from visualglm_hf.cpu_runtime import load_llvm

    llvm = load_llvm()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(str(error))
    machine = target.create_target_machine(processor, "", opt=3)
    module = llvm.parse_assembly(source)
    module.triple = triple
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return machine, module
