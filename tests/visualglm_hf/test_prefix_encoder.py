"""P-tuning: the original's checkpoints with a prefix, and PEFT's prefix tuning on this model as it comes.

Both put learned keys and values before all others. With the same numbers they must compute the same, so that each test
of one is a test of the other; the original's own outputs are compared too. It crashed with a picture; here it does not.
"""

import json
import shutil

import pytest
import torch
from transformers import StaticCache

from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration


PROJECTIONS = pytest.mark.parametrize("projection", [False, True], ids=["table", "projection"])
ENCODER = "transformer.prefix_encoder."


@pytest.fixture(scope="module")
def prefixes(golden, arrays) -> dict[bool, dict[str, torch.Tensor]]:
    """The original's tensors, for both kinds of prefix."""
    cases = {projection: golden["ptuning_hf"][f"prefix_projection={projection}"] for projection in (False, True)}
    return {
        projection: {key: torch.from_numpy(arrays[name]) for key, name in case["keys"].items()}
        for projection, case in cases.items()
    }


@pytest.fixture(scope="module")
def original_folders(tiny_original, prefixes, tmp_path_factory) -> dict:
    """Checkpoints of the original with the prefix among the weights and its fields in config.json."""
    folders = {}
    for projection, tensors in prefixes.items():
        folder = tmp_path_factory.mktemp("ptuning") / "checkpoint"
        shutil.copytree(tiny_original, folder)
        torch.save(tensors, folder / "pytorch_model-00003-of-00003.bin")
        index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
        index["weight_map"] |= dict.fromkeys(tensors, "pytorch_model-00003-of-00003.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        config = json.loads((folder / "config.json").read_text())
        config |= {"pre_seq_len": 5, "prefix_projection": projection}
        (folder / "config.json").write_text(json.dumps(config))
        folders[projection] = folder
    return folders


@pytest.fixture(scope="module")
def tuned(original_folders) -> dict:
    """The models of these checkpoints."""
    return {projection: load_float32(folder) for projection, folder in original_folders.items()}


@pytest.fixture(scope="module")
def peft_tuned(tiny_original, prefixes) -> dict:
    """PEFT's models with the same prefixes; each on a model of its own, which PEFT changes."""
    peft = pytest.importorskip("peft")
    models = {}
    for projection, tensors in prefixes.items():
        base = load_float32(tiny_original)
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=64
        )
        models[projection] = peft.get_peft_model(base, config).eval()
        names = {key.removeprefix(ENCODER).replace("trans.", "transform."): tensor for key, tensor in tensors.items()}
        models[projection].prompt_encoder["default"].load_state_dict(names)
    return models


@pytest.fixture(scope="module", params=["original", "peft"])
def either(request, tuned, peft_tuned):
    return (tuned if request.param == "original" else peft_tuned)[False]


@pytest.fixture(scope="module")
def rows(processor, pictures) -> list[tuple[str, list]]:
    image = processor.image_token
    return [
        (f"<img>{image}</img>问：描述这张图片。\n答：", pictures[:1]),
        ("问：你好\n答：", []),
        (f"<img>{image}</img><img>{image}</img>问：哪个更好看，第一张还是第二张？\n答：", pictures[1:3]),
    ]


@pytest.fixture(scope="module")
def batch(processor, rows):
    texts, images = zip(*rows, strict=True)
    return processor(text=list(texts), images=list(images), padding=True, return_tensors="pt")


def case_of(golden, projection: bool) -> dict:
    return golden["ptuning_hf"][f"prefix_projection={projection}"]


@PROJECTIONS
def test_checkpoint_with_a_prefix_computes_what_the_original_computed(tuned, golden, arrays, projection):
    case = case_of(golden, projection)
    input_ids = torch.tensor([case["text_input_ids"]])
    with torch.no_grad():
        logits = tuned[projection](input_ids).logits[0]
    assert relative_error(logits, arrays[case["text_logits"]]) < FLOAT32_TOLERANCE
    output = tuned[projection].generate(input_ids, max_length=len(case["generate"]), do_sample=False)
    assert output[0].tolist() == case["generate"]


@PROJECTIONS
def test_peft_computes_what_the_original_computed(peft_tuned, golden, arrays, projection):
    case = case_of(golden, projection)
    inputs = {"input_ids": torch.tensor([case["text_input_ids"]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = peft_tuned[projection](**inputs).logits[0]
    assert relative_error(logits, arrays[case["text_logits"]]) < FLOAT32_TOLERANCE
    output = peft_tuned[projection].generate(**inputs, max_length=len(case["generate"]), do_sample=False)
    assert output[0].tolist() == case["generate"]


@PROJECTIONS
def test_original_and_peft_agree_on_a_padded_batch_with_pictures(tuned, peft_tuned, batch, projection):
    with torch.no_grad():
        ours, pefts = (model(**batch).logits for model in (tuned[projection], peft_tuned[projection]))
    is_read = batch["attention_mask"].bool()
    assert relative_error(pefts[is_read], ours[is_read].numpy()) < FLOAT32_TOLERANCE


@PROJECTIONS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_original_and_peft_generate_the_same(tuned, peft_tuned, batch, projection, options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    ours, pefts = (model.generate(**batch, **options) for model in (tuned[projection], peft_tuned[projection]))
    assert torch.equal(ours, pefts)


def test_batch_generates_what_its_rows_generate_alone(either, processor, rows, batch):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = either.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, (text, images) in enumerate(rows):
        single = processor(text=text, images=images or None, return_tensors="pt")
        alone = either.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert together[row].tolist() == alone.tolist()


def test_cached_logits_equal_uncached_ones(either, processor, rows):
    inputs = processor(text=rows[0][0], images=rows[0][1], return_tensors="pt")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    output = either.generate(**inputs, **options, return_dict_in_generate=True)
    with torch.no_grad():
        whole = either(
            input_ids=output.sequences,
            attention_mask=torch.ones_like(output.sequences),
            pixel_values=inputs["pixel_values"],
        )
    expected = whole.logits[0, -7:-1]
    assert relative_error(torch.cat(output.logits), expected.numpy()) < FLOAT32_TOLERANCE


def test_prefix_changes_the_answer_and_the_picture_too(either, model, processor, rows, pictures):
    text = rows[0][0]
    inputs = [processor(text=text, images=picture, return_tensors="pt") for picture in pictures[:2]]
    with torch.no_grad():
        plain, *tuned = model(**inputs[0]).logits, *(either(**one).logits for one in inputs)
    assert (plain - tuned[0]).abs().max() > 0.1
    assert (tuned[0] - tuned[1]).abs().max() > 0.1


def test_static_cache_generates_the_same(tuned, batch):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    static = tuned[False].generate(**batch, **options, cache_implementation="static")
    assert torch.equal(static, tuned[False].generate(**batch, **options))


def test_prefix_takes_no_place_in_the_cache(tuned, golden):
    input_ids = torch.tensor([case_of(golden, False)["text_input_ids"]])
    cache = StaticCache(config=tuned[False].config, max_cache_len=input_ids.shape[1])
    with torch.no_grad():
        output = tuned[False](input_ids, past_key_values=cache, use_cache=True)
        assert relative_error(output.logits, tuned[False](input_ids).logits.numpy()) < FLOAT32_TOLERANCE
    assert cache.get_seq_length() == input_ids.shape[1]


def test_prefix_is_projected_once_for_an_answer(tuned, batch, monkeypatch):
    encoder, calls = tuned[True].transformer.prefix_encoder, []
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    tuned[True].generate(**batch, max_new_tokens=5, do_sample=False)
    hook.remove()
    assert len(calls) == 1


def test_chat_about_a_picture_works_where_the_original_crashed(tuned, tokenizer, pictures):
    response, history = tuned[False].chat(tokenizer, pictures[0], "描述这张图片。", do_sample=False, max_new_tokens=6)
    assert response
    assert len(history) == 1


def test_prefix_is_trained_through_checkpointed_layers(golden, original_folders):
    model = load_float32(original_folders[True]).train()
    model.transformer.prefix_encoder.dropout.eval()
    input_ids = torch.tensor([case_of(golden, True)["text_input_ids"]])  # the image encoder has dropout
    gradients = []
    for prepare in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        prepare()
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert relative_error(gradients[1], gradients[0].numpy()) < FLOAT32_TOLERANCE


def test_peft_prefix_is_trained_with_pictures(peft_tuned, batch):
    model = peft_tuned[False]
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0
    model.zero_grad()


@PROJECTIONS
def test_checkpoint_is_saved_and_loaded_without_loss(tuned, tmp_path, projection):
    tuned[projection].save_pretrained(tmp_path)
    again, info = VisualGLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in tuned[projection].state_dict().items())


def test_prefix_may_be_added_while_loading(tiny_original, prefixes):
    """The original's recipe for a checkpoint that holds the prefix alone."""
    model, info = VisualGLMForConditionalGeneration.from_pretrained(
        tiny_original, pre_seq_len=5, prefix_projection=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == set(prefixes[True])
    assert model.config.text_config.pre_seq_len == 5
    state = {key.removeprefix(ENCODER): tensor for key, tensor in prefixes[True].items()}
    model.transformer.prefix_encoder.load_state_dict(state)


def test_prefix_of_a_prepared_config_may_be_added_too(tmp_path):
    VisualGLMConfig().save_pretrained(tmp_path)
    assert VisualGLMConfig.from_pretrained(tmp_path, pre_seq_len=7).text_config.pre_seq_len == 7
    assert VisualGLMConfig(pre_seq_len=7).text_config.pre_seq_len == 7
    assert VisualGLMConfig.from_pretrained(tmp_path).pre_seq_len is None


@pytest.mark.parametrize("length", [0, -3])
def test_impossible_prefix_length_is_refused(tiny_original, length):
    fields = json.loads((tiny_original / "config.json").read_text())
    with pytest.raises(ValueError, match="pre_seq_len must be a positive integer"):
        VisualGLMConfig(**{**fields, "pre_seq_len": length})
