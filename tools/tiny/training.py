"""How `models/visualglm-tiny` comes to be: its model, its data, its training, its examination and its card.

`train_tiny.py` is the command and says how training goes. Everything the model sees comes from `tiny_world.py`, every
prompt from `visualglm_hf.conversation`.
"""

import argparse
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import GenerationConfig

from tools.tiny import tokenizer as tiny_tokenizer
from tools.tiny import world as tiny_world
from tools.tiny.world import Exchange, Scene
from visualglm_hf import (
    ChatGLMTokenizer,
    VisualGLMConfig,
    VisualGLMForConditionalGeneration,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
    register,
)
from visualglm_hf.conversation import END_MARK, build_prompt, clean_response, expand_images
from visualglm_tools.checkpoints.prepared import write_description


NUM_QUERY_TOKENS = 32
PATCHES_PER_SIDE = 16
ROWS_PER_PICTURE = 2
ROWS_WITHOUT_PICTURE = 4  # per step
ROWS_PER_GROUP = 17  # rows of like length go through the decoder together
MAX_NEW_TOKENS = 24  # the longest answer has 14
CHECKPOINT_INTERVAL = 250  # steps
LOG_INTERVAL = 100
VOCABULARY_MULTIPLE = 64

SHAPES, COLOURS, BACKGROUNDS = (
    list(table) for table in (tiny_world.SHAPES, tiny_world.COLOURS, tiny_world.BACKGROUNDS)
)
POSITIONS = [*tiny_world.POSITIONS, None]
EXAM = ("shape", "colour", "count", "background", "position")
KINDS = [*tiny_world.WORDINGS]


# ---------------------------------------------------------------- model


def write_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """Build the vocabulary in `folder` and return its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer.write_model(folder / "ice_text.model")
    return ChatGLMTokenizer(str(folder / "ice_text.model"))


def build_config(tokenizer: ChatGLMTokenizer) -> VisualGLMConfig:
    """Return the tiny architecture; dropout is off because no picture is seen twice."""
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    qformer = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    text = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    names = {"bos": "<sop>", "eos": "<eop>", "pad": "<pad>", "mask": "[MASK]", "gmask": "[gMASK]"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(piece) for name, piece in names.items()}
    vocab_size = math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return VisualGLMConfig(
        text_config={**text, **ids, "vocab_size": vocab_size, "num_tokens": len(tokenizer)},
        vision_config={**vision, **no_dropout},
        qformer_config={**qformer, **no_dropout, "num_query_tokens": NUM_QUERY_TOKENS, "encoder_hidden_size": 64},
        image_token_id=tokenizer.unk_token_id,
        tie_word_embeddings=True,
    )


def plane_waves(width: int) -> torch.Tensor:
    """Return [257, width] positions: 0 for the class token, then for each patch sin x, cos x, sin y and cos y."""
    y, x = torch.meshgrid(*[torch.arange(float(PATCHES_PER_SIDE))] * 2, indexing="ij")
    angles = [axis.reshape(-1, 1) * wave_frequencies(width) for axis in (x, y)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat((torch.zeros(1, width), waves))


def wave_frequencies(width: int) -> torch.Tensor:
    """Return the angles per patch of `plane_waves`: from a quarter turn to a hundredth."""
    count = width // 4
    return math.pi / 2 * 0.06 ** (torch.arange(count) / (count - 1))


@torch.no_grad()
def look_aside(attention: nn.Module, distance: float) -> None:
    """Let each head of a fresh ViT layer look at one neighbour, `distance` patches away, as a convolution would.

    A head projects some of the plane waves; its query is turned by the angle that the neighbour is ahead, so that the
    product with the key, a sum of cosines, is largest there.
    """
    width, heads = attention.dense.in_features, attention.config.num_attention_heads
    head_dim, waves, frequencies = width // heads, width // 4, wave_frequencies(width)
    chosen = torch.linspace(0, 0.8 * (waves - 1), head_dim // 4).round().long()
    query, key, _ = attention.query_key_value.weight.view(3, heads, head_dim, width)
    query.mul_(0.3)
    key.mul_(0.3)
    gain = 2.0 * (head_dim**0.5 / 4) ** 0.5
    for head in range(heads):
        turn = 2 * math.pi * head / heads
        for axis, step in enumerate((distance * math.cos(turn), distance * math.sin(turn))):
            for index, wave in enumerate(chosen.tolist()):
                angle = step * frequencies[wave].item()
                sine, cosine = 2 * axis * waves + wave, (2 * axis + 1) * waves + wave
                row = 2 * (axis * len(chosen) + index)
                key[head, row, sine] += gain
                key[head, row + 1, cosine] += gain
                query[head, row, sine] += gain * math.cos(angle)
                query[head, row, cosine] += gain * math.sin(angle)
                query[head, row + 1, cosine] += gain * math.cos(angle)
                query[head, row + 1, sine] -= gain * math.sin(angle)


@torch.no_grad()
def initialise(model: VisualGLMForConditionalGeneration) -> None:
    """Choose first weights from which a few minutes of training are enough.

    Each linear layer keeps the size of its input. The decoder's outputs start larger, because its residual factor of
    7.5 would otherwise drown them. The ViT's positions start as plane waves, and its patches look at their neighbours.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not model.lm_head:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.transformer.word_embeddings.weight, std=model.config.text_config.hidden_size**-0.5)
    for layer in model.transformer.layers:
        layer.attention.dense.weight.mul_(3)
        layer.mlp.dense_4h_to_h.weight.mul_(3)
    encoder = model.image_encoder
    nn.init.normal_(encoder.qformer.transformer["word_embeddings"].weight, std=0.5)
    positions = encoder.vit.transformer["position_embeddings"].weight
    positions.copy_(0.7 * plane_waves(positions.shape[1]))
    encoder.vit.mixins["patch_embedding"]["proj"].weight.mul_(0.7)
    for layer, distance in zip(encoder.vit.transformer["layers"], (1.0, 1.5, 2.0), strict=True):
        look_aside(layer.attention, distance)


def build_model(config: VisualGLMConfig, seed: int) -> VisualGLMForConditionalGeneration:
    """Return an untrained model."""
    torch.manual_seed(seed)
    model = VisualGLMForConditionalGeneration(config)
    initialise(model)
    return model


class Examiner(nn.Module):
    """Linear heads that ask the image encoder simple questions while it learns; not part of the model.

    Each patch is asked whether an object's centre is in it and, inside an object, for shape, colour and position;
    the mean of the soft prompt is asked for shape, colour, count, background and position.
    """

    def __init__(self, config: VisualGLMConfig):
        super().__init__()
        width, prompt_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.centre = nn.Linear(width, 1)
        self.patches = nn.ModuleList(nn.Linear(width, len(names)) for names in (SHAPES, COLOURS, POSITIONS))
        sizes = (len(SHAPES), len(COLOURS), tiny_world.MAX_COUNT, len(BACKGROUNDS), len(POSITIONS))
        self.pictures = nn.ModuleList(nn.Linear(prompt_width, size) for size in sizes)

    def forward(
        self,
        vision_states: torch.Tensor,
        soft_prompt: torch.Tensor,
        patch_labels: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, and the share of right answers about whole pictures [5].

        Args:
            vision_states: [B, 257, C] of the ViT.
            soft_prompt: [B, 32, C] for the decoder.
            patch_labels: [B, 256], 0 outside, 1 inside an object, 2 at its centre.
            labels: [B, 5] indices of shape, colour, count, background and position.
        """
        patches, inside = vision_states[:, 1:], patch_labels > 0
        is_centre = (patch_labels == 2).float()
        weight = torch.tensor(20.0)  # centres are rare
        loss = F.binary_cross_entropy_with_logits(self.centre(patches)[..., 0], is_centre, pos_weight=weight)
        for index, head in zip((0, 1, 4), self.patches, strict=True):
            target = labels[:, index, None].expand_as(inside)[inside]
            loss = loss + F.cross_entropy(head(patches[inside]), target)
        answers = [head(soft_prompt.mean(1)) for head in self.pictures]
        loss = loss + sum(F.cross_entropy(answer, labels[:, index]) for index, answer in enumerate(answers))
        right = torch.stack([answer.argmax(-1) for answer in answers], dim=1) == labels
        return loss, right.float().mean(0)


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Dialogue:
    """A question after a history, its answer, and the pictures (numbers in the batch) with the turns they precede."""

    kind: str
    language: str
    history: tuple[tuple[str, str], ...]
    question: str
    answer: str
    pictures: tuple[int, ...] = ()
    image_turns: tuple[int, ...] = ()

    def prompt(self) -> str:
        text = build_prompt(self.question, self.history, self.image_turns)
        return expand_images(text, len(self.pictures), NUM_QUERY_TOKENS)


def pick(generator: np.random.Generator, items: Sequence):
    """Return one of `items`."""
    return items[generator.integers(len(items))]


def scribble(question: str, generator: np.random.Generator) -> str:
    """Write a question as people type it: sometimes without its last mark, sometimes without a capital letter."""
    if generator.random() < 0.15:
        question = question.rstrip("。？！.?!")
    if generator.random() < 0.1:
        question = question[0].lower() + question[1:]
    return question


def ask(scene: Scene, language: str, generator: np.random.Generator, kind: str | None = None) -> Exchange:
    """Ask something about a picture, or rarely make conversation instead.

    Captions come twice as often as the rest, and positions three times where there is one, since most scenes have none.
    """
    if kind is None and generator.random() < 0.06:
        return pick(generator, tiny_world.small_talk(language))
    kind = kind or pick(generator, [*KINDS, "describe", *(["position"] * 2 if scene.position else [])])
    question = pick(generator, tiny_world.WORDINGS[kind][language])
    return Exchange(kind, language, question, tiny_world.answer(scene, kind, language))


def ask_blindly(language: str, generator: np.random.Generator) -> Exchange:
    """Make conversation, or ask about a picture that is not there."""
    source = tiny_world.small_talk if generator.random() < 0.6 else tiny_world.blind_exchanges
    return pick(generator, source(language))


def finish(
    turns: list[Exchange],
    generator: np.random.Generator,
    pictures: tuple[int, ...] = (),
    image_turns: tuple[int, ...] = (),
) -> Dialogue:
    """Make a dialogue of its turns, the last being the question; now and then ask to repeat the last answer instead."""
    *history, last = turns
    pairs = [(scribble(turn.question, generator), turn.answer) for turn in history]
    if history and generator.random() < 0.07:
        question = pick(generator, tiny_world.REPEAT[last.language])
        last = Exchange("repeat", last.language, question, history[-1].answer)
        image_turns = tuple(min(turn, len(history) - 1) for turn in image_turns)  # the question is not about a picture
    question = scribble(last.question, generator)
    return Dialogue(last.kind, last.language, tuple(pairs), question, last.answer, pictures, image_turns)


def sample_dialogue(scenes: list[Scene], number: int, generator: np.random.Generator) -> Dialogue:
    """Return a dialogue about picture `number`, rarely with another picture or with small talk before it."""
    language = pick(generator, tiny_world.LANGUAGES)
    before: list[Exchange] = []
    pictures, image_turns = (number,), (0,)
    chance = generator.random()
    if chance < 0.05:
        other = int(generator.integers(len(scenes)))
        before = [ask(scenes[other], language, generator) for _ in range(generator.integers(1, 3))]
        pictures, image_turns = (other, number), (0, len(before))
    elif chance < 0.1:
        before = [ask_blindly(language, generator) for _ in range(generator.integers(1, 3))]
        image_turns = (len(before),)
    length = 1 + generator.choice(4, p=(0.55, 0.25, 0.14, 0.06)) if not before else generator.integers(1, 3)
    turns = []
    for _ in range(length):
        other_language = tiny_world.LANGUAGES[language == "zh"]
        turns.append(ask(scenes[number], other_language if generator.random() < 0.04 else language, generator))
    return finish([*before, *turns], generator, pictures, image_turns)


def sample_blind_dialogue(generator: np.random.Generator) -> Dialogue:
    """Return a dialogue without a picture."""
    language = pick(generator, tiny_world.LANGUAGES)
    return finish([ask_blindly(language, generator) for _ in range(generator.integers(1, 4))], generator)


def encode_dialogues(tokenizer: ChatGLMTokenizer, dialogues: list[Dialogue]) -> dict[str, torch.Tensor]:
    """Return left-padded `input_ids` and `attention_mask`, `labels` for the last columns, and `picture_rows`."""
    texts = [dialogue.prompt() + dialogue.answer + END_MARK for dialogue in dialogues]
    batch = tokenizer(texts, split_special_tokens=True, padding=True, return_tensors="pt")
    starts = (batch["input_ids"] == tokenizer.bos_token_id).int().argmax(1)
    first = int(starts.min())
    columns = torch.arange(first + 1, batch["input_ids"].shape[1])
    labels = batch["input_ids"][:, first + 1 :].masked_fill(columns <= starts[:, None], -100)
    picture_rows = torch.tensor([number for dialogue in dialogues for number in dialogue.pictures], dtype=torch.long)
    return {**batch, "labels": labels, "picture_rows": picture_rows}


def picture_labels(scene: Scene) -> list[int]:
    """Return what the `Examiner` asks about a picture."""
    names = (
        (SHAPES, scene.shape),
        (COLOURS, scene.colour),
        (BACKGROUNDS, scene.background),
        (POSITIONS, scene.position),
    )
    shape, colour, background, position = (table.index(name) for table, name in names)
    return [shape, colour, scene.count - 1, background, position]


def patch_labels(scene: Scene) -> np.ndarray:
    """Return 256 numbers: 0 outside the objects, 1 inside, 2 where a centre is."""
    side = tiny_world.IMAGE_SIZE // PATCHES_PER_SIDE
    middles = (np.arange(PATCHES_PER_SIDE) + 0.5) * side
    labels = np.zeros((PATCHES_PER_SIDE, PATCHES_PER_SIDE), dtype=np.int64)
    for x, y, radius in scene.objects:
        labels[(middles - x) ** 2 + (middles[:, None] - y) ** 2 < (0.8 * radius) ** 2] = 1
    for x, y, _ in scene.objects:
        labels[int(y // side), int(x // side)] = 2
    return labels.ravel()


class TrainingData(IterableDataset):
    """Endless batches, each a function of the seed and the step alone, so that a resumed run sees the same ones."""

    def __init__(self, tokenizer: ChatGLMTokenizer, seed: int, batch_size: int, first_step: int, vision_steps: int):
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        self.first_step, self.vision_steps = first_step, vision_steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        first = (self.seed * 1_000_000 + step) * self.batch_size
        scenes = [tiny_world.sample_scene(first + index) for index in range(self.batch_size)]
        pixels = np.stack([np.asarray(tiny_world.draw(scene)) for scene in scenes])
        batch = {
            "pixels": torch.from_numpy(pixels),
            "patch_labels": torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])),
            "picture_labels": torch.tensor([picture_labels(scene) for scene in scenes]),
        }
        if step < self.vision_steps:
            return batch
        generator = np.random.default_rng((self.seed, step))
        dialogues = [
            sample_dialogue(scenes, number, generator) for number in range(len(scenes)) for _ in range(ROWS_PER_PICTURE)
        ]
        dialogues += [sample_blind_dialogue(generator) for _ in range(ROWS_WITHOUT_PICTURE)]
        dialogues.sort(key=lambda dialogue: len(dialogue.prompt()))
        groups = [dialogues[row : row + ROWS_PER_GROUP] for row in range(0, len(dialogues), ROWS_PER_GROUP)]
        return {**batch, "groups": [encode_dialogues(self.tokenizer, group) for group in groups]}


def normalise(pixels: torch.Tensor, image_processor: VisualGLMImageProcessor) -> torch.Tensor:
    """Do what the image processor does to a picture of 224 x 224, for a batch [B, 224, 224, 3] of bytes at once."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


# ---------------------------------------------------------------- training


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Rise for 100 steps, again when the words begin; stay; fall to a fiftieth over the last 40 percent."""
    rise = min(1.0, ((step - options.vision_steps if step >= options.vision_steps else step) + 1) / 100)
    fall = min(1.0, (options.steps - step) / (0.4 * options.steps))
    return options.learning_rate * min(rise, max(fall, 0.02))


def compute_losses(
    model: VisualGLMForConditionalGeneration,
    examiner: Examiner,
    image_processor: VisualGLMImageProcessor,
    batch: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of the exam, that of the answers (0 while the eyes learn alone), and the exam's marks."""
    features = model.get_image_features(normalise(batch["pixels"], image_processor), return_dict=True)
    exam, marks = examiner(
        features.last_hidden_state,
        features.pooler_output,
        batch["patch_labels"],
        batch["picture_labels"],
    )
    words, num_words = torch.zeros(()), 0
    for group in batch.get("groups", ()):
        words = words + word_loss(model, features.pooler_output, group)
        num_words += int((group["labels"] != -100).sum())
    return exam, words / max(1, num_words), marks


def word_loss(
    model: VisualGLMForConditionalGeneration, soft_prompts: torch.Tensor, group: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the summed cross-entropy of the answers of some dialogues; `soft_prompts` are those of the whole batch."""
    labels = group["labels"]
    logits = model(
        input_ids=group["input_ids"],
        attention_mask=group["attention_mask"],
        image_embeds=soft_prompts[group["picture_rows"]] if len(group["picture_rows"]) else None,
        logits_to_keep=labels.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def save_checkpoint(path: Path, step: int, seconds: float, *parts) -> None:
    """Write what a run needs to go on; the file appears whole or not at all."""
    state = {"step": step, "seconds": seconds, "parts": [part.state_dict() for part in parts]}
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path, *parts) -> tuple[int, float]:
    """Restore a run; return the next step and the seconds spent, both 0 if there is no checkpoint."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for part, part_state in zip(parts, state["parts"], strict=True):
        part.load_state_dict(part_state)
    return state["step"], state["seconds"]


def train(options: argparse.Namespace) -> None:
    """Train from scratch or from the last checkpoint, then save the model folder."""
    output = Path(options.output)
    tokenizer = write_tokenizer(output)
    image_processor = VisualGLMImageProcessor()
    model = build_model(build_config(tokenizer), options.seed)
    examiner = Examiner(model.config)
    parameters = [*model.parameters(), *examiner.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    checkpoint = output.with_name(output.name + ".checkpoint.pt")
    first_step, seconds = load_checkpoint(checkpoint, model, examiner, optimizer)

    data = TrainingData(tokenizer, options.seed, options.batch_size, first_step, options.vision_steps)
    batches = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
    model.train()
    start = time.monotonic() - seconds
    average = torch.full((len(EXAM),), 0.2)
    progress = tqdm(range(first_step, options.steps), initial=first_step, total=options.steps, mininterval=10)
    for step in progress:
        exam, words, marks = compute_losses(model, examiner, image_processor, next(batches))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.zero_grad()
        (options.exam_weight * exam + words if step >= options.vision_steps else exam).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average = 0.98 * average + 0.02 * marks
        if (step + 1) % LOG_INTERVAL == 0:
            shown = " ".join(f"{name} {mark:.2f}" for name, mark in zip(EXAM, average.tolist(), strict=True))
            progress.write(f"{step + 1}: exam {exam.item():.3f}, answers {words.item():.3f}, right: {shown}")
        if (step + 1) % CHECKPOINT_INTERVAL == 0:
            save_checkpoint(checkpoint, step + 1, time.monotonic() - start, model, examiner, optimizer)
    model.half().save_pretrained(output)
    write_files(output, model.config, tokenizer)
    record = {name: getattr(options, name) for name in ("seed", "steps", "vision_steps", "batch_size", "learning_rate")}
    record |= {"minutes": round((time.monotonic() - start) / 60, 1), "threads": options.threads}
    record |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)


def write_files(output: Path, config: VisualGLMConfig, tokenizer: ChatGLMTokenizer) -> None:
    """Write everything beside the weights: code, configuration, tokenizer, processor, and greedy short answers."""
    write_description(output, config, tokenizer)
    text = config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
        min_length=0,
    ).save_pretrained(output)


def refresh(options: argparse.Namespace) -> None:
    """Copy today's code and configuration beside weights that are trained already."""
    output = Path(options.output)
    write_files(output, VisualGLMConfig.from_pretrained(output), ChatGLMTokenizer.from_pretrained(output))


# ---------------------------------------------------------------- evaluation


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
        again = pick(generator, tiny_world.REPEAT[language])
        dialogues.append(Dialogue("repeat", language, pairs[:1], again, pairs[0][1], (number,), (0,)))
    return dialogues


def text_examination(language: str) -> list[Dialogue]:
    """Return every question that is asked without a picture."""
    exchanges = [*tiny_world.small_talk(language), *tiny_world.blind_exchanges(language)]
    return [Dialogue(each.kind, language, (), each.question, each.answer) for each in exchanges]


@torch.inference_mode()
def answer_all(
    model: VisualGLMForConditionalGeneration,
    processor: VisualGLMProcessor,
    scenes: list[Scene],
    dialogues: list[Dialogue],
    batch_size: int,
    **options,
) -> list[str]:
    """Return the model's answers, greedy unless `options` for `generate` say otherwise."""
    embeds = []
    for first in range(0, len(scenes), batch_size):
        pictures = [tiny_world.draw(scene) for scene in scenes[first : first + batch_size]]
        pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
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


def evaluate(options: argparse.Namespace) -> dict:
    """Return exact-match accuracy per split, language and kind of question on pictures not seen in training."""
    model = VisualGLMForConditionalGeneration.from_pretrained(options.output, dtype=torch.float32).eval()
    register()  # the processor looks its parts up by name; the folder's own code is the same
    processor = VisualGLMProcessor.from_pretrained(options.output)
    results: dict = {"pictures": options.pictures, "seed": options.seed}
    for split in ("new pictures", "new combinations"):
        scenes = [tiny_world.sample_scene(number, split) for number in range(options.pictures)]
        dialogues = []
        for language in tiny_world.LANGUAGES:
            generator = np.random.default_rng((options.seed, 7))
            dialogues += examination(scenes, language, generator) + text_examination(language)
        answers = answer_all(model, processor, scenes, dialogues, batch_size=64)
        results[split] = tabulate(dialogues, answers)
        report_mistakes(dialogues, answers)
    return results


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


# ---------------------------------------------------------------- model card

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
    columns = [(split, language) for split in ("new pictures", "new combinations") for language in tiny_world.LANGUAGES]
    names = {"zh": "Chinese", "en": "English"}
    lines = ["| question | " + " | ".join(f"{split}, {names[language]}" for split, language in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    kinds = list(results[columns[0][0]][columns[0][1]])
    for kind in [*(kind for kind in kinds if kind != "all"), "all"]:
        cells = " | ".join(f"{100 * results[split][language][kind]:.1f} %" for split, language in columns)
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(lines)


def write_card(options: argparse.Namespace, results: dict) -> None:
    """Write the model card, README.md, from the model, the record of its training and the measured accuracy."""
    output = Path(options.output)
    record = json.loads((output / "training.json").read_text(encoding="utf-8"))
    model = VisualGLMForConditionalGeneration.from_pretrained(output)
    config = model.config
    names = ("seed", "steps", "vision_steps", "batch_size", "threads")
    command = "python -m tools.tiny --output models/visualglm-tiny " + " ".join(
        f"--{name.replace('_', '-')} {record[name]}" for name in names
    )
    card = CARD.format(
        **record,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        megabytes=(output / "model.safetensors").stat().st_size / 1e6,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(background[2] for background in tiny_world.BACKGROUNDS.values()),
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
