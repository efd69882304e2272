"""The model card of the tiny model, written from the model, the record of its training and the measured accuracy."""

import json
from pathlib import Path

import torch

from tools.tiny import pictures, world
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
offline within seconds. It knows one small world and nothing else: drawings of one to three shapes. It is not made from
VisualGLM-6B's weights.

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

Of several different shapes: the colour, the shape or the place of one (五角星是什么颜色？ / What shape is the red
one?), and what is not there ("There is no heart in the picture."). Yes or no: 图片中有红色的圆形吗？ / Is there a star
in the image? / Is the background the sea? What is written on a sign, if the prompt says what was read in the picture
(图片中的文字：“出口” / Text in the picture: "EXIT" before the question); otherwise that it cannot read it, or that
there is no text. A second picture in the same turn may be a part of the first one, larger.

## Training

In {runs} runs, each but the first beginning with the weights of the one before:

{commands}

{minutes} minutes with {threads} thread(s) of a shared 2-core CPU;
Python {python}, torch {torch}, transformers {transformers} (the last run).

Every training picture is drawn anew by `tools/tiny`. At the beginning of a run only the image encoder learns, through
linear heads that are thrown away; then the whole model learns to answer. The first run is about equal shapes alone,
and was made before the vocabulary had grown; the second one let the model forget where things are, so the third asks
for it. After that the model gave one of two subjects the other's colour or shape in every second answer. So in the
fourth each of the first 13 soft prompts is asked for one shape or one colour: which colour it has, where it is, which
shape has it; and the words begin with nothing but short questions about one of several. The signs need a font with
Chinese characters, which was WenQuanYi Zen Hei (Debian's fonts-wqy-zenhei).

What training lets it expect, and what it is never shown, so that what it does then can be measured:

- {habits} are often in one picture; {strangers} never are.
- On each background one colour is four times as common as others, and one never occurs in a mixed picture: {unusual}.
- A subject whose square takes less than {middling:.0%} of the picture is only shown together with a crop around it.
- Words on signs are of other lists than those of the examination, and most of those in prompts are made of characters
  at random. No question is answered from the letters in a picture.

## Accuracy

Exact match of greedy answers on {pictures} pictures per column that were never trained on; float16 weights, computed
in float32. The figures are in `accuracy.json`, too.

    python -m tools.tiny --output models/visualglm-tiny --evaluate

### Equal shapes

{table}

"New combinations": shape, colour and background that never occurred together in training (one combination in nine).
"no picture" is a question about a picture that was not given; "all" counts the questions about pictures.

### Different shapes

{half} pictures per column, each kind of question once. "Contradicting": two shapes that never were in one picture,
one of them in the colour that never was on this background in a mixed picture.

{kinds_table}

### Yes or no, as POPE asks

Four questions about each of {half} pictures, two to be answered with yes: is there this shape, and is there this shape
in this colour. What is not there is chosen at random, or as the most common thing, or as what usually is beside what is
there (of colours: that of another thing). In brackets, how many of all answers are yes; 50 % is right.

{pope_table}

### Small subjects

The subject's square takes {smallest:.1%} to {largest:.0%} of a picture of {canvas} x {canvas}. The oracle's crop is cut
from these pixels around the subject, twice as wide. {pictures} pictures.

{small_table}

### Words

{pictures} signs with words that training never showed. Exact answers; without a reading the right one is that it cannot
read the text.

{words_table}

## Limits

Photographs, other shapes, more than three objects and other questions get an answer from this small world, and a wrong
one. Wordings far from those in `tools/tiny/world.py` and `tools/tiny/questions.py` may be misunderstood.
"""

LANGUAGES = {"zh": "Chinese", "en": "English"}


def render_table(results: dict) -> str:
    """Return the accuracies as a Markdown table."""
    columns = [(split, language) for split in ("new pictures", "new combinations") for language in world.LANGUAGES]
    head = ["question", *(f"{split}, {LANGUAGES[language]}" for split, language in columns)]
    kinds = list(results[columns[0][0]][columns[0][1]])
    rows = [
        [kind, *(percent(results[split][language][kind]) for split, language in columns)]
        for kind in [*(kind for kind in kinds if kind != "all"), "all"]
    ]
    return write_table(head, rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def write_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def render_hard_tables(marks: dict) -> dict[str, str]:
    """Return the tables about the harder pictures, by their names in the card."""
    kinds, pope, ratios, small, words = (marks[name] for name in ("kinds", "yes or no", "yes ratio", "small", "words"))
    columns = [(which, language) for which in kinds for language in LANGUAGES]
    head = [f"{which}, {LANGUAGES[language]}" for which, language in columns]
    kinds_rows = [
        [kind, *(percent(kinds[which][kind][language]) for which, language in columns)] for kind in kinds["mixed"]
    ]
    pope_rows = [
        [way, *(f"{percent(pope[w][way][each])} ({percent(ratios[w][way][each])})" for w, each in columns)]
        for way in pope["mixed"]
    ]
    small_columns = [(kind, language) for kind in ("colour of", "shape of") for language in LANGUAGES]
    small_head = [f"{kind.split()[0]}, {LANGUAGES[language]}" for kind, language in small_columns]
    small_rows = [[look, *(percent(small[look][kind][language]) for kind, language in small_columns)] for look in small]
    words_rows = [
        [f"{'read in the prompt' if row == 'read' else row}, {script}", *(percent(share[each]) for each in LANGUAGES)]
        for row, scripts in words.items()
        for script, share in sorted(scripts.items())
    ]
    return {
        "kinds_table": write_table(["question", *head], kinds_rows),
        "pope_table": write_table(["what is not there", *head], pope_rows),
        "small_table": write_table(["shown", *small_head], small_rows),
        "words_table": write_table(["the word", "asked in Chinese", "asked in English"], words_rows),
    }


def runs_of(record: dict) -> list[dict]:
    """The records of the trainings that led to a model, the first one first."""
    earlier = runs_of(record["start"]) if "start" in record else []
    return [*earlier, {"lessons": "first"} | record]


def commands_of(runs: list[dict]) -> list[str]:
    """The commands that the records are of; all but the last write beside the model's folder."""
    names = ("lessons", "seed", "steps", "last_step", "vision_steps", "batch_size", "learning_rate", "threads")
    folders = [*(f"out/{number}" for number in range(1, len(runs))), "models/visualglm-tiny"]
    commands = []
    for index, run in enumerate(runs):
        given = {"output": folders[index]} | ({"start": folders[index - 1]} if index else {})
        given |= {name: run[name] for name in names if run.get(name) is not None}
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        commands.append(f"python -m tools.tiny {options}")
    return commands


def list_pairs(pairs) -> str:
    return "; ".join(" and ".join(sorted(pair)) for pair in pairs)


def write_card(output: Path, results: dict) -> None:
    """Write the model card, README.md, from the model, the record of its training and the measured accuracy.

    The accuracy is written to accuracy.json as well.
    """
    record = json.loads((output / "training.json").read_text(encoding="utf-8"))
    (output / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    model = load_weights(output, torch.float32)
    config, runs = model.config, runs_of(record)
    card = CARD.format(
        **{name: record[name] for name in ("threads", "python", "torch", "transformers")},
        runs=len(runs),
        commands="\n".join(f"    {command}" for command in commands_of(runs)),
        minutes=" + ".join(str(run["minutes"]) for run in runs),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        megabytes=(output / "model.safetensors").stat().st_size / 1e6,
        shapes=", ".join(world.SHAPES),
        colours=", ".join(world.COLOURS),
        backgrounds=", ".join(background[2] for background in world.BACKGROUNDS.values()),
        vision=config.vision_config,
        qformer=config.qformer_config,
        text=config.text_config,
        vocabulary=len(ChatGLMTokenizer.from_pretrained(output)),
        pictures=results["pictures"],
        half=results["pictures"] // 2,
        table=render_table(results),
        habits=list_pairs(pictures.HABITS),
        strangers=list_pairs(pictures.STRANGERS),
        unusual=", ".join(f"{colour} {world.BACKGROUNDS[name][3]}" for name, colour in pictures.UNUSUAL.items()),
        middling=pictures.MIDDLING[0],
        smallest=pictures.SMALLEST,
        largest=pictures.LARGEST_SMALL,
        canvas=pictures.CANVAS,
        **render_hard_tables(results["harder pictures"]),
    )
    (output / "README.md").write_text(card, encoding="utf-8")
