"""Room: the report on which way a model's work goes, and why not a faster one. What it says is what is done."""

import copy
import sys

import pytest
import torch

from tests.helpers import SMALL_CONFIG, make_small_model
from visualglm_hf import (
    VisualGLMConfig,
    VisualGLMForConditionalGeneration,
    cpu_decoder,
    cpu_many_rows,
    cpu_quantizing,
    kernel_report,
    lowbit_products,
    modeling_visualglm,
)
from visualglm_hf.cpu_arithmetic import AMX, MatrixInstructions
from visualglm_hf.cpu_attention import CpuAttention
from visualglm_hf.cpu_decoder import CpuDecoder
from visualglm_hf.cpu_quantizing import CpuQuantizing
from visualglm_hf.cuda_products import CudaProducts
from visualglm_hf.kernel_report import KernelReport


KERNEL, MANY_ROWS, PACKED, DEQUANTIZED, TORCH = (way.name for way in lowbit_products.WAYS["cpu"])


@pytest.fixture
def renew(monkeypatch, renew_products):
    """Finds all kernels for a CPU anew."""

    def make() -> None:
        attention = CpuAttention()
        monkeypatch.setattr(cpu_decoder, "CPU_PRODUCTS", renew_products())
        for module in (kernel_report, cpu_decoder):
            monkeypatch.setattr(module, "CPU_ATTENTION", attention)
        decoder = modeling_visualglm.CPU_DECODER
        monkeypatch.setattr(cpu_quantizing, "CPU_QUANTIZING", CpuQuantizing())
        monkeypatch.setattr(modeling_visualglm, "CPU_DECODER", CpuDecoder(decoder.plain, decoder.make_example))

    return make


def rows_of(report: KernelReport) -> dict[str, tuple[str, list[str]]]:
    """By what is done and where: the way, and the obstacles of faster ones."""
    return {
        f"{what}, {where}": (outcome.way, [text for _, text in outcome.obstacles])
        for what, where, outcome in report.rows
    }


FEW, MANY = "products of 1, 4 rows", "products of 256 rows"
ALL = "products of 1, 4, 256 rows"
FEW_WEIGHTS = "fewer than 262,144 weights"
TOO_MANY = "256 rows of activations, not 1 to 4"


INSTRUCTIONS = "products of many rows, instructions"


def find_instructions() -> tuple[str, list[str]]:
    """What this processor multiplies with, and why not with matrix instructions."""
    kernels = next(filter(None, cpu_many_rows.CPU_MANY_ROWS.found.values()))
    obstacle = kernels.matrix_instructions.obstacle
    return kernels.arithmetic.name, [obstacle] if obstacle else []


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("with_kernels", "without_several_rows")
def test_a_model_of_few_bits_goes_the_fastest_way(bits):
    report = make_small_model(bits=bits).kernel_report()
    assert rows_of(report) == {
        f"{FEW}, layers 0-2": (KERNEL, []),
        f"{MANY}, layers 0-2": (MANY_ROWS, [TOO_MANY]),
        f"{FEW}, output layer": (KERNEL, []),
        f"{MANY}, output layer": ("torch", ["256 rows of activations, not 1 to 4"]),
        INSTRUCTIONS: find_instructions(),
        "attention of 1 query, layers 0-2": (KERNEL, []),
        "decode step, layers 0-2": ("in one call", []),
        "quantizing, layers 0-2": ("torch", [FEW_WEIGHTS]),
    }
    assert report.machine.startswith(f"bfloat16 and {bits} bits on cpu")


@pytest.mark.usefixtures("with_kernels")
def test_an_output_layer_of_few_bits_is_one_of_them():
    rows = rows_of(make_small_model(lm_head=True).kernel_report())
    assert rows[f"{MANY}, output layer"] == (MANY_ROWS, [TOO_MANY])


@pytest.mark.usefixtures("with_kernels")
def test_full_weights_of_half_precision_have_kernels_in_a_program_alone():
    rows = rows_of(make_small_model(bits=None).kernel_report())
    alone = "bfloat16 weights, which have one in the program of a decode step alone"
    assert rows[f"{ALL}, layers 0-2"] == ("torch", [alone])
    assert rows["decode step, layers 0-2"] == ("in one call", [])


@pytest.mark.usefixtures("with_kernels")
def test_the_instructions_are_named_with_what_keeps_a_processor_from_faster_ones(monkeypatch, renew):
    obstacle = "a child process that tried AMX died of SIGILL"
    untried = MatrixInstructions(AMX, obstacle)
    monkeypatch.setattr(cpu_many_rows, "find_matrix_instructions", lambda processor, features: untried)
    renew()
    report = make_small_model().kernel_report()
    name, obstacles = rows_of(report)[INSTRUCTIONS]
    assert name != AMX.name
    assert obstacles == [obstacle]
    assert f"not AMX: {obstacle}" in str(report)


@pytest.mark.usefixtures("with_kernels", "without_several_rows")
def test_full_precision_is_named():
    rows = rows_of(make_small_model(torch.float32, bits=None).kernel_report())
    assert rows == {
        f"{ALL}, layers 0-2": ("torch", ["float32 weights"]),
        f"{ALL}, output layer": ("torch", ["float32 activations"]),
        "attention of 1 query, layers 0-2": ("sdpa", ["float32 activations"]),
        "decode step, layers 0-2": ("layer by layer", ["float32 activations"]),
        "quantizing, layers 0-2": ("torch", [FEW_WEIGHTS]),
    }
    rows = rows_of(make_small_model(torch.float32, bits=8).kernel_report())
    assert rows[f"{FEW}, layers 0-2"] == (KERNEL, [])


@pytest.mark.usefixtures("with_kernels")
def test_quantizing_is_told_as_it_is_done(monkeypatch, renew):
    monkeypatch.setattr(cpu_quantizing, "FEW_WEIGHTS", 0)
    assert rows_of(make_small_model().kernel_report())["quantizing, layers 0-2"] == (KERNEL, [])
    model = make_small_model(bits=None)
    model.config.quantization_bit, model.config.quantization_group_size = 4, 8
    assert rows_of(model.kernel_report())["quantizing, layers 0-2"] == ("torch", ["groups of 8 columns"])
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    renew()
    missing = "llvmlite is not installed; get it with: pip install llvmlite"
    assert rows_of(make_small_model().kernel_report())["quantizing, layers 0-2"] == ("torch", [missing])


def test_without_llvmlite_that_is_why(monkeypatch, renew):
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    renew()
    rows = rows_of(make_small_model().kernel_report())
    missing = "llvmlite is not installed; get it with: pip install llvmlite"
    assert rows[f"{FEW}, layers 0-2"] == (PACKED, [missing, missing])
    assert rows[f"{MANY}, layers 0-2"][0] == TORCH
    assert rows[f"{MANY}, layers 0-2"][1] == [TOO_MANY, missing, "256 rows of activations, not 1 to 15", missing]
    assert rows[f"{FEW}, output layer"] == ("torch", [missing])
    assert rows["attention of 1 query, layers 0-2"] == ("sdpa", [missing])
    assert rows["decode step, layers 0-2"] == ("layer by layer", [missing])


def test_the_environment_is_why(monkeypatch, renew):
    monkeypatch.setenv("VISUALGLM_KERNELS", "torch")
    renew()
    report = make_small_model().kernel_report()
    assert report.machine.endswith("VISUALGLM_KERNELS: torch")
    rows = rows_of(report)
    for what in (FEW, "attention of 1 query", "decode step"):
        assert set(rows[f"{what}, layers 0-2"][1]) == {"VISUALGLM_KERNELS is torch"}


@pytest.mark.usefixtures("with_kernels", "without_several_rows")
def test_adapters_are_named_with_their_layers():
    peft = pytest.importorskip("peft")
    model = make_small_model()
    config = peft.LoraConfig(target_modules=r".*layers\.[02]\.attention\.dense")
    rows = rows_of(peft.get_peft_model(model, config).kernel_report())
    assert rows["decode step, layers 0, 2"] == ("layer by layer", ["an adapter"])
    assert rows["decode step, layer 1"] == ("in one call", [])
    assert rows[f"{FEW}, layers 0-2"] == (KERNEL, [])  # of the layers inside


def add_hook(model):
    model.transformer.layers[1].mlp.register_forward_hook(lambda *args: None)


def replace_forward(model):
    mlp = model.transformer.layers[1].mlp
    mlp.forward = mlp.forward


def replace_module(model):
    model.transformer.layers[1].mlp = torch.nn.Sequential(model.transformer.layers[1].mlp)
    model.transformer.layers[1].mlp.dense_h_to_4h = model.transformer.layers[1].mlp[0].dense_h_to_4h
    model.transformer.layers[1].mlp.dense_4h_to_h = model.transformer.layers[1].mlp[0].dense_4h_to_h


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [(add_hook, "a hook"), (replace_forward, "a forward of its own"), (replace_module, "a module Sequential")],
)
@pytest.mark.usefixtures("with_kernels")
def test_what_was_changed_is_named_with_its_layer(change, obstacle):
    model = make_small_model()
    change(model)
    rows = rows_of(model.kernel_report())
    assert rows["decode step, layer 1"] == ("layer by layer", [obstacle])
    assert rows["decode step, layers 0, 2"] == ("in one call", [])


@pytest.mark.usefixtures("with_kernels")
def test_settings_of_the_model_are_named():
    model = make_small_model()
    model.config.text_config.output_hidden_states = True
    assert rows_of(model.kernel_report())["decode step, layers 0-2"][1] == ["output_hidden_states is asked for"]
    model.config.text_config.output_hidden_states = False
    model.set_attn_implementation("eager")
    rows = rows_of(model.kernel_report())
    assert rows["attention of 1 query, layers 0-2"] == ("eager", ["eager attention"])
    assert rows["decode step, layers 0-2"] == ("layer by layer", ["eager attention"])


def make_other(**sizes) -> VisualGLMForConditionalGeneration:
    config = copy.deepcopy(SMALL_CONFIG)
    config["text_config"] |= sizes
    return VisualGLMForConditionalGeneration(VisualGLMConfig(**config)).eval().bfloat16()


@pytest.mark.usefixtures("with_kernels", "without_several_rows")
def test_sizes_are_named_with_the_matrices_that_have_them():
    rows = rows_of(make_other(intermediate_size=96).quantize(4, group_size=32).kernel_report())
    odd = "a matrix [128, 96], whose columns are no multiple of 128"
    assert rows[f"{FEW}, query_key_value, dense, dense_h_to_4h of layers 0-2"] == (KERNEL, [])
    assert rows[f"{FEW}, dense_4h_to_h of layers 0-2"] == (PACKED, [odd, odd])
    assert rows["decode step, layers 0-2"] == ("layer by layer", [odd])
    rows = rows_of(make_other(num_attention_heads=4).kernel_report())
    assert rows["decode step, layers 0-2"] == ("layer by layer", ["heads of 32 numbers, no multiple of 64"])
    rows = rows_of(make_other(pre_seq_len=4).kernel_report())
    assert rows["decode step, layers 0-2"] == ("layer by layer", ["a prefix of P-tuning"])


def test_layers_of_another_library_are_named():
    class Linear4bit(torch.nn.Linear):
        pass

    model = make_small_model(bits=None)
    model.transformer.layers[2].mlp.dense_h_to_4h = Linear4bit(128, 384).bfloat16()
    rows = rows_of(model.kernel_report())
    assert rows[f"{ALL}, dense_h_to_4h of layer 2"] == ("Linear4bit", ["a layer of another library"])


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(lowbit_products.WAYS, "cpu", lowbit_products.WAYS["cuda"])  # as if the CPU were one
    monkeypatch.setattr(lowbit_products, "CUDA_PRODUCTS", CudaProducts())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    rows = rows_of(make_small_model().kernel_report())
    old = "cpu has compute capability (7, 0), they need (7, 5)"
    assert rows[f"{ALL}, layers 0-2"] == (TORCH, [old, old])


@pytest.mark.usefixtures("with_kernels", "without_several_rows")
def test_the_report_changes_nothing_and_is_a_table():
    model = make_small_model()
    ids = torch.tensor([[9, 8, 251, 254]])
    options = {"max_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, **options)
    state = copy.deepcopy(model.state_dict())
    text = str(model.kernel_report())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.generate(ids, **options), before)
    assert text.splitlines()[1] == "products of 1, 4 rows   layers 0-2     our kernel"
    assert "  not our kernel: 256 rows of activations, not 1 to 4" in text
    assert repr(model.kernel_report()) == text
    assert max(map(len, text.splitlines())) <= 120
