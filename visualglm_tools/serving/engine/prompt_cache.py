"""Prompts that were read lately, for whoever asks the same again: a retry, another choice, another client.

GLM's context sees all of itself, so what the model computes for a prompt holds for the whole of it or for nothing:
prompts are the same, pictures included, or they share nothing.
"""

import collections
import hashlib
from collections.abc import Sequence

import torch


Key = tuple[tuple[int, ...], bytes]  # token ids, and a digest of the pictures
States = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, [1, heads, T, D]


def describe_prompt(token_ids: Sequence[int], image_embeds: torch.Tensor | None) -> Key:
    """What two prompts have in common if they are the same.

    Args:
        token_ids: of the prompt.
        image_embeds: of its pictures, [pictures, num_query_tokens, C], as this model sees them.
    """
    pictures = b"" if image_embeds is None else image_embeds.detach().cpu().contiguous().view(torch.uint8).numpy()
    return tuple(token_ids), hashlib.blake2b(pictures, digest_size=16).digest()


class PromptCache:
    """What was computed for the last prompts, as many of them as fit.

    Args:
        capacity: bytes; 0 remembers nothing.
    """

    def __init__(self, capacity: int):
        self.capacity, self.used = capacity, 0
        self.num_read = 0  # prompts that were not known
        self._prompts: collections.OrderedDict[Key, States] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._prompts)

    def find(self, key: Key) -> States | None:
        """What is remembered of a prompt, which from now on is the latest."""
        if key in self._prompts:
            self._prompts.move_to_end(key)
        return self._prompts.get(key)

    def has_room(self, states: States) -> bool:
        """Whether so much could be remembered at all."""
        return count_bytes(states) <= self.capacity

    def add(self, key: Key, states: States) -> None:
        """Remember a prompt instead of those that were not asked for the longest, unless it alone is too large."""
        if key in self._prompts or not self.has_room(states):
            return
        self._prompts[key] = states
        self.used += count_bytes(states)
        while self.used > self.capacity:
            self.used -= count_bytes(self._prompts.popitem(last=False)[1])


def count_bytes(states: States) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in states)
