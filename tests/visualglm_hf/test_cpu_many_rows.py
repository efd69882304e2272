"""Room: the kernels for many rows of activations, against their naive twins, on this processor and as if on others."""

import ctypes
import math
import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import (
    assemble,
    default_dtype,
    difference,
    make_lowbit_problem,
    skip_without_cpu_kernels,
    torch_threads,
)
from visualglm_hf import cpu_arithmetic, cpu_many_rows, cpu_runtime
from visualglm_hf.cpu_arithmetic import (
    AMX,
    ARITHMETIC_OF_WORDS,
    ARITHMETICS,
    I8MM,
    Arithmetic,
    MatrixInstructions,
    choose_arithmetic,
    make_amx_trial,
    make_i8mm_trial,
)
from visualglm_hf.cpu_language import BYTES, I8, I32, Form, TileRegisters, join, splat, total_of
from visualglm_hf.cpu_many_rows import (
    CELLS,
    CPU_MANY_ROWS,
    GROUP,
    Blocking,
    CpuManyRows,
    ManyRowsKernels,
    Shape,
    choose_blocking,
    choose_tiling,
    many_rows_naive,
    multiply_many_rows,
    quantize_rows_naive,
    write_many_rows,
    write_row_quantization,
)
from visualglm_hf.cpu_runtime import Compiler, load_llvm
from visualglm_hf.kernel_choice import KernelError
from visualglm_hf.lowbit_format import dequantize_naive, multiply_naive
from visualglm_hf.lowbit_products import multiply_on_cpu


skip_without_cpu_kernels()
IS_X86 = platform.machine().lower() in cpu_runtime.X86
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# The naive twins, against the definition


def test_the_naive_twins_are_the_product_but_for_rounding_to_16_bits():
    for bits, groups in ((4, 12), (4, 1), (8, 1), (8, 3)):
        x, codes, scale = make_lowbit_problem(bits, 33, 768, groups, 5)
        numbers, scales = quantize_rows_naive(x)
        rounded = (numbers * scales[..., None]).flatten(1)
        assert ((rounded - x).abs() <= 0.501 * scales.repeat_interleave(GROUP, 1)).all()
        assert difference(many_rows_naive(x, codes, scale, bits), multiply_naive(rounded, codes, scale, bits)) < 1e-5


def test_sixteen_bits_cost_less_than_half_precision_does_wherever_the_largest_numbers_are():
    """So a bfloat16 model loses nothing that it had: 2 ** -9 is its rounding of one number."""
    for seed in range(5):
        x, codes, scale = make_lowbit_problem(4, 64, 1024, 16, 8, torch.bfloat16, seed=seed)
        exact = x.double() @ dequantize_naive(codes, scale, 4, 1024, torch.float64).T
        assert difference(many_rows_naive(x, codes, scale, 4), exact) < 2.0**-12


# The kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "inputs", "groups"),
    [
        *[(4, 128, groups) for groups in (1, 2, 4, 8, 16)],
        *[(4, 768, groups) for groups in (1, 3, 6, 8, 12, 24)],
        *[(8, inputs, 1) for inputs in (64, 192)],
        *[(8, 576, groups) for groups in (3, 9, 18, 36)],
        (4, 4224, 66),
        (8, 4160, 1),
    ],
)
def test_products_are_their_naive_twins_to_the_bit(bits, inputs, groups, dtype):
    for outputs, rows in ((1, 1), (33, 6), (130, 41)):
        arguments = make_lowbit_problem(bits, outputs, inputs, groups, rows, dtype)
        out = multiply_many_rows(*arguments, bits)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert torch.equal(out, many_rows_naive(*arguments, bits).to(dtype))


@given(
    st.sampled_from([4, 8]),
    st.integers(1, 140),
    st.integers(1, 5),
    st.sampled_from([0, 1, 2, 4]),
    st.integers(1, 80),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_matrix_that_fits_is_multiplied_right(bits, outputs, lines, groups_per_line, rows, seed):
    inputs = 512 * lines // bits
    x, codes, scale = make_lowbit_problem(bits, outputs, inputs, max(1, groups_per_line * lines), rows, seed=seed)
    assert torch.equal(multiply_many_rows(x, codes, scale, bits), many_rows_naive(x, codes, scale, bits))


def test_more_rows_than_are_taken_at_a_time_are_all_multiplied(monkeypatch):
    monkeypatch.setattr(cpu_many_rows, "MOST_BYTES", 30 * 2 * 256)
    for rows in (30, 31, 60, 100):
        arguments = make_lowbit_problem(4, 70, 256, 4, rows)
        assert torch.equal(multiply_many_rows(*arguments, 4), many_rows_naive(*arguments, 4))


def test_a_row_that_is_larger_than_what_is_taken_at_a_time_is_taken_alone(monkeypatch):
    monkeypatch.setattr(cpu_many_rows, "MOST_BYTES", 100)
    arguments = make_lowbit_problem(4, 70, 256, 4, 3)
    assert torch.equal(multiply_many_rows(*arguments, 4), many_rows_naive(*arguments, 4))


def test_rows_do_not_depend_on_those_beside_them():
    x, codes, scale = make_lowbit_problem(4, 70, 768, 12, 41)
    together = multiply_many_rows(x, codes, scale, 4)
    for rows in (1, 5, 8, 23):
        assert torch.equal(multiply_many_rows(x[:rows], codes, scale, 4), together[:rows])


def test_activations_may_be_a_part_of_others():
    x, codes, scale = make_lowbit_problem(4, 70, 768, 12, 30)
    assert torch.equal(
        multiply_many_rows(x[::2, :256], codes[:, :128].contiguous(), scale[:, :4].contiguous(), 4),
        multiply_many_rows(x[::2, :256].contiguous(), codes[:, :128].contiguous(), scale[:, :4].contiguous(), 4),
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    for bits in (4, 8):
        x, codes, scale = make_lowbit_problem(bits, 8, 256, 1, 20)
        x[11, 77] = bad
        finite = multiply_many_rows(x, codes, scale, bits).isfinite()
        assert not finite[11].any()
        assert finite.sum() == 19 * 8


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_activations_do_not_overflow(bits):
    codes = torch.full((4, 1024 * bits // 8), {4: 0x88 - 256, 8: -128}[bits], dtype=torch.int8)
    for sign in (1.0, -1.0):
        x = torch.full((9, 1024), sign * 65504.0)
        out = multiply_many_rows(x, codes, torch.ones(4).half(), bits)
        assert torch.allclose(out, torch.full((9, 4), -sign * 65504.0 * 1024 * 2 ** (bits - 1)), rtol=1e-4)


def test_groups_of_zeros_and_of_tiny_numbers_are_no_trouble():
    _, codes, scale = make_lowbit_problem(4, 8, 256, 4, 1)
    x = torch.zeros(20, 256)
    assert multiply_many_rows(x, codes, scale, 4).eq(0).all()
    x[:, 64:128] = 1e-41  # subnormal
    assert multiply_many_rows(x, codes, scale, 4).abs().max() < 1e-36


@pytest.mark.parametrize("has_openmp", [True, False])
def test_threads_share_the_work_and_each_has_a_room(monkeypatch, has_openmp):
    arguments = make_lowbit_problem(4, 1000, 1024, 16, 50)
    expected = many_rows_naive(*arguments, 4)
    multiply_many_rows(*arguments, 4)
    kernels = CPU_MANY_ROWS.find((4, 64, torch.float32))
    if not has_openmp:
        monkeypatch.setattr(kernels.pool, "openmp", None)
    with torch_threads(4):
        for _ in range(5):
            assert torch.equal(multiply_many_rows(*arguments, 4), expected)
        with ThreadPoolExecutor(4) as pool:
            outs = list(pool.map(lambda _: multiply_many_rows(*arguments, 4), range(12)))
        assert all(torch.equal(out, expected) for out in outs)


def test_threads_for_which_no_room_is_left_do_nothing():
    """As when somebody lets torch have more threads while a decode step's program has been made for fewer."""
    x, codes, scale = make_lowbit_problem(4, 640, 1024, 16, 20)
    multiply_many_rows(x, codes, scale, 4)
    kernels, out = CPU_MANY_ROWS.find((4, 64, torch.float32)), torch.zeros(20, 640)
    plan = kernels.make_plan(20, 1024)._replace(threads=1)
    memory = torch.full((plan.quantized_bytes + 4096,), 7, dtype=torch.uint8)
    stages = plan.stages(x.data_ptr(), memory.data_ptr(), codes, scale, out.data_ptr())
    for _ in range(2):  # a task can be done again
        out.zero_()
        for kernel, task, _ in stages:
            task.restart()
            kernels.pool.run(kernel, task, 4)
        assert torch.equal(out, many_rows_naive(x, codes, scale, 4))
        assert memory[-4096:].eq(7).all()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_other_defaults_of_torch_change_nothing(renew_products, default):
    arguments = make_lowbit_problem(4, 33, 768, 12, 5, torch.bfloat16)
    expected = multiply_many_rows(*arguments, 4)
    with default_dtype(default), torch.device("meta"):
        renew_products()
        assert torch.equal(multiply_many_rows(*arguments, 4), expected)


@given(st.integers(1, 3000), st.integers(1, 12))
def test_tiles_hold_all_rows_and_are_as_equal_as_can_be(rows, most):
    size, large, count = choose_tiling(rows, most)
    assert large * size + (count - large) * (size - 1) == rows
    assert 1 <= large <= count
    assert size <= most
    if rows >= most * (most - 1):
        assert size == most  # so that one kernel is enough for every long prompt


# Other processors


BASIC = {"avx2": True, "f16c": True, "fma": True, "avx512f": False}
AVX512 = dict.fromkeys((*BASIC, "avx512bw", "avx512dq", "avx512vl"), True)
PROCESSORS = {
    "haswell": (BASIC, "words of 16 bits"),  # of 2013
    "alderlake": ({**BASIC, "avxvnni": True}, "AVX-VNNI"),
    "skylake-avx512": ({**AVX512, "avx512vnni": False, "avxvnni": False}, "words of 16 bits"),
    "cascadelake": ({**AVX512, "avx512vnni": True}, "AVX-512 VNNI"),
}
PROBLEMS = ((4, 4224, 66), (4, 768, 24), (4, 768, 1), (8, 768, 1), (8, 576, 36))


def check_the_bits(dtypes: tuple[torch.dtype, ...]) -> None:
    for bits, inputs, groups in PROBLEMS:
        for dtype in dtypes:
            arguments = make_lowbit_problem(bits, 70, inputs, groups, 23, dtype)
            assert torch.equal(multiply_many_rows(*arguments, bits), many_rows_naive(*arguments, bits).to(dtype))


@pytest.mark.skipif(not IS_X86, reason="for x86")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_all_processors_compute_the_same_bits(monkeypatch, renew_products, processor):
    features, arithmetic = PROCESSORS[processor]
    has = load_llvm().get_host_cpu_features()
    if not all(has.get(feature) for feature, is_needed in features.items() if is_needed):
        pytest.skip("this processor has less")
    monkeypatch.setattr(cpu_runtime, "Compiler", partial(Compiler, processor=processor, features=features))
    renew_products()
    assert choose_arithmetic(features).name == arithmetic
    check_the_bits((torch.float32, torch.float16))


def add_dot_of_bytes(total, a, b, signed):
    """What the instructions of ARITHMETICS compute, for processors that lack them."""
    products = a.bits(I8[64]).to(I32, signed=signed) * b.bits(I8[64]).to(I32)
    first, second, third, fourth = (products.take(range(start, 64, 4)) for start in range(4))
    return total + ((first + second) + (third + fourth))


def add_products_of_pairs(totals, a, b):
    """What ARM's matrix products compute, for processors that lack them."""
    rows = [[some.bits(I8[16]).take(range(first, first + 8)).to(I32) for first in (0, 8)] for some in (a, b)]
    sums = [total_of(one * other) for one in rows[0] for other in rows[1]]
    return totals + join(join(*sums[:2]), join(*sums[2:]))


@pytest.mark.parametrize("arithmetic", [*ARITHMETICS.values(), ARITHMETIC_OF_WORDS, I8MM], ids=lambda way: way.name)
def test_every_arithmetic_makes_the_same_sums(monkeypatch, renew_products, arithmetic):
    if arithmetic.is_paired:
        arithmetic = replace(arithmetic, add_dot=add_products_of_pairs)
    elif arithmetic.element_bytes == 1:
        arithmetic = replace(arithmetic, add_dot=partial(add_dot_of_bytes, signed=not arithmetic.is_offset))
    monkeypatch.setattr(cpu_many_rows, "choose_arithmetic", lambda *arguments: arithmetic)
    monkeypatch.setattr(cpu_many_rows, "choose_blocking", lambda *arguments: Blocking(1, 2))  # quick to compile
    renew_products()
    check_the_bits((torch.float32,))


def test_pairs_of_rows_make_the_same_sums_in_any_blocking(monkeypatch, renew_products):
    """With odd numbers of rows, and with several vectors of 16 rows of the matrix."""
    arithmetic = replace(I8MM, add_dot=add_products_of_pairs)
    monkeypatch.setattr(cpu_many_rows, "choose_arithmetic", lambda *arguments: arithmetic)
    monkeypatch.setattr(cpu_many_rows, "choose_blocking", lambda *arguments: Blocking(2, 3))
    renew_products()
    for bits, rows in ((4, 7), (8, 1), (8, 5)):
        arguments = make_lowbit_problem(bits, 70, 256, 4, rows)
        assert torch.equal(multiply_many_rows(*arguments, bits), many_rows_naive(*arguments, bits))


class EmulatedTiles(TileRegisters):
    """Tile registers in memory, for processors that lack them."""

    def shape(self, shapes):
        self.shapes = tuple(shapes)
        self.memory = [self.kernel.room(1024, BYTES) for _ in self.shapes]

    def clear(self, number):
        self.memory[number].store(self.kernel.zero(I8[1024]))

    def rows(self, number, at, pitch):
        rows, columns = self.shapes[number]
        return [(self.memory[number][64 * row], at.of(BYTES)[row * pitch], columns) for row in range(rows)]

    def load(self, number, at, pitch):
        for ours, theirs, columns in self.rows(number, at, pitch):
            ours.store(theirs.load(columns))

    def store(self, number, at, pitch):
        for ours, theirs, columns in self.rows(number, at, pitch):
            theirs.store(ours.load(columns))

    def add_dot(self, total, a, b):
        for row in range(self.shapes[total][0]):
            at = self.memory[total][64 * row].of(Form(I32))
            sums = at.load(16)
            for step in range(self.shapes[b][0]):
                fours = splat(self.memory[a][64 * row + 4 * step].of(Form(I32)).load(), 16)
                sums = add_dot_of_bytes(sums, self.memory[b][64 * step].load(64), fours, signed=False)
            at.store(sums)

    def release(self):
        self.memory.clear()


def test_matrix_instructions_make_the_same_sums(monkeypatch, renew_products):
    monkeypatch.setattr(cpu_many_rows, "choose_arithmetic", lambda *arguments: AMX)
    monkeypatch.setattr(cpu_many_rows, "TileRegisters", EmulatedTiles)
    monkeypatch.setattr(CpuManyRows, "check", lambda *arguments: None)  # of as many rows as a tile has: slow to compile
    renew_products()
    for bits, inputs, groups, rows in ((4, 256, 4, 3), (4, 128, 4, 1), (8, 128, 1, 2)):
        arguments = make_lowbit_problem(bits, 70, inputs, groups, rows)
        assert torch.equal(multiply_many_rows(*arguments, bits), many_rows_naive(*arguments, bits))


@pytest.mark.parametrize("matrix", [AMX, I8MM], ids=lambda way: way.name)
@pytest.mark.parametrize(("with_matrix", "without"), [(0.004, 0.003), (0.003, 0.004)])
def test_matrix_instructions_that_are_no_faster_here_are_not_used(monkeypatch, matrix, with_matrix, without):
    kernels = ManyRowsKernels(load_llvm(), 4, 64, torch.float32)
    plain = choose_arithmetic(kernels.compiler.features)
    kernels.matrix_instructions = MatrixInstructions(matrix, None)
    kernels.use(matrix)
    monkeypatch.setattr(kernels, "measure", lambda arithmetic: with_matrix if arithmetic is matrix else without)
    kernels.drop_matrix_instructions_unless_faster()
    assert kernels.arithmetic is (matrix if with_matrix < without else plain)
    assert kernels.blocking == choose_blocking(kernels.compiler.features, kernels.arithmetic)
    said = f"it took 4.0 ms where {plain.name} took 3.0"
    assert kernels.matrix_instructions == (matrix, None if with_matrix < without else said)


@pytest.mark.parametrize("is_faster", [True, False])
def test_matrix_instructions_are_measured_before_they_are_used(monkeypatch, renew_products, is_faster):
    """Of any processor: here with what it has, as if that were its matrix instructions."""
    matrix = replace(ARITHMETIC_OF_WORDS, name="matrix instructions")
    monkeypatch.setattr(cpu_many_rows, "find_matrix_instructions", lambda *names: MatrixInstructions(matrix, None))
    seconds = {True: 1.0 - is_faster, False: 0.5}
    monkeypatch.setattr(ManyRowsKernels, "measure", lambda kernels, arithmetic: seconds[arithmetic is matrix])
    renew_products()
    arguments = make_lowbit_problem(4, 70, 256, 4, 7)
    assert torch.equal(multiply_many_rows(*arguments, 4), many_rows_naive(*arguments, 4))
    assert (cpu_many_rows.CPU_MANY_ROWS.find((4, 64, torch.float32)).arithmetic is matrix) == is_faster


def test_other_instructions_can_be_measured_and_give_the_same():
    kernels = ManyRowsKernels(load_llvm(), 4, 64, torch.float32)
    plain = kernels.arithmetic
    problem = make_lowbit_problem(4, 70, 256, 4, 7)
    expected = kernels.multiply(*problem)
    assert kernels.measure(ARITHMETIC_OF_WORDS) > 0
    assert kernels.arithmetic is ARITHMETIC_OF_WORDS and torch.equal(kernels.multiply(*problem), expected)
    assert kernels.measure(plain) > 0


def test_the_trial_of_matrix_instructions_expects_what_they_compute(monkeypatch):
    monkeypatch.setattr(cpu_arithmetic, "TileRegisters", EmulatedTiles)
    check_the_trial(make_amx_trial())


def test_the_trial_of_matrix_products_of_arm_expects_what_they_compute(monkeypatch):
    monkeypatch.setattr(cpu_arithmetic, "add_products_i8mm", add_products_of_pairs)
    check_the_trial(make_i8mm_trial())


def check_the_trial(trial):
    memory = ctypes.create_string_buffer(trial.memory, len(trial.memory))
    compiler = Compiler(load_llvm())
    compiler.compile(trial.function, trial.code).call(ctypes.addressof(memory))
    assert memory.raw == trial.expected
    assert memory.raw != trial.memory


@pytest.mark.parametrize("cell", CELLS)
def test_matrix_instructions_are_what_the_kernel_is_made_of(cell):
    shape = Shape(4, cell, AMX, choose_blocking({}, AMX), 16)
    assembly = assemble(write_many_rows("kernel", shape, torch.bfloat16), "x86_64-pc-linux-gnu", "sapphirerapids")
    instructions = ("ldtilecfg", "tilezero", "tileloadd", "tdpbsud", "tilestored", "tilerelease")
    sizes, cells = 2, GROUP // cell  # of tiles
    assert [assembly.count(name) for name in instructions] == [
        sizes * count for count in (1, 4 * cells, 4 * cells, 4 * cells, 4 * cells, 1)
    ]


@pytest.mark.parametrize(
    ("triple", "processor", "features", "instruction"),
    [
        ("x86_64-pc-linux-gnu", "haswell", (), "vpmaddwd"),
        ("x86_64-pc-linux-gnu", "skylake-avx512", ("avx512bw",), "vpmaddwd"),
        ("x86_64-pc-linux-gnu", "sapphirerapids", ("avx512bw", "avx512vnni"), "vpdpbusd"),
        ("x86_64-pc-windows-msvc", "alderlake", ("avxvnni",), "vpdpbusd"),
        ("aarch64-linux-gnu", "cortex-a72", (), "smull"),
        ("aarch64-linux-gnu", "neoverse-n1", ("dotprod",), "sdot"),
        ("arm64-apple-darwin", "apple-m1", ("dotprod",), "sdot"),
        ("aarch64-linux-gnu", "neoverse-n2", ("i8mm",), "smmla"),
        ("arm64-apple-darwin", "apple-m2", ("i8mm",), "smmla"),
    ],
)
def test_the_kernels_compile_for_other_processors(triple, processor, features, instruction):
    features = dict.fromkeys(features, True)
    arithmetic = I8MM if "i8mm" in features else choose_arithmetic(features)
    blocking = choose_blocking(features, arithmetic)
    for bits, dtype in ((4, torch.float16), (8, torch.bfloat16)):
        shape = Shape(bits, CELLS[0], arithmetic, blocking, 3)
        quantization = assemble(write_row_quantization("kernel", shape, dtype), triple, processor)
        assembly = assemble(write_many_rows("kernel", shape, dtype), triple, processor)
        assert instruction in assembly
        for code in (quantization, assembly):
            assert not any(function in code for function in ("__extendhfsf2", "__gnu_h2f_ieee"))  # a C library's


# Checked before they are used


def test_kernels_that_compute_something_else_are_not_used(monkeypatch, renew_products):
    unpack = Arithmetic.unpack
    monkeypatch.setattr(Arithmetic, "unpack", lambda *arguments: unpack(*arguments)[::-1])
    renew_products()
    x, codes, scale = make_lowbit_problem(4, 9, 256, 4, 40)
    with pytest.warns(
        RuntimeWarning, match="The CPU kernels for many rows do not work, .* with groups of 64 is off by"
    ):
        out = multiply_on_cpu(x, codes, scale, 4, 256, False)
    assert difference(out, multiply_naive(x, codes, scale, 4)) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the one warning was enough
        multiply_on_cpu(x, codes, scale, 4, 256, False)
    monkeypatch.setenv("VISUALGLM_KERNELS", "cpu")
    renew_products()
    with pytest.raises(KernelError, match="do not work: int4 of many rows"):
        multiply_on_cpu(x, codes, scale, 4, 256, False)


def test_only_the_kernels_that_are_needed_are_made(renew_products):
    renew_products()
    multiply_on_cpu(*make_lowbit_problem(4, 64, 256, 4, 40, torch.bfloat16), 4, 256, False)
    assert list(cpu_many_rows.CPU_MANY_ROWS.found) == [(4, 64, torch.bfloat16)]
