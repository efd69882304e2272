"""A yardstick, not a model: how the original of 2023 computed its decoder, to be timed beside ours.

Two of them, for `benchmark.py`:

- `OriginalFormulation` computes OUR weights in the original's way: attention by explicit `baddbmm` with scores divided
  and multiplied by the layer's number and a softmax in float32, positions and masks found by Python lists row by row, a
  cache [T, B, H, D] that is concatenated anew for every token, cosines and sines looked up in whole tables, the logits
  of all positions of a prompt. Whatever is not in this list takes the fast way, so a ratio to it is no flattery.
- As a program it drives the original's own `GLMBlock`s, with random weights, in an interpreter that can import them:

    python original_formulation.py '{"folder": "…", "geometry": {…}, "layers": 4, …}'

  It then reads one JSON request per line ({"start": context} or {"step": true}) and answers {"ms": …}. The folder is
  the original's, with `modeling_chatglm.py` and `configuration_chatglm.py`; `visual.py`, which needs
  SwissArmyTransformer, is not imported. This file therefore imports nothing but torch and must run on Python 3.8.

Not here: what is compared with what, and statistics (`benchmark.py`).

Shapes: B batch, S query length, T key length, H heads, D head dimension, C hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
import types
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.nn.functional as F


if TYPE_CHECKING:
    from visualglm_hf import VisualGLMForConditionalGeneration, VisualGLMTextConfig


MASKED_SCORE = -10000.0


# ---------------------------------------------------------------- our weights in the original's way


def find_marks(input_ids: torch.Tensor, config: VisualGLMTextConfig) -> tuple[list[int], list[int]]:
    """Return where <sop> and [gMASK] (else [MASK]) stand, one list each with a number per row, found on the host."""
    starts, slots = [], []
    for row in input_ids.tolist():
        slot = config.gmask_token_id if config.gmask_token_id in row else config.mask_token_id
        starts.append(row.index(config.bos_token_id))
        slots.append(row.index(slot))
    return starts, slots


def list_positions(input_ids: torch.Tensor, config: VisualGLMTextConfig) -> torch.Tensor:
    """Return both position rows of a prompt, [B, 2, S]."""
    length, device = input_ids.shape[1], input_ids.device
    starts, slots = find_marks(input_ids, config)
    position = torch.arange(length, device=device).repeat(len(starts), 1)
    block_position = torch.zeros_like(position)
    for row, (start, slot) in enumerate(zip(starts, slots, strict=True)):
        position[row, start:] = slot
        block_position[row, start:] = torch.arange(1, length - start + 1, device=device)
    return torch.stack((position, block_position), dim=1)


def list_next_position(input_ids: torch.Tensor, config: VisualGLMTextConfig) -> torch.Tensor:
    """Return both positions of the last token of an answer, [B, 2, 1], from the whole sequence."""
    starts, slots = find_marks(input_ids, config)
    pairs = [[slot, input_ids.shape[1] - start] for start, slot in zip(starts, slots, strict=True)]
    return torch.tensor(pairs, device=input_ids.device)[..., None]


def paint_mask(input_ids: torch.Tensor, config: VisualGLMTextConfig) -> torch.Tensor:
    """Return the prefix-LM mask, boolean [B, 1, S, S], True where a query may NOT look."""
    batch, length = input_ids.shape
    starts = [row.tolist().index(config.bos_token_id) for row in input_ids]
    visible = torch.ones((batch, length, length), device=input_ids.device).tril_()
    for row, start in enumerate(starts):
        visible[row, :, :start] = 1
    return (visible[:, None] < 0.5).bool()


def tabulate_rotary(
    length: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of positions 0 ... length - 1, each [length, rotary_dim].

    Angles are computed in float16 for a float16 model, as the original does, and in float32 for any other.
    """
    angle_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    exponents = torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim
    frequencies = (1.0 / base**exponents).half().to(angle_dtype)
    angles = torch.arange(length, device=device, dtype=angle_dtype)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_pairs(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [S, B, H, D / 2] by cosines and sines of [S, B, 1, D / 2]."""
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos + turned * sin


class OriginalFormulation:
    """The decoder of `model`, a `VisualGLMForConditionalGeneration`, computed as the original does it.

    `prefill` and `decode` return logits and keep the cache; rows must have no padding.
    """

    def __init__(self, model: VisualGLMForConditionalGeneration):
        self.model = model
        self.config = model.config.text_config
        self.forget()

    def forget(self) -> None:
        """Drop the cache and the tables."""
        layers = self.config.num_hidden_layers
        self.cache: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self.tables: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers

    def prefill(self, input_ids: torch.Tensor, image_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Process a prompt [B, S] with its pictures' soft prompts; return the logits of all positions, [B, S, V]."""
        self.forget()
        positions, mask = list_positions(input_ids, self.config), paint_mask(input_ids, self.config)
        return self.run(self.model.embed(input_ids, image_embeds), positions, mask)

    def decode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Process the last token of the whole sequence [B, S]; return its logits [B, 1, V]."""
        positions = list_next_position(input_ids, self.config)
        mask = torch.zeros(1, 1, device=input_ids.device).bool()
        return self.run(self.model.embed(input_ids[:, -1:]), positions, mask)

    def run(self, inputs_embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden_states = inputs_embeds.transpose(0, 1)  # the original's layout, [S, B, C]
        for index in range(self.config.num_hidden_layers):
            hidden_states = self.block(index, hidden_states, positions, mask)
        hidden_states = self.model.transformer.final_layernorm(hidden_states)
        return self.model.lm_head(hidden_states).permute(1, 0, 2).contiguous()

    def block(
        self, index: int, hidden_states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        layer, alpha = self.model.transformer.layers[index], self.config.residual_alpha
        hidden_states = layer.input_layernorm(hidden_states)
        hidden_states = hidden_states * alpha + self.attention(index, hidden_states, positions, mask)
        hidden_states = layer.post_attention_layernorm(hidden_states)
        return hidden_states * alpha + layer.mlp(hidden_states)

    def attention(
        self, index: int, hidden_states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        attention = self.model.transformer.layers[index].attention
        fused = attention.query_key_value(hidden_states)
        fused = fused.view(*fused.shape[:2], self.config.num_attention_heads, -1)  # [S, B, H, 3 D]
        query, key, value = fused.chunk(3, dim=-1)
        query, key = self.rotate(index, query, key, positions)
        if self.cache[index] is not None:
            key, value = (torch.cat(pair, dim=0) for pair in zip(self.cache[index], (key, value), strict=True))
        self.cache[index] = (key, value)  # each [T, B, H, D]
        return attention.dense(attend(query, key, value, mask, index + 1))

    def rotate(
        self, index: int, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate half of each head by the position and half by the block position, from this layer's own tables."""
        length = positions.max() + 1
        if self.tables[index] is None or length > len(self.tables[index][0]):
            self.tables[index] = tabulate_rotary(
                int(length), query.shape[-1] // 2, self.config.rope_theta, query.dtype, query.device
            )
        halves = [states.chunk(2, dim=-1) for states in (query, key)]
        rows = positions.permute(1, 2, 0).contiguous()  # [2, S, B]
        for_rows = [[F.embedding(row, table[:length])[:, :, None] for table in self.tables[index]] for row in rows]
        query, key = (
            torch.cat([rotate_pairs(half, cos, sin) for half, (cos, sin) in zip(pair, for_rows, strict=True)], dim=-1)
            for pair in halves
        )
        return query, key


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, coefficient: int
) -> torch.Tensor:
    """Attention of [S or T, B, H, D] by explicit products; `coefficient` is the layer's number, counted from 1.

    Returns:
        [S, B, H * D]
    """
    query_length, batch, heads, head_dim = query.shape
    query = (query / (math.sqrt(head_dim) * coefficient)).view(query_length, batch * heads, head_dim)
    key, value = (states.view(len(states), batch * heads, head_dim) for states in (key, value))
    nothing = torch.zeros(1, 1, 1, dtype=query.dtype, device=query.device)
    scores = torch.baddbmm(nothing, query.transpose(0, 1), key.permute(1, 2, 0), beta=0.0, alpha=1.0)
    scores = scores.view(batch, heads, query_length, -1)
    if not (mask == 0).all():  # asks the device, in every layer
        scores.masked_fill_(mask, MASKED_SCORE)
    weights = F.softmax(scores.float() * coefficient, dim=-1).to(query.dtype)
    weights = weights.view(batch * heads, query_length, -1)
    context = torch.bmm(weights, value.transpose(0, 1)).view(batch, heads, query_length, head_dim)
    return context.permute(2, 0, 1, 3).reshape(query_length, batch, heads * head_dim)


# ---------------------------------------------------------------- the original's own blocks


def import_original(folder: str) -> types.ModuleType:
    """Import `modeling_chatglm` of the original's folder, without the image encoder it would import."""
    package, visual = types.ModuleType("original"), types.ModuleType("original.visual")
    package.__path__ = [folder]
    visual.BLIP2 = None
    sys.modules.update({"original": package, "original.visual": visual})
    return importlib.import_module("original.modeling_chatglm")


def build_blocks(
    modeling: types.ModuleType, geometry: dict[str, Any], layers: int, dtype: torch.dtype, device: torch.device
) -> torch.nn.ModuleList:
    """Return `layers` blocks of the original's code with random weights."""
    blocks = torch.nn.ModuleList()
    for layer_id in range(layers):
        block = modeling.GLMBlock(
            geometry["hidden_size"],
            geometry["num_attention_heads"],
            geometry["layer_norm_eps"],
            layer_id,
            inner_hidden_size=geometry["intermediate_size"],
            params_dtype=dtype,
            position_encoding_2d=True,
        )
        blocks.append(block.to(device=device, dtype=dtype))
    for name, parameter in blocks.named_parameters():
        # The original leaves new weights uninitialised.
        is_scale = "layernorm" in name and name.endswith("weight")
        torch.nn.init.ones_(parameter) if is_scale else torch.nn.init.normal_(parameter, std=0.02)
    return blocks.eval()


class OriginalBlocks:
    """A stack of the original's blocks between random embeddings and nothing: `start` a prompt, `step` by tokens."""

    def __init__(
        self, blocks: torch.nn.ModuleList, hidden_size: int, batch: int, dtype: torch.dtype, device: torch.device
    ):
        self.blocks, self.hidden_size, self.batch = blocks, hidden_size, batch
        self.dtype, self.device = dtype, device

    def start(self, context: int) -> float:
        """Process a prompt of `context` tokens; return the milliseconds."""
        self.cache: list[Any] = [None] * len(self.blocks)
        self.context = self.length = context
        row = torch.arange(context, device=self.device)
        positions = torch.stack((row.clamp(max=context - 2), (row == context - 1).long()))
        visible = torch.ones(context, context, device=self.device).tril_()
        visible[:, :-1] = 1
        return self.clock(context, positions, (visible < 0.5)[None, None].expand(self.batch, -1, -1, -1))

    def step(self) -> float:
        """Process one more token; return the milliseconds."""
        self.length += 1
        positions = torch.tensor([[self.context - 2], [self.length - self.context + 1]], device=self.device)
        return self.clock(1, positions, torch.zeros(1, 1, device=self.device).bool())

    def clock(self, length: int, positions: torch.Tensor, mask: torch.Tensor) -> float:
        hidden_states = torch.randn(length, self.batch, self.hidden_size, device=self.device).to(self.dtype)
        positions = positions.expand(self.batch, -1, -1)
        self.synchronize()
        begin = time.perf_counter()
        for index, block in enumerate(self.blocks):
            hidden_states, self.cache[index] = block(
                hidden_states,
                position_ids=positions,
                attention_mask=mask,
                layer_id=torch.tensor(index),
                layer_past=self.cache[index],
                use_cache=True,
            )[:2]
        self.synchronize()
        return (time.perf_counter() - begin) * 1000

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(blocks: OriginalBlocks, requests: TextIO, answers: TextIO) -> None:
    """Answer each request line with one line; `requests` and `answers` are text files."""
    for line in requests:
        request = json.loads(line)
        ms = blocks.start(request["start"]) if "start" in request else blocks.step()
        print(json.dumps({"ms": ms}), file=answers, flush=True)


def main(argv: list[str] | None = None) -> None:
    task = json.loads((sys.argv[1:] if argv is None else argv)[0])
    # What the original prints on import must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    dtype, device = getattr(torch, task["dtype"]), torch.device(task["device"])
    with torch.no_grad():
        modeling = import_original(task["folder"])
        blocks = build_blocks(modeling, task["geometry"], task["layers"], dtype, device)
        stack = OriginalBlocks(blocks, task["geometry"]["hidden_size"], task["batch"], dtype, device)
        versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers") if name in sys.modules}
        print(json.dumps({"versions": versions}), file=answers, flush=True)
        serve(stack, sys.stdin, answers)


if __name__ == "__main__":
    main()
