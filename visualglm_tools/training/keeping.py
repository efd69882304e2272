"""Training that does not forget: beside each step's own rows, rows whose answers shall stay what they are.

Each step also lowers the mean divergence, per token, of the adapted model's predictions from those of the same model
with its adapter switched off, KL(off || on), on answers that shall be kept: learning without forgetting (Li and Hoiem,
arXiv 1606.09282), with the base model as the teacher. It needs no second model, and no more memory than the larger of
the two parts of a step: each is propagated before the next one is computed.

`KeepAnswers` works with transformers' `Trainer` and with TRL's `SFTTrainer`:

    class KeepingTrainer(KeepAnswers, SFTTrainer):
        pass

    trainer = KeepingTrainer(model=model, peft_config=…, …)
    trainer.keep_answers(examples, Collator(processor))  # of `read_dataset` with an `Encoder`, see docs/finetuning.md
    trainer.train()

Not here: which questions are asked, and what the model answers to them (`asking.py`).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from visualglm_tools.checkpoints.adapters import fingerprint
from visualglm_tools.printing import first_line
from visualglm_tools.training.encoding import IGNORED, Collator, Example, digest
from visualglm_tools.training.settings import Settings


STORED_AT_MOST = 2 * 2**30  # bytes of predictions on the disk; where there are more, each step computes its own
STORED = torch.float16
IDENTITY = "answers and model"  # in the metadata of what is stored
AT_ONCE, TOKENS_AT_ONCE = 8, 64  # rows, and tokens of answers


class KeepAnswers:
    """A mixin for trainers: keeps a PEFT model's answers to some rows what they are without its adapter.

    The log gets `keep_loss`, the mean divergence since the last line; `loss` is still that of the step's own rows.
    """

    kept: "KeptAnswers | None" = None

    def keep_answers(
        self,
        examples: Sequence[Example],
        collator: Collator,
        rows: int = Settings.keep_rows,
        weight: float = Settings.keep_weight,
        file: Path | None = None,
    ) -> None:
        """Keep the answers of some examples, from the next step on.

        Args:
            examples: conversations with their answers.
            collator: makes batches of them.
            rows: beside a step's own rows, per process; each of its micro-batches has its part of them.
            weight: of the divergence, beside the loss per token of the step's own rows.
            file: where what the model predicts without its adapter is stored, if that is not too much, or was stored;
                None: nowhere, each step computes it.

        Raises:
            ValueError: no examples, a model whose adapter cannot be switched off, FSDP or DeepSpeed, or a file that
                is damaged or has what was predicted of other answers.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "answers cannot be kept by a model that FSDP or DeepSpeed divides among processes; leave keeping out."
            )
        check_switchable(self.model)
        if not examples:
            raise ValueError("there are no answers to keep: give some rows, or leave keeping out.")
        count = min(len(examples), -(-rows // self.args.gradient_accumulation_steps))
        self.kept = KeptAnswers(examples, collator, count, weight, self.args.seed)
        if file is not None and stored_size(examples, self.model) <= STORED_AT_MOST:
            self.kept.predictions = Predictions(file, self.model, self.kept)

    def training_step(self, model: torch.nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.kept is not None:
            divergence = self.divergence_from_kept(model)
            self.kept.log.append(divergence.detach())
            self.accelerator.backward(self.kept.weight * divergence / self.current_gradient_accumulation_steps)
        return loss

    def divergence_from_kept(self, model: torch.nn.Module) -> torch.Tensor:
        """What the mean is to be taken of, over a step's micro-batches and processes: that is the step's, per token."""
        processes, micro_batches = self.args.world_size, self.current_gradient_accumulation_steps
        number = self.count_micro_batches()
        first = number - self.kept.micro_batch[1]
        tokens = self.kept.count_tokens(range(first, first + micro_batches), processes) / (micro_batches * processes)
        numbers = self.kept.draw(number, processes, self.args.process_index)
        with self.compute_loss_context_manager():
            return self.kept.divergence(model, self.accelerator.unwrap_model(model), numbers, tokens)

    def count_micro_batches(self) -> int:
        """How many micro-batches there were before this one, in this run and in those it resumes."""
        step, before = self.state.global_step, self.kept.micro_batch
        self.kept.micro_batch = (step, before[1] + 1 if before[0] == step else 0)
        return step * self.args.gradient_accumulation_steps + self.kept.micro_batch[1]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.kept is not None and "loss" in logs and self.kept.log:
            mean = torch.stack(self.kept.log).mean()
            logs = {**logs, "keep_loss": self.accelerator.reduce(mean, reduction="mean").item()}
            self.kept.log.clear()
        super().log(logs, *args, **kwargs)


class KeptAnswers:
    """The answers to keep, and how far the adapted model is from them.

    Args:
        examples: conversations with their answers.
        collator: makes batches of them.
        count: examples beside a micro-batch.
        weight: of the divergence in the loss.
        seed: of the order in which they come; each comes once before any comes again.
    """

    def __init__(self, examples: Sequence[Example], collator: Collator, count: int, weight: float, seed: int):
        self.examples, self.collator, self.count, self.weight, self.seed = examples, collator, count, weight, seed
        self.predictions: Predictions | None = None
        self.micro_batch = (-1, 0)  # a step, and which of its micro-batches was the last
        self.log: list[torch.Tensor] = []

    def draw(self, micro_batch: int, processes: int = 1, process: int = 0) -> list[int]:
        """Which examples come beside a micro-batch in one of the processes; it depends on nothing else."""
        first = (micro_batch * processes + process) * self.count
        places = [divmod(place, len(self.examples)) for place in range(first, first + self.count)]
        orders = {turn: self.order(turn) for turn, _ in places}
        return [orders[turn][place] for turn, place in places]

    def count_tokens(self, micro_batches: Sequence[int], processes: int) -> int:
        """The tokens of all answers that come beside some micro-batches."""
        drawn = (self.draw(number, processes, process) for number in micro_batches for process in range(processes))
        return sum(count_answer(self.examples[number]) for numbers in drawn for number in numbers)

    def order(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + turn)
        return torch.randperm(len(self.examples), generator=generator).tolist()

    def divergence(
        self, model: torch.nn.Module, peft_model: PeftModel, numbers: Sequence[int], tokens: float | None = None
    ) -> torch.Tensor:
        """KL(adapter off || on) of some examples, the mean over the tokens of their answers.

        Args:
            model: as it is trained, perhaps wrapped.
            peft_model: the same one, not wrapped.
            numbers: of the examples.
            tokens: what the sum is divided by; None: the tokens of their answers.
        """
        batch = self.batch(numbers, peft_model.device)
        if self.predictions is not None:
            wanted = self.predictions.of(numbers, peft_model.device)
        else:
            wanted = predict_without_adapter(peft_model, batch)
        return sum_divergence(select_answers(model, batch), wanted) / (tokens or len(wanted))

    def batch(self, numbers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        batch = self.collator([self.examples[number] for number in numbers])
        return {name: tensor.to(device) for name, tensor in batch.items()}


class Predictions:
    """What the model predicts without its adapter at each token of the kept answers, on the disk.

    Args:
        file: where they are; they are computed and written if it is not there.
        model: with its adapter.
        kept: the answers.

    Raises:
        ValueError: what is there is damaged, or was predicted of other answers or by another model.
    """

    def __init__(self, file: Path, model: PeftModel, kept: KeptAnswers):
        self.file = file
        identity = identify(model, kept.examples)
        if file.exists():
            self.check(identity)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        save_file(dict(self.compute(model, kept)), unfinished, metadata={IDENTITY: identity})
        unfinished.replace(file)

    def check(self, identity: str) -> None:
        try:
            with safe_open(self.file, "pt") as file:
                found = (file.metadata() or {}).get(IDENTITY)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.file} is damaged: {first_line(error)}. Remove it: what it had is computed again."
            ) from error
        if found != identity:
            raise ValueError(
                f"{self.file} has what was predicted of other answers, or by another model. Remove it, or name another."
            )

    def compute(self, model: PeftModel, kept: KeptAnswers) -> Iterator[tuple[str, torch.Tensor]]:
        for first in range(0, len(kept.examples), AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, len(kept.examples)))
            predicted = predict_without_adapter(model, kept.batch(numbers, model.device)).to(STORED).cpu()
            counts = [count_answer(kept.examples[number]) for number in numbers]
            for number, tensor in zip(numbers, predicted.split(counts), strict=True):
                yield str(number), tensor.clone()

    def of(self, numbers: Sequence[int], device: torch.device) -> torch.Tensor:
        """The logarithms of the probabilities, [N, vocab_size], N tokens in all."""
        with safe_open(self.file, "pt", device=str(device)) as file:
            return torch.cat([file.get_tensor(str(number)) for number in numbers])


def identify(model: PeftModel, examples: Sequence[Example]) -> str:
    """By which to know again what a model predicts of some answers without its adapter."""
    base = model.get_base_model()
    frozen = sum(each.nbytes for each in [*base.parameters(), *base.buffers()] if not each.requires_grad)
    return hashlib.sha256(repr((digest(examples), fingerprint(base), frozen)).encode()).hexdigest()


def select_answers(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, [N, vocab_size], that a model predicts the N tokens of the answers in a batch by."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs).logits[:, :-1][batch["labels"][:, 1:] != IGNORED]


def sum_divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found), the sum over N tokens; in float32, but only a few tokens at once, forward and backward.

    Args:
        logits: [N, vocab_size], found.
        wanted: [N, vocab_size], the logarithms of probabilities.
    """
    parts = zip(logits.split(TOKENS_AT_ONCE), wanted.split(TOKENS_AT_ONCE), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(divergence_of_few, *part, **options) for part in parts]).sum()


def divergence_of_few(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return kl_div(log_softmax(logits.float(), dim=-1), wanted.float(), log_target=True, reduction="sum")


@torch.no_grad()
def predict_without_adapter(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logarithms of the probabilities, [N, vocab_size], of the N tokens of the answers in a batch."""
    with switched_off(model) as base:
        return log_softmax(select_answers(base, batch).float(), dim=-1)


@contextmanager
def switched_off(model: PeftModel) -> Iterator[torch.nn.Module]:
    """The model as it is without its adapter, for evaluation; after it, everything is as it was."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield model.get_base_model()
    finally:
        model.train(was_training)


def check_switchable(model: torch.nn.Module) -> None:
    """Raise a `ValueError` if a model does not become again what it was when its adapter is switched off."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            "answers are kept with the help of the model without its adapter, and this one has none: its own weights "
            "are trained. Use LoRA or P-tuning, or leave keeping out."
        )
    changed = sorted(weights_that_stay_changed(model))
    if changed:
        raise ValueError(
            f"answers cannot be kept: {len(changed)} trained weights are not switched off with the adapter, such as "
            f"{changed[0]!r}. Train the adapter alone (bias='none'), or leave keeping out."
        )


def weights_that_stay_changed(model: PeftModel) -> Iterator[str]:
    """The names of trained weights that `disable_adapter` leaves in use."""
    base = model.get_base_model()
    switched = (BaseTunerLayer, ModulesToSaveWrapper)
    inside = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, switched))
    for name, parameter in base.named_parameters():
        is_own = re.search(r"(^|\.)(base_layer|original_module)\.", name) or not name.startswith(inside)
        if parameter.requires_grad and is_own:
            yield name


def count_answer(example: Example) -> int:
    """The tokens of an example's answer."""
    return sum(label != IGNORED for label in example.labels[1:])


def stored_size(examples: Sequence[Example], model: torch.nn.Module) -> int:
    """Bytes that the predictions of all answers take on the disk."""
    vocab_size = model.config.get_text_config().vocab_size
    return sum(map(count_answer, examples)) * vocab_size * STORED.itemsize
