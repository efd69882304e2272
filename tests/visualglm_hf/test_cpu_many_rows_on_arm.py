"""Room: the kernels for many rows as an ARM processor computes them, in an emulator: QEMU, with a cross compiler.

Debian has both: `apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross`. How fast a processor is, an
emulator does not say.
"""

import ctypes
import shutil
import subprocess

import pytest
import torch

from tests.helpers import compile_for, make_lowbit_problem, skip_without_cpu_kernels
from tests.paths import ROOT
from visualglm_hf.cpu_arithmetic import ARITHMETIC_OF_WORDS, ARITHMETICS, I8MM, Arithmetic, make_i8mm_trial
from visualglm_hf.cpu_many_rows import (
    ManyRowsPlan,
    Shape,
    choose_blocking,
    choose_tiling,
    find_cell,
    many_rows_naive,
    write_many_rows,
    write_row_quantization,
)
from visualglm_hf.lowbit_format import count_groups


skip_without_cpu_kernels()
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
if COMPILER is None or EMULATOR is None:
    pytest.skip("needs QEMU and a cross compiler", allow_module_level=True)

TRIPLE, PLACE = "aarch64-linux-gnu", 0x5000000000
WAYS = {"cortex-a72": ARITHMETIC_OF_WORDS, "neoverse-n1": ARITHMETICS["dotprod"], "neoverse-n2": I8MM}


def run_on_arm(folder, processor: str, codes: dict[str, str], memory: bytes, tasks: list[int]) -> bytes:
    """The memory after the functions `first` and `second` have had their tasks in it."""
    for name, code in codes.items():
        machine, module = compile_for(code, TRIPLE, processor)
        (folder / f"{name}.o").write_bytes(machine.emit_object(module))
    places = {"BASE": PLACE, "SIZE": len(memory), "FIRST_TASK": tasks[0], "SECOND_TASK": tasks[1]}
    given = [f"-D{name}={place}" for name, place in places.items()]
    objects = [folder / f"{name}.o" for name in codes]
    program = folder / "program"
    subprocess.run([COMPILER, "-static", *given, ROOT / "tests/arm/main.c", *objects, "-o", program], check=True)
    return subprocess.run([EMULATOR, "-cpu", "max", program], input=memory, capture_output=True, check=True).stdout


def multiply_on_arm(folder, processor: str, arithmetic: Arithmetic, problem: tuple, bits: int) -> torch.Tensor:
    """The product of activations [M, K] with a matrix of N rows."""
    x, codes, scale = problem
    blocking = choose_blocking({}, arithmetic)
    tiling = choose_tiling(len(x), blocking.rows)
    shape = Shape(bits, find_cell(x.shape[1] // count_groups(scale)), arithmetic, blocking, tiling.rows)
    plan = ManyRowsPlan(shape, tiling, None, None, *x.shape, threads=1)
    pitch = -(-len(codes) // blocking.outputs) * blocking.outputs
    out = torch.zeros(len(x), pitch, dtype=x.dtype)
    parts, places, end = [], [], 0
    for part in (x, codes, scale, out, torch.zeros(plan.quantized_bytes, dtype=torch.uint8)):
        parts.append(bytes(part.contiguous().view(torch.uint8).flatten().numpy()))
        places.append(PLACE + end)
        parts.append(bytes(-len(parts[-1]) % 64))
        end += len(parts[-2]) + len(parts[-1])
    at_x, at_codes, at_scale, at_out, at_quantized = places
    stages = plan.stages(at_x, at_quantized, codes, scale, at_out, pitch)
    stages[1].task.matrix, stages[1].task.scales = at_codes, at_scale
    tasks = [end, end + ctypes.sizeof(stages[0].task)]
    memory = b"".join([*parts, *(bytes(stage.task) for stage in stages)])
    functions = {
        "first": write_row_quantization("first", shape, x.dtype),
        "second": write_many_rows("second", shape, x.dtype),
    }
    memory = run_on_arm(folder, processor, functions, memory, tasks)
    found = torch.frombuffer(bytearray(memory), dtype=x.dtype, count=out.numel(), offset=at_out - PLACE)
    return found.view(out.shape)[:, : len(codes)]


@pytest.mark.parametrize(("bits", "inputs", "groups", "rows"), [(4, 4224, 66, 13), (4, 256, 32, 4), (8, 576, 9, 5)])
@pytest.mark.parametrize("processor", WAYS)
def test_arm_computes_the_same_bits(tmp_path, processor, bits, inputs, groups, rows):
    problem = make_lowbit_problem(bits, 40, inputs, groups, rows)
    out = multiply_on_arm(tmp_path, processor, WAYS[processor], problem, bits)
    assert torch.equal(out, many_rows_naive(*problem, bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arm_computes_the_same_bits_of_half_precision(tmp_path, dtype):
    problem = make_lowbit_problem(4, 20, 256, 4, 3, dtype)
    out = multiply_on_arm(tmp_path, "neoverse-n2", I8MM, problem, 4)
    assert torch.equal(out, many_rows_naive(*problem, 4).to(dtype))


def test_the_trial_of_matrix_products_computes_what_it_expects(tmp_path):
    trial = make_i8mm_trial()
    functions = {
        "first": trial.code.replace("@trial", "@first"),
        "second": "define void @second(ptr %at) {\n  ret void\n}",
    }
    assert run_on_arm(tmp_path, "neoverse-n2", functions, trial.memory, [0, 0]) == trial.expected
