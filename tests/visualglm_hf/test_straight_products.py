"""Eager products on a GPU go straight to the kernel, without the operator, unless somebody has to see the operator.

Here tensors of the CPU say that they are on a GPU, and the driver is the fake one. So whoever goes straight makes it
launch a kernel; the operator, which goes by the device, computes on the CPU and launches nothing.
"""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import seeded
from visualglm_hf.lowbit_format import dequantize_naive
from visualglm_hf.lowbit_products import multiply_on_cuda, quantized_linear
from visualglm_hf.quantization import QuantizedLinear


OPERATOR = torch.ops.visualglm.quantized_matmul.default
DEVICE = torch.device("cpu")  # the fake driver's


@pytest.fixture
def gpu(fake_gpu, without_compiling, monkeypatch):
    """The fake GPU, with kernels that are loaded and checked."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    assert fake_gpu.products.find(DEVICE) is not None
    return fake_gpu


@pytest.fixture
def layer() -> QuantizedLinear:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(torch.nn.Linear(256, 64), 4).requires_grad_(False)
    layer.bias.data = layer.bias.half()
    return layer


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 3, 256, generator=seeded()).half()


@pytest.fixture
def function(layer):
    """The layer as a function, of bare tensors: its codes refuse tracers and transforms themselves."""
    weight, scale, bias = layer.weight.detach(), layer.weight_scale, layer.bias.detach()
    return lambda x: quantized_linear(x, weight, scale, 4, 256, bias)


class Seen(TorchDispatchMode):
    """Keeps the operators that it is shown."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        self.operators.append(function)
        return function(*arguments, **(keywords or {}))


def launches_of(gpu, call) -> int:
    before = gpu.driver.simt_launches()
    call()
    return gpu.driver.simt_launches() - before


def is_near(out: torch.Tensor, layer: QuantizedLinear, x: torch.Tensor) -> bool:
    matrix = dequantize_naive(layer.weight, layer.weight_scale, 4, 256, torch.float64)
    expected = x.double() @ matrix.T + layer.bias.double()
    return out.shape == expected.shape and out.dtype == x.dtype and bool((out - expected).norm() <= 2e-3 * out.norm())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_product_without_gradients_is_one_launch_with_the_bias(gpu, layer, x, context):
    with context():
        for _ in range(2):  # the second one finds the launch of the first
            assert launches_of(gpu, lambda: layer(x)) == 1
        assert torch.equal(
            layer(x), multiply_on_cuda(x, layer.weight, layer.weight_scale, 4, 256, False, bias=layer.bias)
        )
        assert is_near(layer(x), layer, x)


def test_activations_that_want_a_gradient_do_without_it_where_none_is_recorded(gpu, layer, x):
    x.requires_grad_()
    with torch.no_grad():
        assert launches_of(gpu, lambda: layer(x)) == 1


def test_gradients_reach_activations_and_a_bias(gpu, layer, x):
    gradient = torch.randn(1, 3, 64, generator=seeded()).half()
    matrix = dequantize_naive(layer.weight, layer.weight_scale, 4, 256, torch.float64)
    x.requires_grad_()
    assert launches_of(gpu, lambda: layer(x).backward(gradient)) == 0
    torch.testing.assert_close(x.grad.double(), gradient.double() @ matrix, rtol=2e-2, atol=2e-2)
    layer.bias.requires_grad_()
    layer(x.detach()).backward(gradient)
    torch.testing.assert_close(layer.bias.grad.double(), gradient.double().sum((0, 1)), rtol=2e-2, atol=2e-2)


def test_a_mode_sees_the_operator(gpu, layer, x):
    with Seen() as seen, torch.no_grad():
        assert launches_of(gpu, lambda: layer(x)) == 0
    assert OPERATOR in seen.operators


def test_tensors_without_memory_have_a_product(gpu, function, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        out = function(mode.from_tensor(x))
    assert type(out) is FakeTensor
    assert (out.shape, out.dtype) == ((1, 3, 64), torch.float16)


def test_a_kind_of_tensor_sees_the_operator(gpu, layer, x):
    class Kind(torch.Tensor):
        pass

    with torch.no_grad():
        assert launches_of(gpu, lambda: layer(x.as_subclass(Kind))) == 0


def test_a_traced_product_has_the_operator(gpu, function, x):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is old
        assert OPERATOR in [node.target for node in make_fx(function)(x).graph.nodes]
        assert "visualglm::quantized_matmul" in str(torch.jit.trace(function, x).graph)


def test_a_compiled_layer_has_the_operator(gpu, layer, x):
    targets = []

    def backend(module, inputs):
        targets.extend(node.target for node in module.graph.nodes)
        return module.forward

    with torch.no_grad():
        out = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert {OPERATOR, OPERATOR.overloadpacket} & set(targets)
    assert is_near(out, layer, x)


def test_transforms_of_functions_see_the_operator(gpu, function, layer, x):
    gradient = torch.func.grad(lambda x: function(x).sum())
    assert launches_of(gpu, lambda: gradient(x)) == 0
    matrix = dequantize_naive(layer.weight, layer.weight_scale, 4, 256, torch.float64)
    torch.testing.assert_close(gradient(x).double(), matrix.sum(0).expand(1, 3, 256), rtol=2e-2, atol=2e-2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap has no rule for the operator, and calls it row by row
        assert is_near(torch.func.vmap(function)(x[0]), layer, x[0])


def test_hooks_of_the_layer_are_called(gpu, layer, x):
    layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))
    layer.register_forward_hook(lambda module, arguments, out: out + 1)
    with torch.no_grad():
        twice = quantized_linear(x * 2, layer.weight, layer.weight_scale, 4, 256, layer.bias)
        assert torch.equal(layer(x), twice + 1)


def test_autocast_holds(gpu, layer, x):
    layer.bias.data = layer.bias.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16
        assert launches_of(gpu, lambda: layer(x.float())) == 1


def test_what_lies_otherwise_is_multiplied_all_the_same(gpu, layer, x):
    def shift(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor)

    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer(x.mT.contiguous().mT), expected)
        assert is_near(layer(shift(x)), layer, x)  # not by the kernel that reads 16 bytes at a time
        layer.bias.data = shift(layer.bias)
        assert is_near(layer(x), layer, x)
        assert is_near(layer(x[:, :0]), layer, x[:, :0])


def test_a_launch_that_fails_gives_one_warning_and_the_torch_way(gpu, layer, x):
    with torch.no_grad():
        layer(x)
        gpu.driver.simt_fail(b"cuLaunchKernel", 1)
        with pytest.warns(RuntimeWarning, match="error 1:") as caught:
            outs = [layer(x) for _ in range(2)]
    assert all(is_near(out, layer, x) for out in outs)
    assert len(caught) == 1
    assert gpu.products.found == {DEVICE: None}


def test_kernels_that_are_not_wanted_are_not_launched(gpu, layer, x, monkeypatch):
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")
    gpu.renew()
    with torch.no_grad():
        assert launches_of(gpu, lambda: layer(x)) == 0
        assert is_near(layer(x), layer, x)


def test_nothing_is_loaded_while_a_graph_is_captured(gpu, layer, x):
    gpu.renew()
    gpu.capturing = True
    with torch.no_grad():
        assert is_near(layer(x), layer, x)
    assert not gpu.products.found
