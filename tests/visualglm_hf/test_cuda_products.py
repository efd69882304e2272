"""The CUDA kernels without a GPU: compiled by the real NVRTC, run by a CPU that plays the GPU, launched through a fake
driver, against the torch reference."""

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_product_is_exact, seeded
from visualglm_hf import cuda_products, cuda_runtime, lowbit_products
from visualglm_hf.cuda_products import FUSED_ROWS, DeviceKernels
from visualglm_hf.cuda_runtime import Launch, compile_with, find_nvrtc
from visualglm_hf.cuda_source import SOURCE
from visualglm_hf.kernel_choice import KernelError
from visualglm_hf.lowbit_format import dequantize_naive
from visualglm_hf.lowbit_products import (
    WAYS,
    Product,
    choose_way,
    multiply_by_rows,
    multiply_on_cuda,
)
from visualglm_hf.quantization import QuantizedLinear, quantize_tensor


ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
DTYPES = [torch.float16, torch.bfloat16]
DEVICE = torch.device("cpu")  # the fake driver's
FUSED, DEQUANTIZED, TORCH = (way.name for way in WAYS["cuda"])
# Codes are exact and sums are in float32: of a sum's K products, this part may be lost.
SUM_ERROR = 2.0**-20


def make_problem(rows: int, outputs: int, inputs: int, bits: int, groups: int, dtype: torch.dtype):
    """Random x, codes of every value, and scales of both signs; `groups` 0 for a scale per row, [N]."""
    generator = seeded(rows * 1000 + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    codes = torch.randint(-128, 128, (outputs, inputs * bits // 8), generator=generator).to(torch.int8)
    scale = torch.randn((outputs, groups) if groups else (outputs,), generator=generator).mul(0.01).half()
    return x, codes, scale


@pytest.fixture(scope="session")
def nvrtc() -> ctypes.CDLL:
    found = next(find_nvrtc(), None)
    if found is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    return found


def way_of(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> str:
    """The name of the way that the operator takes on the fake GPU."""
    product = Product(x.dtype, len(x), codes, scale, bits, x.shape[1], address=x.data_ptr())
    return choose_way(WAYS["cuda"], product).name


# Compiled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_the_source_to_machine_code(nvrtc, architecture):
    if architecture not in cuda_runtime.supported_architectures(nvrtc):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    image = compile_with(nvrtc, divmod(architecture, 10), SOURCE)
    assert image.startswith(b"\x7fELF")
    for dtype, bits in itertools.product(DTYPES, (4, 8)):
        for kind in ("multiply", "dequantize"):
            is_there = cuda_products.function_name(kind, bits, dtype).encode() in image
            assert is_there == (dtype == torch.float16 or architecture >= 80)


def test_a_gpu_that_nvrtc_does_not_know_yet_gets_ptx_of_the_newest_that_it_does(nvrtc):
    newest = cuda_runtime.supported_architectures(nvrtc)[-1]
    image = compile_with(nvrtc, (99, 0), SOURCE).decode()
    assert f".target sm_{newest}" in image


def test_a_gpu_older_than_nvrtc_knows_is_refused(nvrtc):
    with pytest.raises(KernelError, match="sm_20"):
        compile_with(nvrtc, (2, 0), SOURCE)


def test_errors_of_the_compiler_come_with_its_log(nvrtc):
    with pytest.raises(KernelError, match=r"(?s)NVRTC_ERROR_COMPILATION.*undefined_name"):
        compile_with(nvrtc, (8, 0), "__global__ void kernel() { undefined_name = 1; }")


@pytest.mark.parametrize(
    ("platform", "cuda", "first"),
    [
        ("linux", "12.8", "libnvrtc.so.12"),
        ("linux", "11.8", "libnvrtc.so.11.2"),
        ("linux", None, "libnvrtc.so.13"),
        ("linux", "14.0", "libnvrtc.so.13"),
        ("win32", "13.0", "nvrtc64_130_0.dll"),
    ],
)
def test_torchs_own_version_of_nvrtc_comes_first(monkeypatch, platform, cuda, first):
    tried = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cuda_runtime, "load_with_builtins", lambda folder, name: tried.append((folder, name)))
    list(find_nvrtc())
    assert tried[0] == (None, first)
    assert len({name for _, name in tried}) == 3


def find_disassembler() -> str | None:
    """nvdisasm of a toolkit, of the wheel nvidia-cuda-nvdisasm, or of Triton's."""
    folders = [*Path(torch.__file__).parents[1].glob("nvidia/*/bin"), *Path(torch.__file__).parents[1].glob("triton")]
    found = (path for folder in folders for path in folder.rglob("nvdisasm"))
    return shutil.which("nvdisasm") or next(map(str, found), None)


def hot_loop(assembly: str, function: str) -> list[str]:
    """The instructions of the function's shortest loop around tensor core instructions."""
    body = assembly.split(f".text.{function}:", 1)[1].split(".text.", 1)[0].splitlines()
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(body) if line.startswith(".L_")}
    loops = []
    for i, line in enumerate(body):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        start = labels.get(target.group(1), i) if target else i
        if start < i and any("MMA" in inside for inside in body[start:i]):
            loops.append(body[start:i])
    return [line for line in min(loops, key=len) if re.match(r"\s+/\*[0-9a-f]+\*/", line)]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("bits", "most"), [(4, 2.5), (8, 3.5)])
def test_hot_loop_converts_no_integers_and_is_short(nvrtc, tmp_path, architecture, bits, most):
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    (tmp_path / "kernels.cubin").write_bytes(compile_with(nvrtc, divmod(architecture, 10), SOURCE))
    command = [disassembler, "-c", str(tmp_path / "kernels.cubin")]
    assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for dtype in DTYPES:
        loop = hot_loop(assembly, cuda_products.function_name("multiply", bits, dtype))
        assert not [line for line in loop if "I2F" in line or "LDL" in line or "STL" in line]
        assert len([line for line in loop if "LDG.E" in line and ".128" in line]) >= 4
        weights = 4 * cuda_products.LANE_BITS // bits  # of a lane in an iteration
        assert len(loop) / weights < most


# Run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "outputs", "inputs", "groups"),
    [
        (4, 32, 128, 0),
        (4, 64, 256, 1),
        (4, 32, 416, 0),  # no multiple of what a warp takes at a time
        (4, 64, 256, 8),  # groups of 32
        (4, 32, 1088, 17),  # of 64, and an odd number of them
        (4, 64, 512, 8),
        (4, 32, 1152, 9),  # of 128
        (4, 32, 2560, 10),  # of 256
        (8, 32, 64, 0),
        (8, 64, 208, 0),
        (8, 32, 1088, 0),
        (8, 32, 512, 8),
        (8, 32, 96, 6),
    ],
)
def test_fused_product_equals_the_reference(kernels, bits, outputs, inputs, groups, dtype):
    for rows in (*range(1, 17, 2), 2, 4, 8, 16, FUSED_ROWS) if inputs < 300 else (1, 2, 5, 11):
        x, codes, scale = make_problem(rows, outputs, inputs, bits, groups, dtype)
        assert way_of(x, codes, scale, bits) == FUSED
        assert_product_is_exact(
            kernels.multiply(x, codes, scale, bits, inputs), x, codes, scale, bits, inputs, SUM_ERROR
        )


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["early", "late"])
def tile_kernels(request, fake_gpu, without_compiling) -> DeviceKernels:
    """Kernels of a device with plans for tiles, whose copies to shared memory are there at once or when waited for."""
    fake_gpu.capability = (9, 0)
    fake_gpu.driver.simt_delay_copies(request.param)
    kernels = fake_gpu.products.found[DEVICE] = DeviceKernels(DEVICE)
    yield kernels
    fake_gpu.driver.simt_delay_copies(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "outputs", "inputs", "groups"),
    [
        (4, 32, 64, 0),
        (4, 96, 1344, 21),  # no multiple of what a block takes at a time, in either direction
        (4, 64, 1024, 8),  # groups of 128
        (4, 160, 768, 0),
        (8, 32, 192, 0),
        (8, 96, 1344, 21),
        (8, 64, 1024, 4),
    ],
)
def test_tiles_equal_the_reference(tile_kernels, bits, outputs, inputs, groups, dtype):
    for rows in (9, 16, 27, 33, 64, 65, 128):
        x, codes, scale = make_problem(rows, outputs, inputs, bits, groups, dtype)
        assert way_of(x, codes, scale, bits) == FUSED
        for tile_kernels.processors in (1, 2, 4, 1000):  # other tiles, and clusters of more blocks
            assert tile_kernels.find_tiles(rows, outputs, inputs, groups or 1, bits) is not None
            out = tile_kernels.multiply(x, codes, scale, bits, inputs)
            assert_product_is_exact(out, x, codes, scale, bits, inputs, SUM_ERROR)
            tile_kernels.launches.clear()


@pytest.fixture
def checked_kernels(tile_kernels) -> DeviceKernels:
    """Those for tiles that are compiled and checked already."""
    tile_kernels.plan_multiply(torch.float16, 9, 96, 1344, 21, 4)
    return tile_kernels


def test_tiles_stay_inside_their_tensors(checked_kernels, fake_gpu, guards):
    bias = torch.randn(96, generator=seeded()).half()
    for rows, checked_kernels.processors in itertools.product((9, 29, 66), (1, 1000)):
        checked_kernels.launches.clear()
        problem = make_problem(rows, 96, 1344, 4, 21, torch.float16)
        fake_gpu.driver.simt_allow(None, ctypes.c_size_t(0))
        for tensor in (*problem, bias):
            allow(fake_gpu.driver, tensor)
        assert checked_kernels.multiply(*problem, 4, 1344, bias).isfinite().all()
        assert all(guard.eq(7).all() for guard in guards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_a_bias_is_added_before_the_result_is_rounded(tile_kernels, rows, dtype):
    x, codes, scale = make_problem(rows, 64, 256, 4, 4, dtype)
    bias = torch.randn(64, generator=seeded()).to(dtype)
    matrix = dequantize_naive(codes, scale, 4, 256, torch.float64)
    expected = (x.double() @ matrix.T + bias.double()).to(dtype)
    out = tile_kernels.multiply(x, codes, scale, 4, 256, bias)
    assert (out == expected).float().mean() > 0.98  # a sum's last bit decides about a few
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_however_the_columns_are_divided_among_warps(kernels, bits):
    x, codes, scale = make_problem(3, 64, 3072, bits, 0, torch.float16)
    for kernels.processors in (1, 2, 1000):  # more and more warps
        assert_product_is_exact(kernels.multiply(x, codes, scale, bits, 3072), x, codes, scale, bits, 3072, SUM_ERROR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_exact(kernels, bits, dtype):
    """Unit vectors and powers of two give back the matrix, to the last bit."""
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(32, bits // 4)
    codes = torch.stack([row.roll(7 * i) for i, row in enumerate(codes)])
    scale = (2.0 ** torch.arange(-8, 8)).repeat(2).half() * torch.tensor([1, -1]).repeat(16)
    matrix = dequantize_naive(codes, scale, bits, 512, torch.float32)
    for start in range(0, 512, 16):
        x = torch.eye(512, dtype=dtype)[start : start + 16]
        assert torch.equal(kernels.multiply(x, codes, scale, bits, 512).float(), matrix.T[start : start + 16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "outputs", "inputs", "groups"),
    [(4, 5, 32, 0), (4, 37, 224, 7), (4, 3, 192, 2), (4, 64, 1024, 16), (8, 7, 48, 0), (8, 33, 160, 2)],
)
def test_dequantized_matrix_equals_the_reference_bit_for_bit(kernels, bits, outputs, inputs, groups, dtype):
    _, codes, scale = make_problem(1, outputs, inputs, bits, groups, dtype)
    scale[0] = 2.0**-24
    scale[1] = 60000.0
    scale[2] = 0
    out = kernels.dequantize(codes, scale, bits, inputs, dtype)
    assert torch.equal(out.view(torch.int16), dequantize_naive(codes, scale, bits, inputs, dtype).view(torch.int16))


def allow(driver: ctypes.CDLL, tensor: torch.Tensor) -> None:
    """Let kernels read and write a tensor, and nothing else that is not allowed, too."""
    driver.simt_allow(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))


@pytest.fixture
def guards(monkeypatch, fake_driver) -> list[torch.Tensor]:
    """What lies around each tensor that `new_empty` makes, where the kernels may write; to stay 7."""
    memory = []

    def new_empty(self, *shape, dtype=None):
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
        guarded = torch.full((shape.numel() + 64,), 7, dtype=dtype or self.dtype)
        memory.extend((guarded[:32], guarded[-32:]))
        out = guarded[32:-32].view(shape)
        allow(fake_driver, out)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return memory


@pytest.mark.parametrize(
    ("bits", "inputs", "groups"), [(4, 416, 0), (4, 1088, 17), (4, 96, 3), (8, 208, 0), (8, 96, 6)]
)
def test_fused_kernel_stays_inside_its_tensors(kernels, fake_gpu, guards, bits, inputs, groups):
    problem = make_problem(5, 32, inputs, bits, groups, torch.float16)
    for tensor in problem:
        allow(fake_gpu.driver, tensor)
    assert_product_is_exact(kernels.multiply(*problem, bits, inputs), *problem, bits, inputs, SUM_ERROR)
    assert all(guard.eq(7).all() for guard in guards)
    with pytest.raises(KernelError, match="outside"):
        kernels.multiply(problem[0].clone(), *problem[1:], bits, inputs)


def test_dequantization_stays_inside_its_tensors(kernels, fake_gpu, guards):
    _, codes, scale = make_problem(1, 5, 224, 4, 7, torch.float16)
    for tensor in (codes, scale):
        allow(fake_gpu.driver, tensor)
    out = kernels.dequantize(codes, scale, 4, 224, torch.float16)
    assert torch.equal(out, dequantize_naive(codes, scale, 4, 224, torch.float16))
    assert all(guard.eq(7).all() for guard in guards)


def test_rows_of_x_do_not_see_each_other(kernels):
    x, codes, scale = make_problem(7, 32, 256, 4, 4, torch.float16)
    alone = [kernels.multiply(row[None], codes, scale, 4, 256) for row in x]
    assert torch.equal(torch.cat(alone), kernels.multiply(x, codes, scale, 4, 256))
    x[3] = float("nan")
    out = kernels.multiply(x, codes, scale, 4, 256)
    assert out[3].isnan().all()
    assert out[[0, 1, 2, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "way"),
    [
        ({}, FUSED),
        ({"rows": FUSED_ROWS + 1}, DEQUANTIZED),
        ({"rows": 0}, DEQUANTIZED),
        ({"outputs": 33}, DEQUANTIZED),
        ({"inputs": 272, "groups": 1}, TORCH),
        ({"inputs": 288, "groups": 3}, DEQUANTIZED),  # groups of 96
        ({"inputs": 192, "groups": 12}, TORCH),  # of 16: two in the 16 bytes of a lane
        ({"dtype": torch.float32}, TORCH),
    ],
)
def test_what_the_kernels_take(kernels, change, way):
    problem = {"rows": 2, "outputs": 32, "inputs": 256, "bits": 4, "groups": 4, "dtype": torch.float16} | change
    assert way_of(*make_problem(**problem), 4) == way


def test_misaligned_and_strided_tensors_are_not_taken(kernels):
    x, codes, scale = make_problem(2, 64, 256, 4, 4, torch.float16)
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view_as(x)
    assert way_of(shifted, codes, scale, 4) == DEQUANTIZED
    assert way_of(x, codes[::2], scale[::2], 4) == TORCH
    assert way_of(x, codes.view(-1)[1:-127].view(63, 128), scale[1:], 4) == TORCH
    assert way_of(x, codes, scale.float(), 4) == TORCH


def test_devices_before_ampere_have_no_bfloat16(fake_gpu, without_compiling):
    fake_gpu.capability = (7, 5)
    assert DeviceKernels(DEVICE).dtypes == [torch.float16]


# Launched, from the operator down


def problem_and_reference(rows: int = 2, dtype: torch.dtype = torch.float16):
    x, codes, scale = make_problem(rows, 64, 256, 4, 4, dtype)
    return (x, codes, scale, 4, 256, False), multiply_by_rows(x, codes, scale, 4, 256, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_path_from_nvrtc_to_the_result(nvrtc, fake_gpu, dtype):
    for rows in (1, 16):
        arguments, _ = problem_and_reference(rows, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = multiply_on_cuda(*arguments)
        assert_product_is_exact(out, *arguments[:5], SUM_ERROR)
    assert fake_gpu.driver.simt_image_kind() == b"E"
    assert fake_gpu.driver.simt_last_stream() == 1234
    assert set(fake_gpu.entered) == {DEVICE}


def test_threads_that_share_sizes_do_not_share_arguments(kernels):
    x, *matrix = make_problem(1, 32, 256, 4, 4, torch.float16)
    problems = [(x * factor, *matrix) for factor in range(1, 17)]
    expected = [kernels.multiply(*problem, 4, 256) for problem in problems]
    with ThreadPoolExecutor(4) as threads:
        outs = threads.map(lambda problem: kernels.multiply(*problem, 4, 256), problems)
    assert all(map(torch.equal, outs, expected))


def test_ptx_is_loaded_for_an_unknown_gpu(nvrtc, fake_gpu):
    fake_gpu.capability = (99, 0)
    arguments, _ = problem_and_reference()
    assert_product_is_exact(multiply_on_cuda(*arguments), *arguments[:5], SUM_ERROR)
    assert fake_gpu.driver.simt_image_kind() == b"P"


def count_launches(fake_gpu, *arguments) -> int:
    before = fake_gpu.driver.simt_launches()
    multiply_on_cuda(*arguments)
    return fake_gpu.driver.simt_launches() - before


def test_few_rows_are_fused_and_many_are_dequantized(fake_gpu, without_compiling, monkeypatch):
    arguments, _ = problem_and_reference()
    multiply_on_cuda(*arguments)  # and the self-check
    names, launch = [], Launch.__call__
    name_of = {function.value: name for name, function in fake_gpu.products.found[DEVICE].functions.items()}
    monkeypatch.setattr(
        Launch, "__call__", lambda self, *rest: names.append(name_of[self.call[0].value]) or launch(self, *rest)
    )
    for rows in (1, FUSED_ROWS, FUSED_ROWS + 1):
        arguments, expected = problem_and_reference(rows)
        torch.testing.assert_close(multiply_on_cuda(*arguments), expected, rtol=2e-3, atol=2e-3)
    gradient = torch.randn(2, 64, generator=seeded()).half()
    out = multiply_on_cuda(gradient, *arguments[1:-1], True)
    expected = multiply_by_rows(gradient, *arguments[1:-1], True)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    single = multiply_on_cuda(arguments[0].float(), *arguments[1:])
    assert single.dtype == torch.float32
    assert names == ["multiply_int4_float16"] * 2 + ["dequantize_int4_float16"] * 2


def test_a_transposed_x_is_copied(fake_gpu, without_compiling):
    arguments, expected = problem_and_reference()
    x = arguments[0].t().contiguous().t()
    out = multiply_on_cuda(x, *arguments[1:])
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_an_error_of_the_driver_gives_one_warning_and_the_torch_way(fake_gpu, without_compiling, function):
    fake_gpu.driver.simt_fail(function.encode(), 209)
    arguments, expected = problem_and_reference()
    with pytest.warns(RuntimeWarning, match=r"VISUALGLM_KERNELS=torch.*error 209: pretended failure") as caught:
        outs = [multiply_on_cuda(*arguments) for _ in range(2)]
    assert all(torch.equal(out, expected) for out in outs)
    assert len(caught) == 1


def test_an_error_after_the_self_check_gives_one_warning_and_the_torch_way(fake_gpu, without_compiling):
    arguments, expected = problem_and_reference()
    multiply_on_cuda(*arguments)
    fake_gpu.driver.simt_fail(b"cuLaunchKernel", 1)
    with pytest.warns(RuntimeWarning, match="error 1:") as caught:
        outs = [multiply_on_cuda(*arguments) for _ in range(2)]
    assert all(torch.equal(out, expected) for out in outs)
    assert len(caught) == 1
    assert fake_gpu.products.found == {DEVICE: None}


def test_a_thread_without_a_context_gets_the_devices(kernels, fake_gpu):
    x, codes, scale = make_problem(2, 32, 128, 4, 0, torch.float16)
    fake_gpu.driver.simt_lose_context()
    assert_product_is_exact(kernels.multiply(x, codes, scale, 4, 128), x, codes, scale, 4, 128, SUM_ERROR)


def test_missing_libraries_give_one_warning_and_the_torch_way(fake_gpu, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "find_nvrtc", lambda: iter(()))
    arguments, expected = problem_and_reference()
    with pytest.warns(RuntimeWarning, match="NVRTC, which comes with torch for CUDA, was not found"):
        out = multiply_on_cuda(*arguments)
    assert torch.equal(out, expected)

    def no_driver():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_runtime, "load_driver", no_driver)
    fake_gpu.renew()
    with pytest.warns(RuntimeWarning, match="libcuda"):
        out = multiply_on_cuda(*arguments)
    assert torch.equal(out, expected)


def test_an_nvrtc_that_fails_makes_room_for_the_next(monkeypatch):
    def compile_one(nvrtc, capability, source):
        if nvrtc == "broken":
            raise KernelError("NVRTC_ERROR_BUILTIN_OPERATION_FAILURE")
        return b"image"

    monkeypatch.setattr(cuda_runtime, "compile_with", compile_one)
    monkeypatch.setattr(cuda_runtime, "find_nvrtc", lambda: iter(("broken", "sound")))
    assert cuda_runtime.compile_kernels((8, 0), SOURCE) == b"image"
    monkeypatch.setattr(cuda_runtime, "find_nvrtc", lambda: iter(("broken",)))
    with pytest.raises(KernelError, match="BUILTIN"):
        cuda_runtime.compile_kernels((8, 0), SOURCE)


@pytest.mark.parametrize(("kind", "method"), [("multiply", "launch_multiply"), ("dequantize", "dequantize")])
def test_a_kernel_that_computes_something_else_is_not_used(fake_gpu, without_compiling, monkeypatch, kind, method):
    right = getattr(DeviceKernels, method)
    monkeypatch.setattr(DeviceKernels, method, lambda self, *arguments: right(self, *arguments) * 1.1)
    arguments, expected = problem_and_reference()
    with pytest.warns(RuntimeWarning, match=f"{kind}_int4_float16 is off by 0.1"):
        assert torch.equal(multiply_on_cuda(*arguments), expected)


def test_environment_chooses(fake_gpu, without_compiling, monkeypatch):
    arguments, expected = problem_and_reference()
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")
    assert count_launches(fake_gpu, *arguments) == 0
    fake_gpu.renew()
    monkeypatch.setenv("VISUALGLM_KERNELS", "cuda")
    assert count_launches(fake_gpu, *arguments) > 0
    fake_gpu.driver.simt_fail(b"cuLaunchKernel", 1)
    fake_gpu.renew()
    with pytest.raises(KernelError, match="error 1"):
        multiply_on_cuda(*arguments)
    monkeypatch.setenv("VISUALGLM_KERNELS", "fast")
    with pytest.raises(ValueError, match="auto, cpu, cuda, torch"):
        multiply_on_cuda(*arguments)


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 2)])
def test_old_devices_use_torch_without_a_word(fake_gpu, capability, monkeypatch):
    fake_gpu.capability = capability
    arguments, expected = problem_and_reference()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(multiply_on_cuda(*arguments), expected)


def test_nothing_is_loaded_while_a_graph_is_captured(fake_gpu, without_compiling):
    arguments, expected = problem_and_reference()
    fake_gpu.capturing = True
    assert torch.equal(multiply_on_cuda(*arguments), expected)
    assert not fake_gpu.products.found
    fake_gpu.capturing = False
    assert count_launches(fake_gpu, *arguments) > 1  # the self-check
    fake_gpu.capturing = True
    assert count_launches(fake_gpu, *arguments) == 1


def test_layers_of_every_format_agree_with_themselves_on_the_cpu(fake_gpu, without_compiling):
    linear = torch.nn.Linear(256, 64)
    for bits, group_size in ((4, None), (4, 32), (4, 128), (4, -1), (8, None)):
        layer = QuantizedLinear.from_linear(linear, bits, group_size)
        x = torch.randn(4, 256, generator=seeded()).half()
        out = multiply_on_cuda(x, layer.weight, layer.weight_scale, bits, 256, False)
        assert_product_is_exact(out, x, layer.weight, layer.weight_scale, bits, 256, SUM_ERROR)


# Registered


def test_operator_has_an_implementation_for_cuda():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("visualglm::quantized_matmul", "CUDA")


def test_quantizing_on_the_cpu_and_multiplying_there_never_asks_for_a_device(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "load_driver", None)
    codes, scale = quantize_tensor(torch.randn(32, 128), 4)
    lowbit_products.multiply(torch.randn(1, 128), codes, scale, 4, 128)
