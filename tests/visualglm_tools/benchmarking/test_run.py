"""`visualglm bench`: what a run measures and refuses; the shape and the sanity of its report, never its times."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarking_helpers import QUICK, rows_of, run_apart
from tests.commands import bench, modules_after
from tests.helpers import torch_threads
from visualglm_tools.benchmarking import measurements, timing
from visualglm_tools.benchmarking.report import render_run
from visualglm_tools.benchmarking.run import Variant, pool, pool_reading
from visualglm_tools.benchmarking.settings import RunSettings, Settings
from visualglm_tools.options import words


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

    def run(*options):
        try:
            code = bench(*options)
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    with torch_threads(torch.get_num_threads()):  # a run may change it
        yield run


def report_of(code: int, stdout: str, stderr: str) -> dict:
    assert code == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def is_summary(figures: dict, samples: int) -> bool:
    in_order = 0 < figures["min"] <= figures["median"] <= figures["max"]
    return in_order and figures["n"] == len(figures["samples"]) == samples


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


def test_what_was_left_out_is_reported_with_its_reason(run_here, monkeypatch):
    monkeypatch.setattr(measurements, "obstacle", lambda bench, case: "the stars are wrong")
    report = report_of(*run_here(*QUICK, "--parts", "prefill"))
    (variant,) = report["variants"]
    assert variant["rows"] == []
    assert [row["context"] for row in variant["skipped"]] == [16, 40]
    assert "- fp32, prefill, batch 1, 16 tokens: the stars are wrong" in render_run(report)


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
