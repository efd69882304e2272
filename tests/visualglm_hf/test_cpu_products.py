"""Room: the kernels that LLVM compiles for this CPU, against the reference; and what happens without them."""

import ctypes
import math
import mmap
import multiprocessing
import platform
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import (
    assemble,
    default_dtype,
    difference,
    make_lowbit_problem,
    skip_without_cpu_kernels,
    torch_threads,
)
from visualglm_hf import cpu_products, cpu_runtime
from visualglm_hf.cpu_language import FLOATS32, I32, write_kernel
from visualglm_hf.cpu_products import (
    CPU_PRODUCTS,
    KINDS,
    CpuKernels,
    CpuProducts,
    choose_kinds,
    write_matrix,
    write_product,
)
from visualglm_hf.cpu_runtime import LARGE_PAGE, Compiler, Task, check_processor, load_llvm, make_empty
from visualglm_hf.kernel_choice import KernelError
from visualglm_hf.lowbit_format import dequantize_naive
from visualglm_hf.lowbit_products import (
    WAYS,
    Product,
    choose_way,
    multiply_half_on_cpu,
    multiply_on_cpu,
)
from visualglm_hf.quantization import QuantizedLinear


skip_without_cpu_kernels()
IS_X86 = platform.machine().lower() in cpu_runtime.X86
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of results, relative
HALVES = [torch.float16, torch.bfloat16]


KERNEL = WAYS["cpu"][0].name


@pytest.fixture
def kernels() -> CpuKernels:
    assert CPU_PRODUCTS.kernels is not None
    return CPU_PRODUCTS.kernels


def way_of(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int, inputs: int, transposed=False) -> str:
    """The name of the way that the operator takes."""
    return choose_way(WAYS["cpu"], Product(x.dtype, len(x), codes, scale, bits, inputs, transposed)).name


@pytest.fixture
def several_threads():
    """A matrix of 2 MiB is shared by four threads; the other tests have one."""
    with torch_threads(4):
        yield


def is_right(out: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> bool:
    """Whether a product is as near as 16-bit activations with a scale per block, and the dtype of `x`, allow."""
    matrix = dequantize_naive(codes, scale, bits, x.shape[1], torch.float64)
    expected = x.double() @ matrix.T
    blocks = x.double().unflatten(1, (-1, min(cpu_products.GROUP, x.shape[1])))
    half_a_step = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).flatten(1) / (2 * cpu_products.LARGEST_CODE)
    bound = (1.001 * half_a_step + 1e-6 * x.double().abs()) @ matrix.abs().T + TOLERANCE[x.dtype] * expected.abs()
    return out.dtype == x.dtype and out.shape == expected.shape and ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("bits", "inputs", "groups"),
    [
        *[(4, 128, groups) for groups in (1, 2, 4, 8)],
        *[(4, 768, groups) for groups in (1, 2, 3, 6, 12, 24, 48)],
        *[(8, inputs, 1) for inputs in (64, 192, 512)],
    ],
)
@pytest.mark.usefixtures("without_several_rows")
def test_products_with_codes_equal_the_reference(kernels, bits, inputs, groups, dtype):
    for outputs, rows in ((1, 1), (5, 2), (33, 3), (16, 4)):
        arguments = make_lowbit_problem(bits, outputs, inputs, groups, rows, dtype)
        assert way_of(*arguments, bits, inputs) == KERNEL
        assert is_right(kernels.multiply(*arguments, bits), *arguments, bits)


@pytest.mark.parametrize(
    ("bits", "inputs", "groups"),
    [*[(4, 768, groups) for groups in (1, 2, 3, 6, 12, 24, 48, 96)], (4, 128, 1), (8, 64, 1), (8, 192, 1), (8, 512, 2)],
)
def test_the_matrix_of_the_codes_is_the_references_to_the_bit(kernels, bits, inputs, groups):
    for outputs in (1, 7, 300):
        _, codes, scale = make_lowbit_problem(bits, outputs, inputs, groups, 1)
        for dtype in TOLERANCE:
            matrix = kernels.dequantize(codes, scale, bits, inputs, dtype)
            assert torch.equal(matrix, dequantize_naive(codes, scale, bits, inputs, dtype))


@pytest.mark.usefixtures("several_threads")
def test_gradients_are_multiplied_with_the_matrix_of_the_kernels(kernels, monkeypatch):
    calls = []
    original = kernels.dequantize
    monkeypatch.setattr(
        kernels, "dequantize", lambda *arguments: calls.append(len(arguments[0])) or original(*arguments)
    )
    for bits, groups in ((4, 16), (8, 1)):
        for dtype in TOLERANCE:
            _, codes, scale = make_lowbit_problem(bits, 1500, 1024, groups, 33, dtype)
            gradient = torch.randn(33, 1500).to(dtype)
            out = multiply_on_cpu(gradient, codes, scale, bits, 1024, True)
            assert (
                difference(out, gradient.double() @ dequantize_naive(codes, scale, bits, 1024, torch.float64))
                < (TOLERANCE[dtype])
            )
            assert sum(calls) == 1500
            calls.clear()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("inputs", [32, 96, 4096])
def test_products_with_halves_equal_the_reference(kernels, inputs, dtype):
    random = torch.Generator().manual_seed(1)
    for outputs, rows in ((1, 1), (5, 2), (33, 3), (16, 4)):
        x, matrix = (torch.randn(size, inputs, generator=random).to(dtype) for size in (rows, outputs))
        out = kernels.multiply(x, matrix, None, dtype)
        assert difference(out, x.double() @ matrix.double().T) < TOLERANCE[dtype]
        exact = kernels.multiply(x.float(), matrix, None, dtype)
        assert difference(exact, x.double() @ matrix.double().T) < 1e-6


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([0, 1, 2, 4]), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_int4_matrix_that_fits_is_computed_right(outputs, steps, groups_per_step, rows, seed):
    arguments = make_lowbit_problem(4, outputs, 128 * steps, max(1, groups_per_step * steps), rows, seed=seed)
    assert is_right(multiply_on_cpu(*arguments, 4, 128 * steps, False), *arguments, 4)


def test_blocks_of_zeros_and_of_tiny_numbers_are_no_trouble(kernels):
    _, codes, scale = make_lowbit_problem(4, 8, 256, 4, 1)
    x = torch.zeros(1, 256)
    assert kernels.multiply(x, codes, scale, 4).eq(0).all()
    x[:, 64:128] = 1e-41  # subnormal
    assert kernels.multiply(x, codes, scale, 4).abs().max() < 1e-36


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_other_defaults_of_torch_change_nothing(renew_products, default):
    arguments = make_lowbit_problem(4, 33, 768, 12, 4, torch.bfloat16)
    half = torch.randn(33, 64).bfloat16()
    expected = multiply_on_cpu(*arguments, 4, 768, False), multiply_half_on_cpu(half[:2], half)
    matrix = CPU_PRODUCTS.kernels.dequantize(*arguments[1:], 4, 768, torch.float32)
    with default_dtype(default), torch.device("meta"):
        products = renew_products()
        assert products.kernels is not None
        outs = multiply_on_cpu(*arguments, 4, 768, False), multiply_half_on_cpu(half[:2], half)
        assert torch.equal(products.kernels.dequantize(*arguments[1:], 4, 768, torch.float32), matrix)
    assert all(map(torch.equal, outs, expected))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(kernels, bad):
    for bits in (4, 8):
        x, codes, scale = make_lowbit_problem(bits, 8, 256, 1, 2)
        x[1, 77] = bad
        out = kernels.multiply(x, codes, scale, bits)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_activations_do_not_overflow(kernels, bits):
    codes = torch.full((4, 1024 * bits // 8), {4: 0x88 - 256, 8: -128}[bits], dtype=torch.int8)
    x = torch.full((1, 1024), 65504.0)
    out = kernels.multiply(x, codes, torch.ones(4).half(), bits)
    assert torch.allclose(out, torch.full((1, 4), 65504.0 * 1024 * -(2 ** (bits - 1))), rtol=1e-4)


@pytest.mark.parametrize("has_openmp", [True, False])
@pytest.mark.usefixtures("several_threads")
def test_threads_share_the_rows_and_leave_none(kernels, monkeypatch, has_openmp):
    if not has_openmp:
        monkeypatch.setattr(kernels.pool, "openmp", None)
    elif kernels.pool.openmp is None:
        pytest.skip("no GNU OpenMP here")
    for outputs in (1, 63, 4096, 4099):
        arguments = make_lowbit_problem(4, outputs, 1024, 16, 2)
        for _ in range(5):
            assert is_right(kernels.multiply(*arguments, 4), *arguments, 4)


@pytest.mark.parametrize("has_openmp", [True, False])
@pytest.mark.usefixtures("several_threads")
def test_products_at_the_same_time_do_not_disturb_each_other(kernels, monkeypatch, has_openmp):
    if not has_openmp:
        monkeypatch.setattr(kernels.pool, "openmp", None)
    problems = [make_lowbit_problem(4, 2048, 1024, 16, rows, seed=rows) for rows in (1, 2, 3, 4, 4, 3, 2, 1)]
    with ThreadPoolExecutor(8) as pool:
        outputs = pool.map(lambda problem: kernels.multiply(*problem, 4), problems * 4)
        for out, arguments in zip(outputs, problems * 4, strict=True):
            assert is_right(out, *arguments, 4)


def multiply_in_child(connection, kernels: CpuKernels, arguments: tuple) -> None:
    inherited = kernels.pool.helpers
    connection.send((kernels.multiply(*arguments, 4).tolist(), kernels.pool.helpers is not inherited))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_makes_its_own_threads(kernels, monkeypatch):
    monkeypatch.setattr(kernels.pool, "openmp", None)  # it cannot be forked, and nor can torch's threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    arguments = make_lowbit_problem(4, 2048, 1024, 16, 2)
    expected = kernels.multiply(*arguments, 4).tolist()
    receiver, sender = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=multiply_in_child, args=(sender, kernels, arguments))
    child.start()
    try:
        assert receiver.poll(60)
        out, has_threads_of_its_own = receiver.recv()
        assert out == expected
        assert has_threads_of_its_own
    finally:
        child.kill()


@pytest.mark.parametrize(("rows", "is_asked"), [(3 * LARGE_PAGE // 64, True), (10, False)])
def test_the_pages_of_a_large_tensor_alone_are_asked_to_be_large(monkeypatch, rows, is_asked):
    asked = []
    monkeypatch.setattr(cpu_runtime, "find_advise", lambda: lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    tensor = make_empty(rows, 64, dtype=torch.int8)
    assert (tensor.shape, tensor.dtype, bool(asked)) == ((rows, 64), torch.int8, is_asked)
    for first, nbytes, _ in asked:
        assert first % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0
        assert tensor.data_ptr() <= first < first + nbytes <= tensor.data_ptr() + tensor.nbytes


def test_a_system_that_is_not_asked_gives_a_tensor_all_the_same(monkeypatch):
    monkeypatch.setattr(cpu_runtime, "find_advise", lambda: None)
    assert make_empty(LARGE_PAGE, 2, dtype=torch.int8).fill_(1).all()


# Other processors


BASIC = {"avx2": True, "f16c": True, "fma": True, "avx512f": False}
PROCESSORS = {
    "haswell": (BASIC, "int4"),  # of 2013
    "alderlake": ({**BASIC, "avxvnni": True}, "int4_avxvnni"),
    "cascadelake": (
        dict.fromkeys((*BASIC, "avx512bw", "avx512dq", "avx512vl", "avx512vnni"), True),
        "int4_avx512vnni",
    ),
}


@pytest.mark.skipif(not IS_X86, reason="for x86")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_kernels_are_right_on_older_and_smaller_processors(kernels, monkeypatch, processor):
    features, name = PROCESSORS[processor]
    has = load_llvm().get_host_cpu_features()
    if not all(has.get(feature) for feature, is_needed in features.items() if is_needed):
        pytest.skip("this processor has less")
    monkeypatch.setattr(cpu_runtime, "Compiler", partial(Compiler, processor=processor, features=features))
    smaller = CpuProducts().kernels
    assert smaller is not None  # they passed the self-check
    assert smaller.kinds[4].name == name
    arguments = make_lowbit_problem(4, 33, 768, 12, 4)
    assert is_right(smaller.multiply(*arguments, 4), *arguments, 4)
    assert torch.equal(smaller.multiply(*arguments, 4), kernels.multiply(*arguments, 4))


def test_memory_is_asked_for_to_be_read_once_only_where_that_was_measured():
    vnni = {"avx512f": True, "avx512vnni": True}
    assert {kind.is_read_once for kind in choose_kinds(vnni).values()} == {False}
    assert {kind.is_read_once for kind in choose_kinds({"sse4a": True, "avx2": True}).values()} == {False}
    asking = {form for form, kind in choose_kinds({**vnni, "sse4a": True}).items() if kind.is_read_once}
    assert asking == {4, *HALVES}


@pytest.mark.skipif(not IS_X86, reason="for x86")
@pytest.mark.parametrize("form", KINDS)
def test_how_memory_is_asked_for_and_how_scales_are_moved_change_no_bit(kernels, form):
    groups = 12 if form == 4 else 1
    arguments = make_lowbit_problem(form, 33, 768, groups, 3) if isinstance(form, int) else halves_problem(form)
    expected = kernels.multiply(*arguments, form)
    for setting in ("is_read_once", "has_wide_moves"):
        other = CpuProducts().kernels
        kind = other.kinds[form]
        other.kinds[form] = replace(kind, **{setting: not getattr(kind, setting)})
        other.plans, other.functions, other.compiler = {}, {}, Compiler(load_llvm())
        assert torch.equal(other.multiply(*arguments, form), expected)


def halves_problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, None]:
    torch.manual_seed(0)
    return torch.randn(3, 768), torch.randn(33, 768).to(dtype), None


def add_dot_of_bytes(total, a, b):
    """What the instructions of BYTE_DOTS compute, for processors that lack them."""
    products = a.to(I32, signed=False) * b.to(I32)
    first, second, third, fourth = (products.take(range(start, 64, 4)) for start in range(4))
    return total + ((first + second) + (third + fourth))


def test_activations_in_two_bytes_make_the_same_sums_as_in_one_word(monkeypatch):
    feature = next(name for name, has in load_llvm().get_host_cpu_features().items() if has)
    outs = []
    for dots in ({feature: add_dot_of_bytes}, {}):
        monkeypatch.setattr(cpu_products, "BYTE_DOTS", dots)
        kernels = CpuProducts().kernels
        assert kernels.kinds[4].name == "_".join(("int4", *dots))
        arguments = [
            make_lowbit_problem(4, 33, 768, groups, rows) for groups, rows in ((1, 1), (6, 2), (12, 1), (96, 3))
        ]
        outs.append([kernels.multiply(*problem, 4) for problem in arguments])
    for by_bytes, by_words, problem in zip(*outs, arguments, strict=True):
        assert torch.equal(by_bytes, by_words)
        assert is_right(by_bytes, *problem, 4)


def test_rows_do_not_depend_on_those_beside_them(kernels):
    for bits, groups in ((4, 12), (4, 1), (8, 1)):
        x, codes, scale = make_lowbit_problem(bits, 33, 768, groups, 4)
        together = kernels.multiply(x, codes, scale, bits)
        alone = torch.cat([kernels.multiply(row[None], codes, scale, bits) for row in x])
        assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("triple", "processor"),
    [
        ("x86_64-pc-linux-gnu", "skylake-avx512"),
        ("x86_64-pc-linux-gnu", "sapphirerapids"),
        ("x86_64-pc-windows-msvc", "alderlake"),
        ("aarch64-linux-gnu", "neoverse-n1"),
        ("arm64-apple-darwin", "apple-m1"),
    ],
)
def test_the_kernels_compile_for_other_processors(triple, processor):
    byte_dot = {"sapphirerapids": "avx512vnni", "alderlake": "avxvnni"}.get(processor)
    kinds = cpu_products.choose_kinds({byte_dot: True})
    sources = [
        write_product("kernel", kind, lines=4, groups=4 * (form in (4, 8)), rows=2) for form, kind in kinds.items()
    ]
    for source in [*sources, write_matrix("kernel", kinds[4], 4, 8), write_matrix("kernel", kinds[8], 4, 1)]:
        assembly = assemble(source, triple, processor)
        assert "kernel" in assembly
        assert ("vpdpbusd" in assembly) == ("vpdpbusd" in source)
        assert not any(function in assembly for function in ("__extendhfsf2", "__gnu_h2f_ieee"))  # a C library's


@pytest.mark.skipif(not IS_X86, reason="for x86")
def test_a_processor_without_what_the_kernels_need_is_refused():
    with pytest.raises(KernelError, match="lacks avx2, f16c"):
        check_processor({"fma": True, "avx2": False})


def test_an_unknown_kind_of_processor_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(KernelError, match="riscv64"):
        check_processor({})


def test_layers_see_codes_that_change(kernels):
    layer = QuantizedLinear.from_linear(nn.Linear(256, 32), 8)
    x = torch.randn(1, 256)
    with torch.no_grad():
        layer(x)
        layer.weight.fill_(3)
        assert is_right(layer(x) - layer.bias, x, layer.weight, layer.weight_scale, 8)


# Checked before they are used, and only if they are wanted


def test_kernels_that_compute_something_else_are_not_used(monkeypatch, renew_products):
    def quantize_line(x, out):
        scale, sums = KINDS[8].quantize_line(x, out)
        return scale * 2.0, sums

    monkeypatch.setattr(cpu_products, "KINDS", {**KINDS, 8: replace(KINDS[8], quantize_line=quantize_line)})
    renew_products()
    arguments = make_lowbit_problem(4, 9, 256, 4, 1)
    with pytest.warns(RuntimeWarning, match="int8 with 1 scales is off by"):
        out = multiply_on_cpu(*arguments, 4, 256, False)
    assert is_right(out, *arguments, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the one warning was enough
        multiply_on_cpu(*arguments, 4, 256, False)
    monkeypatch.setenv("VISUALGLM_KERNELS", "cpu")
    renew_products()
    with pytest.raises(KernelError, match="do not work: int8"):
        multiply_on_cpu(*arguments, 4, 256, False)


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")
    assert CpuProducts().kernels is None
    monkeypatch.setenv("VISUALGLM_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'; it can be auto, cpu, cuda, torch"):
        _ = CpuProducts().kernels


def test_a_task_is_laid_out_as_the_kernels_read_it(kernels):
    class Everything(Task):
        _fields_ = (
            ("first", ctypes.c_float),
            ("address", ctypes.c_void_p),
            ("second", ctypes.c_float),
            ("third", ctypes.c_float),
            ("number", ctypes.c_int64),
        )

    def write_sum(k, task):
        total = task.first + task.second + task.third
        task.address.of(FLOATS32)[task.number + task.chunk].store(total)

    out = torch.zeros(5)
    echo = kernels.compiled("echo", lambda name: write_kernel(name, Everything, write_sum))
    echo.call(ctypes.byref(Everything(3, 0, 0.5, out.data_ptr(), 0.25, 4.0, 1)))
    assert out.tolist() == [0, 4.75, 4.75, 4.75, 0]
