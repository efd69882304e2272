"""Answers that are generated side by side, and may begin and end at different times.

`generate` works on a fixed set of rows, so a batch pauses (its stopping criterion says stop for all) when others wait
to join or many rows are done. Then the prompts of those who join are run into a cache, each once, the caches of all
rows that go on are put together, and `generate` continues from them. A row does not depend on its neighbours: padding
is on the left, masked, and not counted by its positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from visualglm_hf.glm_positions import build_glm_position_ids
from visualglm_hf.growing_cache import make_cache
from visualglm_tools.serving.engine.prompt_cache import Key, PromptCache, States, describe_prompt
from visualglm_tools.serving.engine.sampling import Chooser, RowSampler


class Row:
    """One answer on its way: the tokens so far and when it ends.

    Args:
        token_ids: the prompt.
        chooser: chooses its tokens.
        eos_token_id: ends it.
        max_length: ends it, prompt included.
        on_token: called with the row after each token; a reason that it returns ends the row.
        on_finish: called with the row at its end, within the step of its last token.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        chooser: Chooser,
        eos_token_id: int,
        max_length: int,
        on_token: Callable[["Row"], str | None],
        on_finish: Callable[["Row"], None],
    ):
        self.token_ids = list(token_ids)
        self.prompt_length = len(self.token_ids)
        self.chooser, self.eos_token_id, self.max_length = chooser, eos_token_id, max_length
        self.on_token, self.on_finish = on_token, on_finish
        self.image_embeds: torch.Tensor | None = None  # [pictures, num_query_tokens, C] of the prompt
        self.finish_reason: str | None = None
        self.error: Exception | None = None

    @property
    def is_live(self) -> bool:
        return self.finish_reason is None

    @property
    def answer_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    def accept(self, token_id: int) -> None:
        """Take the next token."""
        self.token_ids.append(token_id)
        reason = self.on_token(self)
        if token_id == self.eos_token_id:
            reason = "stop"
        elif reason is None and len(self.token_ids) >= self.max_length:
            reason = "length"
        if reason is not None:
            self.finish(reason)

    def fail(self, error: Exception) -> None:
        self.error = error
        self.finish("error")

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        self.on_finish(self)


@dataclass
class Batch:
    """Rows and what the model has computed for them: all their tokens but the last, [rows, heads, T, D] per layer."""

    rows: list[Row]
    cache: DynamicCache

    @property
    def live(self) -> list[Row]:
        return [row for row in self.rows if row.is_live]


class RowsStop(StoppingCriteria):
    """Gives each row its token, ends the rows that are done, and all of them for a pause."""

    def __init__(self, rows: Sequence[Row], should_pause: Callable[[], bool]):
        self.rows, self.should_pause = rows, should_pause

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        for row, token_id in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.is_live:
                row.accept(token_id)
        is_paused = self.should_pause()
        return torch.tensor([is_paused or not row.is_live for row in self.rows], device=input_ids.device)


def start(model: PreTrainedModel, rows: Sequence[Row], known: PromptCache) -> list[Batch]:
    """Batches of new rows: equal prompts are read once, and those that are `known` not at all.

    Args:
        rows: whose pictures are encoded.
        known: is asked, and told what is read.
    """
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(describe_prompt(row.token_ids, row.image_embeds), []).append(row)
    batches, unread = [], {}
    for key, group in groups.items():
        states = known.find(key)
        if states is None:
            unread[key] = group
        else:
            batches.append(Batch(group, make_filled_cache(model, states, len(group))))
    if unread:
        read = prefill(model, [group[0] for group in unread.values()])
        known.num_read += len(unread)
        remember(known, unread, read)
        batches.append(repeat(read, list(unread.values())))
    return batches


def repeat(batch: Batch, groups: Sequence[list[Row]]) -> Batch:
    """A batch of the rows of all `groups`, each of which begins as one row of the given batch."""
    rows = [row for group in groups for row in group]
    if len(rows) > len(groups):
        places = [place for place, group in enumerate(groups) for _ in group]
        batch.cache.batch_select_indices(torch.tensor(places, device=batch.cache.layers[0].keys.device))
    return Batch(rows, batch.cache)


def remember(known: PromptCache, groups: Mapping[Key, Sequence[Row]], read: Batch) -> None:
    """Tell a prompt cache of prompts that were read, those of them for which it has room."""
    for place, (key, group) in enumerate(groups.items()):
        length = group[0].prompt_length - 1
        states = [(layer.keys[place : place + 1], layer.values[place : place + 1]) for layer in read.cache.layers]
        states = [tuple(each[:, :, -length:] for each in layer) for layer in states]
        if known.has_room(states):
            known.add(key, [tuple(each.clone() for each in layer) for layer in states])


def make_filled_cache(model: PreTrainedModel, states: States, rows: int) -> DynamicCache:
    """A cache that holds the same prompt for so many rows."""
    cache = make_cache(model.config.text_config, model.device)
    for index, (keys, values) in enumerate(states):
        cache.update(keys.repeat(rows, 1, 1, 1), values.repeat(rows, 1, 1, 1), index)
    return cache


@torch.no_grad()
def prefill(model: PreTrainedModel, rows: Sequence[Row]) -> Batch:
    """A batch of new rows. The last token of a prompt, `<sop>`, is the first that its context does not look at."""
    config = model.config.text_config
    cache = make_cache(config, model.device)
    input_ids, attention_mask = pad_left([row.token_ids for row in rows], config.pad_token_id, model.device)
    pictures = [row.image_embeds for row in rows if row.image_embeds is not None]
    model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        glm_position_ids=build_glm_position_ids(input_ids, attention_mask, config)[..., :-1],
        image_embeds=torch.cat(pictures) if pictures else None,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Batch(list(rows), cache)


def advance(model: PreTrainedModel, batch: Batch, should_pause: Callable[[], bool], **options) -> None:
    """Generate until every row is done or, after some token, `should_pause()`; `options` are more of `generate`'s."""
    pad_token_id = model.config.text_config.pad_token_id
    input_ids, attention_mask = pad_left([row.token_ids for row in batch.rows], pad_token_id, model.device)
    model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        cache=batch.cache,
        logits_processor=LogitsProcessorList([RowSampler(batch.rows, pad_token_id)]),
        stopping_criteria=StoppingCriteriaList([RowsStop(batch.rows, should_pause)]),
        max_new_tokens=max(row.max_length - len(row.token_ids) for row in batch.rows),
        do_sample=False,  # the rows choose
        **options,
    )


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` [rows, S] of the longest row's length."""
    length = max(map(len, rows))
    input_ids = [[pad_token_id] * (length - len(row)) + list(row) for row in rows]
    attention_mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids, device=device), torch.tensor(attention_mask, device=device)


def merge(model: PreTrainedModel, batches: Sequence[Batch]) -> Batch | None:
    """The rows of all `batches` that go on, without columns that are padding for all of them; None if none does."""
    batches = [batch for batch in batches if batch.live]
    if not batches:
        return None
    rows = [row for batch in batches for row in batch.live]
    length = max(len(row.token_ids) for row in rows) - 1
    if len(batches) == 1 and len(rows) == len(batches[0].rows) and batches[0].cache.get_seq_length() == length:
        return batches[0]
    cache = make_cache(model.config.text_config, model.device)
    for index, (keys, values) in enumerate(gather(batches, length)):
        cache.update(keys, values, index)
    return Batch(rows, cache)


def gather(batches: Sequence[Batch], length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [rows, heads, T, D] of each layer for the rows of all `batches` that go on, with T = `length`."""
    kept = [torch.tensor([row.is_live for row in batch.rows]).nonzero().flatten() for batch in batches]
    for layers in zip(*(batch.cache.layers for batch in batches), strict=True):
        pairs = list(zip(layers, kept, strict=True))
        yield (
            torch.cat([fit(layer.keys, int(layer.get_seq_length()), rows, length) for layer, rows in pairs]),
            torch.cat([fit(layer.values, int(layer.get_seq_length()), rows, length) for layer, rows in pairs]),
        )


def fit(states: torch.Tensor, filled: int, rows: torch.Tensor, length: int) -> torch.Tensor:
    """The `rows` of [rows, heads, T, D], of which `filled` tokens are, cut or padded on the left to `length` tokens."""
    states = states[rows.to(states.device)][:, :, max(filled - length, 0) : filled]
    return F.pad(states, (0, 0, length - states.shape[2], 0))
