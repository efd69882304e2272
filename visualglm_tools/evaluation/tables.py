"""The figures of an exam as tables in Markdown. Not here: what is counted (`results.py`)."""

from collections.abc import Iterable, Sequence

from visualglm_tools.evaluation.results import Comparison, Tally
from visualglm_tools.printing import one_line


def write_results(groups: Sequence[tuple[str, str, Tally]]) -> str:
    """The table of an exam; columns of which no group has anything are left out."""
    has_verdicts, has_captions, has_cut, has_missing = (
        any(getattr(tally, name) for _, _, tally in groups) for name in ("verdicts", "captions", "cut", "missing")
    )
    head = ["kind", "language", "rows", "right", "accuracy", "95 %"]
    head += ["yes", "precision", "recall", "F1", "neither yes nor no"] * has_verdicts
    head += ["CHAIRs", "CHAIRi", "recall of objects"] * has_captions
    head += ["cut off"] * has_cut + ["no answer"] * has_missing
    rows = []
    for kind, language, tally in groups:
        row = [kind, language, tally.rows, tally.right, percent(tally.accuracy), interval(tally)]
        shares = map(percent, (tally.yes_ratio, tally.precision, tally.recall, tally.f1))
        row += [*shares, tally.unread if tally.verdicts else ""] * has_verdicts
        row += list(map(percent, (tally.chair_s, tally.chair_i, tally.object_recall))) * has_captions
        rows.append(row + [tally.cut] * has_cut + [tally.missing] * has_missing)
    return write_table(head, rows)


def write_comparison(groups: Sequence[tuple[str, str, Comparison]]) -> str:
    """The table of two settings on the rows that both have answered."""
    head = ["kind", "language", "rows in both", "other", "this", "better", "worse", "p"]
    rows = []
    for kind, language, each in groups:
        shares = (percent(each.before / each.rows), percent(each.right / each.rows)) if each.rows else ("", "")
        rows.append((kind, language, each.rows, *shares, each.better, each.worse, f"{each.p_value:.3g}"))
    return write_table(head, rows)


def write_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown, whose first two columns are names and the others figures."""
    rule = ["---" if place < 2 else "---:" for place in range(len(head))]
    return "".join(f"| {' | '.join(map(cell, row))} |\n" for row in (head, rule, *rows))


def cell(value: object) -> str:
    """A value as it may stand in a table: names come from data."""
    return one_line(value).replace("\\", "\\\\").replace("|", "\\|")


def percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.1f} %"


def interval(tally: Tally) -> str:
    """The bounds of the accuracy, if there is one."""
    low, high = tally.interval
    return f"{100 * low:.1f}–{100 * high:.1f}" if tally.answered else ""
