"""The bar of a long prompt: where somebody sees it, for as long as it is of use, and without a trace in the answer."""

import io
import os
import sys

import pytest

from tests.paths import PICTURES, ROOT
from visualglm_tools import prompt_bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def hooks_of(model) -> int:
    return sum(len(layer._forward_hooks) for layer in model.get_decoder().layers)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(prompt_bar, "PATIENCE", 0.0)


@pytest.fixture
def others(model) -> int:
    """How many hooks there are without the bar: transformers records states with some, once it was asked to."""
    return hooks_of(model)


def test_where_nobody_sees_it_there_is_none(model, others, at_once, capsys):
    with prompt_bar.prompt_bar(model) as end:
        assert hooks_of(model) == others
        end()
    assert capsys.readouterr().err == ""


def test_it_counts_the_layers_and_leaves_none_behind(model, others, tokenizer, pictures, at_once, monkeypatch):
    expected, _ = model.chat(tokenizer, pictures[0], "描述这张图片。", do_sample=False, max_length=80)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with prompt_bar.prompt_bar(model) as end:
        assert hooks_of(model) == others + len(model.get_decoder().layers)
        stream = model.stream_chat(tokenizer, pictures[0], "描述这张图片。", do_sample=False, max_length=80)
        texts = []
        for text, _ in stream:
            end()
            assert hooks_of(model) == others
            texts.append(text)
    assert texts[-1] == expected
    count = len(model.get_decoder().layers)
    assert "reading" in screen.getvalue() and f"0/{count}" in screen.getvalue()


def test_one_that_comes_to_nothing_is_taken_away_too(model, others, at_once, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen())
    with pytest.raises(ValueError, match="nothing"), prompt_bar.prompt_bar(model):
        raise ValueError("nothing")
    assert hooks_of(model) == others


def test_in_a_terminal_the_answer_follows_it():
    pexpect = pytest.importorskip("pexpect")
    program = f"""
from visualglm_tools import prompt_bar
from visualglm_tools.__main__ import main

prompt_bar.PATIENCE = 0.0
main(["chat", "--greedy", "--device", "cpu", "--image", {str(PICTURES[1])!r}])
"""
    environment = {**os.environ, "TERM": "xterm", "LANG": "C.UTF-8"}
    child = pexpect.spawn(
        sys.executable, ["-c", program], cwd=str(ROOT), env=environment, encoding="utf-8", timeout=300
    )
    child.expect("reading: ")
    child.expect("VisualGLM：图片中有两个红色的圆形，背景是草地。")
    child.sendline("stop")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
