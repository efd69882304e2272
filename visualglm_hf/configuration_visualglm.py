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
"""The numbers of VisualGLM and their consistency.

Reads two spellings of config.json: our own, with `text_config`, `vision_config` and `qformer_config`, and the
original's, with the language model's fields at the top level beside `eva_config` and `qformer_config`. The defaults
are those of VisualGLM-6B.
"""

import functools
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import auto_docstring, logging

from .code_links import replace_links


logger = logging.get_logger(__name__)

MAX_PATCHES_A_SIDE = 160  # of a larger picture; attention over its 25,600 patches takes seconds on a GPU

# The original's field names -> ours. None: the field only states what the architecture always is.
TEXT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "intermediate_size",
    "layernorm_epsilon": "layer_norm_eps",
    "max_sequence_length": "max_position_embeddings",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "mask_token_id": "mask_token_id",
    "gmask_token_id": "gmask_token_id",
    "pre_seq_len": "pre_seq_len",
    "prefix_projection": "prefix_projection",
}
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "intermediate_size",
    "layernorm_epsilon": "layer_norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_channels": "num_channels",
    "vocab_size": None,
    "max_sequence_length": None,
    "layernorm_order": None,
    "use_final_layernorm": None,
    "pre_len": None,
    "post_len": None,
    "num_classes": None,
    "model_parallel_size": None,
    "row_parallel_linear_final_bias": None,
}
QFORMER_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "intermediate_size",
    "layernorm_epsilon": "layer_norm_eps",
    "vocab_size": "num_query_tokens",
    "cross_attn_hidden_size": "encoder_hidden_size",
    "is_decoder": "cross_attention_layers",
    "max_sequence_length": None,
    "layernorm_order": None,
    "model_parallel_size": None,
    "row_parallel_linear_final_bias": None,
}
REQUIRED_FIELDS = ("hidden_size", "num_layers", "num_attention_heads")
# What every vocabulary of the original has from [MASK] on: 8 marks, a tab, 79 runs of blanks and 256 bytes.
TOKENS_FROM_MASK = 344
# What the code below can compute; another value would load and then answer nonsense.
FIXED_VALUES = {
    "config.json": {"position_encoding_2d": True},
    "eva_config": {
        "vocab_size": 1,
        "layernorm_order": "pre",
        "use_final_layernorm": False,
        "pre_len": 1,
        "post_len": 0,
        "num_classes": 0,
    },
    "qformer_config": {"layernorm_order": "post", "max_sequence_length": 0},
}


def rename_fields(part: str, original: dict[str, Any], names: dict[str, str | None]) -> dict[str, Any]:
    """Translate the fields of one part of an original config.json; complain about missing and impossible ones."""
    missing = [name for name in REQUIRED_FIELDS if original.get(name) is None]
    if missing:
        raise ValueError(f"{part} lacks {', '.join(missing)}; it has {', '.join(sorted(original)) or 'no field'}.")
    for name, value in FIXED_VALUES[part].items():
        if original.get(name, value) != value:
            raise ValueError(f"{part} has {name}={original[name]!r}; VisualGLM is only defined for {value!r}.")
    return {names[name]: value for name, value in original.items() if names.get(name) is not None}


def warn_of_unknown_fields(part: str, original: dict[str, Any], names: dict[str, str | None]) -> None:
    unknown = sorted(name for name in original if name not in names)
    if unknown:
        logger.warning(f"{part} has fields that are not of the original VisualGLM and are ignored: {unknown}.")


def translate_original_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn the fields of an original config.json into ours; the fields both have in common are kept."""
    fields = dict(fields)
    absent = [part for part in ("eva_config", "qformer_config") if not isinstance(fields.get(part), dict)]
    if absent:
        raise ValueError(f"config.json lacks {' and '.join(absent)}; is it the config.json of a VisualGLM?")
    eva, qformer = dict(fields.pop("eva_config")), dict(fields.pop("qformer_config"))
    warn_of_unknown_fields("eva_config", eva, VISION_FIELDS)
    warn_of_unknown_fields("qformer_config", qformer, QFORMER_FIELDS)

    text = rename_fields("config.json", fields, TEXT_FIELDS)
    vision = rename_fields("eva_config", eva, VISION_FIELDS)
    qformer = rename_fields("qformer_config", qformer, QFORMER_FIELDS)
    if text.get("mask_token_id") is not None:
        text["num_tokens"] = text["mask_token_id"] + TOKENS_FROM_MASK
    qformer.setdefault("intermediate_size", 4 * qformer["hidden_size"])
    if isinstance(qformer.get("cross_attention_layers"), list):
        qformer["cross_attention_layers"] = [i for i, has in enumerate(qformer["cross_attention_layers"]) if has]
    image_length, queries = fields.pop("image_length", None), qformer.get("num_query_tokens")
    if image_length is not None and queries is not None and image_length != queries:
        raise ValueError(f"config.json has image_length={image_length} but the Q-Former makes {queries} embeddings.")

    rest = {name: value for name, value in fields.items() if name not in TEXT_FIELDS and name != "position_encoding_2d"}
    return {**rest, "text_config": text, "vision_config": vision, "qformer_config": qformer}


def check_positive_integers(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be a positive integer, found {value!r}.")


def check_divisible(config: PreTrainedConfig, name: str, by: str, times: int = 1) -> None:
    value, divisor = getattr(config, name), getattr(config, by) * times
    if value % divisor:
        what = f"{times} * {by}" if times > 1 else by
        raise ValueError(f"{type(config).__name__}.{name}={value} must be a multiple of {what}={divisor}.")


@contextmanager
def wrong_types_as_value_errors(name: str) -> Iterator[None]:
    """Let a field of a wrong type end in one line, as a field of a wrong value does."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {' '.join(str(error.__cause__ or error).split())}") from error


def raises_value_errors(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Decorate a strict class, whose generated `__init__` knows an error of its own for types."""
    initialise = config_class.__init__

    @functools.wraps(initialise)
    def __init__(self, *args, **kwargs):
        with wrong_types_as_value_errors(type(self).__name__):
            initialise(self, *args, **kwargs)

    config_class.__init__ = __init__
    return config_class


@auto_docstring(custom_intro="The ChatGLM-6B decoder.")
@raises_value_errors
@strict
class VisualGLMTextConfig(PreTrainedConfig):
    r"""
    vocab_size (`int`, *optional*, defaults to 130528):
        Rows of the word embeddings and of the head.
    num_tokens (`int`, *optional*, defaults to 130344):
        How many of these rows, the first ones, have a token in the tokenizer. The others mean nothing and are never
        generated. At most `vocab_size`; `resize_token_embeddings` keeps it.
    rope_theta (`float`, *optional*, defaults to 10000.0):
        Base of the rotary angles.
    residual_alpha (`float`, *optional*, defaults to sqrt(56)):
        Factor of the normalised input in both residual sums of a block. The original's Hugging Face code always
        computes sqrt(2 * 28), whatever the depth; SwissArmyTransformer sqrt(2 * num_hidden_layers).
    mask_token_id (`int`, *optional*, defaults to 130000):
        `[MASK]`, which takes the place of `[gMASK]` in a sequence without it.
    gmask_token_id (`int`, *optional*, defaults to 130001):
        `[gMASK]`, the position that the answer fills. `bos_token_id` (`<sop>`) starts it, `eos_token_id` (`<eop>`)
        ends it.
    pre_seq_len (`int`, *optional*):
        Length of the prefix of P-tuning v2: keys and values that were learned for every layer; None for no prefix.
    prefix_projection (`bool`, *optional*, defaults to `False`):
        Whether a small network computes that prefix.
    """

    model_type = "chatglm_text"
    base_config_key = "text_config"
    base_model_tp_plan = {
        "word_embeddings": "embedding_rowwise",
        "layers.*.attention.query_key_value": "colwise",  # rows are grouped by head: a shard holds whole heads
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }

    vocab_size: int = 130528
    num_tokens: int = 130344
    hidden_size: int = 4096
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    intermediate_size: int = 16384
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    residual_alpha: float = 56**0.5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int = 130004
    eos_token_id: int | None = 130005
    pad_token_id: int = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_positive_integers(
            self,
            "vocab_size",
            "num_tokens",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            *(["pre_seq_len"] if self.pre_seq_len is not None else []),
        )
        self.num_tokens = min(self.num_tokens, self.vocab_size)
        # Each half of a head is rotated by one of the two positions, and a rotation needs pairs.
        check_divisible(self, "hidden_size", by="num_attention_heads", times=4)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "gmask_token_id"):
            token_id = getattr(self, name)
            if token_id is None and name == "eos_token_id":
                continue  # an answer that ends at its length only
            if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{name}={token_id!r} is not in the vocabulary of {self.vocab_size} tokens.")

    @property
    def head_dim(self) -> int:
        """Numbers per head, half of them turned by each of the two positions."""
        return self.hidden_size // self.num_attention_heads


@auto_docstring(custom_intro="The EVA ViT-g of BLIP-2: pre-LayerNorm, one class token, learned positions.")
@raises_value_errors
@strict
class VisualGLMVisionConfig(PreTrainedConfig):
    r"""
    final_layer_norm_eps (`float`, *optional*, defaults to 1e-5):
        Epsilon of `ln_vision`, which the original leaves at PyTorch's default.
    preferred_image_size (`int`, *optional*):
        Pixels a side of the pictures that `chat` and the tools show, and that any call takes, if it is another size
        than `image_size`, of which the positions are: a model that was fine-tuned with larger pictures has it.
    """

    model_type = "visualglm_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1408
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    image_size: int | list[int] = 224
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    final_layer_norm_eps: float = 1e-5
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    preferred_image_size: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.image_size, (list, tuple)):
            if len(set(self.image_size)) != 1:
                raise ValueError(f"vision_config.image_size must be a square, found {self.image_size}.")
            self.image_size = self.image_size[0]
        check_positive_integers(
            self,
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "image_size",
            "patch_size",
            "num_channels",
        )
        check_divisible(self, "hidden_size", by="num_attention_heads")
        check_divisible(self, "image_size", by="patch_size")
        if self.preferred_image_size is not None:
            self.check_image_size(self.preferred_image_size)

    @property
    def num_positions(self) -> int:
        """The class token and one position per patch."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def shown_image_size(self) -> int:
        """Pixels a side of the pictures that `chat` and the tools show."""
        return self.preferred_image_size or self.image_size

    def check_image_size(self, *sides: int) -> None:
        """Raise a `ValueError` unless each of the sides, in pixels, is a number of whole patches that can be encoded.

        A part of a patch at the edge would be cut off, so no other size is rounded to one of these.
        """
        patch, most = self.patch_size, MAX_PATCHES_A_SIDE * self.patch_size
        for side in sides:
            if isinstance(side, bool) or not isinstance(side, (int, numbers.Integral)):
                raise ValueError(f"image_size must be a number of pixels a side, found {side!r}.")
            if side < patch or side > most:
                raise ValueError(f"image_size must be from {patch} to {most} pixels a side, found {side}.")
            if side % patch:
                lower = side // patch * patch
                raise ValueError(
                    f"image_size={side} is not whole patches of {patch} pixels. Take {lower} or {lower + patch}."
                )


@auto_docstring(custom_intro="The Q-Former of BLIP-2: post-LayerNorm, learned queries that look at the ViT's output.")
@raises_value_errors
@strict
class VisualGLMQFormerConfig(PreTrainedConfig):
    r"""
    num_query_tokens (`int`, *optional*, defaults to 32):
        Soft prompt embeddings per picture.
    cross_attention_layers (`list[int]`, *optional*):
        Indices of the layers with cross-attention; None for every even layer.
    """

    model_type = "visualglm_qformer"
    base_config_key = "qformer_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_query_tokens: int = 32
    encoder_hidden_size: int = 1408
    cross_attention_layers: list[int] | None = None
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_positive_integers(
            self,
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "num_query_tokens",
            "encoder_hidden_size",
        )
        check_divisible(self, "hidden_size", by="num_attention_heads")
        if self.cross_attention_layers is None:
            self.cross_attention_layers = list(range(0, self.num_hidden_layers, 2))
        outside = [index for index in self.cross_attention_layers if not 0 <= index < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"qformer_config.cross_attention_layers names layers {outside}, "
                f"but there are only {self.num_hidden_layers}."
            )


@auto_docstring(
    custom_intro="""
    A VisualGLM: EVA ViT and Q-Former, a projection, the ChatGLM decoder. Takes the fields of our own config.json and of
    the original's alike, and raises a `ValueError` if one is missing, out of range, or contradicts another.
    """
)
@raises_value_errors
@strict
class VisualGLMConfig(PreTrainedConfig):
    r"""
    image_token_id (`int`, *optional*, defaults to 0):
        The placeholder that image embeddings replace; the original uses `<unk>`.
    tie_word_embeddings (`bool`, *optional*, defaults to `True`):
        Whether `lm_head` and the word embeddings are one tensor. The original's are equal; a checkpoint whose two
        tensors differ keeps both.
    quantization_bit (`int`, *optional*, defaults to 0):
        4 or 8 for a checkpoint with quantized decoder weights, else 0.
    quantization_group_size (`int`, *optional*):
        Columns that share a scale in a checkpoint of 4 bits; one scale per row, as in the original's, by default.
    quantization_lm_head (`bool`, *optional*, defaults to `False`):
        Whether `lm_head` is quantized too, to 8 bits.
    quantization_image_encoder (`bool`, *optional*, defaults to `False`):
        Whether the linear layers of the image encoder are quantized too, to 8 bits.
    """

    model_type = "chatglm"
    # No predictions, for the Trainer: caches by either name, and what is per picture instead of per row.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]
    sub_configs = {
        "text_config": VisualGLMTextConfig,
        "vision_config": VisualGLMVisionConfig,
        "qformer_config": VisualGLMQFormerConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 0
    tie_word_embeddings: bool = True
    quantization_bit: int = 0
    quantization_group_size: int | None = None
    quantization_lm_head: bool = False
    quantization_image_encoder: bool = False

    def __post_init__(self, **kwargs):
        if "eva_config" in kwargs or "num_layers" in kwargs:
            kwargs = translate_original_config({**kwargs, "qformer_config": self.qformer_config})
            self.text_config, self.vision_config, self.qformer_config = (kwargs.pop(name) for name in self.sub_configs)
        # The original's map names files of the original's code, which no longer run.
        if any("configuration_chatglm" in str(target) for target in (kwargs.get("auto_map") or {}).values()):
            kwargs.pop("auto_map")
        self.make_parts()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VisualGLMConfig":
        """[`PreTrainedConfig.from_dict`] for VisualGLMs only: defaults would make another model's a full-size one.

        Raises:
            ValueError: `config_dict` is another model's, or it lacks a part.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"config.json has model_type={model_type!r}; a VisualGLM's has {cls.model_type!r}.")
        is_original = "eva_config" in config_dict or "num_layers" in config_dict
        missing = [] if is_original else [name for name in cls.sub_configs if config_dict.get(name) is None]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}, so it is not a VisualGLM's. Give the folder of the original "
                "visualglm-6b, or one that visualglm convert has written."
            )
        with wrong_types_as_value_errors(cls.__name__):
            return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs) -> None:
        """Save it as [`PretrainedConfig.save_pretrained`] does, with the code that loads it."""
        replace_links(save_directory)
        self.register_for_auto_class()
        super().save_pretrained(save_directory, *args, **kwargs)

    def make_parts(self) -> None:
        """Turn the fields of the three parts into configs that agree, or raise a `ValueError`."""
        for name, part in self.sub_configs.items():
            fields = getattr(self, name)
            if fields is None or isinstance(fields, dict):
                setattr(self, name, part(**(fields or {})))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        if self.qformer_config.encoder_hidden_size != self.vision_config.hidden_size:
            raise ValueError(
                f"qformer_config.encoder_hidden_size={self.qformer_config.encoder_hidden_size} must be "
                f"vision_config.hidden_size={self.vision_config.hidden_size}."
            )
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"quantization_bit must be 0, 4 or 8, found {self.quantization_bit!r}.")
        if self.quantization_image_encoder and not self.quantization_bit:
            raise ValueError("quantization_image_encoder is for quantized weights: quantization_bit must be 4 or 8.")

    # Where the original has them: `from_pretrained(folder, pre_seq_len=128)` adds a prefix to be learned.
    @property
    def pre_seq_len(self) -> int | None:
        """Length of the learned prefix of P-tuning v2; None for none."""
        return self.text_config.pre_seq_len

    @pre_seq_len.setter
    def pre_seq_len(self, value: int | None) -> None:
        self.text_config.pre_seq_len = value

    @property
    def prefix_projection(self) -> bool:
        """Whether a small network computes that prefix."""
        return self.text_config.prefix_projection

    @prefix_projection.setter
    def prefix_projection(self, value: bool) -> None:
        self.text_config.prefix_projection = value

    @property
    def num_processes(self) -> int:
        """How many share the model; each then has some of the attention heads."""
        return count_processes(self)


# Models that several processes share


def count_processes(config: VisualGLMConfig) -> int:
    """How many processes share a model, as `from_pretrained` was told."""
    return getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1


def check_tensor_parallel(config: VisualGLMConfig) -> None:
    """Raise a `ValueError` if the processes that are to share this model cannot."""
    num_processes = count_processes(config)
    if num_processes == 1:
        return
    num_heads = config.text_config.num_attention_heads
    if num_heads % num_processes:
        raise ValueError(
            f"{num_processes} processes cannot share {num_heads} attention heads evenly. Start a number that divides "
            f'{num_heads}, or use device_map="auto" in one process.'
        )
    undivided = {"pre_seq_len": config.text_config.pre_seq_len, "quantization_bit": config.quantization_bit}
    if any(undivided.values()):
        raise ValueError(
            f"A model with {' and '.join(name for name, value in undivided.items() if value)} cannot be divided among "
            'processes. Use device_map="auto" in one process.'
        )


__all__ = ["VisualGLMConfig", "VisualGLMQFormerConfig", "VisualGLMTextConfig", "VisualGLMVisionConfig"]
