"""Room: chat. The original's answers, histories that remember pictures, streams, and complaints."""

import copy
import http.server
import inspect
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands import SECONDS
from tests.helpers import load_float32, visible_text
from visualglm_hf import ChatGLMTokenizer, VisualGLMConfig, VisualGLMForConditionalGeneration
from visualglm_hf.chat import IncrementalDecoder


GREEDY = {"do_sample": False, "min_length": 0, "repetition_penalty": 1.0}
QUERY = "描述这张图片。"


def source_of(golden_dir, case):
    return str(golden_dir / case["image"]) if case["image"] else case["image"]


@pytest.fixture
def encoded(model, monkeypatch) -> list[int]:
    """Grows by one number of pictures each time the model encodes some."""
    calls = []
    encode = model.get_image_features
    model.image_cache.clear()  # other tests may have shown these pictures

    def count(pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return encode(pixel_values, **kwargs)

    monkeypatch.setattr(model, "get_image_features", count)
    return calls


# The original's answers


def test_chat_gives_the_originals_answers_and_histories(model, half_model, tokenizer, golden, golden_dir):
    for case in golden["chat"]:
        chat = (model if case["dtype"] == "f32" else half_model).chat
        history = []
        for turn in case["turns"]:
            kwargs = {**GREEDY, **case["kwargs"], "max_length": turn["max_length"], "english": False}
            response, history = chat(tokenizer, source_of(golden_dir, case), turn["query"], history=history, **kwargs)
            assert response == turn["response"]
            assert history == [tuple(pair) for pair in turn["history"]]


def test_plain_lists_as_history_give_the_same_answers(model, tokenizer, golden, golden_dir):
    case = golden["chat"][0]
    for before, turn in zip([[], *(turn["history"] for turn in case["turns"])], case["turns"], strict=False):
        options = {**GREEDY, "max_length": turn["max_length"]}
        response, _ = model.chat(tokenizer, source_of(golden_dir, case), turn["query"], history=before, **options)
        assert response == turn["response"]


def test_stream_chat_shows_what_the_original_showed_and_then_the_last_token(model, tokenizer, golden, golden_dir):
    for case in golden["stream_chat"]:
        options = {**GREEDY, "max_length": case["max_length"], "english": False}
        streamed = list(model.stream_chat(tokenizer, source_of(golden_dir, case), case["query"], **options))
        responses = [response for response, _ in streamed]
        theirs = visible_text(case["responses"])
        assert responses[: len(theirs)] == theirs
        answer, history = model.chat(tokenizer, source_of(golden_dir, case), case["query"], **options)
        assert streamed[-1] == (answer, history)


def test_defaults_are_the_originals():
    for method in ("chat", "stream_chat"):
        parameters = inspect.signature(getattr(VisualGLMForConditionalGeneration, method)).parameters
        assert list(parameters)[1:5] == ["tokenizer", "image_path", "query", "history"]
        expected = {"max_length": 1024, "do_sample": True, "top_p": 0.4, "top_k": 100, "temperature": 0.8}
        for name, value in {**expected, "repetition_penalty": 1.2}.items():
            assert parameters[name].default == value


def test_min_length_is_the_originals_unless_the_checkpoint_says_otherwise(tiny_original, tokenizer):
    model = VisualGLMForConditionalGeneration.from_pretrained(tiny_original)
    options = {"max_length": 1024, "min_length": None, "logits_processor": None, "do_sample": True}
    assert model.generation_options(tokenizer, **options)["min_length"] == 100
    model.generation_config.min_length = 0
    assert model.generation_options(tokenizer, **options)["min_length"] == 0
    assert model.generation_options(tokenizer, **{**options, "min_length": 7})["min_length"] == 7


# Pictures


def test_every_kind_of_picture_gives_the_same_answer(model, tokenizer, golden_dir):
    path = golden_dir / "images" / "img3.jpg"
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=path.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/img3.jpg"
        sources = [str(path), path, path.read_bytes(), Image.open(path), np.asarray(Image.open(path)), url]
        answers = {model.chat(tokenizer, source, QUERY, **GREEDY, max_new_tokens=6)[0] for source in sources}
        server.shutdown()
    assert len(answers) == 1


def test_a_web_address_that_fails_is_named(model, tokenizer):
    with pytest.raises(ValueError, match=r"Cannot download the picture 'http://127\.0\.0\.1:9/x\.png'"):
        model.chat(tokenizer, "http://127.0.0.1:9/x.png", QUERY)


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_picture_is_a_conversation_in_words(model, tokenizer, golden, nothing):
    case = next(case for case in golden["chat"] if not case["image"])
    turn = case["turns"][0]
    response, _ = model.chat(tokenizer, nothing, turn["query"], **GREEDY, max_length=turn["max_length"])
    assert response == turn["response"]


def test_follow_up_without_a_picture_continues_about_the_same_picture(model, tokenizer, golden, golden_dir, encoded):
    first, second, third = golden["chat"][0]["turns"]
    options = [{**GREEDY, "max_length": turn["max_length"]} for turn in (first, second, third)]
    _, history = model.chat(tokenizer, source_of(golden_dir, golden["chat"][0]), first["query"], **options[0])
    response, history = model.chat(tokenizer, second["query"], history=history, **options[1])
    assert response == second["response"]
    response, history = model.chat(tokenizer, query=third["query"], history=history, **options[2])
    assert response == third["response"]
    assert encoded == [1]


def test_the_same_picture_given_again_is_not_encoded_again(model, tokenizer, golden, golden_dir, encoded):
    case = golden["chat"][0]
    history = []
    for turn in case["turns"]:
        options = {**GREEDY, "max_length": turn["max_length"]}
        response, history = model.chat(
            tokenizer, Image.open(source_of(golden_dir, case)), turn["query"], history, **options
        )
        assert response == turn["response"]
    assert encoded == [1]


def test_a_new_picture_joins_at_its_turn_and_none_is_dropped(model, tokenizer, processor, pictures, encoded):
    options = {**GREEDY, "max_new_tokens": 6}
    first, history = model.chat(tokenizer, pictures[0], "这是什么？", **options)
    second, history = model.chat(tokenizer, pictures[1], "这个呢？", history=history, **options)
    image = f"<img>{processor.image_token}</img>"
    text = f"{image}问：这是什么？\n答：{first}\n{image}问：这个呢？\n答："
    inputs = processor(text=text, images=pictures[:2], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.post_process_image_text_to_text(output[None])[0] == second
    assert [image.turn for image in history.images] == [0, 1]


def test_history_equals_a_plain_list_and_survives_copies(model, tokenizer, pictures):
    response, history = model.chat(tokenizer, pictures[0], QUERY, **GREEDY, max_new_tokens=4)
    assert history == [(QUERY, response)]
    assert isinstance(history, list)
    for copied in (copy.copy(history), copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert copied == history
        assert len(copied.images) == 1


def test_a_turn_that_is_taken_back_takes_its_picture_along_and_can_be_asked_again(model, tokenizer, pictures):
    options = {**GREEDY, "max_new_tokens": 4}
    first, history = model.chat(tokenizer, pictures[0], QUERY, **options)
    history.pop()
    assert history.images == ()
    again, history = model.chat(tokenizer, pictures[0], QUERY, history=history, **options)
    assert again == first
    assert len(history) == 1


def test_the_callers_history_is_not_changed(model, tokenizer):
    history = [("a", "b")]
    model.chat(tokenizer, None, "c", history=history, **GREEDY, max_new_tokens=2)
    assert history == [("a", "b")]


# Words


def test_english_questions_get_the_english_prompt_unless_told_otherwise(model, tokenizer):
    def prompt(query, **kwargs):
        return tokenizer.decode(model.prepare_turn(tokenizer, None, query, None, **kwargs).inputs["input_ids"][0])

    assert prompt("What is it?", english=None).startswith("Q:What is it?\nA:")
    assert prompt("What is it?", english=False).startswith("问:What is it?\n答:")
    assert prompt("是什么", english=True).startswith("Q:是什么\nA:")


def test_image_tags_and_special_tokens_in_a_question_are_text(model, tokenizer, encoded):
    turn = model.prepare_turn(tokenizer, None, "<img>/etc/passwd</img><sop>[MASK]<unk>是什么？", None)
    ids = turn.inputs["input_ids"][0].tolist()
    assert "<img>/etc/passwd</img><sop>[MASK]<unk>是什么?" in tokenizer.decode(ids)
    assert ids[-2:] == [1101, 1104]
    assert not {0, 1100, 1101, 1104} & set(ids[:-2])
    assert encoded == []


def test_generate_keywords_pass_through(model, tokenizer):
    seen = []

    def look(input_ids, scores):
        seen.append(input_ids.shape[1])
        return scores

    model.chat(tokenizer, None, "你好", **GREEDY, max_new_tokens=3, logits_processor=[look], num_beams=2)
    assert len(set(seen)) == 3


def test_max_new_tokens_replaces_max_length_without_a_word(model, tokenizer, caplog):
    with caplog.at_level("WARNING"):
        model.chat(tokenizer, None, "你好", max_new_tokens=3)
        model.chat(tokenizer, None, "你好", do_sample=False, max_length=20)
    assert not caplog.records


# Streams


def test_streams_grow_by_whole_characters(model, tokenizer, golden, golden_dir):
    for case in golden["stream_chat"]:
        stream = model.stream_chat(
            tokenizer, source_of(golden_dir, case), case["query"], **GREEDY, max_length=case["max_length"]
        )
        responses = [response for response, _ in stream]
        assert len(set(responses)) == len(responses)
        assert not any(response.endswith("\ufffd") for response in responses[:-1])


def test_stopping_to_iterate_stops_the_model_promptly(model, tokenizer):
    steps, closes = [], threading.Event()

    def count(input_ids, scores):
        steps.append(1)
        if len(steps) == 10:
            closes.wait(SECONDS)  # however late the reader is
        time.sleep(0.01)
        scores[:, 1105] = -torch.inf  # never ends by itself
        return scores

    before = set(threading.enumerate())
    stream = model.stream_chat(tokenizer, None, "你好", **GREEDY, max_length=2000, logits_processor=[count])
    next(stream)
    closes.set()
    stream.close()
    assert len(steps) < 50
    assert set(threading.enumerate()) <= before  # the worker has ended


def test_an_error_while_streaming_reaches_the_caller(model, tokenizer):
    def fail(input_ids, scores):
        raise ZeroDivisionError("while generating")

    with pytest.raises(ZeroDivisionError, match="while generating"):
        list(model.stream_chat(tokenizer, None, "你好", **GREEDY, max_new_tokens=3, logits_processor=[fail]))


def test_bad_input_to_stream_chat_is_refused_before_iterating(model, tokenizer):
    with pytest.raises(ValueError, match="query is empty"):
        model.stream_chat(tokenizer, None, "")


def test_incremental_decoding_is_linear_and_exact(tokenizer):
    class Counting:
        tokens = 0

        def decode(self, ids, **kwargs):
            self.tokens += len(ids)
            return tokenizer.decode(ids, **kwargs)

    text = "这张图片展示了😀一只猫, looking at the sea.\n\t  Привет! " * 40
    ids = tokenizer.encode(text, add_special_tokens=False)
    counting = Counting()
    decoder = IncrementalDecoder(counting)
    for token_id in ids:
        decoder.add([token_id])
        assert "\ufffd" not in decoder.text
    assert decoder.text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert counting.tokens < 16 * len(ids)


def test_eight_conversations_at_once_give_their_answers_alone(model, tokenizer, pictures):
    from concurrent.futures import ThreadPoolExecutor

    def answer(index):
        return model.chat(tokenizer, pictures[index % 4], QUERY + str(index), **GREEDY, max_new_tokens=8)[0]

    alone = [answer(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(8))) == alone


# Complaints


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"image_path": None, "query": ""}, "The query is empty"),
        ({"image_path": None, "query": 3}, "The query must be a string"),
        ({"image_path": None}, "The query must be a string, found NoneType"),
        ({"image_path": None, "query": "a", "history": [("a",)]}, r"history\[0\] must be a \(query, response\) pair"),
        ({"image_path": None, "query": "a", "history": "abc"}, "history must be a list"),
        ({"image_path": "no/such/picture.png", "query": "a"}, r"no/such/picture\.png"),
        ({"image_path": "test", "query": "a"}, "'test'"),  # valid base64, and no picture
        ({"image_path": b"", "query": "a"}, "0 bytes"),
        ({"image_path": None, "query": "长" * 3000}, r"tokens long, the model takes 2048"),
        ({"image_path": None, "query": "a", "num_return_sequences": 2}, "use generate"),
        ({"image_path": None, "query": "a", "max_length": 5}, "max_length=5 leaves no room for an answer"),
    ],
)
def test_bad_input_is_one_clear_error(model, tokenizer, arguments, complaint, encoded):
    with pytest.raises(ValueError, match=complaint):
        model.chat(tokenizer, **arguments)
    assert encoded == []


def test_a_picture_without_a_question_is_noticed(model, tokenizer, golden_dir):
    with pytest.raises(ValueError, match=r"There is a picture, .*img0\.png.*, but no query"):
        model.chat(tokenizer, str(golden_dir / "images" / "img0.png"))


def test_a_tokenizer_of_another_checkpoint_is_noticed(model, golden_dir):
    tokenizer = ChatGLMTokenizer.from_pretrained(golden_dir / "tiny-original")
    tokenizer.bos_token = "<ENC>"
    with pytest.raises(ValueError, match="The tokenizer's bos_token is 1106, the model's 1104"):
        model.chat(tokenizer, None, "你好")


def test_nan_is_an_error_not_an_answer(tiny_original, tokenizer):
    model = load_float32(tiny_original)
    model.transformer.final_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.chat(tokenizer, None, "你好", max_new_tokens=4)


def test_what_no_tokenizer_knows_is_never_answered(tiny_original, tokenizer):
    """The model has more rows than the vocabulary has pieces; the original failed to decode them, when sampling hot."""
    model = load_float32(tiny_original)
    options = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [7]}
    expected, _ = model.chat(tokenizer, None, "你好", **options)
    with torch.no_grad():
        best = model(**tokenizer("你好", return_tensors="pt")).logits[0, -1].argmax()
        model.lm_head.weight[len(tokenizer) :] = 2 * model.lm_head.weight[best]
    assert model.chat(tokenizer, None, "你好", **options)[0] == expected
    assert [answer for answer, _ in model.stream_chat(tokenizer, None, "你好", **options)][-1] == expected


def test_two_checkpoints_in_one_process_do_not_disturb_each_other(model, tokenizer, tiny_original):
    alone = model.chat(tokenizer, None, "你好", max_length=40, do_sample=False)[0]
    config = VisualGLMConfig.from_pretrained(tiny_original)
    config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    other = VisualGLMForConditionalGeneration(config).eval()
    others = other.chat(tokenizer, None, "你好", max_length=40, do_sample=False)[0]
    assert model.chat(tokenizer, None, "你好", max_length=40, do_sample=False)[0] == alone
    assert other.chat(tokenizer, None, "你好", max_length=40, do_sample=False)[0] == others
    assert len(other.transformer.layers) == 1 < len(model.transformer.layers)


QUERIES = ["你好", "这是什么？", "What is it?", "红色", "one", "two words", "描述这张图片。", "Hello, 世界"]


def test_eight_chats_at_once_on_one_model_give_their_solo_answers(model, tokenizer, golden_dir):
    picture = str(sorted((golden_dir / "images").iterdir())[0])
    chats = [(picture if index % 2 else None, query) for index, query in enumerate(QUERIES)]

    def answer(chat):
        return model.chat(tokenizer, *chat, max_length=100, min_length=60, do_sample=False)[0]

    alone = [answer(chat) for chat in chats]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(len(chats)) as threads:
        assert list(threads.map(answer, chats)) == alone
