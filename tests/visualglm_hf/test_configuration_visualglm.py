"""Room: configuration. Original and own config.json, and their complaints."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration


FIELDS = st.sampled_from(
    ["vocab_size", "hidden_size", "num_layers", "num_attention_heads", "bos_token_id", "pre_seq_len"]
)
VALUES = (
    st.none() | st.booleans() | st.integers(-10, 10**6) | st.floats(allow_nan=True) | st.text(max_size=5) | st.just([])
)
PARTS = st.sampled_from([None, "eva_config", "qformer_config"])


@pytest.fixture(scope="module")
def original_text(tiny_original) -> str:
    return (tiny_original / "config.json").read_text(encoding="utf-8")


@pytest.fixture
def original(original_text) -> dict:
    return json.loads(original_text)


def test_original_config_is_read_into_typed_parts(original):
    config = VisualGLMConfig(**original)
    text, vision, qformer = config.text_config, config.vision_config, config.qformer_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size) == (4, 64, 256, 1600)
    assert (text.bos_token_id, text.eos_token_id, text.gmask_token_id, text.pad_token_id) == (1104, 1105, 1101, 3)
    assert (vision.num_hidden_layers, vision.image_size, vision.layer_norm_eps) == (3, 224, 1e-6)
    assert (qformer.num_query_tokens, qformer.encoder_hidden_size, qformer.cross_attention_layers) == (32, 48, [0, 2])
    assert config.model_type == "chatglm"
    assert config.dtype == torch.float16


def test_own_config_survives_saving(original, tmp_path):
    config = VisualGLMConfig(**original)
    config.save_pretrained(tmp_path)
    again = VisualGLMConfig.from_pretrained(tmp_path).to_dict()
    assert {**again, "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_map_to_the_originals_files_is_dropped(original):
    assert not hasattr(VisualGLMConfig(**original), "auto_map")


def test_own_map_is_kept(original):
    own = {"AutoConfig": "configuration_visualglm.VisualGLMConfig"}
    assert VisualGLMConfig(**{**original, "auto_map": own}).auto_map == own


def test_defaults_are_the_real_model_key_by_key(golden_dir):
    expected = json.loads((golden_dir / "full_size_keys.json").read_text())
    with torch.device("meta"):
        model = VisualGLMForConditionalGeneration(VisualGLMConfig(tie_word_embeddings=False))
    parameters = {
        name: list(value["shape"]) for name, value in expected["keys"].items() if value["kind"] == "parameter"
    }
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["num_parameters"] == 7_802_193_408


def test_real_config_json_is_the_default(golden_dir):
    original = json.loads((golden_dir / "full_size_keys.json").read_text())["config"]
    read, default = VisualGLMConfig(**original), VisualGLMConfig()
    for part in ("text_config", "vision_config", "qformer_config"):
        assert getattr(read, part).to_dict() == getattr(default, part).to_dict()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda fields: fields.pop("eva_config"), "lacks eva_config"),
        (lambda fields: fields.pop("qformer_config"), "lacks qformer_config"),
        (lambda fields: fields.pop("hidden_size"), "config.json lacks hidden_size"),
        (lambda fields: fields["eva_config"].pop("num_layers"), "eva_config lacks num_layers"),
        (lambda fields: fields.update(position_encoding_2d=False), "position_encoding_2d=False"),
        (lambda fields: fields["eva_config"].update(layernorm_order="post"), "layernorm_order='post'"),
        (lambda fields: fields.update(hidden_size=66), "hidden_size=66 must be a multiple of 4 * num_attention_heads"),
        (lambda fields: fields.update(num_layers=0), "num_hidden_layers must be a positive integer, found 0"),
        (lambda fields: fields.update(vocab_size=1000), "not in the vocabulary of 1000 tokens"),
        (lambda fields: fields.update(image_length=16), "image_length=16 but the Q-Former makes 32"),
        (lambda fields: fields.update(quantization_bit=3), "quantization_bit must be 0, 4 or 8, found 3"),
        (lambda fields: fields["eva_config"].update(image_size=[224, 112]), "must be a square"),
        (lambda fields: fields["qformer_config"].update(cross_attn_hidden_size=64), "encoder_hidden_size=64"),
        (lambda fields: fields.update(hidden_size="64"), "VisualGLMTextConfig: Field 'hidden_size' expected int"),
        (lambda fields: fields.update(image_token_id=None), "VisualGLMConfig: Field 'image_token_id' expected int"),
    ],
)
def test_wrong_or_missing_field_is_named(original, change, complaint):
    change(original)
    with pytest.raises(ValueError, match=complaint.replace("[", r"\[").replace("*", r"\*")):
        VisualGLMConfig(**original)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "lacks text_config, vision_config, qformer_config, so it is not a VisualGLM's"),
        ({"text_config": {"hidden_size": 64}}, "lacks vision_config, qformer_config"),
        ({"num_layers": 28, "hidden_size": 4096, "model_type": "chatglm"}, "lacks eva_config and qformer_config"),
        ({"model_type": "blip-2", "text_config": {}, "vision_config": {}, "qformer_config": {}}, "'blip-2'"),
    ],
)
def test_config_json_of_another_model_does_not_become_a_full_size_visualglm(fields, complaint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=complaint):
        VisualGLMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("use", [lambda fields: VisualGLMConfig(**fields), VisualGLMConfig.from_dict])
def test_a_wrong_type_is_one_line(original, use):
    original["eva_config"]["patch_size"] = [14]
    with pytest.raises(
        ValueError, match="^VisualGLMVisionConfig: Field 'patch_size' expected int, got list.*$"
    ) as raised:
        use(original)
    assert len(str(raised.value).splitlines()) == 1


def test_an_option_of_a_wrong_type_is_one_line(tiny_original):
    with pytest.raises(ValueError, match="^VisualGLMConfig: Field 'image_token_id' expected int, got str"):
        VisualGLMConfig.from_pretrained(tiny_original, image_token_id="<unk>")


def test_unknown_field_of_a_part_is_reported_not_hidden(original, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    original["eva_config"]["hidden_sise"] = 3
    with caplog.at_level("WARNING"):
        VisualGLMConfig(**original)
    assert "hidden_sise" in caplog.text


def test_a_model_may_have_no_end_of_answer_token():
    config = VisualGLMConfig(text_config={"eos_token_id": None})
    assert VisualGLMConfig.from_dict(config.to_dict()).text_config.eos_token_id is None


@settings(max_examples=150, deadline=None)
@given(PARTS, FIELDS, VALUES)
def test_a_config_with_any_value_in_any_field_is_read_or_refused(original_text, part, field, value):
    fields = json.loads(original_text)
    (fields if part is None else fields[part])[field] = value
    try:
        config = VisualGLMConfig(**fields)
    except ValueError:
        return
    assert VisualGLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
