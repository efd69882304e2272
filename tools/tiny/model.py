"""The tiny VisualGLM before it has learned anything: its architecture, and first weights that learn fast.

Not here: its vocabulary (`tokenizer.py`), and what teaches it (`data.py`, `train.py`).
"""

import math
from pathlib import Path

import torch
from torch import nn

from visualglm_hf import ChatGLMTokenizer, VisualGLMConfig, VisualGLMForConditionalGeneration
from visualglm_tools.checkpoints.loading import load_weights


NUM_QUERY_TOKENS = 32
PATCHES_PER_SIDE = 16
VOCABULARY_MULTIPLE = 64


def build_config(tokenizer: ChatGLMTokenizer) -> VisualGLMConfig:
    """Return the tiny architecture; dropout is off because no picture is seen twice."""
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    qformer = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    text = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    names = {"bos": "<sop>", "eos": "<eop>", "pad": "<pad>", "mask": "[MASK]", "gmask": "[gMASK]"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(piece) for name, piece in names.items()}
    vocab_size = math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return VisualGLMConfig(
        text_config={**text, **ids, "vocab_size": vocab_size, "num_tokens": len(tokenizer)},
        vision_config={**vision, **no_dropout},
        qformer_config={**qformer, **no_dropout, "num_query_tokens": NUM_QUERY_TOKENS, "encoder_hidden_size": 64},
        image_token_id=tokenizer.unk_token_id,
        tie_word_embeddings=True,
    )


def plane_waves(width: int) -> torch.Tensor:
    """Return [257, width] positions: 0 for the class token, then for each patch sin x, cos x, sin y and cos y."""
    y, x = torch.meshgrid(*[torch.arange(float(PATCHES_PER_SIDE))] * 2, indexing="ij")
    angles = [axis.reshape(-1, 1) * wave_frequencies(width) for axis in (x, y)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat((torch.zeros(1, width), waves))


def wave_frequencies(width: int) -> torch.Tensor:
    """Return the angles per patch of `plane_waves`: from a quarter turn to a hundredth."""
    count = width // 4
    return math.pi / 2 * 0.06 ** (torch.arange(count) / (count - 1))


@torch.no_grad()
def look_aside(attention: nn.Module, distance: float) -> None:
    """Let each head of a fresh ViT layer look at one neighbour, `distance` patches away, as a convolution would.

    A head projects some of the plane waves; its query is turned by the angle that the neighbour is ahead, so that the
    product with the key, a sum of cosines, is largest there.
    """
    width, heads = attention.dense.in_features, attention.config.num_attention_heads
    head_dim, waves, frequencies = width // heads, width // 4, wave_frequencies(width)
    chosen = torch.linspace(0, 0.8 * (waves - 1), head_dim // 4).round().long()
    query, key, _ = attention.query_key_value.weight.view(3, heads, head_dim, width)
    query.mul_(0.3)
    key.mul_(0.3)
    gain = 2.0 * (head_dim**0.5 / 4) ** 0.5
    for head in range(heads):
        turn = 2 * math.pi * head / heads
        for axis, step in enumerate((distance * math.cos(turn), distance * math.sin(turn))):
            for index, wave in enumerate(chosen.tolist()):
                angle = step * frequencies[wave].item()
                sine, cosine = 2 * axis * waves + wave, (2 * axis + 1) * waves + wave
                row = 2 * (axis * len(chosen) + index)
                key[head, row, sine] += gain
                key[head, row + 1, cosine] += gain
                query[head, row, sine] += gain * math.cos(angle)
                query[head, row, cosine] += gain * math.sin(angle)
                query[head, row + 1, cosine] += gain * math.cos(angle)
                query[head, row + 1, sine] -= gain * math.sin(angle)


@torch.no_grad()
def initialise(model: VisualGLMForConditionalGeneration) -> None:
    """Choose first weights from which a few minutes of training are enough.

    Each linear layer keeps the size of its input. The decoder's outputs start larger, because its residual factor of
    7.5 would otherwise drown them. The ViT's positions start as plane waves, and its patches look at their neighbours.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not model.lm_head:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.transformer.word_embeddings.weight, std=model.config.text_config.hidden_size**-0.5)
    for layer in model.transformer.layers:
        layer.attention.dense.weight.mul_(3)
        layer.mlp.dense_4h_to_h.weight.mul_(3)
    encoder = model.image_encoder
    nn.init.normal_(encoder.qformer.transformer["word_embeddings"].weight, std=0.5)
    positions = encoder.vit.transformer["position_embeddings"].weight
    positions.copy_(0.7 * plane_waves(positions.shape[1]))
    encoder.vit.mixins["patch_embedding"]["proj"].weight.mul_(0.7)
    for layer, distance in zip(encoder.vit.transformer["layers"], (1.0, 1.5, 2.0), strict=True):
        look_aside(layer.attention, distance)


def build_model(config: VisualGLMConfig, seed: int) -> VisualGLMForConditionalGeneration:
    """Return an untrained model."""
    torch.manual_seed(seed)
    model = VisualGLMForConditionalGeneration(config)
    initialise(model)
    return model


@torch.no_grad()
def take_over(model: VisualGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, folder: Path) -> None:
    """Begin with another tiny model's weights; rows of the embedding go by their pieces, new pieces keep their own.

    Raises:
        ValueError: the other model has another architecture.
    """
    other, other_tokenizer = load_weights(folder, torch.float32), ChatGLMTokenizer.from_pretrained(folder)
    embedding = model.transformer.word_embeddings.weight
    rows, other_rows = tokenizer.get_vocab(), other_tokenizer.get_vocab()
    known = [(rows[piece], row) for piece, row in other_rows.items() if piece in rows]
    to, source = (torch.tensor(column) for column in zip(*known, strict=True))
    embedding[to] = other.transformer.word_embeddings.weight[source]
    own, given = dict(model.named_parameters()), dict(other.named_parameters())
    if own.keys() != given.keys():
        raise ValueError(f"{folder} has other layers than this architecture; begin with a model of the same one.")
    for name, parameter in own.items():
        if parameter is embedding:
            continue
        if parameter.shape != given[name].shape:
            raise ValueError(f"{folder} has {name} as {tuple(given[name].shape)}, not as {tuple(parameter.shape)}.")
        parameter.copy_(given[name])
