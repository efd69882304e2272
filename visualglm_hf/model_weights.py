# SPDX-License-Identifier: Apache-2.0
"""What happens to the weights of a model as a whole: adapters of PEFT, other numbers of tokens, saving.

Not here: where adapters are and what they do to tied embeddings (`adapters.py`), low bits (`quantization.py`).
"""

from os import PathLike

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .adapters import (
    adapts_embeddings,
    check_plain,
    check_tied_adapters,
    is_tied,
    record_untied,
    remove_adapters,
    untie,
    unwrap,
)
from .code_links import replace_links
from .quantization import check_adapters


AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def check_resizable(model: PreTrainedModel, new_num_tokens: int | None) -> None:
    """Raise a `ValueError` if the embeddings and the head of a model cannot have so many rows."""
    for name, layer in (("word_embeddings", model.get_input_embeddings()), ("lm_head", model.get_output_embeddings())):
        if unwrap(layer) is not layer:
            raise ValueError(f"{name} has an adapter. Resize the embeddings before you add it, or after merging it.")
        if not layer.weight.is_floating_point():
            raise ValueError(f"{name} has few bits. Load the full weights, resize the embeddings, then quantize.")
    text = model.config.text_config
    names = ("pad_token_id", "mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id")
    largest = max(names, key=lambda name: getattr(text, name) or 0)
    if new_num_tokens is not None and new_num_tokens <= getattr(text, largest):
        raise ValueError(
            f"With {new_num_tokens} rows the embeddings would lose {largest} {getattr(text, largest)}. Keep at least "
            f"{getattr(text, largest) + 1}."
        )


class WeightsMixin:
    """What transformers and PEFT do to weights, before a `PreTrainedModel`, whose methods some of these extend."""

    @property
    def peft_config(self) -> dict:
        """PEFT's configs of the adapters on this model, by name. PEFT sets it when they are in their places."""
        if self.adapters is None:
            raise AttributeError("no adapters")
        return self.adapters

    @peft_config.setter
    def peft_config(self, adapters: dict) -> None:
        try:
            self.accept_adapters(adapters)
        except ValueError:
            remove_adapters(self)
            raise
        self.adapters = adapters

    @peft_config.deleter
    def peft_config(self) -> None:
        self.adapters, self.accepted_adapters = None, []

    def accept_adapters(self, adapters: dict) -> None:
        """Make room for adapters that PEFT has put on this model.

        An adapter of the head or of the embeddings unties them: merged, it belongs into one of the two. On the
        full-size model in half precision the second matrix takes 1.1 GB.

        Raises:
            ValueError: adapters that need full weights are on low-bit layers, or one would be lost on loading.
        """
        check_tied_adapters(adapters)
        check_adapters(self, [config.peft_type for config in adapters.values()])
        if is_tied(self) and adapts_embeddings(self):
            untie(self)
        self.accepted_adapters = list(adapters)

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs) -> None:
        """Save the weights and the config as [`PreTrainedModel.save_pretrained`] does, and the code that loads them.

        Raises:
            ValueError: layers have adapters.
        """
        if kwargs.get("state_dict") is None and not getattr(self, "_hf_peft_config_loaded", False):
            check_plain(self)
        if self.config.tie_word_embeddings and not (is_tied(self) or self.lm_head.weight.is_meta):
            record_untied(self)  # as when a head that was trained as a whole has taken its place
        replace_links(save_directory)
        self.register_for_auto_class()
        name = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | dict.fromkeys(AUTO_CLASSES, name)
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the number of rows of the embeddings and the head, as [`PreTrainedModel.resize_token_embeddings`].

        All `new_num_tokens` may be generated afterwards.

        Raises:
            ValueError: one of them has few bits or an adapter, or a control token would be lost; nothing has changed.
        """
        check_resizable(self, new_num_tokens)
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            self.config.text_config.num_tokens = new_num_tokens
        return embeddings
