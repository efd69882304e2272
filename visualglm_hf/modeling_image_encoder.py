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
"""Pictures to soft prompts: EVA ViT-g -> Q-Former -> linear projection, tensors to tensors.

Not here: opening or resizing pictures, and where the soft prompt goes in a sentence. Module names are the key names of
the original checkpoint (SwissArmyTransformer's `EVAViT` and `QFormer` under `image_encoder`), so weights load as they
are. Source: BLIP-2 (arXiv:2301.12597), EVA (arXiv:2211.07636), `visual.py` of the original.

Shapes: B pictures, S query tokens, T key tokens, H heads, D head dimension, C hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import auto_docstring
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_visualglm import VisualGLMConfig, VisualGLMQFormerConfig, VisualGLMVisionConfig
from .encoder_ways import linear


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling * query key^T) value with the softmax in float32.

    The scores are scaled after the cast to float32: the decoder hands in queries already divided by the layer number,
    so that no score overflows in half precision.

    Args:
        query, key, value: [B, H, S or T, D].
        attention_mask: broadcastable to [B, H, S, T]; boolean (True: attend) or additive.

    Returns:
        The output [B, S, H, D] and the attention weights [B, H, S, T].
    """
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(F.softmax(scores, dim=-1).to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class VisualGLMImageLinear(nn.Linear):
    """A linear layer that goes whatever way of torch's is the fastest on this machine."""

    is_plain = True  # and may be quantized as any `nn.Linear`

    def forward(self, x: torch.Tensor, has_gelu: bool = False) -> torch.Tensor:
        return linear(x, self.weight, self.bias, has_gelu)


class VisualGLMImageAttention(nn.Module):
    """Attention without a mask: over itself with one fused projection, or over the ViT's output."""

    is_causal = False

    def __init__(self, config: VisualGLMVisionConfig | VisualGLMQFormerConfig, encoder_hidden_size: int | None = None):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_cross_attention = encoder_hidden_size is not None
        if self.is_cross_attention:
            self.query = VisualGLMImageLinear(config.hidden_size, config.hidden_size)
            self.key_value = VisualGLMImageLinear(encoder_hidden_size, 2 * config.hidden_size)
        else:
            self.query_key_value = VisualGLMImageLinear(config.hidden_size, 3 * config.hidden_size)
        self.dense = VisualGLMImageLinear(config.hidden_size, config.hidden_size)

    def project(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None) -> list[torch.Tensor]:
        """Query, key and value, each [B, H, S or T, D]; unlike the decoder's, their rows are contiguous blocks."""
        if self.is_cross_attention:
            projected = [self.query(hidden_states), *self.key_value(encoder_hidden_states).chunk(2, dim=-1)]
        else:
            projected = self.query_key_value(hidden_states).chunk(3, dim=-1)
        return [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected]

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states, encoder_hidden_states)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, weights = attention(self, query, key, value, None, dropout=dropout, scaling=self.scaling)
        return self.dense(attended.flatten(2)), weights  # [B, S, H, D] -> [B, S, C]


class VisualGLMImageMLP(nn.Module):
    def __init__(self, config: VisualGLMVisionConfig | VisualGLMQFormerConfig):
        super().__init__()
        self.dense_h_to_4h = VisualGLMImageLinear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = VisualGLMImageLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.expand(hidden_states))

    def expand(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The exact GELU, not the decoder's tanh, of the first layer: in one go if nobody looks or adds in between."""
        layer = self.dense_h_to_4h
        if type(layer) is VisualGLMImageLinear and not layer._forward_hooks and "forward" not in vars(layer):
            return layer(hidden_states, has_gelu=True)
        return F.gelu(layer(hidden_states))


class OwnVectors(nn.Parameter):
    """Vectors of an encoder's own, which the original called word_embeddings, as those of the decoder's tokens.

    PEFT's `trainable_token_indices` finds all modules whose names end like that of the decoder's, and would train these
    under the numbers of tokens.
    """

    def __getitem__(self, index):
        if isinstance(index, list):  # of tokens
            raise ValueError(
                "The image encoder's word_embeddings have no tokens. trainable_token_indices finds them by the end of "
                "their name: train tokens with PEFT's TrainableTokensConfig, which takes the decoder's alone."
            )
        return super().__getitem__(index)


class VisualGLMVectors(nn.Embedding):
    """The class token or the learned queries: an embedding that is asked for all its rows, in order."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if type(param) is nn.Parameter:
            param.__class__ = OwnVectors


class VisualGLMVisionLayer(GradientCheckpointingLayer):
    """x = x + attention(LN(x)); x = x + mlp(LN(x))."""

    def __init__(self, config: VisualGLMVisionConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisualGLMImageAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisualGLMImageMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        attended, _ = self.attention(self.input_layernorm(hidden_states))
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class VisualGLMQFormerLayer(GradientCheckpointingLayer):
    """BERT's block with its last LayerNorm moved to the start of the next one, which is where the keys have it."""

    def __init__(self, config: VisualGLMQFormerConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisualGLMImageAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.has_cross_attention = layer_idx in config.cross_attention_layers
        if self.has_cross_attention:
            self.cross_attention = VisualGLMImageAttention(config, encoder_hidden_size=config.encoder_hidden_size)
            self.post_cross_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisualGLMImageMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.input_layernorm(hidden_states)
        attended, _ = self.attention(hidden_states)
        hidden_states = self.post_attention_layernorm(hidden_states + self.dropout(attended))
        if self.has_cross_attention:
            attended, _ = self.cross_attention(hidden_states, encoder_hidden_states)
            hidden_states = self.post_cross_attention_layernorm(hidden_states + self.dropout(attended))
        return hidden_states + self.dropout(self.mlp(hidden_states))


@auto_docstring(custom_intro="What the ViT and the Q-Former have in common for transformers.")
class VisualGLMImagePreTrainedModel(PreTrainedModel):
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualGLMVisionLayer", "VisualGLMQFormerLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class VisualGLMVisionTransformer(VisualGLMImagePreTrainedModel):
    config_class = VisualGLMVisionConfig
    main_input_name = "pixel_values"
    _can_record_outputs = {"hidden_states": VisualGLMVisionLayer, "attentions": VisualGLMImageAttention}

    def __init__(self, config: VisualGLMVisionConfig):
        super().__init__(config)
        self.mixins = nn.ModuleDict(
            {
                "patch_embedding": nn.ModuleDict(
                    {
                        "proj": nn.Conv2d(
                            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
                        )
                    }
                ),
                "cls": nn.ModuleDict({"ln_vision": nn.LayerNorm(config.hidden_size, eps=config.final_layer_norm_eps)}),
            }
        )
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": VisualGLMVectors(1, config.hidden_size),  # its only row is the class token
                "position_embeddings": nn.Embedding(config.num_positions, config.hidden_size),
                "layers": nn.ModuleList(VisualGLMVisionLayer(config) for _ in range(config.num_hidden_layers)),
            }
        )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Conv2d:
        """What turns patches into tokens; with checkpointed layers, `enable_input_require_grads` hooks into it."""
        return self.mixins["patch_embedding"]["proj"]

    def embed(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """[B, 3, height, width] -> [B, 1 + patches, C]"""
        proj = self.mixins["patch_embedding"]["proj"]
        patches = proj(pixel_values.to(proj.weight.dtype))
        rows, columns = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)
        # Asked by index, not for their weights, which are elsewhere while they are offloaded.
        index = torch.arange(self.config.num_positions, device=patches.device)
        class_token = self.transformer["word_embeddings"](index[:1]).expand(patches.shape[0], -1, -1)
        positions = self.transformer["position_embeddings"](index)
        if interpolate_pos_encoding:
            positions = self.interpolate_positions(positions, rows, columns)
        return torch.cat((class_token, patches), dim=1) + positions

    def interpolate_positions(self, positions: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[1 + side², C] -> [1 + rows * columns, C], bicubic as in transformers' ViTs; the class token's stays."""
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return positions
        grid = positions[1:].T.unflatten(1, (side, side))[None].float()
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((positions[:1], grid[0].flatten(1).T.to(positions.dtype)))

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs) -> BaseModelOutput:
        hidden_states = self.dropout(self.embed(pixel_values, interpolate_pos_encoding))
        for layer in self.transformer["layers"]:
            hidden_states = layer(hidden_states)
        return BaseModelOutput(last_hidden_state=self.mixins["cls"]["ln_vision"](hidden_states))


class VisualGLMQFormer(VisualGLMImagePreTrainedModel):
    config_class = VisualGLMQFormerConfig
    main_input_name = "encoder_hidden_states"

    def __init__(self, config: VisualGLMQFormerConfig):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": VisualGLMVectors(config.num_query_tokens, config.hidden_size),  # the learned queries
                "layers": nn.ModuleList(VisualGLMQFormerLayer(config, i) for i in range(config.num_hidden_layers)),
                "final_layernorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The learned queries."""
        return self.transformer["word_embeddings"]

    @auto_docstring
    def forward(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        r"""
        encoder_hidden_states (`torch.Tensor` of shape `(images, 1 + patches, encoder_hidden_size)`):
            The ViT's output, which the queries turn into `(images, num_query_tokens, hidden_size)`.
        """
        index = torch.arange(self.config.num_query_tokens, device=encoder_hidden_states.device)
        queries = self.transformer["word_embeddings"](index)
        hidden_states = self.dropout(queries.expand(encoder_hidden_states.shape[0], -1, -1))
        for layer in self.transformer["layers"]:
            hidden_states = layer(hidden_states, encoder_hidden_states)
        return self.transformer["final_layernorm"](hidden_states)


class VisualGLMImageEncoder(nn.Module):
    def __init__(self, config: VisualGLMConfig):
        super().__init__()
        self.vit = VisualGLMVisionTransformer(config.vision_config)
        self.qformer = VisualGLMQFormer(config.qformer_config)
        self.glm_proj = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> tuple[BaseModelOutput, torch.Tensor]:
        """Encode pictures.

        Args:
            pixel_values: [B, 3, image_size, image_size], normalised; with `interpolate_pos_encoding`, of any height
                and width that are multiples of `patch_size`.
            kwargs: `interpolate_pos_encoding`, `output_hidden_states` and `output_attentions`, of the ViT.

        Returns:
            The ViT's output with `last_hidden_state` [B, 1 + patches, vision C], and the soft prompt embeddings
            [B, num_query_tokens, text C].
        """
        vision_output = self.vit(pixel_values, return_dict=True, **kwargs)
        return vision_output, self.glm_proj(self.qformer(vision_output.last_hidden_state))
