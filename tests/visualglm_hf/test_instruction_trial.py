"""Room: trials of instructions in a child process, which may die, hang or compute something else, and their memory."""

import json
import platform
import sys

import pytest

from tests.helpers import skip_without_cpu_kernels
from visualglm_hf import instruction_trial
from visualglm_hf.cpu_arithmetic import (
    AMX,
    AMX_FEATURES,
    I8MM,
    amx_obstacle,
    find_matrix_instructions,
    i8mm_obstacle,
)
from visualglm_hf.cpu_language import write_function
from visualglm_hf.cpu_runtime import load_llvm
from visualglm_hf.instruction_trial import (
    Trial,
    ask_permission,
    find_memory,
    read_memory,
    run_trial,
    trial_obstacle,
)


skip_without_cpu_kernels()
HOST = load_llvm().get_host_cpu_name()


def add_two(k, memory):
    memory.store(memory.load() + 2)


def die(k, memory):
    k.call(None, "llvm.trap")


def hang(k, memory):
    with k.loop(1, step=0):
        memory.exchange_add(1, "monotonic")


def make_trial(work, expected: int = 5) -> Trial:
    return Trial("it", write_function("trial", work), "trial", bytes([3, 7]), bytes([expected, 7]))


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """An empty cache folder of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return find_memory()


@pytest.fixture
def trials(monkeypatch) -> list[tuple]:
    """Those that are run, instead of remembered."""
    run = []
    monkeypatch.setattr(instruction_trial, "run_trial", lambda *given: run.append(given) or run_trial(*given))
    return run


def test_instructions_that_work_have_no_obstacle():
    assert run_trial(make_trial(add_two), HOST, {}) is None


def test_a_child_that_dies_is_told_by_its_signal():
    assert run_trial(make_trial(die), HOST, {}) in [
        f"a child process that tried it died of {signal}" for signal in ("SIGILL", "SIGTRAP")
    ]


def test_a_child_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(instruction_trial, "SECONDS", 3.0)
    assert run_trial(make_trial(hang), HOST, {}) == "a child process that tried it did not end in 3 s"


def test_a_result_that_is_wrong_is_an_obstacle():
    assert run_trial(make_trial(add_two, 6), HOST, {}) == "a child process that tried it computed something else"


def test_code_that_the_child_cannot_compile_is_an_obstacle():
    assert (
        run_trial(make_trial(add_two)._replace(code="no code"), HOST, {})
        == "a child process that tried it ended with 1"
    )


def test_without_a_python_to_start_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert run_trial(make_trial(add_two), HOST, {}).startswith("no child process could try it")


@pytest.mark.parametrize(("work", "obstacle"), [(add_two, None), (die, "a child process that tried it died of")])
def test_a_trial_is_made_once_and_remembered(memory, trials, work, obstacle):
    outcomes = {trial_obstacle(make_trial(work), HOST, {"avx": True}) for _ in range(3)}
    assert len(trials) == len(outcomes) == 1
    outcome = outcomes.pop()
    assert outcome is None if obstacle is None else outcome.startswith(obstacle)
    assert list(read_memory(memory).values()) == [outcome or ""]


def test_another_processor_version_or_code_is_tried_anew(memory, trials, monkeypatch):
    trial = make_trial(add_two)
    trial_obstacle(trial, HOST, {"avx": True})
    trial_obstacle(trial, "", {"avx": True})
    trial_obstacle(trial, HOST, {"avx": False})
    trial_obstacle(trial._replace(code=trial.code + "\n"), HOST, {"avx": True})
    monkeypatch.setattr(platform, "release", lambda: "another")
    trial_obstacle(trial, HOST, {"avx": True})
    assert len(trials) == len(read_memory(memory)) == 5


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '{"it": 1}', "\ud800"])
def test_a_damaged_memory_is_written_anew(memory, trials, damaged):
    memory.parent.mkdir()
    memory.write_bytes(damaged.encode("utf-8", "surrogatepass"))
    for _ in range(2):
        assert trial_obstacle(make_trial(add_two), HOST, {}) is None
    assert len(trials) == 1
    assert list(json.loads(memory.read_text()).values()) == [""]


def test_a_memory_that_cannot_be_written_is_done_without(memory, trials):
    memory.parent.write_text("a file where the folder would be")
    for _ in range(2):
        assert trial_obstacle(make_trial(add_two), HOST, {}) is None
    assert len(trials) == 2


def test_what_others_remember_is_kept(memory):
    memory.parent.mkdir()
    memory.write_text('{"theirs": "died"}')
    trial_obstacle(make_trial(add_two), HOST, {})
    assert read_memory(memory)["theirs"] == "died"
    assert [path.name for path in memory.parent.iterdir()] == [memory.name]


def test_nothing_is_tried_on_a_processor_without_the_instructions(memory, trials):
    assert amx_obstacle(HOST, {"avx512bw": True}) == "the processor has none"
    assert i8mm_obstacle(HOST, {"dotprod": True}) == "the processor has none"
    assert not trials


def test_instructions_that_a_processor_says_it_has_are_tried_on_arm_too(memory, trials, monkeypatch):
    monkeypatch.setattr("visualglm_hf.cpu_arithmetic.make_i8mm_trial", lambda: make_trial(die))
    assert "died of" in i8mm_obstacle(HOST, {"i8mm": True})
    monkeypatch.setattr("visualglm_hf.cpu_arithmetic.make_i8mm_trial", lambda: make_trial(add_two))
    assert i8mm_obstacle(HOST, {"i8mm": True}) is None
    assert len(trials) == 2


def test_each_kind_of_processor_has_its_own_matrix_instructions(monkeypatch):
    for machine, arithmetic in (("x86_64", AMX), ("AMD64", AMX), ("aarch64", I8MM), ("arm64", I8MM)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert find_matrix_instructions(HOST, {}) == (arithmetic, "the processor has none")


def test_what_dies_in_the_child_is_not_used(memory, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr("visualglm_hf.cpu_arithmetic.make_amx_trial", lambda: make_trial(die))
    assert "died of" in amx_obstacle(HOST, dict.fromkeys(AMX_FEATURES, True))
    monkeypatch.setattr("visualglm_hf.cpu_arithmetic.make_amx_trial", lambda: make_trial(add_two))
    monkeypatch.setattr("visualglm_hf.cpu_arithmetic.ask_permission", lambda numbers: False)
    assert amx_obstacle(HOST, dict.fromkeys(AMX_FEATURES, True)) == "the system does not permit it"


def test_who_needs_no_permission_asks_for_none():
    assert ask_permission(())
