"""What a run has brought: right answers before and after, curves, and a file of figures."""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

from visualglm_tools.training.encoding import IGNORED, Collator, Example


@dataclass(frozen=True)
class Measurement:
    """Whether each answer is right, and the mean loss per token."""

    is_right: list[bool]
    loss: float

    @property
    def figures(self) -> dict[str, float]:
        return {"right": sum(self.is_right), "loss": self.loss}


@torch.inference_mode()
def measure(model: torch.nn.Module, collator: Collator, examples: list[Example], batch_size: int) -> Measurement:
    """Find the examples whose greedy answer would be exactly the wanted one, without generating.

    That is so if each token of the answer, `<eop>` included, is the likeliest after those before it.
    """
    was_training = model.training
    model.eval()
    right, loss, tokens = [], 0.0, 0
    for first in range(0, len(examples), batch_size):
        batch = collator(examples[first : first + batch_size])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        # `<sop>` is given to `generate`, so whether the model would have said it counts for the loss alone.
        is_counted = (labels != IGNORED) & (labels != collator.processor.tokenizer.bos_token_id)
        right += ((logits.argmax(-1) == labels) | ~is_counted).all(-1).tolist()
        loss += torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        tokens += (labels != IGNORED).sum().item()
    model.train(was_training)
    return Measurement(right, loss / tokens)


def plot_curves(log: list[dict], file: Path) -> None:
    """Draw training and evaluation loss over the steps; nothing if there is nothing yet."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {
        label: [(entry["step"], entry[key]) for entry in log if key in entry]
        for key, label in {"loss": "training", "eval_loss": "held out"}.items()
    }
    if not any(curves.values()):
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if is_narrow(axes.get_ylim()) else "")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def is_narrow(limits: tuple[float, float]) -> bool:
    """Whether so few powers of ten lie between the limits that the axis needs more numbers."""
    return limits[1] < 10 * limits[0]


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
