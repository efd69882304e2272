"""Room: what the model remembers of pictures. Each is encoded once, as long as the encoder stays what it is."""

import copy
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.helpers import load_float32
from visualglm_hf.feature_cache import FeatureCache, describe, sample


@pytest.fixture
def model(tiny_original):
    """A model of the test's own."""
    return load_float32(tiny_original)


@pytest.fixture
def encoded(model):
    """The numbers of pictures that the encoder was given, in the order of its calls."""
    calls = []
    model.image_encoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


@torch.no_grad()
def encode(model, pixel_values):
    return model.encode_pictures(pixel_values)


@torch.no_grad()
def fresh(model, pixel_values):
    """What the encoder itself says."""
    return model.get_image_features(pixel_values).pooler_output


def test_a_picture_is_encoded_once_and_its_features_are_the_same_bits(model, encoded, pixel_values):
    expected = fresh(model, pixel_values[:1])
    encoded.clear()
    for _ in range(2):
        assert torch.equal(encode(model, pixel_values[:1]), expected)
    assert encoded == [1]


def test_a_quantized_encoder_is_remembered_too_and_is_another_one(model, encoded, pixel_values):
    before = encode(model, pixel_values[:1])
    model.quantize(8, image_encoder=True)
    expected = fresh(model, pixel_values[:1])
    encoded.clear()
    for _ in range(2):
        assert torch.equal(encode(model, pixel_values[:1]), expected)
    assert encoded == [1]
    assert not torch.equal(expected, before)


def test_of_a_batch_only_new_pictures_are_encoded_and_doubles_once(model, encoded, pixel_values):
    first = encode(model, pixel_values[[0, 1]])
    again = encode(model, pixel_values[[2, 1, 0, 2]])
    assert encoded == [2, 1]
    assert torch.equal(again[[2, 1]], first)
    torch.testing.assert_close(again, fresh(model, pixel_values[[2, 1, 0, 2]]))


def test_writing_to_the_features_does_not_change_what_is_remembered(model, pixel_values):
    expected = encode(model, pixel_values[:1]).clone()
    for _ in range(2):
        features = encode(model, pixel_values[:1])
        assert torch.equal(features, expected)
        features.zero_()


def test_a_second_turn_about_the_picture_does_not_encode_it_again(model, tokenizer, pictures, encoded):
    """Not even with a plain list as history, or in another conversation."""
    options = {"do_sample": False, "max_new_tokens": 2}
    response, _ = model.chat(tokenizer, pictures[0], "a", **options)
    again, _ = model.chat(tokenizer, pictures[0], "a", **options)
    model.chat(tokenizer, pictures[0], "b", history=[("a", response)], **options)
    assert again == response
    assert encoded == [1]


def test_beams_return_sequences_and_later_calls_share_one_encoding(model, processor, pictures, encoded):
    inputs = processor(text=f"<img>{processor.image_token}</img>问：a\n答：", images=pictures[0], return_tensors="pt")
    model.generate(**inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False)
    model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=4)
    with torch.no_grad():
        model(**inputs)
    assert encoded == [1]


def add_in_place(model):
    with torch.no_grad():
        model.image_encoder.glm_proj.bias.add_(1)


def add_past_the_version_counter(model):
    """As merging an adapter does."""
    model.image_encoder.qformer.transformer["layers"][0].attention.query_key_value.weight.data += 0.5


def write_to_a_bias_past_the_version_counter(model):
    model.image_encoder.glm_proj.bias.data[3] += 1


def write_to_a_row_past_the_version_counter(model):
    model.image_encoder.vit.transformer["layers"][1].mlp.dense_h_to_4h.weight.data[77] = 0


def load_other_weights(model):
    weights = {name: value * 1.5 for name, value in model.image_encoder.state_dict().items()}
    model.image_encoder.load_state_dict(weights)


def assign_other_weights(model):
    weights = {name: value * 1.5 for name, value in model.image_encoder.state_dict().items()}
    model.image_encoder.load_state_dict(weights, assign=True)


def replace_a_parameter(model):
    model.image_encoder.glm_proj.bias = nn.Parameter(model.image_encoder.glm_proj.bias.detach() + 1)


def take_a_training_step(model):
    optimizer = torch.optim.SGD(model.image_encoder.glm_proj.parameters(), lr=1.0)
    with torch.enable_grad():
        model.image_encoder.glm_proj(torch.ones(1, model.image_encoder.glm_proj.in_features)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        add_past_the_version_counter,
        write_to_a_bias_past_the_version_counter,
        write_to_a_row_past_the_version_counter,
        load_other_weights,
        assign_other_weights,
        replace_a_parameter,
        take_a_training_step,
    ],
)
def test_features_of_other_weights_are_never_given(model, pixel_values, change):
    before = encode(model, pixel_values[:1])
    change(model)
    after = encode(model, pixel_values[:1])
    assert torch.equal(after, fresh(model, pixel_values[:1]))
    assert not torch.equal(after, before)


def test_whatever_row_is_written_to_a_sample_shows_it(model):
    """The matrices of the encoder have all proportions: wide, tall, of one row, of four dimensions."""
    for parameter in model.image_encoder.parameters():
        number = torch.arange(parameter.numel()).view(parameter.shape)
        seen = sample(number) // number[0].numel()
        assert set(seen.tolist()) == set(range(len(number)))
        assert len(seen) <= 2 * len(number) + 1


def test_what_no_counter_sees_needs_clearing(model, pixel_values):
    before = encode(model, pixel_values[:1])
    model.image_encoder.glm_proj.weight.detach().numpy()[1, 9] += 10
    assert torch.equal(encode(model, pixel_values[:1]), before)
    model.image_cache.clear()
    after = encode(model, pixel_values[:1])
    assert torch.equal(after, fresh(model, pixel_values[:1]))
    assert not torch.equal(after, before)


def test_features_have_the_precision_of_the_model(model, pixel_values):
    encode(model, pixel_values[:1])
    model.half()
    assert torch.equal(encode(model, pixel_values[:1]), fresh(model, pixel_values[:1]))
    model.float()  # the weights are rounded now
    assert torch.equal(encode(model, pixel_values[:1]), fresh(model, pixel_values[:1]))


def test_an_adapter_of_the_q_former_is_seen_added_disabled_and_merged(model, pixel_values):
    plain = encode(model, pixel_values[:1])
    targets = r".*qformer.*attention\.query_key_value"
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    with_adapter = encode(model, pixel_values[:1])
    assert torch.equal(with_adapter, fresh(model, pixel_values[:1]))
    assert not torch.equal(with_adapter, plain)
    with adapted.disable_adapter():
        assert torch.equal(encode(model, pixel_values[:1]), plain)
    assert torch.equal(encode(model, pixel_values[:1]), with_adapter)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    assert torch.equal(encode(model, pixel_values[:1]), fresh(model, pixel_values[:1]))
    adapted.merge_adapter()
    assert torch.equal(encode(model, pixel_values[:1]), fresh(model, pixel_values[:1]))


def test_a_merged_adapter_is_seen_though_its_layers_were_never_asked(model, pixel_values):
    plain = encode(model, pixel_values[:1])
    targets = r".*qformer.*attention\.query_key_value"
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    merged = adapted.merge_and_unload()
    assert torch.equal(encode(merged, pixel_values[:1]), fresh(merged, pixel_values[:1]))
    assert not torch.equal(encode(merged, pixel_values[:1]), plain)


def test_another_attention_implementation_encodes_anew(model, pixel_values, encoded):
    encode(model, pixel_values[:1])
    model.set_attn_implementation("eager")
    encode(model, pixel_values[:1])
    assert encoded == [1, 1]


def test_other_pixels_of_another_type_are_another_picture(model, pixel_values, encoded):
    for pixels in (pixel_values[:1], pixel_values[:1].double(), pixel_values[:1] + 1e-3):
        encode(model, pixels)
    assert encoded == [1, 1, 1]


def test_nothing_is_remembered_while_training_or_with_gradients(model, pixel_values, encoded):
    for _ in range(2):
        assert model.encode_pictures(pixel_values[:1]).requires_grad
        model.train()
        encode(model, pixel_values[:1])
        model.eval()
        with torch.autocast("cpu"):
            encode(model, pixel_values[:1])
    assert len(encoded) == 6
    assert len(model.image_cache) == 0


def test_features_made_in_inference_mode_serve_outside_of_it(model, pixel_values):
    with torch.inference_mode():
        model.encode_pictures(pixel_values[:1])
    features = encode(model, pixel_values[:1])
    assert not features.is_inference()
    features.requires_grad_().sum().backward()


def test_a_model_that_is_offloaded_or_made_of_inference_tensors_is_not_described(model):
    assert describe(model.image_encoder) is not None
    assert describe(copy.deepcopy(model.image_encoder).to("meta")) is None
    with torch.inference_mode():
        assert describe(nn.Linear(2, 2).eval()) is None


def test_the_least_recently_used_pictures_are_forgotten(model, pixel_values, encoded):
    model.image_cache.capacity = 2
    for index in (0, 1, 0, 2, 0, 1):
        encode(model, pixel_values[[index]])
    assert encoded == [1, 1, 1, 1]  # 0, 1, 2, and 1 again
    assert len(model.image_cache) == 2


def test_the_cache_can_be_cleared_and_turned_off(model, pixel_values, encoded):
    encode(model, pixel_values[:1])
    model.image_cache.clear()
    encode(model, pixel_values[:1])
    model.image_cache.capacity = 0
    encode(model, pixel_values[:1])
    assert encoded == [1, 1, 1]


def test_remembered_features_do_not_keep_the_batch_they_came_with(model, pixel_values):
    model.image_cache.capacity = 1
    encode(model, pixel_values)
    (features,) = model.image_cache._features.values()
    assert features.untyped_storage().nbytes() == features.nbytes


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_starts_with_an_empty_cache_and_is_not_mistaken_for_the_first(model, pixel_values, duplicate):
    before = encode(model, pixel_values[:1])
    model.image_cache.capacity = 3
    other = duplicate(model)
    assert (len(other.image_cache), other.image_cache.capacity) == (0, 3)
    add_in_place(other)
    assert torch.equal(encode(other, pixel_values[:1]), fresh(other, pixel_values[:1]))
    assert torch.equal(encode(model, pixel_values[:1]), before)


def test_features_are_not_saved_with_the_weights(model, pixel_values):
    names = set(model.state_dict())
    encode(model, pixel_values[:1])
    assert set(model.state_dict()) == names


def test_threads_get_the_features_of_their_own_pictures(pixel_values):
    """While others are remembered and forgotten."""
    encoder = nn.Linear(4, 4).eval()
    pictures = torch.arange(12.0).view(12, 1).repeat(1, 4)
    cache, wrong = FeatureCache(capacity=3), []

    @torch.no_grad()
    def ask(start):
        for step in range(60):
            chosen = pictures[[(start + step) % 12, (start + 5 * step) % 12]]
            if not torch.equal(cache.encode(encoder, chosen, lambda pixels: pixels * 2), chosen * 2):
                wrong.append(start)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(cache) == 3


def test_wrong_pixel_values_are_refused_before_they_are_looked_up(model):
    for shape in ((3, 224, 224), (1, 3, 10, 224), ()):
        with pytest.raises(ValueError, match="pixel_values must be"):
            encode(model, torch.zeros(shape))
