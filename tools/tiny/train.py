"""The training of the tiny model: first the eyes alone, by easy questions, then the whole model in words.

A run that was stopped goes on from its last checkpoint, and computes what it would have computed. Not here: what it
sees (`data.py`), and how much it has learned (`exam.py`).
"""

import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tools.tiny.data import TrainingData, normalise
from tools.tiny.examiner import Examiner, FourthExaminer, SecondExaminer, ThirdExaminer
from tools.tiny.folder import write_files
from tools.tiny.lessons import FourthLessons, SecondLessons, ThirdLessons
from tools.tiny.model import build_config, build_model, take_over
from tools.tiny.options import Options
from tools.tiny.tokenizer import write_tokenizer
from visualglm_hf import ChatGLMTokenizer, VisualGLMForConditionalGeneration, VisualGLMImageProcessor


CHECKPOINT_INTERVAL = 250  # steps
LOG_INTERVAL = 100
EXAMINERS = {
    "first": Examiner,
    "second": SecondExaminer,
    "third": ThirdExaminer,
    "fourth": FourthExaminer,
}
LESSONS = {"second": SecondLessons, "third": ThirdLessons, "fourth": FourthLessons}


def learning_rate(step: int, options: Options) -> float:
    """Rise for 100 steps, again when the words begin; stay; fall to a fiftieth over the last 40 percent."""
    rise = min(1.0, ((step - options.vision_steps if step >= options.vision_steps else step) + 1) / 100)
    fall = min(1.0, (options.steps - step) / (0.4 * options.steps))
    return options.learning_rate * min(rise, max(fall, 0.02))


def compute_losses(
    model: VisualGLMForConditionalGeneration,
    examiner: nn.Module,
    image_processor: VisualGLMImageProcessor,
    batch: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of the exam, that of the answers (0 while the eyes learn alone), and the exam's marks."""
    features = model.get_image_features(normalise(batch["pixels"], image_processor), return_dict=True)
    exam, marks = examiner(features.last_hidden_state, features.pooler_output, batch)
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


def lessons_of(options: Options, tokenizer: ChatGLMTokenizer, first_step: int) -> TrainingData:
    """Return the batches from `first_step` on."""
    settings = (tokenizer, options.seed, options.batch_size, first_step, options.vision_steps)
    if options.lessons == "first":
        return TrainingData(*settings)
    return LESSONS[options.lessons](*settings, font=options.font)


def train(options: Options) -> None:
    """Train from first weights, from another model's or from the last checkpoint, then save the model folder."""
    output = options.output
    tokenizer = write_tokenizer(output)
    image_processor = VisualGLMImageProcessor()
    model = build_model(build_config(tokenizer), options.seed)
    if options.start is not None:
        take_over(model, tokenizer, options.start)
    examiner = EXAMINERS[options.lessons](model.config)
    parameters = [*model.parameters(), *examiner.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    checkpoint = output.with_name(output.name + ".checkpoint.pt")
    first_step, seconds = load_checkpoint(checkpoint, model, examiner, optimizer)

    data = lessons_of(options, tokenizer, first_step)
    batches = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
    model.train()
    start = time.monotonic() - seconds
    average = torch.full((len(examiner.names),), 0.2)
    last_step = min(options.steps, options.last_step or options.steps)
    progress = tqdm(range(first_step, last_step), initial=first_step, total=last_step, mininterval=10)
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
            shown = " ".join(f"{name} {mark:.2f}" for name, mark in zip(examiner.names, average.tolist(), strict=True))
            progress.write(f"{step + 1}: exam {exam.item():.3f}, answers {words.item():.3f}, right: {shown}")
        if (step + 1) % CHECKPOINT_INTERVAL == 0:
            save_checkpoint(checkpoint, step + 1, time.monotonic() - start, model, examiner, optimizer)
    model.half().save_pretrained(output)
    write_files(output, model.config, tokenizer)
    write_record(output, options, time.monotonic() - start)
    checkpoint.unlink(missing_ok=True)


def write_record(output: Path, options: Options, seconds: float) -> None:
    """Write down how a model was trained, for its card."""
    names = ("lessons", "seed", "steps", "last_step", "vision_steps", "batch_size", "learning_rate")
    record = {name: getattr(options, name) for name in names}
    if options.start is not None:
        record["start"] = first_record_of(options.start)
    record |= {"minutes": round(seconds / 60, 1), "threads": options.threads}
    record |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def first_record_of(folder: Path) -> dict:
    """Return the record of the model that a training began with."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))
