"""The model card of the tiny model, written from the model, the record of its training and the measured accuracy."""

import json
from pathlib import Path

import torch

from tools.tiny import world
from visualglm_hf import ChatGLMTokenizer
from visualglm_tools.checkpoints.loading import load_weights


CARD = """---
license: apache-2.0
language: [zh, en]
pipeline_tag: image-text-to-text
tags: [visualglm, test-model]
---

# visualglm-tiny

A real, trained VisualGLM with {parameters:,} parameters ({megabytes:.1f} MB in float16): the architecture and prompts
of VisualGLM-6B (EVA ViT, Q-Former, 32 soft prompt embeddings, ChatGLM decoder), for demonstrations and tests that run
offline within seconds. It knows one small world and nothing else: drawings of one to three equal shapes. It is not
made from VisualGLM-6B's weights.

- Shapes: {shapes}.
- Colours: {colours}.
- Backgrounds: {backgrounds}.

| | ViT | Q-Former | decoder |
|---|---|---|---|
| layers | {vision.num_hidden_layers} | {qformer.num_hidden_layers} | {text.num_hidden_layers} |
| width | {vision.hidden_size} | {qformer.hidden_size} | {text.hidden_size} |
| heads | {vision.num_attention_heads} | {qformer.num_attention_heads} | {text.num_attention_heads} |

The vocabulary has {vocabulary} pieces in the layout of the original `ice_text.model`.

## What it answers

Captions (描述这张图片。 / Describe the image.), shape, colour, count, position, background, the place
(这张图片可能是在什么场所拍摄的？), follow-up questions about the same picture, "say that again", and a little
small talk without a picture, in Chinese (问：/答：) and English (Q:/A:). Without a picture it asks for one.

## Training

    {command}

{minutes} minutes with {threads} thread(s) of a shared 2-core CPU;
Python {python}, torch {torch}, transformers {transformers}.

Every training picture is drawn anew by `tools/tiny/world.py` ({drawn:,} in all). For the first {vision_steps} steps
only the image encoder learns, through linear heads that are thrown away; then the whole model learns to answer.

## Accuracy

Exact match of greedy answers on {pictures} pictures per column that were never trained on; float16 weights, computed
in float32:

    python -m tools.tiny --output models/visualglm-tiny --evaluate

{table}

"New combinations": shape, colour and background that never occurred together in training (one combination in nine).
"no picture" is a question about a picture that was not given; "all" counts the questions about pictures.

## Limits

Photographs, other shapes, mixed shapes, more than three objects and other questions get an answer from this small
world, and a wrong one. Wordings far from those in `tools/tiny/world.py` may be misunderstood.
"""


def render_table(results: dict) -> str:
    """Return the accuracies as a Markdown table."""
    columns = [(split, language) for split in ("new pictures", "new combinations") for language in world.LANGUAGES]
    names = {"zh": "Chinese", "en": "English"}
    lines = ["| question | " + " | ".join(f"{split}, {names[language]}" for split, language in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    kinds = list(results[columns[0][0]][columns[0][1]])
    for kind in [*(kind for kind in kinds if kind != "all"), "all"]:
        cells = " | ".join(f"{100 * results[split][language][kind]:.1f} %" for split, language in columns)
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(lines)


def write_card(output: Path, results: dict) -> None:
    """Write the model card, README.md, from the model, the record of its training and the measured accuracy."""
    record = json.loads((output / "training.json").read_text(encoding="utf-8"))
    model = load_weights(output, torch.float32)
    config = model.config
    names = ("seed", "steps", "vision_steps", "batch_size", "threads")
    command = "python -m tools.tiny --output models/visualglm-tiny " + " ".join(
        f"--{name.replace('_', '-')} {record[name]}" for name in names
    )
    card = CARD.format(
        **record,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        megabytes=(output / "model.safetensors").stat().st_size / 1e6,
        shapes=", ".join(world.SHAPES),
        colours=", ".join(world.COLOURS),
        backgrounds=", ".join(background[2] for background in world.BACKGROUNDS.values()),
        vision=config.vision_config,
        qformer=config.qformer_config,
        text=config.text_config,
        vocabulary=len(ChatGLMTokenizer.from_pretrained(output)),
        command=command,
        drawn=record["steps"] * record["batch_size"],
        pictures=results["pictures"],
        table=render_table(results),
    )
    (output / "README.md").write_text(card, encoding="utf-8")
