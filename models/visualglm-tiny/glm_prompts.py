# SPDX-License-Identifier: Apache-2.0
"""What a call of the model says about its prompt: where things are in it, what must be refused, which labels count.

Not here: how positions and masks follow from that (`glm_positions.py`), and what the model computes with them.

Shapes: B batch, S length, C hidden size.
"""

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from .glm_positions import (
    UNKNOWN,
    build_glm_position_ids,
    can_ask,
    find_answers,
    find_context,
    find_mark_faults,
    find_restarts,
    find_second_prompts,
    find_second_starts,
    recognize_tokens,
    refuse,
    shift_left,
)


logger = logging.get_logger(__name__)

IGNORED = -100  # as a label: no loss here


def two_rows(position_ids: torch.Tensor | None, glm_position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """GLM's positions [B, 2, S] by either name; None if neither has them."""
    is_glm = glm_position_ids is None and position_ids is not None and position_ids.dim() == 3
    return position_ids if is_glm else glm_position_ids


def ignore_others(labels: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
    """`labels` [B, S] where an answer is [B, S], else `IGNORED`; a `ValueError` if they are not of the same tokens."""
    if labels.shape != is_answer.shape:
        raise ValueError(f"Labels are {tuple(labels.shape)}, the tokens {tuple(is_answer.shape)}. Give one for each.")
    return labels.masked_fill(~is_answer.to(labels.device), IGNORED)


class PromptMixin:
    """What `forward` and `generate` ask of their inputs. It waits for the device, so once per prompt, not per token."""

    has_told_of_labels = False  # that some do not count

    def know_ids(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """`input_ids` [B, S], or of `inputs_embeds` alone the ids that say where the answer and the pictures begin."""
        if input_ids is not None:
            return input_ids
        text = self.config.text_config
        token_ids = (text.gmask_token_id, text.mask_token_id, text.bos_token_id, self.config.image_token_id)
        return recognize_tokens(inputs_embeds, self.get_input_embeddings(), token_ids)

    def check_shapes(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        num_cached: int = 0,
    ) -> None:
        """Raise a `ValueError` unless a prompt is [B, S] or [B, S, C], with a mask of its tokens and the cached ones.

        The mask may be longer: of virtual tokens.
        """
        if input_ids is not None and (input_ids.dim() != 2 or input_ids.shape[1] == 0):
            raise ValueError(f"input_ids must be [batch, length], found {list(input_ids.shape)}.")
        if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[1] == 0):
            raise ValueError(f"inputs_embeds must be [batch, length, width], found {list(inputs_embeds.shape)}.")
        rows, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if input_ids is not None and input_ids.shape != (rows, length):
            raise ValueError(
                f"input_ids {list(input_ids.shape)} and inputs_embeds {list(inputs_embeds.shape)} are not the same "
                "tokens. Give one of them, or both of the same prompt."
            )
        if attention_mask is None or attention_mask.dim() != 2:
            return
        if len(attention_mask) != rows or attention_mask.shape[1] < num_cached + length:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)} for [{rows}, {num_cached + length}] tokens, those in "
                "the cache included. Give one value for each, 0 for padding, or leave it out where there is none."
            )

    def check_length(self, length: int) -> None:
        """Raise a `ValueError` for more tokens than the model was made for."""
        limit = self.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"The context is {length} tokens long, the model takes {limit}. Shorten the history or the question."
            )

    def find_places(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where pictures go: the image tokens of the context, [B, S] boolean. In an answer, that token is a word."""
        ids = self.know_ids(input_ids, inputs_embeds)
        return (ids == self.config.image_token_id) & find_context(ids, self.config.text_config)

    def find_empty_places(self, is_image: torch.Tensor, num_filled: int = 0) -> dict[str, torch.Tensor]:
        """Rows [B] with places `is_image` [B, S] from column `num_filled` on, as `find_mark_faults`."""
        message = (
            f"The prompt has image tokens (id {self.config.image_token_id}), but there is no picture. Give "
            "pixel_values or image_embeds, or a prompt without a place for pictures."
        )
        return {message: is_image[:, num_filled:].any(-1)}

    def check_places(self, is_image: torch.Tensor, num_images: int) -> None:
        """Raise a `ValueError` unless the places `is_image` [B, S] are as many as the images fill."""
        places = is_image.sum().item()
        needed = num_images * self.config.qformer_config.num_query_tokens
        if places != needed:
            raise ValueError(
                f"The prompt has {places} image tokens (id {self.config.image_token_id}) for {num_images} "
                f"image(s), which fill {needed}. Use the processor, which puts them where each image belongs."
            )

    def find_unknown_tokens(self, ids: torch.Tensor, num_tokens: int) -> dict[str, torch.Tensor]:
        """Rows [B] of `ids` [B, S] with embeddings beyond the tokens, which are never generated."""
        message = (
            f"input_ids have tokens from {num_tokens} on, and this checkpoint has {num_tokens} of them. After adding "
            "some to the tokenizer, call model.resize_token_embeddings(len(tokenizer))."
        )
        below = "input_ids have values below 0, such as labels have where nothing is learned. Pad with pad_token_id."
        return {message: (ids >= num_tokens).any(-1), below: (ids < UNKNOWN).any(-1)}

    def check_prompt(
        self,
        ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        num_images: int | None,
        num_filled: int,
        faults: dict[str, torch.Tensor],
    ) -> None:
        """Raise a `ValueError` for pictures without places, places without pictures, and a second prompt in a row.

        Args:
            ids: [B, S], as `know_ids` gives them.
            inputs_embeds: [B, S, C], if they were given; then it is they that have the places.
            num_images: that were given; None if none were.
            num_filled: columns that are in a cache, or that have their pictures in place.
            faults: what else may be wrong, and in which rows [B].
        """
        if not can_ask(ids):
            return
        faults = faults | find_second_prompts(ids, self.config.text_config)
        if num_images is not None:
            self.check_places(self.find_places(ids, None), num_images)
        else:
            is_image = self.find_places(ids if inputs_embeds is None else None, inputs_embeds)
            faults |= self.find_empty_places(is_image, num_filled)
        refuse(faults)

    def read_prompt(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        glm_position_ids: torch.Tensor | None,
        num_images: int | None,
        prompt_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """GLM's positions [B, 2, S] of a prompt, derived if they are not given, after `check_prompt`.

        Args:
            num_images: that were given, beside `forward`'s arguments; None if none were.
        """
        ids, config = self.know_ids(input_ids, inputs_embeds), self.config.text_config
        faults = self.find_unknown_tokens(ids, config.num_tokens)
        if position_ids is not None and position_ids.dim() == 2:
            faults |= find_restarts(position_ids, attention_mask)
        if glm_position_ids is None:
            faults |= find_mark_faults(ids, config, is_embedded=input_ids is None)
            glm_position_ids = build_glm_position_ids(ids, attention_mask, config)
        num_virtual = ids.shape[1] - glm_position_ids.shape[-1]
        if num_virtual > 0 and input_ids is not None:
            raise ValueError(
                f"There are {ids.shape[1]} input_ids, but positions for {glm_position_ids.shape[-1]} of them."
            )
        num_filled = 0 if prompt_embeds is None else num_virtual + prompt_embeds.shape[1]
        self.check_prompt(ids, inputs_embeds, num_images, num_filled, faults)
        return glm_position_ids

    def check_generation(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        num_images: int | None,
        cache: Cache | None,
        num_tokens: int,
        options: dict,
    ) -> torch.Tensor:
        """Raise a `ValueError` for a prompt that cannot be answered.

        Args:
            num_images: that were given; None if none were.
            num_tokens: that may be generated.
            options: of `generate`, as the other arguments are.

        Returns:
            [B, S], as `know_ids` gives them.
        """
        ids = self.know_ids(input_ids, inputs_embeds)
        self.check_length(ids.shape[1])
        faults = self.find_unknown_tokens(ids, num_tokens)
        faults |= find_mark_faults(ids, self.config.text_config, is_embedded=input_ids is None)
        attention_mask, prompt_embeds = options.get("attention_mask"), options.get("prompt_embeds")
        # Where no mask is given, `generate` makes one of the padding.
        visible = ids != self.config.text_config.pad_token_id if attention_mask is None else attention_mask
        if visible.dim() == 2:
            faults["A prompt ends with padding: pad prompts on the left."] = visible[:, -1] == 0
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        num_placed = 0 if prompt_embeds is None else prompt_embeds.shape[1]
        self.check_prompt(ids, inputs_embeds, num_images, max(num_cached, num_placed), faults)
        return ids

    def keep_answer_labels(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        glm_position_ids: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        is_ours: bool = True,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """What a loss is computed of, without what is no answer: the context, which sees itself, and padding.

        Args:
            labels: [B, S]
            shift_labels: [B, S], the same, each one place earlier.
            num_items_in_batch: [], labels in this call and others, by which the sum of losses is divided. It is
                multiplied by this call's share of labels that count.
            is_ours: whether we compute the loss. Others also ask about answers that were sampled, in which `<sop>` may
                occur, and of which none may be left.
            kwargs: is ignored; the rest are `forward`'s.

        Raises:
            ValueError: it is not certain where each answer begins, labels of another shape, or none that counts.
        """
        ids = self.know_ids(input_ids, inputs_embeds)
        faults = find_second_starts(ids, self.config.text_config) if is_ours else {}
        glm_position_ids = two_rows(position_ids, glm_position_ids)
        if glm_position_ids is None:
            faults |= find_mark_faults(ids, self.config.text_config, is_embedded=input_ids is None)
            glm_position_ids = build_glm_position_ids(ids, attention_mask, self.config.text_config)
        refuse(faults)
        is_answer = find_answers(glm_position_ids, attention_mask)
        kept = {}
        if labels is not None:
            kept["labels"] = ignore_others(labels, is_answer)
            given, counted = labels[:, 1:], kept["labels"][:, 1:]
        if shift_labels is not None:
            kept["shift_labels"] = ignore_others(shift_labels, shift_left(is_answer))
            given, counted = shift_labels, kept["shift_labels"]
        text = self.config.text_config
        is_word = (counted != IGNORED) & (counted != text.bos_token_id) & (counted != text.eos_token_id)
        is_empty = (given == text.eos_token_id).any() & ~is_word.any()  # some answer has ended, none has a word
        given, counted = (given != IGNORED).sum(), (counted != IGNORED).sum()
        self.report_labels(given, counted, is_empty, num_items_in_batch is not None or not is_ours)
        if num_items_in_batch is not None:
            kept["num_items_in_batch"] = num_items_in_batch * (counted.clamp(min=1) / given.clamp(min=1))
        return kept

    def report_labels(
        self, given: torch.Tensor, counted: torch.Tensor, is_empty: torch.Tensor, may_be_none: bool
    ) -> None:
        """Say once how many labels do not count.

        Args:
            given: [], how many there are.
            counted: [], how many of them count.
            is_empty: [], whether an answer has none although its context has some.
            may_be_none: whether there may be none, as in a part of a batch.

        Raises:
            ValueError: none counts; in training, also if `is_empty`: the model would learn to say nothing.
        """
        if not can_ask(given, counted, is_empty):
            return
        given, counted, is_empty = torch.stack((given, counted, is_empty)).tolist()
        if not counted and (given or not may_be_none):
            raise ValueError(
                f"No label counts: of {given} that are not {IGNORED}, all are before <sop> or padding. GLM learns "
                "answers, which follow [gMASK]<sop>; did a maximum length cut them off?"
            )
        if self.training and counted < given and is_empty:
            raise ValueError(
                f"Of {given} labels only those of marks count, no word: the answers are empty, or stand before "
                "the [gMASK]<sop> that the tokenizer appends to a text without a mark for it. Give messages, or write "
                "the character U+FFF9 where the answer begins, as the chat template does."
            )
        if counted < given and not self.has_told_of_labels:
            self.has_told_of_labels = True
            logger.warning(
                f"{given - counted} of the {given} labels of this batch are before <sop> or padding and do not count, "
                "nor will such labels of later ones: a context sees itself, and GLM learns answers."
            )
