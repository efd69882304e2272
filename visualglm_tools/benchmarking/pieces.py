"""The pieces of a decode step of one row on a CPU: which takes how long, and what it reads per second.

Each stage of the step's program is run by itself, by the same threads, in the order of the program; so are the whole
program, in which threads go from stage to stage without Python, the output layer, and the whole call. A plain read is
taken each time, too. Not here: steps that no program does, and the program itself (`cpu_decoder`).
"""

from collections.abc import Iterator
from typing import Any

import torch

from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.cpu_decoder import Linear, StepProgram
from visualglm_hf.cpu_products import ProductTask
from visualglm_hf.modeling_visualglm import CPU_DECODER
from visualglm_tools.benchmarking.engines import FilledRunner, ModelEngine
from visualglm_tools.benchmarking.limits import PlainRead
from visualglm_tools.benchmarking.measurements import Bench
from visualglm_tools.benchmarking.models import model_figures
from visualglm_tools.benchmarking.timing import announce, collect, digits, summarise


LAYERS, HEAD, STEP = "all layers in one call", "lm_head", "the whole step"
NAMES = {
    "QuantizeTask": "activations quantized",
    "NormTask": "norms",
    "RotateTask": "rotation",
    "AttentionTask": "attention",
    "NarrowTask": "rounding",
    "GeluTask": "gelu",
    "ResidualTask": "residuals",
}
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def linears_of(model: VisualGLMForConditionalGeneration) -> Iterator[tuple[str, int]]:
    """The matrices of the layers in the order of a step: their names, and the bytes of their weights and scales."""
    for layer in model.transformer.layers:
        for name, parent in zip(LINEARS, (layer.attention, layer.attention, layer.mlp, layer.mlp), strict=True):
            linear = Linear.read(getattr(parent, name))
            scale = 0 if linear.weight_scale is None else linear.weight_scale.nbytes
            yield name, linear.weight.nbytes + scale


def find_program(model: VisualGLMForConditionalGeneration) -> StepProgram | None:
    """The program of all layers for one row; None where there is none, or several."""
    sections = CPU_DECODER.divide(model.transformer, 1, model.dtype)
    return sections[0].program if len(sections) == 1 else None


def name_stages(model: VisualGLMForConditionalGeneration, program: StepProgram) -> list[tuple[str, int]]:
    """What each stage of a program is, and the bytes of the matrix that it reads."""
    linears = linears_of(model)
    return [
        next(linears) if isinstance(stage.task, ProductTask) else (NAMES[type(stage.task).__name__], 0)
        for stage in program.stages
    ]


def time_stages(bench: Bench, program: StepProgram, names: list[tuple[str, int]]) -> dict[str, float]:
    """Run the stages one by one; the milliseconds of each kind."""
    pool, sums = program.kernels.pool, {}
    rooms = [torch.empty(task.chunks, task.scores_stride) for task in program.attentions]  # the step's own are gone
    for task, room in zip(program.attentions, rooms, strict=True):
        task.scores, task.bias = room.data_ptr(), None
    for stage, (name, _) in zip(program.stages, names, strict=True):
        stage.task.restart()
        sums[name] = sums.get(name, 0.0) + bench.clock(pool.run, *stage)[0]
    for stage in program.stages:
        stage.task.restart()
    return {**sums, LAYERS: bench.clock(pool.run, program.kernels.program, program.program, torch.get_num_threads())[0]}


def measure_pieces(bench: Bench) -> list[dict[str, Any]]:
    """Time the pieces of a step of one row after the shortest context; none where no program does such a step."""
    model, context = bench.model, min(bench.settings.contexts)
    if bench.clock.device.type != "cpu" or find_program(model) is None:
        return []
    announce(f"the pieces of a step at {context} tokens")
    runner = FilledRunner(ModelEngine(model), bench.prompts(1), bench.clock)
    runner.start(context)
    program, head = find_program(model), torch.zeros(1, 1, model.lm_head.in_features, dtype=model.dtype)
    names, read = name_stages(model, program), PlainRead(bench.clock, bench.settings.bandwidth_gib)
    rates = []

    def measure() -> dict[str, float]:
        step = runner.step()
        pieces = time_stages(bench, program, names)
        rates.append(read.rate())
        return {**pieces, HEAD: bench.clock(model.lm_head, head)[0], STEP: step}

    samples = collect(measure, bench.settings.new_tokens, 1, bench.settings.row_seconds)
    return [describe(name, samples, rates[1:], read_bytes(model, names, name)) for name in samples[0]]


def read_bytes(model: VisualGLMForConditionalGeneration, names: list[tuple[str, int]], piece: str) -> float:
    """The bytes of weights that a piece reads; 0 for those that read little."""
    if piece == STEP:
        return model_figures(model)["token_gb"] * 1e9
    if piece == HEAD:
        return model.lm_head.weight.nbytes
    return sum(nbytes for name, nbytes in names if piece in (name, LAYERS))


def describe(piece: str, samples: list[dict[str, float]], rates: list[float], nbytes: float) -> dict[str, Any]:
    """A piece's milliseconds in a step; if it reads weights, at which rate, and which part of the plain read's."""
    times = [sample[piece] for sample in samples]
    row: dict[str, Any] = {"piece": piece, "ms": summarise(times)}
    if nbytes:
        row["gb_per_s"] = digits(nbytes / row["ms"]["median"] / 1e6)
        row["of_reading"] = summarise([nbytes / ms / 1e6 / rate for ms, rate in zip(times, rates, strict=True)])
    return row
