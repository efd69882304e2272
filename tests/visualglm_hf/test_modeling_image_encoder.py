"""Room: image encoder. One test per stage, so that a failure names it."""

import pytest
import torch

from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error


IMAGES = (0, 1, 2)  # those whose stages the golden data holds


@pytest.fixture(scope="module")
def stages(model, pixel_values):
    """Per golden picture: the ViT's embeddings and layers, its output, the Q-Former's layers and output, the result."""
    recorded = []
    vit, qformer = model.image_encoder.vit, model.image_encoder.qformer
    with torch.no_grad():
        for index in IMAGES:
            hidden = [vit.embed(pixel_values[index : index + 1])]
            for layer in vit.transformer["layers"]:
                hidden.append(layer(hidden[-1]))
            vit_out = vit.mixins["cls"]["ln_vision"](hidden[-1])
            queries = [qformer.transformer["word_embeddings"].weight[None]]
            for layer in qformer.transformer["layers"]:
                queries.append(layer(queries[-1], vit_out))
            qformer_out = qformer.transformer["final_layernorm"](queries[-1])
            embeds = model.image_encoder.glm_proj(qformer_out)
            recorded.append((torch.cat(hidden), vit_out[0], torch.cat(queries[1:]), qformer_out[0], embeds[0]))
    return recorded


@pytest.mark.parametrize(
    ("stage", "name"),
    [(0, "vit_hidden"), (1, "vit_out"), (2, "qformer_hidden"), (3, "qformer_out"), (4, "image_embeds")],
)
def test_stage_equals_the_originals(stages, arrays, stage, name):
    for index in IMAGES:
        if f"image{index}.{name}.f32" not in arrays.files:
            continue
        expected = arrays[f"image{index}.{name}.f32"]
        assert relative_error(stages[index][stage].reshape(expected.shape), expected) < FLOAT32_TOLERANCE


def test_stages_that_the_golden_data_holds_are_really_compared(arrays):
    for name in ("vit_hidden", "vit_out", "qformer_hidden", "qformer_out", "image_embeds"):
        assert f"image0.{name}.f32" in arrays.files


def test_forward_is_the_sum_of_its_stages(model, pixel_values, stages):
    with torch.no_grad():
        output = model.get_image_features(pixel_values[:3])
    for index in IMAGES:
        assert relative_error(output.last_hidden_state[index], stages[index][1]) < FLOAT32_TOLERANCE
        assert relative_error(output.pooler_output[index], stages[index][4]) < FLOAT32_TOLERANCE


def test_hidden_states_and_attentions_of_the_vit_come_with_the_features(model, pixel_values, stages):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.get_image_features(pixel_values[:1], output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert relative_error(torch.cat(output.hidden_states[:-1]), stages[0][0][:-1]) < FLOAT32_TOLERANCE
    assert relative_error(output.hidden_states[-1], output.last_hidden_state) == 0
    vision = model.config.vision_config
    expected = (1, vision.num_attention_heads, vision.num_positions, vision.num_positions)
    assert [weights.shape for weights in output.attentions] == [expected] * vision.num_hidden_layers


def test_half_precision_stays_within_its_rounding_noise(half_model, pixel_values, arrays):
    with torch.no_grad():
        output = half_model.get_image_features(pixel_values[:3])
    for index in IMAGES:
        vit_out, embeds = (arrays[f"image{index}.{name}.f16"] for name in ("vit_out", "image_embeds"))
        assert relative_error(output.last_hidden_state[index].float(), vit_out.reshape(257, -1)) < 1e-2
        assert relative_error(output.pooler_output[index].float(), embeds.reshape(32, -1)) < 1e-2


def test_eager_equals_sdpa(model, pixel_values):
    with torch.no_grad():
        sdpa = model.get_image_features(pixel_values[:2]).pooler_output
        model.set_attn_implementation("eager")
        eager = model.get_image_features(pixel_values[:2]).pooler_output
        model.set_attn_implementation("sdpa")
    assert relative_error(eager, sdpa) < FLOAT32_TOLERANCE


def test_a_batch_gives_what_single_pictures_give(model, pixel_values):
    with torch.no_grad():
        batch = model.get_image_features(pixel_values).pooler_output
        single = torch.cat([model.get_image_features(picture[None]).pooler_output for picture in pixel_values])
    assert relative_error(batch, single) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 3, 112, 224), (1, 1, 224, 224)])
def test_pixel_values_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match="pixel_values must be"):
        model.get_image_features(torch.zeros(shape))


def test_gradient_checkpointing_gives_the_same_gradients(tiny_original, pixel_values):
    gradients = []
    for checkpointing in (False, True):
        model = load_float32(tiny_original)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for part in (model.config.vision_config, model.config.qformer_config):
            part.attention_dropout = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.get_image_features(pixel_values[:1]).pooler_output.square().mean().backward()
        gradients.append(model.image_encoder.vit.transformer["layers"][0].mlp.dense_h_to_4h.weight.grad)
    assert relative_error(gradients[1], gradients[0]) < FLOAT32_TOLERANCE
