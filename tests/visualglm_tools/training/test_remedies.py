"""Too little memory: which options are named, by how much they help, and that they do."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.paths import TINY
from tests.training_helpers import At, run_out_of_memory, short_run, silent
from visualglm_hf import VisualGLMConfig
from visualglm_tools.options import parse
from visualglm_tools.training import remedies
from visualglm_tools.training.memory import estimate_most
from visualglm_tools.training.remedies import Lengths, describe_remedies, step_of
from visualglm_tools.training.run import finetune
from visualglm_tools.training.settings import Settings


LENGTHS = Lengths(longest=64 + 256, answer=256)
EXAMPLE = SimpleNamespace(input_ids=[0] * 9, target_length=5)


def allocate_on_the_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def run_out_of_pythons_memory() -> None:
    raise MemoryError


@pytest.fixture
def settings(tmp_path):
    return short_run(tmp_path / "out", keep="self", keep_questions=2, batch_size=8)


def test_a_run_that_has_too_little_memory_ends_with_the_options_that_help_and_how_much(settings):
    with pytest.raises(ValueError, match="The memory of the device is too small: CUDA out of memory") as caught:
        finetune(settings, silent, [At(0, run_out_of_memory)])
    [line] = str(caught.value).splitlines()
    assert re.search(r"Tried to allocate 9 GiB. A step takes \d+ MB, computed\.", line)
    for option in ("--checkpoint-activations", "--batch-size 1 --gradient-accumulation-steps 8", "--bf16"):
        assert re.search(rf"{option} takes \d+ MB less", line)


@pytest.mark.parametrize(
    ("fail", "said"),
    [(allocate_on_the_cpu, "DefaultCPUAllocator"), (run_out_of_pythons_memory, "MemoryError")],
    ids=["torch", "Python"],
)
def test_too_little_memory_of_a_cpu_is_the_same_error(fail, said, settings, monkeypatch):
    monkeypatch.setattr(remedies, "describe_remedies", lambda *step: "Take less.")
    explained = remedies.explained_memory(settings, None, [EXAMPLE], torch.device("cpu"))
    with pytest.raises(ValueError, match=f"too small: .*{said}.* Take less.$"), explained:
        fail()


def test_another_error_stays_what_it_is(settings):
    def fail():
        raise RuntimeError("something else")

    explained = remedies.explained_memory(settings, None, [EXAMPLE], torch.device("cpu"))
    with pytest.raises(RuntimeError, match="^something else$"), explained:
        fail()


def test_where_kept_rows_take_the_most_fewer_of_them_are_advised():
    config = VisualGLMConfig.from_pretrained(TINY)
    settings, _ = Settings(method="lora", batch_size=1, keep_rows=32).resolved(4, False, 128)
    said = describe_remedies(settings, config, LENGTHS, on_gpu=False)
    first, second, *_ = said.partition("computed. ")[2].split("; ")
    assert {re.sub(r" takes [\d.]+ .B less", "", each) for each in (first, second)} == {"--keep none", "--keep-rows 1"}


@pytest.mark.slow
def test_at_full_size_the_best_remedy_is_the_first_and_takes_what_the_table_says():
    settings, _ = Settings(method="lora", precision="float16").resolved(28, True)
    said = describe_remedies(settings, VisualGLMConfig(), LENGTHS, on_gpu=True)
    first, *_ = said.removeprefix("A step takes 21.29 GB, computed. ").split("; ")
    assert first == "--use_qlora takes 8.15 GB less"
    assert "--checkpoint-activations takes 4.31 GB less" in said  # of 21.29, which leaves 16.98


@pytest.mark.parametrize("method", ["lora", "qlora", "ptuning"])
def test_each_remedy_is_an_option_and_none_is_named_that_is_used_already(method):
    config = VisualGLMConfig.from_pretrained(TINY)
    settings, _ = Settings(method=method, batch_size=4, gradient_accumulation_steps=1).resolved(4, False)
    total = estimate_most(config, step_of(settings, config, LENGTHS)).total
    named = {}
    for text, changed, lengths in remedies.remedies(settings, LENGTHS, on_gpu=False):
        named[text] = total - estimate_most(config, step_of(changed, config, lengths)).total
        given = parse(Settings, text.split(), "visualglm finetune", "")
        assert given != Settings() and given.keep != "self"
    assert {text for text, saved in named.items() if saved > 0} - {"--keep-rows 1", "--keep none"}
    assert ("--use_qlora" in named) == (method != "qlora")
    assert ("--checkpoint-activations" in named) == (method != "ptuning")
    least = replace(settings, method="qlora", checkpoint_activations=True, batch_size=1, keep="none", bits=4)
    named = [text for text, *_ in remedies.remedies(replace(least, precision="bfloat16"), Lengths(40, 4), False)]
    assert named == []


def test_a_shortage_is_said_before_training_begins(settings, monkeypatch):
    monkeypatch.setattr(remedies, "free_memory", lambda device: 10e6)
    monkeypatch.setattr(remedies, "describe_remedies", lambda *step: "Take less.")
    said = []
    finetune(replace(settings, train_iters=1, batch_size=15, keep="none"), said.append)
    [warning] = [line for line in said if line.startswith("Training takes")]
    assert re.fullmatch(r"Training takes \d+ MB beside the weights, and 10 MB are free. Take less.", warning)
    assert said.index(warning) < [line.startswith("step 1 of 1") for line in said].index(True)


def test_kept_rows_that_are_longer_than_what_is_learned_are_counted(settings, model, monkeypatch):
    config = VisualGLMConfig.from_pretrained(TINY)
    settings, _ = settings.resolved(4, False)
    long = SimpleNamespace(input_ids=[0] * 300, target_length=256)
    lengths = remedies.lengths_of([EXAMPLE], settings, [long])
    assert lengths == Lengths(9, 5, 300, 256) and lengths.with_answers_of(128) == Lengths(9, 5, 172, 128)
    needed = estimate_most(config, step_of(settings, config, lengths))
    monkeypatch.setattr(remedies, "SMALL_PART", 0)
    monkeypatch.setattr(remedies, "free_memory", lambda device: 0.9 * (needed.total - needed.weights))
    assert remedies.foresee_memory(settings, config, [EXAMPLE], model) is None
    said = remedies.foresee_memory(settings, config, [EXAMPLE], model, [long])
    assert said.startswith("Training takes") and "--max_target_length 128 takes" in said


@pytest.mark.parametrize("free", [1e9, 30e6], ids=["as anybody can see", "by what is computed"])
def test_where_there_is_enough_memory_nothing_is_said(free, settings, monkeypatch, model):
    monkeypatch.setattr(remedies, "free_memory", lambda device: free)
    config = VisualGLMConfig.from_pretrained(TINY)
    settings, _ = settings.resolved(4, False)
    assert remedies.foresee_memory(settings, config, [EXAMPLE], model) is None
