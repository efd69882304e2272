# SPDX-License-Identifier: Apache-2.0
"""A dynamic cache with room for what comes next: a token's keys and values are written, no others copied with them.

transformers' own makes every tensor anew for every token. On a CPU that touches fresh memory of the whole cache's size:
of a step in 4 bits, a fifteenth with 64 tokens before it and a quarter with 2,000 (2 threads, 28 layers).

And a static cache that is made longer when it is full, and what no cache can be used for.

Shapes: B batch, H heads, T tokens, D head dimension.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.configuration_utils import PretrainedConfig


ROOM = 256  # tokens


class GrowingStates:
    """Keys or values, the first T tokens of a buffer."""

    def __init__(self):
        self.buffer: torch.Tensor | None = None

    def append(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Append states [B, H, S, D] to those before, [B, H, T, D] or empty; returns all, [B, H, T + S, D]."""
        longer = self.lengthen(states, new, new.shape[2])
        longer[:, :, -new.shape[2] :] = new
        return longer

    def lengthen(self, states: torch.Tensor, new: torch.Tensor, count: int) -> torch.Tensor:
        """Make room for `count` tokens like `new` after the states; returns all, the last of them not written yet."""
        length = states.shape[2] if states.numel() else 0
        longer = length + count
        if not self.has_room(states, new, longer):
            self.buffer = new.new_empty((*new.shape[:2], longer + ROOM, new.shape[3]))
            if length:
                self.buffer[:, :, :length] = states
        return self.buffer[:, :, :longer]

    def has_room(self, states: torch.Tensor, new: torch.Tensor, longer: int) -> bool:
        """Whether `states` are in the buffer, and not reordered or selected from it, and more can be written there."""
        return (
            self.buffer is not None
            and states.numel() > 0
            and self.buffer.data_ptr() == states.data_ptr()
            and self.buffer.stride() == states.stride()
            and self.buffer.shape[0] == new.shape[0]
            and self.buffer.shape[2] >= longer
            and (torch.is_inference_mode_enabled() or not self.buffer.is_inference())
        )


class GrowingLayer(DynamicLayer):
    """The keys and values of a layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.growing_keys, self.growing_values = GrowingStates(), GrowingStates()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, H, S, D]; returns all of them."""
        # What gradients need must not be written over, and a compiler does not follow where tensors lie in memory.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.growing_keys.append(self.keys, key_states)
        self.values = self.growing_values.append(self.values, value_states)
        return self.keys, self.values

    def lengthen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for a token, whose keys and values are for the caller to write; returns all."""
        self.keys = self.growing_keys.lengthen(self.keys, self.keys, 1)
        self.values = self.growing_values.lengthen(self.values, self.values, 1)
        return self.keys, self.values


class GrowingCache(DynamicCache):
    """A [`DynamicCache`] of [`GrowingLayer`]s, for decoding on a CPU."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.layers = [GrowingLayer() for _ in self.layers]

    def holds(self, num_layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether there are so many layers, each with keys and values of this shape, and not empty, in this dtype."""
        return len(self.layers) == num_layers and all(
            layer.is_initialized and states.shape == shape and states.numel() > 0 and states.dtype == dtype
            for layer in self.layers
            for states in (layer.keys, layer.values)
        )


def check_fillable(cache: Cache | None, layers: Iterable[nn.Module]) -> None:
    """Raise a `ValueError` for a cache that layers would fill twice, once more for gradients."""
    if cache is None or not torch.is_grad_enabled():
        return
    if any(layer.training and layer.gradient_checkpointing for layer in layers):
        raise ValueError(
            "Activation checkpointing computes the layers twice, and a cache cannot be filled twice; prefix tuning "
            "(P-tuning) has its prefix in one. TRL's trainers checkpoint by default: say gradient_checkpointing=False, "
            "or train another adapter, such as LoRA."
        )


def make_cache(config: PretrainedConfig, device: torch.device) -> DynamicCache:
    """Make an empty dynamic cache for decoding on a device."""
    return GrowingCache(config) if device.type == "cpu" else DynamicCache(config=config)


def lengthen(cache: StaticCache, length: int) -> None:
    """Give a static cache room for `length` tokens. Its keys and values are then other tensors that begin the same."""
    for layer in cache.layers:
        if layer.is_initialized:
            room = (0, 0, 0, length - layer.max_cache_len)
            layer.keys, layer.values = F.pad(layer.keys, room), F.pad(layer.values, room)
        layer.max_cache_len = length
