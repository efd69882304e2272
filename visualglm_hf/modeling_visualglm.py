# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""VisualGLM: tensors to tensors. The ChatGLM-6B decoder with soft prompts of pictures.

Not here: text, pictures and prompts (`chat.py`, `processing_visualglm.py`), the ViT (`modeling_image_encoder.py`), and
what `generate` asks of the model (`generation_visualglm.py`).
Module names are the key names of the original checkpoint. Source: GLM (arXiv:2103.10360), `modeling_chatglm.py` of the
original.

Shapes: B batch, S query length, T key length, H heads, D head dimension, C hidden size.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_naming import CACHE_NAME, OLD_NAME, takes_cache
from .calibration import quantize_calibrated
from .chat import ChatMixin
from .configuration_visualglm import VisualGLMConfig, VisualGLMTextConfig, check_tensor_parallel
from .cpu_attention import query_obstacle, single_query_attention
from .cpu_decoder import RECORDED, CpuDecoder
from .feature_cache import FeatureCache
from .generation_visualglm import VisualGLMGenerationMixin
from .given_pictures import PicturesMixin
from .glm_positions import (
    ONE_ROW_EACH,
    build_attention_mask,
    build_glm_position_ids,
    can_ask,
    find_answers,
    prepend_virtual_tokens,
    shift_left,
)
from .glm_prompts import PromptMixin, two_rows
from .growing_cache import check_fillable, make_cache
from .kernel_report import KernelReport, report_kernels
from .looking import LookMixin
from .model_weights import WeightsMixin
from .modeling_image_encoder import VisualGLMImageEncoder, eager_attention_forward
from .prefix_encoder import VisualGLMPrefixEncoder, prepend_prefix
from .quantization import HalfLinear, QuantizedLinear, prepare_model, quantize_, quantize_model


logger = logging.get_logger(__name__)

LOSS_ELSEWHERE = (
    "The loss is computed outside of the model. If that is by label_smoothing_factor of transformers' Trainer: it does "
    "not shift the labels for a class that it does not know by name, so the model would learn to repeat its input. "
    "Leave it out, or use TRL's SFTTrainer, which shifts them."
)


def replace_columns(states: torch.Tensor, start: int, new: torch.Tensor) -> torch.Tensor:
    """`states` [B, S, C] with `new` [B, N, C] in the place of those from column `start` on."""
    states = states.to(new)
    return torch.cat((states[:, :start], new, states[:, start + new.shape[1] :]), dim=1)


def inverse_frequencies(config: VisualGLMTextConfig, device: torch.device | None = None) -> torch.Tensor:
    """The angles [D / 4] of both positions at 1; in float16, as the original rounds them in its float32 mode too."""
    rotary_dim = config.head_dim // 2
    exponents = torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim
    return (1.0 / config.rope_theta**exponents).half()


def compute_rotary(glm_position_ids: torch.Tensor, config: VisualGLMTextConfig, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines for both positions, for use in all layers.

    A float16 model computes its angles in float16, as the original: their error (up to 0.78 at position 2047) is part
    of what it learned. No other model does; bfloat16 could not even tell position 257 from 258.

    Returns:
        [2 (cos, sin), B, S, 1, 1, 2 (position, block position), D / 4]
    """
    angle_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    positions = glm_position_ids.transpose(1, 2).to(angle_dtype)
    frequencies = inverse_frequencies(config, glm_position_ids.device)
    angles = positions[:, :, None, None, :, None] * frequencies.to(angle_dtype)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of each head by the position and the second by the block position.

    Queries and keys together, [B, S, H, 2, D]: a decoded token is so little work that each call counts.
    """
    cos, sin = rotary
    first, second = states.unflatten(-1, (2, 2, -1)).unbind(-2)  # each [B, S, H, 2, 2, D / 4]
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
    return rotated.flatten(-3).to(states.dtype)


class VisualGLMAttention(nn.Module):
    is_causal = False  # the mask says it all; sdpa must not add a causal one when there is none

    def __init__(self, config: VisualGLMTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: torch.Tensor,
        cache: Cache | None,
        prefix: torch.Tensor | None,
        observe: Callable | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Rows are grouped by head, [q_h; k_h; v_h], unlike the ViT's.
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))  # [B, S, H, 3, D]
        query, key = rotate(fused[..., :2, :], rotary).unbind(-2)  # each [B, S, H, D]
        value = fused[..., 2, :]
        # The scores shrink by the layer's number before they exist in half precision and grow back in float32.
        query = query / (self.head_dim**0.5 * (self.layer_idx + 1))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if prefix is not None:  # not in the cache, whose length is then that of the text
            key, value = prepend_prefix(prefix, key, value)
        implementation, scaling = self.config._attn_implementation, float(self.layer_idx + 1)
        if query_obstacle(implementation, query, attention_mask) is None:
            attended, weights = single_query_attention(query, key, value, attention_mask, scaling), None
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            attended, weights = attention(
                self, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs
            )
        if observe is not None:  # fast ways of attending never have their weights
            observe(query, key, value, attention_mask, scaling, attended)
        return self.dense(attended.flatten(2)), weights


class VisualGLMMLP(nn.Module):
    def __init__(self, config: VisualGLMTextConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class VisualGLMBlock(GradientCheckpointingLayer):
    """x = LN(x); x = alpha x + attention(x); x = LN(x); x = alpha x + mlp(x): residuals take the normalised input."""

    def __init__(self, config: VisualGLMTextConfig, layer_idx: int):
        super().__init__()
        self.alpha = config.residual_alpha
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisualGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisualGLMMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: torch.Tensor,
        cache: Cache | None = None,
        prefix: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.input_layernorm(hidden_states)
        attended, _ = self.attention(hidden_states, attention_mask, rotary, cache, prefix, **kwargs)
        hidden_states = self.post_attention_layernorm(hidden_states * self.alpha + attended)
        return hidden_states * self.alpha + self.mlp(hidden_states)


@auto_docstring(custom_intro="What the decoder and the whole model have in common for transformers.")
class VisualGLMPreTrainedModel(PreTrainedModel):
    config_class = VisualGLMConfig
    base_model_prefix = "transformer"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualGLMBlock", "VisualGLMImageEncoder"]  # the latter because residuals cross its parts
    _skip_keys_device_placement = ["cache", OLD_NAME]
    # Saved by the original beside each layer and ignored by it: angles are computed from the positions.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


@auto_docstring(custom_intro="The ChatGLM decoder without its head.")
class VisualGLMTextModel(VisualGLMPreTrainedModel):
    config_class = VisualGLMTextConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": VisualGLMBlock, "attentions": VisualGLMAttention}

    def __init__(self, config: VisualGLMTextConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(VisualGLMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # CODEPATH: checkpoints of the original's P-tuning.
        self.prefix_encoder = VisualGLMPrefixEncoder(config) if config.pre_seq_len else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def compute_prefix(self, device: torch.device) -> tuple[torch.Tensor, ...] | None:
        return None if self.prefix_encoder is None else self.prefix_encoder(device)

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        glm_position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        prefix_key_values: tuple[torch.Tensor, ...] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        glm_position_ids (`torch.LongTensor` of shape `(batch_size, 2, sequence_length)`):
            The places in the context and in the answer, see `build_glm_position_ids`.
        cache (`Cache`, *optional*):
            The keys and values of what came before, also by the older name `past_key_values`.
        prefix_key_values (`tuple(torch.Tensor)` of shape `(2, num_heads, pre_seq_len, head_dim)`, *optional*):
            What the prefix encoder returns, if it was asked already; it does not depend on the text.
        """
        if use_cache and cache is None and not self.training:
            cache = make_cache(self.config, inputs_embeds.device)
        check_fillable(cache, self.layers)
        if attention_mask is None or attention_mask.dim() == 2:
            past_length = cache.get_seq_length() if cache is not None else 0
            key_length = past_length + inputs_embeds.shape[1]
            if cache is not None and cache.is_compileable:
                key_length = cache.layers[0].max_cache_len
            attention_mask = build_attention_mask(glm_position_ids, attention_mask, past_length, key_length)
        rotary = compute_rotary(glm_position_ids, self.config, inputs_embeds.dtype)
        if prefix_key_values is None:
            prefix_key_values = self.compute_prefix(inputs_embeds.device)
        if prefix_key_values is not None and attention_mask is not None:
            is_visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
            attention_mask = F.pad(attention_mask, (prefix_key_values[0].shape[2], 0), value=is_visible)

        states = CPU_DECODER.run_layers(self, inputs_embeds, attention_mask, rotary, cache, prefix_key_values, **kwargs)
        return BaseModelOutputWithPast(self.final_layernorm(states), **{CACHE_NAME: cache})

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: torch.Tensor,
        cache: Cache | None,
        prefix_key_values: tuple[torch.Tensor, ...] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One layer after the other, [B, S, C] -> [B, S, C]: what `CPU_DECODER` does, faster where it can."""
        # An observer of gradients needs those of all layers, but not all of their activations at a time.
        forgets = "observe" in kwargs and torch.is_grad_enabled()
        for layer_idx, layer in enumerate(self.layers):
            prefix = None if prefix_key_values is None else prefix_key_values[layer_idx]
            run = partial(checkpoint, layer, use_reentrant=False) if forgets else layer
            hidden_states = run(hidden_states, attention_mask, rotary, cache, prefix, **kwargs)
        return hidden_states


def make_example() -> VisualGLMTextModel:
    """A small decoder with random weights of 4 bits, all of which matter, for the self-check of `CPU_DECODER`."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"mask_token_id": 0, "gmask_token_id": 1, "bos_token_id": 4, "eos_token_id": 5}
    config = VisualGLMTextConfig(vocab_size=8, **sizes, **tokens)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = VisualGLMTextModel(config).float().eval()
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return quantize_(model, 4)


# What the layers do in a decode step on a CPU, in one call.
CPU_DECODER = CpuDecoder(
    (VisualGLMBlock, VisualGLMAttention, VisualGLMMLP, nn.Linear, QuantizedLinear, nn.LayerNorm), make_example
)


@auto_docstring(custom_intro="What [`VisualGLMForConditionalGeneration`] returns.")
@dataclass
class VisualGLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Mean cross-entropy over the labels that are not -100.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Scores of the next token, for the last `logits_to_keep` positions only if that was given.
    image_hidden_states (`torch.FloatTensor` of shape `(images, num_query_tokens, hidden_size)`, *optional*):
        The soft prompts of the pictures.
    image_outputs (`BaseModelOutputWithPooling`, *optional*):
        The same as `pooler_output`, as transformers has it since 5.24; and what the ViT gave, if the pictures were
        encoded and `output_hidden_states` or `output_attentions` asked for it.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        """What there is, in order; `image_outputs` as a tuple, too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


class VisualGLMBackbone:
    """Ids and pictures to hidden states, for trainers that apply the head themselves, to a few tokens at a time.

    No module of its own, so that the weights keep their names; in all else it is the decoder.
    """

    def __init__(self, model: "VisualGLMForConditionalGeneration"):
        self.model = model

    def __call__(self, *args, **kwargs) -> BaseModelOutputWithPast:
        return self.model.compute_states(*args, **kwargs)[0]

    def __getattr__(self, name: str):
        return getattr(self.model.transformer, name)


@auto_docstring(custom_intro="VisualGLM-6B: answers questions about pictures, in Chinese and English.")
class VisualGLMForConditionalGeneration(
    WeightsMixin, VisualGLMPreTrainedModel, PicturesMixin, PromptMixin, ChatMixin, LookMixin, VisualGLMGenerationMixin
):
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VisualGLMConfig):
        check_tensor_parallel(config)
        super().__init__(config)
        self.transformer = VisualGLMTextModel(config.text_config)
        self.lm_head = HalfLinear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.image_encoder = VisualGLMImageEncoder(config)
        self.image_cache, self.look_cache = FeatureCache(), FeatureCache()
        self.adapters: dict | None = None  # PEFT's configs, by name
        self.accepted_adapters: list[str] = []
        # CODEPATH: checkpoints saved after `quantize()`, by us or by the original (its visualglm-6b-int4 and -int8).
        if config.quantization_bit:
            prepare_model(self)
        self.post_init()

    @property
    def input_device(self) -> torch.device:
        """Where inputs go: to the weights, or, while these are offloaded, to where they are taken from."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head [vocab_size, C]."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if type(new_embeddings) is nn.Linear:  # as resizing makes it
            with torch.device("meta"):
                head = HalfLinear(new_embeddings.in_features, new_embeddings.out_features, bias=False)
            head.weight = new_embeddings.weight
            new_embeddings = head
        self.lm_head = new_embeddings

    def get_decoder(self) -> VisualGLMTextModel:
        return self.transformer

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The image encoder, if `modality` is "image"."""
        return self.image_encoder if modality == "image" else super().get_encoder(modality)

    @property
    def base_model(self) -> "VisualGLMBackbone":
        """The model without its head. The library's own property gives the decoder alone, which takes no pictures."""
        return VisualGLMBackbone(self)

    def quantize(
        self,
        bits: int,
        group_size: int | None = None,
        lm_head: bool = False,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        image_encoder: bool = False,
    ) -> "VisualGLMForConditionalGeneration":
        """Quantize the decoder's linear layers in place; before or after `.half()`, on any device.

        Args:
            bits: 4 or 8.
            group_size: columns that share a scale, for 4 bits: None for 64, -1 for one scale per row as the original's.
            lm_head: quantize `lm_head` too, to 8 bits. It reads half as much per token but is no longer one tensor
                with the word embeddings.
            calibration: inputs of this model, of 32 prompts or so, to find better codes with, of 4 bits. It takes
                minutes, and changes neither the format nor the speed.
            image_encoder: quantize the linear layers of the image encoder too, to 8 bits. At full size they then take
                1 GB less than in half precision; what it costs is in docs/quantization.md.

        Returns:
            This model. `save_pretrained` writes the low-bit weights, and `from_pretrained` reads them as they are.

        Raises:
            ValueError: other bits, a group size that does not fit, a model that is quantized already.
        """
        if calibration is not None:
            return quantize_calibrated(self, calibration, bits, group_size, lm_head, image_encoder)
        return quantize_model(self, bits, group_size, lm_head, image_encoder)

    def kernel_report(self) -> KernelReport:
        """Find out which way products, attention and decode steps go on this machine, and why not a faster one."""
        return report_kernels(self, CPU_DECODER)

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Encode pictures. `last_hidden_state` [images, 1 + patches, vision C] is the ViT's output, `pooler_output`
        [images, num_query_tokens, C] the soft prompts. Raises a `ValueError` if `pixel_values` has another shape.
        """
    )
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        self.check_pixel_values(pixel_values, interpolate_pos_encoding)
        kwargs["interpolate_pos_encoding"] = self.interpolates(interpolate_pos_encoding)
        vision_output, image_embeds = self.image_encoder(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_output.last_hidden_state,
            pooler_output=image_embeds,
            hidden_states=vision_output.hidden_states,
            attentions=vision_output.attentions,
        )

    def __call__(self, *args, compiled_call: Callable | None = None, guide: Callable | None = None, **kwargs):
        """Call the model as always, or a compiled call of it, and guide its logits; `generate` says for each step.

        A `forward` that a trainer has put in the place of ours, as TRL does, gets the labels of answers alone, too.
        """
        if "forward" in vars(self) and (kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None):
            kwargs |= self.keep_answer_labels(*args[:1], **kwargs, is_ours=False)
        call = super().__call__ if compiled_call is None else partial(compiled_call, self)
        outputs = call(*args, **kwargs)
        if guide is not None:
            outputs.logits = guide(outputs.logits)
        return outputs

    @takes_cache
    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Compute the logits of the next tokens. Each row of `input_ids` has [gMASK] and `<sop>`; in `inputs_embeds` alone
        they are found by their embeddings. A cached context can be continued by an answer, not by more context.
        Raises a `ValueError` for pictures without places, places without pictures, a row whose answer begins nowhere or
        more than once, labels of which none is an answer's, and a context that is too long.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        glm_position_ids: torch.LongTensor | None = None,
        prefix_key_values: tuple[torch.Tensor, ...] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualGLMCausalLMOutputWithPast:
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, 2, sequence_length)`, *optional*):
            The two rows of GLM. One-dimensional positions, which libraries make up from the mask, say nothing to this
            model: the true ones are then derived from `input_ids` or `inputs_embeds`.
        cache (`Cache`, *optional*):
            The keys and values of what came before, also by the older name `past_key_values`.
        image_embeds (`torch.FloatTensor` of shape `(images, num_query_tokens, hidden_size)`, *optional*):
            Pictures that are encoded already, instead of `pixel_values`. Rows may have any number of pictures.
        prompt_embeds (`torch.FloatTensor` of shape `(batch_size, prompt_length, hidden_size)`, *optional*):
            What `input_ids` begins with, embedded and with its pictures in place, instead of these.
        glm_position_ids (`torch.LongTensor` of shape `(batch_size, 2, sequence_length)`, *optional*):
            The same as `position_ids` under a name that no library rewrites. What `inputs_embeds` have more than that
            are virtual tokens of PEFT before the prompt.
        prefix_key_values (`tuple(torch.Tensor)` of shape `(2, num_heads, pre_seq_len, head_dim)`, *optional*):
            The prefix of each layer, if it was computed already; `generate` does so once.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            The ids to learn, each at its own place, or -100. A context sees itself, so labels before `<sop>` do not
            count, nor does padding; and a `num_items_in_batch` that counted them shrinks by their part in this call.
        """
        if labels is not None:
            kept = self.keep_answer_labels(
                input_ids, labels, inputs_embeds, attention_mask, position_ids, glm_position_ids, **kwargs
            )
            labels, kwargs = kept.pop("labels"), {**kwargs, **kept}
        elif self.training and kwargs.get("num_items_in_batch") is not None:
            logger.warning_once(LOSS_ELSEWHERE)
        outputs, image_outputs, is_learned = self.compute_states(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            prompt_embeds=prompt_embeds,
            glm_position_ids=glm_position_ids,
            prefix_key_values=prefix_key_values,
            use_cache=use_cache,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # The strides of a slice, which `contiguous()` overlooks, make torch's half-precision `linear` copy the lm_head.
        kept_states = outputs.last_hidden_state[:, kept].clone(memory_format=torch.contiguous_format)
        logits = self.lm_head(kept_states)
        if labels is None and is_learned is not None and can_ask() and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * is_learned[:, kept].to(gradient))  # for the head
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return VisualGLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if image_outputs is None else image_outputs.pooler_output,
            image_outputs=image_outputs,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    @takes_cache
    def compute_states(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        glm_position_ids: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> tuple[BaseModelOutputWithPast, BaseModelOutputWithPooling | None, torch.Tensor | None]:
        """What `forward` does before the head; arguments and errors are its own.

        Returns:
            The decoder's output with `last_hidden_state` [B, S, C]; that of the pictures, see `encode_images`; and, in
            training, which positions predict an answer, [B, S, 1] boolean. Only these pass gradients on, whoever
            computes a loss: the context sees what it would predict.
        """
        if self.adapters is not None and list(self.adapters) != self.accepted_adapters:
            self.accept_adapters(self.adapters)  # PEFT has told of the first alone
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Give input_ids or inputs_embeds.")
        num_images = self.count_images(pixel_values, image_embeds, interpolate_pos_encoding)
        if num_images is not None and prompt_embeds is not None:
            raise ValueError("Give pictures, or prompt_embeds with the pictures already in place, not both.")
        if kwargs.get("cu_seq_lens_q") is not None and len(kwargs["cu_seq_lens_q"]) > 2:
            raise ValueError("cu_seq_lens_q names several sequences in a row." + ONE_ROW_EACH)
        is_growing = cache is not None and not cache.is_compileable and can_ask()
        num_cached = cache.get_seq_length() if is_growing else 0
        self.check_shapes(input_ids, inputs_embeds, attention_mask, num_cached)
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        self.check_length(length)
        glm_position_ids = two_rows(position_ids, glm_position_ids)
        is_prompt = can_ask() and length > 1 and (cache is None or not cache.get_seq_length())
        if glm_position_ids is None or is_prompt:
            glm_position_ids = self.read_prompt(
                input_ids, inputs_embeds, attention_mask, position_ids, glm_position_ids, num_images, prompt_embeds
            )
        image_outputs = None
        if num_images is not None:
            vision_config = self.config.vision_config
            recorded = {name: True for name in RECORDED if kwargs.get(name, getattr(vision_config, name, False))}
            image_outputs = self.encode_images(pixel_values, image_embeds, interpolate_pos_encoding, **recorded)
            image_embeds = image_outputs.pooler_output
        if num_images is not None or inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, image_embeds, inputs_embeds)
        num_virtual = max(length - glm_position_ids.shape[-1], 0)  # tokens that PEFT puts before a prompt
        if prompt_embeds is not None:
            inputs_embeds = replace_columns(inputs_embeds, num_virtual, prompt_embeds)
        if num_virtual:
            glm_position_ids = prepend_virtual_tokens(glm_position_ids, num_virtual)
        glm_position_ids = glm_position_ids[..., -length:]  # prefix tuning may cut the ids alone

        outputs = self.transformer(
            inputs_embeds=inputs_embeds,
            glm_position_ids=glm_position_ids,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        is_learned = None
        if self.training and torch.is_grad_enabled():
            is_answer = find_answers(glm_position_ids, attention_mask)
            # With the last token, which predicts nothing, but whose state is what the head of a reward model reads.
            is_learned = (is_answer | shift_left(is_answer))[..., None]
            states = outputs.last_hidden_state
            outputs.last_hidden_state = torch.where(is_learned.to(states.device), states, states.detach())
        return outputs, image_outputs, is_learned


__all__ = [
    "VisualGLMForConditionalGeneration",
    "VisualGLMPreTrainedModel",
    "VisualGLMTextModel",
    "build_glm_position_ids",  # for those who know it from here
]
