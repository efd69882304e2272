"""Room: the kernels for several rows of activations, against the naive twin of those for many, on any processor."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import difference, make_lowbit_problem, skip_without_cpu_kernels, torch_threads
from tests.visualglm_hf.test_cpu_many_rows import add_dot_of_bytes
from visualglm_hf import cpu_many_rows, cpu_several_rows
from visualglm_hf.cpu_arithmetic import AMX, ARITHMETIC_OF_WORDS, ARITHMETICS, I8MM, Arithmetic, choose_arithmetic
from visualglm_hf.cpu_many_rows import find_kernels
from visualglm_hf.cpu_several_rows import (
    CPU_SEVERAL_ROWS,
    MOST_ROWS,
    SeveralRowsKernels,
    multiply_several_rows,
    several_rows_naive,
    several_rows_obstacle,
)
from visualglm_hf.kernel_choice import KernelError
from visualglm_hf.lowbit_format import multiply_naive
from visualglm_hf.lowbit_products import Product, choose_lowbit_way, multiply_on_cpu


skip_without_cpu_kernels()


@pytest.fixture
def measured_here(monkeypatch):
    """This processor is one that the kernels were measured on."""
    monkeypatch.setattr(cpu_several_rows, "MEASURED_ON", ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "inputs", "groups"),
    [(4, 128, 1), (4, 128, 16), (4, 768, 12), (4, 768, 24), (4, 4224, 66), (8, 192, 1), (8, 576, 36), (8, 4160, 65)],
)
def test_products_are_the_naive_twin_of_those_of_many_rows_to_the_bit(bits, inputs, groups, dtype):
    for outputs, rows in ((1, 1), (33, 5), (70, 23)):
        arguments = make_lowbit_problem(bits, outputs, inputs, groups, rows, dtype)
        out = multiply_several_rows(*arguments, bits)
        assert out.dtype == dtype
        assert torch.equal(out, several_rows_naive(*arguments, bits).to(dtype))


@given(
    st.sampled_from([4, 8]),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([0, 1, 2, 4]),
    st.sampled_from([1, 2, 5, 13, 23]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_matrix_that_fits_is_multiplied_right(bits, outputs, lines, groups_per_line, rows, seed):
    inputs = 512 * lines // bits
    x, codes, scale = make_lowbit_problem(bits, outputs, inputs, max(1, groups_per_line * lines), rows, seed=seed)
    assert torch.equal(multiply_several_rows(x, codes, scale, bits), several_rows_naive(x, codes, scale, bits))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    for bits in (4, 8):
        x, codes, scale = make_lowbit_problem(bits, 8, 256, 1, 5)
        x[3, 77] = bad
        finite = multiply_several_rows(x, codes, scale, bits).isfinite()
        assert not finite[3].any()
        assert finite.sum() == 4 * 8


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_activations_do_not_overflow(bits):
    codes = torch.full((4, 1024 * bits // 8), {4: 0x88 - 256, 8: -128}[bits], dtype=torch.int8)
    for sign in (1.0, -1.0):
        out = multiply_several_rows(torch.full((5, 1024), sign * 65504.0), codes, torch.ones(4).half(), bits)
        assert torch.allclose(out, torch.full((5, 4), -sign * 65504.0 * 1024 * 2 ** (bits - 1)), rtol=1e-4)


def test_threads_share_the_work_and_each_has_a_room():
    x, codes, scale = make_lowbit_problem(4, 1008, 1024, 16, 23)
    expected = several_rows_naive(x, codes, scale, 4)
    with torch_threads(4):
        for _ in range(5):
            assert torch.equal(multiply_several_rows(x, codes, scale, 4), expected)
    kernels, out = find_kernels(4, 1024, scale, torch.float32, CPU_SEVERAL_ROWS), torch.zeros(23, 1008)
    plan = kernels.make_plan(23, 1024)._replace(threads=2)
    memory = torch.full((plan.quantized_bytes + 4096,), 7, dtype=torch.uint8)
    for kernel, task, _ in plan.stages(x.data_ptr(), memory.data_ptr(), codes, scale, out.data_ptr()):
        kernels.pool.run(kernel, task, 4)  # two find no room
    assert torch.equal(out, expected)
    assert memory[-4096:].eq(7).all()


@pytest.mark.parametrize("arithmetic", [*ARITHMETICS.values(), ARITHMETIC_OF_WORDS], ids=lambda way: way.name)
def test_every_arithmetic_makes_the_same_sums(monkeypatch, renew_products, arithmetic):
    if arithmetic.element_bytes == 1:
        arithmetic = replace(arithmetic, add_dot=partial(add_dot_of_bytes, signed=not arithmetic.is_offset))
    monkeypatch.setattr(cpu_several_rows, "TILE_ROWS", 2)  # quick to compile
    for module in (cpu_many_rows, cpu_several_rows):
        monkeypatch.setattr(module, "choose_arithmetic", lambda features: arithmetic)
    renew_products()
    for bits, inputs, groups in ((4, 4224, 66), (4, 768, 24), (8, 768, 1), (8, 576, 36)):
        arguments = make_lowbit_problem(bits, 40, inputs, groups, 3)
        assert torch.equal(multiply_several_rows(*arguments, bits), several_rows_naive(*arguments, bits))


@pytest.mark.parametrize("matrix", [AMX, I8MM], ids=lambda way: way.name)
def test_matrix_instructions_are_left_to_many_rows(matrix):
    kernels = find_kernels(4, 256, torch.ones(8, 4).half(), torch.float32, CPU_SEVERAL_ROWS)
    before = kernels.arithmetic
    kernels.use(matrix)
    assert kernels.arithmetic is choose_arithmetic(kernels.features) is before


# The choice


def takes(kernels: type, product: Product) -> bool:
    """Whether the operator multiplies with kernels of this class."""
    taken = []
    multiply = kernels.multiply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "multiply", lambda self, *rest: taken.append(type(self)) or multiply(self, *rest))
        x = torch.ones(product.rows, product.in_features, dtype=product.dtype)
        multiply_on_cpu(x, *product.arguments)
    return taken == [kernels]


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("bits", [4, 8])
def test_several_rows_are_multiplied_together(bits):
    for rows, is_taken in ((1, False), (2, True), (5, True), (MOST_ROWS, True)):
        x, codes, scale = make_lowbit_problem(bits, 16, 256, 1, rows)
        product = Product(x.dtype, rows, codes, scale, bits, 256)
        told = {}
        assert takes(SeveralRowsKernels, product) == is_taken
        assert choose_lowbit_way(product, told.__setitem__).name == "our kernel" + " for many rows" * is_taken
        if is_taken:
            assert told == {"our kernel": f"{rows} rows of activations, which are faster together"}
    _, codes, scale = make_lowbit_problem(bits, 16, 256, 1, 1)
    assert not takes(SeveralRowsKernels, Product(torch.float32, MOST_ROWS + 1, codes, scale, bits, 256))


@pytest.mark.usefixtures("without_several_rows")
def test_on_other_processors_all_goes_as_before():
    x, codes, scale = make_lowbit_problem(4, 16, 256, 4, 5)
    obstacle = several_rows_obstacle(x.dtype, 5, codes, scale, 256, 4)
    assert obstacle == "a processor that they were not measured on"
    assert not takes(SeveralRowsKernels, Product(x.dtype, 5, codes, scale, 4, 256))


@pytest.mark.usefixtures("measured_here")
def test_kernels_that_compute_something_else_are_not_used(monkeypatch, renew_products):
    unpack = Arithmetic.unpack
    monkeypatch.setattr(Arithmetic, "unpack", lambda *arguments: unpack(*arguments)[::-1])
    renew_products()
    x, codes, scale = make_lowbit_problem(4, 9, 256, 4, 7)
    with pytest.warns(RuntimeWarning, match="The CPU kernels for several rows do not work, .* is off by"):
        out = multiply_on_cpu(x, codes, scale, 4, 256, False)
    assert difference(out, multiply_naive(x, codes, scale, 4)) < 1e-4
    monkeypatch.setenv("VISUALGLM_KERNELS", "cpu")
    renew_products()
    with pytest.raises(KernelError, match="The CPU kernels for several rows do not work"):
        multiply_on_cpu(x, codes, scale, 4, 256, False)
