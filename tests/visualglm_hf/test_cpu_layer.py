"""Room: what is between the products of a layer on a CPU: each kernel against its naive twin."""

import pytest
import torch

from tests.helpers import skip_without_cpu_kernels, torch_threads
from visualglm_hf.cpu_decoder import StepKernels, addresses_of
from visualglm_hf.cpu_language import HALVES
from visualglm_hf.cpu_layer import (
    GeluTask,
    NarrowTask,
    NormTask,
    ResidualTask,
    RotateTask,
    gelu_naive,
    narrow_naive,
    norm_naive,
    residual_naive,
    rotate_naive,
)
from visualglm_hf.cpu_runtime import load_llvm


skip_without_cpu_kernels()
STEP_KERNELS = StepKernels(load_llvm())
LAST_BIT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def run(task, columns: int, dtype: torch.dtype) -> None:
    with torch_threads(2):
        STEP_KERNELS.pool.run(*STEP_KERNELS.stage(dtype, columns, task))


@pytest.fixture(params=HALVES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def test_a_norm_is_its_twin_but_for_the_last_bit(dtype):
    x, (weight, bias) = narrow_naive(random(5, 96), dtype), random(2, 96).to(dtype)
    out = torch.empty(5, 96)
    run(NormTask(5, 0, *addresses_of(x, weight, bias, out), 1e-5), 96, dtype)
    expected = norm_naive(x, weight, bias, 1e-5)
    assert ((out - expected).abs() <= LAST_BIT[dtype] * expected.abs()).all()


def test_rounding_is_its_twin_to_the_bit(dtype):
    x, out = random(3, 64), torch.empty(3, 64)
    run(NarrowTask(3, 0, *addresses_of(x, out)), 64, dtype)
    assert torch.equal(out, narrow_naive(x, dtype))


def test_gelu_is_its_twin_but_for_the_last_bit(dtype):
    product, bias, out = random(3, 64) * 4, random(64).to(dtype), torch.empty(3, 64)
    run(GeluTask(3, 0, *addresses_of(product, bias, out)), 64, dtype)
    expected = gelu_naive(product, bias)
    assert ((out - expected).abs() <= LAST_BIT[dtype] * expected.abs() + 1e-6).all()


def test_a_residual_is_its_twin_to_the_bit(dtype):
    product, bias, x = random(3, 64), random(64).to(dtype), narrow_naive(random(3, 64, seed=1), dtype)
    out = torch.empty(3, 64)
    run(ResidualTask(3, 0, *addresses_of(product, bias, x, out), 7.4833), 64, dtype)
    expected = residual_naive(product, bias, x, 7.4833)
    assert ((out - expected).abs() <= LAST_BIT[dtype] * expected.abs()).all()


def test_rotation_is_its_twin_to_the_bit(dtype):
    batch, heads, columns = 2, 3, 64
    product, bias = random(batch, heads, 3, columns), random(heads, 3, columns).to(dtype)
    rotary = random(2, batch, 2, columns // 4)
    rotary = rotary.half().float() if dtype == torch.float16 else rotary
    query, cached = torch.empty(batch, heads, columns), torch.zeros(2, batch, heads, 1, columns, dtype=dtype)
    task = RotateTask(
        batch * heads, 0, *addresses_of(product, bias, rotary, query), heads, rotary[0].numel(), 16.0, 2.0
    )
    task.write_to(*cached)
    run(task, columns, dtype)
    expected = rotate_naive(product, bias, rotary, 16.0, 2.0)
    for ours, theirs in zip((query, *cached[..., 0, :]), expected, strict=True):
        assert torch.equal(ours, theirs)
