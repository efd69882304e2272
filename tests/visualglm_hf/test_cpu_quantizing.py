"""Room: the kernels that choose codes and scales on a CPU, to the bit those of their naive twins; what goes without."""

import math
import platform
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import assemble, default_dtype, skip_without_cpu_kernels, torch_threads
from visualglm_hf import cpu_quantizing, cpu_runtime, quantization
from visualglm_hf.cpu_quantizing import (
    CPU_QUANTIZING,
    FEW_WEIGHTS,
    FORMS,
    CpuQuantizing,
    PeakTask,
    QuantizingKernels,
    RoundTask,
    SearchTask,
    peak_kernel,
    round_kernel,
    search_kernel,
    weight_obstacle,
    write_quantizing,
)
from visualglm_hf.cpu_runtime import Compiler
from visualglm_hf.kernel_choice import KernelError
from visualglm_hf.lowbit_codes import add_in_order, add_lanes, peak_naive, quantize_naive, search_naive
from visualglm_hf.quantization import QuantizedLinear, quantize_tensor


skip_without_cpu_kernels()
IS_X86 = platform.machine().lower() in cpu_runtime.X86
FORMATS = [(8, None), (4, None), (4, 16), (4, 48), (4, 64), (4, 128)]


@pytest.fixture
def kernels() -> QuantizingKernels:
    assert CPU_QUANTIZING.kernels is not None
    return CPU_QUANTIZING.kernels


@pytest.fixture
def renew(monkeypatch):
    """Makes what quantizes on a CPU anew."""

    def make() -> CpuQuantizing:
        user = CpuQuantizing()
        for module in (quantization, cpu_quantizing):
            monkeypatch.setattr(module, "CPU_QUANTIZING", user)
        return user

    return make


def make_weights(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal rows of many sizes, with outliers; then rows of zeros, of equal sizes, of ties, and of tiny numbers."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * torch.randn(rows, 1, generator=random).exp()
    weight = torch.where(torch.rand(rows, columns, generator=random) < 0.01, 8 * weight, weight)
    special = [
        torch.zeros(columns),
        -torch.zeros(columns),
        torch.randn(columns, generator=random).sign() * 0.25,
        torch.randint(-20, 21, (columns,), generator=random) / 8,
        torch.randn(columns, generator=random) * 1e-6,
        torch.randn(columns, generator=random) * 1e-9,
    ]
    for row, values in zip(range(rows - 1, 0, -1), special, strict=False):
        weight[row] = values
    return weight.to(dtype)


def is_same(pair: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether codes and scales are the same, and the sign of a scale that is 0, too."""
    (codes, scales), (other_codes, other_scales) = pair, other
    return torch.equal(codes, other_codes) and torch.equal(scales.view(torch.int16), other_scales.view(torch.int16))


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_codes_and_scales_are_the_twins_to_the_bit(kernels, bits, group_size, dtype):
    for rows, columns in ((16, 384), (35, 768), (17, 1920)):
        weight = make_weights(rows, columns, dtype)
        assert is_same(kernels.quantize(weight, bits, group_size), quantize_naive(weight, bits, group_size))


@given(
    st.integers(1, 40), st.integers(1, 5), st.sampled_from(FORMATS), st.sampled_from(list(FORMS)), st.integers(0, 2**31)
)
@settings(max_examples=60, deadline=None)
def test_any_matrix_that_fits_is_quantized_as_the_twin_does(rows, parts, form, dtype, seed):
    bits, group_size = form
    weight = make_weights(rows, (group_size or 1) * 16 * parts, dtype, seed)
    assert is_same(CPU_QUANTIZING.kernels.quantize(weight, *form), quantize_naive(weight, bits, group_size))


def test_the_largest_magnitudes_are_the_twins(kernels):
    for dtype in FORMS:
        weight = make_weights(19, 224, dtype)
        assert torch.equal(kernels.find_peaks(weight), peak_naive(weight))


@pytest.mark.parametrize("has_openmp", [True, False])
def test_threads_share_the_groups_and_leave_none(kernels, monkeypatch, has_openmp):
    if not has_openmp:
        monkeypatch.setattr(kernels.pool, "openmp", None)
    elif kernels.pool.openmp is None:
        pytest.skip("no GNU OpenMP here")
    weight = make_weights(509, 1024, torch.float16)
    with torch_threads(4):
        for form in FORMATS[:2] + FORMATS[-1:]:
            for _ in range(5):
                assert is_same(kernels.quantize(weight, *form), quantize_naive(weight, *form))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_other_defaults_of_torch_change_nothing(renew, default):
    weight = make_weights(40, 256, torch.float16)
    expected = [quantize_naive(weight, *form) for form in FORMATS[:2] + FORMATS[-2:]]
    with default_dtype(default), torch.device("meta"):
        kernels = renew().kernels
        assert kernels is not None
        found = [kernels.quantize(weight, *form) for form in FORMATS[:2] + FORMATS[-2:]]
    assert all(map(is_same, found, expected))


# The order of sums


def test_torch_adds_in_the_order_that_is_written_down_or_is_not_asked_to():
    for columns in (8, 16, 24, 40, 64, 96, 128, 256, 504, 520, 30):
        numbers = torch.randn(3, 50, columns)
        total = add_in_order(numbers)
        assert torch.allclose(total, numbers.double().sum(-1, keepdim=True).float(), atol=1e-4)
        if columns % 8 == 0 and columns < 512:
            assert torch.equal(total, add_lanes(numbers))


def test_a_torch_that_adds_in_another_order_chooses_the_same_codes(monkeypatch):
    weight = make_weights(33, 512)
    expected = search_naive(weight, 64)
    monkeypatch.setattr("visualglm_hf.lowbit_codes.torch_adds_in_order", lambda columns: False)
    assert is_same(search_naive(weight, 64), expected)


def test_the_order_of_sums_is_that_of_the_definition():
    """Eight lanes; in each four sums that take turns; told apart by numbers of which the small ones can vanish."""
    numbers = torch.zeros(1, 64)
    numbers[0, [0, 8, 32]] = torch.tensor([2.0**30, 1.0, -(2.0**30)])  # 0 and 32 are of one sum, 8 of another
    assert add_lanes(numbers).item() == 1
    numbers[0, [0, 8, 32]] = torch.tensor([2.0**30, -(2.0**30), 1.0])  # the 1 joins the sum that is large
    assert add_lanes(numbers).item() == 0


# Through the door


BIG = (FEW_WEIGHTS // 1024, 1024)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, -1), (4, None), (4, 32)])
def test_layers_are_quantized_by_the_kernels(monkeypatch, bits, group_size):
    calls = []
    original = QuantizingKernels.quantize
    monkeypatch.setattr(
        QuantizingKernels, "quantize", lambda self, *arguments: calls.append(1) or original(self, *arguments)
    )
    linear = nn.Linear(BIG[1], BIG[0])
    layer = QuantizedLinear.from_linear(linear, bits, group_size)
    assert calls == [1]
    groups = {None: 64, -1: None}.get(group_size, group_size) if bits == 4 else None
    assert is_same((layer.weight.detach(), layer.weight_scale), quantize_naive(linear.weight.detach(), bits, groups))


@pytest.mark.parametrize(
    ("weight", "group_size", "reason"),
    [
        (torch.zeros(BIG, device="meta"), 64, "a matrix on meta"),
        (torch.zeros(BIG, dtype=torch.float64), 64, "float64 weights"),
        (torch.zeros(1024, BIG[0]).T, 64, "not contiguous"),
        (torch.zeros(BIG), 8, "groups of 8 columns"),
        (torch.zeros(BIG), 512, "groups of 512 columns"),
        (torch.zeros(2**13, 40), None, "rows of 40 columns"),
        (torch.zeros(4, 64), 64, "fewer than 262,144 weights"),
    ],
)
def test_what_the_kernels_do_not_take_has_a_reason(weight, group_size, reason):
    assert reason in weight_obstacle(weight, group_size)


@pytest.mark.parametrize("make", [torch.Tensor.double, lambda weight: weight.T.contiguous().T])
def test_what_the_kernels_do_not_take_is_quantized_all_the_same(make):
    weight = make_weights(*BIG)
    assert is_same(quantize_tensor(make(weight), 4), quantize_tensor(weight, 4))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("form", [(8, None), (4, -1), (4, 64)])
def test_weights_that_are_not_finite_or_too_large_are_refused(form, bad):
    weight = make_weights(*BIG)
    weight[77, 500] = bad
    with pytest.raises(ValueError, match="not finite, or too large"):
        quantize_tensor(weight, *form)


# Other processors


BASIC = {"avx2": True, "f16c": True, "fma": True, "avx512f": False}


@pytest.mark.skipif(not IS_X86, reason="for x86")
def test_a_smaller_processor_chooses_the_same_codes(kernels, monkeypatch):
    monkeypatch.setattr(cpu_runtime, "Compiler", partial(Compiler, processor="haswell", features=BASIC))
    smaller = CpuQuantizing().kernels
    assert smaller is not None  # they passed the self-check
    for dtype in FORMS:
        weight = make_weights(33, 768, dtype)
        for form in FORMATS:
            assert is_same(smaller.quantize(weight, *form), kernels.quantize(weight, *form))


@pytest.mark.parametrize(
    ("triple", "processor"),
    [
        ("x86_64-pc-linux-gnu", "skylake-avx512"),
        ("x86_64-pc-windows-msvc", "alderlake"),
        ("aarch64-linux-gnu", "neoverse-n1"),
        ("arm64-apple-darwin", "apple-m1"),
    ],
)
def test_the_kernels_compile_for_other_processors(triple, processor):
    for dtype in FORMS:
        for source in (
            write_quantizing("kernel", search_kernel, SearchTask, dtype, columns=64),
            write_quantizing("kernel", peak_kernel, PeakTask, dtype, columns=4096),
            write_quantizing("kernel", round_kernel, RoundTask, dtype, columns=4096, bits=4),
        ):
            assembly = assemble(source, triple, processor)
            assert "kernel" in assembly
            assert not any(function in assembly for function in ("__extendhfsf2", "__gnu_h2f_ieee", "__truncsfhf2"))


# Checked before they are used


def test_kernels_that_choose_other_codes_are_not_used(monkeypatch, renew):
    weight = make_weights(*BIG)
    expected = quantize_tensor(weight, 4)
    monkeypatch.setattr(cpu_quantizing, "DIVISORS", (7.0,))
    renew()
    with pytest.warns(RuntimeWarning, match="4 bits, one scale per 64 columns, of float32 are other codes"):
        assert is_same(quantize_tensor(weight, 4), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the one warning was enough
        assert is_same(quantize_tensor(weight, 4), expected)
    monkeypatch.setenv("VISUALGLM_KERNELS", "cpu")
    renew()
    with pytest.raises(KernelError, match="do not work: 4 bits"):
        quantize_tensor(weight, 4)


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")
    assert CpuQuantizing().kernels is None
