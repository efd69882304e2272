"""How SwissArmyTransformer (SAT) lays out a VisualGLM: key names, row orders, parts, LoRA, prefixes, model_config.json.

Names, tensors and configurations in, the same out; `sat.py` knows the files. "Ours" is the layout of the
original's Hugging Face checkpoint, which this project keeps.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from visualglm_hf.configuration_visualglm import TEXT_FIELDS, VisualGLMConfig, VisualGLMTextConfig


# The decoder's fused rows: per head [q; k; v] until SAT 0.3, as ours; blocks [all q; all k; all v] since 0.4.
PER_HEAD, BLOCKS = "0.3", "0.4"
LM_HEAD = ("mixins.chatglm-final.lm_head.", "lm_head.")
IMAGE_ENCODER = ("mixins.eva.model.", "image_encoder.")
INV_FREQ = "mixins.chatglm-attn.rotary_emb.inv_freq"
POSITION_EMBEDDINGS = "transformer.position_embeddings.weight"
PREFIX = "mixins.ptuning.prefix."
PREFIX_ENCODER = "transformer.prefix_encoder."
PREFIX_EMBEDDING = f"{PREFIX_ENCODER}embedding.weight"
DECODER_QKV = re.compile(r"transformer\.layers\.\d+\.attention\.query_key_value\b")
LORA_MATRIX = re.compile(r"(?P<module>.+)\.matrix_(?P<side>[AB])(?:\.(?P<index>\d+))?")
# Which dimension SAT's model parallelism divides, by the name of the module: rows (0) or columns (1).
DIVIDED = {
    "query_key_value": 0,
    "query": 0,
    "key_value": 0,
    "dense_h_to_4h": 0,
    "word_embeddings": 0,
    "lm_head": 0,
    "dense": 1,
    "dense_4h_to_h": 1,
    "prefix": 1,  # heads
}
FUSED = {"query_key_value": 3, "key_value": 2}  # matrices in one, each divided for itself
EVIDENCE = 5.0  # standard deviations that a row order must be ahead
LORA_ALPHA = 1  # SAT's, which no file records
TEXT_EPSILON = VisualGLMTextConfig.layer_norm_eps


def our_key(key: str) -> str:
    """Our name for one of SAT's."""
    for theirs, ours in (LM_HEAD, IMAGE_ENCODER):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key.replace(".original.", ".")  # the weights under a LoRA


def sat_key(key: str) -> str:
    """SAT's name for one of ours."""
    for theirs, ours in (LM_HEAD, IMAGE_ENCODER):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def to_heads(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[all q; all k; all v] -> per head [q; k; v], along the first dimension."""
    return rows.unflatten(0, (3, -1, head_dim)).transpose(0, 1).flatten(0, 2)


def to_blocks(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Per head [q; k; v] -> [all q; all k; all v], along the first dimension."""
    return rows.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)


def variance_within(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sum of squared distances [features] of `values` [chunks, features] to the mean of their group."""
    return sum((values[groups == group] - values[groups == group].mean(0)).square().sum(0) for group in groups.unique())


def guess_row_order(layers: Iterable[tuple[torch.Tensor, torch.Tensor]], head_dim: int) -> str | None:
    """Tell the two row orders apart by the sizes of queries, keys and values, which training makes different.

    Cut into pieces of one head each, a fused matrix has its queries, keys and values in thirds or in turn. The right
    one of the two groupings explains more of the variance of the pieces' norms: a likelihood ratio, summed over layers.

    Args:
        layers: weight [3 C, C] and bias [3 C] of each layer.
        head_dim: rows per head.

    Returns:
        The SAT version that has this order, or None if they are about as likely.
    """
    score, num_features = 0.0, 0
    for weight, bias in layers:
        pieces = [part.float().unflatten(0, (-1, head_dim)).flatten(1).norm(dim=1) for part in (weight, bias)]
        values = torch.stack(pieces, dim=1).double().clamp(min=1e-12).log()
        index = torch.arange(len(values))
        in_blocks, in_turn = (
            variance_within(values, groups).clamp(min=1e-12) for groups in (index * 3 // len(index), index % 3)
        )
        score += (len(values) / 2 * (in_turn / in_blocks).log()).sum().item()
        num_features += values.shape[1]
    # Were there no difference at all, each feature would contribute half a chi-square of 2 degrees to either side.
    deviations = score / math.sqrt(2 * max(num_features, 1))
    if abs(deviations) < EVIDENCE:
        return None
    return BLOCKS if deviations > 0 else PER_HEAD


def divided_dimension(key: str) -> int | None:
    """The dimension in which model parallelism divides a tensor; None if every part has the whole of it."""
    module, kind = key.split(".")[-2:]
    dimension = DIVIDED.get(module)
    return None if dimension == 1 and kind == "bias" else dimension


def join(key: str, parts: Sequence[torch.Tensor], expected: Sequence[int] | None, version: str) -> torch.Tensor:
    """One tensor from the parts that model-parallel processes saved.

    Raises:
        ValueError: a tensor that all parts should have alike differs.
    """
    if len(parts) == 1:
        return parts[0]
    dimension = divided_dimension(key)
    if dimension is None or expected is not None and tuple(parts[0].shape) == tuple(expected):
        if any(not part.is_meta and not torch.equal(part, parts[0]) for part in parts[1:]):
            raise ValueError(f"{key} is not the same in all parts (mp_rank_*): they are of different checkpoints.")
        return parts[0]
    is_per_head = version == PER_HEAD and DECODER_QKV.match(key)
    num_fused = 1 if is_per_head else FUSED.get(key.split(".")[-2], 1)
    divided = [part.chunk(num_fused, dim=dimension) for part in parts]
    return torch.cat([piece for pieces in zip(*divided, strict=True) for piece in pieces], dim=dimension)


def lora_delta(matrices: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """What a LoRA adds to SAT's weight, in float32: the fused matrices below each other."""
    pairs = zip(matrices["A"], matrices["B"], strict=True)
    scaling = LORA_ALPHA / len(matrices["A"][0])
    return torch.cat([second.float() @ first.float() * scaling for first, second in pairs])


@dataclass(frozen=True)
class LoraPair:
    """One LoRA as PEFT has it: the weight grows by B A alpha / rank."""

    first: torch.Tensor  # A, [rank, in]
    second: torch.Tensor  # B, [out, rank]
    alpha: int


def to_peft(module: str, matrices: dict[str, list[torch.Tensor]], head_dim: int) -> LoraPair:
    """One pair of matrices in our row order for SAT's pairs, one for each of the fused matrices of `module`.

    SAT divides by the rank of one pair, PEFT by the rank of all together: hence alpha.
    """
    rows = torch.block_diag(*matrices["B"])
    rows = to_heads(rows, head_dim) if DECODER_QKV.match(module) else rows
    return LoraPair(torch.cat(matrices["A"]), rows, LORA_ALPHA * len(matrices["A"]))


def to_prefix_embedding(prefixes: Sequence[torch.Tensor]) -> torch.Tensor:
    """SAT's prefixes, [2 (key, value), H, P, D] per layer, as our table [P, layers * 2 * H * D]."""
    return torch.stack(list(prefixes)).permute(3, 0, 1, 2, 4).flatten(1)


def from_prefix_embedding(embedding: torch.Tensor, num_layers: int, num_heads: int) -> list[torch.Tensor]:
    """Our table of prefixes as SAT's, one [2 (key, value), H, P, D] per layer."""
    return list(embedding.unflatten(1, (num_layers, 2, num_heads, -1)).permute(1, 2, 3, 0, 4))


def read_model_config(fields: dict, eos_token_id: int) -> VisualGLMConfig:
    """Translate SAT's model_config.json.

    Raises:
        ValueError: it is not a VisualGLM's.
    """
    parts = [fields.get("eva_args"), fields.get("qformer_args")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("model_config.json lacks eva_args or qformer_args; is it the one of a VisualGLM?")
    # SAT records a prefix length even where there is no prefix.
    text = {name: fields[name] for name in TEXT_FIELDS if name in fields and name != "pre_seq_len"}
    text, vision, qformer = (with_inner_size(part) for part in (text, *parts))
    config = VisualGLMConfig(
        **text,
        eva_config=vision,
        qformer_config=qformer,
        eos_token_id=eos_token_id,
        image_length=fields.get("image_length"),
    )
    # SAT derives it from the depth; `residual_alpha` is written by this project, for models that came from elsewhere.
    native = math.sqrt(2 * config.text_config.num_hidden_layers)
    config.text_config.residual_alpha = fields.get("residual_alpha", native)
    return config


def with_inner_size(fields: dict) -> dict:
    """SAT leaves out an inner size of four times the width."""
    return {"inner_hidden_size": 4 * fields.get("hidden_size", 0), **fields}


def has_native_alpha(config: VisualGLMTextConfig) -> bool:
    """Whether SAT would compute with the factor of this model."""
    return math.isclose(config.residual_alpha, math.sqrt(2 * config.num_hidden_layers), rel_tol=1e-6)


def write_model_config(config: VisualGLMConfig) -> dict:
    """SAT's model_config.json for our configuration."""
    text, vision, qformer = config.text_config, config.vision_config, config.qformer_config
    size = [vision.image_size, vision.image_size]
    layers = range(qformer.num_hidden_layers)
    fields = {
        "model_class": "VisualGLMModel",
        "tokenizer_type": "THUDM/chatglm-6b",
        **sat_sizes(text, "post", text.vocab_size, text.max_position_embeddings),
        "image_length": qformer.num_query_tokens,
        "eva_args": {
            **sat_sizes(vision, "pre", 1, vision.num_positions),
            "use_final_layernorm": False,
            "layernorm_epsilon": vision.layer_norm_eps,
            "image_size": size,
            "pre_len": 1,
            "post_len": 0,
            "in_channels": vision.num_channels,
            "num_classes": 0,
            "patch_size": vision.patch_size,
        },
        "qformer_args": {
            **sat_sizes(qformer, "post", qformer.num_query_tokens, 0),
            "is_decoder": [index in qformer.cross_attention_layers for index in layers],
            "cross_attn_hidden_size": qformer.encoder_hidden_size,
            "layernorm_epsilon": qformer.layer_norm_eps,
        },
        **{name: getattr(text, name) for name in ("bos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")},
    }
    if text.layer_norm_eps != TEXT_EPSILON:
        fields["layernorm_epsilon"] = text.layer_norm_eps
    if not has_native_alpha(text):
        fields["residual_alpha"] = text.residual_alpha
    if text.pre_seq_len:
        adapters = {"use_ptuning": True, "use_lora": False, "use_qlora": False, "lora_rank": 10, "layer_range": None}
        fields |= {"model_class": "FineTuneVisualGLMModel", "pre_seq_len": text.pre_seq_len, **adapters}
    return fields


def sat_sizes(config, layernorm_order: str, vocab_size: int, max_sequence_length: int) -> dict:
    """The fields that all three transformers have in SAT's model_config.json."""
    sizes = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": vocab_size,
        "layernorm_order": layernorm_order,
        "model_parallel_size": 1,
        "max_sequence_length": max_sequence_length,
    }
    if config.intermediate_size != 4 * config.hidden_size:  # SAT's own
        sizes["inner_hidden_size"] = config.intermediate_size
    return sizes
