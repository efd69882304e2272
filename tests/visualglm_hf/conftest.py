"""A GPU for tests on machines without one: the kernels' real source, run by a CPU, behind a fake `libcuda`."""

import contextlib
import ctypes
import itertools
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from visualglm_hf import cuda_products, cuda_runtime, lowbit_products
from visualglm_hf.cuda_products import CudaProducts, DeviceKernels
from visualglm_hf.cuda_source import SOURCE
from visualglm_hf.cuda_tiles import TileKernel, tile_source


SIMT = Path(__file__).parents[1] / "simt"


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory) -> ctypes.CDLL:
    """A libcuda whose kernels are the real source, built by g++ for this CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, to run the kernels on the CPU")
    folder = tmp_path_factory.mktemp("simt")
    tiles = itertools.starmap(
        TileKernel, itertools.product((4, 8), ("float16", "bfloat16"), (2,), (1, 2, 4, 8), (256,))
    )
    (folder / "kernels.cu").write_text(SOURCE + tile_source(tiles))
    library = folder / "libcuda.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SIMT}", f'-DSOURCE="{folder / "kernels.cu"}"']
    subprocess.run(["g++", *options, "-o", str(library), str(SIMT / "driver.cpp")], check=True)
    driver = ctypes.CDLL(str(library))
    driver.simt_last_stream.restype = ctypes.c_void_p
    driver.simt_image_kind.restype = ctypes.c_char
    return driver


@pytest.fixture
def fake_gpu(fake_driver, monkeypatch):
    """Let the launcher find the fake driver, and a device with compute capability 8.0 and few processors."""
    state = types.SimpleNamespace(
        driver=fake_driver, capability=(8, 0), processors=2, capturing=False, entered=[], index=0
    )
    monkeypatch.setattr(cuda_runtime, "load_driver", lambda: fake_driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(multi_processor_count=state.processors),
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: state.entered.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.index)
    monkeypatch.setattr(cuda_runtime, "current_stream", lambda index: 1234)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.delenv("VISUALGLM_KERNELS", raising=False)

    def renew():
        state.products = CudaProducts()
        monkeypatch.setattr(lowbit_products, "CUDA_PRODUCTS", state.products)

    state.renew = renew
    renew()
    yield state
    fake_driver.simt_fail(None, 0)
    fake_driver.simt_allow(None, ctypes.c_size_t(0))


@pytest.fixture
def without_compiling(monkeypatch):
    monkeypatch.setattr(cuda_products, "compile_kernels", lambda capability, source: b"\x7fELF")


@pytest.fixture
def kernels(fake_gpu, without_compiling) -> DeviceKernels:
    device = torch.device("cpu")  # of the tensors
    kernels = fake_gpu.products.found[device] = DeviceKernels(device)
    return kernels
