"""A device whose memory is too small: which options would take less of it, and how much less, computed.

Not here: how it is computed (`memory.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from visualglm_hf.configuration_visualglm import VisualGLMConfig
from visualglm_tools.benchmarking.timing import free_memory
from visualglm_tools.printing import first_line
from visualglm_tools.training.adapters import choose_adapter, dtype_of
from visualglm_tools.training.encoding import MIN_TARGET_LENGTH, Example
from visualglm_tools.training.memory import Step, estimate_most, in_words
from visualglm_tools.training.settings import LORA, NONE, Settings


CPU_ALLOCATOR = "DefaultCPUAllocator"  # of torch, which has no class of its own for its errors
FEWEST_TOKENS = 2 * MIN_TARGET_LENGTH  # of answers that are worth being made shorter
WORTH_SAYING = 0.01  # of what a step takes
SMALL_PART = 0.1  # of free memory


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest examples, cut as they are trained on: in all, and of an answer.

    The same of those that are kept; 0 where these are not known, and taken to be as the others.
    """

    longest: int
    answer: int
    kept_longest: int = 0
    kept_answer: int = 0

    def with_answers_of(self, most: int) -> "Lengths":
        """The lengths if no answer has more than so many tokens."""
        answer, kept = min(self.answer, most), min(self.kept_answer, most)
        return Lengths(self.longest - self.answer + answer, answer, self.kept_longest - self.kept_answer + kept, kept)


def lengths_of(examples: Sequence[Example], settings: Settings, kept: Sequence[Example] = ()) -> Lengths:
    def longest(of: Sequence[Example]) -> tuple[int, int]:
        answer = max((min(example.target_length, settings.max_target_length) for example in of), default=0)
        return max((len(example.input_ids) for example in of), default=0), answer

    return Lengths(*longest(examples), *longest(kept))


def step_of(settings: Settings, config: VisualGLMConfig, lengths: Lengths) -> Step:
    """What a step of some resolved settings has to hold."""
    bits = settings.bits or 4 if settings.method == "qlora" else 0
    return Step(
        choose_adapter(settings, config),
        settings.batch_size,
        lengths.longest,
        -(-settings.keep_rows // settings.gradient_accumulation_steps) if settings.keeps_answers else 0,
        lengths.kept_answer or lengths.answer,
        config.quantization_bit or bits,
        settings.checkpoint_activations,
        dtype_of(settings.precision),
        lengths.kept_longest or lengths.longest,
    )


def remedies(settings: Settings, lengths: Lengths, on_gpu: bool) -> Iterator[tuple[str, Settings, Lengths]]:
    """What may take less memory than some resolved settings, and has not been done yet: options, and what they give."""
    rows = settings.batch_size * settings.gradient_accumulation_steps
    if not settings.checkpoint_activations and settings.method in LORA:
        yield "--checkpoint-activations", replace(settings, checkpoint_activations=True), lengths
    if settings.batch_size > 1:
        one = replace(settings, batch_size=1, gradient_accumulation_steps=rows)
        yield f"--batch-size 1 --gradient-accumulation-steps {rows}", one, lengths
    if settings.keeps_answers:
        yield "--keep-rows 1", replace(settings, keep_rows=1), lengths
        yield "--keep none", replace(settings, keep=NONE, keep_data=()), lengths
    if settings.method != "qlora":
        yield "--use_qlora", replace(settings, method="qlora", bits=None), lengths
    elif settings.bits == 8:
        yield "--bits 4", replace(settings, bits=4), lengths
    if settings.precision == "float32":
        yield "--fp16" if on_gpu else "--bf16", replace(settings, precision="bfloat16"), lengths
    longest = max(lengths.answer, lengths.kept_answer)
    if longest > FEWEST_TOKENS:
        half = longest // 2
        shorter = lengths.with_answers_of(half)
        yield f"--max_target_length {half}", replace(settings, max_target_length=half), shorter


def describe_remedies(settings: Settings, config: VisualGLMConfig, lengths: Lengths, on_gpu: bool) -> str:
    """What a step takes, and by how much which options would make that less, the best ones first."""
    total = estimate_most(config, step_of(settings, config, lengths)).total
    saved = {
        text: total - estimate_most(config, step_of(changed, config, shorter)).total
        for text, changed, shorter in remedies(settings, lengths, on_gpu)
    }
    best = sorted(saved, key=saved.get, reverse=True)
    told = [f"{text} takes {in_words(saved[text])} less" for text in best if saved[text] > WORTH_SAYING * total]
    return f"A step takes {in_words(total)}, computed. " + (f"{'; '.join(told)}." if told else "No option takes less.")


@contextmanager
def explained_memory(
    settings: Settings,
    config: VisualGLMConfig,
    examples: Sequence[Example],
    device: torch.device,
    kept: Callable[[], Sequence[Example]] = tuple,
) -> Iterator[None]:
    """Make of a device's error that its memory is too small one that says what would take less, and how much less.

    Args:
        settings, config: of the run and its model.
        examples: that are trained on.
        device: of the model.
        kept: gives the examples whose answers are kept, as far as they are known when the error comes.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = describe_remedies(settings, config, lengths_of(examples, settings, kept()), device.type != "cpu")
        raise ValueError(f"The memory of the device is too small: {first_line(error)} {remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or CPU_ALLOCATOR in str(error)


def foresee_memory(
    settings: Settings,
    config: VisualGLMConfig,
    examples: Sequence[Example],
    model: torch.nn.Module,
    kept: Sequence[Example] = (),
) -> str | None:
    """Say so if training will take more memory than there is beside the model, which is loaded; None if not.

    A system may end a process that takes too much without a word, so this must be said before. Where the weights take
    but a small part of what is free, so does training, and nothing is computed.
    """
    free = free_memory(model.device)
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if weights < SMALL_PART * free:
        return None
    lengths = lengths_of(examples, settings, kept)
    memory = estimate_most(config, step_of(settings, config, lengths))
    if memory.total - memory.weights < free:
        return None
    more = in_words(memory.total - memory.weights)
    remedy = describe_remedies(settings, config, lengths, model.device.type != "cpu")
    return f"Training takes {more} beside the weights, and {in_words(free)} are free. {remedy}"
