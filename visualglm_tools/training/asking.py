"""What shall not be forgotten, if nobody says it: ordinary questions, and what the model answers before it is trained.

The answers are rows as `--keep-data` takes them, in a file of the run's folder: a run that is resumed, and other runs,
find them there.

Not here: how the answers are kept (`keeping.py`).
"""

import base64
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import Trainer

from visualglm_tools.tables import PictureInTable
from visualglm_tools.training.dataset import UNKNOWN, Conversation, Picture, assistant_message, read_dataset
from visualglm_tools.training.drawing import draw_nothing
from visualglm_tools.training.encoding import Collator, Encoder, Example
from visualglm_tools.training.keeping import KeepAnswers, switched_off
from visualglm_tools.training.output import KEPT, written
from visualglm_tools.training.settings import Settings


ABOUT_PICTURES = (
    "描述这张图片。",
    "Describe the image.",
    "这张图片可能是在什么场所拍摄的？",
    "What is in the background?",
    "图片中有什么？",
    "What color is it?",
    "它是什么形状？",
    "Where is it?",
    "它在哪里？",
    "How many are there?",
    "背景是什么？",
    "What shape is it?",
    "它是什么颜色的？",
    "Where was this picture taken?",
    "有几个？",
    "What is in the picture?",
)
IN_WORDS = (
    "你好",
    "Hello",
    "你是谁？",
    "What is your name?",
    "你能做什么？",
    "What can you do?",
    "谢谢！",
    "Thank you",
    "再见！",
    "Goodbye",
)
DRAWN, BETWEEN = 20, 3  # pictures that show nothing: one to so many pictures that are trained on
AT_ONCE = 8  # questions
SHARE_OF_ASKING = 0.25  # of a run's time, at most
SHARE_OF_WAITING = 0.5  # of the time after which processes take another one for dead


def ordinary_questions(trained: Iterable[Example]) -> list[Conversation]:
    """Questions that are asked of anything, in words and about the pictures that are trained on.

    Each picture comes with one question, then each with its next one, and so on. What is trained on is not asked: that
    answer shall change. Between them come the trained questions about pictures that show nothing: where they are not
    learned from, the answers shall stay as well.
    """
    trained = list(trained)
    pictures = list(dict.fromkeys(picture for example in trained for picture in example.pictures))
    taught = dict.fromkeys(example.conversation.question.strip() for example in trained)
    about_pictures = list(dict.fromkeys(each.conversation.question.strip() for each in trained if each.pictures))
    questions = itertools.islice(itertools.cycle(about_pictures), DRAWN)  # none if all are in words
    drawn = [(draw_nothing(number), question) for number, question in enumerate(questions)]
    asked = [(None, question) for question in IN_WORDS if question not in taught]
    for turn in range(len(ABOUT_PICTURES)):
        for number, picture in enumerate(pictures):
            question = ABOUT_PICTURES[(turn + number) % len(ABOUT_PICTURES)]
            asked += [(picture, question)] if question not in taught else []
            if number % BETWEEN == 0 and drawn:
                asked.append(drawn.pop(0))
    return [conversation_of(picture, question) for picture, question in asked]


def conversation_of(picture: Picture | None, question: str) -> Conversation:
    """A question about a picture, or in words, whose answer is not known yet."""
    pictures = () if picture is None else (picture,)
    asked = {"role": "user", "content": [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]}
    return Conversation(f"the question {question!r}", (asked, assistant_message(UNKNOWN)), pictures)


def choose_kept(
    trainer: KeepAnswers,
    settings: Settings,
    trained: Sequence[Example],
    given: Sequence[Example],
    encoder: Encoder,
    say: Callable[[str], None],
) -> list[Example]:
    """Find out which answers a run keeps, and have its trainer keep them.

    Args:
        trainer: with its model, untrained or not.
        settings: of the run, resolved.
        trained: what is trained on.
        given: what is kept in any case; the model answers what has no answer yet.
        encoder: makes examples.
        say: called with each line that the user should read.

    Returns:
        What is kept.

    Raises:
        ValueError: a row that the model says nothing to; answers of a resumed run that are gone; no room for them.
    """
    if not settings.keeps_answers:
        return []
    if is_divided(trainer):
        say("No answers are kept: the model is divided among processes.")
        return []
    file = settings.save / KEPT / "answers.jsonl"
    # The run's random numbers are the same whether the model was asked now or, in a run that is resumed, before.
    with trainer.args.main_process_first(local=False, desc="asking the model"), torch.random.fork_rng():
        if not file.exists():
            if settings.resume:
                raise ValueError(f"{file} is gone, whose answers the run has kept. Begin again, with another --save.")
            asker = Asker(trainer.model, encoder, trainer.data_collator, say)
            kept = asker.answer_all(given)
            if settings.asks_itself:
                seconds = SHARE_OF_ASKING * estimate_seconds(trainer, settings, trained)
                if trainer.args.world_size > 1:
                    seconds = min(seconds, SHARE_OF_WAITING * trainer.args.ddp_timeout)
                kept += asker.ask_ordinary(trained, settings.keep_questions, seconds)
            with written(settings.save, file.name):
                write_rows(kept, file)
        if not file.stat().st_size:
            return []
        kept = [row[-1] for row in read_dataset([file], encoder)]  # a conversation's earlier answers are rows, too
        say(f"Keeping {len(kept)} answers; they are in {file}.")
        predictions = file.with_name("predictions.safetensors")
        with written(settings.save, predictions.name):
            trainer.keep_answers(kept, trainer.data_collator, settings.keep_rows, settings.keep_weight, predictions)
    return kept


def estimate_seconds(trainer: Trainer, settings: Settings, trained: Sequence[Example]) -> float:
    """How long a run will take without keeping anything, by one micro-batch after another that warms up."""
    batch = trainer.data_collator(list(trained[: settings.batch_size]))
    batch = {name: tensor.to(trainer.model.device) for name, tensor in batch.items()}
    if trainer.args.gradient_checkpointing:  # as the trainer does when it begins
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    for _ in range(2):
        begin = perf_counter()
        with trainer.compute_loss_context_manager():
            loss = trainer.model(**batch).loss
        loss.backward()
        trainer.model.zero_grad()
        seconds = perf_counter() - begin
    return seconds * settings.train_iters * settings.gradient_accumulation_steps


def is_divided(trainer: Trainer) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


class Asker:
    """Asks a model, as it is without its adapter, and says how it goes.

    Args:
        model: with its adapter.
        encoder, collator: make prompts of questions.
        say: called with each line that the user should read.
    """

    def __init__(self, model: PeftModel, encoder: Encoder, collator: Collator, say: Callable[[str], None]):
        self.model, self.encoder, self.collator, self.say = model, encoder, collator, say

    def answer_all(self, examples: Sequence[Example]) -> list[Conversation]:
        """Answer what has no answer yet.

        Raises:
            ValueError: names each row to which the model says nothing.
        """
        unknown = [example for example in examples if not example.conversation.is_answered]
        if unknown:
            self.say(f"Asking the model for {len(unknown)} of {len(examples)} answers that are kept.")
        answers = iter(self.ask([example.conversation for example in unknown], show=bool(unknown)))
        known = [example.conversation if example.conversation.is_answered else next(answers) for example in examples]
        silent = [conversation.source for conversation in known if not conversation.answer]
        if silent:
            raise ValueError(
                f"the model says nothing to {len(silent)} row(s) of --keep-data: {', '.join(silent[:10])}. Give them "
                "labels, or leave them out."
            )
        return known

    def ask_ordinary(self, trained: Sequence[Example], count: int | None, seconds: float) -> list[Conversation]:
        """Ask ordinary questions about what is trained on, and in words.

        Args:
            trained: the examples.
            count: of the questions; None: as many as take so many `seconds`, by the time that the first ones take.
            seconds: see `count`.
        """
        questions, answered = ordinary_questions(trained), []
        if not questions:
            self.say("All ordinary questions are trained on, so none is asked: --keep-data keeps rows of yours.")
            return []
        if count is None:
            self.ask(questions[:1])  # the first call of a model takes longer
            begin = perf_counter()
            answered = self.ask(questions[:AT_ONCE])
            count = min(int(len(answered) * seconds / (perf_counter() - begin)), len(questions))
            self.say(describe_plan(count, seconds))
        rest = questions[len(answered) : count]
        answered = [*answered[:count], *self.ask(rest, show=bool(rest))]
        return [conversation for conversation in answered if conversation.answer]

    def ask(self, questions: Sequence[Conversation], show: bool = False) -> list[Conversation]:
        """Answer questions; an answer may be empty."""
        answered = []
        bar = tqdm(total=len(questions), desc="asking the model", disable=not show, unit=" questions")
        with bar, torch.inference_mode(), switched_off(self.model) as base:
            for first in range(0, len(questions), AT_ONCE):
                part = questions[first : first + AT_ONCE]
                texts = say_greedily(base, self.encoder, self.collator, part)
                answered += [question.with_answer(text) for question, text in zip(part, texts, strict=True)]
                bar.update(len(part))
        return answered


def describe_plan(count: int, seconds: float) -> str:
    if not count:
        return (
            "The run is too short to ask the model anything before it, so nothing is kept: --keep-questions N asks "
            "anyway, --keep-data keeps rows of yours."
        )
    return (
        f"Asking the model {count} ordinary questions, so that training keeps its answers; that takes at most "
        f"{seconds:.0f} s, a quarter of the run's time. --keep none leaves it out."
    )


def say_greedily(
    model: torch.nn.Module, encoder: Encoder, collator: Collator, questions: Sequence[Conversation]
) -> list[str]:
    """What a model says where each answer begins."""
    prompts = collator.prompts([encoder.encode(question) for question in questions])
    prompts = {name: tensor.to(model.device) for name, tensor in prompts.items()}
    said = model.generate(**prompts, do_sample=False, max_new_tokens=encoder.max_target_length - 1)
    answers = said[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in collator.processor.post_process_image_text_to_text(answers)]


def write_rows(conversations: Iterable[Conversation], file: Path) -> None:
    """Write conversations as rows with `messages`, whole or not at all.

    Pictures are in their messages' parts, by their paths or, if they have none, as text: there `<image>` in a text is
    text.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    # A name that is no UTF-8 has halves of characters in Python, which JSON escapes just so.
    with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for conversation in conversations:
            stream.write(json.dumps({"messages": with_names(conversation)}, ensure_ascii=False) + "\n")
    unfinished.replace(file)


def with_names(conversation: Conversation) -> list[dict]:
    """The messages of a conversation, each of whose parts that is a picture names it."""
    names = map(name_of, conversation.pictures)
    return [
        message
        | {
            "content": [
                part | {"image": next(names)} if part["type"] == "image" else part for part in message["content"]
            ]
        }
        for message in conversation.messages
    ]


def name_of(picture: Picture) -> str:
    if isinstance(picture, Path):
        return str(picture.resolve())
    if isinstance(picture, PictureInTable):
        picture = picture.read_bytes()
    return base64.b64encode(picture).decode() if isinstance(picture, bytes) else picture
