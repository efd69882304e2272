# SPDX-License-Identifier: Apache-2.0
"""What was said so far: a list of (query, response) pairs, each with the pictures that stand before it.

The pictures travel with the pairs. So whatever puts pairs into another order or another list, cuts, joins or copies
them takes the pictures along, also where it makes a plain list of them. A plain pair has none, as in the original.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class RememberedImage:
    """A picture that was shown: a digest of its pixels, its soft prompt [1, num_query_tokens, C], and what was read."""

    digest: str
    embeds: torch.Tensor = field(compare=False, repr=False)
    reading: str | None = field(default=None, compare=False, kw_only=True)  # None where nobody has asked for it


@dataclass(frozen=True)
class PlacedImage(RememberedImage):
    """A picture of a conversation, and the index of the turn that it stands before."""

    turn: int


class AnsweredTurn(tuple):
    """A (query, response) pair, equal to the plain one, with the pictures that stand before it."""

    images: tuple[RememberedImage, ...]

    def __new__(cls, pair: Iterable[str], images: Iterable[RememberedImage] = ()):
        turn = super().__new__(cls, pair)
        turn.images = tuple(images)
        return turn

    @property
    def readings(self) -> tuple[str, ...]:
        """What was read in the pictures, as it stood in the prompt; "" for a picture without text."""
        return tuple(image.reading or "" for image in self.images)


class ChatHistory(list):
    """The turns of a conversation: equal to the plain list of pairs, and a `ChatHistory` when cut, joined or copied.

    A plain pair that takes the place of a turn, by `history[i] = pair` or pair for pair in a slice, is that turn
    edited: it keeps the pictures. A turn that leaves the list takes its pictures with it.
    """

    def __init__(self, turns: Iterable[Sequence[str]] = ()):
        super().__init__(map(as_turn, turns))

    @property
    def images(self) -> tuple[PlacedImage, ...]:
        """The pictures, in their order in the prompt."""
        return tuple(
            PlacedImage(image.digest, image.embeds, index, reading=image.reading)
            for index, turn in enumerate(self)
            for image in images_of(turn)
        )

    def append(self, turn: Sequence[str]) -> None:
        super().append(as_turn(turn))

    def insert(self, index: int, turn: Sequence[str]) -> None:
        super().insert(index, as_turn(turn))

    def extend(self, turns: Iterable[Sequence[str]]) -> None:
        super().extend(map(as_turn, turns))

    def copy(self) -> "ChatHistory":
        return type(self)(self)

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return type(self)(found) if isinstance(index, slice) else found

    def __setitem__(self, index, value):
        if not isinstance(index, slice):
            return super().__setitem__(index, as_turn(value, images_of(self[index])))
        replaced, turns = self[index], list(value)
        is_edit = len(replaced) == len(turns)
        images = map(images_of, replaced) if is_edit else [()] * len(turns)
        return super().__setitem__(index, list(map(as_turn, turns, images)))

    def __add__(self, other: list) -> "ChatHistory":
        return type(self)(super().__add__(other))

    def __radd__(self, other: list) -> "ChatHistory":
        return type(self)(other).__add__(self) if isinstance(other, list) else NotImplemented

    def __iadd__(self, other: Iterable[Sequence[str]]) -> "ChatHistory":
        self.extend(other)
        return self

    def __mul__(self, times: int) -> "ChatHistory":
        return type(self)(super().__mul__(times))

    __rmul__ = __mul__


def images_of(turn: Sequence[str]) -> tuple[RememberedImage, ...]:
    """The pictures that stand before a turn; a plain pair has none."""
    return getattr(turn, "images", ())


def as_turn(pair, images: Iterable[RememberedImage] = ()):
    """A plain pair as a turn with `images`; a turn, which has its own, and what is no pair, as they are."""
    is_plain = isinstance(pair, (tuple, list)) and len(pair) == 2 and not hasattr(pair, "images")
    return AnsweredTurn(pair, images) if is_plain else pair


def shown_last(history: ChatHistory) -> set[str]:
    """Digests of the pictures that the last turn with pictures has."""
    images = history.images
    return {image.digest for image in images if image.turn == images[-1].turn}


def joining_turn(history: Sequence) -> int:
    """The index of the turn that a new picture stands before: the coming one, of a plain list the first."""
    return len(history) if any(hasattr(turn, "images") for turn in history) else 0
