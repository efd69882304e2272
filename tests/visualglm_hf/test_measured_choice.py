"""Room: measurements that are remembered. One answer for each question, machine, torch and number of threads."""

import pytest
import torch

from tests.helpers import torch_threads
from visualglm_hf import measured_choice
from visualglm_hf.measured_choice import measure_seconds, recall_choice


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "visualglm_hf" / "ways.json"


def ask(answer: str, what: str = "a product") -> tuple[str, bool]:
    """The answer, and whether it was measured, which would have said `answer`."""
    measured = []
    return recall_choice("ways.json", what, ("one", "two"), lambda: measured.append(answer) or answer), bool(measured)


def test_an_answer_is_measured_once(memory):
    assert ask("one") == ("one", True)
    assert ask("two") == ("one", False)
    assert memory.is_file()


def test_another_question_machine_torch_or_number_of_threads_is_measured_by_itself(monkeypatch):
    assert ask("one") == ("one", True)
    assert ask("two", "attention") == ("two", True)
    with torch_threads(torch.get_num_threads() + 1):
        assert ask("two") == ("two", True)
    monkeypatch.setattr(torch, "__version__", "0")
    assert ask("two") == ("two", True)
    monkeypatch.setattr("platform.node", lambda: "another")
    assert ask("one") == ("one", True)


def test_an_answer_that_nobody_knows_is_measured_again(memory):
    ask("one")
    memory.write_text(memory.read_text().replace('"one"', '"three"'))
    assert ask("two") == ("two", True)
    assert ask("one") == ("two", False)


def test_without_a_home_it_is_measured_each_time(monkeypatch):
    def fail():
        raise RuntimeError("nobody's home")

    monkeypatch.setattr(measured_choice, "find_memory", fail)
    assert ask("one") == ("one", True)
    assert ask("two") == ("two", True)


def test_calls_are_measured_in_turns_and_the_first_ones_do_not_count(monkeypatch):
    now, calls = [0.0], []

    def take(name: str, *seconds: float):
        left = list(seconds)
        return lambda: calls.append(name) or now.append(now[-1] + left.pop(0))

    monkeypatch.setattr(measured_choice.time, "perf_counter", lambda: now[-1])
    monkeypatch.setattr(measured_choice, "REPEATS", 3)
    assert measure_seconds(take("one", 0.5, 3, 2, 4), take("two", 9, 1, 7, 7)) == [2.0, 1.0]
    assert calls == ["one", "two"] * 4
