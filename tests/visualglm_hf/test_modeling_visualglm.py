"""Room: decoder. Positions, mask, rotary angles, layers, logits, losses; then batches and caches."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from tests.helpers import FLOAT32_TOLERANCE, HALF_LOGITS_TOLERANCE, kept_positions, load_float32, relative_error
from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.modeling_visualglm import build_attention_mask, build_glm_position_ids, compute_rotary


@pytest.fixture(scope="module")
def prompts(golden, pixel_values):
    """Per golden prompt: the case, its ids [1, S] and its picture [1, 3, 224, 224] or None."""
    files = [image["file"] for image in golden["images"]]
    cases = []
    for case in golden["prompts"]:
        index = files.index(case["image"]) if case["image"] else None
        picture = None if index is None else pixel_values[index : index + 1]
        cases.append((case, torch.tensor([case["input_ids"]]), picture))
    return cases


@pytest.fixture(scope="module")
def padded(golden):
    batch = golden["left_padded_batch"]
    return torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])


def run(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, **kwargs)


# Stages


def test_positions_equal_the_originals(model, golden, prompts, padded):
    for case, input_ids, _ in prompts:
        positions = build_glm_position_ids(input_ids, None, model.config.text_config)
        assert positions[0].tolist() == case["position_ids"]
    positions = build_glm_position_ids(*padded, model.config.text_config)
    assert positions.tolist() == golden["left_padded_batch"]["position_ids"]


def test_positions_count_from_the_mask_token_where_there_is_no_gmask(model):
    config = model.config.text_config
    ids = torch.tensor([[7, 8, config.mask_token_id, 9, config.bos_token_id, 7, 7]])
    assert build_glm_position_ids(ids, None, config)[0].tolist() == [[0, 1, 2, 3, 2, 2, 2], [0, 0, 0, 0, 1, 2, 3]]


def test_mask_equals_the_originals(model, arrays, prompts):
    for case, input_ids, _ in prompts:
        name = case["attention_mask (True = masked) [1,sq,sk]"]
        if name not in arrays.files:
            continue
        positions = build_glm_position_ids(input_ids, None, model.config.text_config)
        mask = build_attention_mask(positions, None, 0, input_ids.shape[1])
        assert torch.equal(~mask[:, 0], torch.tensor(arrays[name]).bool().view(mask[:, 0].shape))


def test_mask_survives_a_shift_of_all_positions(model, prompts):
    _, input_ids, _ = prompts[0]
    positions = build_glm_position_ids(input_ids, None, model.config.text_config)
    masks = [build_attention_mask(positions + shift, None, 0, input_ids.shape[1]) for shift in (0, 5)]
    assert torch.equal(*masks)


def test_mask_of_a_padded_batch_equals_the_originals_where_it_is_read(model, arrays, padded):
    input_ids, attention_mask = padded
    positions = build_glm_position_ids(input_ids, attention_mask, model.config.text_config)
    mask = build_attention_mask(positions, attention_mask, 0, input_ids.shape[1])
    expected = ~torch.tensor(arrays["batch.mask"]).bool().view(mask.shape)
    is_read = attention_mask.bool()[:, None, :, None].expand_as(mask)
    assert torch.equal(mask[is_read], expected[is_read])
    assert mask.any(-1).all()  # padding too looks somewhere, so it is never NaN


def test_rotary_angles_equal_the_originals_in_both_precisions(model, golden, arrays):
    positions = torch.arange(300).expand(1, 2, 300)
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16)):
        cos, sin = compute_rotary(positions, model.config.text_config, dtype)
        for ours, theirs in ((cos, f"rotary.cos.{name}"), (sin, f"rotary.sin.{name}")):
            expected = torch.tensor(arrays[theirs])
            assert ours.dtype == dtype
            half = expected.shape[1] // 2  # the original repeats its angles for both members of a pair
            assert torch.equal(expected[:, :half], expected[:, half:])
            assert relative_error(ours[0, :, 0, 0, 0].float(), expected[:, :half].float()) < 1e-6


def test_rotary_angles_of_bfloat16_are_computed_in_float32(model):
    positions = torch.tensor([[[257, 258], [0, 0]]])
    cos, _ = compute_rotary(positions, model.config.text_config, torch.bfloat16)
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[0, 0], cos[0, 1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_of_every_layer_equal_the_originals(model, arrays, prompts, attention):
    model.set_attn_implementation(attention)
    compared = 0
    for case, input_ids, picture in prompts:
        if "hidden.f32" in case:
            output = run(model, input_ids, pixel_values=picture, output_hidden_states=True)
            expected = arrays[case["hidden.f32"]]
            for layer, states in enumerate(output.hidden_states):
                assert relative_error(states[0], expected[layer]) < FLOAT32_TOLERANCE, f"layer {layer}"
            compared += 1
    model.set_attn_implementation("sdpa")
    assert compared


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_originals(model, arrays, prompts, attention):
    model.set_attn_implementation(attention)
    for case, input_ids, picture in prompts:
        kept = kept_positions(case, "f32")
        logits = run(model, input_ids, pixel_values=picture, logits_to_keep=kept).logits[0]
        assert relative_error(logits, arrays[case["logits.f32"]].reshape(logits.shape)) < FLOAT32_TOLERANCE
    model.set_attn_implementation("sdpa")


def test_half_precision_logits_stay_within_rounding_noise(half_model, arrays, prompts):
    for case, input_ids, picture in prompts:
        kept = kept_positions(case, "f16")
        logits = run(half_model, input_ids, pixel_values=picture, logits_to_keep=kept).logits[0].float()
        expected = torch.tensor(arrays[case["logits.f16"]]).float().view(logits.shape)
        assert (logits - expected).abs().max() < HALF_LOGITS_TOLERANCE


def test_eager_attention_weights_equal_the_originals(tiny_original, arrays, prompts):
    model = VisualGLMForConditionalGeneration.from_pretrained(
        tiny_original, dtype=torch.float32, attn_implementation="eager"
    )
    _, input_ids, picture = prompts[0]
    weights = run(model.eval(), input_ids, pixel_values=picture, output_attentions=True).attentions[1]
    assert relative_error(weights[0, 0], arrays["prompt0.attn1.f32"]) < FLOAT32_TOLERANCE  # head 0 of layer 1


def test_cached_keys_and_values_equal_the_originals(model, arrays, prompts):
    _, input_ids, picture = prompts[0]
    layer = run(model, input_ids, pixel_values=picture, use_cache=True).past_key_values.layers[2]
    for ours, theirs in zip((layer.keys, layer.values), arrays["prompt0.present2.f32"], strict=True):
        assert relative_error(ours[0].transpose(0, 1), theirs) < FLOAT32_TOLERANCE  # [S, H, D]


def test_losses_equal_the_originals(model, half_model, golden, processor, golden_dir):
    for case in golden["training"]:
        pixels = processor.image_processor((golden_dir / case["image"]).read_bytes(), return_tensors="pt")
        ids, labels = torch.tensor([case["input_ids"]]), torch.tensor([case["labels"]])
        ids[:, case["pre_image"] : case["pre_image"] + 32] = model.config.image_token_id  # training had <pad> there
        loss = run(model, ids, pixel_values=pixels["pixel_values"], labels=labels).loss
        assert loss.item() == pytest.approx(case["loss.f32"], rel=FLOAT32_TOLERANCE)
        loss = run(half_model, ids, pixel_values=pixels["pixel_values"], labels=labels).loss
        assert loss.item() == pytest.approx(case["loss.f16"], abs=0.02)


def test_two_pictures_in_a_batch_equal_the_originals(model, arrays, prompts, pixel_values):
    _, input_ids, _ = prompts[0]
    logits = run(model, input_ids.repeat(2, 1), pixel_values=pixel_values[:2], logits_to_keep=1).logits
    expected = arrays["batched_images.last_logits.f32"]
    assert relative_error(logits.view(expected.shape), expected) < FLOAT32_TOLERANCE


def test_left_padded_batch_equals_the_originals(model, golden, arrays, padded):
    input_ids, attention_mask = padded
    logits = run(model, input_ids, attention_mask=attention_mask).logits
    for row, expected in enumerate(arrays["batch.logits.f32"]):
        kept = min(len(expected), int(attention_mask[row].sum()))
        assert relative_error(logits[row, -kept:], expected[-kept:]) < FLOAT32_TOLERANCE


# Batches


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_does_not_change_logits(model, padded, attention):
    model.set_attn_implementation(attention)
    input_ids, attention_mask = padded
    together = run(model, input_ids, attention_mask=attention_mask).logits
    for row in range(len(input_ids)):
        length = int(attention_mask[row].sum())
        alone = run(model, input_ids[row : row + 1, -length:]).logits
        assert relative_error(together[row, -length:], alone[0]) < FLOAT32_TOLERANCE
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_is_never_nan_in_low_precision(tiny_original, padded, dtype):
    model = VisualGLMForConditionalGeneration.from_pretrained(tiny_original, dtype=dtype).eval()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        assert run(model, padded[0], attention_mask=padded[1]).logits.isfinite().all()


def test_rows_with_no_one_and_two_pictures_give_what_they_give_alone(model, processor, pictures):
    image = processor.image_token
    texts = ["问：你好\n答：", f"<img>{image}</img>问：这是什么？\n答："]
    texts.append(f"<img>{image}</img>问：a\n答：b\n<img>{image}</img>问：c\n答：")
    images = [[], [pictures[0]], [pictures[1], pictures[2]]]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    together = run(model, **batch, logits_to_keep=3).logits
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone = run(model, **processor(text=text, images=own or None, return_tensors="pt"), logits_to_keep=3).logits
        assert relative_error(together[row], alone[0]) < FLOAT32_TOLERANCE


def test_a_picture_stands_where_its_placeholder_stands(model, processor, pictures):
    image = processor.image_token
    text = f"<img>{image}</img>问：a\n答：b\n<img>{image}</img>问：c\n答："
    one = processor(text=text, images=[pictures[0], pictures[1]], return_tensors="pt")
    other = processor(text=text, images=[pictures[1], pictures[0]], return_tensors="pt")
    assert relative_error(run(model, **one).logits, run(model, **other).logits) > 1e-3
    swapped = model.get_image_features(one["pixel_values"].flip(0)).pooler_output.detach()
    again = run(model, other["input_ids"], image_embeds=swapped).logits
    assert relative_error(again, run(model, **other).logits) < FLOAT32_TOLERANCE


def test_the_context_sees_all_of_itself_and_the_answer_only_its_past(model, prompts):
    _, input_ids, _ = prompts[3]
    ids = torch.cat((input_ids, torch.tensor([[700, 701, 702]])), dim=1)
    before = run(model, ids).logits
    changed = ids.clone()
    changed[0, input_ids.shape[1] - 3] = 1050  # the last word of the context
    assert not torch.allclose(run(model, changed).logits[0, 0], before[0, 0])
    changed = ids.clone()
    changed[0, -1] = 1050  # the last word of the answer
    assert torch.equal(run(model, changed).logits[0, :-1], before[0, :-1])


def test_the_output_carries_what_the_picture_encoder_gave_as_it_was_asked(model, prompts, monkeypatch):
    _, input_ids, picture = prompts[0]
    model.set_attn_implementation("eager")
    output = run(model, input_ids, pixel_values=picture, output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        expected = model.get_image_features(picture, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert torch.equal(output.image_outputs.pooler_output, output.image_hidden_states)
    assert output.image_outputs.keys() == expected.keys()
    for ours, theirs in zip(output.image_outputs.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    with monkeypatch.context() as patch:
        patch.setattr(model.config.vision_config, "output_hidden_states", True)
        configured = run(model, input_ids, pixel_values=picture)
    assert len(configured.image_outputs.hidden_states) == len(expected.hidden_states)
    plain = run(model, input_ids, pixel_values=picture)
    assert list(plain.image_outputs) == ["pooler_output"]
    assert plain.to_tuple()[-1] == plain.image_outputs.to_tuple()
    assert run(model, prompts[3][1]).image_outputs is None
    given = run(model, input_ids, image_embeds=plain.image_hidden_states)
    assert torch.equal(given.image_outputs.pooler_output, plain.image_hidden_states)
    assert torch.equal(given.logits, plain.logits)


# Inputs


def test_inputs_embeds_alone_give_the_same_logits(model, prompts):
    _, input_ids, picture = prompts[0]
    embeds = model.embed(input_ids, model.get_image_features(picture).pooler_output)
    logits = run(model, None, inputs_embeds=embeds).logits
    assert relative_error(logits, run(model, input_ids, pixel_values=picture).logits) < FLOAT32_TOLERANCE


def test_both_position_rows_are_honoured_and_made_up_ones_are_not(model, prompts):
    _, input_ids, _ = prompts[3]
    expected = run(model, input_ids).logits
    true = build_glm_position_ids(input_ids, None, model.config.text_config)
    assert torch.equal(run(model, input_ids, position_ids=true).logits, expected)
    assert torch.equal(run(model, input_ids, position_ids=torch.arange(input_ids.shape[1])[None]).logits, expected)
    assert not torch.allclose(run(model, input_ids, position_ids=true + 1).logits, expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda ids: torch.cat((ids[:, 5:6], ids), dim=1), "has 33 image tokens"),
        (lambda ids: torch.cat((ids[:, :1].expand(1, 2048), ids), dim=1), "2102 tokens long, the model takes 2048"),
        (lambda ids: ids[:, :-1], "Every sequence needs"),
    ],
    ids=["places", "length", "no <sop>"],
)
def test_bad_prompts_are_refused_before_the_picture_is_encoded(model, prompts, monkeypatch, change, complaint):
    _, input_ids, picture = prompts[0]
    monkeypatch.setattr(model.image_encoder, "forward", None)
    with pytest.raises(ValueError, match=complaint):
        model(change(input_ids), pixel_values=picture)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "Give input_ids or inputs_embeds"),
        ({"input_ids": torch.tensor([[5, 6, 7]])}, "Every sequence needs"),
        ({"input_ids": torch.zeros(1, 2049, dtype=torch.long)}, "2049 tokens long, the model takes 2048"),
        ({"input_ids": torch.tensor([[5, 1101, 1104]]), "image_embeds": torch.zeros(1, 32, 64)}, "has 0 image tokens"),
        (
            {"input_ids": torch.tensor([[0] * 31 + [1101, 1104]]), "image_embeds": torch.zeros(1, 32, 64)},
            r"has 31 image tokens \(id 0\) for 1 image\(s\), which fill 32",
        ),
        (
            {"inputs_embeds": torch.zeros(1, 40, 64), "image_embeds": torch.zeros(1, 32, 64)},
            "has 0 image tokens",
        ),
        (
            {
                "input_ids": torch.tensor([[0] * 32 + [1101, 1104]]),
                "image_embeds": torch.zeros(1, 32, 64),
                "pixel_values": torch.zeros(1, 3, 224, 224),
            },
            "not both",
        ),
    ],
)
def test_impossible_inputs_are_refused(model, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        model(**arguments)


# Caches


def test_static_and_dynamic_caches_give_the_uncached_logits(model, prompts, padded):
    input_ids, attention_mask = padded
    input_ids = torch.cat((input_ids, torch.tensor([[700, 701]] * len(input_ids))), dim=1)
    attention_mask = torch.cat((attention_mask, torch.ones(len(input_ids), 2, dtype=torch.long)), dim=1)
    expected = run(model, input_ids, attention_mask=attention_mask).logits[:, -2:]
    positions = build_glm_position_ids(input_ids, attention_mask, model.config.text_config)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        steps = []
        for start, end in ((0, -2), (-2, -1), (-1, None)):
            step = slice(start if start else 0, end)
            seen = attention_mask[:, : end if end is not None else input_ids.shape[1]]
            output = run(
                model,
                input_ids[:, step],
                attention_mask=seen,
                glm_position_ids=positions[..., step],
                past_key_values=cache,
                logits_to_keep=1,
            )
            steps.append(output.logits)
        assert relative_error(torch.cat(steps[1:], dim=1), expected) < FLOAT32_TOLERANCE


def test_decode_step_compiles_without_graph_breaks_and_only_once(model, prompts):
    _, input_ids, picture = prompts[0]
    torch._dynamo.reset()
    graphs = []

    def count(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    eager = model.generate(input_ids=input_ids, pixel_values=picture, max_new_tokens=6, do_sample=False)
    cache = StaticCache(config=model.config, max_cache_len=80)
    positions = build_glm_position_ids(eager, None, model.config.text_config)
    prompt_length = input_ids.shape[1]
    step = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        logits = model(input_ids, pixel_values=picture, past_key_values=cache, logits_to_keep=1).logits
        for index in range(prompt_length, eager.shape[1]):
            assert logits.argmax() == eager[0, index]
            mask = model.create_masks_for_generate(model.config, torch.empty(1, 1, 0), None, cache)
            logits = step(
                eager[:, index : index + 1],
                attention_mask=mask,
                glm_position_ids=positions[..., index : index + 1],
                past_key_values=cache,
            ).logits
    assert len(graphs) == 1


# Construction


def test_built_on_the_meta_device_equals_built_directly(model, tiny_original, prompts):
    direct = VisualGLMForConditionalGeneration(model.config).eval()
    direct.load_state_dict(model.state_dict())
    _, input_ids, picture = prompts[0]
    expected = run(model, input_ids, pixel_values=picture).logits
    assert torch.equal(run(direct, input_ids, pixel_values=picture).logits, expected)


def test_saving_writes_the_originals_names_and_loses_nothing(model, tmp_path):
    from safetensors import safe_open

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert saved == set(model.state_dict()) - {"lm_head.weight"}  # tied
    again, info = VisualGLMForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert again.lm_head.weight is again.transformer.word_embeddings.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_equal_embeddings_are_tied_and_different_ones_are_kept_apart(tiny_original, tmp_path, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    tied = VisualGLMForConditionalGeneration.from_pretrained(tiny_original)
    assert tied.lm_head.weight is tied.transformer.word_embeddings.weight
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    state["lm_head.weight"][0] += 1
    tied.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with caplog.at_level("WARNING"):
        apart = VisualGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(apart.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(apart.transformer.word_embeddings.weight, state["transformer.word_embeddings.weight"])
    assert "NOT tie" in caplog.text


def test_device_map_splits_between_blocks(tiny_original, prompts, model):
    from accelerate import infer_auto_device_map

    split = infer_auto_device_map(
        model, max_memory={0: "600KB", 1: "500KB", "cpu": "1GB"}, no_split_module_classes=model._no_split_modules
    )
    assert len(set(map(str, split.values()))) > 1
    blocks = [name for name in split if ".layers." in name]
    assert all(name.split(".layers.")[1].isdigit() for name in blocks)  # no part of a block stands alone

    spread = VisualGLMForConditionalGeneration.from_pretrained(tiny_original, dtype=torch.float32, device_map="auto")
    _, input_ids, picture = prompts[0]
    expected = run(model, input_ids, pixel_values=picture).logits
    assert relative_error(run(spread.eval(), input_ids, pixel_values=picture).logits, expected) < FLOAT32_TOLERANCE


# Training: accumulated gradients and mixed precision


def test_gradients_of_parts_of_a_batch_add_up_to_those_of_the_batch(tiny_original, padded):
    """Rows with different numbers of labels: the sum is divided once, by the number in all parts."""
    model = load_float32(tiny_original)
    input_ids, attention_mask = (F.pad(tensor, (0, 4), value=1) for tensor in padded)
    labels = torch.full_like(input_ids, -100)
    labels[:, -4:] = torch.arange(700, 704)
    labels[0, -4:-1] = -100
    count = (labels[:, 1:] != -100).sum()
    weight = model.transformer.layers[0].attention.query_key_value.weight
    whole = model(input_ids, attention_mask=attention_mask, labels=labels).loss
    (expected,) = torch.autograd.grad(whole, weight)
    parts = [
        model(
            input_ids[i : i + 1],
            attention_mask=attention_mask[i : i + 1],
            labels=labels[i : i + 1],
            num_items_in_batch=count,
        ).loss
        for i in range(len(input_ids))
    ]
    (gradient,) = torch.autograd.grad(sum(parts), weight)
    assert relative_error(sum(parts).detach()[None], whole.detach()[None].numpy()) < FLOAT32_TOLERANCE
    assert relative_error(gradient, expected.numpy()) < FLOAT32_TOLERANCE


def test_mixed_precision_keeps_weights_and_gradients_in_float32(tiny_original, prompts):
    model = load_float32(tiny_original)
    _, input_ids, picture = prompts[0]
    inputs = {"input_ids": input_ids, "pixel_values": picture, "labels": input_ids}
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert abs(output.loss - expected) < 0.02 * expected
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


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
