"""How the time of a step grows with the context and with the batch, from the rows of a run."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy

from visualglm_tools.benchmarking.timing import digits
from visualglm_tools.packages import install


FEWEST_CONTEXTS = 4  # a parabola fits three whatever they are
LARGEST_BEND = 0.1  # of the time; steps at one context differ by more than that on a busy machine


def decode_curves(rows: list[dict[str, Any]]) -> dict[tuple[int, str], list[tuple[int, float]]]:
    """Group the rows that decode: (batch, path) -> points of (context, milliseconds of a step)."""
    curves = defaultdict(list)
    for row in rows:
        if row["part"] == "decode":
            curves[row["batch"], row["path"]].append((row["context"], row["ms"]["median"]))
    return {key: sorted(points) for key, points in curves.items()}


def measure_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit a line through each curve with enough contexts, and a parabola to see whether it is one.

    Returns:
        For each curve: `ms_fixed` and `ms_per_1000_tokens` of the line; `bend`, the part of the time at the longest
        context that the square term of the parabola makes up, 0 for linear growth and more where it is faster;
        `is_linear_at_most`, whether that is no more than `LARGEST_BEND`; `over_batch_1`, the time of a step over that
        of one row, averaged over the contexts.
    """
    curves, results = decode_curves(rows), []
    for (batch, path), points in curves.items():
        if len(points) < FEWEST_CONTEXTS:
            continue
        contexts, times = zip(*points, strict=True)
        slope, fixed = numpy.polyfit(contexts, times, 1)
        parabola = numpy.polyfit(contexts, times, 2)
        bend = parabola[0] * contexts[-1] ** 2 / numpy.polyval(parabola, contexts[-1])
        alone = dict(curves.get((1, path), []))
        ratios = [ms / alone[context] for context, ms in points if context in alone]
        results.append(
            {
                "batch": batch,
                "path": path,
                "contexts": list(contexts),
                "ms_fixed": digits(fixed),
                "ms_per_1000_tokens": digits(slope * 1000),
                "bend": digits(bend),
                "is_linear_at_most": bool(bend <= LARGEST_BEND),
                "over_batch_1": digits(sum(ratios) / len(ratios)) if ratios else None,
            }
        )
    return results


def plot_growth(variants: list[dict[str, Any]], path: str, file: Path) -> bool:
    """Draw the time per token over the context, a curve per variant and batch; False if there is nothing to draw.

    Raises:
        ValueError: matplotlib is missing.
    """
    curves = [
        (f"{variant['name']}, batch {batch}", batch, points)
        for variant in variants
        for (batch, curve_path), points in decode_curves(variant["rows"]).items()
        if curve_path == path and len(points) >= FEWEST_CONTEXTS
    ]
    if not curves:
        return False
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"the plot of growth needs matplotlib: {install('train')}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, batch, points in curves:
        contexts, times = zip(*points, strict=True)
        axes.plot(contexts, [ms / batch for ms in times], label=label, marker=".")
    axes.set(xlabel="tokens of context", ylabel="ms per token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, metadata={"Software": None})  # the same figures give the same bytes
    pyplot.close(figure)
    return True
