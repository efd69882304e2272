"""Room: products with low-bit matrices. Each of torch's ways against the reference, the operators, and the choice."""

import gc
import importlib.util
import re
import sys

import pytest
import torch
from torch import nn

from tests.helpers import difference, seeded
from visualglm_hf import lowbit_products
from visualglm_hf.kernel_choice import KernelError
from visualglm_hf.lowbit_format import dequantize_naive, pack_int4
from visualglm_hf.lowbit_products import (
    HALF_WAYS,
    WAYS,
    Product,
    choose_lowbit_way,
    find_packable_group,
    multiply,
    multiply_by_rows,
    packed_matrices,
    quantized_linear,
)
from visualglm_hf.quantization import HalfLinear, QuantizedLinear, quantize_tensor


FORMATS = [(8, None), (4, None), (4, 32), (4, 128), (4, -1)]
SCALE_ROUNDING = 2.0**-8  # bfloat16 has 8 bits; torch's packed operators take scales of no other dtype
# (N, K), with odd and tiny ones; torch's operators want rows in 16s and columns in 32s.
SHAPES = [(1, 1), (5, 34), (3, 7), (17, 128), (16, 128), (48, 256), (80, 384), (192, 128)]


def make_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=seeded()) * 0.02


def fitting(columns: int) -> list[tuple[int, int | None]]:
    """The formats that a matrix with so many columns can have."""
    return [(bits, size) for bits, size in FORMATS if bits == 8 or columns % (size or 64) == 0]


# Products: each path against the reference


@pytest.mark.usefixtures("torch_operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_equal_those_with_the_dequantized_matrix(outputs, inputs, rows, dtype):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2 * SCALE_ROUNDING}
    x = torch.randn(rows, inputs, generator=seeded(1)).to(dtype)
    gradient = torch.randn(rows, outputs, generator=seeded(2)).to(dtype)
    for bits, group_size in fitting(inputs):
        codes, scales = quantize_tensor(make_matrix(outputs, inputs), bits, group_size)
        matrix = dequantize_naive(codes, scales, bits, inputs, torch.float64)
        for transposed, left, right in ((False, x, matrix.T), (True, gradient, matrix)):
            out = multiply(left, codes, scales, bits, inputs, transposed)
            assert out.dtype == dtype
            assert out.shape == (rows, inputs if transposed else outputs)
            assert difference(out, left.double() @ right) < tolerance[dtype]


@pytest.mark.usefixtures("torch_operators")
def test_int4_operator_of_torch_computes_exactly_our_format():
    """With scales that bfloat16 holds exactly and unit vectors, not one bit differs."""
    for group_size in (32, 64, 128, 256):
        codes = pack_int4(torch.randint(-8, 8, (80, 512), generator=seeded(3)))
        signs = torch.randint(0, 2, (80, 512 // group_size), generator=seeded(4)) * 2 - 1
        powers = torch.randint(-12, 3, signs.shape, generator=seeded(5))
        scales = (signs * 2.0**powers).half()
        for unit in torch.eye(512, dtype=torch.bfloat16).split(8):
            assert find_packable_group(scales, 512) == group_size
            out = multiply(unit, codes, scales, 4, 512)
            assert torch.equal(out.float(), unit.float() @ dequantize_naive(codes, scales, 4, 512, torch.float32).T)


@pytest.mark.usefixtures("torch_operators")
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_rounding_the_scales_to_bfloat16_is_all_that_the_fast_path_adds(bits, group_size):
    codes, scales = quantize_tensor(make_matrix(48, 256), bits, group_size)
    x = torch.randn(2, 256, generator=seeded(1)).bfloat16()
    rounded = dequantize_naive(codes, scales.bfloat16(), bits, 256, torch.float64)
    out = multiply(x, codes, scales, bits, 256)
    assert difference(out, (x.double() @ rounded.T).bfloat16()) < SCALE_ROUNDING


def test_a_row_scaled_int4_matrix_takes_the_fast_path_too():
    codes, scales = quantize_tensor(make_matrix(32, 384), 4, -1)
    assert find_packable_group(scales, 384) == 128


def test_fallback_never_holds_the_whole_matrix(monkeypatch):
    sizes = []

    def watched(weight, *args):
        sizes.append(weight.shape[0])
        return dequantize_naive(weight, *args)

    monkeypatch.setattr(lowbit_products, "dequantize_naive", watched)
    monkeypatch.setattr(lowbit_products, "CPU_CHUNK", 1024)
    codes, scales = quantize_tensor(make_matrix(50, 128), 4)
    x = torch.randn(2, 128)
    out = multiply_by_rows(x, codes, scales, 4, 128, False)
    assert max(sizes) == 8
    assert difference(out, x @ dequantize_naive(codes, scales, 4, 128, torch.float32).T) < 1e-5


@pytest.mark.usefixtures("torch_operators")
def test_a_matrix_is_packed_once_and_again_when_it_changes(monkeypatch):
    packed = []
    pack = lowbit_products.pack_for_cpu
    monkeypatch.setattr(lowbit_products, "pack_for_cpu", lambda weight: packed.append(1) or pack(weight))
    layer = QuantizedLinear.from_linear(nn.Linear(128, 32), 4)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        assert len(packed) == 1
        layer.weight.copy_(pack_int4(torch.ones(32, 128)))
        assert difference(layer(x) - layer.bias.bfloat16(), x.double() @ layer.dequantize().double().T) < 0.05
    assert len(packed) == 2


@pytest.mark.usefixtures("torch_operators")
def test_packed_matrices_die_with_their_layer():
    layer = QuantizedLinear.from_linear(nn.Linear(128, 32), 4)
    before = len(packed_matrices.matrices)
    layer(torch.randn(1, 128, dtype=torch.bfloat16))
    assert len(packed_matrices.matrices) == before + 1
    del layer
    gc.collect()
    assert len(packed_matrices.matrices) == before


@pytest.mark.usefixtures("torch_operators")
def test_many_rows_avoid_the_packed_operators_on_every_processor(monkeypatch):
    """With matrix instructions too, where a prompt packed all codes anew for 23 s and then took three times as long."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    for bits in (4, 8):
        codes, scales = quantize_tensor(make_matrix(32, 128), bits)
        x = torch.randn(17, 128, generator=seeded(1)).bfloat16()
        for rows in (x[:16], x):
            expected = multiply_by_rows(rows, codes, scales, bits, 128, False)  # its scales are not rounded
            assert torch.equal(multiply(rows, codes, scales, bits, 128), expected)
    assert codes not in packed_matrices.matrices


@pytest.mark.usefixtures("torch_operators")
def test_int8_rows_that_torchs_operator_would_overrun_are_computed_safely():
    """It reads whole vectors: with 34 columns it ends the process (torch 2.13)."""
    codes, scales = quantize_tensor(make_matrix(33, 34), 8)
    x = torch.randn(1, 34, dtype=torch.bfloat16)
    expected = x.double() @ dequantize_naive(codes, scales, 8, 34, torch.float64).T
    assert difference(multiply(x, codes, scales, 8, 34), expected) < 2 * SCALE_ROUNDING


def test_no_rows_give_no_rows():
    codes, scales = quantize_tensor(make_matrix(32, 128), 4)
    for dtype in (torch.float32, torch.bfloat16):
        assert multiply(torch.empty(0, 128, dtype=dtype), codes, scales, 4, 128).shape == (0, 32)


# The operator and autograd


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_operator_passes_opcheck(bits, group_size, transposed):
    codes, scales = quantize_tensor(make_matrix(16, 128), bits, group_size)
    x = torch.randn(3, 16 if transposed else 128)
    operator = torch.ops.visualglm.quantized_matmul.default
    torch.library.opcheck(operator, (x, codes, scales, bits, 128, transposed))


@pytest.mark.parametrize(("bits", "group_size"), [*FORMATS[:2], (4, -1)])
def test_gradients_are_right_twice_over(bits, group_size):
    codes, scales = quantize_tensor(make_matrix(5, 64), bits, group_size)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: multiply(x, codes, scales, bits, 64), (x,))
    assert torch.autograd.gradgradcheck(lambda x: multiply(x, codes, scales, bits, 64), (x,))


def test_gradients_go_to_the_input_and_the_bias_only():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8), 4)
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert difference(x.grad[0, 0], layer.dequantize().sum(0)) < 1e-5
    assert layer.bias.grad.tolist() == [6] * 8
    assert layer.weight.grad is None
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_layer_compiles_without_a_graph_break(bits, dtype):
    torch.compiler.reset()
    layer = QuantizedLinear.from_linear(nn.Linear(128, 32), bits)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 128, dtype=dtype, requires_grad=True)
    expected = layer(x)
    expected.sum().backward()
    gradient, x.grad = x.grad, None
    out = compiled(x)
    out.sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, gradient)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


def test_autocast_decides_the_dtype():
    layer = QuantizedLinear.from_linear(nn.Linear(128, 32), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 128)).dtype == torch.bfloat16


def test_the_same_file_can_be_imported_twice():
    for name in ("lowbit_products_a", "lowbit_products_b"):
        spec = importlib.util.spec_from_file_location(f"visualglm_hf.{name}", lowbit_products.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.LIBRARY is None
        codes, scales = quantize_tensor(make_matrix(16, 64), 4)
        assert module.quantized_linear(torch.ones(1, 64), codes, scales, 4, 64).shape == (1, 16)
    assert quantized_linear is not module.quantized_linear


# The choice


KERNEL, MANY_ROWS, PACKED, DEQUANTIZED, TORCH = (way.name for way in WAYS["cpu"])


def make_product(change: dict) -> Product:
    """A product that our kernel takes, but for what is changed."""
    numbers = {"bits": 4, "outputs": 32, "inputs": 256, "groups": 4, "rows": 1, "dtype": torch.bfloat16} | change
    bits, outputs, inputs, groups = (numbers[name] for name in ("bits", "outputs", "inputs", "groups"))
    codes = torch.zeros(outputs, inputs * bits // 8, dtype=torch.int8)
    scales = torch.ones(outputs, groups).half() if groups > 1 else torch.ones(outputs).half()
    transposed = numbers.get("transposed", False)
    return Product(numbers["dtype"], numbers["rows"], codes, scales, bits, inputs, transposed)


def ask(product: Product) -> tuple[str, dict[str, str]]:
    """The way of a product, and why not each faster one."""
    reasons: dict[str, str] = {}
    return choose_lowbit_way(product, reasons.__setitem__).name, reasons


BIT8 = {"bits": 8, "groups": 1}


@pytest.mark.parametrize(
    ("change", "way", "reasons"),
    [
        ({}, KERNEL, []),
        ({"rows": 4}, KERNEL, []),
        ({"dtype": torch.float32}, KERNEL, []),
        (BIT8, KERNEL, []),
        ({"rows": 5}, MANY_ROWS, ["5 rows of activations, not 1 to 4"]),
        ({"rows": 256, "outputs": 33}, MANY_ROWS, ["256 rows"]),
        ({**BIT8, "rows": 4}, KERNEL, []),
        ({**BIT8, "rows": 5}, MANY_ROWS, ["5 rows of activations, not 1 to 4"]),
        ({"rows": 0}, DEQUANTIZED, ["0 rows", "no rows", "0 rows"]),
        ({"transposed": True}, DEQUANTIZED, ["gradients", "gradients", "gradients"]),
        ({"dtype": torch.float64}, TORCH, ["float64 activations"] * 4),
        ({"inputs": 384}, MANY_ROWS, ["groups of 96 columns"]),
        ({**BIT8, "rows": 17, "groups": 64}, DEQUANTIZED, ["17 rows", "groups of 4 columns", "not 1 to 15"]),
        ({"inputs": 192, "groups": 3}, PACKED, [r"\[32, 192\], whose columns are no multiple of 128"] * 2),
        ({**BIT8, "inputs": 96}, PACKED, ["no multiple of 64"] * 2),
        (
            {**BIT8, "inputs": 34},
            TORCH,
            ["no multiple of 64", "no multiple of 64", "34 columns, no multiple of 32", "no multiple of 64"],
        ),
        ({**BIT8, "groups": 2, "inputs": 192}, MANY_ROWS, ["groups of 96"]),
        ({"inputs": 192, "groups": 4}, TORCH, ["of 128", "of 128", "no multiple of 32 columns", "of 128"]),
        (
            {"inputs": 192, "groups": 3, "outputs": 33},
            TORCH,
            ["of 128", "of 128", "33 rows, no multiple of 16", "of 128"],
        ),
        (
            {"inputs": 64, "groups": 1, "dtype": torch.float32},
            TORCH,
            ["of 128", "of 128", "float32 activations", "of 128"],
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("with_kernels", "without_several_rows")
def test_a_product_goes_the_first_way_without_an_obstacle(change, way, reasons):
    product = make_product(change)
    chosen, told = ask(product)
    assert chosen == way
    assert list(told) == [KERNEL, MANY_ROWS, PACKED, DEQUANTIZED, TORCH][: len(reasons)]
    assert all(re.search(reason, text) for reason, text in zip(reasons, told.values(), strict=True))
    x = torch.ones(product.rows, product.weight.shape[0] if product.transposed else product.in_features)
    multiply(x.to(product.dtype), *product.arguments)


@pytest.mark.usefixtures("with_kernels")
def test_the_operator_goes_the_way_that_was_told(monkeypatch):
    taken = []
    for changes in ({}, {"rows": 17}, {"rows": 0}, {"inputs": 192, "groups": 3}, {"dtype": torch.float64}):
        product = make_product(changes)
        ways = [
            way._replace(multiply=lambda x, product, way=way: taken.append(way.name) or way.multiply(x, product))
            for way in WAYS["cpu"]
        ]
        monkeypatch.setitem(WAYS, "cpu", tuple(ways))
        multiply(torch.ones(product.rows, product.in_features, dtype=product.dtype), *product.arguments)
        monkeypatch.undo()
    assert taken == [KERNEL, MANY_ROWS, DEQUANTIZED, PACKED, TORCH]


def test_devices_without_ways_of_their_own_have_torchs():
    product = make_product({})
    assert ask(product._replace(weight=product.weight.to("meta"))) == (TORCH, {})


@pytest.mark.usefixtures("torch_operators")
def test_without_kernels_the_reason_is_told():
    assert ask(make_product({})) == (PACKED, dict.fromkeys((KERNEL, MANY_ROWS), "llvmlite is not installed"))
    way, reasons = ask(make_product({"rows": 17}))
    assert way == TORCH
    assert reasons[DEQUANTIZED] == "llvmlite is not installed"


HALF_KERNEL, HALF_TORCH = (way.name for way in HALF_WAYS)


@pytest.mark.parametrize(
    ("rows", "activations", "weights", "reason"),
    [
        (4, torch.bfloat16, torch.bfloat16, None),
        (5, torch.bfloat16, torch.bfloat16, "5 rows of activations, not 1 to 4"),
        (1, torch.float32, torch.float32, "float32 activations"),
        (1, torch.bfloat16, torch.float32, "float32 weights and bfloat16 activations"),
    ],
)
@pytest.mark.usefixtures("with_kernels")
@torch.no_grad()
def test_the_output_layer_says_which_way_it_goes(rows, activations, weights, reason):
    layer, reasons = HalfLinear(64, 8).to(weights), {}
    way = layer.find_way(activations, rows, reasons.__setitem__)
    assert (way, reasons) == ((HALF_TORCH, {HALF_KERNEL: reason}) if reason else (HALF_KERNEL, {}))
    with torch.enable_grad():
        assert layer.find_way(activations, rows, reasons.__setitem__) == HALF_TORCH


def test_layers_keep_no_second_copy_of_their_codes(with_kernels):
    layer = QuantizedLinear.from_linear(nn.Linear(256, 32), 4).bfloat16()
    before = len(packed_matrices.matrices)
    with torch.no_grad():
        layer(torch.randn(1, 256, dtype=torch.bfloat16))
    assert len(packed_matrices.matrices) == before


def test_without_llvmlite_torch_does_the_work_silently(monkeypatch, renew_products, recwarn):
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    assert renew_products().kernels is None
    product = make_product({"dtype": torch.float32})
    x = torch.randn(1, 256, generator=seeded())
    assert torch.equal(multiply(x, *product.arguments), multiply_by_rows(x, *product.arguments))
    assert ask(product)[1][KERNEL] == "llvmlite is not installed; get it with: pip install llvmlite"
    assert not recwarn.list
    renew_products()
    monkeypatch.setenv("VISUALGLM_KERNELS", "cpu")
    with pytest.raises(KernelError, match="pip install llvmlite"):
        multiply(x, *product.arguments)


def test_the_environment_decides(monkeypatch, renew_products):
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")
    renew_products()
    assert ask(make_product({})) == (PACKED, dict.fromkeys((KERNEL, MANY_ROWS), "VISUALGLM_KERNELS is torch"))
