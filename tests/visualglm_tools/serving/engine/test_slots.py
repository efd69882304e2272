"""Recorded batches: each answer is the answer alone, and few graphs serve all of them."""

import random

import pytest

from tests.commands import SECONDS
from tests.fake_graphs import RECORD, play_recorded_steps
from tests.helpers import load_float32
from tests.paths import TINY
from tests.serving_helpers import ENDLESS, wait_until
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer
from visualglm_tools.commands import serve, web
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.engine.slots import count_places


GREEDY = Settings(temperature=0, repetition_penalty=1)
TEXTS = ("你好", "Hello", "图里有什么颜色？", "What shape is it?", "a" * 40, "描述这张图片。")


@pytest.fixture(scope="module")
def loaded():
    return load_float32(TINY), ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def asked(loaded) -> list[tuple]:
    """Prompts and settings of all kinds."""
    choice = random.Random(0)
    with Engine(*loaded) as engine:
        prompts = [engine.prepare([{"role": "user", "content": text}]) for text in TEXTS]
    return [
        (
            prompt,
            Settings(
                seed=seed,
                temperature=choice.choice((0, 1.5)),
                min_length=len(prompt.token_ids) + choice.choice((0, 20, 60)),
                max_new_tokens=choice.choice((8, 40, 70)),
            ),
        )
        for seed, prompt in enumerate(prompts * 2)
    ]


def test_the_places_of_rows_are_powers_of_two_and_no_more_than_there_may_be_rows():
    assert [count_places(rows, 16) for rows in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert [count_places(rows, 5) for rows in range(1, 6)] == [1, 2, 4, 4, 5]


def test_answers_of_a_recorded_batch_are_the_answers_alone_whoever_joins_or_leaves(loaded, asked, monkeypatch):
    with Engine(*loaded) as engine:
        alone = [engine.submit(*each).result(SECONDS) for each in asked]
    graphs = play_recorded_steps(monkeypatch)
    with Engine(*loaded, Limits(max_batch_size=5), compile=RECORD) as engine:
        answers = [engine.submit(*each) for each in asked]
        assert [answer.result(SECONDS) for answer in answers] == alone
        replays = sum(graph.replays for graph in graphs)
        assert replays > 2 * len(graphs)
        again = [engine.submit(*each).result(SECONDS) for each in asked]  # one after another
        assert again == alone
    assert sum(graph.replays for graph in graphs) > replays


def test_an_answer_longer_than_its_cache_goes_on_in_a_longer_one(loaded, asked, monkeypatch):
    settings = Settings(**ENDLESS, max_new_tokens=400)
    with Engine(*loaded) as engine:
        alone = engine.submit(asked[0][0], settings).result(SECONDS)
    graphs = play_recorded_steps(monkeypatch)
    with Engine(*loaded, compile=RECORD) as engine:
        assert engine.submit(asked[0][0], settings).result(SECONDS) == alone
    assert [graph.replays > 100 for graph in graphs] == [True, True]


def test_when_nobody_is_answered_no_cache_is_kept(loaded, asked, monkeypatch):
    play_recorded_steps(monkeypatch)
    with Engine(*loaded, compile=RECORD) as engine:
        engine.submit(*asked[0]).result(SECONDS)
        wait_until(lambda: engine._slots.batch is None)


def test_a_step_that_cannot_be_recorded_here_is_refused_when_the_engine_begins(loaded):
    with pytest.raises(ValueError, match="CUDA"):
        Engine(*loaded, compile=RECORD)


@pytest.mark.parametrize("door", [serve, web])
def test_the_doors_refuse_to_record_on_a_cpu_before_anything_is_loaded(door):
    with pytest.raises(ValueError, match="--record is for an NVIDIA GPU, and the model will be on 'cpu'"):
        door.run(door.Options(speed_up="record", device="cpu", port=0))


@pytest.mark.gpu
def test_on_a_gpu_recorded_answers_are_the_answers_alone():
    model, tokenizer = load_float32(TINY).cuda(), ChatGLMTokenizer.from_pretrained(TINY)
    with Engine(model, tokenizer) as engine:
        prompts = [engine.prepare([{"role": "user", "content": text}]) for text in TEXTS]
        alone = [engine.submit(prompt, GREEDY).result(SECONDS) for prompt in prompts]
    with Engine(model, tokenizer, compile=RECORD) as engine:
        answers = [engine.submit(prompt, GREEDY) for prompt in prompts]
        assert [answer.result(SECONDS) for answer in answers] == alone
