# SPDX-License-Identifier: Apache-2.0
"""What an encoder made of the pictures it saw last, for as long as the encoder is the one it was.

Not here: which pictures there are (`soft_prompts.py`), and how they are encoded (`modeling_image_encoder.py`).
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from .quantization import LowBitCodes


REMEMBERED_PICTURES = 16  # of the real model in half precision, 256 KiB each
ADAPTER_STATE = ("disable_adapters", "active_adapter", "merged_adapters", "scaling")  # of PEFT's layers


class FeatureCache:
    """The features of the last pictures that an encoder saw, by their pixels and by the state of the encoder.

    It is no part of the model: never saved, and a copy of the model starts with an empty one. Threads may share it.

    Attributes:
        capacity: pictures that are remembered; 0 turns it off.
        num_encoded: pictures that were not remembered when they were asked for.
    """

    def __init__(self, capacity: int = REMEMBERED_PICTURES):
        self.capacity = capacity
        self.num_encoded = 0
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # the last one used is last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._features)

    def __reduce__(self):
        return type(self), (self.capacity,)

    def clear(self) -> None:
        """Forget all pictures. Needed after a change that `describe` does not see.

        Such are a hook that alters what a layer returns, and single numbers of a matrix that were written through
        `.data`, NumPy or a pointer, which no counter of torch's counts.
        """
        with self._lock:
            self._features.clear()

    def encode(
        self, encoder: nn.Module, pixel_values: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`compute(pixel_values)`, asked only for the pictures that are not remembered, and for each but once.

        Args:
            encoder: the module that `compute` runs.
            pixel_values: [B, 3, H, W].
            compute: gives [B, ...] for [B, 3, H, W], picture by picture.
        """
        if torch.compiler.is_compiling():
            return compute(pixel_values)
        state = describe(encoder) if self.capacity > 0 and can_remember(pixel_values) else None
        if state is None:
            return self._compute(compute, pixel_values)
        keys = [state + digest(picture) for picture in pixel_values]
        features = self._recall(keys)
        new = {key: index for index, key in enumerate(keys) if key not in features}
        if new:
            features.update(zip(new, self._compute(compute, pixel_values[list(new.values())]), strict=True))
        self._remember({key: features[key] for key in keys})
        return torch.stack([features[key] for key in keys])  # a copy: callers may write to it

    def _compute(self, compute: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self.num_encoded += len(pixel_values)
        return compute(pixel_values)

    def _recall(self, keys: list[bytes]) -> dict[bytes, torch.Tensor]:
        with self._lock:
            return {key: self._features[key] for key in keys if key in self._features}

    def _remember(self, features: dict[bytes, torch.Tensor]) -> None:
        with self._lock:
            for key, value in features.items():
                # Of a batch, each is a view that would keep all of them.
                self._features[key] = self._features.pop(key) if key in self._features else value.clone()
            while len(self._features) > self.capacity:
                self._features.popitem(last=False)


def can_remember(pixel_values: torch.Tensor) -> bool:
    """Whether features may be remembered: of real pixels, without gradients, and as no other mode makes them."""
    device_type = pixel_values.device.type
    return not (
        torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or type(pixel_values) is not torch.Tensor
        or device_type == "meta"
        or torch.is_autocast_enabled(device_type)
        or (device_type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


@torch.no_grad()
def describe(encoder: nn.Module) -> bytes | None:
    """A digest that changes with the weights of a module, its adapters and its attention; None if it cannot be told.

    Every parameter is told by its identity and its version, which counts what is written to it. What is written past
    that counter, as when merging an adapter, is seen in all numbers of a vector, and in one of each row of a matrix: of
    the full-size encoder a CPU reads these in 0.04 s, all numbers in 0.17. What is offloaded, sharded or in training
    cannot be told.
    """
    settings, identities, samples = [], [], {}
    for module in encoder.modules():
        if module.training:
            return None
        if isinstance(getattr(type(module), "disable_adapters", None), property):  # no model's method of that name
            settings += [getattr(module, name, None) for name in ADAPTER_STATE]
        elif (config := vars(module).get("config")) is not None:
            settings.append(config._attn_implementation)
    for parameter in encoder.parameters():
        if not has_plain_numbers(parameter) or parameter.is_meta or parameter.is_inference() or not parameter.numel():
            return None
        identities += (id(parameter), parameter._version)
        samples.setdefault((parameter.device, parameter.dtype), []).append(sample(parameter.detach()))
    if not identities:  # a replica of `nn.DataParallel`
        return None
    state = hashlib.sha256(repr((settings, identities)).encode())
    for parts in samples.values():
        state.update(to_bytes(torch.cat(parts)))
    return state.digest()


def has_plain_numbers(parameter: nn.Parameter) -> bool:
    """Whether a parameter is neither sharded nor quantized by others."""
    kind = type(parameter)
    return kind is LowBitCodes or kind.__torch_function__ is nn.Parameter.__torch_function__


def sample(parameter: torch.Tensor) -> torch.Tensor:
    """All numbers of a vector; of a matrix [N, K], one or two of each row, along its diagonals."""
    stride = parameter.numel() // parameter.shape[0] - 1 if parameter.dim() > 1 else 1
    if stride < 2:
        return parameter.flatten()
    return parameter.contiguous().as_strided((-(-parameter.numel() // stride),), (stride,))


def digest(picture: torch.Tensor) -> bytes:
    """Of the pixels, their type, shape and device."""
    kind = f"{picture.dtype} {tuple(picture.shape)} {picture.device}"
    return hashlib.sha256(kind.encode() + to_bytes(picture)).digest()


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
