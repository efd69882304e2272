"""Does contrast with the conversation without its picture keep a model from inventing? A trial on drawings.

    python -m tools.tiny.image_guidance --model models/visualglm-tiny --split "new combinations"
    python -m tools.tiny.image_guidance --model models/visualglm-tiny --exam contradicting.jsonl

Each step's log-probabilities are moved away from those of the same conversation without the picture, or with a grey
one: l + w (l - other), with the weight w = gamma + e^(growth t) - 1 for the answer's token number t (M3ID, arXiv
2403.14003), among the tokens that are at least `PLAUSIBLE` times as likely as the likeliest (VCD, arXiv 2311.16922),
and only where the likeliest is less likely than `gate`. The setting that invents least on some pictures, at the recall
of plain greedy answers, is compared with others on other pictures. The contrast is a logits processor of
`generate`, and no part of the model.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from tools.tiny import pictures, questions, world
from tools.tiny.data import Dialogue
from tools.tiny.exam import MAX_NEW_TOKENS
from visualglm_hf import VisualGLMForConditionalGeneration, VisualGLMProcessor, register
from visualglm_hf.conversation import clean_response
from visualglm_tools.checkpoints.loading import load_weights
from visualglm_tools.evaluation.references import read_exam
from visualglm_tools.evaluation.scoring import verdict_of, yes_or_no
from visualglm_tools.evaluation.statistics import mcnemar_p_value, wilson_interval
from visualglm_tools.evaluation.tables import percent, write_table
from visualglm_tools.options import COUNT, COUNT_OR_NONE, option, parse
from visualglm_tools.printing import report
from visualglm_tools.serving.questions import Pictures


CAPTION = "describe"  # a kind of question
CONTRADICTING = "contradicting"  # a kind of picture
PLAUSIBLE = 0.1  # of the likeliest token's probability
GREY = (128, 128, 128)
GAMMAS, SHAPES_OF_WEIGHT = (0.25, 0.5, 1.0, 2.0), ((0.0, 1.0), (0.0, 0.9), (0.05, 1.0))  # growth and gate
OTHERS = ("no picture", "grey picture")
ROWS_AT_ONCE = 64
SLACK = 0.005  # of recall, that a setting may lose and still be chosen


@dataclass(frozen=True)
class Setting:
    """One way to choose tokens.

    Args:
        gamma: the weight of the contrast at the first token; 0 for none.
        growth: of the weight, per token.
        gate: the probability of the likeliest token from which on nothing is contrasted.
        against: what stands for the picture in the other conversation, one of `OTHERS`.
        plausible: tokens less likely than this share of the likeliest are never chosen; 0 allows all.
        is_sampled: from all tokens at temperature 1, not the likeliest.
        sees: False for a grey picture in place of the real one.
    """

    gamma: float = 0.0
    growth: float = 0.0
    gate: float = 1.0
    against: str = OTHERS[0]
    plausible: float = 0.0
    is_sampled: bool = False
    sees: bool = True

    @property
    def is_guided(self) -> bool:
        return self.gamma > 0 or self.growth > 0

    @property
    def name(self) -> str:
        name = "sampled" if self.is_sampled else "greedy"
        name += "" if self.sees else ", grey picture shown"
        if not self.is_guided:
            return name + (f", plausible ≥ {self.plausible:g}" if self.plausible else "")
        grows = f" + e^{self.growth:g}t - 1" if self.growth else ""
        gate = f", below {self.gate:g}" if self.gate < 1 else ""
        return f"{name}, γ {self.gamma:g}{grows}, against {self.against}{gate}"


@dataclass(frozen=True)
class Outcome:
    """What a setting said of the pictures, row by row.

    Args:
        mentioned, invented, told, asked: facts of each caption; those that are wrong; those that are right; all that
            the reference names.
        right: of each direct question, whether the answer was exact.
        verdicts: "yes", "no" or "" for each yes/no question.
        length: tokens of all answers, on average.
    """

    mentioned: np.ndarray
    invented: np.ndarray
    told: np.ndarray
    asked: np.ndarray
    right: np.ndarray
    verdicts: tuple[str, ...]
    length: float

    @property
    def invention(self) -> float:
        """The share of the facts that are wrong, as CHAIR counts objects."""
        return self.invented.sum() / max(1, self.mentioned.sum())

    @property
    def recall(self) -> float:
        return self.told.sum() / max(1, self.asked.sum())


class ImageContrast(LogitsProcessor):
    """Moves the log-probabilities of a step away from those of another conversation with the same answer so far."""

    def __init__(self, setting: Setting, model, inputs: dict, image_embeds: torch.Tensor | None, prompt_length: int):
        self.setting, self.model = setting, model
        self.inputs, self.prompt_length = inputs, prompt_length
        self.prompt_embeds = model.embed(inputs["input_ids"], image_embeds)
        self.cache = DynamicCache(config=model.config.text_config)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        setting, answer = self.setting, input_ids[:, self.prompt_length :]
        seen = scores.float().log_softmax(-1)
        peak = seen.max(-1, keepdim=True).values
        guided = seen
        if setting.is_guided:
            weight = setting.gamma + math.exp(setting.growth * answer.shape[1]) - 1
            guided = torch.where(peak < math.log(setting.gate), seen + weight * (seen - self.unseen(answer)), seen)
        if not setting.plausible:
            return guided
        return guided.masked_fill(seen < peak + math.log(setting.plausible), -torch.inf)

    def unseen(self, answer: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, V] after the answer so far [B, N], in the other conversation."""
        ids = torch.cat((self.inputs["input_ids"], answer), dim=1)
        mask = torch.cat((self.inputs["attention_mask"], torch.ones_like(answer)), dim=1)
        step = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=ids.shape[1] - self.cache.get_seq_length(),
            attention_mask=mask,
            prompt_embeds=self.prompt_embeds,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.model(**step, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)


def facts_in(text: str, language: str) -> set[tuple[str, str]]:
    """What a caption says of shapes, colours, counts and backgrounds, by the words of the world."""
    text, facts = text.lower(), set()
    for kind, words in words_of(language).items():
        found = {name: forms for name, forms in words.items() if any(has_word(text, form, language) for form in forms)}
        facts |= {(kind, name) for name in found}
        if kind == "background":  # white paper is no white thing
            for forms in found.values():
                text = text.replace(forms[0], " ")
    return facts


def has_word(text: str, word: str, language: str) -> bool:
    return word in text if language == "zh" else f" {word} " in f" {text.rstrip('.').replace(',', ' ')} "


def words_of(language: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """{kind: {name: the words for it}}, backgrounds first."""
    is_chinese = language == "zh"
    return {
        "background": {name: words[:1] if is_chinese else words[3:4] for name, words in world.BACKGROUNDS.items()},
        "shape": {name: words[:1] if is_chinese else words[1:] for name, words in world.SHAPES.items()},
        "colour": {name: words[:1] if is_chinese else (name,) for name, words in world.COLOURS.items()},
        "count": {str(count): (words[0] if is_chinese else words[1].lower(),) for count, words in world.COUNTS.items()},
    }


Questions = list[tuple[Image.Image, list[Dialogue]]]  # of each picture


def from_drawings(split: str, numbers: Sequence[int]) -> Questions:
    """Drawings of the world with what is asked of each in both languages."""
    return from_contradicting(numbers) if split == CONTRADICTING else from_world(split, numbers)


def from_world(split: str, numbers: Sequence[int]) -> Questions:
    """Scenes of equal shapes; asked for a caption, and for the shape."""
    asked = []
    for scene in (world.sample_scene(number, split) for number in numbers):
        dialogues = [
            Dialogue(kind, language, (), world.WORDINGS[kind][language][0], world.answer(scene, kind, language))
            for kind, language in itertools.product((CAPTION, "shape"), world.LANGUAGES)
        ]
        asked.append((world.draw(scene), dialogues))
    return asked


def from_contradicting(numbers: Sequence[int]) -> Questions:
    """Pictures of what training made unlikely; asked for a caption, and yes or no for shapes: there or expected."""
    drawn = []
    for number in numbers:
        picture = pictures.sample_picture(number, CONTRADICTING, "new")
        dialogues = []
        for language in world.LANGUAGES:
            generator = np.random.default_rng((number, 14))
            asked = [questions.ask(picture, kind, language, generator) for kind in (CAPTION, "shape of", "absent")]
            for is_there in (True, False):
                asked.append(questions.ask_presence(picture, language, generator, is_there, "adversarial"))
            dialogues += [Dialogue(each.kind, language, (), each.question, each.answer) for each in asked]
        drawn.append((picture.draw(), dialogues))
    return drawn


def from_exam(file: Path) -> Questions:
    """Pictures of a file as `visualglm evaluate` takes it; its captions are of the kind "describe"."""
    dialogues, opener = {}, Pictures(file.parent, allow_urls=False)
    for each in read_exam(file, "auto"):
        asked = Dialogue(each.kind, each.language, (), each.row.content["text"], each.references[0])
        dialogues.setdefault(each.row.content.get("image"), []).append(asked)
    return [(opener.open(name), asked) for name, asked in dialogues.items() if name]


class Trial:
    """Pictures and questions, and what a model answers to them under each setting."""

    def __init__(self, model: VisualGLMForConditionalGeneration, processor: VisualGLMProcessor, asked: Questions):
        self.model, self.tokenizer = model, processor.tokenizer
        self.dialogues = [
            replace(dialogue, pictures=(number,), image_turns=(0,))
            for number, (_, dialogues) in enumerate(asked)
            for dialogue in dialogues
        ]
        shown = [*(picture for picture, _ in asked), Image.new("RGB", (world.IMAGE_SIZE,) * 2, GREY)]
        parts = [shown[first : first + ROWS_AT_ONCE] for first in range(0, len(shown), ROWS_AT_ONCE)]
        pixels = [processor.image_processor(part, return_tensors="pt")["pixel_values"] for part in parts]
        self.embeds = torch.cat([model.get_image_features(each, return_dict=True).pooler_output for each in pixels])

    def encode(self, rows: Sequence[Dialogue], what: str) -> dict:
        """What `generate` needs for questions about "the picture", "grey picture" or "no picture"."""
        if what == "no picture":
            rows = [replace(row, pictures=(), image_turns=()) for row in rows]
        texts = [row.prompt() for row in rows]
        inputs = self.tokenizer(texts, split_special_tokens=True, padding=True, return_tensors="pt")
        numbers = [-1 if what == "grey picture" else number for row in rows for number in row.pictures]
        return {**inputs, "image_embeds": self.embeds[numbers] if numbers else None}

    @torch.inference_mode()
    def answer(self, setting: Setting) -> Outcome:
        torch.manual_seed(0)
        answers, lengths = [], []
        for first in range(0, len(self.dialogues), ROWS_AT_ONCE):
            rows = self.dialogues[first : first + ROWS_AT_ONCE]
            inputs = self.encode(rows, "the picture" if setting.sees else "grey picture")
            length = inputs["input_ids"].shape[1]
            other = self.encode(rows, setting.against)
            contrast = ImageContrast(setting, self.model, other, other.pop("image_embeds"), length)
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0} if setting.is_sampled else {"do_sample": False}
            output = self.model.generate(
                **inputs, **options, max_new_tokens=MAX_NEW_TOKENS, logits_processor=LogitsProcessorList([contrast])
            )[:, length:]
            lengths += (output != self.tokenizer.pad_token_id).sum(1).tolist()
            answers += [clean_response(text) for text in self.tokenizer.batch_decode(output)]
        return self.judge(answers, float(np.mean(lengths)))

    def judge(self, answers: list[str], length: float) -> Outcome:
        pairs = list(zip(self.dialogues, answers, strict=True))
        captions = [
            (facts_in(answer, row.language), facts_in(row.answer, row.language))
            for row, answer in pairs
            if row.kind == CAPTION
        ]
        return Outcome(
            np.array([len(said) for said, _ in captions]),
            np.array([len(said - true) for said, true in captions]),
            np.array([len(said & true) for said, true in captions]),
            np.array([len(true) for _, true in captions]),
            np.array([answer == row.answer for row, answer in pairs if row.kind != CAPTION]),
            tuple(yes_or_no(answer, row.question) for row, answer in pairs if verdict_of([row.answer])),
            length,
        )


def grid() -> Iterator[Setting]:
    """The settings to choose from."""
    for against, gamma, (growth, gate) in itertools.product(OTHERS, GAMMAS, SHAPES_OF_WEIGHT):
        yield Setting(gamma, growth, gate, against, PLAUSIBLE)


def choose(trial: Trial, settings: Sequence[Setting]) -> tuple[Setting, list[list]]:
    """The setting that invents least at greedy's recall, and the table of all."""
    plain = trial.answer(Setting())
    outcomes = {setting: trial.answer(setting) for setting in settings}
    able = [each for each in settings if outcomes[each].recall >= plain.recall - SLACK]
    best = min(able or settings, key=lambda each: (outcomes[each].invention, -outcomes[each].recall))
    rows = [row_of(setting.name, outcome, plain) for setting, outcome in {Setting(): plain, **outcomes}.items()]
    return best, rows


HEAD = ["setting", "captions with something invented", "95 %", "p", "invented facts", "recall", "direct answers", "yes"]
HEAD += ["tokens"]


def row_of(name: str, outcome: Outcome, plain: Outcome) -> list:
    """One row of a table: `plain` is what the captions are compared with, one by one (McNemar).

    Without captions, what is counted instead are wrong answers.
    """
    is_bad, was_bad = (each.invented > 0 if len(each.invented) else ~each.right for each in (outcome, plain))
    low, high = wilson_interval(int(is_bad.sum()), len(is_bad))
    p_value = mcnemar_p_value(int((was_bad & ~is_bad).sum()), int((is_bad & ~was_bad).sum()))
    verdicts = outcome.verdicts
    return [
        name,
        percent(is_bad.mean()),
        f"{100 * low:.1f}–{100 * high:.1f}",
        f"{p_value:.2g}",
        *map(percent, (outcome.invention, outcome.recall) if len(outcome.invented) else (None, None)),
        percent(outcome.right.mean() if len(outcome.right) else None),
        percent(verdicts.count("yes") / len(verdicts)) if verdicts else "",
        f"{outcome.length:.1f}",
    ]


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Path = option("folder of the model", Path("models/visualglm-tiny"), metavar="FOLDER")
    split: str = option(
        "of the scenes; or pictures of what training made unlikely",
        "new combinations",
        choices=(*world.SPLITS, CONTRADICTING),
    )
    exam: Path | None = option(
        "questions instead of scenes, as visualglm evaluate takes them; captions have the kind 'describe'",
        None,
        metavar="FILE",
    )
    choose_on: int = option("pictures to choose a setting on, the first", 150, parse=COUNT, metavar="N")
    report_on: int = option("the next pictures, on which it is reported", 400, parse=COUNT, metavar="N")
    seed: int = option("number of the first scene", 0, parse=COUNT_OR_NONE, metavar="N")
    threads: int = option("of torch", 1, parse=COUNT, metavar="N")


def run(options: Options) -> None:
    total = options.choose_on + options.report_on
    numbers = range(options.seed, options.seed + total)
    asked = from_exam(options.exam)[:total] if options.exam else from_drawings(options.split, numbers)
    if len(asked) <= options.choose_on:
        raise ValueError(f"{options.exam} has {len(asked)} pictures; --choose-on {options.choose_on} leaves none.")
    torch.set_num_threads(options.threads)
    model = load_weights(options.model, torch.float32).eval()
    register()
    processor = VisualGLMProcessor.from_pretrained(options.model)
    best, rows = choose(Trial(model, processor, asked[: options.choose_on]), list(grid()))
    print(f"Chosen on {options.choose_on} pictures of {str(options.exam or options.split)!r}: {best.name}\n")
    print(write_table(HEAD, rows))
    trial = Trial(model, processor, asked[options.choose_on :])
    plain = trial.answer(Setting())
    sampled = {"is_sampled": True, "plausible": PLAUSIBLE}
    others = [
        best,
        Setting(is_sampled=True),
        Setting(**sampled),
        Setting(best.gamma, best.growth, best.gate, best.against, **sampled),
        Setting(sees=False),
    ]
    rows = [row_of(Setting().name, plain, plain), *(row_of(each.name, trial.answer(each), plain) for each in others)]
    print(f"Reported on {len(asked) - options.choose_on} others, p against greedy:\n")
    print(write_table(HEAD, rows))


def main(argv: Sequence[str] | None = None) -> int:
    description = "Judge contrast with the conversation without its picture: invented facts, recall, yes-ratio."
    try:
        run(parse(Options, argv, "python -m tools.tiny.image_guidance", description))
    except (ValueError, OSError) as error:
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
