"""What is measured, how, and what is left out."""

import pytest
import torch

from tests.fake_graphs import play_graphs
from visualglm_hf import generation_visualglm
from visualglm_hf.compilation import RecordedCall, call_model
from visualglm_tools.benchmarking import measurements, timing
from visualglm_tools.benchmarking.measurements import PRODUCTS, Bench, Case
from visualglm_tools.benchmarking.settings import Settings


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
