"""What does not fit together is refused in words by `forward` and `generate`, and what is nothing counts as nothing."""

import pytest
import torch

from tests.helpers import load_float32


GREET, DESCRIBE = "问：你好\n答：", "问：描述这张图片。\n答："


@pytest.fixture(scope="module")
def greeting(processor) -> dict:
    return dict(processor(text=GREET, return_tensors="pt"))


def both_refuse(model, batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**batch)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, do_sample=False, max_new_tokens=2)


@pytest.mark.parametrize("columns", [0.5, 2])
@pytest.mark.parametrize("dim", [1, 2])
def test_soft_prompts_of_another_shape_are_refused(model, described, dim, columns):
    embeds = model.get_image_features(described["pixel_values"]).pooler_output
    size = int(embeds.shape[dim] * columns)
    embeds = torch.cat((embeds, embeds), dim=dim).narrow(dim, 0, size)
    both_refuse(model, {"input_ids": described["input_ids"], "image_embeds": embeds}, "image_embeds must be")


@pytest.mark.parametrize("name", ["pixel_values", "image_embeds"])
def test_a_picture_without_its_batch_dimension_gets_the_right_remedy(model, described, name):
    picture = described["pixel_values"]
    if name == "image_embeds":
        picture = model.get_image_features(picture).pooler_output
    batch = {"input_ids": described["input_ids"], name: picture[0]}
    both_refuse(model, batch, rf"Pass {name}\[None\]")


def test_no_pictures_are_no_pictures(model, greeting, described):
    none = described["pixel_values"][:0]
    torch.testing.assert_close(model(**greeting, pixel_values=none).logits, model(**greeting).logits)
    options = {"do_sample": False, "max_new_tokens": 3}
    assert model.generate(**greeting, pixel_values=none, **options).equal(model.generate(**greeting, **options))


def test_ids_and_embeddings_of_different_prompts_are_refused(model, greeting, described):
    embeds = model.get_input_embeddings()(described["input_ids"])
    both_refuse(model, {"input_ids": greeting["input_ids"], "inputs_embeds": embeds}, "not the same tokens")


@pytest.mark.parametrize(("rows", "cut"), [(1, 3), (2, 0)])
def test_a_mask_of_other_tokens_is_refused(model, greeting, rows, cut):
    mask = torch.ones(rows, greeting["input_ids"].shape[1] - cut, dtype=torch.long)
    both_refuse(model, greeting | {"attention_mask": mask}, "attention_mask is")


def test_a_mask_without_the_cached_tokens_is_refused(model, greeting):
    with torch.no_grad():
        cache = model(**greeting, use_cache=True).past_key_values
    positions = torch.tensor([[[greeting["input_ids"].shape[1] - 2], [2]]])
    step = {"input_ids": torch.tensor([[700]]), "position_ids": positions, "past_key_values": cache}
    with pytest.raises(ValueError, match="those in the cache included"):
        model(**step, attention_mask=torch.ones(1, 1))


@pytest.mark.parametrize("change", [lambda ids: ids[0], lambda ids: ids[:, :0]])
def test_ids_that_are_no_batch_are_refused(model, greeting, change):
    both_refuse(model, {"input_ids": change(greeting["input_ids"])}, r"input_ids must be \[batch, length\]")


def test_ids_below_zero_are_refused_before_they_reach_the_device(model, greeting):
    ids = greeting["input_ids"].clone()
    ids[0, 0] = -100
    both_refuse(model, {"input_ids": ids}, "below 0")


def test_a_prompt_that_ends_with_padding_is_refused_without_a_mask(model, greeting):
    padding = torch.full((1, 2), model.config.text_config.pad_token_id)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate(torch.cat((greeting["input_ids"], padding), dim=1), max_new_tokens=2)


def test_rows_beyond_the_tokens_stay_unchosen_behind_a_processor_of_the_caller(model, greeting):
    num_tokens = model.config.text_config.num_tokens
    assert num_tokens < model.config.text_config.vocab_size

    def only_others(input_ids, scores):
        return torch.zeros_like(scores).masked_fill(torch.arange(scores.shape[1]) < num_tokens - 1, -torch.inf)

    length = greeting["input_ids"].shape[1]
    chosen = model.generate(**greeting, do_sample=True, logits_processor=[only_others], max_new_tokens=20)[:, length:]
    assert (chosen == num_tokens - 1).all()


@pytest.mark.parametrize("text", [5, [5], [None], [["问：", "你好"]], {"text": "你好"}])
def test_the_processor_takes_texts_alone_for_text(processor, text):
    with pytest.raises(ValueError, match="text must be a string or a list of strings"):
        processor(text=text)


def test_the_processor_takes_none_for_a_row_without_a_picture(processor, pictures):
    texts = [GREET, f"<img>{processor.image_token}</img>{DESCRIBE}"]
    batch = processor(text=texts, images=[None, pictures[0]], padding=True, return_tensors="pt")
    expected = processor(text=texts, images=[[], [pictures[0]]], padding=True, return_tensors="pt")
    assert all(batch[name].equal(expected[name]) for name in expected)


def test_tokens_without_a_row_are_refused_also_if_the_tokenizer_has_them(tiny_original, tokenizer, described):
    model = load_float32(tiny_original)
    model.resize_token_embeddings(len(tokenizer) - 1)
    ids = torch.cat((torch.tensor([[len(tokenizer) - 1]]), described["input_ids"]), dim=1)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model.generate(ids, pixel_values=described["pixel_values"], tokenizer=tokenizer, max_new_tokens=2)


@pytest.mark.parametrize("wrong", ["processor", "path", None])
def test_chat_says_what_it_needs_where_the_tokenizer_belongs(model, processor, wrong):
    given = processor if wrong == "processor" else wrong
    with pytest.raises(ValueError, match="needs the tokenizer first"):
        model.chat(given, "你好")
    with pytest.raises(ValueError, match="needs the tokenizer first"):
        list(model.stream_chat(given, "你好"))
