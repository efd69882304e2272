"""The tiny VisualGLM that transformers' common tests build anew for each of their cases."""

import torch
from transformers.testing_utils import torch_device

from tests.test_modeling_common import floats_tensor, ids_tensor
from visualglm_hf import VisualGLMConfig


BATCH_SIZE = 3
TEXT_LENGTH = 7
VOCAB_SIZE = 99
IMAGE_TOKEN, PAD, MASK, GMASK, SOP, EOP = range(6)
FIRST_TEXT_TOKEN = 6


class VisualGLMModelTester:
    """The attributes that the common tests look for, and a prompt with one picture a row."""

    batch_size = BATCH_SIZE
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 32
    intermediate_size = 37
    vocab_size = VOCAB_SIZE
    num_query_tokens = 4
    image_size = 8
    patch_size = 4
    num_channels = 3
    image_token_id = IMAGE_TOKEN
    pad_token_id = PAD
    is_training = True
    seq_length = num_query_tokens + TEXT_LENGTH
    encoder_seq_length = seq_length
    key_length = seq_length

    answer_length = 0  # tokens after <sop>

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> VisualGLMConfig:
        part = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
        no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        text = {
            **part,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "bos_token_id": SOP,
            "eos_token_id": EOP,
            "mask_token_id": MASK,
            "gmask_token_id": GMASK,
        }
        vision = {**part, **no_dropout, "image_size": self.image_size, "patch_size": self.patch_size}
        qformer = {**part, **no_dropout, "num_query_tokens": self.num_query_tokens, "encoder_hidden_size": 32}
        return VisualGLMConfig(
            text_config=text, vision_config=vision, qformer_config=qformer, image_token_id=IMAGE_TOKEN
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[VisualGLMConfig, dict[str, torch.Tensor]]:
        """A config, and rows of a picture, random text, [gMASK] and <sop>, random text again."""
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=FIRST_TEXT_TOKEN)
        input_ids[:, : self.num_query_tokens] = IMAGE_TOKEN
        answer = self.seq_length - self.answer_length
        input_ids[:, answer - 2], input_ids[:, answer - 1] = GMASK, SOP
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        attention_mask = torch.ones_like(input_ids).to(torch_device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return self.get_config(), inputs
