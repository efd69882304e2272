"""Reports as text: one run in Markdown, and the pages of published runs.

A page is a template with the prose, in which a line `<!-- run NAME -->` stands for the file NAME.json, the line
`<!-- overview NAME ... -->` for the table and the picture that some files make together (`overview.py`), and the line
`<!-- other runs -->`, between empty lines, for the files that no template names, newest first. A second template beside
the first, archive.md, is for a page of older runs. Nothing here measures anything.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from visualglm_tools.benchmarking.growth import plot_growth
from visualglm_tools.benchmarking.overview import draw_picture, list_waits, render_table


OVERVIEW = re.compile(r"^<!-- overview (.+) -->$", re.MULTILINE)
PICTURE = "overview.svg"  # beside the template
ARCHIVE = "archive.md"
MARK = re.compile(r"^<!-- run (\S+) -->$", re.MULTILINE)
OTHERS = "<!-- other runs -->"
GENERATED = "<!-- Written by `visualglm bench --report` from {template} and the JSON files beside it. -->\n\n"
PARTS = {"encode": "Encoding pictures", "prefill": "Prompts (prefill)", "decode": "Answers (decode), a step"}
GROWTH_PATH = "forward"
SECONDS_FROM_MS = 2000


# ---------------------------------------------------------------- numbers and tables


def number(value: float | None, unit: str = "") -> str:
    """Write at most four digits; nothing for what is not known."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def milliseconds(value: float | None) -> str:
    if value is not None and value >= SECONDS_FROM_MS:
        return f"{number(value / 1000)} s"
    return number(value, "ms")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Write a Markdown table without the columns that are empty."""
    used = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line[column] for column in used) + " |" for line in lines] + [""]


def spread(figures: dict[str, Any]) -> list[str]:
    """Return median, min and max of milliseconds as cells."""
    return [milliseconds(figures.get(name)) for name in ("median", "min", "max")]


# ---------------------------------------------------------------- one run


def render_run(report: dict[str, Any], image: str | None = None) -> str:
    """Write a run in Markdown; `image` is where the plot of its growth stands, if there is one."""
    lines = [render_machine(report), ""]
    if report.get("notes"):
        lines += [report["notes"], ""]
    lines += ["```", report["command"], "```", ""]
    lines += render_variants(report)
    for part, title in PARTS.items():
        lines += render_part(report, part, title)
    for variant in report["variants"]:
        lines += render_yardsticks(variant)
    lines += render_reading(report)
    lines += render_pieces(report)
    lines += render_growth(report, image)
    lines += render_gaps(report)
    return "\n".join(lines).strip() + "\n"


def render_machine(report: dict[str, Any]) -> str:
    """Write date, machine and versions in one line."""
    machine, versions = report["machine"], report["versions"]
    processor = machine.get("gpu") or machine["cpu"]
    flags = f" ({', '.join(machine['cpu_flags'])})" if machine.get("cpu_flags") and not machine.get("gpu") else ""
    known = [f"{name} {version}" for name, version in versions.items() if version]
    hardware = [f"{processor}{flags}", f"{machine['threads']} threads", f"{machine['memory_gib']:.0f} GiB"]
    return " · ".join((report["date"][:10], ", ".join(hardware), ", ".join(known)))


def render_variants(report: dict[str, Any]) -> list[str]:
    rows = []
    for variant in report["variants"]:
        load, end, limits = variant["load"], variant["end"], variant["limits"]
        seconds = load.get("s", {}).get("median")
        rows.append(
            [
                variant["name"],
                number(variant["model"]["weights_gib"], "GiB"),
                number(seconds, f"s ({load['how']})") if seconds is not None else "",
                memory(load),
                memory(end),
                number(limits["read_gb_per_s"], "GB/s"),
                number(limits.get("gemm_gflop_per_s"), "GFLOP/s"),
            ]
        )
    for peer in report["peers"]:
        rows.append([peer["name"], number(peer.get("model_gb"), "GB"), "", "", "", "", ""])
    head = ["who", "weights", "ready in", "peak memory, loaded", "at the end", "machine reads", "multiplies"]
    return table(head, rows)


def memory(figures: dict[str, Any]) -> str:
    names = {"peak_rss_gib": "", "peak_cuda_gib": " CUDA"}
    known = [f"{number(figures[key])} GiB{name}" for key, name in names.items() if figures.get(key) is not None]
    return ", ".join(known)


def render_part(report: dict[str, Any], part: str, title: str) -> list[str]:
    """Write the rows of one part, those that measure the same thing one below the other, and peers after ours."""
    subjects = [*report["variants"], *report["peers"]]
    paths = list(dict.fromkeys(row.get("path", "") for subject in subjects for row in subject["rows"]))
    found = [
        ((row["batch"], row.get("context", 0), order, paths.index(row.get("path", ""))), subject["name"], row)
        for order, subject in enumerate(subjects)
        for row in subject["rows"]
        if row["part"] == part
    ]
    if not found:
        return []
    rows = []
    for _, name, row in sorted(found, key=lambda item: item[0]):
        pictures = row.get("pictures_per_s")
        rate = number(pictures, "pictures/s") if pictures else number(row.get("tokens_per_s"), "tok/s")
        work = number(row.get("gb_per_s"), "GB/s") if part == "decode" else number(row.get("gflop_per_s"), "GFLOP/s")
        share = f"{row['fraction_of_limit']:.0%} of {row['limit']}" if row.get("fraction_of_limit") else ""
        over = [over_peer(row, peer) for peer in report["peers"]]
        place = [str(row["batch"]), number(row["context"]) if "context" in row else ""]
        rows.append([*place, name, row.get("path", ""), *spread(row["ms"]), rate, work, share, *over])
    peers = [f"time over {peer['name']}'s" for peer in report["peers"]]
    head = ["batch", "tokens before" if part == "decode" else "tokens", "who", "by", "median", "min", "max"]
    return [f"**{title}**", "", *table([*head, "rate", "work", "of the limit", *peers], rows)]


def over_peer(row: dict[str, Any], peer: dict[str, Any]) -> str:
    """Write the ratio of a row's median and that of the peer's row for the same thing; nothing if it has none."""
    for theirs in peer["rows"]:
        if all(theirs.get(name) == row.get(name) for name in ("part", "batch", "context")) and theirs is not row:
            return f"{row['ms']['median'] / theirs['ms']['median']:.2f}"
    return ""


def render_reading(report: dict[str, Any]) -> list[str]:
    rows = [
        [variant["name"], row["path"], number(row["context"])]
        + [f"{row['of_reading'][figure]:.0%}" for figure in ("median", "min", "max")]
        + [f"{row['read_gb_per_s']['median']:.4g} GB/s"]
        for variant in report["variants"]
        for row in variant.get("reading", [])
    ]
    if not rows:
        return []
    head = ["who", "by", "tokens before", "median", "min", "max", "the reads"]
    return ["**A step's bytes per second over a plain read's**, taken in turns", "", *table(head, rows)]


def render_pieces(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            variant["name"],
            row["piece"],
            *spread(row["ms"]),
            number(row.get("gb_per_s"), "GB/s"),
            f"{row['of_reading']['median']:.0%}" if "of_reading" in row else "",
        ]
        for variant in report["variants"]
        for row in variant.get("pieces", [])
    ]
    if not rows:
        return []
    head = ["who", "piece", "median", "min", "max", "reads", "over a plain read's"]
    return ["**The pieces of a step**, each by itself, all layers together", "", *table(head, rows)]


def render_yardsticks(variant: dict[str, Any]) -> list[str]:
    lines = []
    titles = {"formulation": "the original's formulation on the same weights", "reference": "the original's own blocks"}
    for name, title in titles.items():
        against = variant.get(f"against_{name}")
        if against is None:
            continue
        rows = [
            [part, str(row.get("batch", 1)), number(row["context"])]
            + [f"{row['ours_over_original'][figure]:.2f}" for figure in ("median", "min", "max")]
            + [milliseconds(row.get(who, {}).get("median")) for who in ("ours_ms", "original_ms")]
            for part in ("prefill", "decode")
            for row in against[part]
        ]
        layers = f", {against['layers']} of the blocks" if "layers" in against else ""
        lines += [f"**Time of {variant['name']} over that of {title}**{layers}, taken in turns", ""]
        lines += table(["", "batch", "tokens", "median", "min", "max", "ours", "original"], rows)
    return lines


def render_growth(report: dict[str, Any], image: str | None) -> list[str]:
    rows = [
        [
            variant["name"],
            growth["path"],
            str(growth["batch"]),
            f"{number(growth['contexts'][0])} to {number(growth['contexts'][-1])}",
            milliseconds(growth["ms_fixed"]),
            milliseconds(growth["ms_per_1000_tokens"]),
            f"{growth['bend']:.1%}",
            "yes" if growth["is_linear_at_most"] else "**no**",
            f"{growth['over_batch_1']:.2f}" if growth["over_batch_1"] and growth["batch"] > 1 else "",
        ]
        for variant in report["variants"]
        for growth in variant.get("growth", [])
    ]
    if not rows:
        return []
    head = ["who", "by", "batch", "tokens before", "a step", "+ per 1,000 tokens before", "bend", "linear or better"]
    lines = ["**Growth of a decode step**", "", *table([*head, "over batch 1"], rows)]
    return [*lines, f"![Milliseconds per token over the context]({image})", ""] if image else lines


def render_gaps(report: dict[str, Any]) -> list[str]:
    """List what was not measured, and why."""
    gaps = [f"- {failure['name']}: {failure['message']}" for failure in report["failed"]]
    for variant in report["variants"]:
        skipped = variant["skipped"] + [
            {"part": name.replace("_", " the "), **row}
            for name in ("against_formulation", "against_reference")
            for row in variant.get(name, {}).get("skipped", [])
        ]
        for row in skipped:
            path = f" ({row['path']})" if row.get("path") else ""
            tokens = f", {number(row['context'])} tokens" if row.get("context") else ""
            gaps.append(f"- {variant['name']}, {row['part']}{path}, batch {row['batch']}{tokens}: {row['reason']}")
    return ["Not measured:", "", *gaps, ""] if gaps else []


# ---------------------------------------------------------------- files and the page


def write_run(report: dict[str, Any], file: Path) -> None:
    """Write a run as JSON that a person can read: lists of samples stay on one line."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    file.write_text(text + "\n", encoding="utf-8")


def read_run(file: Path) -> dict[str, Any]:
    """Read a run that `write_run` wrote.

    Raises:
        ValueError: the file is missing or is no report of a benchmark.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the report {str(file)!r}: {error}") from error
    if not isinstance(report, dict) or report.get("benchmark") != "visualglm-hf" or "variants" not in report:
        raise ValueError(f"{str(file)!r} is no report of visualglm bench.")
    return report


def render_files(template: Path, files: list[Path], page: Path) -> dict[Path, str]:
    """Write the page that stands at `page`, and what belongs to it: its archive and its picture, if there are any.

    Raises:
        ValueError: a file cannot be read, a template names a run that is not there, or none has room for one that is.
    """
    runs = {file.stem: (read_run(file), image_of(file, page)) for file in files}
    templates = {page: template}
    if template.with_name(ARCHIVE).is_file():
        templates[page.with_name(f"{page.stem}-archive.md")] = template.with_name(ARCHIVE)
    texts = {place: source.read_text(encoding="utf-8") for place, source in templates.items()}
    named = {name: templates[place].name for place, text in texts.items() for name in names_in(text)}
    missing = [name for name in named if name not in runs]
    if missing:
        raise ValueError(f"the template {named[missing[0]]} wants {missing[0]}.json, which was not given.")
    others = sorted(set(runs) - set(named), key=lambda name: runs[name][0]["date"], reverse=True)
    if others and not any(OTHERS in text for text in texts.values()):
        raise ValueError(f"the template {template.name} has no place for {others[0]}.json. Add {OTHERS!r}.")
    rendered = {}
    for place, text in texts.items():
        overview = OVERVIEW.search(text)
        if overview:
            waits = list_waits(runs[name][0] for name in overview[1].split())
            picture = template.with_name(PICTURE)
            rendered[picture] = draw_picture(waits)
            image = f"![Wait for the first word, and tokens per second then]({relative(picture, page)})"
            text = text.replace(overview[0], f"{render_table(waits)}\n\n{image}")
        rendered[place] = GENERATED.format(template=templates[place].name) + fill_in(text, runs, others)
    return rendered


def names_in(text: str) -> list[str]:
    """The names of the runs that a template has places for."""
    return [*MARK.findall(text), *(name for names in OVERVIEW.findall(text) for name in names.split())]


def fill_in(text: str, runs: dict[str, tuple[dict[str, Any], str | None]], others: list[str]) -> str:
    """Put runs in their places, and others in theirs."""
    sections = [f"### {runs[name][0].get('title', name)}\n\n{render_run(*runs[name])}" for name in others]
    text = MARK.sub(lambda found: render_run(*runs[found[1]]).rstrip("\n"), text)
    return text.replace(f"{OTHERS}\n\n", "\n".join(["## Other runs\n", *sections, ""]) if others else "")


def image_of(file: Path, page: Path) -> str | None:
    """Return where the page finds the plot of a run, if it has one."""
    image = file.with_suffix(".png")
    return relative(image, page) if image.is_file() else None


def relative(file: Path, page: Path) -> str:
    """How a page names a file."""
    return Path(os.path.relpath(file, page.parent)).as_posix()


def write_page(page: Path, template: Path, files: list[Path]) -> None:
    """Draw the growth of each run beside its file, then write the page and what belongs to it."""
    for file in files:
        plot_growth(read_run(file)["variants"], GROWTH_PATH, file.with_suffix(".png"))
    for file, text in render_files(template, files, page).items():
        file.write_text(text, encoding="utf-8")
