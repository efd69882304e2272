"""Room: decoder's hooks for `generate`. Every standard mode, and what must not change under them."""

import copy
import threading

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList, TextIteratorStreamer

from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error
from tests.paths import CIRCLES, TINY
from visualglm_hf import (
    ChatGLMTokenizer,
    VisualGLMForConditionalGeneration,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
)
from visualglm_hf.modeling_visualglm import build_glm_position_ids


@pytest.fixture(scope="module")
def greedy(model, described):
    return model.generate(**described, max_new_tokens=24, do_sample=False)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0},
        {"stop_strings": ["描述图片的背景"]},
    ],
    ids=str,
)
def test_mode_gives_the_greedy_answer(model, described, greedy, tokenizer, options):
    output = model.generate(**described, max_new_tokens=24, do_sample=False, tokenizer=tokenizer, **options)
    assert torch.equal(output, greedy)


@pytest.fixture(scope="module")
def trained():
    """The tiny model that was trained to talk about shapes, its tokenizer and one of its pictures."""
    model = load_float32(TINY)
    picture = Image.open(CIRCLES)
    return model, ChatGLMTokenizer.from_pretrained(TINY), picture


@pytest.fixture
def steps(trained):
    """Grows by one each time that the trained model computes logits."""
    steps = []
    hook = trained[0].lm_head.register_forward_pre_hook(lambda module, inputs: steps.append(1))
    yield steps
    hook.remove()


def build_inputs(tokenizer, picture, text: str):
    processor = VisualGLMProcessor(VisualGLMImageProcessor(), tokenizer)
    return processor(text=f"<img>{processor.image_token}</img>{text}", images=picture, return_tensors="pt")


def build_smaller(model):
    """An untrained model of another width, but with the same vocabulary."""
    config = copy.deepcopy(model.config)
    config.text_config.hidden_size, config.text_config.num_attention_heads = 32, 2
    config.text_config.num_hidden_layers = 2
    return VisualGLMForConditionalGeneration(config).eval()


def test_prompt_lookup_says_what_was_said_before_in_fewer_steps(trained, steps):
    model, tokenizer, picture = trained
    options = {"do_sample": False, "min_length": 0, "repetition_penalty": 1.0}
    answer, history = model.chat(tokenizer, picture, "描述这张图片。", **options)
    steps.clear()
    expected, _ = model.chat(tokenizer, "描述这张图片。", history=history, **options)
    plain = len(steps)
    steps.clear()
    response, _ = model.chat(tokenizer, "描述这张图片。", history=history, prompt_lookup_num_tokens=4, **options)
    assert response == expected == answer
    assert len(steps) <= plain // 2


@pytest.mark.parametrize("quantize", [False, True])
def test_an_assistant_gives_the_greedy_answer_about_a_picture_in_fewer_steps(trained, steps, quantize):
    model, tokenizer, picture = trained
    assistant = load_float32(TINY)
    if quantize:
        assistant.quantize(4)
    options = {"do_sample": False, "min_length": 0}
    expected, _ = model.chat(tokenizer, picture, "描述这张图片。", **options)
    plain = len(steps)
    steps.clear()
    response, _ = model.chat(tokenizer, picture, "描述这张图片。", assistant_model=assistant, **options)
    assert response == expected
    assert len(steps) <= plain // 2


def test_a_smaller_assistant_looks_at_the_picture_itself_once(trained):
    model, tokenizer, picture = trained
    assistant, seen = build_smaller(model), []
    assistant.image_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    inputs = build_inputs(tokenizer, picture, "问：描述这张图片。\n答：")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert torch.equal(output, expected)
    assert seen == [1]
    text = tokenizer("问：你好\n答：", return_tensors="pt")
    expected = model.generate(**text, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**text, max_new_tokens=8, do_sample=False, assistant_model=assistant), expected)


def test_an_assistant_of_another_width_cannot_read_embeddings(trained):
    model, tokenizer, picture = trained
    with pytest.raises(ValueError, match="assistant model is 32 wide"):
        model.chat(tokenizer, picture, "描述这张图片。", assistant_model=build_smaller(model))


def test_left_padded_batch_generates_what_the_original_did(model, golden):
    batch = golden["left_padded_batch"]
    output = model.generate(
        input_ids=torch.tensor(batch["input_ids"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        do_sample=False,
        max_length=len(batch["generated.f32"][0]),
    )
    for row, expected in zip(output.tolist(), batch["generated.f32"], strict=True):
        end = (
            expected.index(1105, len(batch["input_ids"][0])) if 1105 in expected[len(batch["input_ids"][0]) :] else None
        )
        assert row[:end] == expected[:end]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_batched_greedy_equals_single_greedy(model, processor, pictures, options):
    image = f"<img>{processor.image_token}</img>"
    texts = ["问：你好\n答：", f"{image}问：描述这张图片。\n答：", f"{image}问：a\n答：b\n{image}问：哪个？\n答："]
    images = [[], [pictures[0]], [pictures[1], pictures[2]]]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    together = model.generate(**batch, max_new_tokens=10, do_sample=False, **options)[:, length:]
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        single = processor(text=text, images=own or None, return_tensors="pt")
        alone = model.generate(**single, max_new_tokens=10, do_sample=False)[0, single["input_ids"].shape[1] :]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_beams_and_return_sequences_keep_each_row_its_pictures(model, processor, pictures):
    image = f"<img>{processor.image_token}</img>"
    texts = [f"{image}{image}问：哪个？\n答：", f"{image}问：描述这张图片。\n答："]
    images = [[pictures[0], pictures[1]], [pictures[2]]]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        single = processor(text=text, images=own, return_tensors="pt")
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        assert together[2 * row : 2 * row + 2, : alone.shape[1]].tolist() == alone.tolist()


def test_pictures_are_encoded_once_whatever_the_number_of_beams(model, described, monkeypatch):
    calls = []
    model.image_cache.clear()  # another test may have shown this picture
    encode = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda *args, **kw: calls.append(1) or encode(*args, **kw))
    model.generate(**described, max_new_tokens=4, num_beams=4, num_return_sequences=4, do_sample=False)
    assert len(calls) == 1


def test_sampling_is_reproducible_from_its_seed(model, described):
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(model.generate(**described, max_new_tokens=8, do_sample=True, top_p=0.9, num_return_sequences=3))
    assert torch.equal(*outputs)
    assert len(outputs[0]) == 3


def test_answer_to_a_picture_continues_from_a_cache_of_its_context(model, described, greedy):
    """All of the context is cached, `<sop>` is not."""
    ids = described["input_ids"]
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    with torch.no_grad():
        context = {
            "input_ids": ids[:, :-1],
            "pixel_values": described["pixel_values"],
            "position_ids": positions[..., :-1],
        }
        cache = model(**context, use_cache=True).past_key_values
    output = model.generate(**described, past_key_values=cache, max_new_tokens=24, do_sample=False)
    assert torch.equal(output, greedy)


def test_pictures_are_seen_at_every_step_without_a_cache(model, processor, described, pictures):
    other = processor(
        text=f"<img>{processor.image_token}</img>问：描述这张图片。\n答：", images=pictures[1], return_tensors="pt"
    )
    for one in (described, other):
        options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        cached, uncached = (model.generate(**one, **options, use_cache=use) for use in (True, False))
        for ours, theirs in zip(uncached.logits, cached.logits, strict=True):
            assert relative_error(ours, theirs.numpy()) < FLOAT32_TOLERANCE


def test_inputs_embeds_alone_generate_the_same_answer(model, described, greedy):
    embeds = model.embed(
        described["input_ids"], model.get_image_features(described["pixel_values"]).pooler_output
    ).detach()
    new = model.generate(inputs_embeds=embeds, max_new_tokens=24, do_sample=False)
    assert torch.equal(new, greedy[:, described["input_ids"].shape[1] :])


def test_stop_strings_end_the_answer(model, described, greedy, tokenizer):
    answer = tokenizer.decode(greedy[0, described["input_ids"].shape[1] :])
    stop = "正在"
    assert stop in answer
    output = model.generate(**described, max_new_tokens=24, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert output.shape[1] < greedy.shape[1]
    assert stop in tokenizer.decode(output[0, described["input_ids"].shape[1] :])


def test_transformers_own_streamer_streams_the_answer(model, described, greedy, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {**described, "max_new_tokens": 24, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.strip() == tokenizer.decode(greedy[0, described["input_ids"].shape[1] :]).strip()


def test_decode_steps_never_ask_the_device(model, described, monkeypatch):
    """Between two tokens, preparing inputs and running the model reads no tensor's value on the host."""
    cache_inputs = model.generate(**described, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    sequence, cache = cache_inputs.sequences, cache_inputs.past_key_values

    def forbidden(*args, **kwargs):
        raise AssertionError("a tensor's value was read")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    prepared = model.prepare_inputs_for_generation(sequence, next_sequence_length=1, past_key_values=cache)
    with torch.no_grad():
        model(**prepared)


def test_a_prompt_in_chunks_is_refused_because_it_would_be_answered_wrongly(model, described):
    with pytest.raises(ValueError, match="prefix-LM must be seen as a whole"):
        model.generate(**described, max_new_tokens=2, prefill_chunk_size=8)


def test_pictures_take_the_places_of_embedded_image_tokens(model, described):
    expected = model.generate(**described, max_new_tokens=4, do_sample=False)
    embedded = {**described, "inputs_embeds": model.get_input_embeddings()(described["input_ids"])}
    torch.testing.assert_close(model.generate(**embedded, max_new_tokens=4, do_sample=False), expected)
    del embedded["input_ids"]
    answer = model.generate(**embedded, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(answer, expected[:, described["input_ids"].shape[1] :])
    with torch.no_grad():
        torch.testing.assert_close(model(**embedded).logits, model(**described).logits)


def test_a_prompt_that_is_too_long_is_refused_before_the_picture_is_encoded(model, processor, pictures, monkeypatch):
    monkeypatch.setattr(model, "get_image_features", None)
    text = f"<img>{processor.image_token}</img>问：{'长' * 3000}\n答："
    with pytest.raises(ValueError, match=r"tokens long, the model takes 2048"):
        model.generate(**processor(text=text, images=pictures[0], return_tensors="pt"))


def test_custom_logits_processors_are_used(model, described):
    def force(input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 7] = 0
        return forced

    output = model.generate(
        **described, max_new_tokens=3, do_sample=False, logits_processor=LogitsProcessorList([force])
    )
    assert output[0, -3:].tolist() == [7, 7, 7]
