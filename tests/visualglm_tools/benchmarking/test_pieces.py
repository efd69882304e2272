"""A decode step taken apart: nothing is left out, and bytes are those of the weights."""

import pytest
import torch

from tests.helpers import make_small_model
from visualglm_hf.modeling_visualglm import CPU_DECODER
from visualglm_tools.benchmarking.measurements import Bench
from visualglm_tools.benchmarking.models import token_bytes
from visualglm_tools.benchmarking.pieces import HEAD, LAYERS, LINEARS, STEP, measure_pieces, name_stages, read_bytes
from visualglm_tools.benchmarking.report import render_pieces
from visualglm_tools.benchmarking.settings import Settings
from visualglm_tools.benchmarking.timing import Clock


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = make_small_model().requires_grad_(False)
    settings = Settings(contexts=(16,), new_tokens=3, bandwidth_gib=0.01)
    return Bench(settings, model, Clock(torch.device("cpu")))


@pytest.fixture(scope="module")
def pieces(bench) -> dict[str, dict]:
    if CPU_DECODER.obstacle():
        pytest.skip("no kernels on this processor")
    with torch.no_grad():
        return {row["piece"]: row for row in measure_pieces(bench)}


def test_every_stage_of_the_program_is_a_piece_and_so_are_the_head_and_the_whole(pieces):
    little = {"activations quantized", "norms", "rotation", "attention", "rounding", "gelu", "residuals"}
    assert set(pieces) == {*LINEARS, *little, LAYERS, HEAD, STEP}
    assert all(row["ms"]["n"] == 3 and row["ms"]["min"] > 0 for row in pieces.values())
    assert {name for name, row in pieces.items() if "of_reading" in row} == {*LINEARS, LAYERS, HEAD, STEP}


def test_the_pieces_read_what_the_layers_and_the_head_have(bench, pieces):
    (section,) = CPU_DECODER.divide(bench.model.transformer, 1, bench.model.dtype)
    names = name_stages(bench.model, section.program)
    found = {name: read_bytes(bench.model, names, name) for name in (*LINEARS, LAYERS, HEAD)}
    assert sum(found[name] for name in LINEARS) == found[LAYERS]
    assert found["query_key_value"] == 3 * found["dense"]
    vectors = sum(each.nbytes for each in bench.model.transformer.layers.parameters() if each.dim() == 1)
    norm = sum(each.nbytes for each in bench.model.transformer.final_layernorm.parameters())
    assert found[LAYERS] + found[HEAD] + vectors + norm == token_bytes(bench.model)


def test_a_report_has_a_line_for_each_piece(pieces):
    text = "\n".join(render_pieces({"variants": [{"name": "int4", "pieces": list(pieces.values())}]}))
    assert all(f"| int4 | {name} |" in text for name in pieces)
    assert render_pieces({"variants": [{"name": "int4"}]}) == []


def test_a_step_that_is_no_program_has_no_pieces(bench):
    model = make_small_model(torch.float32, bits=None)
    assert measure_pieces(Bench(bench.settings, model, bench.clock)) == []
