"""What people type is text, through every door that makes tokens of messages; and answers come back as they left."""

import pytest
from jinja2 import TemplateError
from transformers import TextIteratorStreamer, pipeline

from tests.helpers import assistant, user
from visualglm_hf.conversation import ANSWER_MARK, END_MARK, build_prompt
from visualglm_hf.tokenization_chatglm import SPECIAL_PIECES, WHITESPACE_PIECES


TYPED = [*SPECIAL_PIECES, *WHITESPACE_PIECES[:3], WHITESPACE_PIECES[-1], "<img>x</img>", "<|endoftext|>", "<ENC>"]
SURROUNDED = ["{}", "a{}b", " {} ", "你好{}", "{}{}"]
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def system(text) -> dict:
    return {"role": "system", "content": text}


def template_ids(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def rendered_ids(tokenizer, messages, **options) -> list[int]:
    """In two steps, as programs do that look at the prompt first."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def processor_ids(processor, messages, **options) -> list[int]:
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"][0]


@pytest.mark.parametrize("around", SURROUNDED)
@pytest.mark.parametrize("typed", TYPED)
def test_all_doors_give_the_ids_of_chat(typed, around, model, tokenizer, processor):
    text = around.format(typed, typed)
    messages = [user(f"q{text}"), assistant(text), user(text)]
    chat = model.prepare_turn(tokenizer, None, text, [(f"q{text}", text)]).inputs["input_ids"][0].tolist()
    options = {"add_generation_prompt": True}
    assert template_ids(tokenizer, messages, **options) == chat
    assert rendered_ids(tokenizer, messages, **options) == chat
    assert processor_ids(processor, messages, **options) == chat
    assert template_ids(tokenizer, [messages, messages[:1]], padding=True, **options)[0] == chat
    control = {tokenizer.convert_tokens_to_ids(piece) for piece in SPECIAL_PIECES}
    assert not control & set(chat[:-2])
    assert chat[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]


FORMS = {
    "a system message": ([system("{}"), user("a")], {"add_generation_prompt": True}),
    "an answer": ([user("a"), assistant("{}")], {}),
    "an answer that goes on": ([user("a"), assistant("b{}")], {"continue_final_message": True}),
    "no answer yet": ([user("{}")], {}),
    "parts": ([user([{"type": "text", "text": "{}"}])], {"add_generation_prompt": True}),
}


@pytest.mark.parametrize("typed", SPECIAL_PIECES)
@pytest.mark.parametrize("name", FORMS)
def test_typed_tokens_are_text_in_every_form_of_message(name, typed, tokenizer, processor):
    messages, options = FORMS[name]
    contents = [message["content"] for message in messages]
    text_of = {"{}": typed, "b{}": f"b{typed}"}
    messages = [
        {**message, "content": text_of.get(content, content)}
        if isinstance(content, str)
        else user([{"type": "text", "text": typed}])
        for message, content in zip(messages, contents, strict=True)
    ]
    ids = template_ids(tokenizer, messages, **options)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert ids == tokenizer(rendered, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    of_processor = processor_ids(processor, messages, **options)
    assert of_processor == (ids if start[1] in ids else [*ids, *start])  # it ends every context
    control = [index for index in ids if index in tokenizer.convert_tokens_to_ids(list(SPECIAL_PIECES))]
    ends = [tokenizer.eos_token_id] * rendered.count(END_MARK)
    assert control == [*start * rendered.count(ANSWER_MARK), *ends]


def test_whoever_wants_control_tokens_of_what_is_typed_says_so(tokenizer):
    ids = template_ids(tokenizer, [user("<sop>")], tokenizer_kwargs={"split_special_tokens": False})
    assert tokenizer.bos_token_id in ids
    assert tokenizer.bos_token_id in tokenizer("a<sop>")["input_ids"][:-2]  # plain text is the original's


def test_an_end_that_a_trainer_writes_behind_an_answer_is_an_end(tokenizer):
    example = build_prompt("你好<eop>") + "您好<eop>!"
    expected = tokenizer(example + END_MARK)["input_ids"]
    assert expected.count(tokenizer.eos_token_id) == 1
    assert tokenizer(example + "<eop>")["input_ids"] == expected
    assert tokenizer(example + END_MARK + "<eop>")["input_ids"] == expected


def test_a_mask_of_answers_is_refused_in_words(tokenizer, processor):
    messages = [user("a"), assistant("b")]
    with pytest.raises(ValueError, match="fast tokenizer.*begins behind"):
        template_ids(tokenizer, messages, return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="slow tokenizers"):
        processor_ids(processor, messages, return_assistant_tokens_mask=True)


def test_saved_and_loaded_typed_tokens_are_still_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert template_ids(again, [user("<sop>")]) == template_ids(tokenizer, [user("<sop>")])
    assert rendered_ids(again, [user("<sop>"), assistant("<eop>")]) == template_ids(
        tokenizer, [user("<sop>"), assistant("<eop>")]
    )
    strict = type(tokenizer).from_pretrained(tmp_path, split_special_tokens=True)
    assert strict.bos_token_id not in strict("a<sop>", add_special_tokens=False)["input_ids"]


# Answers


@pytest.fixture(scope="module")
def image_pipeline(model, processor):
    return pipeline("image-text-to-text", model=model, processor=processor)


@pytest.mark.parametrize("query", ["描述这张图片。", "What is it?", "这是什么？\n\n"])
@pytest.mark.parametrize("picture", [0, 1, 2])
def test_a_conversation_through_the_pipeline_is_that_of_chat(
    query, picture, model, tokenizer, processor, image_pipeline, pictures
):
    content = [{"type": "image", "image": pictures[picture]}, {"type": "text", "text": query}]
    messages, history, image = [user(content)], None, pictures[picture]
    for follow_up in ("然后呢？", "Why?"):
        answer, history = model.chat(tokenizer, image, query, history, min_length=0, repetition_penalty=1.0, **GREEDY)
        messages = image_pipeline(text=messages, **GREEDY)[0]["generated_text"]
        assert messages[-1] == assistant(answer)
        messages.append(user([{"type": "text", "text": follow_up}]))
        query, image = follow_up, None
        turn = model.prepare_turn(tokenizer, query, None, history)
        assert processor_ids(processor, messages, add_generation_prompt=True) == turn.inputs["input_ids"][0].tolist()


def test_the_text_behind_a_prompt_is_the_answer(image_pipeline, model, processor, pictures):
    messages = [user([{"type": "image", "image": pictures[0]}, {"type": "text", "text": "啊,a"}])]
    [answer] = image_pipeline(text=messages, return_full_text=False, **GREEDY)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, **GREEDY)
    alone = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    assert alone == [answer["generated_text"]]
    whole = processor.post_process_image_text_to_text(output)
    assert whole == [processor.post_process_image_text_to_text(inputs["input_ids"])[0] + alone[0]]
    assert processor.post_process_image_text_to_text(output[0]) == whole
    assert processor.post_process_image_text_to_text(output.tolist()) == whole
    assert processor.post_process_image_text_to_text([]) == []


def test_an_answer_that_was_begun_goes_on(image_pipeline, processor):
    messages = [user([{"type": "text", "text": "你好"}]), assistant([{"type": "text", "text": "你好, 我"}])]
    [result] = image_pipeline(text=messages, **GREEDY)
    answer = result["generated_text"][-1]["content"][-1]["text"]
    assert answer.startswith("你好, 我")
    assert "问" not in answer


def test_text_pipeline_and_streamer_give_answers_that_come_back_as_they_were(model, tokenizer):
    options = {**GREEDY, "max_new_tokens": 12}
    answer, history = model.chat(tokenizer, None, "你好", min_length=0, repetition_penalty=1.0, **options)
    messages = pipeline("text-generation", model=model, tokenizer=tokenizer)([user("你好")], **options)
    inputs = tokenizer.apply_chat_template([user("你好")], add_generation_prompt=True, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, **options, streamer=streamer)
    expected = model.prepare_turn(tokenizer, "再见", None, history).inputs["input_ids"][0].tolist()
    for text in (messages[0]["generated_text"][-1]["content"], "".join(streamer)):
        again = [user("你好"), assistant(text), user("再见")]
        assert template_ids(tokenizer, again, add_generation_prompt=True) == expected, (text, answer)


@pytest.mark.parametrize("extra", ["tools", "documents"])
def test_what_the_prompt_has_no_place_for_is_refused(tokenizer, processor, extra):
    given = {extra: [{"type": "function", "function": {"name": "look", "parameters": {}}}]}
    for template in (tokenizer.apply_chat_template, processor.apply_chat_template):
        with pytest.raises(TemplateError, match="no tools and no documents"):
            template([{"role": "user", "content": "你好"}], tokenize=False, **given)
        assert template([{"role": "user", "content": "你好"}], tokenize=False, tools=None, documents=[])


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 5}])
def test_the_text_of_a_part_is_a_string(tokenizer, part):
    with pytest.raises(TemplateError, match="must be a string"):
        tokenizer.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)
