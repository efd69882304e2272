"""Settings of an answer, what they do to the model's scores, and how likely the tokens were."""

import pytest
import torch

from tests.commands import SECONDS
from tests.paths import PICTURES
from visualglm_tools.serving.engine.sampling import Biases, OpenAIPenalties, Settings


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"max_length": 0},
        {"min_length": -1},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": [""]},
        {"stop": "text"},
        {"stop": ["a"] * 17},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {1: 101}},
        {"top_logprobs": 21},
    ],
)
def test_bad_settings_are_refused_with_their_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Settings(**values)


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0), (0, 0.7), (-2, 2)])
def test_penalties_are_openais_sum_over_the_tokens_of_the_answer(presence, frequency):
    scores = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    prompt, answer = [1, 2, 3, 3], [3, 5, 5, 5, 7]
    expected = scores.clone()
    for token in range(20):
        count = answer.count(token)
        expected[0, token] -= count * frequency + (count > 0) * presence
    found = OpenAIPenalties(presence, frequency, len(prompt))(torch.tensor([[*prompt, *answer]]), scores)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(OpenAIPenalties(presence, frequency, 4)(torch.tensor([prompt]), scores), scores)


def test_a_bias_is_added_to_its_tokens_alone():
    scores = torch.zeros(1, 5)
    found = Biases({1: 2.5, 4: -100.0}, torch.device("cpu"))(torch.tensor([[0]]), scores)
    assert found.tolist() == [[0, 2.5, 0, 0, -100]] and not scores.any()


def test_a_bias_brings_a_token_into_the_answer_and_keeps_another_out(engine):
    prompt = engine.prepare([{"role": "user", "content": "Hello"}])
    plain = Settings(temperature=0, repetition_penalty=1)
    usual = engine.submit(prompt, plain).result(SECONDS)
    assert "Hello" in usual.text
    hello = engine.vocabulary.token_ids("Hello")
    assert len(hello) == 2  # with and without a blank before it
    without = Settings(temperature=0, repetition_penalty=1, logit_bias=dict.fromkeys(hello, -100))
    assert "Hello" not in engine.submit(prompt, without).result(SECONDS).text
    [wanted, *_] = engine.vocabulary.token_ids("红色")
    only = Settings(temperature=0, repetition_penalty=1, logit_bias={wanted: 100}, max_new_tokens=3)
    assert engine.submit(prompt, only).result(SECONDS).text == "红色红色红色"


def test_penalties_end_a_repetition(engine):
    prompt = engine.prepare([{"role": "user", "content": "Hello"}])
    [wanted, *_] = engine.vocabulary.token_ids("红色")
    often = {"temperature": 0, "repetition_penalty": 1, "logit_bias": {wanted: 40}, "max_new_tokens": 40}
    count = {}
    for penalty in (0, 2):
        completion = engine.submit(prompt, Settings(**often, frequency_penalty=penalty)).result(SECONDS)
        count[penalty] = completion.text.count("红色")
    assert count[0] == 40 and 2 <= count[2] < 20


@pytest.mark.parametrize("picture", [None, PICTURES[0]], ids=["text", "picture"])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 1, "temperature": 1.7, "top_p": 0.9, "presence_penalty": 1, "logit_bias": {700: 5.0}},
    ],
    ids=["greedy", "sampled"],
)
def test_log_probabilities_are_those_of_a_forward_pass_whatever_the_settings(engine, loaded, picture, settings):
    model, tokenizer = loaded
    parts = [{"type": "image", "image": picture.read_bytes()}] if picture else []
    prompt = engine.prepare([{"role": "user", "content": [*parts, {"type": "text", "text": "Hello"}]}])
    beside = engine.submit(prompt, Settings(seed=2))
    limited = Settings(**settings, top_logprobs=3, min_new_tokens=20, max_new_tokens=20)
    completion = engine.submit(prompt, limited).result(SECONDS)
    beside.result(SECONDS)
    tokens = [each.token_id for each in completion.logprobs]
    assert len(tokens) == 20
    with torch.no_grad():
        whole = torch.tensor([[*prompt.token_ids, *tokens]])
        logits = model(input_ids=whole, pixel_values=prompt.pixel_values).logits[0, len(prompt.token_ids) - 1 : -1]
    expected = logits[:, : len(tokenizer)].log_softmax(dim=-1)
    for row, found in zip(expected, completion.logprobs, strict=True):
        assert found.logprob == pytest.approx(row[found.token_id].item(), abs=1e-4)
        top = row.topk(3)
        assert [value for _, value in found.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert [row[token].item() for token, _ in found.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_log_probabilities_are_of_the_tokens_of_the_text_alone(engine):
    prompt = engine.prepare([{"role": "user", "content": "你好"}])
    exact = {"temperature": 0, "repetition_penalty": 1, "top_logprobs": 0}
    whole = engine.submit(prompt, Settings(**exact)).result(SECONDS)
    assert len(whole.logprobs) == whole.completion_tokens - 1  # not the end
    stopped = engine.submit(prompt, Settings(**exact, stop=["！"])).result(SECONDS)
    assert stopped.text == "你好"
    assert engine.vocabulary.text_of([each.token_id for each in stopped.logprobs]) == "你好"
    assert engine.submit(prompt, Settings(temperature=0)).result(SECONDS).logprobs == ()
