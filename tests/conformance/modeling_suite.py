"""transformers' common tests of models, of generation and of configurations, with a tiny VisualGLM."""

import tempfile
import unittest

import torch
from tiny_model import VisualGLMModelTester

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from visualglm_hf import VisualGLMConfig, VisualGLMForConditionalGeneration, VisualGLMTextConfig


class VisualGLMModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VisualGLMForConditionalGeneration,)
    _is_composite = True
    # `base_model_prefix` is the decoder alone, as in the original's key names: its folder has no picture encoder.
    test_missing_keys = False

    def setUp(self):
        self.model_tester = VisualGLMModelTester(self)
        self.config_tester = ConfigTester(self, config_class=VisualGLMConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:  # the mixin knows the classes of its own release only
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def _get_custom_4d_mask_test_data(self):
        """The mixin's data as an answer, which is what has causal positions here; one row of positions says nothing."""
        ids, positions, shared_ids, mask, shared_positions = super()._get_custom_4d_mask_test_data()
        in_answer = [torch.stack((torch.zeros_like(each), each + 1), dim=1) for each in (positions, shared_positions)]
        return ids, in_answer[0], shared_ids, mask, in_answer[1]

    def test_resize_tokens_embeddings(self):
        self.model_tester.answer_length = 2  # the mixin overwrites the token before the last, which would be [gMASK]
        super().test_resize_tokens_embeddings()

    def test_model_forward_default_config_values(self):
        self.model_tester.vocab_size = VisualGLMTextConfig().num_tokens  # which holds the default special tokens
        super().test_model_forward_default_config_values()

    def test_tp_plan_matches_params(self):
        if "embed_tokens" in self.model_tester.get_config().text_config.base_model_tp_plan:
            self.skipTest("This release writes embed_tokens into every plan, whatever a model calls its embeddings.")
        super().test_tp_plan_matches_params()

    def test_sdpa_can_dispatch_composite_models(self):
        """The mixin looks for parts called vision_tower and language_model; ours have the original's names."""
        model = VisualGLMForConditionalGeneration(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for asked, expected in ((None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
                model = VisualGLMForConditionalGeneration.from_pretrained(folder, attn_implementation=asked)
                layers = [each for name, each in model.named_modules() if name.endswith("attention")]
                assert {each.config.model_type for each in layers} == {
                    part.model_type for part in VisualGLMConfig.sub_configs.values()
                }
                assert {each.config._attn_implementation for each in (model, *layers)} == {expected}

    def test_config(self):
        self.config_tester.run_common_tests()
