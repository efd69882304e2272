"""What a run has brought: right answers before and after, curves, and a file of figures."""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.ticker import PercentFormatter

from visualglm_tools.training.encoding import IGNORED, Collator, Example


HELD_OUT, OLD, KEPT_ANSWERS = "held out", "old abilities", "kept answers"  # what is measured before and after
RIGHT = "right_"  # in a log, before the name of what was measured: the share of right answers
CURVES = {HELD_OUT: "new: held out", OLD: "old: old abilities", KEPT_ANSWERS: "old: kept answers"}


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
    """Draw the losses over the steps and, where some were measured, the shares of right answers; nothing of nothing."""
    losses = curves_in(log, {"loss": "training", "eval_loss": "held out"})
    names = dict.fromkeys(name for entry in log for name in entry if name.startswith(RIGHT))
    shares = curves_in(log, {name: CURVES.get(name.removeprefix(RIGHT), name.removeprefix(RIGHT)) for name in names})
    if not losses:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [losses, *([shares] if shares else [])]
    figure, axes = pyplot.subplots(
        len(panels), sharex=True, squeeze=False, figsize=(7, 1 + 3 * len(panels)), layout="constrained"
    )
    for panel, curves in zip(axes.flat, panels, strict=True):
        for label, points in curves.items():
            panel.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
        panel.grid(alpha=0.3)
        panel.legend()
    above, below = axes.flat[0], axes.flat[-1]
    above.set(ylabel="loss per token", yscale="log")
    above.yaxis.set_major_formatter("{x:g}")
    above.yaxis.set_minor_formatter("{x:g}" if is_narrow(above.get_ylim()) else "")
    if shares:
        below.set(ylabel="right answers", ylim=(-0.03, 1.03))
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set(xlabel="step")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def curves_in(log: list[dict], labels: dict[str, str]) -> dict[str, list[tuple[int, float]]]:
    """The points of the curves of a log that has any, by their labels."""
    curves = {label: [(entry["step"], entry[key]) for entry in log if key in entry] for key, label in labels.items()}
    return {label: points for label, points in curves.items() if points}


def is_narrow(limits: tuple[float, float]) -> bool:
    """Whether so few powers of ten lie between the limits that the axis needs more numbers."""
    return limits[1] < 10 * limits[0]


def write_json(file: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A name that is no UTF-8 has halves of characters in Python, which JSON escapes just so.
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
