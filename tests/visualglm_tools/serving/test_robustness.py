"""What a long-lived process does to the package: other inputs than foreseen, large activations, threads, neighbours."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands import HEAVY, modules_after
from tests.paths import ROOT
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration
from visualglm_hf.conversation import clean_response


DOORS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
ANSWERING = (
    ("chat", ()),
    ("serve", ()),
    ("web", ()),
    ("batch", ("examples/example_inputs.jsonl", "answers.jsonl")),
)
QUERIES = ["你好", "这是什么？", "What is it?", "红色", "one", "two words", "描述这张图片。", "Hello, 世界"]

FIELDS = st.sampled_from(
    ["vocab_size", "hidden_size", "num_layers", "num_attention_heads", "bos_token_id", "pre_seq_len"]
)
VALUES = (
    st.none() | st.booleans() | st.integers(-10, 10**6) | st.floats(allow_nan=True) | st.text(max_size=5) | st.just([])
)
PARTS = st.sampled_from([None, "eva_config", "qformer_config"])


@pytest.fixture(scope="module")
def original_fields(tiny_original) -> str:
    return (tiny_original / "config.json").read_text(encoding="utf-8")


@settings(max_examples=150, deadline=None)
@given(PARTS, FIELDS, VALUES)
def test_a_config_with_any_value_in_any_field_is_read_or_refused(original_fields, part, field, value):
    fields = json.loads(original_fields)
    (fields if part is None else fields[part])[field] = value
    try:
        config = VisualGLMConfig(**fields)
    except ValueError:
        return
    assert VisualGLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_finishing_an_answer_twice_changes_nothing_more(answer):
    once = clean_response(answer)
    assert clean_response(once) == once


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 895)))
def test_any_ids_decode_to_text_that_can_be_encoded(tokenizer, ids):
    text = tokenizer.decode([index % tokenizer.vocab_size for index in ids])
    tokenizer.encode(text.replace("\ufffd", ""), split_special_tokens=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_survives_activations_64_times_as_large(half_model, processor, pictures, attention):
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=pictures[:1], text=prompt, return_tensors="pt")
    before = half_model.config._attn_implementation
    half_model.set_attn_implementation(attention)
    hooks = [
        module.register_forward_hook(lambda module, args, output: output * 64)
        for layer in half_model.transformer.layers
        for module in (layer.attention.dense, layer.mlp)
    ]
    try:
        with torch.no_grad():
            logits = half_model(**inputs).logits
    finally:
        half_model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    assert torch.isfinite(logits).all()


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


def test_eight_chats_at_once_on_one_model_give_their_solo_answers(model, tokenizer, golden_dir):
    picture = str(sorted((golden_dir / "images").iterdir())[0])
    chats = [(picture if index % 2 else None, query) for index, query in enumerate(QUERIES)]

    def answer(chat):
        return model.chat(tokenizer, *chat, max_length=100, min_length=60, do_sample=False)[0]

    alone = [answer(chat) for chat in chats]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(len(chats)) as threads:
        assert list(threads.map(answer, chats)) == alone


def test_the_package_imports_a_library_when_it_is_first_needed():
    modeling = {"visualglm_hf.modeling_visualglm", "transformers.modeling_utils"}
    assert not modules_after("import visualglm_hf; dir(visualglm_hf)") & HEAVY
    assert not modules_after("from visualglm_hf import VisualGLMConfig") & modeling


def modules_of_door(door: str, *options: str, code: int) -> set[str]:
    """What a door has imported when it ends with this exit code."""
    return modules_after(f"""
import runpy, sys
sys.argv = {[door, *options]!r}
try:
    runpy.run_path("scripts/{door}", run_name="__main__")
except SystemExit as end:
    assert end.code == {code}, end
""")


@pytest.mark.parametrize("door", DOORS)
def test_help_of_a_door_waits_for_no_library(door):
    assert not modules_of_door(door, "-h", code=0) & HEAVY


@pytest.mark.parametrize(
    ("door", "needed"),
    [
        ("cli_demo_hf.py", ()),
        ("web_demo_hf.py", ()),
        ("api_hf.py", ()),
        ("batch_infer.py", ("examples/example_inputs.jsonl", "answers.jsonl")),
        ("finetune_visualglm.py", ("--use_lora", "--train-data", "examples/example_inputs.jsonl")),
    ],
)
def test_a_folder_without_a_model_is_said_before_any_library_is_needed(door, needed):
    assert not modules_of_door(door, *needed, "--model", "nowhere", code=2) & HEAVY


@pytest.mark.parametrize(("command", "needed"), ANSWERING)
def test_a_folder_without_an_adapter_is_said_before_any_library_is_needed(command, needed):
    words = [command, *needed, "--adapter", "nowhere"]
    code = f"from visualglm_tools.__main__ import main; assert main({words!r}) == 2"
    assert not modules_after(code) & HEAVY
