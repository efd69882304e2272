"""Conversations to training examples, and examples to batches. The loss is on answers alone.

A conversation gives one example for each of its answers: `[gMASK]<sop>` occurs once in a sequence of GLM, so what comes
before an answer is all context. Lengths count as in the original: a source of pictures and words with its `[gMASK]`,
a target of words with `<sop>` and `<eop>`. What is longer loses its end. A source of several turns loses its oldest
ones first, as many as it must and with their pictures, and then what the system said.

Not here: what a prompt looks like (`visualglm_hf.conversation`, through the processor's chat template).
"""

import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from jinja2 import TemplateError

from visualglm_hf.processing_visualglm import VisualGLMProcessor
from visualglm_tools.messages import shown
from visualglm_tools.training.dataset import Conversation, Picture, digest_picture, load_picture


IGNORED = -100  # as a label: no loss here
NAMED = 10  # questions with several answers, and rows with one of these
MIN_TARGET_LENGTH = 3  # <sop>, a token, <eop>


@dataclass(frozen=True)
class Example:
    """One answer in its context.

    Attributes:
        input_ids: of context and answer.
        labels: the same, `IGNORED` in the context.
        pictures: that are shown in `input_ids`.
        conversation: all of it, whatever was left out.
        source_length, target_length: tokens before anything was left out.
        left_out: messages, and `is_cut`: whether the source has lost its end, too.
    """

    input_ids: list[int]
    labels: list[int]
    pictures: tuple[Picture, ...]
    conversation: Conversation
    source_length: int
    target_length: int
    left_out: int = 0
    is_cut: bool = False

    @property
    def prompt_ids(self) -> list[int]:
        """The context up to `<sop>`, from which the answer is generated."""
        return self.input_ids[: next(index for index, label in enumerate(self.labels) if label != IGNORED) + 1]


@dataclass(frozen=True)
class Encoder:
    """Makes examples of conversations.

    Attributes:
        processor: tokenizes, and knows the prompt grammar.
        max_source_length: tokens of the context with its pictures and `[gMASK]`.
        max_target_length: tokens of the answer with `<sop>` and `<eop>`.
        max_length: tokens that the model takes at all.
        english: whether to prompt with `Q:`/`A:`; None: as the question's language says, which is what `chat` does.

    Raises:
        ValueError: lengths that leave no room for an answer.
    """

    processor: VisualGLMProcessor
    max_source_length: int
    max_target_length: int
    max_length: int
    english: bool | None = None

    def __post_init__(self):
        if self.max_target_length < MIN_TARGET_LENGTH:
            raise ValueError(
                f"--max_target_length {self.max_target_length} leaves no token to train on: an answer needs at least "
                f"{MIN_TARGET_LENGTH}, of which two are <sop> and <eop>."
            )
        if self.max_source_length + self.max_target_length > self.max_length:
            raise ValueError(
                f"--max_source_length {self.max_source_length} and --max_target_length {self.max_target_length} are "
                f"more than the {self.max_length} tokens that the model takes; they must not be more in all."
            )

    def __call__(self, conversation: Conversation) -> list[Example]:
        """One example for each answer.

        Raises:
            ValueError: a picture does not fit into the source, an answer has no token, or the prompt grammar refuses
                a message.
        """
        ends = [index + 1 for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        examples = []
        for end in ends:
            messages = conversation.messages[:end]
            pictures = conversation.pictures[: count_pictures(messages)]
            part = Conversation(conversation.source, messages, pictures)
            examples.append(self.encode(part))
        return examples

    def encode(self, conversation: Conversation) -> Example:
        """Encode the last answer of a conversation."""
        whole, target = self.tokenize(conversation)
        if not target:
            raise ValueError(f"the answer {shown(conversation.answer)} has no token to train on.")
        tokenizer, image_token_id = self.processor.tokenizer, self.processor.image_token_id
        recent = conversation if self.has_room_for(whole) else self.leave_out(conversation)
        source = whole if recent is conversation else self.tokenize(recent)[0]
        kept = source[: self.max_source_length - 1]
        if kept.count(image_token_id) != source.count(image_token_id):
            raise ValueError(
                f"--max_source_length {self.max_source_length} would cut a picture; {self.room_for(len(source) + 1)}"
            )
        answer = [tokenizer.bos_token_id, *target[: self.max_target_length - 2], tokenizer.eos_token_id]
        context = [*kept, tokenizer.gmask_token_id]
        return Example(
            [*context, *answer],
            [IGNORED] * len(context) + answer,
            recent.pictures,
            conversation,
            len(whole) + 1,
            len(target) + 2,
            len(conversation.messages) - len(recent.messages),
            not self.has_room_for(source),
        )

    def has_room_for(self, source: list[int]) -> bool:
        return len(source) < self.max_source_length  # with [gMASK]

    def leave_out(self, conversation: Conversation) -> Conversation:
        """The conversation without as many of its oldest turns as must be left out, its last question at the least."""
        shorter = list(shortened(conversation))
        place = bisect_left(
            shorter, True, hi=len(shorter) - 1, key=lambda each: self.has_room_for(self.tokenize(each)[0])
        )
        return shorter[place]

    def room_for(self, source_length: int) -> str:
        """What to do about a source that must not be cut."""
        room = self.max_length - source_length
        if room < MIN_TARGET_LENGTH:
            return (
                f"this row has {source_length} tokens before its answer, and the model takes {self.max_length} in all; "
                "shorten it, or show fewer pictures."
            )
        shorter = f" with --max_target_length {room}" if room < self.max_target_length else ""
        return f"this row needs up to {source_length}{shorter}."

    def tokenize(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """The ids before `[gMASK]<sop>`, and those between it and `<eop>`."""
        try:
            text = self.processor.apply_chat_template(list(conversation.messages), tokenize=False, english=self.english)
        except TemplateError as error:
            raise ValueError(str(error)) from error
        ids = self.processor.tokenize([text], [len(conversation.pictures)])["input_ids"][0]
        start = ids.index(self.processor.tokenizer.bos_token_id)
        return ids[: start - 1], ids[start + 1 : -1]


def shortened(conversation: Conversation) -> Iterator[Conversation]:
    """A conversation without its oldest turn, its two oldest, and so on; the last of all without the system message."""
    messages, begin = conversation.messages, 0
    if messages[0]["role"] == "system":
        begin = 1
    yield conversation
    for end in range(begin + 2, len(messages) - 1, 2):
        yield without(conversation, range(begin, end))
    if begin:
        yield without(conversation, range(len(messages) - 2))


def without(conversation: Conversation, numbers: range) -> Conversation:
    """A conversation without some messages, and the pictures of these."""
    gone = conversation.messages[numbers.start : numbers.stop]
    messages = conversation.messages[: numbers.start] + conversation.messages[numbers.stop :]
    return replace(conversation, messages=messages, pictures=conversation.pictures[count_pictures(gone) :])


def count_pictures(messages: Iterable[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def describe_truncation(examples: Iterable[Example], encoder: Encoder) -> str | None:
    """Say how many examples lose their end or their oldest turns, and what to do about it; None if all are whole.

    The advice can be followed: lengths at which none would, or else which row is too long for the model.
    """
    examples = list(examples)
    sources = sum(example.is_cut for example in examples)
    targets = sum(example.target_length > encoder.max_target_length for example in examples)
    losses = [describe_left_out(examples)] if any(example.left_out for example in examples) else []
    if sources or targets:
        are = (
            f"{sources} source(s) and {targets} target(s) of {len(examples)} examples are too long and lose their ends"
        )
        losses.insert(0, are)
    if not losses:
        return None
    source = max(examples, key=lambda example: example.source_length)
    target = max(examples, key=lambda example: example.target_length)
    counts = "; ".join(losses)
    if source.source_length + target.target_length <= encoder.max_length:
        return f"{counts}; none would with {describe_lengths(source.source_length, target.target_length, encoder)}."
    return (
        f"{counts}; no lengths would keep all, since the model takes {encoder.max_length} tokens for both. Shorten the "
        f"longest: {source.conversation.source} has a source of {source.source_length}, {target.conversation.source} a "
        f"target of {target.target_length}."
    )


def describe_lengths(source: int, target: int, encoder: Encoder) -> str:
    """The options that give sources and targets these lengths: those that must be longer alone, if there is room."""
    options = {"--max_source_length": source, "--max_target_length": target}
    given = {"--max_source_length": encoder.max_source_length, "--max_target_length": encoder.max_target_length}
    longer = {name: length for name, length in options.items() if length > given[name]}
    fits = sum((given | longer).values()) <= encoder.max_length
    return " ".join(f"{name} {length}" for name, length in (longer if fits else options).items())


def describe_left_out(examples: Iterable[Example]) -> str:
    """Say how many examples have lost messages and pictures, and how many of them all pictures that they had."""
    shorter = [example for example in examples if example.left_out]
    messages = sum(example.left_out for example in shorter)
    pictures = sum(len(example.conversation.pictures) - len(example.pictures) for example in shorter)
    blind = sum(bool(example.conversation.pictures) and not example.pictures for example in shorter)
    line = f"{len(shorter)} example(s) lose the oldest turns of their conversations, {messages} messages in all"
    line += f" with {pictures} picture(s)" if pictures else ""
    return f"{line}; {blind} of them have no picture left to answer by" if blind else line


def describe_contradictions(examples: Iterable[Example]) -> str | None:
    """Name the rows that ask the same of the same pictures and have different answers; None if there are none."""
    digest_once, asked = cache(digest_picture), defaultdict(dict)
    for example in examples:
        if example.pictures:
            question = (tuple(example.prompt_ids), *map(digest_once, example.pictures))
            asked[question].setdefault(tuple(example.labels), example.conversation.source)
    several = [first_few(list(answers.values())) for answers in asked.values() if len(answers) > 1]
    if not several:
        return None
    more = f"; and {len(several) - NAMED} more" if len(several) > NAMED else ""
    return (
        f"{len(several)} question(s) about the same picture have different answers, of which at most one can be "
        f"learned: {'; '.join(several[:NAMED])}{more}."
    )


def first_few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def digest(examples: Iterable[Example]) -> str:
    """By which to know the same rows and pictures again."""
    total, digest_once = hashlib.sha256(), cache(digest_picture)
    for example in examples:
        total.update(repr((example.input_ids, example.labels)).encode())
        for picture in example.pictures:
            total.update(digest_once(picture))
    return total.hexdigest()


def count_shared(examples: Iterable[Example], trained: Iterable[Example], by_question: bool = False) -> int:
    """How many of the examples, or of their questions alone, are trained on too, whatever their pictures are called."""
    digest_once, examples = cache(digest_picture), list(examples)

    def text_of(example: Example) -> tuple[int, ...]:
        return tuple(example.prompt_ids if by_question else example.input_ids)

    def identity(example: Example) -> tuple:
        return (text_of(example), *map(digest_once, example.pictures))

    texts = {text_of(example) for example in examples}
    known = {identity(example) for example in trained if text_of(example) in texts}
    return sum(identity(example) in known for example in examples) if known else 0


class Collator:
    """Examples to the model's inputs: padded on the left, pictures opened."""

    def __init__(self, processor: VisualGLMProcessor):
        self.processor = processor

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` [B, S], and `pixel_values` if there are pictures."""
        batch = self.pad([example.input_ids for example in examples])
        batch["labels"] = pad_left([example.labels for example in examples], IGNORED)
        return batch | self.open_pictures(examples)

    def prompts(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """The same without the answers, for `generate`."""
        return self.pad([example.prompt_ids for example in examples]) | self.open_pictures(examples)

    def pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        mask = pad_left([[1] * len(row) for row in rows], 0)
        return {"input_ids": pad_left(rows, self.processor.tokenizer.pad_token_id), "attention_mask": mask}

    def open_pictures(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        pictures = [load_picture(picture) for example in examples for picture in example.pictures]
        return dict(self.processor.image_processor(pictures, return_tensors="pt")) if pictures else {}


def pad_left(rows: list[list[int]], value: int) -> torch.Tensor:
    """[B, S] of rows of different length."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])
