# SPDX-License-Identifier: Apache-2.0
"""Where in a picture a prompt looks: the decoder's attention to the soft prompt, times the Q-Former's to the patches.

Both are averaged over all layers and heads. The weights that fast ways of attending never have are computed beside
them, from queries and keys. Not here: pictures, questions and answers (`looking.py`, `zooming.py`). Source: ViCrop
(arXiv:2502.17422), which takes one layer of each of InstructBLIP.

Shapes: B pictures or rows, H heads, S positions, T keys, Q query tokens, C hidden size.
"""

from dataclasses import dataclass, field

import torch
from torch import nn


CLASS_TOKENS = 1  # of the ViT, before the patches


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling * query key^T) in float32, [B, H, S, T].

    Args:
        query, key: [B, H, S or T, D].
        attention_mask: broadcastable to [B, H, S, T]; boolean (True: attend) or additive; None for all.
    """
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return scores.softmax(-1)


@dataclass
class AttentionObserver:
    """What `VisualGLMAttention` takes as `observe`: gathers from some positions to others the attention of all layers.

    Args:
        first: the position from which on all are averaged.
        columns: [N], the positions that are looked at.
    """

    first: int
    columns: torch.Tensor
    layers: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
    ) -> None:
        if attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask[:, :, self.first :]
        weights = attention_weights(query[:, :, self.first :], key, attention_mask, scaling)
        columns = self.columns + key.shape[2] - query.shape[2]  # a prefix of P-tuning stands before the prompt
        self.layers.append(weights[..., columns.to(weights.device)].mean((0, 1, 2)).cpu())

    def average(self) -> torch.Tensor:
        """[N], over all layers, heads and positions."""
        return torch.stack(self.layers).mean(0)


@torch.no_grad()
def cross_attention(qformer: nn.Module, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
    """Where each soft prompt comes from, [B, Q, patches]: the Q-Former's cross-attention, over all layers and heads.

    Args:
        encoder_hidden_states: the ViT's output [B, 1 + patches, encoder C].
    """
    parts = qformer.transformer
    index = torch.arange(qformer.config.num_query_tokens, device=encoder_hidden_states.device)
    hidden_states = parts["word_embeddings"](index).expand(encoder_hidden_states.shape[0], -1, -1)
    layers = []
    for layer in parts["layers"]:
        if layer.has_cross_attention:
            states = layer.input_layernorm(hidden_states)
            states = layer.post_attention_layernorm(states + layer.attention(states)[0])
            query, key, _ = layer.cross_attention.project(states, encoder_hidden_states)
            weights = attention_weights(query, key, None, layer.cross_attention.scaling)
            layers.append(weights[..., CLASS_TOKENS:].mean(1))
        hidden_states = layer(hidden_states, encoder_hidden_states)
    return torch.stack(layers).mean(0)


@torch.no_grad()
def map_attention(
    model: nn.Module,
    input_ids: torch.Tensor,
    image_embeds: torch.Tensor,
    number: int,
    first: int,
    sources: torch.Tensor,
) -> torch.Tensor:
    """Where in a picture a prompt looks: a map [side, side] that sums to 1.

    Args:
        input_ids: [1, S], a prompt and its answer, or the prompt alone.
        image_embeds: [pictures, Q, C] of the prompt.
        number: of the picture among them.
        first: the position from which on all positions are averaged.
        sources: of the picture, see `cross_attention`.
    """
    places = (input_ids[0] == model.config.image_token_id).nonzero().flatten()
    observer = AttentionObserver(first, places.view(len(image_embeds), -1)[number])
    model(input_ids=input_ids, image_embeds=image_embeds, observe=observer, use_cache=False, logits_to_keep=1)
    patches = observer.average() @ sources
    side = round(patches.numel() ** 0.5)
    return (patches / patches.sum()).view(side, side)


@dataclass(frozen=True)
class SeenPicture:
    """A picture as the model sees it, and where each part of that comes from.

    Args:
        picture: itself, in its full pixels; a PIL image.
        embeds: its soft prompt [1, Q, C].
        sources: [Q, patches], see `cross_attention`.
        image_size: pixels a side at which it was shown.
    """

    picture: object
    embeds: torch.Tensor
    sources: torch.Tensor
    image_size: int


@torch.no_grad()
def see(model: nn.Module, picture, pixel_values: torch.Tensor) -> SeenPicture:
    """Encode one picture, [1, 3, image_size, image_size] of any size, and find out where its soft prompts come from.

    The last few are remembered in the model's `look_cache`, as soft prompts alone are in its `image_cache`.

    Raises:
        ValueError: the model is divided among processes, each of which has some of the heads.
    """
    if model.config.num_processes > 1:
        raise ValueError(
            "look() and zoom need the attention of all heads, and this model is divided among processes, which have "
            "some each. Load it in one process, or leave them out."
        )

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        features = model.get_image_features(pixels, interpolate_pos_encoding=True, return_dict=True)
        sources = cross_attention(model.image_encoder.qformer, features.last_hidden_state)
        return torch.cat((features.pooler_output, sources.to(features.pooler_output)), dim=-1)

    seen = model.look_cache.encode(model.image_encoder, pixel_values.to(model.input_device), encode)
    width = model.config.text_config.hidden_size
    embeds, sources = seen[..., :width].contiguous(), seen[0, :, width:].float().cpu()
    return SeenPicture(picture, embeds, sources, image_size=pixel_values.shape[-1])
