# SPDX-License-Identifier: Apache-2.0
"""Where in a picture a prompt looks: the decoder's attention to the soft prompt, times the Q-Former's to the patches.

Both are over all layers and heads. Of a prompt, the decoder's is their average; of an answer, each weight counts by how
much the answer's probability grows with it. The weights that fast ways of attending never have are computed beside
them, from queries and keys. Not here: pictures, questions and answers (`looking.py`, `zooming.py`). Sources: ViCrop
(arXiv:2502.17422), which takes one layer of each of InstructBLIP; Chefer et al. (arXiv:2103.15679).

Shapes: B pictures or rows, H heads, S positions, T keys, Q query tokens, C hidden size.
"""

from dataclasses import dataclass, field

import torch
from torch import nn


CLASS_TOKENS = 1  # of the ViT, before the patches
GRADIENT_SCALE = 2.0**10  # or those of half precision may be too small for it; a power of two changes no float32


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
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        attended: torch.Tensor,
    ) -> None:
        """Take from a layer what it attended with, [B, H, S or T, D], and to, [B, S, H, D]."""
        weights, _ = self.choose(query, key, value, attention_mask, scaling)
        self.layers.append(weights.mean((0, 1, 2)).cpu())

    def choose(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights [B, H, S - first, N] and the values [B, H, N, D] of the positions that are looked at."""
        if attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask[:, :, self.first :]
        weights = attention_weights(query[:, :, self.first :], key, attention_mask, scaling)
        # A prefix of P-tuning stands before the prompt.
        columns = self.columns.to(weights.device) + key.shape[2] - query.shape[2]
        return weights[..., columns], value[:, :, columns]

    def average(self) -> torch.Tensor:
        """[N], over all layers, heads and positions."""
        return torch.stack(self.layers).mean(0)


@dataclass
class GradientObserver(AttentionObserver):
    """Gathers, too, what each weight adds to a score: the weight times the score's gradient with respect to it.

    That gradient is the one of what was attended to, times the value, so it is there however attention is computed.

    Attributes:
        is_closed: whether the layers are only computed once more, for their gradients.
    """

    attended: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    is_closed: bool = False

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        attended: torch.Tensor,
    ) -> None:
        if self.is_closed:
            return
        with torch.no_grad():
            weights, values = self.choose(query, key, value, attention_mask, scaling)
        self.layers.append(weights)
        self.values.append(values)
        self.attended.append(attended)

    def contributions(self, score: torch.Tensor) -> torch.Tensor:
        """What each position that is looked at adds to a score, [N], to the first order.

        It is summed over all layers, heads and positions that look; what they take from the score does not count.
        """
        self.is_closed = True
        gradients = torch.autograd.grad(score * GRADIENT_SCALE, self.attended)
        layers = []
        for weights, values, gradient in zip(self.layers, self.values, gradients, strict=True):
            gradient = gradient[:, self.first :].transpose(1, 2).float()  # [B, H, S - first, D]
            added = weights * (gradient @ values.float().transpose(2, 3))
            layers.append(added.clamp(min=0).sum((0, 1, 2)).cpu())
        return torch.stack(layers).sum(0) / GRADIENT_SCALE

    def forget(self) -> None:
        """Let go of the graph, whose layers refer to this observer: such a circle would stay in memory for ever."""
        for kept in (self.layers, self.values, self.attended):
            kept.clear()


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
    observer = AttentionObserver(first, find_soft_prompt(model, input_ids, len(image_embeds), number))
    model(input_ids=input_ids, image_embeds=image_embeds, observe=observer, use_cache=False, logits_to_keep=1)
    return spread(observer.average(), sources)


def map_answer(
    model: nn.Module,
    input_ids: torch.Tensor,
    image_embeds: torch.Tensor,
    number: int,
    prompt_length: int,
    sources: torch.Tensor,
) -> torch.Tensor:
    """Where in a picture an answer comes from: a map [side, side] that sums to 1.

    That is what each part of the soft prompt adds to the answer's log-probability; if nothing does, the map is
    `map_attention`'s. The layers are computed again one by one for their gradients, so that in memory there is what one
    layer needs for them, and of each what it attended to.

    Args:
        input_ids: [1, S], a prompt and its answer.
        image_embeds, number, sources: see `map_attention`.
        prompt_length: in tokens.
    """
    first = prompt_length - 1  # the last token was chosen, but not looked from
    columns = find_soft_prompt(model, input_ids, len(image_embeds), number)
    if input_ids.shape[1] > prompt_length:
        with torch.inference_mode(False), torch.enable_grad():
            # Clones, since a caller may have made them for inference alone.
            given, observer = (input_ids.clone(), image_embeds.clone()), GradientObserver(first, columns.clone())
            try:
                parts = observer.contributions(answer_score(model, *given, prompt_length, observer))
            finally:
                observer.forget()
        if torch.isfinite(parts).all() and parts.sum() > 0:
            return spread(parts, sources)
    return map_attention(model, input_ids[:, :-1], image_embeds, number, first, sources)


def answer_score(
    model: nn.Module,
    input_ids: torch.Tensor,
    image_embeds: torch.Tensor,
    prompt_length: int,
    observer: AttentionObserver,
) -> torch.Tensor:
    """The log-probability of an answer after its prompt, with a graph that begins at the pictures; see `map_answer`."""
    logits = model(
        input_ids=input_ids[:, :-1],
        image_embeds=image_embeds.requires_grad_(),
        observe=observer,
        use_cache=False,
        logits_to_keep=input_ids.shape[1] - prompt_length,
    ).logits[0]
    answer = input_ids[0, prompt_length:, None].to(logits.device)
    return logits.float().log_softmax(-1).gather(-1, answer).sum()


def find_soft_prompt(model: nn.Module, input_ids: torch.Tensor, num_images: int, number: int) -> torch.Tensor:
    """The positions [Q] of one picture's soft prompt among those of `input_ids` [1, S]."""
    places = (input_ids[0] == model.config.image_token_id).nonzero().flatten()
    return places.view(num_images, -1)[number]


def spread(parts: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """A number for each part of a soft prompt [Q], over the patches that it comes from, [side, side]; sums to 1."""
    patches = parts @ sources
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
