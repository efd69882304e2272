# SPDX-License-Identifier: Apache-2.0
"""The part of a picture that matters to a question, cropped from its full pixels: what `chat(..., zoom=True)` adds.

The question is put to the whole picture first, as far as the position from which the answer begins. Where that looks is
cropped, and the crop takes the picture's place in the prompt that is answered. Not here: where it looks
(`attention_maps.py`), and prompts and histories (`chat.py`). Source: ViCrop (arXiv:2502.17422), with two differences,
both measured on drawings: the crop replaces the picture instead of joining it, and its size follows the map.

A *region* is (left, upper, right, lower), in pixels of the picture.
"""

import numbers
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from transformers.utils import logging

from .attention_maps import SeenPicture, map_attention, see


logger = logging.get_logger(__name__)

MOST_LOOKS = 4  # each can make the picture four times as large
Region = tuple[int, int, int, int]

# Chosen on drawings, see docs/limits.md. Parts of the map's peak, of the heaviest spot, and of the longer side.
LEAST_ATTENTION = 0.15  # of the peak, from which on a patch belongs to a spot
LEAST_SPOT = 0.25  # of the heaviest spot, from which on another one matters, too
LARGEST_SPOT = 2  # patches a side, beyond which what matters is seen well enough in the whole
MARGIN = 2.5  # the crop's side, in sides of what matters
SMALLEST_CROP, LARGEST_CROP = 0.25, 0.5  # of the longer side; larger ones gain less than they lose


def count_looks(zoom) -> int:
    """How many looks `zoom` asks for, 0 for none; a `ValueError` if it is no such number."""
    is_number = isinstance(zoom, (numbers.Integral, np.bool_)) or zoom is None
    if not is_number or not 0 <= int(zoom or 0) <= MOST_LOOKS:
        raise ValueError(
            f"zoom must be True, False or a number of looks from 0 to {MOST_LOOKS}, found {zoom!r}. True is one look."
        )
    return int(zoom or 0)


def zoom_obstacle(size: tuple[int, int], image_size: int) -> str | None:
    """Why zooming into a picture of this width and height has nothing to gain; None if it may have."""
    if LARGEST_CROP * max(size) >= image_size:
        return None
    return (
        f"zoom has nothing to gain from a picture of {size[0]} x {size[1]} pixels, of which the model sees "
        f"{image_size} x {image_size} anyway: it is answered without. Pass one of {round(image_size / LARGEST_CROP)} "
        "pixels or more on a side."
    )


def zoom_in(
    model,
    seen: SeenPicture,
    input_ids: torch.Tensor,
    image_embeds: torch.Tensor,
    place: int,
    looks: int,
) -> torch.Tensor:
    """The pictures of a prompt, with the part that matters in the place of one, as often as that gains something.

    Args:
        model: the one that answers.
        seen: the picture that is looked into; the crops are shown at its size.
        input_ids: [1, S], the prompt.
        image_embeds: [pictures, num_query_tokens, C] of the prompt; not changed.
        place: of the picture among them.
        looks: at most.
    """
    image_size = seen.image_size
    obstacle = zoom_obstacle(seen.picture.size, image_size)
    if obstacle is not None:
        logger.warning(obstacle)
        return image_embeds
    image_embeds = image_embeds.clone()
    for _ in range(looks):
        attention_map = look_ahead(model, seen, input_ids, image_embeds, place)
        region = find_region(attention_map, seen.picture.size, image_size)
        if region is None:
            break
        [crop] = model.open_images([seen.picture.crop(region)], image_size, keep_pixels=True)
        seen = see(model, crop.picture, crop.pixel_values)
        image_embeds[place] = seen.embeds[0]
    return image_embeds


def look_ahead(
    model, seen: SeenPicture, input_ids: torch.Tensor, image_embeds: torch.Tensor, place: int
) -> torch.Tensor:
    """The map [side, side] of where a prompt looks from the position at which its answer begins; see `zoom_in`."""
    return map_attention(model, input_ids, image_embeds, place, input_ids.shape[1] - 1, seen.sources)


def find_region(attention_map: torch.Tensor, size: tuple[int, int], image_size: int) -> Region | None:
    """The part of a picture that a map points at; None if it has nothing to gain from being seen larger.

    It is a square, where the picture is not narrower, around all spots that matter, and not smaller than what the model
    sees without enlarging it.

    Args:
        attention_map: [side, side] over the whole picture.
        size: width and height of the picture, in pixels.
        image_size: of what the model sees, in pixels.
    """
    ys, xs = zip(*matter(attention_map.tolist()), strict=True)
    columns, rows = max(xs) - min(xs) + 1, max(ys) - min(ys) + 1
    if max(columns, rows) > LARGEST_SPOT:
        return None
    width, height = (length / len(attention_map) for length in size)  # of a patch
    side = max(MARGIN * max(columns * width, rows * height), SMALLEST_CROP * max(size), image_size)
    if side > LARGEST_CROP * max(size):
        return None
    left, right = fit((min(xs) + columns / 2) * width, side, size[0])
    upper, lower = fit((min(ys) + rows / 2) * height, side, size[1])
    return left, upper, right, lower


def fit(middle: float, side: float, length: int) -> tuple[int, int]:
    """First and last pixel, the last excluded, of `side` pixels around `middle`, or as near to it as all exist."""
    side = min(round(side), length)
    first = min(max(round(middle - side / 2), 0), length - side)
    return first, first + side


def matter(attention_map: list[list[float]]) -> list[tuple[int, int]]:
    """The patches (y, x) of all spots that matter: neighbours in a spot touch, with their corners at least."""
    least = LEAST_ATTENTION * max(map(max, attention_map))
    bright = {(y, x) for y, row in enumerate(attention_map) for x, value in enumerate(row) if value >= least}
    spots = list(separate(bright))
    weights = [sum(attention_map[y][x] for y, x in spot) for spot in spots]
    return [
        patch
        for spot, weight in zip(spots, weights, strict=True)
        if weight >= LEAST_SPOT * max(weights)
        for patch in spot
    ]


def separate(patches: set[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The patches spot by spot."""
    left = set(patches)
    while left:
        spot, queue = [], deque([left.pop()])
        while queue:
            y, x = queue.popleft()
            spot.append((y, x))
            near = left & {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
            left -= near
            queue.extend(near)
        yield spot
