# SPDX-License-Identifier: Apache-2.0
"""The prefix of P-tuning v2: in each layer, learned keys and values before those of the text.

Source: arXiv:2110.07602, `modeling_chatglm.py` of the original.

Shapes: B batch, P prefix length, T key length, H heads, D head dimension, C hidden size.
"""

import torch
from torch import nn

from .configuration_visualglm import VisualGLMTextConfig


PREFIX_DROPOUT = 0.1  # the original's, in training


class VisualGLMPrefixEncoder(nn.Module):
    """P-tuning v2: keys and values that every query of a layer sees before all others, at no position of their own."""

    def __init__(self, config: VisualGLMTextConfig):
        super().__init__()
        self.config = config
        width = config.num_hidden_layers * 2 * config.hidden_size
        # CODEPATH: P-tuning with and without --prefix_projection, both of the original's.
        self.embedding = nn.Embedding(config.pre_seq_len, config.hidden_size if config.prefix_projection else width)
        self.trans = nn.ModuleDict()
        # CODEPATH: as above.
        if config.prefix_projection:  # the original's names: a tanh is between them
            self.trans["0"] = nn.Linear(config.hidden_size, config.hidden_size)
            self.trans["2"] = nn.Linear(config.hidden_size, width)
        self.dropout = nn.Dropout(PREFIX_DROPOUT)

    def compute_table(self, device: torch.device | None = None) -> torch.Tensor:
        """The prefixes of all layers, [P, layers * 2 (key, value) * C]."""
        table = self.embedding(torch.arange(self.config.pre_seq_len, device=device))
        return self.trans["2"](torch.tanh(self.trans["0"](table))) if self.trans else table

    def forward(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Keys and values [2, H, P, D] for each layer, P prefix positions."""
        config = self.config
        shape = (config.num_hidden_layers, 2, config.num_attention_heads, config.head_dim)
        table = self.dropout(self.compute_table(device)).unflatten(1, shape)  # [P, layers, 2, H, D]
        return table.permute(1, 2, 3, 0, 4).unbind()


def prepend_prefix(prefix: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the prefix [2, H, P, D] of a layer before its keys and values [B, H, T, D]."""
    prefix = prefix.to(key)[:, None].expand(-1, len(key), -1, -1, -1)
    return torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)
