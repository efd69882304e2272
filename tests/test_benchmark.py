"""`scripts/benchmark.py`: the shape and the sanity of its report, never its times; its yardstick against our logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visualglm_hf import VisualGLMForConditionalGeneration


CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPTS = CHECKOUT / "scripts"
SECONDS = 300  # until a busy machine is done
QUICK = ("--geometry", "tiny", "--dtype", "float32", "--threads", "1", "--contexts", "16", "40")
QUICK += ("--new-tokens", "4", "--repeats", "2", "--bandwidth-gib", "0.02", "--bandwidth-repeats", "1")
# A stand-in with the interface of the original's `modeling_chatglm.GLMBlock`.
FAKE_ORIGINAL = """
import torch
from .configuration_chatglm import NAME
from .visual import BLIP2

print(f"{NAME} prints when it is imported")


class GLMBlock(torch.nn.Module):
    def __init__(self, hidden_size, num_attention_heads, layernorm_epsilon, layer_id, inner_hidden_size=None,
                 hidden_size_per_attention_head=None, layernorm=torch.nn.LayerNorm, use_bias=True,
                 params_dtype=torch.float, num_layers=28, position_encoding_2d=True, empty_init=True):
        super().__init__()
        self.input_layernorm = layernorm(hidden_size, eps=layernorm_epsilon)
        self.dense = torch.nn.utils.skip_init(torch.nn.Linear, hidden_size, hidden_size, dtype=params_dtype)

    def forward(self, hidden_states, position_ids, attention_mask, layer_id, layer_past=None, use_cache=False,
                output_attentions=False):
        length, batch, _ = hidden_states.shape
        is_prompt = layer_past is None
        if tuple(position_ids.shape) != (batch, 2, length) or attention_mask.dtype != torch.bool:
            raise ValueError("the driver does not know the original's interface")
        if is_prompt and tuple(attention_mask.shape) != (batch, 1, length, length):
            raise ValueError("the driver does not know the original's mask")
        present = hidden_states if is_prompt else torch.cat((layer_past, hidden_states))
        return self.dense(self.input_layernorm(hidden_states)) + present.mean(0), present
"""


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module, for its parts."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import benchmark

        yield benchmark
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def fake_original(tmp_path) -> Path:
    (tmp_path / "modeling_chatglm.py").write_text(FAKE_ORIGINAL)
    (tmp_path / "configuration_chatglm.py").write_text('NAME = "the original"\n')
    return tmp_path


@pytest.fixture
def run_here(benchmark, capfd):
    """Run the script in this process, which is quicker; returns (exit code, stdout, stderr)."""
    threads = torch.get_num_threads()

    def run(*options):
        try:
            code = benchmark.main(list(map(str, options)))
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    yield run
    torch.set_num_threads(threads)


def run_apart(*options) -> subprocess.CompletedProcess:
    """Run the script in a process of its own, as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=SECONDS, env=environment)


def report_of(code: int, stdout: str, stderr: str) -> dict:
    assert code == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def is_summary(figures: dict, samples: int) -> bool:
    return 0 < figures["min"] <= figures["median"] <= figures["max"] and figures["n"] == samples


@pytest.fixture(scope="module")
def completed() -> subprocess.CompletedProcess:
    return run_apart(*QUICK, "--cache", "dynamic", "static", "--against", "formulation")


@pytest.fixture(scope="module")
def report(completed) -> dict:
    return report_of(completed.returncode, completed.stdout, completed.stderr)


def test_a_run_ends_in_one_json_line_that_says_what_was_measured_on_what(report):
    assert {"benchmark", "date", "machine", "versions", "settings", "results"} == set(report)
    assert report["machine"]["threads"] == 1
    assert report["machine"]["cpu"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["contexts"] == [16, 40]


def test_the_readable_table_has_a_line_for_every_measurement(completed, report):
    table = completed.stdout.splitlines()[:-1]
    results = report["results"]
    assert sum(line.startswith("prefill, ms") for line in table) == len(results["prefill"])
    assert sum(line.startswith("decode (") for line in table) == len(results["decode"])
    assert sum("original's formulation" in line for line in table) == 4
    assert any(line.startswith("encode") for line in table)


def test_every_part_was_measured_at_every_context(report):
    results = report["results"]
    assert is_summary(results["encode"]["ms"], samples=2)
    assert [row["context"] for row in results["prefill"]] == [16, 40]
    assert all(is_summary(row["ms"], samples=2) for row in results["prefill"])
    paths = ["forward", "generate, dynamic cache", "generate, static cache"]
    assert [(row["context"], row["path"]) for row in results["decode"]] == [
        (c, path) for c in (16, 40) for path in paths
    ]
    assert all(is_summary(row["ms_per_token"], samples=4) for row in results["decode"])


def test_rates_follow_from_times_and_bytes(report):
    results = report["results"]
    for row in results["decode"]:
        ms = row["ms_per_token"]["median"]
        assert row["tokens_per_s"] == pytest.approx(1000 / ms, rel=1e-2)
        assert row["gb_per_s"] == pytest.approx(results["model"]["token_gb"] / ms * 1000, rel=1e-2)
        fraction = row["gb_per_s"] / results["limits"]["read_gb_per_s"]
        assert row["fraction_of_bandwidth"] == pytest.approx(fraction, rel=1e-2)
    assert all(row["fraction_of_gemm"] > 0 for row in results["prefill"])


def test_peak_memory_holds_the_weights_and_never_shrinks(report):
    results = report["results"]
    assert results["model"]["weights_gib"] < results["load"]["peak_rss_gib"] <= results["end"]["peak_rss_gib"]


def test_the_yardstick_is_compared_pair_by_pair_and_only_after_its_logits_are_ours(report):
    against = report["results"]["against_formulation"]
    assert against["deviation_float32"] <= 1e-3
    assert against["deviation"] <= 1e-3
    for part, samples in (("prefill", 2), ("decode", 4)):
        assert [row["context"] for row in against[part]] == [16, 40]
        for row in against[part]:
            assert all(is_summary(row[name], samples) for name in ("ours_ms", "original_ms", "ours_over_original"))


def test_only_the_parts_asked_for_are_measured_and_a_folder_can_be_measured(run_here, tiny_original):
    options = ("--model", tiny_original, "--dtype", "float16", "--threads", "1", "--contexts", "64", "--repeats", "1")
    report = report_of(*run_here(*options, "--parts", "encode", "--bandwidth-gib", "0.02", "--batch", "2"))
    results = report["results"]
    assert results["load"]["how"] == "loaded"
    assert "encode" in results
    assert "prefill" not in results
    assert "decode" not in results
    assert report["settings"]["model"] == tiny_original.name  # no path of this machine


def test_the_originals_blocks_are_driven_in_another_interpreter_in_turns_with_ours(run_here, fake_original):
    options = ("--parts", "load", "--reference", fake_original, "--reference-python", sys.executable, "--batch", "2")
    code, stdout, stderr = run_here(*QUICK, *options, "--layers", "2")
    against = report_of(code, stdout, stderr)["results"]["against_reference"]
    assert "the original prints when it is imported" in stderr
    assert against["layers"] == 2
    assert against["versions"]["torch"] == torch.__version__
    assert [row["context"] for row in against["decode"]] == [16, 40]
    assert all(is_summary(row["ours_over_original"], samples=4) for row in against["decode"])


def test_an_original_that_cannot_be_imported_is_one_clear_line(run_here, fake_original):
    (fake_original / "modeling_chatglm.py").write_text("import module_that_is_nowhere\n")
    code, _, stderr = run_here(*QUICK, "--parts", "load", "--reference", fake_original)
    assert code == 1
    assert "benchmark: the original's code in --reference ended with exit status 1" in stderr
    assert "module_that_is_nowhere" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--contexts", "4"), "contexts must be 12 or more"),
        (("--contexts", "16", "600"), "at most 507"),
        (("--model", "nowhere"), "has no config.json"),
        (("--device", "abacus"), "no device is called 'abacus'"),
        (("--reference", "nowhere"), "has no modeling_chatglm.py"),
        (("--repeats", "0"), "must be 1 or more"),
    ],
)
def test_impossible_options_are_one_clear_line(run_here, options, message):
    code, _, stderr = run_here(*QUICK, *options)
    assert code in (1, 2)
    assert message in stderr.splitlines()[-1]


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.path.insert(0, 'scripts'); import benchmark; print('torch' in sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=CHECKOUT)
    assert completed.stdout.strip() == "False", completed.stderr
    assert "--against" in run_apart("-h").stdout


@pytest.fixture(scope="module", params=["random weights", "the tiny original"])
def model(request, benchmark, tiny_original):
    if request.param == "the tiny original":
        return VisualGLMForConditionalGeneration.from_pretrained(tiny_original, dtype=torch.float32).eval()
    return benchmark.build_model(benchmark.TINY, torch.float32, torch.device("cpu")).eval()


@torch.no_grad()
def test_the_yardstick_computes_our_logits_at_every_position_and_step(benchmark, model):
    from original_formulation import OriginalFormulation

    prompts, yardstick = benchmark.Prompts(model, batch=2), OriginalFormulation(model)
    input_ids = prompts.ids(60)
    input_ids[1, -3:] = input_ids[1, [-2, -1, -3]]  # an answer of one token in the second row
    logits = yardstick.prefill(input_ids, prompts.image_embeds)
    ours = model(input_ids, image_embeds=prompts.image_embeds).logits
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    for token in (20, 21, 22):
        input_ids = torch.cat((input_ids, torch.full((2, 1), token)), dim=1)
        ours = model(input_ids, image_embeds=prompts.image_embeds).logits[:, -1:]
        torch.testing.assert_close(yardstick.decode(input_ids), ours, rtol=0, atol=1e-5 * ours.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_yardstick_rounds_in_half_precision_like_the_original_and_stays_near_ours(benchmark, dtype):
    from original_formulation import OriginalFormulation

    model = benchmark.build_model(benchmark.TINY, getattr(torch, dtype), torch.device("cpu")).eval()
    prompts, engine = benchmark.Prompts(model, batch=1), benchmark.ModelEngine(model)
    found = benchmark.deviation(engine, OriginalFormulation(model), prompts, context=60)
    assert 0 <= found <= benchmark.DEVIATIONS[dtype]


def test_a_wrong_yardstick_is_refused(benchmark):
    with pytest.raises(ValueError, match="its times would say nothing"):
        benchmark.check_deviation(float("nan"), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_finite_varied_tied_and_in_their_dtype(benchmark, dtype):
    dtype = getattr(torch, dtype)
    model = benchmark.build_model(benchmark.TINY, dtype, torch.device("cpu"))
    parameters = dict(model.named_parameters())
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in parameters.values())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    layer = model.transformer.layers[0]
    assert layer.input_layernorm.weight.float().mean() == pytest.approx(1, abs=0.05)
    assert torch.linalg.matrix_rank(layer.attention.query_key_value.weight.float()) == 64


def test_filling_repeats_the_block_and_cuts_the_last_copy_short(benchmark):
    filled = benchmark.fill(torch.empty(2, 4), torch.arange(3.0))
    assert filled.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_shortening_the_decoder_leaves_the_model_alone(benchmark):
    model = benchmark.build_model(benchmark.TINY, torch.float32, torch.device("cpu")).eval()
    stack = benchmark.ShortStack(model, 1, batch=2, clock=benchmark.Clock(model.device))
    with torch.no_grad():
        assert stack.start(10) > 0
        assert stack.step() > 0
    assert len(stack.decoder.layers) == 1
    assert stack.cache.get_seq_length() == 11
    assert len(model.transformer.layers) == 3


def test_token_times_leave_out_the_prompt_and_the_first_token(benchmark):
    streamer = benchmark.TokenTimes()
    streamer.times = [0.0, 5.0, 5.5, 5.75]
    assert streamer.intervals() == [500, 250]
