"""Rows at fixed places of a static cache, so that their step can be recorded or compiled.

Whoever joins or leaves changes what is in the cache, not where it lies. It is made anew when more places are needed, or
half of them are, or more tokens: each time a power of two, so what was compiled for a number of rows serves again.

Not here: what a batch is and how its rows go on (`batching.py`), nor how a step is recorded (`visualglm_hf`).
"""

from collections.abc import Sequence

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from visualglm_hf.compilation import bucket_length
from visualglm_tools.serving.engine.batching import Batch, Row, gather


class Slots:
    """The places of one engine.

    Args:
        model: the engine's.
        compile: `generate`'s: how the step is recorded or compiled.
        most: rows that there may be, and so places: each takes the memory of an answer, filled or not.

    Raises:
        ValueError: as `compile_step`.
    """

    def __init__(self, model: PreTrainedModel, compile: bool | CompileConfig, most: int):
        self.model, self.step, self.most = model, model.compile_step(compile), most
        self.batch: Batch | None = None  # what is in them

    def merge(self, batches: Sequence[Batch]) -> Batch | None:
        """The rows of all `batches` that go on; None if none does. Places that are left hold rows that are done."""
        batches = [batch for batch in batches if batch.live]
        rows = [row for batch in batches for row in batch.live]
        if not rows:
            self.batch = None
            return None
        length, idle = max(len(row.token_ids) for row in rows) - 1, count_places(len(rows), self.most) - len(rows)
        cache = self.choose_cache(len(rows) + idle, length + 1)
        states = list(gather(batches, length))  # before the cache that they may be in is written over
        cache.reset()
        for index, layer in enumerate(states):
            cache.update(*(torch.cat((each, each[:1].expand(idle, -1, -1, -1))) for each in layer), index)
        self.batch = Batch(rows + [idle_row(rows[0]) for _ in range(idle)], cache)
        return self.batch

    def choose_cache(self, places: int, length: int) -> StaticCache:
        """The cache that there is, if it has so many places of so many tokens, or another."""
        if self.batch is not None:
            cache = self.batch.cache
            if len(self.batch.rows) == places and cache.layers[0].max_cache_len >= length:
                return cache
        config = self.model.config.text_config
        return StaticCache(config=config, max_cache_len=bucket_length(length, config.max_position_embeddings))


def count_places(rows: int, most: int) -> int:
    """The power of two that holds so many rows, or `most` if that is less."""
    return min(most, 1 << (rows - 1).bit_length())


def idle_row(row: Row) -> Row:
    """A row that is done, where there is none: what it computes is what another does, and nobody reads it."""
    idle = Row(row.token_ids, row.chooser, row.eos_token_id, row.max_length, row.on_token, row.on_finish)
    idle.finish_reason = "idle"
    return idle
