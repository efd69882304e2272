"""Who is timed: our model step by step, the prompts it gets, and caches that need no prompt.

Shapes: B batch, S query length, T key length, H heads, D head dimension, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from transformers import Cache, DynamicCache

from visualglm_hf import VisualGLMForConditionalGeneration
from visualglm_hf.glm_positions import build_glm_position_ids
from visualglm_hf.growing_cache import make_cache
from visualglm_tools.benchmarking.models import BLOCK_LENGTH, BLOCKS, WEIGHT_STD, fill, random_block
from visualglm_tools.benchmarking.timing import Clock


class Engine(Protocol):
    """A way to compute logits, with a cache inside; `OriginalFormulation` is one."""

    def forget(self) -> None: ...

    def prefill(self, input_ids: torch.Tensor, image_embeds: torch.Tensor | None) -> torch.Tensor: ...

    def decode(self, input_ids: torch.Tensor) -> torch.Tensor: ...


class Contestant(Protocol):
    """What can be timed: a prompt of `context` tokens, then single tokens; both return milliseconds."""

    def start(self, context: int) -> float: ...

    def step(self) -> float: ...


def random_states(
    model: VisualGLMForConditionalGeneration, batch: int, context: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield random keys and values [B, H, T, D] for each layer, as a prompt of `context` tokens would leave them."""
    config, block = model.config.text_config, random_block(model.device)
    shape = (batch, config.num_attention_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        starts = (2 * layer % BLOCKS, (2 * layer + 1) % BLOCKS)
        empty = [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in starts]
        yield tuple(
            fill(states, block[start : start + BLOCK_LENGTH]) for states, start in zip(empty, starts, strict=True)
        )


def fill_cache(cache: Cache, states: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Cache:
    """Put keys and values of each layer into an empty cache, as the layers themselves do it."""
    for layer_idx, (key, value) in enumerate(states):
        cache.update(key, value, layer_idx)
    return cache


class ModelEngine:
    """Our model, step by step; logits are those of the last token, [B, 1, V]."""

    def __init__(self, model: VisualGLMForConditionalGeneration):
        self.model = model
        self.forget()

    def forget(self) -> None:
        self.cache = None

    def new_cache(self) -> DynamicCache:
        return make_cache(self.model.config.text_config, self.model.device)

    def fill(self, batch: int, context: int) -> None:
        """Have `context` random tokens in the cache: what follows costs the same as after a prompt of that length."""
        self.cache = fill_cache(self.new_cache(), random_states(self.model, batch, context))

    def prefill(self, input_ids: torch.Tensor, image_embeds: torch.Tensor | None) -> torch.Tensor:
        self.cache = self.new_cache()
        return self.model(
            input_ids=input_ids, image_embeds=image_embeds, cache=self.cache, use_cache=True, logits_to_keep=1
        ).logits

    def decode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Process the last token of [B, S]. The positions come from the whole sequence, as under `generate`."""
        positions = build_glm_position_ids(input_ids, None, self.model.config.text_config)
        return self.model(
            input_ids=input_ids[:, -1:],
            glm_position_ids=positions[..., -1:],
            cache=self.cache,
            use_cache=True,
        ).logits


class Prompts:
    """Inputs: pixel values, and prompts of any length around the soft prompt of one picture per row."""

    def __init__(self, model: VisualGLMForConditionalGeneration, batch: int):
        self.config, self.batch, self.device = model.config, batch, model.device
        queries = self.config.qformer_config.num_query_tokens
        shape = (batch, queries, self.config.text_config.hidden_size)
        self.image_embeds = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * WEIGHT_STD).to(
            self.device, model.dtype
        )

    def check(self, contexts: Sequence[int], new_tokens: int) -> None:
        """Raise a `ValueError` for a context without room for the picture or for the new tokens."""
        least = self.image_embeds.shape[1] + 4
        limit = self.config.text_config.max_position_embeddings
        room = new_tokens + 2  # the first sample is thrown away, and `generate` counts the token before it
        if min(contexts) < least or max(contexts) + room > limit:
            raise ValueError(
                f"contexts must be {least} or more, for the picture, and with {new_tokens} new tokens at most "
                f"{limit - room}; found {sorted(contexts)}. Change --contexts or --new-tokens."
            )

    def ids(self, length: int) -> torch.Tensor:
        """Return [B, length]: a word, the picture, words, [gMASK], <sop>."""
        text = self.config.text_config
        specials = (text.mask_token_id, text.gmask_token_id, text.bos_token_id, text.eos_token_id)
        first_word = max(text.pad_token_id, self.config.image_token_id) + 1
        words = torch.arange(length) * 7919 % (min(specials) - first_word) + first_word
        words[1 : 1 + self.image_embeds.shape[1]] = self.config.image_token_id
        words[-2], words[-1] = text.gmask_token_id, text.bos_token_id
        return words.repeat(self.batch, 1).to(self.device)

    def answered(self, length: int) -> torch.Tensor:
        """Return [B, length + 1]: a prompt and the first token of its answer."""
        ids = self.ids(length)
        return torch.cat((ids, ids[:, :1]), dim=1)

    def pictures(self) -> torch.Tensor:
        """Return the pixel values of a picture per row, [B, 3, image_size, image_size]."""
        vision = self.config.vision_config
        shape = (self.batch, vision.num_channels, vision.image_size, vision.image_size)
        return torch.rand(shape).to(self.device)


class Runner:
    """A contestant: an engine that answers prompts greedily."""

    def __init__(self, engine: Engine, prompts: Prompts, clock: Clock):
        self.engine, self.prompts, self.clock = engine, prompts, clock
        self.input_ids = None

    def start(self, context: int) -> float:
        self.engine.forget()  # before the new cache exists, else the peak has both
        self.input_ids = self.prompts.ids(context)
        return self.advance(self.engine.prefill, self.input_ids, self.prompts.image_embeds)

    def step(self) -> float:
        return self.advance(self.engine.decode, self.input_ids)

    def advance(self, call: Callable, *args) -> float:
        ms, logits = self.clock(call, *args)
        self.input_ids = torch.cat((self.input_ids, logits[:, -1:].argmax(-1)), dim=1)
        return ms


class FilledRunner(Runner):
    """Our model, answering after a context that was never processed: its cache is filled with random numbers."""

    def start(self, context: int) -> float:
        """Fill the cache; the milliseconds say nothing about a prompt."""
        self.engine.forget()
        self.input_ids = self.prompts.answered(context)
        return self.clock(self.engine.fill, self.prompts.batch, context)[0]
