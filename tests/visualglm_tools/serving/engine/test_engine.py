"""The serving engine: an answer in a batch is the answer alone, and nothing that one client does harms another."""

import asyncio
import itertools
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.commands import SECONDS
from tests.paths import PICTURES, TINY
from tests.picture_files import encoded
from tests.serving_helpers import ENDLESS, sample, wait_until
from visualglm_hf.conversation import clean_response
from visualglm_tools.serving.engine import engine as engine_module
from visualglm_tools.serving.engine.answers import (
    AnswerTimeout,
    Completion,
    EngineClosed,
    EngineError,
    Limits,
    QueueFull,
)
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.sampling import Settings


GREEDY = Settings(temperature=0, repetition_penalty=1)
LONG = Settings(**ENDLESS)


def question(text: str, picture: Path | None = None) -> list[dict]:
    parts = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image", "image": Image.open(picture)})
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def prompts(engine):
    texts = [
        "描述这张图片。",
        "Describe the image.",
        "图里有什么颜色？",
        "What shape is it?",
        "这张图片的背景里有什么内容？",
    ]
    asked = [question(text, picture) for text in texts for picture in PICTURES]
    asked += [question(text) for text in ("你好", "Hello", "描述这张图片。", "a" * 40)]
    return [engine.prepare(messages) for messages in asked]


def alone(loaded, prompt, settings) -> Completion:
    """The answer of an engine that has nothing else to do, and knows no prompt."""
    with Engine(*loaded, Limits(max_batch_size=1, prompt_cache_bytes=0)) as engine:
        return engine.submit(prompt, settings).result(SECONDS)


def refuses(engine) -> bool:
    try:
        engine.check_alive()
    except EngineClosed:
        return True
    return False


def test_greedy_answers_are_those_of_chat(engine, loaded, prompts):
    for text, picture in (("描述这张图片。", PICTURES[0]), ("What shape is it?", PICTURES[1]), ("你好", None)):
        completion = engine.submit(engine.prepare(question(text, picture)), GREEDY).result(SECONDS)
        assert completion.text == chat_alone(loaded, picture, text)
        assert completion.finish_reason == "stop"


@pytest.mark.parametrize("looks", [1, 2])
def test_a_zoomed_answer_is_that_of_chat_beside_others_that_are_not(engine, loaded, small_star, looks):
    model, tokenizer = loaded
    exact = {"do_sample": False, "repetition_penalty": 1.0, "min_length": 0}
    expected, _ = model.chat(tokenizer, small_star, "What color is it?", zoom=looks, **exact)
    data = encoded(small_star, "PNG")
    parts = [{"type": "image", "image": data}, {"type": "text", "text": "What color is it?"}]
    messages = [{"role": "user", "content": parts}]
    asked = [engine.prepare(messages, zoom=looks), engine.prepare(question("描述这张图片。", PICTURES[0]))]
    zoomed, other = [engine.submit(prompt, GREEDY) for prompt in asked]
    assert zoomed.result(SECONDS).text == expected == "White."
    assert other.result(SECONDS).text == chat_alone(loaded, PICTURES[0], "描述这张图片。")


def test_choices_of_one_prompt_look_into_its_picture_once(engine, small_star, monkeypatch):
    looked, original = [], engine_module.zoom_in
    monkeypatch.setattr(engine_module, "zoom_in", lambda *given: looked.append(given) or original(*given))
    parts = [{"type": "image", "image": encoded(small_star, "PNG")}, {"type": "text", "text": "What color is it?"}]
    prompt = engine.prepare([{"role": "user", "content": parts}], zoom=True)
    texts = [answer.result(SECONDS).text for answer in engine.submit_all(prompt, [GREEDY] * 3)]
    assert texts == ["White."] * 3 and len(looked) == 1


def test_without_a_picture_or_with_another_number_a_zoom_is_refused(engine):
    with pytest.raises(ValueError, match="no picture to zoom into"):
        engine.prepare(question("Hello"), zoom=True)
    with pytest.raises(ValueError, match="from 0 to 4, found 9"):
        engine.prepare(question("Hello", PICTURES[0]), zoom=9)


def chat_alone(loaded, picture, text) -> str:
    model, tokenizer = loaded
    image = str(picture) if picture else None
    return model.chat(tokenizer, image, text, history=[], do_sample=False, repetition_penalty=1.0, min_length=0)[0]


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        Settings(temperature=0),
        Settings(seed=5),
        Settings(seed=6, temperature=1.5, top_p=0.95, top_k=0, min_length=60, max_length=75),
    ],
    ids=["greedy", "penalty", "defaults", "hot"],
)
def test_every_answer_in_a_batch_is_the_answer_alone(engine, prompts, settings):
    alone = [engine.submit(prompt, settings).result(SECONDS) for prompt in prompts]
    together = [engine.submit(prompt, settings) for prompt in prompts]
    assert [answer.result(SECONDS) for answer in together] == alone


def test_every_answer_in_a_batch_is_the_answer_alone_with_low_bits_too(prompts):
    with Engine.load(TINY, device="cpu", dtype="float32", quant=4) as engine:
        alone = [engine.submit(prompt, GREEDY).result(SECONDS) for prompt in prompts]
        together = [engine.submit(prompt, GREEDY) for prompt in prompts]
        assert [answer.result(SECONDS) for answer in together] == alone


def test_different_settings_share_a_batch_and_rows_that_join_late_change_nothing(engine, prompts):
    choice = random.Random(0)
    settings = [
        Settings(
            seed=seed,
            temperature=choice.choice((0, 0.5, 1.5)),
            top_p=choice.choice((0.4, 1)),
            repetition_penalty=choice.choice((1, 1.2)),
            max_new_tokens=choice.choice((1, 5, 40)),
            stop=choice.choice(((), ("的", "circle"))),
        )
        for seed in range(len(prompts))
    ]
    alone = [engine.submit(*pair).result(SECONDS) for pair in zip(prompts, settings, strict=True)]
    answers = []
    for pair in zip(prompts, settings, strict=True):
        answers.append(engine.submit(*pair))
        time.sleep(choice.random() * 0.01)
    assert [answer.result(SECONDS) for answer in answers] == alone


@pytest.mark.parametrize("seed", range(6))
def test_a_seeded_answer_is_what_generate_samples_with_this_seed(engine, loaded, prompts, seed):
    model, tokenizer = loaded
    prompt = prompts[-1]
    torch.manual_seed(seed)
    input_ids = torch.tensor([prompt.token_ids])
    unknown = list(range(len(tokenizer), model.config.text_config.vocab_size))
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=True,
        temperature=1.7,
        top_k=50,
        top_p=0.9,
        repetition_penalty=1.3,
        max_new_tokens=30,
        suppress_tokens=unknown,
    )
    expected = clean_response(tokenizer.decode(output[0, input_ids.shape[1] :]))
    settings = Settings(temperature=1.7, top_k=50, top_p=0.9, repetition_penalty=1.3, max_new_tokens=30, seed=seed)
    assert engine.submit(prompt, settings).result(SECONDS).text == expected


def test_a_stream_grows_and_ends_with_the_answer(engine, prompts):
    """Who reads late sees the latest text alone: how many texts a short answer shows is up to the machine."""
    answer = engine.submit(prompts[0], LONG)
    texts = list(itertools.islice(answer, 6))
    assert not answer.future.done()  # they came while it grew
    answer.cancel()
    texts += answer
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
    assert texts[-1] == answer.result(SECONDS).text
    whole = engine.submit(prompts[0], GREEDY)
    assert list(whole)[-1] == whole.result(SECONDS).text


def test_coroutines_stream_without_blocking_their_loop(engine, prompts):
    async def consume(answer):
        return [text async for text in answer][-1], await answer.completion()

    async def consume_all():
        return await asyncio.gather(*(consume(engine.submit(prompt, GREEDY)) for prompt in prompts))

    for text, completion in asyncio.run(consume_all()):
        assert text == completion.text


def test_stop_texts_end_an_answer_before_them(engine, prompts):
    whole = engine.submit(prompts[0], GREEDY).result(SECONDS).text
    answer = engine.submit(prompts[0], Settings(temperature=0, repetition_penalty=1, stop=["没有的", whole[5:7]]))
    texts, completion = list(answer), answer.result(SECONDS)
    assert completion.text == whole[: whole.index(whole[5:7])] == texts[-1]
    assert completion.finish_reason == "stop"
    assert completion.completion_tokens < len(whole)


def test_lengths_end_an_answer(engine, prompts):
    length = len(prompts[0].token_ids)
    for settings in (Settings(temperature=0, max_new_tokens=3), Settings(temperature=0, max_length=length + 3)):
        completion = engine.submit(prompts[0], settings).result(SECONDS)
        assert (completion.finish_reason, completion.completion_tokens) == ("length", 3)
        assert completion.prompt_tokens == length


def test_a_cancelled_answer_stops_within_one_token(engine, prompts):
    answer, lengths = engine.submit(prompts[0], LONG), []
    others = [engine.submit(prompt, GREEDY) for prompt in prompts[:3]]
    publish = answer.publish

    def publish_and_leave_at_the_tenth(text):  # in the step of a token
        publish(text)
        lengths.append(text)
        if len(lengths) == 10:
            answer.cancel()

    answer.publish = publish_and_leave_at_the_tenth
    answer.is_watched = True
    completion = answer.result(SECONDS)
    assert completion.finish_reason == "cancelled" and completion.text.startswith(lengths[-1])
    assert len(lengths) == 10 and completion.completion_tokens <= 12  # it may have been watched from its second on
    assert [other.result(SECONDS).finish_reason for other in others] == ["stop"] * 3


def test_a_cancelled_answer_that_waits_never_starts(loaded, prompts):
    with Engine(*loaded, Limits(max_batch_size=1)) as engine:
        first, second = engine.submit_all(prompts[0], [LONG, LONG])
        second.cancel()
        assert second.result(0) == Completion("", "cancelled", len(prompts[0].token_ids), 0)
        first.cancel()
        assert first.result(SECONDS).finish_reason == "cancelled"


def test_an_answer_that_waits_too_long_is_a_timeout_whether_it_waits_or_runs(loaded, prompts):
    limits = Limits(max_batch_size=1, timeout=0.2)
    with Engine(*loaded, limits) as engine:
        answers = [engine.submit(prompts[0], LONG) for _ in range(3)]
        for answer in answers:
            with pytest.raises(AnswerTimeout, match="0.2 s"):
                answer.result(SECONDS)
        assert sample(engine, "requests_total", outcome="timeout") == 3
        [patient] = engine.submit_all(prompts[0], [GREEDY], asked_at=time.monotonic() + SECONDS)
        assert patient.result(SECONDS).finish_reason == "stop"


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(loaded, prompts):
    limits = Limits(max_batch_size=2, max_waiting=1)
    with Engine(*loaded, limits) as engine:
        answers = [engine.submit(prompts[0], LONG) for _ in range(3)]
        with pytest.raises(QueueFull, match="waiting") as refusal:
            engine.submit(prompts[0], GREEDY)
        assert not any(answer.future.done() for answer in answers)  # it did not wait for them
        assert 1 <= refusal.value.retry_after <= 60
        for answer in answers:
            answer.cancel()
        wait_until(lambda: all(answer.future.done() for answer in answers))
        assert engine.submit(prompts[0], GREEDY).result(SECONDS).finish_reason == "stop"


def test_several_choices_are_taken_together_or_not_at_all(loaded, prompts):
    limits = Limits(max_batch_size=1, max_waiting=1)
    with Engine(*loaded, limits) as engine:
        with pytest.raises(QueueFull):
            engine.submit_all(prompts[0], [GREEDY] * 3)
        answers = engine.submit_all(prompts[0], [GREEDY] * 2)
        assert answers[0].result(SECONDS) == answers[1].result(SECONDS)


def test_closing_drains_and_refuses(loaded, prompts):
    engine = Engine(*loaded)
    answers = [engine.submit(prompt, GREEDY) for prompt in prompts]
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: refuses(engine))
    with pytest.raises(EngineClosed, match="shutting down"):
        engine.submit(prompts[0])
    closing.join(SECONDS)
    assert all(answer.future.done() and answer.result().finish_reason == "stop" for answer in answers)


def test_closing_without_draining_cancels(loaded, prompts):
    engine = Engine(*loaded, Limits(max_batch_size=2))
    answers = [engine.submit(prompts[0], LONG) for _ in range(4)]
    engine.close(drain=False)
    assert [answer.result().finish_reason for answer in answers] == ["cancelled"] * 4


def test_an_error_of_the_model_fails_its_requests_and_the_engine_lives(loaded, prompts, monkeypatch):
    model = loaded[0]
    with Engine(*loaded) as engine:
        monkeypatch.setattr(model, "generate", lambda **kwargs: torch.empty(-1))
        with pytest.raises(EngineError, match="negative"):
            engine.submit(prompts[0], GREEDY).result(SECONDS)
        monkeypatch.undo()
        assert engine.submit(prompts[0], GREEDY).result(SECONDS).finish_reason == "stop"


def test_nan_is_an_error_of_its_row_alone(loaded, prompts, monkeypatch):
    model = loaded[0]
    forward = model.lm_head.forward

    def spoil_first_row(states):
        logits = forward(states)
        logits[0] = torch.nan
        return logits

    with Engine(*loaded) as engine:
        expected = engine.submit(prompts[1], GREEDY).result(SECONDS)
        monkeypatch.setattr(model.lm_head, "forward", spoil_first_row)
        bad, good = engine.submit_all(prompts[1], [GREEDY, GREEDY])
        with pytest.raises(ValueError, match="NaN"):
            bad.result(SECONDS)
        assert good.future.exception(SECONDS) is not None or good.result() == expected


def test_a_picture_is_encoded_once_for_all_who_ask_about_it(loaded):
    loaded[0].image_cache.clear()  # another test may have shown this picture
    with Engine(*loaded) as engine:
        answers = []
        for text in ("描述这张图片。", "What shape is it?"):
            answers += engine.submit_all(engine.prepare(question(text, PICTURES[0])), [GREEDY] * 2)
        assert all(answer.result(SECONDS).text for answer in answers)
        assert sample(engine, "encoded_pictures_total") == 1


def test_the_same_prompt_is_read_once_for_all_who_ask_it_together_or_after_one_another(loaded, prompts):
    with Engine(*loaded) as engine:
        for prompt in (prompts[0], prompts[-1]):
            choices = engine.submit_all(prompt, [GREEDY, GREEDY, Settings(seed=3)])
            first, again, sampled = [choice.result(SECONDS) for choice in choices]
            retried = engine.submit(prompt, GREEDY).result(SECONDS)
            assert first == again == retried == alone(loaded, prompt, GREEDY)
            assert sampled == alone(loaded, prompt, Settings(seed=3))
        assert sample(engine, "read_prompts_total") == 2


def test_the_same_question_about_another_picture_is_another_prompt(loaded):
    asked = [[question("描述这张图片。", picture)] for picture in PICTURES]
    with Engine(*loaded) as engine:
        prompts = [engine.prepare(*messages) for messages in asked]
        answers = [engine.submit(prompt, GREEDY).result(SECONDS) for prompt in prompts + prompts]
        assert sample(engine, "read_prompts_total") == len(PICTURES)
    assert answers == [alone(loaded, prompt, GREEDY) for prompt in prompts + prompts]


def test_prompts_are_remembered_up_to_a_number_of_bytes_the_latest_longest(loaded, prompts):
    model, tokenizer = loaded
    config = model.config.text_config
    bytes_per_token = 2 * 4 * config.hidden_size * config.num_hidden_layers
    most = bytes_per_token * max(len(prompt.token_ids) for prompt in prompts[:3])
    with Engine(model, tokenizer, Limits(prompt_cache_bytes=2 * most)) as engine:
        for index in (0, 1, 0, 2, 0, 1):  # the third takes the second's place
            engine.submit(prompts[index], Settings(max_new_tokens=1)).result(SECONDS)
        assert sample(engine, "read_prompts_total") == 4
    with Engine(model, tokenizer, Limits(prompt_cache_bytes=0)) as engine:
        for _ in range(2):
            engine.submit(prompts[0], Settings(max_new_tokens=1)).result(SECONDS)
        assert sample(engine, "read_prompts_total") == 2


def test_settings_beyond_the_servers_limits_are_refused(loaded, prompts):
    with Engine(*loaded, Limits(max_new_tokens=10)) as engine:
        with pytest.raises(ValueError, match="at most 10"):
            engine.submit(prompts[0], Settings(max_new_tokens=11))
        with pytest.raises(ValueError, match="no room"):
            engine.submit(prompts[0], Settings(max_length=5))
        assert engine.submit(prompts[0], LONG).result(SECONDS).completion_tokens == 10
