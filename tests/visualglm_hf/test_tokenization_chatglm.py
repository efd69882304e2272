"""The tokenizer against the original's outputs, and the promises that the original did not make."""

import copy
import json
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from visualglm_hf import conversation
from visualglm_hf.conversation import ANSWER_MARK, END_MARK, IMAGE_MARK
from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer, decode_whitespace, encode_whitespace


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text(encoding="utf-8"))
UNK, PAD, MASK, GMASK, SOP, EOP = 0, 3, 1100, 1101, 1104, 1105
CONTROL_IDS = {UNK, 1, 2, PAD, *range(MASK, 1108)}
CODE = ["tokenization_chatglm.py", "conversation.py", "code_links.py"]
TEMPLATE = "{% for m in messages %}问：{{ m['content'] }}\n答：{{ '" + ANSWER_MARK + "' }}{% endfor %}"

properties = settings(max_examples=60, deadline=None, database=None)


def load(folder, **kwargs):
    return ChatGLMTokenizer.from_pretrained(folder, **kwargs)


def encode(tokenizer, text, **kwargs):
    return tokenizer.encode(text, add_special_tokens=False, **kwargs)


# ---- what the original computed


@pytest.mark.parametrize("case", GOLDEN["tokenizer"], ids=lambda case: ascii(case["text"][:20]))
def test_text_becomes_the_original_ids_and_text_again(tokenizer, case):
    ids, ids_special = encode(tokenizer, case["text"]), tokenizer.encode(case["text"])
    assert tokenizer.tokenize(case["text"]) == case["tokens"]
    assert (ids, ids_special) == (case["ids"], case["ids_special"])
    assert tokenizer.decode(ids) == case["decode"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode_skip"]
    assert tokenizer.decode(ids_special) == case["decode_special"]
    assert tokenizer.decode(ids_special, skip_special_tokens=True) == case["decode_special_skip"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == case["decode_no_cleanup"]


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda case: str(case["ids"][:6]))
def test_ids_become_the_original_text(tokenizer, case):
    assert tokenizer.convert_ids_to_tokens(case["ids"]) == case["tokens"]
    assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["skip"]
    assert tokenizer.decode(case["ids"], clean_up_tokenization_spaces=False) == case["no_cleanup"]


@pytest.mark.parametrize("case", GOLDEN["tokenizer_pairs"], ids=lambda case: ascii(case["a"]))
def test_a_pair_is_context_and_answer(tokenizer, case):
    assert tokenizer.encode(case["a"], case["b"]) == case["ids"]
    assert tokenizer(case["a"], case["b"])["input_ids"] == case["call_ids"]


@pytest.mark.parametrize("case", GOLDEN["tokenizer_truncation"], ids=lambda case: str(case["max_length"]))
def test_truncation_keeps_the_special_tokens(tokenizer, case):
    ids = tokenizer.encode(case["text"], truncation=True, max_length=case["max_length"])
    assert ids == case["ids"]


def test_special_tokens_are_the_original_ones(tokenizer):
    meta = GOLDEN["tokenizer_meta"]
    assert tokenizer.vocab_size == len(tokenizer) == meta["vocab_size"] == len(tokenizer.get_vocab())
    assert tokenizer.all_special_tokens == meta["all_special_tokens"]
    assert tokenizer.all_special_ids == meta["all_special_ids"]
    assert sorted(tokenizer.get_added_vocab()) == meta["no_split"]
    assert tokenizer.clean_up_tokenization_spaces is meta["clean_up_tokenization_spaces"]
    assert tokenizer.padding_side == meta["padding_side"]
    assert str(tokenizer.model_max_length) == meta["model_max_length"]
    for name, token_id in meta["ids"].items():
        assert getattr(tokenizer, f"{name}_token_id") == token_id


def test_batches_are_padded_on_the_left(tokenizer):
    case = GOLDEN["left_padded_batch"]
    batch = tokenizer(case["prompts"], padding=True)
    assert batch["input_ids"] == case["input_ids"]
    assert batch["attention_mask"] == case["attention_mask"]
    assert sorted(batch) == ["attention_mask", "input_ids"]


def test_batches_are_padded_to_a_given_length(tokenizer):
    case = GOLDEN["padding_max_length_40"]
    prompts = GOLDEN["left_padded_batch"]["prompts"][:2]
    batch = tokenizer(prompts, padding="max_length", max_length=40, return_tensors="np")
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert batch["attention_mask"].tolist() == case["attention_mask"]


@pytest.mark.parametrize("case", [case for case in GOLDEN["prompts"] if case["image"]], ids=lambda c: ascii(c["query"]))
def test_an_image_prompt_becomes_the_original_ids(tokenizer, case):
    prompt = conversation.build_prompt(case["query"], case["history"], image_turns=[0], english=False)
    assert encode(tokenizer, conversation.expand_images(prompt, 1, 32)) == case["input_ids"]


# ---- text and whitespace


def test_tabs_and_blanks_round_trip(tokenizer):
    text = "def f(x):\n\tif x:\n        return  x" + " " * 200 + "y\n\n\n"
    assert tokenizer.decode(encode(tokenizer, text)) == text


@properties
@given(st.lists(st.sampled_from(["a", "你", "\n", "\t", " ", "  ", " " * 79, " " * 81, " " * 163, "<", "|>"])))
def test_whitespace_is_written_as_the_original_wrote_it(parts):
    text = "".join(parts)
    expected = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        expected = expected.replace(" " * length, f"<|blank_{length}|>")
    assert encode_whitespace(text) == expected


@properties
@given(st.text().filter(lambda text: decode_whitespace(text) == text))
def test_whitespace_round_trips_in_any_text(text):
    assert decode_whitespace(encode_whitespace(text)) == text


@properties
@given(st.text(st.sampled_from("abz 你好世\n\t123é😀"), max_size=40).map(lambda text: f"x{text}x"))
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_only_whole_blank_pieces_become_blanks():
    assert decode_whitespace("<|blank_1|><|blank_02|><|blank_81|>") == "<|blank_1|><|blank_02|><|blank_81|>"


def test_remove_space_squeezes_each_text_between_special_tokens(tiny_original, tokenizer):
    squeezing = load(tiny_original, remove_space=True)
    assert squeezing.tokenize(" a\n\t b <sop>  c  d ") == [
        *tokenizer.tokenize("a b"),
        "<sop>",
        *tokenizer.tokenize("c d"),
    ]
    assert squeezing.tokenize(" \n ") == []


def test_do_lower_case_leaves_special_tokens_alone(tiny_original, tokenizer):
    lowering = load(tiny_original, do_lower_case=True)
    assert lowering.tokenize("Hello WORLD[MASK]Ä") == tokenizer.tokenize("hello world[MASK]ä")
    assert lowering.tokenize("<SOP>") == ["<sop>"]  # as transformers 4.33 did
    assert lowering.tokenize("ΑΣ") == tokenizer.tokenize("ας".replace("ς", "σ"))  # letter by letter, too


def test_special_tokens_eat_the_whitespace_beside_them(tokenizer):
    expected = [*tokenizer.tokenize("a"), "<eop>", *tokenizer.tokenize("b")]
    assert tokenizer.tokenize("a \n\t<eop>   b") == expected
    assert tokenizer.tokenize("<eop>  <pad>\n") == ["<eop>", "<pad>"]


def test_half_a_surrogate_pair_is_a_clear_error(tokenizer):
    with pytest.raises(ValueError, match="surrogate pair.*index 1"):
        tokenizer("a\ud83d")


# ---- marks


def test_marks_become_tokens(tokenizer):
    text = f"<img>{IMAGE_MARK * 2}</img>问：x\n答：{ANSWER_MARK}y{END_MARK}"
    assert encode(tokenizer, text) == [
        *encode(tokenizer, "<img>"),
        UNK,
        UNK,
        *encode(tokenizer, "</img>问：x\n答："),
        GMASK,
        SOP,
        *encode(tokenizer, "y"),
        EOP,
    ]


@properties
@given(st.lists(st.sampled_from([*conversation.MARKS, "<sop>", " ", "a b", "你好", "\n", "  "])), st.booleans())
def test_texts_between_marks_are_encoded_each_on_its_own(tokenizer, parts, split):
    ids, text = [], ""
    for part in [*parts, IMAGE_MARK]:
        if part not in conversation.MARKS:
            text += part
            continue
        ids += encode(tokenizer, text, split_special_tokens=split)
        ids += {IMAGE_MARK: [UNK], ANSWER_MARK: [GMASK, SOP], END_MARK: [EOP]}[part]
        text = ""
    assert encode(tokenizer, "".join([*parts, IMAGE_MARK]), split_special_tokens=split) == ids


@properties
@given(
    st.lists(
        st.sampled_from(
            ["<sop>", "<eop>", "<unk>", "<pad>", "[MASK]", "[gMASK]", "</s>", "＜ｓｏｐ＞", "<", "sop", ">", " "]
        )
    )
)
def test_typed_special_tokens_are_text_when_asked(tokenizer, parts):
    ids = encode(tokenizer, "".join(parts), split_special_tokens=True)
    assert not CONTROL_IDS & set(ids)


def test_splitting_special_tokens_survives_save_and_load(tiny_original, tmp_path):
    load(tiny_original, split_special_tokens=True).save_pretrained(tmp_path)
    assert encode(load(tmp_path), f"<sop>{END_MARK}")[-1:] == [EOP]
    assert SOP not in encode(load(tmp_path), f"<sop>{END_MARK}")


def test_chat_template_works_with_the_tokenizer_alone(tiny_original, tmp_path):
    shutil.copytree(tiny_original, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load(tmp_path)
    messages = [{"role": "user", "content": "你好 <sop>"}]
    prompt = f"问：你好 <sop>\n答：{ANSWER_MARK}"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt
    ids = tokenizer.apply_chat_template(
        messages, return_dict=True, return_tensors="pt", tokenizer_kwargs={"split_special_tokens": True}
    )["input_ids"]
    assert ids.tolist() == [tokenizer.encode(prompt, split_special_tokens=True)]
    assert ids[0].tolist().count(SOP) == 1


# ---- special tokens


def test_a_context_gets_its_end_once(tokenizer):
    build = tokenizer.build_inputs_with_special_tokens
    assert build([7, 8]) == build(build([7, 8])) == [7, 8, GMASK, SOP]
    assert build([7], [9]) == build([7, GMASK, SOP], [9]) == [7, GMASK, SOP, 9, EOP]
    assert build([7, GMASK]) == [7, GMASK, SOP]


def test_building_inputs_leaves_the_arguments_as_they_are(tokenizer):
    context, answer = [7], [9]
    tokenizer.build_inputs_with_special_tokens(context, answer)
    assert (context, answer) == ([7], [9])


@properties
@given(st.integers(3, 20))
def test_truncation_treats_a_marked_context_as_an_unmarked_one(tokenizer, max_length):
    text = "a b c d e f g h"
    plain = tokenizer.encode(text, truncation=True, max_length=max_length)
    assert tokenizer.encode(text + ANSWER_MARK, truncation=True, max_length=max_length) == plain
    assert len(plain) <= max_length and plain[-2:] == [GMASK, SOP]


def test_special_tokens_mask_covers_what_was_added(tokenizer):
    single = tokenizer("a", return_special_tokens_mask=True)
    pair = tokenizer("a", "b", return_special_tokens_mask=True)
    assert single["special_tokens_mask"] == [0, 1, 1]
    assert pair["special_tokens_mask"] == [0, 1, 1, *[0] * len(encode(tokenizer, "b")), 1]
    assert tokenizer.get_special_tokens_mask([28, SOP], already_has_special_tokens=True) == [0, 1]


# ---- decoding


@pytest.mark.parametrize(
    "ids", [30, np.int64(30), torch.tensor(30), [30], (30,), np.array([30]), torch.tensor([3, 30])]
)
def test_decode_takes_an_id_or_ids(tokenizer, ids):
    assert tokenizer.decode(ids) == "0"


def test_decode_takes_batches(tokenizer):
    rows = [[PAD, PAD, 5, 30], [5, 30, EOP, PAD]]
    assert tokenizer.decode(rows) == tokenizer.batch_decode(torch.tensor(rows)) == ["0", "0"]
    assert tokenizer.batch_decode([[], [30]]) == ["", "0"]


@pytest.mark.parametrize("bad", [1444, -100])
def test_an_unknown_id_is_an_error_that_names_it(tokenizer, bad):
    with pytest.raises(IndexError, match=f"{bad} is out of range.*1,444"):
        tokenizer.decode([bad])


def test_an_unknown_token_is_unk(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["no such piece", "[gMASK]"]) == [UNK, GMASK]


# ---- speed


def process_seconds(function):
    """Least processor time of three calls: other programs on the machine do not count."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.mark.parametrize(
    "unit", ["hello world ", "a", " ", "你好", "<sop> ", "<u[M", f"a{IMAGE_MARK}", "e\u0301\u0316"]
)
def test_time_grows_with_the_length_of_the_text(tokenizer, unit):
    short, long = unit * (12_500 // len(unit)), unit * (100_000 // len(unit))
    tokenizer(short)
    ratio = process_seconds(lambda: tokenizer(long)) / process_seconds(lambda: tokenizer(short))
    assert ratio < 32, f"8 times the text took {ratio:.0f} times as long; 8 is linear, 64 is quadratic"


# ---- save, load, copy


def test_save_and_load_round_trip(tiny_original, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (tmp_path / "ice_text.model").read_bytes() == (tiny_original / "ice_text.model").read_bytes()
    assert again.get_vocab() == tokenizer.get_vocab() and len(again) == len(tokenizer)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert (again.gmask_token_id, again.end_token_id, again.padding_side) == (GMASK, 2, "left")
    text = "a <eop>  [gMASK] </s> b , c"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_settings_survive_save_and_load(tiny_original, tmp_path):
    changed = load(tiny_original, do_lower_case=True, remove_space=True, gmask_token="[sMASK]", padding_side="right")
    changed.clean_up_tokenization_spaces = False
    changed.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.do_lower_case and again.remove_space and not again.clean_up_tokenization_spaces
    assert (again.gmask_token_id, again.padding_side) == (1102, "right")
    assert "[sMASK]" not in again.all_special_tokens


def test_added_tokens_survive_save_and_load(tiny_original, tmp_path):
    tokenizer = load(tiny_original)
    tokenizer.add_tokens(["<box>"])
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert len(again) == 1445 and again.vocab_size == 1444
    assert again.convert_tokens_to_ids(again.tokenize("a<box>")) == [28, 1444]
    assert again.decode([28, 1444]) == "a<box>"


def test_a_saved_tokenizer_does_not_name_code_that_is_not_there(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    named = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["auto_map"]
    assert named == {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    assert {path.name for path in tmp_path.glob("*.py")} == set(CODE)


def test_auto_tokenizer_loads_and_saves_the_remote_code(tiny_original, tmp_path, tokenizer):
    folder, saved = tmp_path / "checkpoint", tmp_path / "saved"
    folder.mkdir()
    code = Path(conversation.__file__).parent
    for file in [
        tiny_original / "ice_text.model",
        tiny_original / "tokenizer_config.json",
        tiny_original / "config.json",
    ]:
        shutil.copy(file, folder)
    for name in CODE:
        shutil.copy(code / name, folder)
    remote = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    remote.save_pretrained(saved)
    again = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
    text = f"<img>{IMAGE_MARK}</img> <eop> x{ANSWER_MARK}"
    assert remote.encode(text) == again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_work_alone(tokenizer, duplicate, tmp_path):
    twin = duplicate(tokenizer)
    assert twin.encode("你好 <eop> a") == tokenizer.encode("你好 <eop> a")
    assert twin.decode([5, 30]) == "0" and twin.gmask_token_id == GMASK
    twin.save_pretrained(tmp_path)
    assert load(tmp_path).encode("a") == tokenizer.encode("a")


# ---- bad input


def test_a_missing_model_file_is_named(tmp_path, tiny_original):
    shutil.copy(tiny_original / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match=f"ice_text.model.*{tmp_path.name}.*Copy"):
        load(tmp_path)
    with pytest.raises(ValueError, match="nowhere.model.*No such file.*Copy"):
        ChatGLMTokenizer("nowhere.model")
    with pytest.raises(ValueError, match="Copy"):
        ChatGLMTokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no sentencepiece model.*Copy"),
        (b"<html>404</html>", "no sentencepiece model.*Copy"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer.*git lfs pull"),
    ],
)
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path, tiny_original, content, message):
    shutil.copy(tiny_original / "tokenizer_config.json", tmp_path)
    (tmp_path / "ice_text.model").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path.name}/ice_text.model.*{message}"):
        load(tmp_path)


def test_a_model_cut_short_is_named(tmp_path, tiny_original):
    path = tmp_path / "ice_text.model"
    path.write_bytes((tiny_original / "ice_text.model").read_bytes()[:100_001])
    with pytest.raises(ValueError, match="ice_text.model.*Copy"):
        ChatGLMTokenizer(str(path))


def test_another_sentencepiece_model_is_named(tmp_path):
    path = tmp_path / "ice_text.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "a b c d"]),
        model_prefix=str(tmp_path / "ice_text"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"ice_text.model.*not ChatGLM-6B's.*\[MASK\].*Copy"):
        ChatGLMTokenizer(str(path))


def test_shifted_ids_of_early_checkpoints_are_refused(tiny_original):
    with pytest.raises(ValueError, match="num_image_tokens must be 0, found 20000"):
        load(tiny_original, num_image_tokens=20000)


def test_saving_into_no_folder_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no directory"):
        tokenizer.save_vocabulary(str(tmp_path / "absent"))


@properties
@given(st.lists(st.integers(0, 895)))
def test_any_ids_decode_to_text_that_can_be_encoded(tokenizer, ids):
    text = tokenizer.decode([index % tokenizer.vocab_size for index in ids])
    tokenizer.encode(text.replace("\ufffd", ""), split_special_tokens=True)
