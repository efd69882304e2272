# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: what is said after the prompt is moved away from what would be said after another one.

transformers' own asks the model for one token at a time and does not say what was before it; this model derives its
positions from the whole sequence. The logits that `generate` returns are the guided ones. Source: arXiv:2306.17806.

Shapes: R rows (batch, times beams or return sequences), L prompt length, N tokens of the answer, K positions, V tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import PreTrainedModel

from .cache_naming import CACHE_NAME
from .growing_cache import make_cache


class Guidance:
    """The other prompt, and what the model remembers of it, for one call of `generate`.

    Rows may be reordered and tokens taken back, as with beams and drafts: what the cache does not begin with is
    computed again.

    Args:
        scale: 1 for no guidance, more to move further away from the other prompt.
        input_ids: [B, L] of the other prompt; R is a multiple of B.
        attention_mask: [B, L], 0 for padding; None for no padding.
        prompt_length: of the prompt itself, in tokens of the sequences that `generate` grows.
        use_cache: False to compute the whole other sequence for every token.
    """

    def __init__(
        self,
        scale: float,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prompt_length: int,
        use_cache: bool = True,
    ):
        self.scale = scale
        self.prompt_ids = input_ids
        self.prompt_mask = None if attention_mask is None or attention_mask.all() else attention_mask
        self.prompt_length = prompt_length
        self.use_cache = use_cache
        self.known_ids: torch.Tensor | None = None  # [R, L + N], what the cache holds
        self.cache = None

    def guide(self, model: PreTrainedModel, sequences: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Guided log-probabilities [R, K, V] for the logits of the last K positions of `sequences` [R, …]."""
        answer_ids = sequences[:, self.prompt_length :]
        other = self.compute_logits(model, answer_ids, logits.shape[1]).float().log_softmax(-1)
        return self.scale * (logits.float().log_softmax(-1) - other) + other

    def compute_logits(self, model: PreTrainedModel, answer_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Logits [R, count, V] of the last positions of the other prompt with the same answer."""
        repeats = len(answer_ids) // len(self.prompt_ids)
        ids = torch.cat((self.prompt_ids.repeat_interleave(repeats, dim=0), answer_ids), dim=1)
        mask = None
        if self.prompt_mask is not None:
            mask = F.pad(self.prompt_mask.repeat_interleave(repeats, dim=0), (0, answer_ids.shape[1]), value=1)
        cache, known = None, 0
        if self.use_cache:
            known = min(self.count_known(ids), ids.shape[1] - count)
            if known == 0:
                self.cache = make_cache(model.config.text_config, ids.device)
            elif known < self.known_ids.shape[1]:
                self.cache.crop(known - self.known_ids.shape[1])
            cache, self.known_ids = self.cache, ids
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=ids.shape[1] - known,
            attention_mask=mask,
            use_cache=self.use_cache,
            **{CACHE_NAME: cache},
        )
        return model(**inputs, logits_to_keep=count, return_dict=True).logits

    def count_known(self, ids: torch.Tensor) -> int:
        """How many columns of `ids` [R, L + N] are in the cache."""
        if self.known_ids is None or len(self.known_ids) != len(ids):
            return 0
        length = min(self.known_ids.shape[1], ids.shape[1])
        is_equal = (self.known_ids[:, :length] == ids[:, :length]).all(0)
        return int(is_equal.cumprod(0).sum())


def guidance_options(model: PreTrainedModel, options: dict[str, Any], batch_size: int, prompt_length: int) -> dict:
    """What to change in the `options` of `generate` so that a `Guidance` guides each step, not transformers' own.

    Args:
        model: a VisualGLM.
        options: all that hold for the call; without `negative_prompt_ids` [B, L] the other prompt is an empty one.
        batch_size: of the prompt, B.
        prompt_length: see `Guidance`.

    Raises:
        ValueError: the other prompt is none, is too long, has pictures, or not as many rows as the prompt.
    """
    marks = [model.config.text_config.gmask_token_id, model.config.text_config.bos_token_id]
    input_ids, mask = options.get("negative_prompt_ids"), options.get("negative_prompt_attention_mask")
    input_ids = torch.as_tensor([marks] * batch_size if input_ids is None else input_ids, device=model.input_device)
    mask = None if mask is None else torch.as_tensor(mask, device=model.input_device)
    if input_ids.dim() != 2 or len(input_ids) != batch_size or (mask is not None and mask.shape != input_ids.shape):
        raise ValueError(
            f"negative_prompt_ids and their attention mask must be [{batch_size}, length], as many rows as the prompt "
            f"has, found {[tuple(tensor.shape) for tensor in (input_ids, mask) if tensor is not None]}."
        )
    if (input_ids == model.config.image_token_id).any():
        raise ValueError("negative_prompt_ids cannot have pictures. Leave their image tokens out.")
    num_tokens = model.config.text_config.num_tokens
    model.check_generation(input_ids, None, None, None, num_tokens, {"attention_mask": mask})
    use_cache = options.get("use_cache") is not False
    guidance = Guidance(options["guidance_scale"], input_ids, mask, prompt_length, use_cache)
    replaced = ("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask")
    return {**dict.fromkeys(replaced), "guidance": guidance, "disable_compile": True}
