"""`visualglm bench`: the shape and the sanity of its report, never its times; its yardstick against our logits."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.commands import command, modules_after, script
from tests.fake_graphs import play_graphs
from tests.helpers import load_float32
from tests.paths import ROOT
from visualglm_hf import VisualGLMForConditionalGeneration, generation_visualglm
from visualglm_hf.compilation import RecordedCall, call_model
from visualglm_hf.quantization import QuantizedLinear
from visualglm_tools.benchmarking import measurements, timing
from visualglm_tools.benchmarking.comparison import DEVIATIONS, ShortStack, check_deviation, deviation
from visualglm_tools.benchmarking.engines import FilledRunner, ModelEngine, Prompts, fill_cache, random_states
from visualglm_tools.benchmarking.growth import measure_growth, plot_growth
from visualglm_tools.benchmarking.limits import add_rates
from visualglm_tools.benchmarking.machine import public_command
from visualglm_tools.benchmarking.measurements import PRODUCTS, Bench, Case
from visualglm_tools.benchmarking.models import TINY, build_model, fill, model_figures
from visualglm_tools.benchmarking.original_formulation import OriginalFormulation
from visualglm_tools.benchmarking.peers import parse_peer, run_peer
from visualglm_tools.benchmarking.report import read_run, render_page, render_run, write_page, write_run
from visualglm_tools.benchmarking.run import Variant, pool, pool_reading
from visualglm_tools.benchmarking.settings import RunSettings, Settings
from visualglm_tools.options import words


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


@pytest.fixture
def fake_original(tmp_path) -> Path:
    (tmp_path / "modeling_chatglm.py").write_text(FAKE_ORIGINAL)
    (tmp_path / "configuration_chatglm.py").write_text('NAME = "the original"\n')
    return tmp_path


@pytest.fixture
def run_here(capfd):
    """Run the command in this process, which is quicker; returns (exit code, stdout, stderr)."""
    threads = torch.get_num_threads()

    def run(*options):
        try:
            code = command("bench", *options)
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    yield run
    torch.set_num_threads(threads)


def run_apart(*options) -> subprocess.CompletedProcess:
    """Run the command under its old name in a process of its own, as a user does."""
    return script("benchmark.py", *options, code=None)


def report_of(code: int, stdout: str, stderr: str) -> dict:
    assert code == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def is_summary(figures: dict, samples: int) -> bool:
    in_order = 0 < figures["min"] <= figures["median"] <= figures["max"]
    return in_order and figures["n"] == len(figures["samples"]) == samples


def rows_of(variant: dict, part: str) -> list[dict]:
    return [row for row in variant["rows"] if row["part"] == part]


@pytest.fixture(scope="module")
def completed() -> subprocess.CompletedProcess:
    return run_apart(*QUICK, "--batch", "1", "2", "--cache", "dynamic", "static", "--against", "formulation")


@pytest.fixture(scope="module")
def report(completed) -> dict:
    return report_of(completed.returncode, completed.stdout, completed.stderr)


@pytest.fixture(scope="module")
def variant(report) -> dict:
    (variant,) = report["variants"]
    return variant


def test_a_run_ends_in_one_json_line_that_says_what_was_measured_on_what(report):
    sections = {"variants", "peers", "failed"}
    assert {"benchmark", "date", "command", "machine", "versions", "settings", *sections} == set(report)
    assert report["machine"]["threads"] == 1
    assert report["machine"]["cpu"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["contexts"] == [16, 40]
    assert shlex.split(report["command"])[:4] == ["visualglm", "bench", "--geometry", "tiny"]


def test_the_readable_report_has_a_line_for_every_measurement(completed, report, variant):
    lines = completed.stdout.splitlines()[:-1]
    assert "\n".join(lines).strip() == render_run(report).strip()
    measured = len(variant["rows"]) + len(variant["reading"])
    assert sum("| fp32 |" in line for line in lines) == 1 + measured  # and the line of the model itself
    assert sum(line.startswith(("| prefill |", "| decode |")) for line in lines) == 4


def test_every_part_was_measured_at_every_batch_and_context(variant):
    places = [(batch, context) for batch in (1, 2) for context in (16, 40)]
    paths = ["forward", "generate, dynamic cache", "generate, static cache"]
    assert [row["batch"] for row in rows_of(variant, "encode")] == [1, 2]
    assert [(row["batch"], row["context"]) for row in rows_of(variant, "prefill")] == places
    assert [(row["batch"], row["context"], row["path"]) for row in rows_of(variant, "decode")] == [
        each
        for batch in (1, 2)
        for each in [(batch, 0, "products alone"), *((batch, context, path) for context in (16, 40) for path in paths)]
    ]
    assert all(is_summary(row["ms"], 4 if row["part"] == "decode" else 2) for row in variant["rows"])
    assert variant["skipped"] == []


def test_rates_follow_from_times_and_sizes(variant):
    model, limits = variant["model"], variant["limits"]
    for row in rows_of(variant, "decode"):
        seconds = row["ms"]["median"] / 1000
        gigabytes = model["token_gb"] + row["batch"] * row["context"] * model["cache_gb_per_token"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / seconds, rel=1e-2)
        assert row["gb_per_s"] == pytest.approx(gigabytes / seconds, rel=1e-2)
        by_reading, by_gemm = gigabytes / limits["read_gb_per_s"], model["block_gflop"] / limits["gemm_gflop_per_s"]
        assert row["fraction_of_limit"] * seconds >= max(by_reading, by_gemm) * 0.99
    assert all(row["fraction_of_limit"] > 0 for row in rows_of(variant, "prefill"))


@pytest.mark.parametrize(("batch", "limit"), [(1, "reading"), (100, "GEMM")])
def test_small_batches_are_limited_by_reading_and_large_ones_by_multiplying(batch, limit):
    row = {"part": "decode", "batch": batch, "context": 0, "ms": {"median": 1000.0}}
    model = {"token_gb": 10.0, "cache_gb_per_token": 0.0, "block_gflop": 10.0, "head_gflop": 0.0}
    add_rates(row, model, {"read_gb_per_s": 20.0, "gemm_gflop_per_s": 1000.0})
    assert row["limit"] == limit
    assert row["fraction_of_limit"] == (0.5 if batch == 1 else 1.0)


def test_steps_are_measured_in_turns_with_plain_reads(variant, completed):
    rows = variant["reading"]
    assert [(row["path"], row["context"]) for row in rows] == [("products alone", 0), ("forward", 16), ("forward", 40)]
    assert all(is_summary(row[name], samples=4) for row in rows for name in ("read_gb_per_s", "of_reading"))
    assert "A step's bytes per second over a plain read's" in completed.stdout


def test_turns_of_several_rounds_are_put_together():
    rounds = [
        [{"path": "forward", "of_reading": timing.summarise([share]), "read_gb_per_s": timing.summarise([rate])}]
        for share, rate in ((0.5, 20.0), (0.7, 10.0))
    ]
    (row,) = pool_reading(rounds)
    assert row["path"] == "forward"
    assert row["of_reading"]["samples"] == [0.5, 0.7]
    assert row["read_gb_per_s"]["median"] == 15.0


def test_peak_memory_holds_the_weights_and_never_shrinks(variant):
    assert variant["model"]["weights_gib"] < variant["load"]["peak_rss_gib"] <= variant["end"]["peak_rss_gib"]


def test_the_yardstick_is_compared_pair_by_pair_and_only_after_its_logits_are_ours(variant):
    against = variant["against_formulation"]
    assert against["deviation_float32"] <= 1e-3
    assert against["deviation"] <= 1e-3
    for part, samples in (("prefill", 2), ("decode", 4)):
        assert [row["context"] for row in against[part]] == [16, 40]
        for row in against[part]:
            assert all(is_summary(row[name], samples) for name in ("ours_ms", "original_ms", "ours_over_original"))


def test_only_the_parts_asked_for_are_measured_and_a_folder_can_be_measured(run_here, tiny_original):
    options = ("--model", tiny_original, "--dtype", "float16", "--threads", "1", "--contexts", "64", "--repeats", "1")
    report = report_of(*run_here(*options, "--parts", "encode", "--bandwidth-gib", "0.02", "--batch", "2"))
    (variant,) = report["variants"]
    assert variant["load"]["how"] == "loaded"
    assert [row["part"] for row in variant["rows"]] == ["encode"]
    assert report["settings"]["model"] == tiny_original.name
    assert str(tiny_original) not in json.dumps(report)  # no path of this machine


def test_a_folder_is_quantized_while_it_is_loaded_or_has_its_bits_already(run_here, tiny_original, golden_dir):
    options = ("--threads", "1", "--contexts", "64", "--parts", "load", "--bandwidth-gib", "0.02", "--quant", "4")
    for folder in (tiny_original, golden_dir / "tiny-original-int4"):
        (variant,) = report_of(*run_here("--model", folder, *options))["variants"]
        assert variant["name"] == "int4"
    code, _, stderr = run_here("--model", folder, *options[:-1], "8")
    assert code == 2
    assert "has weights of 4 bits, not of 8" in stderr


def test_the_originals_blocks_are_driven_in_another_interpreter_in_turns_with_ours(run_here, fake_original):
    options = ("--parts", "load", "--reference", fake_original, "--reference-python", sys.executable, "--batch", "2")
    code, stdout, stderr = run_here(*QUICK, *options, "--layers", "2")
    against = report_of(code, stdout, stderr)["variants"][0]["against_reference"]
    assert "the original prints when it is imported" in stderr
    assert against["layers"] == 2
    assert against["versions"]["torch"] == torch.__version__
    assert [(row["batch"], row["context"]) for row in against["decode"]] == [(2, 16), (2, 40)]
    assert all(is_summary(row["ours_over_original"], samples=4) for row in against["decode"])


def test_an_original_that_cannot_be_imported_is_one_clear_line(run_here, fake_original):
    (fake_original / "modeling_chatglm.py").write_text("import module_that_is_nowhere\n")
    code, _, stderr = run_here(*QUICK, "--parts", "load", "--reference", fake_original)
    assert code == 2
    assert "error: the original's code in --reference ended with exit status 1" in stderr
    assert "module_that_is_nowhere" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--contexts", "4"), "contexts must be 12 or more"),
        (("--contexts", "16", "600"), "at most 506"),
        (("--model", "nowhere"), "no checkpoint in 'nowhere'"),
        (("--device", "abacus"), "no device is called 'abacus'"),
        (("--reference", "nowhere"), "has no modeling_chatglm.py"),
        (("--repeats", "0"), "must be a whole number, 1 or more"),
        (("--row-seconds", "0"), "must be above 0, found '0'"),
        (("--variants", "int5"), "must be one of fp32, fp16, bf16, int8, int4"),
        (("--variants", "int4", "int4"), "'int4' is named twice"),
        (("--variants", "int4", "--quant", "4"), "name its weights in --variants"),
        (("--peer", "llama.cpp"), "must be NAME=COMMAND, found 'llama.cpp'"),
        (("--peer", "llama.cpp=no-such-program -m x"), "there is no program 'no-such-program'"),
        (("--report", "page.md", "nowhere.json"), "cannot read the report 'nowhere.json'"),
    ],
)
def test_impossible_options_are_one_clear_line(run_here, options, message):
    code, _, stderr = run_here(*QUICK, *options)
    assert code == 2
    assert message in stderr.splitlines()[-1]


def test_help_does_not_wait_for_torch():
    code = "from visualglm_tools.__main__ import open_command; open_command('bench')[1].format_help()"
    assert "torch" not in modules_after(code)
    assert "--against" in run_apart("-h").stdout


@pytest.fixture(scope="module", params=["random weights", "the tiny original"])
def model(request, tiny_original):
    if request.param == "the tiny original":
        return load_float32(tiny_original)
    return build_model(TINY, torch.float32, torch.device("cpu")).eval()


@torch.no_grad()
def test_the_yardstick_computes_our_logits_at_every_position_and_step(model):
    prompts, yardstick = Prompts(model, batch=2), OriginalFormulation(model)
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
def test_the_yardstick_rounds_in_half_precision_like_the_original_and_stays_near_ours(dtype):
    model = build_model(TINY, getattr(torch, dtype), torch.device("cpu")).eval()
    prompts, engine = Prompts(model, batch=1), ModelEngine(model)
    found = deviation(engine, OriginalFormulation(model), prompts, context=60)
    assert 0 <= found <= DEVIATIONS[dtype]


def test_a_wrong_yardstick_is_refused():
    with pytest.raises(ValueError, match="its times would say nothing"):
        check_deviation(float("nan"), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_finite_varied_tied_and_in_their_dtype(dtype):
    dtype = getattr(torch, dtype)
    model = build_model(TINY, dtype, torch.device("cpu"))
    parameters = dict(model.named_parameters())
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in parameters.values())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    layer = model.transformer.layers[0]
    assert layer.input_layernorm.weight.float().mean() == pytest.approx(1, abs=0.05)
    assert torch.linalg.matrix_rank(layer.attention.query_key_value.weight.float()) == 64


def test_filling_repeats_the_block_and_cuts_the_last_copy_short():
    filled = fill(torch.empty(2, 4), torch.arange(3.0))
    assert filled.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_shortening_the_decoder_leaves_the_model_alone():
    model = build_model(TINY, torch.float32, torch.device("cpu")).eval()
    stack = ShortStack(model, 1, batch=2, clock=timing.Clock(model.device))
    with torch.no_grad():
        assert stack.start(10) > 0
        assert stack.step() > 0
    assert len(stack.decoder.layers) == 1
    assert stack.cache.get_seq_length() == 11
    assert len(model.transformer.layers) == 3


def test_token_times_leave_out_the_prompt_and_the_first_token():
    streamer = timing.TokenTimes()
    streamer.times = [0.0, 5.0, 5.5, 5.75]
    assert streamer.intervals() == [500, 250]


def test_sampling_ends_when_the_time_is_up_but_never_without_a_sample():
    assert len(timing.collect(lambda: 1.0, repeats=5, warmup=2)) == 5
    assert len(timing.collect(lambda: 1.0, repeats=5, seconds=0)) == 1


# ---------------------------------------------------------------- weights and caches that nobody computed


@pytest.mark.parametrize("bits", [4, 8])
def test_low_bit_models_are_built_without_the_full_weights_and_are_like_quantized_ones(bits):
    built = build_model(TINY, torch.float32, torch.device("cpu"), bits).eval()
    quantized = build_model(TINY, torch.float32, torch.device("cpu")).quantize(bits)
    assert model_figures(built) == model_figures(quantized)
    layers = [module for module in built.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 4 * 3
    assert all(layer.dequantize().std() == pytest.approx(0.02, rel=0.2) for layer in layers)
    prompts = Prompts(built, batch=1)
    with torch.no_grad():
        assert ModelEngine(built).prefill(prompts.ids(20), prompts.image_embeds).isfinite().all()


@pytest.fixture(scope="module")
def tiny() -> VisualGLMForConditionalGeneration:
    return build_model(TINY, torch.float32, torch.device("cpu")).eval()


@torch.no_grad()
def test_a_filled_cache_is_like_that_of_a_prompt_and_goes_on_like_it(tiny):
    prompts = Prompts(tiny, batch=2)
    engine, filled = ModelEngine(tiny), ModelEngine(tiny)
    engine.prefill(prompts.ids(30), prompts.image_embeds)
    filled.fill(2, 30)
    for ours, theirs in zip(filled.cache.layers, engine.cache.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape == ours.values.shape
        assert ours.keys.dtype == theirs.keys.dtype
        assert ours.keys.std() > 0 and not torch.equal(ours.keys, ours.values)
    assert filled.decode(prompts.answered(30)).isfinite().all()
    assert filled.cache.get_seq_length() == 31


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_filled_with_a_prompts_own_states_gives_the_prompts_answer(tiny, kind):
    prompts, engine = Prompts(tiny, batch=2), ModelEngine(tiny)
    engine.prefill(prompts.ids(30), prompts.image_embeds)
    states = [(layer.keys.clone(), layer.values.clone()) for layer in engine.cache.layers]
    options = {"max_cache_len": 40} if kind is StaticCache else {}
    engine.cache = fill_cache(kind(config=tiny.config.text_config, **options), states)
    input_ids = prompts.answered(30)
    whole = tiny(input_ids, image_embeds=prompts.image_embeds, logits_to_keep=1).logits
    settings = {"do_sample": False, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    answer = tiny.generate(input_ids, past_key_values=engine.cache, disable_compile=True, **settings)
    torch.testing.assert_close(answer.logits[0], whole[:, -1], rtol=0, atol=1e-5 * whole.abs().max().item())


@torch.no_grad()
def test_the_states_of_a_filled_cache_differ_from_layer_to_layer(tiny):
    keys = [key for key, _ in random_states(tiny, batch=1, context=10)]
    assert len(keys) == 3
    assert not torch.equal(keys[0], keys[1]) and not torch.equal(keys[1], keys[2])


@torch.no_grad()
def test_every_step_of_a_filled_runner_sees_one_token_more(tiny):
    runner = FilledRunner(ModelEngine(tiny), Prompts(tiny, batch=1), timing.Clock(tiny.device))
    runner.start(30)
    assert all(runner.step() > 0 for _ in range(3))
    assert runner.engine.cache.get_seq_length() == 33
    assert runner.input_ids.shape[1] == 34


# ---------------------------------------------------------------- what is left out


@pytest.fixture
def bench(tiny):
    settings = Settings(row_seconds=100.0, new_tokens=4, repeats=2)
    return Bench(settings, tiny, timing.Clock(tiny.device), known={"prefill": {64: 640.0}})


@torch.no_grad()
def test_the_compiled_step_and_its_cache_are_those_of_generate(bench, monkeypatch):
    calls = []

    def note(*_):
        def compiled(model, **inputs):
            cache = inputs["past_key_values"]
            calls.append((set(inputs), inputs["input_ids"].shape[1], cache.layers[0].max_cache_len))
            return model(**inputs)

        return compiled

    for module in (measurements, generation_visualglm):
        monkeypatch.setattr(module, "compile_call", note)
    found = []
    for path in ("generate, compiled", "forward, compiled"):
        assert len(measurements.measure(bench, Case("decode", 1, 30, path))) == 4
        found.append(calls[-1])
    prompts = bench.prompts(1)
    options = {"image_embeds": prompts.image_embeds, "max_new_tokens": 4, "do_sample": False}
    bench.model.generate(prompts.ids(30), compile=True, **options)
    assert found[0] == found[1]
    assert found[0][1:] == calls[-1][1:] == (1, 256)


@torch.no_grad()
def test_a_recorded_step_is_replayed(bench, monkeypatch):
    graphs = play_graphs(monkeypatch)
    monkeypatch.setattr(measurements, "resolve_compile_config", lambda how, device: how)
    monkeypatch.setattr(measurements, "compile_call", lambda *_: RecordedCall(call_model))
    new_tokens = bench.settings.new_tokens
    for path, replays in (("generate, recorded", new_tokens - 1), ("forward, recorded", new_tokens)):
        assert len(measurements.measure(bench, Case("decode", 1, 30, path))) == new_tokens
        assert graphs[-1].replays >= replays


def test_what_is_compiled_or_recorded_is_measured_through_generate_and_alone():
    settings = Settings(parts=("decode",), contexts=(30,), cache=("dynamic", "recorded"))
    paths = [case.path for case in measurements.list_cases(settings)]
    assert paths == [PRODUCTS, "forward", "generate, dynamic cache", "generate, recorded", "forward, recorded"]


def test_what_does_not_fit_into_the_memory_is_not_tried(bench, monkeypatch):
    monkeypatch.setattr(measurements, "free_memory", lambda device: 2**20)
    reason = measurements.obstacle(bench, Case("decode", 16, 400, "forward"))
    assert reason is not None and "GiB are free" in reason
    assert measurements.obstacle(bench, Case("decode", 1, 20, "forward")) is None


def test_what_would_take_too_long_is_not_tried(bench):
    assert measurements.obstacle(bench, Case("prefill", 1, 400)) is None
    reason = measurements.obstacle(bench, Case("prefill", 64, 400))
    assert reason == "one sample would take about 256 s, --row-seconds is 100"


def test_what_a_prompt_takes_however_short_is_not_multiplied_by_its_length():
    assert measurements.expect({}, 64) == 0
    assert measurements.expect({64: 640.0}, 128) == 1280
    assert measurements.expect({64: 1000.0, 128: 1100.0}, 256) == 1300
    assert measurements.expect({64: 1000.0, 128: 900.0}, 256) == 900


def test_what_was_left_out_is_reported_with_its_reason(run_here, monkeypatch):
    monkeypatch.setattr(measurements, "obstacle", lambda bench, case: "the stars are wrong")
    report = report_of(*run_here(*QUICK, "--parts", "prefill"))
    (variant,) = report["variants"]
    assert variant["rows"] == []
    assert [row["context"] for row in variant["skipped"]] == [16, 40]
    assert "- fp32, prefill, batch 1, 16 tokens: the stars are wrong" in render_run(report)


# ---------------------------------------------------------------- several in one run


def llama_bench(prompt: int, answer: int, depth: int, *samples_ns: int) -> dict:
    """One test as `llama-bench -o json` prints it, without the fields that nobody reads."""
    return {
        "build_commit": "b6099d4",
        "cpu_info": "a processor",
        "model_filename": "/home/somebody/model.gguf",
        "model_type": "chatglm 6B Q4_0",
        "model_size": 3_500_000_000,
        "n_threads": 2,
        "n_prompt": prompt,
        "n_gen": answer,
        "n_depth": depth,
        "avg_ns": sum(samples_ns) // len(samples_ns),
        "samples_ns": list(samples_ns),
    }


@pytest.fixture(scope="module")
def peer_command(tmp_path_factory):
    tests = [llama_bench(16, 0, 0, 2_000_000, 4_000_000), llama_bench(0, 4, 40, 8_000_000), llama_bench(8, 4, 0, 1)]
    program = tmp_path_factory.mktemp("peer") / "peer.py"
    program.write_text(f"import sys\nprint('loading', file=sys.stderr)\nprint({json.dumps(json.dumps(tests))})\n")
    return shlex.join([sys.executable, str(program)])


def test_a_peers_times_are_those_of_a_prompt_and_of_a_token(peer_command):
    result = run_peer(parse_peer(f"llama.cpp Q4_0={peer_command}"))
    assert [(row["part"], row["context"], row["ms"]["median"]) for row in result["rows"]] == [
        ("prefill", 16, 3.0),
        ("decode", 40, 2.0),
    ]
    assert result["rows"][1]["tokens_per_s"] == 500
    assert result["model_gb"] == 3.5
    assert "/" not in json.dumps(result)  # no path of this machine


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such model')", "ended with exit status 1: no such model"),
        ("print('fast enough')", "did not print what `llama-bench -o json` prints"),
        ("print('[]')", "printed no test"),
        ("print('[{}]')", "did not print what `llama-bench -o json` prints"),
    ],
)
def test_a_peer_that_fails_is_one_clear_message(code, message):
    with pytest.raises(ValueError, match="^other") as error:
        run_peer(parse_peer(f"other={shlex.join([sys.executable, '-c', code])}"))
    assert message in str(error.value)


@pytest.fixture(scope="module")
def several(peer_command, tmp_path_factory) -> tuple[int, dict, Path]:
    """Two variants, a peer and one that fails, in one run."""
    saved = tmp_path_factory.mktemp("several") / "run.json"
    failing = shlex.join([sys.executable, "-c", "raise SystemExit('no such model')"])
    peers = ("--peer", f"llama.cpp={peer_command}", "--peer", f"broken={failing}")
    completed = run_apart(*QUICK, "--parts", "decode", "--variants", "fp32", "int4-torch", *peers, "--save", saved)
    return completed.returncode, json.loads(completed.stdout.splitlines()[-1]), saved


def test_variants_and_peers_are_measured_side_by_side(several):
    _, report, _ = several
    assert [variant["name"] for variant in report["variants"]] == ["fp32", "int4-torch"]
    assert all(len(rows_of(variant, "decode")) == 5 for variant in report["variants"])
    assert all(variant["limits"]["read_gb_per_s"] > 0 for variant in report["variants"])
    assert [peer["name"] for peer in report["peers"]] == ["llama.cpp"]
    text = render_run(report)
    assert "time over llama.cpp's" in text
    forward = next(row for row in rows_of(report["variants"][0], "decode") if row["context"] == 40)
    assert f"| {forward['ms']['median'] / 2:.2f} |" in text


def test_who_fails_costs_the_others_nothing(several):
    code, report, _ = several
    assert code == 1
    assert report["failed"] == [{"name": "broken", "message": "broken ended with exit status 1: no such model"}]
    assert "- broken: broken ended with exit status 1: no such model" in render_run(report)


def test_a_saved_report_is_the_printed_one(several):
    _, report, saved = several
    assert read_run(saved) == report
    assert max(map(len, saved.read_text().splitlines())) < 1000


def test_the_samples_of_all_rounds_count():
    def round_of(*samples):
        ms = timing.summarise(samples)
        load = {"how": "built", "s": timing.summarise(samples[:1]), "peak_rss_gib": samples[0]}
        row = {"part": "decode", "path": "forward", "batch": 1, "context": 64, "ms": ms}
        limits = {"read_gb_per_s": samples[0], "gemm_gflop_per_s": 1.0}
        return {"name": "int4", "rows": [row], "load": load, "end": {"peak_rss_gib": None}, "limits": limits}

    pooled = pool([round_of(5.0, 6.0), round_of(1.0, 2.0)])
    assert pooled["rows"][0]["ms"]["samples"] == [5.0, 6.0, 1.0, 2.0]
    assert pooled["load"]["s"]["median"] == 3.0
    assert pooled["load"]["peak_rss_gib"] == pooled["limits"]["read_gb_per_s"] == 5.0


def test_a_variant_is_measured_by_the_settings_of_the_run_but_those_of_several():
    run = RunSettings(contexts=(64, 128), repeats=2, variants=("bf16", "int4-torch=some/folder"), rounds=3)
    assert words(Variant.parse("fp16").settings(run, False)) == words(
        Settings(contexts=(64, 128), repeats=2, dtype="float16")
    )
    variant = Variant.parse("int4-torch=some/folder")
    assert (variant.name, variant.has_kernels) == ("int4-torch of folder", False)
    settings = Settings(contexts=(64, 128), repeats=2, quant=4, model=Path("some/folder"))
    assert variant.settings(run, False) == settings
    assert words(settings) == ["--model", "some/folder", "--quant", "4", "--contexts", "64", "128", "--repeats", "2"]


def test_the_original_is_beside_the_variant_that_is_told_so():
    run = RunSettings(against="formulation", reference=Path("original"), layers=2, variants=("bf16", "int4"))
    beside, alone = (Variant.parse("bf16").settings(run, is_beside) for is_beside in (True, False))
    assert (beside.against, beside.reference, beside.layers) == ("formulation", Path("original"), 2)
    assert (alone.against, alone.reference) == (None, None)


def test_a_published_command_has_no_paths():
    words = ["--model", "/home/me/visualglm", "int4=/data/low", "llama.cpp=/opt/llama-bench -m /data/m.gguf -o json"]
    assert public_command(words) == "--model visualglm int4=low 'llama.cpp=llama-bench -m m.gguf -o json'"


# ---------------------------------------------------------------- growth


def decode_rows(time_of, batch: int = 1) -> list[dict]:
    contexts = (64, 256, 512, 1024, 1536, 1984)
    shared = {"part": "decode", "path": "forward", "batch": batch}
    return [{**shared, "context": context, "ms": {"median": time_of(context)}} for context in contexts]


def test_growth_along_a_line_is_found_and_is_linear():
    rows = decode_rows(lambda context: 900 + 0.02 * context) + decode_rows(lambda context: 1800 + 0.04 * context, 4)
    alone, four = measure_growth(rows)
    assert alone["ms_fixed"] == pytest.approx(900)
    assert alone["ms_per_1000_tokens"] == pytest.approx(20)
    assert alone["bend"] == pytest.approx(0, abs=1e-6)
    assert alone["is_linear_at_most"] and four["is_linear_at_most"]
    assert four["over_batch_1"] == pytest.approx(2)


def test_growth_with_the_square_of_the_context_is_not_linear():
    (growth,) = measure_growth(decode_rows(lambda context: 100 + 1e-4 * context**2))
    assert growth["bend"] == pytest.approx(1e-4 * 1984**2 / (100 + 1e-4 * 1984**2), rel=1e-3)
    assert not growth["is_linear_at_most"]


def test_three_contexts_say_nothing_about_growth():
    assert measure_growth(decode_rows(lambda context: context)[:3]) == []


def test_the_plot_of_growth_is_the_same_every_time(tmp_path):
    variants = [{"name": "int4", "rows": decode_rows(lambda context: 900 + 0.02 * context)}]
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    assert all(plot_growth(variants, "forward", file) for file in files)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not plot_growth(variants, "generate, compiled", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# ---------------------------------------------------------------- the page

DOCS = ROOT / "docs"


def test_the_published_page_is_what_its_files_say():
    files = sorted((DOCS / "benchmarks").glob("*.json"))
    page = render_page(DOCS / "benchmarks" / "page.md", files, DOCS / "benchmarks.md")
    assert page == (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def test_a_page_is_its_template_with_runs_in_place_and_their_growth_drawn(several, tmp_path):
    _, report, _ = several
    report = {**report, "variants": [{**report["variants"][0], "rows": decode_rows(lambda context: 900 + context)}]}
    report["variants"][0]["growth"] = measure_growth(report["variants"][0]["rows"])
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("named", "other"):
        write_run({**report, "title": f"The {name} run"}, folder / f"{name}.json")
    template = folder / "page.md"
    template.write_text("# Title\n\n<!-- run named -->\n\n<!-- other runs -->\n\nThe end.\n")
    files = [folder / "named.json", folder / "other.json"]
    write_page(tmp_path / "page.md", template, files)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.index("![") < text.index("## Other runs\n\n### The other run\n") < text.index("The end.")
    assert "](benchmarks/named.png)" in text and (folder / "named.png").is_file()
    assert "The named run" not in text  # the template has its own heading
    with pytest.raises(ValueError, match=r"wants named\.json, which was not given"):
        render_page(template, files[1:], tmp_path / "page.md")
    template.write_text("# Title\n\n<!-- run named -->\n")
    with pytest.raises(ValueError, match=r"has no place for other\.json"):
        render_page(template, files, tmp_path / "page.md")
