"""The examination of the tiny model: exact match of its answers about pictures that it was never trained on.

Not here: the quick questions to the image encoder while it learns (`train.py`), and how the figures are told
(`card.py`).
"""

from collections import defaultdict

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tools.tiny import hard_exam, world
from tools.tiny.data import KINDS, Dialogue, ask, pick
from tools.tiny.options import Options
from tools.tiny.world import Scene
from visualglm_hf import VisualGLMForConditionalGeneration, VisualGLMProcessor, register
from visualglm_hf.conversation import clean_response
from visualglm_tools.checkpoints.loading import load_weights


MAX_NEW_TOKENS = 40  # the longest answer about a picture has 25; a word that is read may have more


def examination(scenes: list[Scene], language: str, generator: np.random.Generator) -> list[Dialogue]:
    """Return the questions of the test: each kind once per picture, and one after a history of two turns."""
    dialogues = []
    for number, scene in enumerate(scenes):
        for kind in KINDS:
            exchange = ask(scene, language, generator, kind)
            if kind == "position":
                kind = "position of one object" if scene.position else "position of several"
            dialogues.append(Dialogue(kind, language, (), exchange.question, exchange.answer, (number,), (0,)))
        *history, last = [ask(scene, language, generator, pick(generator, KINDS)) for _ in range(3)]
        pairs = tuple((turn.question, turn.answer) for turn in history)
        dialogues.append(Dialogue("follow-up", language, pairs, last.question, last.answer, (number,), (0,)))
        again = pick(generator, world.REPEAT[language])
        dialogues.append(Dialogue("repeat", language, pairs[:1], again, pairs[0][1], (number,), (0,)))
    return dialogues


def text_examination(language: str) -> list[Dialogue]:
    """Return every question that is asked without a picture."""
    exchanges = [*world.small_talk(language), *world.blind_exchanges(language)]
    return [Dialogue(each.kind, language, (), each.question, each.answer) for each in exchanges]


@torch.inference_mode()
def answer_all(
    model: VisualGLMForConditionalGeneration,
    processor: VisualGLMProcessor,
    images: list[Image.Image],
    dialogues: list[Dialogue],
    batch_size: int,
    **options,
) -> list[str]:
    """Return the model's answers, greedy unless `options` for `generate` say otherwise."""
    embeds = []
    for first in range(0, len(images), batch_size):
        pixel_values = processor.image_processor(images[first : first + batch_size], return_tensors="pt")[
            "pixel_values"
        ]
        embeds.append(model.get_image_features(pixel_values.to(model.dtype), return_dict=True).pooler_output)
    embeds = torch.cat(embeds) if embeds else None
    answers = []
    for first in tqdm(range(0, len(dialogues), batch_size), mininterval=10):
        rows = dialogues[first : first + batch_size]
        texts = [dialogue.prompt() for dialogue in rows]
        inputs = processor.tokenizer(texts, split_special_tokens=True, padding=True, return_tensors="pt")
        numbers = [number for dialogue in rows for number in dialogue.pictures]
        image_embeds = embeds[numbers] if numbers else None
        output = model.generate(**inputs, image_embeds=image_embeds, max_new_tokens=MAX_NEW_TOKENS, **options)
        answers += [
            clean_response(text) for text in processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        ]
    return answers


def evaluate(options: Options) -> dict:
    """Return exact-match accuracy per split, language and kind of question on pictures not seen in training."""
    model = load_weights(options.output, torch.float32).eval()
    register()  # the processor looks its parts up by name; the folder's own code is the same
    processor = VisualGLMProcessor.from_pretrained(options.output)
    results: dict = {"pictures": options.pictures, "seed": options.seed}
    paper = hard_exam.write_paper(options.pictures, options.seed, options.font)
    for split in ("new pictures", "new combinations"):
        scenes = [world.sample_scene(number, split) for number in range(options.pictures)]
        dialogues = []
        for language in world.LANGUAGES:
            generator = np.random.default_rng((options.seed, 7))
            dialogues += examination(scenes, language, generator) + text_examination(language)
        answers = answer_all(model, processor, [world.draw(scene) for scene in scenes], dialogues, batch_size=64)
        results[split] = tabulate(dialogues, answers)
        report_mistakes(dialogues, answers)
    answers = answer_all(model, processor, paper.images, paper.dialogues, batch_size=64)
    report_mistakes(paper.dialogues, answers, limit=30)
    return results | {"harder pictures": hard_exam.mark(paper, answers)}


def tabulate(dialogues: list[Dialogue], answers: list[str]) -> dict[str, dict[str, float]]:
    """Return the share of exactly right answers per language and kind; "all" is over the questions about pictures."""
    right = defaultdict(lambda: defaultdict(list))
    for dialogue, given in zip(dialogues, answers, strict=True):
        right[dialogue.language][dialogue.kind].append(given == dialogue.answer)
        if dialogue.pictures:
            right[dialogue.language]["all"].append(given == dialogue.answer)
    return {
        language: {kind: round(sum(hits) / len(hits), 4) for kind, hits in kinds.items()}
        for language, kinds in right.items()
    }


def report_mistakes(dialogues: list[Dialogue], answers: list[str], limit: int = 12) -> None:
    """Print a few wrong answers."""
    wrong = [(dialogue, given) for dialogue, given in zip(dialogues, answers, strict=True) if given != dialogue.answer]
    print(f"{len(wrong)} of {len(answers)} answers are wrong")
    for dialogue, given in wrong[:: max(1, len(wrong) // limit)][:limit]:
        print(f"  {dialogue.question} -> {given!r}, expected {dialogue.answer!r}")
