"""Room: processor. Messages and pictures to tensors, and the pipeline on top of them."""

import base64
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import pipeline

from visualglm_hf import ChatGLMTokenizer, VisualGLMImageProcessor, VisualGLMProcessor
from visualglm_hf.conversation import build_prompt


def ask(*content) -> list[dict]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


def inputs_of(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def test_chat_template_gives_the_originals_input_ids(processor, golden, pictures):
    files = [image["file"] for image in golden["images"]]
    for case in golden["prompts"]:
        turns = [*case["history"], (case["query"], None)]
        messages = []
        for index, (query, response) in enumerate(turns):
            image = (
                [] if index or not case["image"] else [{"type": "image", "image": pictures[files.index(case["image"])]}]
            )
            messages += ask(*image, query)
            if response is not None:
                messages.append({"role": "assistant", "content": response})
        inputs = inputs_of(processor, messages, english=False)
        assert inputs["input_ids"][0].tolist() == case["input_ids"]
        assert ("pixel_values" in inputs) == bool(case["image"])


def test_path_picture_and_base64_give_the_same_pixels(processor, golden_dir, pictures):
    path = golden_dir / "images" / "img3.jpg"
    encoded = base64.b64encode(path.read_bytes()).decode()
    sources = [
        {"type": "image", "image": pictures[3]},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": f"data:image/jpeg;base64,{encoded}"},
        {"type": "image", "base64": encoded},
    ]
    pixels = [inputs_of(processor, ask(source, "这是什么？"))["pixel_values"] for source in sources]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])


def test_a_web_address_is_fetched(processor, golden_dir, pictures):
    import functools
    import http.server
    import threading

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=golden_dir)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/images/img3.jpg"
        inputs = inputs_of(processor, ask({"type": "image", "url": url}, "这是什么？"))
        server.shutdown()
    expected = processor.image_processor(pictures[3], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


@pytest.mark.parametrize("text", ["问：你好\n答：", ["问：你好\n答："], ("问：你好\n答：", "问：a\n答：")])
def test_without_tensors_there_is_one_row_for_each_text(processor, text):
    rows = [text] if isinstance(text, str) else text
    inputs = processor(text=text)
    expected = [processor(text=[row], return_tensors="pt")["input_ids"][0].tolist() for row in rows]
    assert inputs["input_ids"] == expected
    assert inputs["attention_mask"] == [[1] * len(ids) for ids in expected]


def test_every_placeholder_becomes_32_tokens(processor, pictures):
    text = f"<img>{processor.image_token}</img>" * 2 + "问：哪个更大？\n答："
    inputs = processor(text=text, images=[pictures[0], pictures[1]], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 64
    assert inputs["pixel_values"].shape == (2, 3, 224, 224)


def test_a_batch_is_padded_on_the_left(processor):
    inputs = processor(text=["问：你好\n答：", "问：a\n答："], padding=True, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(-1)
    assert lengths[0] != lengths[1]
    assert (inputs["attention_mask"][:, -1] == 1).all()


def test_batches_of_messages_with_and_without_pictures(processor, pictures):
    conversations = [ask({"type": "image", "image": pictures[0]}, "这是什么？"), ask("你好")]
    inputs = inputs_of(processor, conversations, processor_kwargs={"padding": True})
    assert inputs["input_ids"].shape[0] == 2
    assert inputs["pixel_values"].shape[0] == 1
    assert (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist() == [32, 0]


@pytest.mark.parametrize("typed", ["<sop>", "<eop>", "<unk>", "[MASK]", "[gMASK]", "<pad>", "<img>x</img>", "<n>"])
def test_special_tokens_typed_by_a_user_are_text(processor, typed):
    config_ids = {1104, 1105, 0, 1100, 1101, 3}
    inputs = inputs_of(processor, ask(f"a{typed}b"))
    assert not config_ids & set(inputs["input_ids"][0, :-2].tolist())
    assert inputs["input_ids"][0, -2:].tolist() == [1101, 1104]


@pytest.mark.parametrize(
    ("text", "num_images", "complaint"),
    [
        ("问：a\n答：", 1, r"0 image placeholder\(s\) for 1 image\(s\)"),
        ("<img>\ufffc</img>问：a\n答：", 0, r"1 image placeholder\(s\) for 0 image\(s\)"),
        ("<img>\ufffc</img>问：a\n答：", 2, r"1 image placeholder\(s\) for 2 image\(s\)"),
        (["a", "b"], 1, r"\[0, 0\] image placeholders for 1 image\(s\)"),
    ],
)
def test_placeholders_and_pictures_must_match(processor, pictures, text, num_images, complaint):
    with pytest.raises(ValueError, match=complaint):
        processor(text=text, images=pictures[:num_images] or None)


def test_lists_of_pictures_must_be_one_per_text(processor, pictures):
    with pytest.raises(ValueError, match=r"2 lists of pictures for 1 text"):
        processor(text=["a"], images=[[pictures[0]], []])


def test_neither_text_nor_picture_is_refused(processor):
    with pytest.raises(ValueError, match="Give text, images or both"):
        processor()


def test_truncation_never_cuts_a_picture(processor, pictures):
    text = f"<img>{processor.image_token}</img>问：a\n答："
    with pytest.raises(ValueError, match="Truncation cut the pictures of text 0"):
        processor(text=text, images=pictures[0], truncation=True, max_length=20)


def test_bad_picture_is_named(processor, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png"):
        processor(text=f"<img>{processor.image_token}</img>问：a\n答：", images=str(tmp_path / "empty.png"))


REGISTERED = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from visualglm_hf import VisualGLMProcessor, register

register()
original, saved, picture = sys.argv[1:]
assert type(AutoModelForImageTextToText.from_pretrained(original)).__module__.startswith("visualglm_hf.")
assert type(AutoTokenizer.from_pretrained(original)).__module__.startswith("visualglm_hf.")
assert type(AutoProcessor.from_pretrained(saved)) is VisualGLMProcessor
processor = VisualGLMProcessor.from_pretrained(saved)
content = [{"type": "image", "path": picture}, {"type": "text", "text": "这是什么？"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
)
print(inputs["input_ids"][0] if isinstance(inputs["input_ids"][0], list) else inputs["input_ids"])
"""


def test_saved_processor_loads_and_register_spares_remote_code(processor, tiny_original, golden_dir, tmp_path):
    # In a process of its own: registering cannot be undone.
    processor.save_pretrained(tmp_path)
    picture = golden_dir / "images" / "img0.png"
    command = [sys.executable, "-c", REGISTERED, str(tiny_original), str(tmp_path), str(picture)]
    finished = subprocess.run(command, cwd=tiny_original.parents[2], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    expected = inputs_of(processor, ask({"type": "image", "path": str(picture)}, "这是什么？"))
    assert finished.stdout.splitlines()[-1] == str(expected["input_ids"][0].tolist())


def test_the_tokenizer_alone_has_the_template(processor, golden):
    case = golden["prompts"][3]
    ids = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": case["query"]}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert ids == case["input_ids"]


def test_image_text_to_text_pipeline_answers(model, processor, golden, pictures):
    turn = golden["chat"][0]["turns"][0]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    messages = ask({"type": "image", "image": pictures[0]}, turn["query"])
    length = turn["max_length"] - len(turn["prompt_ids"])
    answer = pipe(text=messages, max_new_tokens=length, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer == turn["response"]
    text = f"<img>{processor.image_token}</img>问：{turn['query']}\n答："
    answer = pipe(images=pictures[0], text=text, max_new_tokens=length, do_sample=False, return_full_text=False)
    assert turn["response"] in answer[0]["generated_text"]


def test_options_go_to_the_image_processor_or_to_the_tokenizer(processor, pictures):
    prompt = build_prompt("这是什么？", image_turns=[0])
    plain = processor(images=pictures[:1], text=prompt, return_tensors="np")
    raw = processor(images=pictures[:1], text=prompt, do_normalize=False, padding="max_length", max_length=99)
    assert np.asarray(raw["pixel_values"]).min() >= 0 > plain["pixel_values"].min()
    assert len(raw["input_ids"][0]) == 99
    grouped = {"images_kwargs": {"do_normalize": False}, "common_kwargs": {"return_tensors": "np"}}
    grouped = processor(images=pictures[:1], text=prompt, **grouped)
    np.testing.assert_array_equal(grouped["pixel_values"], np.asarray(raw["pixel_values"]))


def test_an_option_given_twice_is_refused(processor, pictures):
    with pytest.raises(ValueError, match="padding is given twice"):
        processor(images=pictures[:1], text="x", padding=True, text_kwargs={"padding": False})


def test_what_the_tokenizer_was_loaded_with_holds_in_the_processor(tiny_original):
    tokenizer = ChatGLMTokenizer.from_pretrained(tiny_original, padding="max_length", max_length=50)
    processor = VisualGLMProcessor(VisualGLMImageProcessor(), tokenizer)
    assert len(processor(text="你好")["input_ids"][0]) == 50
