# SPDX-License-Identifier: Apache-2.0
"""A decode step of all layers in one call, on a CPU, in half precision.

Not here: what a thread computes (`cpu_layer.py`, `cpu_products.py`, `cpu_attention.py`), and the layers themselves,
which say what is to be computed and do it wherever this cannot (`modeling_visualglm.py`).

Around the products of a step is little work, but it takes some dozen calls of torch for each layer, and each product is
one from Python: memory, the limit of a step, waits for them a sixth of the time. Here a step is a program: a list of
stages, through which the threads go together, without Python.

Every result is rounded where the layers round it, to the same numbers but for the last bit of a norm or a gelu.

Shapes: B sequences, C hidden size, H heads, D head dimension, T keys.
"""

import ctypes
import os
import platform
import threading
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers.cache_utils import Cache
from transformers.configuration_utils import PretrainedConfig

from .adapters import find_wrapped
from .cpu_attention import CPU_ATTENTION, AttentionKernels, AttentionTask
from .cpu_language import BYTES, HALVES, I32, I64, INTEGERS, Kernel, Pointer, write_function
from .cpu_layer import GeluTask, NarrowTask, NormTask, ResidualTask, RotateTask, write_stage
from .cpu_many_rows import MOST_OUTPUTS, ManyRowsPlan, many_rows_obstacle, plan_many_rows
from .cpu_products import CPU_PRODUCTS, FEW_ROWS, KINDS, CpuKernels, Plan, matrix_obstacle
from .cpu_runtime import FLOATS, LANES, CpuKernelUser, Kernels, Stage, Task
from .cpu_several_rows import plan_several_rows, several_rows_obstacle
from .growing_cache import GrowingCache
from .kernel_choice import KernelError, name_of


CHECK_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative error of the self-check: a few last bits
RECORDED = ("output_hidden_states", "output_attentions")  # what a call, or the config of a part, may ask for
MOST_SEQUENCES = 64  # in a program, of weights in low bits
SPINS = 4096  # of a thread that waits, before it gives its processor to another


class ProgramStage(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("task", ctypes.c_void_p),
        ("active", ctypes.c_int64),  # threads that may be at work on it
    )


class Program(ctypes.Structure):
    """Stages that are run one after the other, and how a thread lets others go first."""

    _fields_ = (("stages", ctypes.c_void_p), ("count", ctypes.c_int64), ("give_way", ctypes.c_void_p))


def program_kernel(k: Kernel, program: Pointer, machine: str) -> None:
    """Run the stages of a `Program`: each thread works on one after the other, and waits until all are done with it.

    A thread counts itself before it takes chunks and after it has worked. Once none are left, whoever works on one has
    been counted, which the fences make sure of; so when nobody is counted, the stage is done. Threads that are late
    find nothing left, and nobody waits for those that never come.
    """
    entries, give_way = (program[field.offset].follow(BYTES) for field in (Program.stages, Program.give_way))
    with k.loop(program[Program.count.offset].of(INTEGERS).load()) as i:
        entry, spins = entries[i * ctypes.sizeof(ProgramStage)], k.variable(k.zero(I64))
        kernel, task = (entry[field.offset].follow(BYTES) for field in (ProgramStage.kernel, ProgramStage.task))
        active = entry[ProgramStage.active.offset]
        active.exchange_add(1, "monotonic")
        k.fence()
        k.call_at(None, kernel, task)
        k.fence()
        active.exchange_add(-1, "release")
        with k.repeat() as leave_when:
            leave_when(active.watch().compare("", "eq", 0))
            k.pause(machine)
            spins.set(spins.now + 1)
            with k.when(spins.now.compare("", "uge", SPINS)):
                k.call_at(I32, give_way)
                spins.set(k.zero(I64))


def write_program(name: str, machine: str) -> str:
    """Write the code that runs a `Program` on such a machine."""
    return write_function(name, partial(program_kernel, machine=machine))


def find_give_way() -> Callable[[], int]:
    """Find the system's function with which a thread lets others go first."""
    return ctypes.CDLL(None).sched_yield if os.name == "posix" else ctypes.WinDLL("kernel32").SwitchToThread


class StepKernels(Kernels):
    """The kernels between the products, and the one that runs all stages."""

    def __init__(self, llvm):
        super().__init__(llvm)
        self.give_way = ctypes.cast(find_give_way(), ctypes.c_void_p).value
        self.program = self.compiled("program", partial(write_program, machine=platform.machine()))

    def stage(self, dtype: torch.dtype, columns: int, task: Task) -> Stage:
        """Plan a task for rows, or heads, of so many columns, with parameters of half precision."""
        kind = type(task)
        name = f"{kind.__name__}_{dtype}_{columns}"
        write = partial(write_stage, task_class=kind, columns=columns, dtype=dtype)
        return Stage(self.compiled(name, write), task, task.chunks)


# A step


class Linear(NamedTuple):
    """The state of a linear layer; `form` is the bits of its weights, or their dtype."""

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    form: int | torch.dtype

    @classmethod
    def read(cls, module: nn.Linear) -> "Linear":
        is_half = type(module) is nn.Linear
        weight, bias = module.weight, module.bias
        return cls(weight, None, bias, weight.dtype) if is_half else cls(weight, module.weight_scale, bias, module.bits)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] * (8 // self.form if self.has_low_bits else 1)

    @property
    def has_low_bits(self) -> bool:
        return isinstance(self.form, int)

    def obstacle(self, batch: int, dtype: torch.dtype) -> str | None:
        """Why there is no kernel for so many rows of activations of this dtype."""
        kind = KINDS.get(self.form)
        if kind is None:
            return f"{name_of(self.form)} weights"
        most = MOST_SEQUENCES if self.has_low_bits else FEW_ROWS
        if batch > most:
            return f"{batch} sequences, and {kind.name} weights take {most}"
        if not self.has_low_bits and (self.form != dtype or type(self.weight) is not nn.Parameter):
            return f"weights that are no plain parameter in {name_of(dtype)}"
        if self.takes_several(batch):
            return None
        if batch > FEW_ROWS:
            return self.many_rows_obstacle(batch)
        return matrix_obstacle(self.weight, self.weight_scale, self.in_features, kind)

    def takes_several(self, batch: int) -> bool:
        """Whether the product of so many rows is one for the kernels for several rows."""
        if not self.has_low_bits or len(self.weight) % LANES:
            return False
        return several_rows_obstacle(torch.float32, batch, *self[:2], self.in_features, self.form) is None

    def many_rows_obstacle(self, batch: int) -> str | None:
        if len(self.weight) % MOST_OUTPUTS:
            return f"a matrix of {len(self.weight)} rows, no multiple of {MOST_OUTPUTS}"
        return many_rows_obstacle(torch.float32, batch, *self[:2], self.in_features, self.form)

    def plan(self, batch: int, products: CpuKernels) -> Plan | ManyRowsPlan:
        """Plan the product of so many rows of activations."""
        if self.takes_several(batch):
            return plan_several_rows(batch, self.weight_scale, self.in_features, self.form)
        if batch > FEW_ROWS:
            return plan_many_rows(batch, self.weight_scale, self.in_features, self.form)
        return products.find_plan(self.form, batch, self.in_features, *self[:2])


class Norm(NamedTuple):
    """The state of a norm."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def read(cls, module: nn.LayerNorm) -> "Norm":
        return cls(module.weight, module.bias)


class Layer(NamedTuple):
    """The state of a layer, the first of which has number 1."""

    number: int
    input_norm: Norm
    query_key_value: Linear
    dense: Linear
    middle_norm: Norm
    dense_h_to_4h: Linear
    dense_4h_to_h: Linear

    @classmethod
    def read(cls, block: nn.Module) -> "Layer":
        attention, mlp = block.attention, block.mlp
        return cls(
            attention.layer_idx + 1,
            Norm.read(block.input_layernorm),
            Linear.read(attention.query_key_value),
            Linear.read(attention.dense),
            Norm.read(block.post_attention_layernorm),
            Linear.read(mlp.dense_h_to_4h),
            Linear.read(mlp.dense_4h_to_h),
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.query_key_value, self.dense, self.dense_h_to_4h, self.dense_4h_to_h


class Part(NamedTuple):
    """The state of some layers, one after the other, and the numbers that they have in common."""

    layers: tuple[Layer, ...]
    num_heads: int
    alpha: float
    eps: float

    @classmethod
    def read(cls, blocks: Iterable[nn.Module], config: PretrainedConfig) -> "Part":
        """Read plain `VisualGLMBlock`s."""
        layers = tuple(Layer.read(block) for block in blocks)
        return cls(layers, config.num_attention_heads, config.residual_alpha, config.layer_norm_eps)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].dense.weight.shape[0]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def linears(self) -> list[Linear]:
        return [linear for layer in self.layers for linear in layer.linears]

    @property
    def halves(self) -> list[torch.Tensor | None]:
        """What has to be of half precision whatever the matrices are: norms and biases."""
        norms = [half for layer in self.layers for half in (*layer.input_norm, *layer.middle_norm)]
        return norms + [linear.bias for linear in self.linears]

    def state(self) -> list[Any]:
        """What a program relies on: where everything lies, in which form, and the numbers."""
        linears = self.linears
        tensors = [tensor for linear in linears for tensor in linear[:2]] + self.halves
        places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return [*places, *(linear.form for linear in linears), *(layer.number for layer in self.layers), *self[1:]]

    def obstacle(self, batch: int, dtype: torch.dtype) -> str | None:
        """Why no program can do what the layers do with so many sequences in this dtype."""
        if any(half is None or half.dtype != dtype or not half.is_contiguous() for half in self.halves):
            return f"norms or biases that are missing, or not {name_of(dtype)} and contiguous"
        if any(half.device.type != "cpu" for half in self.halves):
            return "weights that are not on the CPU"
        if self.head_dim % (4 * LANES):
            return f"heads of {self.head_dim} numbers, no multiple of {4 * LANES}"
        return next(filter(None, (linear.obstacle(batch, dtype) for linear in self.linears)), None)


class StepProgram:
    """A decode step of B sequences through layers that fit, whose tensors it does not keep.

    Args:
        kernels, products, attention: the kernels of the stages.
        part: whose tensors are where they are now when the program is run.
        batch: B.
        dtype: of activations, keys and values.
    """

    def __init__(
        self,
        kernels: StepKernels,
        products: CpuKernels,
        attention: AttentionKernels,
        part: Part,
        batch: int,
        dtype: torch.dtype,
    ):
        self.kernels, self.products, self.attention = kernels, products, attention
        self.batch, self.dtype, self.alpha, self.eps = batch, dtype, part.alpha, part.eps
        self.lock = threading.Lock()
        widest = max(linear.weight.shape[0] for linear in part.linears)
        quantized_bytes = max(linear.plan(batch, products).quantized_bytes for linear in part.linears)
        heads = (batch, part.num_heads, part.head_dim)
        with torch.inference_mode(False):  # or no other mode may write here
            self.hidden, self.normed, self.narrowed = torch.empty(3, batch, part.hidden_size, **FLOATS)
            self.product, self.activated = torch.empty(2, batch, widest, **FLOATS)
            self.query, self.attended = torch.empty(2, *heads, **FLOATS)
            self.rotary = torch.empty(2, batch, 2, part.head_dim // 4, **FLOATS)
            self.quantized = torch.empty(quantized_bytes, dtype=torch.uint8, device="cpu")
        self.stages: list[Stage] = []
        self.rotations: list[RotateTask] = []
        self.attentions: list[AttentionTask] = []
        for layer in part.layers:
            self.add_layer(layer)
        entries = ((stage.kernel.address, ctypes.addressof(stage.task), 0) for stage in self.stages)
        self.entries = (ProgramStage * len(self.stages))(*entries)
        self.program = Program(ctypes.addressof(self.entries), len(self.stages), kernels.give_way)

    def add_layer(self, layer: Layer) -> None:
        self.add_norm(layer.input_norm)
        self.add_product(self.normed, layer.query_key_value)
        self.add_attention(layer.query_key_value.bias, layer.number)
        self.add_product(self.narrowed, layer.dense)
        self.add_residual(layer.dense.bias)
        self.add_norm(layer.middle_norm)
        self.add_product(self.normed, layer.dense_h_to_4h)
        self.add_gelu(layer.dense_h_to_4h.bias)
        self.add_product(self.activated, layer.dense_4h_to_h)
        self.add_residual(layer.dense_4h_to_h.bias)

    def add_product(self, x: torch.Tensor, linear: Linear) -> None:
        addresses = addresses_of(x, self.quantized)
        plan = linear.plan(self.batch, self.products)
        self.stages += plan.stages(*addresses, linear.weight, linear.weight_scale, self.product.data_ptr())

    def add(self, task: Task, columns: int) -> None:
        self.stages.append(self.kernels.stage(self.dtype, columns, task))

    def add_norm(self, norm: Norm) -> None:
        addresses = addresses_of(self.hidden, *norm, self.normed)
        self.add(NormTask(self.batch, 0, *addresses, self.eps), len(norm.bias))

    def add_attention(self, bias: torch.Tensor, number: int) -> None:
        """Add rotation and attention of the layer of this number."""
        _, heads, columns = self.query.shape
        addresses = addresses_of(self.product, bias, self.rotary, self.query)
        numbers = (heads, self.rotary[0].numel(), columns**0.5 * number, number)
        self.rotations.append(RotateTask(self.batch * heads, 0, *addresses, *numbers))
        self.add(self.rotations[-1], columns)
        attention = self.attention.stage(self.query, self.attended, self.dtype)
        self.attentions.append(attention.task)
        self.stages.append(attention)
        self.add(NarrowTask(self.batch, 0, *addresses_of(self.attended, self.narrowed)), heads * columns)

    def add_residual(self, bias: torch.Tensor) -> None:
        addresses = addresses_of(self.product, bias, self.normed, self.hidden)
        self.add(ResidualTask(self.batch, 0, *addresses, self.alpha), len(bias))

    def add_gelu(self, bias: torch.Tensor) -> None:
        self.add(GeluTask(self.batch, 0, *addresses_of(self.product, bias, self.activated)), len(bias))

    def run(
        self,
        hidden_states: torch.Tensor,
        rotary: torch.Tensor,
        states: list[tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute a step.

        Args:
            hidden_states: [B, 1, C]
            rotary: as `compute_rotary` returns it.
            states: keys and values of each layer, [B, H, T, D], the last of which are to be written.
            attention_mask: [B, 1, 1, T], True for keys that are seen; None for all.

        Returns:
            [B, 1, C]
        """
        bias = self.attention.to_bias(attention_mask)
        with self.lock:
            self.hidden.copy_(hidden_states[:, 0])
            self.rotary.copy_(rotary[:, :, 0, 0, 0])
            scores = self.attention.make_scores(states[0][0])
            for rotation, attention, (key, value) in zip(self.rotations, self.attentions, states, strict=True):
                rotation.write_to(key, value)
                attention.attend_to(key, value, bias, scores)
            for stage in self.stages:
                stage.task.restart()
            self.kernels.pool.run(self.kernels.program, self.program, torch.get_num_threads())
            return self.hidden.to(self.dtype)[:, None]


class Section(NamedTuple):
    """Layers one after the other, and the program that does their step; or why they have to do it themselves."""

    blocks: list[nn.Module]
    program: StepProgram | None
    obstacle: str | None


def addresses_of(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


class CpuDecoder(CpuKernelUser):
    """Decode steps of decoders, as programs where they can be."""

    kernels_class = StepKernels

    def __init__(self, plain: Collection[type[nn.Module]], make_example: Callable[[], nn.Module]):
        """
        Args:
            plain: the modules whose work a program does.
            make_example: makes a small `VisualGLMTextModel`, for the self-check.
        """
        super().__init__()
        self.plain = plain
        self.known = frozenset(identify(kind) for kind in plain)
        self.make_example = make_example
        self.programs: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()

    def run_layers(
        self,
        model: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: torch.Tensor,
        cache: Cache | None,
        prefix_key_values: tuple[torch.Tensor, ...] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Do what `model.run_layers` does with the other arguments, by programs where they can, else by calling it."""
        done = None
        if call_obstacle(model.config, prefix_key_values, kwargs) is None:
            done = self.step(model, hidden_states, attention_mask, rotary, cache, **kwargs)
        if done is None:
            done = model.run_layers(hidden_states, attention_mask, rotary, cache, prefix_key_values, **kwargs)
        return done

    def step(
        self,
        model: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: torch.Tensor,
        cache: Cache | None,
        **kwargs,
    ) -> torch.Tensor | None:
        """Compute what the layers of a `VisualGLMTextModel` do, as far as possible by programs.

        Args:
            model: the decoder.
            hidden_states: [B, S, C]
            attention_mask: [B, 1, S, T], True for keys that are seen; None for all.
            rotary: as `compute_rotary` returns it.
            cache: of what came before; it gets longer.
            kwargs: what layers are told that have to be asked themselves.

        Returns:
            [B, S, C]; None, and nothing is done, if programs can do nothing.
        """
        if step_obstacle(model.config, hidden_states, cache) is not None or not continues(
            cache, model.config, hidden_states, attention_mask
        ):
            return None
        sections = self.divide(model, len(hidden_states), hidden_states.dtype)
        if not any(section.program for section in sections):
            return None
        for blocks, program, _ in sections:
            if program is None:
                for block in blocks:
                    hidden_states = block(hidden_states, attention_mask, rotary, cache, **kwargs)
            else:
                states = [cache.layers[block.attention.layer_idx].lengthen() for block in blocks]
                hidden_states = program.run(hidden_states, rotary, states, attention_mask)
        return hidden_states

    def divide(self, model: nn.Module, batch: int, dtype: torch.dtype) -> list[Section]:
        """Divide the layers into those that one program does, and those that have to be asked themselves."""
        if has_global_hooks():
            return [Section(list(model.layers), None, "hooks on all modules")]
        sections = []
        for obstacle, group in groupby(model.layers, self.block_obstacle):
            blocks = list(group)
            if obstacle is None:
                sections.append(Section(blocks, *self.find_program(model, blocks, batch, dtype)))
            else:
                sections.append(Section(blocks, None, obstacle))
        return sections

    def find_program(
        self, model: nn.Module, blocks: list[nn.Module], batch: int, dtype: torch.dtype
    ) -> tuple[StepProgram | None, str | None]:
        """The program for plain layers of a model as they are now, made once; or why there is none."""
        part = Part.read(blocks, model.config)
        state, programs = part.state(), self.programs.setdefault(model, {})
        key = (part.layers[0].number, len(blocks), batch, dtype, torch.get_num_threads())
        known, found = programs.get(key, (None, None))
        if known != state:
            found = self.make_program(part, batch, dtype)
            programs[key] = state, found
        return found

    def block_obstacle(self, block: nn.Module) -> str | None:
        """Why a layer has to be asked itself: it, or one of its parts, is not plain."""
        return next(filter(None, map(self.module_obstacle, block.modules())), None)

    def module_obstacle(self, module: nn.Module) -> str | None:
        """Why a module may compute something else than its class says, or somebody listens."""
        state = vars(module)
        if identify(type(module)) not in self.known:
            return "an adapter" if find_wrapped(module) is not None else f"a module {type(module).__name__}"
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return "a hook"
        return "a forward of its own" if "forward" in state else None

    def make_program(self, part: Part, batch: int, dtype: torch.dtype) -> tuple[StepProgram | None, str | None]:
        users = (CPU_PRODUCTS, CPU_ATTENTION, self)
        obstacle = part.obstacle(batch, dtype) or next(filter(None, (user.obstacle() for user in users)), None)
        return (None, obstacle) if obstacle else (self.write_program(self.kernels, part, batch, dtype), None)

    def write_program(self, kernels: StepKernels, part: Part, batch: int, dtype: torch.dtype) -> StepProgram:
        return StepProgram(kernels, CPU_PRODUCTS.kernels, CPU_ATTENTION.kernels, part, batch, dtype)

    def check(self, kernels: StepKernels) -> None:
        random = {"generator": torch.Generator("cpu").manual_seed(0), **FLOATS}
        batch, length = 2, 5
        for dtype in HALVES:
            model = self.make_example().to(dtype)
            part = Part.read(model.layers, model.config)
            states = (2, batch, part.num_heads, length, part.head_dim)
            caches = [GrowingCache(model.config) for _ in range(2)]
            for layer_idx in range(len(model.layers)):
                key, value = torch.randn(states, **random).to(dtype)
                for cache in caches:
                    cache.update(key, value, layer_idx)
            hidden_states = torch.randn(batch, 1, part.hidden_size, **random).to(dtype)
            rotary = torch.rand(2, batch, 1, 1, 1, 2, part.head_dim // 4, **random)
            rotary = rotary.half() if dtype == torch.float16 else rotary  # as `compute_rotary` has it
            mask = torch.rand(batch, 1, 1, length + 1, **random) < 0.8
            expected = model.run_layers(hidden_states, mask, rotary, caches[0])
            program = self.write_program(kernels, part, batch, dtype)
            out = program.run(hidden_states, rotary, [layer.lengthen() for layer in caches[1].layers], mask)
            pairs = [(out, expected)]
            for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
                pairs += [(ours.keys, theirs.keys), (ours.values, theirs.values)]
            error = max(((ours - theirs).float().norm() / theirs.float().norm()).item() for ours, theirs in pairs)
            if not error < CHECK_TOLERANCE[dtype]:
                raise KernelError(f"A decode step in {dtype} is off by {error:.2g} of the result.")


def identify(kind: type) -> type | tuple[str, str]:
    """A class of torch; of a class of ours, what its copies have in common, of which each checkpoint folder has one."""
    return kind if kind.__module__.startswith("torch.") else (kind.__name__, kind.__module__.rpartition(".")[2])


def has_global_hooks() -> bool:
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


def find_setting(config: PretrainedConfig, options: dict, name: str) -> Any:
    """A setting of a call: of its `options`, else of the config."""
    value = options.get(name)
    return getattr(config, name, None) if value is None else value


def call_obstacle(config: PretrainedConfig, prefix: Any, options: dict) -> str | None:
    """Why no program is asked for a decode step with this prefix, if any, and these options of a call."""
    if prefix is not None:
        return "a prefix of P-tuning"
    recorded = [name for name in RECORDED if find_setting(config, options, name)]
    return f"{recorded[0]} is asked for" if recorded else None


def step_obstacle(config: PretrainedConfig, hidden_states: torch.Tensor, cache: Cache | None) -> str | None:
    """Why these are no decode step's in half precision, of which a CPU is to compute the numbers and no more."""
    if config._attn_implementation != "sdpa":
        return f"{config._attn_implementation} attention"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(hidden_states) is not torch.Tensor:
        return "a step that is compiled or traced"
    if hidden_states.shape[1] != 1:
        return "several tokens"
    if hidden_states.device.type != "cpu":
        return f"activations on {hidden_states.device.type}"
    if hidden_states.dtype not in HALVES:
        return f"{name_of(hidden_states.dtype)} activations"
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return "gradients or autocast"
    return None if identify(type(cache)) == identify(GrowingCache) else "a cache that is not the default one"


def continues(
    cache: GrowingCache, config: PretrainedConfig, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether the cache holds what the hidden states [B, 1, C] and the mask, of one more token, fit to."""
    batch, length = len(hidden_states), cache.get_seq_length()
    shape = (batch, config.num_attention_heads, length, config.head_dim)
    return cache.holds(config.num_hidden_layers, shape, hidden_states.dtype) and (
        attention_mask is None
        or (attention_mask.dtype == torch.bool and attention_mask.shape == (batch, 1, 1, length + 1))
    )
