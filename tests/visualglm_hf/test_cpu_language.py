"""Room: the language of the CPU kernels: each expression computes what it says, against torch."""

import ctypes
import itertools
import math

import pytest
import torch

from tests.helpers import skip_without_cpu_kernels
from visualglm_hf.cpu_language import (
    BYTES,
    F32,
    FLOATS32,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    INTEGERS,
    Form,
    absolute,
    clamp,
    exp,
    fma,
    join,
    largest_of,
    maximum,
    minimum,
    multiply_add,
    narrow,
    shuffle,
    splat,
    square_root,
    total_of,
    transpose,
    vector_of,
    where,
    write_function,
    write_kernel,
)
from visualglm_hf.cpu_runtime import Compiler, Task, load_llvm


skip_without_cpu_kernels()
COMPILER = Compiler(load_llvm())
INTS32 = Form(I32)
NUMBERS = itertools.count()


class ArrayTask(Task):
    """Two arrays, a number of each type, and where the result goes."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("factor", ctypes.c_float),
    )


def run(work, *arrays: torch.Tensor, chunks: int = 1, count: int = 0, factor: float = 0.0) -> None:
    """Compile a kernel and run it with the addresses of up to three arrays."""
    name = f"kernel{next(NUMBERS)}"
    kernel = COMPILER.compile(name, write_kernel(name, ArrayTask, work))
    addresses = [array.data_ptr() for array in arrays] + [None] * (3 - len(arrays))
    kernel.call(ctypes.byref(ArrayTask(chunks, 0, *addresses, count, factor)))


def make_floats(seed: int, lanes: int = 16) -> torch.Tensor:
    return torch.randn(lanes, generator=torch.Generator().manual_seed(seed)) * 3


A, B = make_floats(0), make_floats(1)
ON_FLOATS = {
    "a + b": (lambda a, b: a + b, A + B),
    "1 + a": (lambda a, b: 1.0 + a, 1 + A),
    "a - b": (lambda a, b: a - b, A - B),
    "1 - a": (lambda a, b: 1.0 - a, 1 - A),
    "a * b": (lambda a, b: a * b, A * B),
    "a / b": (lambda a, b: a / b, A / B),
    "1 / a": (lambda a, b: 1.0 / a, 1 / A),
    "-a": (lambda a, b: -a, -A),
    "a * 0.1": (lambda a, b: a * 0.1, A * torch.tensor(0.1)),
    "a beside one lane of b": (lambda a, b: a * total_of(b), A * B.sum()),
    "a number beside a vector": (lambda a, b: total_of(b) - a, B.sum() - A),
    "where": (lambda a, b: where(a < b, a, b), torch.where(A < B, A, B)),
    "where, constant": (lambda a, b: where(a < 0.0, 2.0, b), torch.where(A < 0, torch.tensor(2.0), B)),
    "absolute": (lambda a, b: absolute(a), A.abs()),
    "maximum": (lambda a, b: maximum(a, b), torch.maximum(A, B)),
    "maximum, constant": (lambda a, b: maximum(a, 0.5), A.clamp(min=0.5)),
    "clamp": (lambda a, b: clamp(a, -1.5, 0.25), A.clamp(-1.5, 0.25)),
    "square root": (lambda a, b: square_root(absolute(a)), A.abs().sqrt()),
    "fma": (lambda a, b: fma(a, b, 1.0), (A.double() * B.double() + 1).float()),
    "multiply_add": (lambda a, b: multiply_add(a, b, a), A * B + A),
    "exp": (lambda a, b: exp(-absolute(a)), (-A.abs()).exp()),
    "largest": (lambda a, b: splat(largest_of(a), 16), A.max().expand(16)),
    "total from a start": (lambda a, b: splat(total_of(a, total_of(b)), 16), (A.sum() + B.sum()).expand(16)),
    "take": (lambda a, b: a.take([3] * 8 + [0] * 8), A[[3] * 8 + [0] * 8]),
    "shuffle": (lambda a, b: shuffle(a, b, range(8, 24)), torch.cat((A, B))[8:24]),
    "join": (lambda a, b: join(a.take(range(8)), b.take(range(8))), torch.cat((A[:8], B[:8]))),
    "to integers by bits": (lambda a, b: (a.bits(I32[16]) & 0x7FFFFFFF).bits(F32[16]), A.abs()),
    "half precision and back": (lambda a, b: narrow(a, HALVES[torch.float16]), A.half().float()),
    "bfloat16 and back": (lambda a, b: narrow(a, HALVES[torch.bfloat16]), A.bfloat16().float()),
}


@pytest.mark.parametrize("expression", ON_FLOATS)
def test_an_expression_of_floats_is_torchs(expression):
    write, expected = ON_FLOATS[expression]
    out = torch.empty(16)
    run(lambda k, t: t.out.of(FLOATS32).store(write(t.a.of(FLOATS32).load(16), t.b.of(FLOATS32).load(16))), A, B, out)
    assert torch.allclose(out, expected, rtol=1e-6, atol=0 if expression != "exp" else 1e-30)


M = torch.tensor([0, 1, 2, 7, -1, -2, -128, 127, 100, -100, 5, 9, 63, -64, 33, -33], dtype=torch.int32)
N = M.flip(0).abs() + 1
UNSIGNED = M.long() % 2**32
ON_INTEGERS = {
    "+": (lambda m, n: m + n, M + N),
    "-": (lambda m, n: m - n, M - N),
    "*": (lambda m, n: m * n, M * N),
    "&": (lambda m, n: m & 15, M & 15),
    "|": (lambda m, n: m | n, M | N),
    "^": (lambda m, n: m ^ 8, M ^ 8),
    "<<": (lambda m, n: m << 3, M << 3),
    ">> is of unsigned": (lambda m, n: m >> 3, (UNSIGNED >> 3).int()),
    "shift_signed": (lambda m, n: m.shift_signed(3), M >> 3),
    "// is of unsigned": (lambda m, n: m // n, (UNSIGNED // N).int()),
    "% is of unsigned": (lambda m, n: m % n, (UNSIGNED % N).int()),
    "minimum is of unsigned": (lambda m, n: minimum(m, n), torch.minimum(UNSIGNED, N.long()).int()),
    "cut off and extended": (lambda m, n: (m << 3).to(I8).to(I32), (M << 3).to(torch.int8).int()),
    "cut off and extended, unsigned": (lambda m, n: m.to(I16).to(I32, signed=False), M % 2**16),
    "largest of unsigned": (lambda m, n: splat(largest_of(m), 16), torch.full((16,), -1, dtype=torch.int32)),
    "to floats": (lambda m, n: m.to(F32).bits(I32[16]), M.float().view(torch.int32)),
    "compare": (lambda m, n: where(m.compare("", "eq", n), 1, m), torch.where(M == N, 1, M)),
}


@pytest.mark.parametrize("expression", ON_INTEGERS)
def test_an_expression_of_integers_is_torchs(expression):
    write, expected = ON_INTEGERS[expression]
    out = torch.empty(16, dtype=torch.int32)
    run(lambda k, t: t.out.of(INTS32).store(write(t.a.of(INTS32).load(16), t.b.of(INTS32).load(16))), M, N, out)
    assert out.tolist() == expected.tolist()


SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 65504.0, 65520.0, 1 + 2**-8, 1 + 3 * 2**-8])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_written_and_read_as_torch_does(dtype):
    x = torch.cat((SPECIAL, make_floats(2, 22)))
    out, wide = torch.empty(32, dtype=dtype), torch.empty(32)

    def copy(k, t):
        t.out.of(HALVES[dtype]).store(t.a.of(FLOATS32).load(32))
        t.b.of(FLOATS32).store(t.out.of(HALVES[dtype]).load(32))

    run(copy, x, wide, out)
    assert torch.equal(out.nan_to_num(7), x.to(dtype).nan_to_num(7))
    assert torch.equal(wide.nan_to_num(7), x.to(dtype).float().nan_to_num(7))


def test_the_exponential_ends_at_the_smallest_normal_number_and_keeps_nan():
    x = torch.tensor([0.0, -1e-8, -86.9, -87.0, -1000.0, -math.inf, math.nan, -0.5] * 2)
    out = torch.empty(16)
    run(lambda k, t: t.out.of(FLOATS32).store(exp(t.a.of(FLOATS32).load(16))), x, out, out)
    assert torch.allclose(out, x.clamp(min=-87).exp(), rtol=3e-7, equal_nan=True)


def test_what_is_no_number_is_not_clamped_to_one():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 4)
    out = torch.empty(16)
    run(lambda k, t: t.out.of(FLOATS32).store(clamp(t.a.of(FLOATS32).load(16), -8, 7)), x, out, out)
    assert torch.equal(out.nan_to_num(100), torch.tensor([100.0, 7, -8, 1] * 4))


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_rows_become_columns(count):
    x, out = torch.arange(float(count * count)), torch.empty(count, count)

    def turn(k, t):
        rows = [t.a.of(FLOATS32)[row * count].load(count) for row in range(count)]
        for column, values in enumerate(transpose(rows)):
            t.out.of(FLOATS32)[column * count].store(values)

    run(turn, x, out, out)
    assert torch.equal(out, x.view(count, count).T)


def test_loops_count_in_steps_from_a_start_and_run_at_least_once():
    out = torch.zeros(40)

    def count(k, t):
        with k.loop(t.count, 3, start=2) as i:
            t.out.of(FLOATS32)[i].store(k.constant(F32, 1.0))

    for until in (11, 0):
        out.zero_()
        run(count, out, out, out, count=until)
        assert out.nonzero().flatten().tolist() == list(range(2, max(until, 3), 3))


def test_a_variable_keeps_what_loops_inside_loops_add_to_it():
    out = torch.zeros(1)

    def add(k, t):
        total = k.variable(k.zero(F32))
        with k.loop(4) as i, k.loop(5) as j:
            total.set(total.now + t.a.of(FLOATS32)[i * 5 + j].load())
        t.out.of(FLOATS32).store(total.now * t.factor)

    numbers = torch.arange(20.0)
    run(add, numbers, numbers, out, factor=0.5)
    assert out.item() == numbers.sum().item() / 2


def test_what_is_under_a_condition_is_done_only_if_it_holds():
    out = torch.zeros(16)

    def mark(k, t):
        with k.loop(16) as i:
            with k.when(t.a.of(FLOATS32)[i].load() < 0.0):
                t.out.of(FLOATS32)[i].store(k.constant(F32, 1.0))
            with k.when(t.b.is_given()):
                t.out.of(FLOATS32)[i].store(k.constant(F32, 2.0))

    run(lambda k, t: mark(k, t), A, torch.empty(0), out)  # an empty tensor has no address
    assert torch.equal(out, (A < 0).float())


def test_a_repetition_ends_when_its_condition_holds():
    out = torch.zeros(1, dtype=torch.int64)

    def double(k, t):
        number = k.variable(k.constant(I64, 1))
        with k.repeat() as leave_when:
            leave_when(number.now.compare("", "uge", 100))
            number.set(number.now * 2)
        t.out.of(INTEGERS).store(number.now)

    run(double, out, out, out)
    assert out.item() == 128


def test_a_kernel_does_each_chunk_once():
    out = torch.zeros(10)

    def mark(k, t):
        at = t.out.of(FLOATS32)[t.chunk]
        at.store(at.load() + 1.0)

    run(mark, out, out, out, chunks=10)
    assert out.tolist() == [1] * 10


def test_room_in_memory_and_addresses_that_lie_there_are_followed():
    target = torch.zeros(3, dtype=torch.int64)
    addresses = torch.tensor([0, target.data_ptr()])

    def write(k, at):
        room = k.room(2, INTEGERS)
        room[1].store(k.constant(I64, 7))
        k.remember(room)
        at[8].follow(BYTES)[16].of(INTEGERS).store(room[1].load())

    function = COMPILER.compile("follow", write_function("follow", write))
    function.call(ctypes.c_void_p(addresses.data_ptr()))
    assert target.tolist() == [0, 0, 7]


def test_an_operation_that_a_type_lacks_is_refused_while_writing():
    with pytest.raises(TypeError, match="no such operation for <16 x float>"):
        write_kernel("wrong", ArrayTask, lambda k, t: t.a.of(FLOATS32).load(16) % 2)


@pytest.mark.parametrize("lanes", [2, 4, 16])
def test_vectors_are_transposed(lanes):
    square = torch.arange(lanes * lanes, dtype=torch.int32).view(lanes, lanes)
    out = torch.empty_like(square)

    def work(k, task):
        rows = [task.a.of(INTS32)[row * lanes].load(lanes) for row in range(lanes)]
        for row, column in enumerate(transpose(rows)):
            task.out.of(INTS32)[row * lanes].store(column)

    run(work, square, square, out)
    assert torch.equal(out, square.T)


def test_a_vector_of_numbers_and_the_total_of_integers():
    numbers, out = torch.tensor([3, -8, 5, 2], dtype=torch.int32), torch.empty(5, dtype=torch.int32)

    def work(k, task):
        vector = vector_of(task.a.of(INTS32)[lane].load() for lane in (3, 2, 1, 0))
        task.out.of(INTS32).store(vector)
        task.out.of(INTS32)[4].store(total_of(vector))

    run(work, numbers, numbers, out)
    assert out.tolist() == [2, 5, -8, 3, 2]


def test_each_run_of_a_kernel_has_a_room_of_its_own_while_there_are_any():
    class RoomTask(Task):
        _fields_ = (
            ("out", ctypes.c_void_p),
            ("rooms", ctypes.c_void_p),
            ("room_bytes", ctypes.c_int64),
            ("room_count", ctypes.c_int64),
            ("next_room", ctypes.c_int64),
        )

    def work(k, task):
        task.room.of(INTEGERS).store(task.chunk + 5)
        task.out.of(INTEGERS)[task.chunk].store(task.chunk + 1)

    kernel = COMPILER.compile("rooms", write_kernel("rooms", RoomTask, work))
    out, rooms = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)
    task = RoomTask(1, 0, out.data_ptr(), rooms.data_ptr(), 16, 2, 0)
    for number in range(3):
        task.next_chunk, task.chunks = number, number + 1
        kernel.call(ctypes.byref(task))
    assert rooms.tolist() == [[5, 0], [6, 0], [0, 0]]
    assert out.tolist() == [1, 2, 0]  # for the third there was no room
