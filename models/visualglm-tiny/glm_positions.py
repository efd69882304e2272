# SPDX-License-Identifier: Apache-2.0
"""Where GLM's answer begins, and what follows from it: positions, who sees whom, which labels count, what is refused.

A row is a context that sees all of itself, then `<sop>` and the answer. Where that is must be known: from ids, or from
embeddings among which those of `[gMASK]` and `<sop>` are found. Not here: what the model does with it.

Shapes: B batch, S query length, T key length, C hidden size. `config` is the decoder's.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PretrainedConfig


UNKNOWN = -1  # as an id: a token of which only the embedding is known
ONE_ROW_EACH = (
    " The context of a prefix-LM is seen as a whole: give each answer a row of its own (in TRL, packing=False and "
    'padding_free=False; in PEFT, no prompt_tuning_init="TEXT", which makes marks of virtual tokens).'
)


def recognize_tokens(inputs_embeds: torch.Tensor, embedding: nn.Module, token_ids: Iterable[int]) -> torch.Tensor:
    """The ids [B, S] of some tokens where `inputs_embeds` [B, S, C] are exactly their embeddings, else `UNKNOWN`."""
    found = torch.full(inputs_embeds.shape[:2], UNKNOWN, device=inputs_embeds.device)
    with torch.no_grad():
        for token_id in token_ids:
            # Asked by id, not for its weight, which is elsewhere while it is offloaded.
            vector = embedding(torch.tensor(token_id, device=inputs_embeds.device)).to(inputs_embeds)
            found.masked_fill_((inputs_embeds == vector).all(-1), token_id)
    return found


def find_context(input_ids: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Where the context is, [B, S] boolean: before the first `<sop>`, everywhere if there is none."""
    return (input_ids == config.bos_token_id).cumsum(-1) == 0


def find_slots(input_ids: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Where `[gMASK]` or `[MASK]` is, whose place the answer takes; [B, S] boolean."""
    return (input_ids == config.gmask_token_id) | (input_ids == config.mask_token_id)


def find_visible(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Where the last `length` tokens are no padding, [B, length] boolean; None if no two-dimensional mask says it."""
    has_padding = attention_mask is not None and attention_mask.dim() == 2
    return attention_mask[:, -length:] != 0 if has_padding else None


def build_glm_position_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: PretrainedConfig
) -> torch.Tensor:
    """The two position rows of GLM: the place in the context, and the place in the answer.

    The context counts 0, 1, 2, … in the first row and is 0 in the second. From `<sop>` on, the first row stays at the
    position of [gMASK] (of [MASK] where there is none) and the second counts 1, 2, 3, …

    Args:
        input_ids: [B, S], the whole sequence.
        attention_mask: [B, >= S], 0 for padding, of which the last S columns count; None for no padding.

    Returns:
        [B, 2, S] integers; padding counts for nothing, and both rows are 0 on the left of all.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    start = (input_ids == config.bos_token_id).int().argmax(-1, keepdim=True)
    is_gmask = (input_ids == config.gmask_token_id) & (index < start)
    is_slot = torch.where(is_gmask.any(-1, keepdim=True), is_gmask, input_ids == config.mask_token_id)
    slot = is_slot.int().argmax(-1, keepdim=True)
    is_visible = find_visible(attention_mask, input_ids.shape[1])
    place = index if is_visible is None else is_visible.cumsum(-1) - 1
    position = torch.where(index < start, place, place.gather(-1, slot))
    return torch.stack((position, index - start + 1), dim=1).clamp(min=0)


def prepend_virtual_tokens(glm_position_ids: torch.Tensor, count: int) -> torch.Tensor:
    """Positions [B, 2, count + S] with learned tokens before a context whose positions [B, 2, S] are known.

    They count …, -2, -1: rotary angles say how far apart two tokens are, so it is as if all had moved on by `count`,
    and later steps need not know of it.
    """
    first = glm_position_ids[..., :1].expand(-1, -1, count).clone()
    first[:, 0] = torch.arange(-count, 0, device=first.device)
    return torch.cat((first, glm_position_ids), dim=-1)


def build_attention_mask(
    glm_position_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int, key_length: int
) -> torch.Tensor | None:
    """The prefix-LM mask: the context sees all of itself, the answer sees the context and what was said before.

    Args:
        glm_position_ids: [B, 2, S] of the queries.
        attention_mask: [B, <= T], 0 for padding; None for no padding.
        past_length: keys that the cache held before these queries.
        key_length: T, with a static cache its whole length.

    Returns:
        [B, 1, S, T] boolean, True where a query may look; None when it may look everywhere. Padding looks at the
        context too, so its states are finite; nobody reads them.
    """
    batch_size, _, query_length = glm_position_ids.shape
    if query_length == 1 and attention_mask is None and key_length == past_length + 1:
        return None
    block_position = glm_position_ids[:, 1]
    key_index = torch.arange(key_length, device=block_position.device)
    query_index = torch.arange(query_length, device=block_position.device) + past_length
    # Equal to the first query's rather than equal to 0: prefix tuning shifts all positions.
    in_context = F.pad(block_position == block_position[:, :1], (past_length, key_length - past_length - query_length))
    mask = (key_index <= query_index[:, None]) | in_context[:, None]  # [B, S, T]
    if attention_mask is not None:
        visible = F.pad(attention_mask != 0, (0, key_length - attention_mask.shape[1]))[:, None]
        mask = mask & visible
    return mask[:, None]


def find_answers(glm_position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are an answer's, [B, S] boolean: those from `<sop>` on, without padding.

    The first token of a row counts as context, whatever it is. As a label it has nothing that predicts it.

    Args:
        glm_position_ids: [B, 2, S]
        attention_mask: [B, >= S], 0 for padding, of which the last S columns count; None or 4-dimensional: not asked.
    """
    block_position = glm_position_ids[:, 1]
    is_answer = block_position != block_position[:, :1]
    is_visible = find_visible(attention_mask, is_answer.shape[1])
    return is_answer if is_visible is None else is_answer & is_visible


def shift_left(is_answer: torch.Tensor) -> torch.Tensor:
    """Of each position, whether the next token is an answer's, [B, S]; after the last one comes an answer."""
    return F.pad(is_answer[:, 1:], (0, 1), value=True)


def find_mark_faults(input_ids: torch.Tensor, config: PretrainedConfig, is_embedded: bool) -> dict[str, torch.Tensor]:
    """What may be wrong with the beginning of the answers: messages, and which rows [B] they are true of.

    Args:
        input_ids: [B, S]
        is_embedded: whether they are what was recognized among embeddings.
    """
    remedy = "The tokenizer adds them unless add_special_tokens=False; when you continue from a cache yourself, pass "
    remedy += "position_ids."
    if is_embedded:
        remedy = "Their embeddings are not among inputs_embeds, not exactly: pass input_ids too, or glm_position_ids."
    is_context = find_context(input_ids, config)
    has_marks = (find_slots(input_ids, config) & is_context).any(-1) & ~is_context.all(-1)
    message = (
        f"Every sequence needs [gMASK] ({config.gmask_token_id}) or [MASK] ({config.mask_token_id}) and then <sop> "
        f"({config.bos_token_id}). {remedy}"
    )
    return {message: ~has_marks}


def find_second_prompts(input_ids: torch.Tensor, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Rows [B] with `[gMASK]<sop>` after their first `<sop>`, as `find_mark_faults`. `<sop>` alone may be a word."""
    is_later_start = (input_ids[:, 1:] == config.bos_token_id) & ~find_context(input_ids, config)[:, :-1]
    is_prompt = is_later_start & find_slots(input_ids, config)[:, :-1]
    return {"A row has a second [gMASK]<sop>." + ONE_ROW_EACH: is_prompt.any(-1)}


def find_second_starts(input_ids: torch.Tensor, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Rows [B] with several `<sop>`, as `find_mark_faults`: with labels, it must be certain where the answer begins."""
    is_start = input_ids == config.bos_token_id
    message = f"A row with labels has more than one <sop> ({config.bos_token_id})."
    return {message + ONE_ROW_EACH: is_start.sum(-1) > 1}


def find_restarts(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Rows [B] whose one-dimensional positions [B, S] begin anew, as packed rows' do; as `find_mark_faults`."""
    is_restart = position_ids[:, 1:] < position_ids[:, :-1]
    is_visible = find_visible(attention_mask, position_ids.shape[1])
    if is_visible is not None:
        is_restart = is_restart & is_visible[:, 1:] & is_visible[:, :-1]
    return {"position_ids begin anew within a row." + ONE_ROW_EACH: is_restart.any(-1)}


def refuse(faults: dict[str, torch.Tensor]) -> None:
    """Raise a `ValueError` with the first message that is true of a row [B]. Asks the device once."""
    if not faults or not can_ask(*faults.values()):
        return
    device = next(iter(faults.values())).device
    if torch.stack([rows.any().to(device) for rows in faults.values()]).any():
        raise ValueError(next(message for message, rows in faults.items() if rows.any()))


def can_ask(*tensors: torch.Tensor) -> bool:
    """Whether values may be read here: there are some, and no graph is being made of what is computed."""
    return not torch.compiler.is_compiling() and not any(tensor.is_meta for tensor in tensors)
