"""Room: the compiled or recorded decode step. It gives the eager answers, and is compiled once for all prompts."""

import copy
import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.fake_graphs import RECORD, FakeGraph, play_recorded_steps
from tests.helpers import load_float32
from tests.paths import CIRCLES, TINY
from visualglm_hf import (
    ChatGLMTokenizer,
    VisualGLMForConditionalGeneration,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
)
from visualglm_hf.compilation import RecordedCall, bucket_length, call_model, compile_call, resolve_compile_config


CHAT = {"do_sample": False, "min_length": 0}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def load(bits: int | None = None):
    model = load_float32(TINY)
    return model if bits is None else model.quantize(bits)


@pytest.fixture(scope="module")
def talker():
    """The tiny model that was trained to talk about shapes."""
    return load()


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def picture():
    return Image.open(CIRCLES)


@pytest.fixture
def graphs():
    """The graphs that were compiled, in order: see `counting`."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def counting(graphs: list) -> CompileConfig:
    """Compile to the same operators in one graph per step, and note it."""

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return CompileConfig(backend=compiler, fullgraph=True, mode=None)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_compiled_answers_are_the_eager_ones_and_the_step_is_compiled_once(bits, tokenizer, picture, graphs):
    model, compile = load(bits), counting(graphs)
    history = []
    for query in ("描述这张图片。", "图里有几个圆形？他们是什么颜色的？", "背景是什么？"):
        expected, _ = model.chat(tokenizer, picture, query, history=history, **CHAT)
        response, history = model.chat(tokenizer, picture, query, history=history, compile=compile, **CHAT)
        assert response == expected
    response, _ = model.chat(tokenizer, "What is the capital of France?", compile=compile, **CHAT)
    assert response == model.chat(tokenizer, "What is the capital of France?", **CHAT)[0]
    assert len(graphs) == 1


def test_sampled_answers_are_the_eager_ones_too(talker, tokenizer, picture, graphs):
    answers = []
    for options in ({}, {"compile": counting(graphs)}):
        torch.manual_seed(5)
        answers.append(talker.chat(tokenizer, picture, "描述这张图片。", temperature=1.5, top_p=0.9, **options)[0])
    assert answers[0] == answers[1]


def test_only_a_few_lengths_of_cache_are_compiled(talker, tokenizer, graphs):
    compile, inputs = counting(graphs), tokenizer("问：你好\n答：", return_tensors="pt")
    length = inputs["input_ids"].shape[1] + 6
    options = {"do_sample": False, "stopping_criteria": [lambda ids, scores: torch.tensor([ids.shape[1] >= length])]}
    expected = talker.generate(**inputs, max_new_tokens=6, **options)
    for new_tokens in (6, 200, 300, 450, 600, 1500):
        assert torch.equal(talker.generate(**inputs, max_new_tokens=new_tokens, compile=compile, **options), expected)
    assert len(graphs) == 2  # for 256, and then for any length: torch has noticed that it changes


def test_buckets_are_few_and_end_at_the_context():
    lengths = [bucket_length(length, 2048) for length in range(1, 2049)]
    assert sorted(set(lengths)) == [256, 512, 1024, 2048]
    assert all(bucket >= length for length, bucket in enumerate(lengths, start=1))
    assert bucket_length(1200, 1500) == 1500
    assert bucket_length(3000, 2048) == 3000  # whatever generate was asked for: it decides whether that is too much


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.3}],
    ids=str,
)
def test_left_padded_batches_and_beams_are_the_eager_ones(talker, tokenizer, picture, graphs, options):
    processor = VisualGLMProcessor(VisualGLMImageProcessor(), tokenizer)
    image = f"<img>{processor.image_token}</img>"
    compile = counting(graphs)
    for texts in (
        ["问：你好\n答：", f"{image}问：描述这张图片。\n答："],
        [f"{image}问：几个？\n答：", "问：什么？\n答："],
    ):
        batch = processor(text=texts, images=[[picture] if image in text else [] for text in texts], padding=True)
        batch = batch.convert_to_tensors("pt")
        expected = talker.generate(**batch, max_new_tokens=12, do_sample=False, **options)
        output = talker.generate(**batch, max_new_tokens=12, do_sample=False, compile=compile, **options)
        assert torch.equal(output, expected)
    assert len(graphs) == 1


def test_a_prefix_tuned_model_compiles(tokenizer, graphs):
    config = copy.deepcopy(load().config)
    config.text_config.pre_seq_len = 3
    torch.manual_seed(0)
    model = VisualGLMForConditionalGeneration(config).eval()
    inputs = tokenizer("问：你好\n答：", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, compile=counting(graphs)), expected)
    assert len(graphs) == 1


def test_an_adapted_model_compiles(tokenizer, graphs):
    config = LoraConfig(target_modules=r"transformer\.layers\..*query_key_value", init_lora_weights=False)
    model = get_peft_model(load(), config).eval()
    inputs = tokenizer("问：你好\n答：", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, compile=counting(graphs)), expected)
    assert len(graphs) == 1


def test_embeddings_instead_of_ids_compile(talker, tokenizer, graphs):
    embeds = talker.get_input_embeddings()(tokenizer("问：你好\n答：", return_tensors="pt")["input_ids"]).detach()
    options = {"inputs_embeds": embeds, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(talker.generate(**options, compile=counting(graphs)), talker.generate(**options))
    assert len(graphs) == 1


def test_a_copy_with_other_weights_is_not_mistaken_for_the_model(talker, tokenizer, picture, graphs):
    compile = counting(graphs)
    talker.chat(tokenizer, picture, "描述这张图片。", compile=compile, **CHAT)
    other = copy.deepcopy(talker)
    with torch.no_grad():
        other.transformer.word_embeddings.weight.copy_(other.transformer.word_embeddings.weight.flip(0))
    expected, _ = other.chat(tokenizer, picture, "描述这张图片。", max_new_tokens=8, **CHAT)
    response, _ = other.chat(tokenizer, picture, "描述这张图片。", max_new_tokens=8, compile=compile, **CHAT)
    assert response == expected


def test_a_model_that_is_quantized_later_is_compiled_again(tokenizer, picture, graphs):
    model, compile = load(), counting(graphs)
    model.chat(tokenizer, picture, "描述这张图片。", compile=compile, **CHAT)
    model.quantize(4)
    expected, _ = model.chat(tokenizer, picture, "描述这张图片。", **CHAT)
    assert model.chat(tokenizer, picture, "描述这张图片。", compile=compile, **CHAT)[0] == expected
    assert len(graphs) == 2


def test_compiled_streams_give_the_same_answer_and_are_compiled_once(talker, tokenizer, picture, graphs):
    """Each stream has a thread of its own."""
    compile = counting(graphs)
    expected, _ = talker.chat(tokenizer, picture, "描述这张图片。", **CHAT)
    for _ in range(2):
        stream = talker.stream_chat(tokenizer, picture, "描述这张图片。", compile=compile, **CHAT)
        assert list(stream)[-1][0] == expected
    assert len(graphs) == 1


def test_a_compiled_stream_that_is_left_stops_and_the_next_one_runs(talker, tokenizer, picture, graphs):
    compile = counting(graphs)
    stream = talker.stream_chat(tokenizer, picture, "描述这张图片。", compile=compile, **CHAT)
    first, _ = next(stream)
    stream.close()
    last = list(talker.stream_chat(tokenizer, picture, "描述这张图片。", compile=compile, **CHAT))[-1][0]
    assert len(first) < len(last)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("bits", [None, 4])
def test_torchs_own_compiler_gives_the_eager_answers_and_never_compiles_again(bits, tokenizer, picture):
    torch.compiler.reset()
    model = load(bits)
    expected = [model.chat(tokenizer, picture, query, **CHAT)[0] for query in ("描述这张图片。", "有几个圆形？")]
    assert model.chat(tokenizer, picture, "描述这张图片。", compile=True, **CHAT)[0] == expected[0]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert model.chat(tokenizer, picture, "有几个圆形？", compile=True, **CHAT)[0] == expected[1]
        with pytest.raises(RuntimeError, match="recompile"):
            model.chat(tokenizer, picture, "有几个圆形？", max_length=2000, compile=True, **CHAT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "yes"}, "found 'yes'"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens out"),
        ({"use_cache": False}, "static cache"),
        ({"cache_implementation": "dynamic"}, "static cache"),
    ],
    ids=str,
)
def test_options_that_a_compiled_step_contradicts_are_refused(talker, tokenizer, options, message):
    options = {"compile": CompileConfig(backend="eager"), **options}
    with pytest.raises(ValueError, match=message):
        talker.chat(tokenizer, "你好", **options)


def test_an_offloaded_model_is_not_compiled(tokenizer):
    model = load()
    model.hf_device_map = {"transformer": 0, "image_encoder": "disk"}
    with pytest.raises(ValueError, match="offloaded"):
        model.chat(tokenizer, "你好", compile=CompileConfig(backend="eager"))


@pytest.mark.parametrize("door", ["chat", "stream_chat"])
def test_a_missing_cpp_compiler_is_named_before_anything_is_done(talker, tokenizer, monkeypatch, door):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(talker, "get_image_features", None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler on a CPU, and there is no 'no-such-compiler'"):
        getattr(talker, door)(tokenizer, Image.new("RGB", (5, 7)), "你好", compile=True)


def test_cuda_gets_graphs_and_without_triton_nothing_else(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert resolve_compile_config(True, CUDA).mode == "reduce-overhead"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_compile_config(True, CUDA).backend == "cudagraphs"
    with pytest.raises(ValueError, match="needs Triton"):
        resolve_compile_config(CompileConfig(mode="max-autotune"), CUDA)


def test_a_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="are for CUDA, not for 'cpu'"):
        resolve_compile_config(CompileConfig(backend="cudagraphs"), CPU)


def test_graphs_are_ours_whatever_mode_asks_for_them(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function, options["mode"]))
    modes = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
    for mode, without_graphs in modes.items():
        step = compile_call(CompileConfig(mode=mode), CUDA)
        assert isinstance(step, RecordedCall) and step.call == (call_model, without_graphs)
        assert compile_call(CompileConfig(mode=mode), CUDA, is_divided=True) == (call_model, mode)
        assert compile_call(CompileConfig(mode=mode), CPU) == (call_model, mode)
    assert compile_call(CompileConfig(mode="default"), CUDA) == (call_model, "default")
    assert compile_call(CompileConfig(backend="cudagraphs"), CUDA).call is call_model
    assert compile_call(CompileConfig(backend="cudagraphs"), CUDA, is_divided=True) is call_model


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="not for 'mps'"):
        resolve_compile_config(True, torch.device("mps"))


# Recorded, by a CPU that plays CUDA's graphs


@pytest.fixture
def recorded(monkeypatch) -> list[FakeGraph]:
    """The graphs that were recorded, in order."""
    return play_recorded_steps(monkeypatch)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_recorded_answers_are_the_eager_ones_and_each_has_one_graph(bits, tokenizer, picture, recorded):
    model, history = load(bits), []
    for turn, query in enumerate(("描述这张图片。", "图里有几个圆形？他们是什么颜色的？", "背景是什么？"), start=1):
        expected, _ = model.chat(tokenizer, picture, query, history=history, **CHAT)
        response, history = model.chat(tokenizer, picture, query, history=history, compile=RECORD, **CHAT)
        assert response == expected
        assert len(recorded) == turn
    assert all(graph.replays > 1 for graph in recorded)


def test_a_recorded_stream_and_a_sampled_answer_are_the_eager_ones(talker, tokenizer, picture, recorded):
    options = {"temperature": 1.5, "top_p": 0.9}
    torch.manual_seed(5)
    expected, _ = talker.chat(tokenizer, picture, "描述这张图片。", **options)
    torch.manual_seed(5)
    assert talker.chat(tokenizer, picture, "描述这张图片。", compile=RECORD, **options)[0] == expected
    torch.manual_seed(5)
    assert list(talker.stream_chat(tokenizer, picture, "描述这张图片。", compile=RECORD, **options))[-1][0] == expected
    assert len(recorded) == 2


def test_what_a_recorded_step_returned_does_not_change_with_the_next(talker, tokenizer, recorded):
    inputs = tokenizer("问：你好\n答：", return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    expected = talker.generate(**inputs, output_logits=True, **options)
    output = talker.generate(**inputs, output_logits=True, compile=RECORD, **options)
    assert recorded[0].replays == 4
    for ours, theirs in zip(output.logits, expected.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(ours[-1], theirs[-1], atol=1e-4)


def test_a_cache_that_moves_is_not_replayed_into(talker, tokenizer, recorded):
    """Beams are put into another order by new tensors, after each step."""
    inputs = tokenizer(["问：你好\n答：", "问：图里有什么？\n答："], padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert torch.equal(talker.generate(**inputs, compile=RECORD, **options), talker.generate(**inputs, **options))
    assert all(graph.replays == 0 for graph in recorded)


def test_a_step_that_cannot_be_recorded_runs_as_it_is_with_one_warning(talker, tokenizer, picture, recorded):
    handle = talker.lm_head.register_forward_hook(lambda module, inputs, output: output + 0 * output.max().item())
    try:
        expected, _ = talker.chat(tokenizer, picture, "描述这张图片。", **CHAT)
        with pytest.warns(RuntimeWarning, match="cannot be recorded as a CUDA graph.*not permitted") as warned:
            response, _ = talker.chat(tokenizer, picture, "描述这张图片。", compile=RECORD, **CHAT)
    finally:
        handle.remove()
    assert response == expected
    assert len([each for each in warned if "CUDA graph" in str(each.message)]) == len(recorded) == 1


def test_the_cache_of_recorded_steps_begins_short_and_each_length_is_recorded(
    talker, tokenizer, picture, recorded, monkeypatch
):
    monkeypatch.setattr("visualglm_hf.compilation.SHORTEST_CACHE", 32)
    processor = VisualGLMProcessor(VisualGLMImageProcessor(), tokenizer)
    texts = [f"<img>{processor.image_token}</img>问：描述这张图片。\n答：", "问：你好\n答："]
    inputs = processor(text=texts, images=[[picture], []], padding=True).convert_to_tensors("pt")
    length = inputs["input_ids"].shape[1]
    assert 32 < length < 64
    options = {"do_sample": False, "min_new_tokens": 150, "max_new_tokens": 150, "return_dict_in_generate": True}
    expected = talker.generate(**inputs, **options)
    output = talker.generate(**inputs, compile=RECORD, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert len(recorded) == 3  # of 64, 128 and 256 tokens
    lengths = {layer.keys.shape[2] for layer in output.past_key_values.layers}
    assert lengths == {256} == {layer.max_cache_len for layer in output.past_key_values.layers}


def test_a_longer_cache_may_be_asked_for_from_the_start(talker, tokenizer, recorded):
    inputs = tokenizer("问：你好\n答：", return_tensors="pt")
    for options in ({"max_cache_len": 300}, {"cache_implementation": "static", "max_cache_len": 300}):
        output = talker.generate(
            **inputs, compile=RECORD, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **options
        )
        assert output.past_key_values.layers[0].max_cache_len >= 300


# One step for many calls


def continued(model, inputs: dict, calls: int, tokens: int, **options) -> tuple[torch.Tensor, StaticCache]:
    """What `generate` makes of `inputs` in so many calls with one static cache, each of so many tokens."""
    cache, sequences = StaticCache(config=model.config.text_config, max_cache_len=256), inputs["input_ids"]
    attention_mask = inputs["attention_mask"]
    for _ in range(calls):
        sequences = model.generate(
            input_ids=sequences,
            attention_mask=attention_mask,
            cache=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            **options,
        )
        attention_mask = F.pad(attention_mask, (0, tokens), value=1)
    return sequences, cache


def test_a_step_that_is_kept_is_recorded_once_for_many_calls_with_one_cache(talker, tokenizer, recorded):
    inputs = tokenizer(["问：你好\n答：", "问：图里有什么颜色？\n答："], padding=True, return_tensors="pt")
    expected, _ = continued(talker, inputs, calls=1, tokens=12)
    step = talker.compile_step(RECORD)
    found, _ = continued(talker, inputs, calls=4, tokens=3, compile=step)
    assert torch.equal(found, expected)
    assert len(recorded) == 1 and recorded[0].replays == 10  # all but the prompt and the first step


def test_a_step_that_is_kept_needs_a_cache_to_continue(talker, tokenizer, recorded):
    inputs, step = tokenizer("问：你好\n答：", return_tensors="pt"), talker.compile_step(RECORD)
    for cache in (None, DynamicCache(config=talker.config.text_config)):
        with pytest.raises(ValueError, match=r"StaticCache, found (NoneType|DynamicCache)"):
            talker.generate(**inputs, compile=step, cache=cache)
