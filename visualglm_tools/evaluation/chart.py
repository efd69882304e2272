"""The figures of an exam as a picture. Not here: what is counted (`results.py`)."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from visualglm_tools.evaluation.results import Tally
from visualglm_tools.printing import one_line


COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's, which the colour-blind can tell apart
BAR = 0.8  # of the room of a kind
# Kinds are named in whatever language: matplotlib's own font has no Chinese.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei")


def draw_results(groups: Sequence[tuple[str, str, Tally]], file: Path) -> None:
    """Draw the accuracy of each kind in each language, with its interval at 95 %, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    answered = [(one_line(kind), one_line(language), tally) for kind, language, tally in groups if tally.answered]
    kinds, languages = (list(dict.fromkeys(each[place] for each in answered)) for place in (0, 1))
    with matplotlib.rc_context({"font.family": [name for name in FONTS if name in installed]}):
        figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.3 * len(answered)), layout="constrained")
        for number, language in enumerate(languages):
            tallies = {kind: tally for kind, each, tally in answered if each == language}
            places = [kinds.index(kind) + BAR * ((number + 0.5) / len(languages) - 0.5) for kind in tallies]
            shares = [tally.accuracy for tally in tallies.values()]
            errors = [
                (share - low, high - share)
                for share, (low, high) in zip(shares, (each.interval for each in tallies.values()), strict=True)
            ]
            style = {"color": COLOURS[number % len(COLOURS)], "label": language, "capsize": 2}
            axes.barh(places, shares, BAR / len(languages), xerr=list(zip(*errors, strict=True)), **style)
        axes.set(xlim=(0, 1), xlabel="right, with the interval at 95 %", yticks=range(len(kinds)), yticklabels=kinds)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, symbol=" %"))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        if languages:
            figure.legend(loc="outside upper center", ncols=len(languages))
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
        pyplot.close(figure)
