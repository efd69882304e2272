# SPDX-License-Identifier: Apache-2.0
"""A small language for kernels on a CPU: Python expressions over numbers and vectors, written as LLVM code.

Not here: kernels (`cpu_products.py`, `cpu_many_rows.py`, `cpu_attention.py`, `cpu_layer.py`), and what compiles and
runs them (`cpu_runtime.py`). No other file has LLVM code in it.

A kernel is a Python function that is called once, to write the code. What it computes with are a `Value`, of a `Type`
such as `F32` or `F32[16]`, and a `Pointer`, to memory in a `Form`. Each operator on them writes one instruction:

    with k.loop(length) as i:                          # i = 0, 1, ..., at least once
        dot = k.variable(F32[16].zero)
        for column in range(0, columns, 16):           # Python's loops and branches are done while writing
            dot.set(fma(keys[i * columns + column].load(16), query[column].load(16), dot.now))
        with k.when(bias < 0.0):
            scores[i].store(total_of(dot.now))

Expressions. `+ - * /` are for floats and integers alike; `// % >>` are of unsigned integers; `& | ^ <<` of integers;
`<` compares and `where` chooses. A Python number becomes a constant of the other operand's type, and one `Value` meets
a vector in all of its lanes. `to` converts numbers, `bits` keeps the bits, `take` and `join` move lanes. `fma` rounds
once; `multiply_add` may, where that is one instruction. Sums over lanes may be in any order.

Memory. `pointer[i]` moves by elements; `load(n)` reads n of them and `store` writes, converting between the form in
memory and the type that is computed with: half precision is float32 between the two. A `variable` is a place that loops
write to; LLVM makes a register of it.

A kernel is run by several threads with the same task: each takes the next chunk of the work until none is left.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Union

import torch


class Type(NamedTuple):
    """Of a value: an element's type, as LLVM names it, and how many there are; 0 lanes for a number, not a vector."""

    element: str
    lanes: int = 0

    def __getitem__(self, lanes: int) -> "Type":  # F32[16]
        return Type(self.element, lanes)

    def __str__(self) -> str:
        return f"<{self.lanes} x {self.element}>" if self.lanes else self.element

    @property
    def is_float(self) -> bool:
        return self.element in ("float", "half")

    @property
    def size(self) -> int:
        """Bits of an element."""
        return {"float": 32, "half": 16, "ptr": 64}.get(self.element) or int(self.element.removeprefix("i"))

    @property
    def zero(self) -> str:
        return "zeroinitializer" if self.lanes else "0.0" if self.is_float else "0"

    def constant(self, number: float) -> str:
        """Write a number of this type, in every lane. LLVM wants the bits of the double that equals a float32."""
        if self.is_float:
            text = "0x" + struct.pack(">d", ctypes.c_float(number).value).hex().upper()
        else:
            text = str(int(number))
        return f"splat ({self.element} {text})" if self.lanes else text


F16, F32 = Type("half"), Type("float")
BOOL, I8, I16, I32, I64 = (Type(f"i{bits}") for bits in (1, 8, 16, 32, 64))
ADDRESS = Type("ptr")
Number = Union["Value", float]
ARM = ("aarch64", "arm64")  # as platforms call it


def operator(of_floats: str | None, of_integers: str | None, is_reversed: bool = False) -> Callable:
    """Make a method that writes an instruction with two operands of one type."""

    def operate(self: "Value", other: Number) -> "Value":
        value, other = meet(self, other)
        instruction = of_floats if value.type.is_float else of_integers
        if instruction is None:
            raise TypeError(f"There is no such operation for {value.type}.")
        first, second = (other, value) if is_reversed else (value, other)
        return value.kernel.emit(value.type, f"{instruction} {value.type} {first}, {second}")

    return operate


class Value:
    """A number or a vector that the code computes, by the name that LLVM knows it by."""

    def __init__(self, kernel: "Kernel", type: Type, name: str):
        self.kernel, self.type, self.name = kernel, type, name

    def __str__(self) -> str:
        return self.name

    __add__ = __radd__ = operator("fadd", "add")
    __sub__, __rsub__ = operator("fsub", "sub"), operator("fsub", "sub", True)
    __mul__ = __rmul__ = operator("fmul", "mul")
    __truediv__, __rtruediv__ = operator("fdiv", None), operator("fdiv", None, True)
    __floordiv__, __mod__ = operator(None, "udiv"), operator(None, "urem")
    __and__, __or__, __xor__ = operator(None, "and"), operator(None, "or"), operator(None, "xor")
    __lshift__, __rshift__ = operator(None, "shl"), operator(None, "lshr")
    shift_signed = operator(None, "ashr")  # >> that keeps the sign

    def __neg__(self) -> "Value":
        return self.kernel.emit(self.type, f"fneg {self.type} {self}")

    def __lt__(self, other: Number) -> "Value":
        return self.compare("olt", "ult", other)

    def compare(self, of_floats: str, of_integers: str, other: Number) -> "Value":
        """Compare by LLVM's names of the comparisons; "uno" of floats is whether one of them is NaN."""
        value, other = meet(self, other)
        instruction = f"fcmp {of_floats}" if value.type.is_float else f"icmp {of_integers}"
        return self.kernel.emit(BOOL[value.type.lanes], f"{instruction} {value.type} {value}, {other}")

    def to(self, element: Type, signed: bool = True) -> "Value":
        """The same numbers, as elements of another type; to a smaller one, rounded or cut off."""
        old, new = self.type, element[self.type.lanes]
        widens = new.size > old.size
        if old.is_float and new.is_float:
            instruction = "fpext" if widens else "fptrunc"
        elif new.is_float:
            instruction = "sitofp"
        else:
            instruction = ("sext" if signed else "zext") if widens else "trunc"
        return self.kernel.emit(new, f"{instruction} {old} {self} to {new}")

    def bits(self, type: Type) -> "Value":
        """The same bits, as another type."""
        return self.kernel.emit(type, f"bitcast {self.type} {self} to {type}")

    def take(self, lanes: Iterable[int]) -> "Value":
        """A vector of some lanes of this one, in any order, any number of times."""
        return shuffle(self, None, lanes)


def meet(value: Value, other: Number) -> tuple[Value, Value]:
    """Two operands as values of one type: a Python number as a constant, a number beside a vector in all lanes."""
    if not isinstance(other, Value):
        return value, value.kernel.constant(value.type, other)
    if value.type.lanes and not other.type.lanes:
        return value, splat(other, value.type.lanes)
    if other.type.lanes and not value.type.lanes:
        return splat(value, other.type.lanes), other
    return value, other


class Form(NamedTuple):
    """How numbers lie in memory: an element's type there, what it is computed as, and the ways to and from that."""

    stored: Type
    read: Callable[[Value], Value] = lambda value: value
    write: Callable[[Value], Value] = lambda value: value


class Pointer(Value):
    """An address of elements in a form."""

    def __init__(self, kernel: "Kernel", name: str, form: Form):
        super().__init__(kernel, ADDRESS, name)
        self.form = form

    def __getitem__(self, index: Number) -> "Pointer":
        index = self.kernel.integer(index)
        name = self.kernel.emit(ADDRESS, f"getelementptr {self.form.stored}, ptr {self}, i64 {index}").name
        return Pointer(self.kernel, name, self.form)

    def of(self, form: Form) -> "Pointer":
        """The same address, of elements in another form."""
        return Pointer(self.kernel, self.name, form)

    @property
    def align(self) -> int:
        return max(1, self.form.stored.size // 8)

    def load(self, lanes: int = 0) -> Value:
        """Read one element, or a vector of several."""
        stored = self.form.stored[lanes]
        return self.form.read(self.kernel.emit(stored, f"load {stored}, ptr {self}, align {self.align}"))

    def store(self, value: Value) -> None:
        stored = self.form.write(value)
        self.kernel.line(f"store {stored.type} {stored}, ptr {self}, align {self.align}")

    def follow(self, form: Form) -> "Pointer":
        """The address that lies here, of elements in a form."""
        return Pointer(self.kernel, self.of(ADDRESSES).load().name, form)

    def prefetch(self, bytes_ahead: int, is_kept: bool = True) -> None:
        """Ask for the memory so many bytes further on, which will be read soon; once only, if it is not to be kept."""
        ahead = self.of(BYTES)[bytes_ahead]
        hints = (self.kernel.constant(I32, number) for number in (0, 3 if is_kept else 0, 1))
        self.kernel.call(None, "llvm.prefetch.p0", ahead, *hints)

    def is_given(self) -> Value:
        """Whether it is the address of anything."""
        return self.kernel.emit(BOOL, f"icmp ne ptr {self}, null")

    def exchange_add(self, number: int, order: str) -> Value:
        """Add to a 64-bit integer, as one step for all threads, and return what it was."""
        number, instruction = abs(number), "add" if number > 0 else "sub"
        return self.kernel.emit(I64, f"atomicrmw {instruction} ptr {self}, i64 {number} {order}")

    def watch(self) -> Value:
        """Read a 64-bit integer that other threads write, before all that is read after it."""
        return self.kernel.emit(I64, f"load atomic i64, ptr {self} acquire, align 8")


class Variable:
    """A place for a value that changes, at most as often as the code around it runs."""

    def __init__(self, kernel: "Kernel", start: Value):
        self.kernel, self.type, self.name = kernel, start.type, kernel.allocate(str(start.type))
        self.set(start)

    def set(self, value: Value) -> None:
        self.kernel.line(f"store {self.type} {value}, ptr {self.name}")

    @property
    def now(self) -> Value:
        return self.kernel.emit(self.type, f"load {self.type}, ptr {self.name}")


class Kernel:
    """The code of a function, as far as it is written."""

    def __init__(self):
        self.body: list[str] = []
        self.allocations: list[str] = []
        self.declarations: dict[str, str] = {}
        self.count = 0

    def fresh(self) -> int:
        self.count += 1
        return self.count

    def line(self, text: str) -> None:
        self.body.append(f"  {text}")

    def label(self, name: str) -> None:
        self.body.append(f"{name}:")

    def emit(self, type: Type, text: str) -> Value:
        name = f"%v{self.fresh()}"
        self.line(f"{name} = {text}")
        return Value(self, type, name)

    def constant(self, type: Type, number: float) -> Value:
        return Value(self, type, type.constant(number))

    def zero(self, type: Type) -> Value:
        return Value(self, type, type.zero)

    def integer(self, number: Number) -> Value:
        """A 64-bit integer, as indices and counts are."""
        return number if isinstance(number, Value) else self.constant(I64, number)

    def allocate(self, type: str, align: int = 0) -> str:
        name = f"%v{self.fresh()}"
        self.allocations.append(f"  {name} = alloca {type}" + (f", align {align}" if align else ""))
        return name

    def variable(self, start: Value) -> Variable:
        return Variable(self, start)

    def room(self, count: int, form: Form) -> Pointer:
        """Memory for so many elements while the function runs."""
        return Pointer(self, self.allocate(f"[{count} x {form.stored}]", align=64), form)

    def remember(self, pointer: Pointer) -> None:
        """Keep in memory what was stored at a pointer, instead of in registers."""
        self.line(f'call void asm sideeffect "", "r,~{{memory}}"(ptr {pointer})')

    def call(self, type: Type | None, name: str, *arguments: Value, flags: str = "") -> Value | None:
        """Call a function of LLVM's or of the kernel's own module."""
        types = ", ".join(str(argument.type) for argument in arguments)
        self.declarations[name] = f"declare {type or 'void'} @{name}({types})"
        given = ", ".join(f"{argument.type} {argument}" for argument in arguments)
        text = f"call {flags} {type or 'void'} @{name}({given})"
        return self.line(text) if type is None else self.emit(type, text)

    def call_at(self, type: Type | None, function: Value, *arguments: Value) -> Value | None:
        """Call the function at an address."""
        text = f"call {type or 'void'} {function}({', '.join(f'ptr {argument}' for argument in arguments)})"
        return self.line(text) if type is None else self.emit(type, text)

    def fence(self) -> None:
        """Let all threads see what was written before it, before what comes after it."""
        self.line("fence seq_cst")

    def pause(self, machine: str) -> None:
        """Tell a processor of this kind that the thread waits."""
        if machine.lower() in ARM:
            self.call(None, "llvm.aarch64.hint", self.constant(I32, 1))
        else:
            self.call(None, "llvm.x86.sse2.pause")

    def branch(self, condition: Value, then: str, otherwise: str) -> None:
        self.line(f"br i1 {condition}, label %{then}, label %{otherwise}")

    @contextmanager
    def loop(self, until: Number, step: int = 1, start: Number = 0) -> Iterator[Value]:
        """Repeat with an index that goes from `start` in steps, until it is `until` or more; at least once."""
        index, name = self.variable(self.integer(start)), f"loop.{self.fresh()}"
        self.line(f"br label %{name}")
        self.label(name)
        now = index.now
        yield now
        following = now + step
        index.set(following)
        self.branch(following < self.integer(until), name, f"{name}.end")
        self.label(f"{name}.end")

    @contextmanager
    def repeat(self) -> Iterator[Callable[[Value], None]]:
        """Repeat until what is yielded is called with a condition that holds."""
        name = f"repeat.{self.fresh()}"

        def leave_when(condition: Value) -> None:
            following = f"{name}.{self.fresh()}"
            self.branch(condition, f"{name}.end", following)
            self.label(following)

        self.line(f"br label %{name}")
        self.label(name)
        yield leave_when
        self.line(f"br label %{name}")
        self.label(f"{name}.end")

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Do something only if a condition holds."""
        name = f"when.{self.fresh()}"
        self.branch(condition, name, f"{name}.end")
        self.label(name)
        yield
        self.line(f"br label %{name}.end")
        self.label(f"{name}.end")

    def finish(self, signature: str) -> str:
        """Write the function."""
        return "\n".join([f"define {signature} {{", *self.allocations, *self.body, "  ret void", "}", ""])


# Vectors


def splat(value: Value, lanes: int) -> Value:
    """A number in all lanes of a vector."""
    type, kernel = value.type[lanes], value.kernel
    first = kernel.emit(type, f"insertelement {type} poison, {value.type} {value}, i64 0")
    return first.take([0] * lanes)


def shuffle(first: Value, second: Value | None, lanes: Iterable[int]) -> Value:
    """A vector of some lanes of one vector, or of two of one type, whose lanes count on."""
    lanes = list(lanes)
    chosen = ", ".join(f"i32 {lane}" for lane in lanes)
    second = "poison" if second is None else second
    return first.kernel.emit(
        first.type[len(lanes)],
        f"shufflevector {first.type} {first}, {first.type} {second}, <{len(lanes)} x i32> <{chosen}>",
    )


def join(first: Value, second: Value) -> Value:
    """The lanes of two vectors, or two numbers, one after the other."""
    if not first.type.lanes:
        first, second = splat(first, 1), splat(second, 1)
    return shuffle(first, second, range(2 * first.type.lanes))


def vector_of(numbers: Iterable[Value]) -> Value:
    """A vector of some numbers of one type."""
    numbers = list(numbers)
    type, kernel = numbers[0].type[len(numbers)], numbers[0].kernel
    vector = Value(kernel, type, "poison")
    for lane, number in enumerate(numbers):
        vector = kernel.emit(type, f"insertelement {type} {vector}, {number.type} {number}, i64 {lane}")
    return vector


def transpose(rows: list[Value]) -> list[Value]:
    """The columns of as many vectors as each has lanes, a power of two: lane i of row j becomes lane j of row i."""
    count, distance = len(rows), len(rows) // 2
    while distance:  # change places between the vectors that are so far apart
        first = [lane + (count - distance if lane & distance else 0) for lane in range(count)]
        second = [lane + (count if lane & distance else distance) for lane in range(count)]
        moved = list(rows)
        for row in (row for row in range(count) if not row & distance):
            pair = rows[row], rows[row + distance]
            moved[row], moved[row + distance] = (shuffle(*pair, lanes) for lanes in (first, second))
        rows, distance = moved, distance // 2
    return rows


def where(condition: Value, then: Number, otherwise: Number) -> Value:
    """One of two numbers in each lane; at least one of them is a value."""
    known = then if isinstance(then, Value) else otherwise
    then, otherwise = (meet(known, number)[1] for number in (then, otherwise))
    text = f"select {condition.type} {condition}, {then.type} {then}, {otherwise.type} {otherwise}"
    return condition.kernel.emit(then.type, text)


def call_for(name: str, *operands: Number) -> Value:
    """Call a function of LLVM's that there is for each type, and whose operands have one type."""
    known = max((operand for operand in operands if isinstance(operand, Value)), key=lambda value: value.type.lanes)
    operands = [meet(known, operand)[1] for operand in operands]
    return known.kernel.call(known.type, f"llvm.{name}.{suffix(known.type)}", *operands)


def suffix(type: Type) -> str:
    """A type in the name of a function of LLVM's."""
    element = f"f{type.size}" if type.is_float else type.element
    return f"v{type.lanes}{element}" if type.lanes else element


def fma(a: Number, b: Number, c: Number) -> Value:
    """a b + c, rounded once."""
    return call_for("fma", a, b, c)


def multiply_add(a: Value, b: Value, c: Value) -> Value:
    """a b + c, rounded once where that is one instruction, else twice."""
    product = a.kernel.emit(a.type, f"fmul contract {a.type} {a}, {b}")
    return a.kernel.emit(a.type, f"fadd contract {a.type} {c}, {product}")


def absolute(value: Value) -> Value:
    return call_for("fabs", value)


def maximum(a: Value, b: Number) -> Value:
    """The larger of two floats."""
    return call_for("maxnum", a, b)


def minimum(a: Value, b: Number) -> Value:
    """The smaller of two unsigned integers."""
    return call_for("umin", a, b)


def clamp(value: Value, low: float, high: float) -> Value:
    """The nearest number that is neither below `low` nor above `high`; NaN stays NaN."""
    value = where(value < low, low, value)
    return where(value.compare("ogt", "ugt", high), high, value)


def square_root(value: Value) -> Value:
    return call_for("sqrt", value)


def total_of(vector: Value, start: Value | None = None) -> Value:
    """The sum of all lanes, in any order, and of a number to begin with, if they are floats."""
    if not vector.type.is_float:
        return vector.kernel.call(vector.type[0], f"llvm.vector.reduce.add.{suffix(vector.type)}", vector)
    start = start or vector.kernel.zero(vector.type[0])
    name = f"llvm.vector.reduce.fadd.{suffix(vector.type)}"
    return vector.kernel.call(vector.type[0], name, start, vector, flags="reassoc")


def largest_of(vector: Value) -> Value:
    """The largest lane; of integers, as unsigned ones."""
    name = "fmax" if vector.type.is_float else "umax"
    return vector.kernel.call(vector.type[0], f"llvm.vector.reduce.{name}.{suffix(vector.type)}", vector)


# Memory


def widen_bfloat16(bits: Value) -> Value:
    return (bits.to(I32, signed=False) << 16).bits(F32[bits.type.lanes])


def narrow_to_bfloat16(value: Value) -> Value:
    """The nearest number's bits, of ties the even one; NaN stays NaN."""
    bits = value.bits(I32[value.type.lanes])
    high = bits >> 16
    rounded = (bits + ((high & 1) + 0x7FFF)) >> 16
    return where(value.compare("uno", "", 0.0), high | 64, rounded).to(I16)


BYTES, WORDS, INTEGERS, FLOATS32, ADDRESSES = Form(I8), Form(I16), Form(I64), Form(F32), Form(ADDRESS)
HALVES = {
    torch.float16: Form(F16, lambda value: value.to(F32), lambda value: value.to(F16)),
    torch.bfloat16: Form(I16, widen_bfloat16, narrow_to_bfloat16),
}


def narrow(value: Value, half: Form) -> Value:
    """The nearest number of half precision, as float32."""
    return half.read(half.write(value))


# e^x: x is n log 2 and a small rest, whose exponential is a polynomial.
ROUND = 1.5 * 2**23  # float32 has integers around it: added to a number, it leaves the nearest one in the last bits
LOG2_E = math.log2(math.e)
LN_2 = (0.693359375, -2.12194440e-4)  # in two parts, of which the first times any exponent is exact
LEAST = -87.0  # e to the power of less is no normal float32
FACTORS = tuple(1 / math.factorial(power) for power in range(7))  # of the powers of x in e^x, for |x| < 0.35


def exp(x: Value) -> Value:
    """e^x for x <= 0, as 2^n times a polynomial; NaN stays NaN."""
    clamped = where(x < LEAST, LEAST, x)
    shifted = fma(clamped, LOG2_E, ROUND)
    minus_n = -(shifted - ROUND)
    rest = fma(minus_n, LN_2[1], fma(minus_n, LN_2[0], clamped))
    power = FACTORS[-1]
    for factor in reversed(FACTORS[:-1]):
        power = fma(power, rest, factor)
    integers = I32[x.type.lanes]
    return (power.bits(integers) + (shifted.bits(integers) << 23)).bits(x.type)


# Matrix instructions (AMX)


class TileRegisters:
    """A processor's eight registers of up to 16 rows of up to 64 bytes each, from `shape` to `release`."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.shapes = kernel, ()

    def call(self, name: str, *arguments: Number) -> None:
        values = [
            argument if isinstance(argument, Value) else self.kernel.constant(I8, argument) for argument in arguments
        ]
        self.kernel.call(None, f"llvm.x86.{name}", *values)

    def shape(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Say how many rows of how many bytes each register has; what they had is lost."""
        self.shapes = tuple(shapes)
        settings = self.kernel.room(64, BYTES)
        settings.store(self.kernel.zero(I8[64]))
        settings.store(self.kernel.constant(I8, 1))
        for number, (rows, columns) in enumerate(self.shapes):
            settings[16 + 2 * number].store(self.kernel.constant(I8, columns))
            settings[48 + number].store(self.kernel.constant(I8, rows))
        self.call("ldtilecfg", settings)

    def clear(self, number: int) -> None:
        self.call("tilezero", number)

    def load(self, number: int, at: Pointer, pitch: int) -> None:
        """Read a register, whose rows are so many bytes apart."""
        self.call("tileloadd64", number, at, self.kernel.integer(pitch))

    def store(self, number: int, at: Pointer, pitch: int) -> None:
        self.call("tilestored64", number, at, self.kernel.integer(pitch))

    def add_dot(self, total: int, a: int, b: int) -> None:
        """Add to 32-bit integers [M, N] the product of signed bytes [M, K, 4] and unsigned ones [K, N, 4]."""
        self.call("tdpbsud", total, a, b)

    def release(self) -> None:
        self.call("tilerelease")


# Kernels


FIELD_TYPES = {ctypes.c_void_p: ADDRESS, ctypes.c_int64: I64, ctypes.c_float: F32}


class Fields:
    """The fields of a task by their names, the number of a `chunk` of its work, and the `room` of the thread."""

    def __init__(self, kernel: Kernel, task_class: type[ctypes.Structure]):
        for name, kind in task_class._fields_:
            is_address = kind is ctypes.c_void_p
            value = Pointer(kernel, f"%{name}", BYTES) if is_address else Value(kernel, FIELD_TYPES[kind], f"%{name}")
            setattr(self, name, value)
        self.chunk = Value(kernel, I64, "%chunk")
        self.room = Pointer(kernel, "%room", BYTES)


@contextmanager
def take_room(k: Kernel, task: Pointer, task_class: type[ctypes.Structure], read: Callable) -> Iterator[Pointer]:
    """Take a room for a thread, if the task has any; a thread for which none is left does nothing."""
    if not hasattr(task_class, "next_room"):
        yield Pointer(k, "null", BYTES)
        return
    number = task[task_class.next_room.offset].exchange_add(1, "monotonic")
    with k.when(number < read("room_count", I64)):
        yield task[task_class.rooms.offset].follow(BYTES)[number * read("room_bytes", I64)]


def write_kernel(
    name: str, task_class: type[ctypes.Structure], work: Callable[[Kernel, Fields], None], is_apart: bool = True
) -> str:
    """Write the code of a kernel, which takes the chunks of a task one by one until none is left.

    Args:
        name: of the function.
        task_class: what the function is given the address of: a subclass of `Task`, whose own fields are how many
            chunks there are, and the next one. If it has `rooms`, each thread has one, its own: `room_count` of
            `room_bytes` each, of which `next_room` is the first that no thread has taken.
        work: writes what is done with a chunk.
        is_apart: promise that what one address leads to is not reached from another, so that LLVM may read ahead of
            what is written.
    """
    inner = Kernel()
    fields = task_class._fields_
    work(inner, Fields(inner, task_class))
    types = FIELD_TYPES | {ctypes.c_void_p: "ptr noalias" if is_apart else "ptr"}
    parameters = "".join(f"{types[kind]} %{field}, " for field, kind in fields)
    room_type = types[ctypes.c_void_p]
    functions = [inner.finish(f"internal void @work({parameters}{room_type} %room, i64 %chunk) alwaysinline")]

    outer = Kernel()
    task = Pointer(outer, "%task", BYTES)

    def read(field: str, type: Type) -> Value:
        at = task[getattr(task_class, field).offset]
        return outer.emit(type, f"load {type}, ptr {at}, align {8 if type == ADDRESS else type.size // 8}")

    chunks, following = read("chunks", I64), task[task_class.next_chunk.offset]
    values = [read(field, FIELD_TYPES[kind]) for field, kind in fields]
    with take_room(outer, task, task_class, read) as room, outer.repeat() as leave_when:
        chunk = following.exchange_add(1, "monotonic")
        leave_when(chunk.compare("", "uge", chunks))
        outer.call(None, "work", *values, room, chunk)
    functions.append(outer.finish(f"void @{name}(ptr %task)"))
    return "\n".join([*inner.declarations.values(), *functions])


def write_function(name: str, work: Callable[[Kernel, Pointer], None]) -> str:
    """Write the code of a function that is given one address, and no more than `work` writes."""
    kernel = Kernel()
    work(kernel, Pointer(kernel, "%at", BYTES))
    return "\n".join([*kernel.declarations.values(), kernel.finish(f"void @{name}(ptr %at)")])
