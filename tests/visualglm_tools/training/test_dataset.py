"""Rows of files to batches: every bad row is named, and labels are the original's."""

import json
import re

import pytest
import torch
from PIL import Image

from tests.helpers import assistant, load_float32, user
from visualglm_hf.conversation import build_prompt, expand_images
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import IGNORED, Collator, Encoder, describe_truncation


QUESTION = "这张图片的背景里有什么内容？"


@pytest.fixture
def rows(tmp_path):
    """Writes rows beside two pictures and reads them again."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    def read(rows, name="dataset.json", convert=lambda conversation: conversation):
        lines = name.endswith(".jsonl")
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_dataset([tmp_path / name], convert)

    return read


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor, 256, 64, 2048)


def original_row(golden_dir, case):
    return {"img": str(golden_dir / case["image"]), "prompt": case["prompt"], "label": case["label"]}


# ---------------------------------------------------------------- parity


def test_ids_labels_and_loss_are_the_originals(golden, golden_dir, processor, model, rows):
    for case in golden["training"]:
        encoder = Encoder(processor, case["max_source_length"], case["max_target_length"], 2048, english=False)
        [[example]] = rows([original_row(golden_dir, case)], convert=encoder)
        length = len(example.input_ids)
        placeholder = processor.tokenizer.pad_token_id  # the original's training has <pad> in the picture's place
        ids = [placeholder if index == processor.image_token_id else index for index in example.input_ids]
        assert ids == case["input_ids"][:length]
        assert example.labels == case["labels"][:length]
        assert set(case["labels"][length:]) <= {IGNORED}
        with torch.no_grad():
            loss = model(**Collator(processor)([example])).loss
        assert loss.item() == pytest.approx(case["loss.f32"], rel=2e-5)


def test_the_loss_of_a_batch_is_the_originals(golden, golden_dir, processor, model, rows):
    cases = [case for case in golden["training"] if case["max_source_length"] == 96]
    encoder = Encoder(processor, 96, 40, 2048, english=False)
    examples = [
        example for row in rows([original_row(golden_dir, case) for case in cases], convert=encoder) for example in row
    ]
    with torch.no_grad():
        loss = model(**Collator(processor)(examples)).loss
    assert loss.item() == pytest.approx(golden["training_batch"]["loss.f32"], rel=2e-5)


def test_gradients_are_the_originals(golden, golden_dir, processor, tiny_original, rows):
    model = load_float32(tiny_original)
    case = next(case for case in golden["training"] if "grad_norms.f32 (eval mode, no dropout)" in case)
    encoder = Encoder(processor, case["max_source_length"], case["max_target_length"], 2048, english=False)
    [[example]] = rows([original_row(golden_dir, case)], convert=encoder)
    model(**Collator(processor)([example])).loss.backward()
    for name, norm in case["grad_norms.f32 (eval mode, no dropout)"].items():
        if name != "transformer.word_embeddings.weight":  # there the original's <pad> placeholders had a share
            assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-3), name


def test_truncation_is_counted_as_the_original_did_it(golden, golden_dir, processor, rows):
    for case in golden["training"]:
        encoder = Encoder(processor, case["max_source_length"], case["max_target_length"], 2048, english=False)
        [[example]] = rows([original_row(golden_dir, case)], convert=encoder)
        cut = [example.source_length > encoder.max_source_length, example.target_length > encoder.max_target_length]
        assert cut == case["truncated_source_target"]
        message = describe_truncation([example], encoder)
        assert (message is None) == (not any(cut))
        if message:
            assert message.startswith(f"{cut[0]:d} source(s) and {cut[1]:d} target(s) of 1 examples")
            lengths = (example.source_length, example.target_length)
            whole = Encoder(processor, *lengths, 2048, english=False).encode(example.conversation)
            assert describe_truncation([whole], Encoder(processor, *lengths, 2048)) is None


# ---------------------------------------------------------------- layouts


def test_both_layouts_of_the_same_row_are_one_example(rows, encoder):
    same = [
        {"img": "a.png", "prompt": QUESTION, "label": "海。"},
        {"messages": [user(QUESTION), assistant("海。")], "images": ["a.png"]},
        {"messages": [user(f"<image>{QUESTION}"), assistant("海。")], "images": "a.png", "id": 7},
        {
            "messages": [user({"type": "image"}, {"type": "text", "text": QUESTION}), assistant("海。")],
            "images": ["a.png"],
        },
        {"messages": [user({"type": "image", "path": "a.png"}, {"type": "text", "text": QUESTION}), assistant("海。")]},
    ]
    for name in ("dataset.json", "dataset.jsonl"):
        examples = [example for [example] in rows(same, name, encoder)]
        assert len(examples) == len(same)
        for example in examples:
            assert (example.input_ids, example.labels) == (examples[0].input_ids, examples[0].labels)
            assert [picture.name for picture in example.pictures] == ["a.png"]


def test_every_answer_of_a_conversation_is_learned_in_its_context(rows, encoder, processor):
    turns = [user("<image>这是什么？"), assistant("海。"), user("<image>那这个呢？"), assistant("草地。")]
    [[first, second]] = rows([{"messages": turns, "images": ["a.png", "b.png"]}], convert=encoder)
    assert [picture.name for picture in first.pictures] == ["a.png"]
    assert [picture.name for picture in second.pictures] == ["a.png", "b.png"]
    prompt = build_prompt("那这个呢？", [("这是什么？", "海。")], image_turns=(0, 1))
    assert second.prompt_ids == processor.tokenize([prompt], [2])["input_ids"][0]
    learned = [index for index in second.labels if index != IGNORED]
    assert processor.tokenizer.decode(learned) == "草地。"
    assert learned[0] == processor.tokenizer.bos_token_id and learned[-1] == processor.tokenizer.eos_token_id


def test_the_prompt_is_the_one_that_chat_will_write(rows, encoder, processor):
    [[english], [chinese]] = rows(
        [{"img": "a.png", "prompt": "What is it?", "label": "x"}, {"prompt": "你好", "label": "x"}], convert=encoder
    )
    for example, query, images in ((english, "What is it?", 1), (chinese, "你好", 0)):
        prompt = expand_images(build_prompt(query, image_turns=(0,) * images), images, 32)
        assert example.prompt_ids == processor.tokenizer(prompt, split_special_tokens=True)["input_ids"]


def test_text_and_pictures_share_a_batch_padded_on_the_left(rows, encoder, processor, model):
    several = [
        {"messages": [user("<image><image>比较"), assistant("不同")], "images": ["a.png", "b.png"]},
        {"prompt": "你好", "label": "你好！"},
        {"img": "b.png", "prompt": QUESTION, "label": "海。"},
    ]
    examples = [example for [example] in rows(several, convert=encoder)]
    batch = Collator(processor)(examples)
    assert batch["pixel_values"].shape == (3, 3, 224, 224)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][1, 0]
    with torch.no_grad():
        together = model(**batch).loss
        tokens = [sum(label != IGNORED for label in example.labels) for example in examples]
        alone = [model(**Collator(processor)([example])).loss for example in examples]
    mean = sum(loss * count for loss, count in zip(alone, tokens, strict=True)) / sum(tokens)
    assert together.item() == pytest.approx(mean.item(), rel=1e-5)


def test_only_text_makes_a_batch_without_pictures(rows, encoder, processor):
    [[example]] = rows([{"img": "", "prompt": "你好", "label": "你好！"}], convert=encoder)
    assert set(Collator(processor)([example])) == {"input_ids", "attention_mask", "labels"}


def test_pictures_are_beside_the_file_or_else_in_the_current_folder(rows, tmp_path, monkeypatch):
    (tmp_path / "project" / "pictures").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "project" / "pictures" / "c.png")
    row = {"img": "pictures/c.png", "prompt": "x", "label": "y"}
    with pytest.raises(ValueError, match="neither in .* nor in the current folder"):
        rows([row])
    monkeypatch.chdir(tmp_path / "project")
    assert rows([row])[0].pictures[0].is_file()


# ---------------------------------------------------------------- bad input


BAD_ROWS = {
    "a row must be an object": "text",
    "unknown field(s) 'lable'": {"img": "a.png", "prompt": "x", "lable": "y"},
    "'label' is missing": {"img": "a.png", "prompt": "x"},
    "label is empty": {"img": "a.png", "prompt": "x", "label": " "},
    "prompt is empty": {"img": "a.png", "prompt": "", "label": "y"},
    "label must be a string, found int": {"img": "a.png", "prompt": "x", "label": 3},
    "pictures must be given as file names, found 3": {"img": 3, "prompt": "x", "label": "y"},
    "there is no picture 'gone.png'": {"img": "gone.png", "prompt": "x", "label": "y"},
    "pictures must be files": {"img": "https://example.org/a.png", "prompt": "x", "label": "y"},
    "images has 2 picture(s), the messages mention 1": {
        "messages": [user("<image>x"), assistant("y")],
        "images": ["a.png", "b.png"],
    },
    "messages must be a list": {"messages": "x"},
    "messages[0] must have a role": {"messages": [{"from": "human", "value": "x"}]},
    "messages[0] has a part": {"messages": [user({"type": "video"}, {"type": "text", "text": "x"}), assistant("y")]},
    "must have the last word": {"messages": [user("x"), assistant("y"), user("z")]},
    "must alternate": {"messages": [user("x"), user("y"), assistant("z")]},
    "messages[1] is empty": {"messages": [user("x"), assistant("")]},
    "only the user can show pictures": {
        "messages": [user("x"), assistant([{"type": "image", "path": "a.png"}, {"type": "text", "text": "y"}])]
    },
    "reserved for the prompt": {"prompt": "\ufffc", "label": "y"},
    "has no token to train on": {"prompt": "x", "label": "\u200b"},
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_bad_row_is_named_with_what_is_wrong(what, rows, encoder):
    good = {"img": "a.png", "prompt": "x", "label": "y"}
    with pytest.raises(ValueError, match=f"dataset.json, row 2: .*{re.escape(what)}") as caught:
        rows([good, BAD_ROWS[what]], convert=encoder)
    assert "row 1" not in str(caught.value)


def test_all_bad_rows_are_named_at_once(rows, encoder):
    with pytest.raises(ValueError, match=r"^70 bad row\(s\)") as caught:
        rows([3] * 70 + [{"prompt": "x", "label": "y"}], convert=encoder)
    assert all(f"row {number}" in str(caught.value) for number in range(1, 71))


def test_a_damaged_picture_is_found_before_training(rows, tmp_path):
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="row 1: .*damaged.png"):
        rows([{"img": "damaged.png", "prompt": "x", "label": "y"}])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", "[{]", "is no JSON"),
        ("d.json", '{"prompt": 1}', "must hold a list"),
        ("d.json", "[]", "has no rows"),
        ("d.json", '{"a": 1}\n{"a": 2}', "needs the ending .jsonl"),
        ("d.jsonl", '{"a": 1}\n{"a"', "line 2 is no JSON"),
    ],
)
def test_an_unreadable_file_is_one_error(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_dataset([tmp_path / name])


def test_a_missing_or_binary_file_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_dataset([tmp_path / "gone.json"])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read_dataset([tmp_path / "binary.json"])


def test_a_picture_is_never_cut(rows, processor):
    row = {"messages": [user("<image><image>比较"), assistant("不同")], "images": ["a.png", "b.png"]}
    with pytest.raises(
        ValueError, match=r"row 1: --max_source_length 64 would cut a picture; this row needs up to (\d+)"
    ):
        rows([row], convert=Encoder(processor, 64, 256, 2048))


def test_lengths_without_room_for_an_answer_are_refused(processor):
    with pytest.raises(ValueError, match="--max_target_length 2 leaves no token to train on"):
        Encoder(processor, 64, 2, 2048)
    with pytest.raises(ValueError, match="more than the 2048 tokens"):
        Encoder(processor, 2000, 256, 2048)
