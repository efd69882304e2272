"""What only a CUDA device can show of low-bit layers: parity at the model's sizes, graphs, streams, devices, speed.

`pytest -m gpu -s tests/visualglm_hf/test_gpu_quantization.py` prints milliseconds and GB/s.
"""

import itertools
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from tests.helpers import ROUNDING, assert_product_is_exact, difference
from visualglm_hf import lowbit_products
from visualglm_hf.cuda_products import (
    BFLOAT16_CAPABILITY,
    CUDA_PRODUCTS,
    FUSED_ROWS,
    CudaProducts,
    DeviceKernels,
    sizes_of,
)
from visualglm_hf.lowbit_format import dequantize_naive
from visualglm_hf.lowbit_products import multiply, multiply_by_rows, multiply_on_cuda
from visualglm_hf.quantization import QuantizedLinear
from visualglm_tools.benchmarking.engines import ModelEngine, Prompts, Runner
from visualglm_tools.benchmarking.models import GEOMETRIES, build_model
from visualglm_tools.benchmarking.timing import Clock


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# (N, K): query_key_value, dense, dense_h_to_4h, dense_4h_to_h.
SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]
FORMATS = [(4, 64), (4, 128), (4, None), (8, None)]  # bits, group size
DTYPES = [torch.float16, torch.bfloat16]
SUM_ERROR = 2.0**-18  # tensor cores truncate where they align products
REPEATS = 20
ROWS = (1, 4, 8, 9, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


@pytest.fixture(autouse=True)
def kernels_or_error(monkeypatch):
    monkeypatch.setenv("VISUALGLM_KERNELS", "cuda")


def skip_without(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < BFLOAT16_CAPABILITY:
        pytest.skip("this device has no bfloat16")


def make_problem(rows, outputs, inputs, bits, group_size, dtype, device="cuda"):
    generator = torch.Generator(device).manual_seed(rows)
    options = {"device": device, "generator": generator}
    x = torch.randn(rows, inputs, **options).to(dtype)
    codes = torch.randint(-128, 128, (outputs, inputs * bits // 8), **options).to(torch.int8)
    scale = torch.randn((outputs, inputs // group_size) if group_size else (outputs,), **options)
    return x, codes, scale.mul(0.001).half(), bits, inputs, False


def reference(x, codes, scale, bits, inputs, _) -> torch.Tensor:
    return x.double() @ dequantize_naive(codes, scale, bits, inputs, torch.float64).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_equal_the_reference(outputs, inputs, bits, group_size, dtype):
    skip_without(dtype)
    for rows in (*range(1, FUSED_ROWS + 1), 64):
        problem = make_problem(rows, outputs, inputs, bits, group_size, dtype)
        out = multiply_on_cuda(*problem)
        if rows <= FUSED_ROWS:
            assert_product_is_exact(out, *problem[:5], SUM_ERROR)
        else:  # the matrix is rounded too
            assert difference(out, reference(*problem)) < 4 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_of_many_rows_equal_the_reference(outputs, inputs, bits, group_size, dtype):
    """Of those that tiles multiply, to the last row of the last block; of others, a matrix that is rounded."""
    skip_without(dtype)
    for rows in (48, 63, 65, 96, 127, 128, 129, 192, 255, 256, 257):
        problem = make_problem(rows, outputs, inputs, bits, group_size, dtype)
        kernels = CUDA_PRODUCTS.find(problem[0].device)
        is_read_as_codes = kernels.multiply_obstacle(*sizes_of(*problem[:5])) is None
        out = multiply_on_cuda(*problem)
        if is_read_as_codes:
            assert_product_is_exact(out, *problem[:5], SUM_ERROR)
        else:
            assert difference(out, reference(*problem)) < 4 * ROUNDING[dtype]


def test_a_bias_is_added_before_the_result_is_rounded():
    for rows in (1, 16, 100):
        problem = make_problem(rows, 4096, 4096, 4, 64, torch.float16)
        bias = torch.randn(4096, device="cuda", dtype=torch.float16)
        out = multiply_on_cuda(*problem, bias=bias)
        assert difference(out, reference(*problem) + bias.double()) < ROUNDING[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_dequantized_matrix_equals_the_reference_bit_for_bit(bits, group_size, dtype):
    skip_without(dtype)
    x, codes, scale, *_ = make_problem(1, 4096, 4096, bits, group_size, dtype)
    kernels = CUDA_PRODUCTS.find(x.device)
    expected = dequantize_naive(codes, scale, bits, 4096, dtype)
    assert torch.equal(kernels.dequantize(codes, scale, bits, 4096, dtype), expected)


def test_gradient_equals_that_of_the_dequantized_matrix():
    _, codes, scale, *_ = make_problem(1, 4096, 4096, 4, 64, torch.float16)
    x = torch.randn(5, 4096, device="cuda", dtype=torch.float16, requires_grad=True)
    gradient = torch.randn(5, 4096, device="cuda", dtype=torch.float16)
    multiply(x, codes, scale, 4, 4096).backward(gradient)
    expected = gradient.double() @ dequantize_naive(codes, scale, 4, 4096, torch.float64)
    assert difference(x.grad, expected) < 2e-3


@pytest.mark.parametrize("rows", [1, 64])
def test_a_captured_graph_replays_with_new_activations(rows):
    layer = QuantizedLinear.from_linear(torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.float16), 4)
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        layer(x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert difference(out, layer(x)) < 1e-3


def test_the_first_call_inside_a_capture_uses_torch(monkeypatch):
    fresh = CudaProducts()
    monkeypatch.setattr(lowbit_products, "CUDA_PRODUCTS", fresh)
    problem = make_problem(1, 4096, 4096, 4, 64, torch.float16)
    expected = multiply_by_rows(*problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiply_on_cuda(*problem)
    graph.replay()
    torch.cuda.synchronize()
    assert not fresh.found
    assert difference(out, expected) < 1e-3


def test_kernels_run_on_the_current_stream():
    problem = make_problem(1, 16384, 4096, 4, 64, torch.float16)
    expected = multiply_on_cuda(*problem)
    late = torch.zeros_like(problem[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: anything on another stream would see zeros
        late.copy_(problem[0])
        out = multiply_on_cuda(late, *problem[1:])
    stream.synchronize()
    assert torch.equal(out, expected)


def test_a_thread_may_begin_with_a_low_bit_layer():
    problem = make_problem(1, 4096, 4096, 4, 64, torch.float16)
    expected = multiply_on_cuda(*problem)
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(multiply_on_cuda, *problem).result(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_each_device_has_its_own_kernels():
    outs = [multiply_on_cuda(*make_problem(3, 4096, 4096, 4, 64, torch.float16, f"cuda:{i}")) for i in (0, 1, 0)]
    assert [out.device.index for out in outs] == [0, 1, 0]
    problem = make_problem(3, 4096, 4096, 4, 64, torch.float16, "cuda:1")
    assert difference(outs[1], reference(*problem)) < 1e-3


def test_compiled_with_cuda_graphs_gives_the_eager_result():
    layer = QuantizedLinear.from_linear(torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.float16), 4)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        for _ in range(3):
            assert difference(compiled(x).clone(), layer(x)) < 1e-3


# Speed, printed and never asserted


def average_seconds(call) -> float:
    """Time a call on the device, after one that does not count."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / REPEATS


def seconds_per_call(call, arguments: list[tuple]) -> float:
    """Replay a graph with one call for each of the arguments, which together do not fit into the caches."""
    for each in arguments:
        call(*each)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in arguments:
            call(*each)
    return average_seconds(graph.replay) / len(arguments)


def copy_bandwidth() -> float:
    """Bytes per second, read and written. Not in a graph: there a copy of this size is a third slower on an H200."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / average_seconds(lambda: target.copy_(source))


def test_print_speed():
    copies = copy_bandwidth()
    print(f"\n{torch.cuda.get_device_name()}: copies at {copies / 1e9:.0f} GB/s")
    print("    N x K         format      M   microseconds   GB/s   of copies")
    cases = itertools.product(SHAPES, [None, *FORMATS], (1, 4, 8, 16, 64))
    for (outputs, inputs), kind, rows in cases:
        if kind is None:
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
            matrices = [torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) for _ in range(4)]
            seconds = seconds_per_call(torch.nn.functional.linear, [(x, matrix) for matrix in matrices])
            name, size = "float16", matrices[0].nbytes
        else:
            problem = make_problem(rows, outputs, inputs, *kind, torch.float16)
            codes, scale = problem[1:3]
            copied = [
                (problem[0], codes.clone(), scale.clone(), *problem[3:]) for _ in range(512 * 2**20 // codes.nbytes)
            ]
            seconds = seconds_per_call(multiply_on_cuda, copied)
            name, size = f"int{kind[0]} g{kind[1] or 'row'}", codes.nbytes + scale.nbytes
        print(
            f"{outputs:>6} x {inputs:<6} {name:>10} {rows:>6} {seconds * 1e6:>14.1f} {size / seconds / 1e9:>6.0f}"
            f" {size / seconds / copies:>9.0%}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, None)])
def test_print_speed_of_every_way_by_rows(bits, group_size, dtype):
    """Where one overtakes another says what FUSED_ROWS and the plans for tiles should be on this device."""
    skip_without(dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    kernels: DeviceKernels = CUDA_PRODUCTS.find(device)
    few = DeviceKernels(device)
    few.choice = None
    print(f"\n{torch.cuda.get_device_name()}, {bits} bits, {dtype}; microseconds")
    print("   M   a few rows     tiles   dequantized      GEMM    N x K")
    for (outputs, inputs), rows in itertools.product(SHAPES, ROWS):
        x, codes, scale, *_ = make_problem(rows, outputs, inputs, bits, group_size, dtype)
        copied = [(x, codes.clone(), scale.clone(), bits, inputs) for _ in range(256 * 2**20 // codes.nbytes)]
        sizes = sizes_of(*copied[0])
        times = [few.multiply if few.multiply_obstacle(*sizes) is None else None]
        is_planned = kernels.multiply_obstacle(*sizes) is None and kernels.find_tiles(*sizes[1:]) is not None
        times.append(kernels.multiply if is_planned else None)
        times.append(lambda *arguments: multiply_by_rows(*arguments, False, kernels.dequantize))
        times = [seconds_per_call(call, copied) * 1e6 if call else float("nan") for call in times]
        matrices = [(x, torch.randn(outputs, inputs, device="cuda", dtype=dtype)) for _ in range(3)]
        times.append(seconds_per_call(torch.nn.functional.linear, matrices) * 1e6)
        print("{:>4} {:>12.1f} {:>9.1f} {:>13.1f} {:>9.1f}".format(rows, *times), f"   {outputs} x {inputs}")


@pytest.mark.slow
def test_print_prompts_and_pictures_in_turns():
    """Milliseconds of the whole model, full size, and kernels that the GPU ran for it: what low bits cost or save.

    One encoder, of float16, encodes in all: where its times differ, something else than the weights does it.
    """
    clock = Clock(torch.device("cuda"))
    works, times = {}, {}
    with torch.no_grad():
        for name, bits in (("float16", None), ("8 bits", 8), ("4 bits", 4)):
            model = build_full_model(bits)
            prompts = Prompts(model, 1)
            works["picture", name] = partial(model.get_image_features, prompts.pictures())
            for length in (64, 128, 256, 512):
                works[f"prompt of {length}", name] = partial(Runner(ModelEngine(model), prompts, clock).start, length)
        for _ in range(14):
            for what, work in works.items():
                times.setdefault(what, []).append(clock(work)[0])
        print(f"\n{torch.cuda.get_device_name()}: milliseconds (median, least, most), kernels")
        for what, work in works.items():
            kept = times[what][2:]
            figures = (statistics.median(kept), min(kept), max(kept), count_kernels(work))
            print("{:<16} {:<8} {:>8.2f} {:>8.2f} {:>8.2f} {:>6}".format(*what, *figures))


def build_full_model(bits: int | None):
    model = build_model(GEOMETRIES["full"], torch.float16, torch.device("cuda"), bits)
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)


def count_kernels(work) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(each.count for each in profiler.key_averages())
