"""What users say: every option of `generate` holds, in `chat`, `stream_chat` and `generate`, or is refused in words."""

import copy
import inspect
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, TextStreamer
from transformers.generation import BaseStreamer, StopStringCriteria, WatermarkingConfig

from tests.helpers import load_float32
from visualglm_hf import ChatGLMTokenizer, VisualGLMForConditionalGeneration
from visualglm_hf.cache_naming import CACHE_NAME
from visualglm_hf.generation_options import ORIGINAL_OPTIONS


QUERY = "你好"
PROMPT = "问：你好\n答："
PLAIN = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 6, "min_length": 0}
# A value that changes something, for each option of which a guess would not.
VALUES = {
    "max_length": 15,
    "max_new_tokens": 3,
    "min_length": 15,
    "min_new_tokens": 3,
    "early_stopping": True,
    "max_time": 100.0,
    "stop_strings": ["city", "x"],
    "do_sample": True,
    "num_beams": 2,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 64,
    "top_k": 3,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[1003], [1004, 1005]],
    "renormalize_logits": True,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 1105,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": list(range(600, 1000)),
    "begin_suppress_tokens": list(range(600, 1000)),
    "sequence_bias": {(7,): 9.0},
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": WatermarkingConfig(bias=5.0),
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 4,
    "bos_token_id": 7,
    "eos_token_id": [1105, 20],
    "encoder_no_repeat_ngram_size": 1,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "speculation_type": "dflash",
    "compile_config": CompileConfig(backend="eager"),
    "disable_compile": True,
    "low_memory": True,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "constraints": ["a constraint"],
    "force_words_ids": [[5]],
    "prefill_chunk_size": 4,
    "continuous_batching_config": "a config of its own",
}
ANY_VALUE = 1.5  # of an option that is not named above: a penalty, a probability, or what a later release has
OPTIONS = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]
CACHES = [
    "dynamic",
    "static",
    "offloaded",
    "offloaded_static",
    "quantized",
    "hybrid",
    "sliding_window",
    "paged",
    "of no release",
]
ROWS = [
    *((name, VALUES.get(name, ANY_VALUE)) for name in OPTIONS),
    *(("cache_implementation", name) for name in CACHES),
]
REFUSED = "refused"
PLAIN_ANSWER = "书本看起来像大小 city(背背背"
PROMPT_LENGTH = 12  # tokens


def settings_beside(name: str) -> dict:
    """The plain settings, but for `name` and the length that it stands for."""
    beside = {"max_length": "max_new_tokens", "min_new_tokens": "min_length"}.get(name, name)
    return {key: value for key, value in PLAIN.items() if key not in (name, beside)}


def result_of(ask) -> str:
    """The answer, or that there was one `ValueError`."""
    torch.manual_seed(0)
    try:
        return ask()
    except ValueError:
        return REFUSED


@contextmanager
def generation_config_of_folder(model, **options):
    """A model whose folder had these options in its generation_config.json, too."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    try:
        model.generation_config.update(**options)
        yield
    finally:
        model.generation_config = before


@pytest.fixture(scope="module")
def ask(model, tokenizer):
    """Ask for the answer in all ways that there are, by name."""
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def chat(**options):
        return model.chat(tokenizer, None, QUERY, english=False, **options)[0]

    def stream(**options):
        return list(model.stream_chat(tokenizer, None, QUERY, english=False, **options))[-1][0]

    def generate(**options):
        output = model.generate(**inputs, tokenizer=tokenizer, **options)
        sequences = getattr(output, "sequences", output)
        return tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :].tolist())

    return {"chat": chat, "stream": stream, "generate": generate}


# Every option


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "value"), ROWS, ids=[f"{name}-{str(value)[:12]}" for name, value in ROWS])
def test_an_option_gives_one_answer_in_all_ways_or_is_refused_in_all(model, ask, name, value):
    beside = settings_beside(name)
    if name == "do_sample":  # what `chat` has by default and `generate` has not
        beside |= {"temperature": 0.9, "top_k": 5, "top_p": 0.9}
    results = {}
    for way, answer in ask.items():
        results[way] = result_of(lambda answer=answer: answer(**beside, **{name: value}))
        results[f"{way} with a config"] = result_of(
            lambda answer=answer: answer(**beside, generation_config=GenerationConfig(**{name: value}))
        )
    if name == "num_beams":  # known at the end only
        assert {results.pop("stream"), results.pop("stream with a config")} == {REFUSED}
    if name == "num_return_sequences":  # beams and samples of `generate` are for more than one
        assert {results["chat"], results["stream"]} == {REFUSED}
    assert len(set(results.values())) == 1, results
    assert ask["chat"](**PLAIN) == ask["generate"](**PLAIN) == PLAIN_ANSWER  # nothing stays behind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "value"), ROWS, ids=[f"{name}-{str(value)[:12]}" for name, value in ROWS])
def test_an_option_of_a_folder_holds_or_is_refused(model, ask, name, value):
    beside = settings_beside(name)
    expected = result_of(lambda: ask["chat"](**beside, **{name: value}))

    def answer_of_folder():
        with generation_config_of_folder(model, **{name: value}):
            return ask["chat"](**beside)

    if name in ORIGINAL_OPTIONS or name == "max_length":  # `chat` has its own, as the original
        expected = result_of(lambda: ask["chat"](**beside))
    assert result_of(answer_of_folder) == expected


def test_options_that_ought_to_change_the_answer_do(ask):
    """The table says that all ways agree; this, that they do not agree on ignoring an option."""
    plain = ask["chat"](**PLAIN)
    for name in (
        "max_new_tokens",
        "stop_strings",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "suppress_tokens",
        "sequence_bias",
        "guidance_scale",
        "watermarking_config",
        "num_beams",
        "encoder_repetition_penalty",
    ):
        assert ask["chat"](**{**PLAIN, name: VALUES.get(name, ANY_VALUE)}) != plain, name


# Which one wins


def test_the_defaults_that_chat_shows_are_those_that_hold(model, tokenizer):
    options = model.generation_options(tokenizer)
    for method in (model.chat, model.stream_chat):
        shown = inspect.signature(method).parameters
        for name in (*ORIGINAL_OPTIONS, "max_length"):
            assert options[name] == shown[name].default
        assert "given" not in shown


def test_a_generation_config_wins_over_chats_defaults_and_a_keyword_over_both(model, tokenizer):
    config = GenerationConfig(do_sample=True, temperature=5.0, top_p=1.0, top_k=0, suppress_tokens=[7], max_length=99)
    options = model.generation_options(tokenizer, generation_config=config, temperature=0.8)
    expected = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "suppress_tokens": [7], "max_length": 99}
    assert {name: options[name] for name in expected} == expected
    assert options["repetition_penalty"] == 1.2  # left open


def test_chat_samples_as_its_generation_config_says(model, tokenizer):
    config = GenerationConfig(do_sample=True, temperature=1e-4, top_k=0, repetition_penalty=1.0, max_new_tokens=6)
    cold = model.chat(tokenizer, None, QUERY, english=False, generation_config=config)[0]
    assert cold == model.chat(tokenizer, None, QUERY, english=False, **PLAIN)[0]
    hot = GenerationConfig(temperature=50.0, top_p=1.0, top_k=0, max_new_tokens=6)
    torch.manual_seed(0)
    assert len({model.chat(tokenizer, None, QUERY, generation_config=hot)[0] for _ in range(4)}) == 4


@pytest.mark.parametrize(
    ("given", "config", "folder", "expected"),
    [
        ({"max_new_tokens": 2}, {"max_length": 90}, {}, 2),
        ({"max_length": 17}, {"max_new_tokens": 2}, {}, 5),
        ({}, {"max_new_tokens": 3}, {"max_new_tokens": 2}, 3),
        ({"max_length": 17}, {}, {"max_new_tokens": 2}, 5),
        ({}, {}, {"max_new_tokens": 2}, 2),
        ({"max_new_tokens": 4, "max_length": 99}, {}, {"max_length": 15}, 4),
        ({"max_new_tokens": 4, "min_length": 14}, {}, {}, 4),
    ],
)
def test_a_length_is_that_of_whoever_said_it_nearest(model, tokenizer, given, config, folder, expected):
    lengths = []

    def look(input_ids, scores):
        lengths.append(input_ids.shape[1])
        scores[:, 1105] = -torch.inf  # does not end by itself
        return scores

    with generation_config_of_folder(model, **folder):
        config = GenerationConfig(**config) if config else None
        model.chat(tokenizer, None, QUERY, english=False, generation_config=config, logits_processor=[look], **given)
    assert lengths[0] == PROMPT_LENGTH
    assert len(lengths) == expected


def test_a_shortest_length_holds_beside_max_new_tokens(model, tokenizer):
    options = {**PLAIN, "max_new_tokens": 5, "sequence_bias": {(1105,): 99.0}}  # would end at once
    assert model.chat(tokenizer, None, QUERY, **options)[0] == ""
    assert model.chat(tokenizer, None, QUERY, **{**options, "min_length": PROMPT_LENGTH + 2})[0] != ""
    del options["min_length"]
    assert model.chat(tokenizer, None, QUERY, **options, min_new_tokens=2)[0] != ""


# What is beside the options of a generation config


def test_an_answer_ends_behind_a_stop_string(model, tokenizer, ask):
    """In one token, in the middle of a token, across tokens."""
    options = {**PLAIN, "max_new_tokens": 12}
    for stop, expected in (("小", "书本看起来像大小"), ("看起", "书本看起来像大小"), ("ty(", "书本看起来像大小 city(")):
        assert {way(**options, stop_strings=stop) for way in ask.values()} == {expected}
    assert ask["chat"](**options, stop_strings=["K"]) == f"{PLAIN_ANSWER}背K"  # a byte of its own
    criteria = [StopStringCriteria(tokenizer, ["city"])]
    assert ask["stream"](**options, stopping_criteria=criteria) == ask["chat"](**options, stop_strings=["city"])


def test_a_stop_string_may_be_taken_from_an_answer_that_is_cleaned(tokenizer, ask):
    """Beside Chinese an answer has "，", for which the model writes ","."""
    bias = {(tokenizer.convert_tokens_to_ids(","),): 99.0}
    for way in (ask["chat"], ask["stream"]):
        assert way(**PLAIN, sequence_bias=bias, stop_strings=["，"]) == ","


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(tokenizer, ask, stop):
    for way in ask.values():
        with pytest.raises(ValueError, match="empty string among stop_strings"):
            way(**PLAIN, stop_strings=stop)


def test_a_streamer_of_the_caller_gets_the_tokens_of_chat_and_of_a_stream(model, tokenizer):
    class Collecting(BaseStreamer):
        def __init__(self):
            self.tokens, self.ends = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ends += 1

    collected = [Collecting(), Collecting()]
    answer, _ = model.chat(tokenizer, None, QUERY, **PLAIN, streamer=collected[0])
    assert list(model.stream_chat(tokenizer, None, QUERY, **PLAIN, streamer=collected[1]))[-1][0] == answer
    assert collected[0].tokens == collected[1].tokens != []
    assert [each.ends for each in collected] == [1, 1]


def test_no_criteria_are_as_good_as_none_given(ask):
    plain = ask["chat"](**PLAIN)
    for way in ask.values():
        assert way(**PLAIN, stopping_criteria=None, logits_processor=None) == plain
        assert way(**PLAIN, stopping_criteria=[], logits_processor=[]) == plain


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temprature": 0.5}, "no option 'temprature'"),
        ({"generation_config": {"top_k": 3}}, "must be a GenerationConfig"),
        ({"generation_config": GenerationConfig(max_new_token=3)}, "no option 'max_new_token'"),
        ({"input_ids": torch.tensor([[5]])}, "no option 'input_ids'"),
        ({"pixel_values": torch.zeros(1)}, "no option 'pixel_values'"),
        ({"attention_mask": torch.ones(1, 4)}, "no option 'attention_mask'"),
        ({"num_return_sequences": 2}, "use generate"),
        ({"generation_config": GenerationConfig(do_sample=True, num_return_sequences=2)}, "use generate"),
        ({"num_beams": 2, "streamer": TextStreamer(None)}, "num_beams=2 cannot be streamed"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "drafts for one sequence"),
        ({"prompt_lookup_num_tokens": 3, "stop_strings": ["a"]}, "run past stop_strings"),
        ({"negative_prompt_ids": torch.tensor([[1101, 1104]])}, "nothing without guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 cannot be used"),
    ],
)
def test_what_cannot_hold_is_refused_before_the_picture_is_encoded(model, tokenizer, pictures, options, complaint):
    encoded = model.image_cache.num_encoded
    with pytest.raises(ValueError, match=complaint):
        model.chat(tokenizer, pictures[0], QUERY, **options)
    assert model.image_cache.num_encoded == encoded


def test_chat_does_not_go_on_from_a_cache_of_another_conversation(model, tokenizer):
    cache = DynamicCache(config=model.config.text_config)
    expected, _ = model.chat(tokenizer, None, QUERY, **PLAIN)
    assert model.chat(tokenizer, None, QUERY, **PLAIN, past_key_values=cache)[0] == expected
    with pytest.raises(ValueError, match="must be empty"):
        model.chat(tokenizer, None, QUERY, **PLAIN, past_key_values=cache)


def test_options_of_generate_hold_by_position_too(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, GenerationConfig(prefill_chunk_size=4))
    assert model.generate(ids, GenerationConfig(max_new_tokens=3)).shape[1] == ids.shape[1] + 3


def test_what_a_folder_says_about_the_cache_holds_beside_a_generation_config(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=3)
    with generation_config_of_folder(model, cache_implementation="static"):
        output = model.generate(ids, GenerationConfig(max_new_tokens=3, return_dict_in_generate=True))
    assert output.sequences.tolist() == expected.tolist()
    assert output[CACHE_NAME].is_compileable


@pytest.mark.parametrize(
    "start",
    [
        lambda model: model.generate_batch([[5, 1101, 1104]]),
        lambda model: model.init_continuous_batching(),
        lambda model: model.continuous_batching_context_manager().__enter__(),
    ],
)
def test_continuous_batching_is_refused(model, start):
    with pytest.raises(ValueError, match="padded on the left"):
        start(model)


def test_an_answer_that_fails_leaves_nothing_behind(model, tokenizer, ask):
    def fail(input_ids, scores):
        raise ZeroDivisionError

    plain = ask["chat"](**PLAIN)
    before, threads = model.generation_config.to_dict(), threading.active_count()
    for options in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": model}, {"guidance_scale": 2.0}):
        for way in ask.values():
            with pytest.raises(ZeroDivisionError):
                way(**PLAIN, logits_processor=[fail], **options)
        assert ask["chat"](**PLAIN) == plain
    assert model.generation_config.to_dict() == before
    assert threading.active_count() <= threads + 1  # one may be at its end


# Guidance


def guided_naively(model, prompts, scale: float, count: int) -> list[int]:
    """Greedy tokens of classifier-free guidance: two forward passes over everything for each token."""
    answer = torch.empty(1, 0, dtype=torch.long)
    for _ in range(count):
        with torch.no_grad():
            logits = [model(input_ids=torch.cat((ids, answer), dim=1)).logits[:, -1] for ids in prompts]
        wanted, other = (each.log_softmax(-1) for each in logits)
        scores = scale * (wanted - other) + other
        answer = torch.cat((answer, scores[:, : model.config.text_config.num_tokens].argmax(-1)[None]), dim=1)
    return answer[0].tolist()


@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
def test_guidance_is_that_of_two_forward_passes_however_tokens_are_decoded(model, tokenizer, scale):
    ids, other = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (PROMPT, "问：有什么？\n答："))
    expected = guided_naively(model, (ids, other), scale, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for way in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": model},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ):
        output = model.generate(ids, guidance_scale=scale, negative_prompt_ids=other, **{**options, **way})
        assert all(row[ids.shape[1] :].tolist() == expected for row in output), way


def test_guidance_without_another_prompt_is_away_from_an_empty_one(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = guided_naively(model, (ids, torch.tensor([[1101, 1104]])), 3.0, 6)
    output = model.generate(ids, guidance_scale=3.0, max_new_tokens=6, eos_token_id=None)
    assert output[0, ids.shape[1] :].tolist() == expected


def test_guided_beams_are_the_same_with_and_without_a_cache(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    options = {"guidance_scale": 3.0, "num_beams": 3, "max_new_tokens": 8}
    assert model.generate(ids, **options).tolist() == model.generate(ids, **options, use_cache=False).tolist()


def test_each_row_of_a_batch_is_guided_by_its_own_other_prompt(model, tokenizer):
    texts, others = (PROMPT, "问：图片里有什么东西？\n答："), ("问：有什么？\n答：", "问：a\n答：")
    options = {"guidance_scale": 3.0, "max_new_tokens": 6, "eos_token_id": None, "num_beams": 2}
    inputs, other = (tokenizer(list(each), return_tensors="pt", padding=True) for each in (texts, others))
    together = model.generate(
        **inputs,
        negative_prompt_ids=other["input_ids"],
        negative_prompt_attention_mask=other["attention_mask"],
        **options,
    )
    for row, text, other_text in zip(together, texts, others, strict=True):
        alone, negative = (tokenizer(each, return_tensors="pt")["input_ids"] for each in (text, other_text))
        output = model.generate(alone, negative_prompt_ids=negative, **options)
        assert row[-6:].tolist() == output[0, -6:].tolist()


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([[5, 6]], r"needs \[gMASK\]"),
        ([[0, 1101, 1104]], "cannot have pictures"),
        ([[1101, 1104]] * 2, "as many rows as the prompt"),
        ([1101, 1104], "as many rows as the prompt"),
    ],
)
def test_a_wrong_other_prompt_is_refused(model, tokenizer, ids, complaint):
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with pytest.raises(ValueError, match=complaint):
        model.generate(**inputs, guidance_scale=2.0, negative_prompt_ids=torch.tensor(ids))


# Rows beyond the tokens


@pytest.fixture
def own_model(tiny_original):
    """A model to be changed, whose rows beyond the tokens are likelier than all others."""
    model = load_float32(tiny_original)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[1444:] = 2 * model.lm_head.weight[831]
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 5.0, "top_k": 0, "num_return_sequences": 4},
        {"num_beams": 3},
        {"do_sample": True, "num_beams": 3, "temperature": 5.0},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 2.0},
        {"suppress_tokens": [7]},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"bad_words_ids": [[7]], "logits_processor": [lambda input_ids, scores: scores]},
    ],
)
def test_a_row_that_is_no_token_is_never_generated(own_model, tokenizer, options):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert own_model.generate(ids, max_new_tokens=12, **options).max() < 1444
    if "num_beams" not in options and "num_return_sequences" not in options:
        assert own_model.generate(ids, max_new_tokens=12, assistant_model=own_model, **options).max() < 1444


def test_logits_that_are_returned_are_the_models(own_model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = own_model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    assert output.logits[0].isfinite().all()


def test_added_tokens_are_generated_saved_and_loaded(own_model, tiny_original, tmp_path):
    tokenizer = ChatGLMTokenizer.from_pretrained(tiny_original)
    tokenizer.add_tokens(["<a>", "<b>"])
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=r"from 1444 on, and .* has 1444 of them.*resize_token_embeddings"):
        own_model(input_ids=torch.cat((torch.tensor([[1444]]), ids), dim=1))
    own_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert own_model.config.text_config.vocab_size == 1472
    with torch.no_grad():
        own_model.lm_head.weight[1445] = 3 * own_model.lm_head.weight[831]
        own_model.lm_head.weight[1446:] = 4 * own_model.lm_head.weight[831]
    own_model.save_pretrained(tmp_path)
    for model in (own_model, load_float32(tmp_path)):
        assert model.generate(ids, max_new_tokens=1)[0, -1] == 1445


def test_the_tokenizer_says_which_tokens_there_are_where_it_is_known(own_model, tiny_original):
    tokenizer = ChatGLMTokenizer.from_pretrained(tiny_original)
    tokenizer.add_tokens(["<a>", "<b>"])
    with torch.no_grad():
        own_model.lm_head.weight[1445] *= 2
    answer, _ = own_model.chat(tokenizer, None, "<a>", **PLAIN)
    assert answer.startswith("<b>")


@pytest.mark.parametrize("folder", ["models/visualglm-tiny", "tests/golden/tiny-original"])
def test_checkpoints_say_how_many_tokens_they_have(folder, pytestconfig):
    model = VisualGLMForConditionalGeneration.from_pretrained(pytestconfig.rootpath / folder)
    tokenizer = ChatGLMTokenizer.from_pretrained(pytestconfig.rootpath / folder)
    assert model.config.text_config.num_tokens == len(tokenizer) < model.config.text_config.vocab_size
