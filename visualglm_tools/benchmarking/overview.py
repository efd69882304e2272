"""What a person wants to know first: the wait for the first word, then the rate, by machine and weights.

The first word is the sum of what a run measures apart: encoding a picture, a prompt of 64 tokens, one step. Other
programs stand beside ours; one that encodes no pictures has its wait without that. As a table and as a picture, an SVG
that follows the reader's light or dark scheme. Nothing here measures anything, or knows a machine: what is shown is
what the runs say.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any


TOKENS = 64  # of the prompt, and before the step
PARTS = {"encode": "picture", "prefill": "prompt", "decode": "one step"}
# The best of a processor's features that multiply -> how people call it.
FEATURES = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "i8mm": "i8mm",
    "asimd": "NEON",
}
WEIGHTS = {"int4": "4 bits", "int8": "8 bits", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class Wait:
    """How long somebody waits on one machine."""

    machine: str
    kind: str  # "CPU" or "GPU", whose bars have a scale in common
    who: str
    date: str  # of the newest of its runs
    ms: dict[str, float] = field(default_factory=dict)  # by part

    @property
    def is_whole(self) -> bool:
        return {"prefill", "decode"} <= set(self.ms)

    @property
    def first_word(self) -> float:
        """Seconds."""
        return sum(self.ms.values()) / 1000

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return 1000 / self.ms["decode"]


def name_machine(machine: dict[str, Any]) -> str:
    """Name a machine by what decides how fast it is."""
    if machine.get("gpu"):
        return machine["gpu"]
    best = next((name for flag, name in FEATURES.items() if flag in machine.get("cpu_flags", ())), None)
    return f"{machine['cpu']}, {machine['threads']} threads" + (f", {best}" if best else "")


def find_times(subject: dict[str, Any]) -> dict[str, float]:
    """The milliseconds of each part, for one person: of a step what `generate` takes, by the fastest of its ways."""
    found: dict[str, list[tuple[bool, float]]] = {}
    for row in subject["rows"]:
        if row["batch"] == 1 and row.get("context", TOKENS) == TOKENS:
            is_other = row["part"] == "decode" and not row.get("path", "generate").startswith("generate")
            found.setdefault(row["part"], []).append((is_other, row["ms"]["median"]))
    return {part: min(found[part])[1] for part in PARTS if part in found}


def list_waits(reports: Iterable[dict[str, Any]]) -> list[Wait]:
    """List who waits how long, machine by machine; of what several runs measured, the first of them counts."""
    waits: dict[tuple[str, str], Wait] = {}
    for report in reports:
        machine = name_machine(report["machine"])
        kind = "GPU" if report["machine"].get("gpu") else "CPU"
        for subject in (*report["variants"], *report.get("peers", ())):
            who = WEIGHTS.get(subject["name"], subject["name"])
            wait = waits.setdefault((machine, who), Wait(machine, kind, who, ""))
            wait.ms = {**find_times(subject), **wait.ms}
            wait.date = max(wait.date, report["date"][:10])
    machines = list(dict.fromkeys(machine for machine, _ in waits))
    whole = [wait for wait in waits.values() if wait.is_whole]
    return sorted(whole, key=lambda wait: machines.index(wait.machine))


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"


def write_first_word(wait: Wait) -> str:
    return seconds(wait.first_word) + ("" if "encode" in wait.ms else " without a picture")


def render_table(waits: list[Wait]) -> str:
    """Write the waits as a table in Markdown."""
    lines = ["| machine | weights | first word | then, tokens per second | measured |", "|---|---|---|---|---|"]
    lines += [
        f"| {wait.machine} | {wait.who} | {write_first_word(wait)} | {wait.rate:.3g} | {wait.date} |" for wait in waits
    ]
    return "\n".join(lines)


# The picture: a line for each wait, under its machine, with a bar for the wait and one for the rate.

WIDTH, LINE, HEAD, LABELS = 900, 22, 76, 150  # pixels
WAIT_BARS, RATE_BARS = (LABELS, 330), (LABELS + 510, 160)  # where they begin, and how long the longest is
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .head { font-weight: 600 } .small { font-size: 12px }
.card { fill: #ffffff } .encode { fill: #8250df } .prefill { fill: #0969da } .decode { fill: #bf8700 }
.rate { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .card { fill: #0d1117 } .encode { fill: #a371f7 } .prefill { fill: #4493f8 }
  .decode { fill: #d29922 } .rate { fill: #3fb950 }
}
"""


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(content)}</text>'


def bar(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y - 12:.1f}" width="{max(width, 1.0):.1f}" height="15" class="{kind}"/>'


def draw_legend() -> list[str]:
    lines, x = (
        [text(WAIT_BARS[0], 24, "Wait for the first word", "head"), text(RATE_BARS[0], 24, "Then", "head")],
        LABELS,
    )
    for part, name in PARTS.items():
        lines += [bar(x, 46, 12, part), text(x + 18, 46, name, "small")]
        x += 90
    return [*lines, bar(RATE_BARS[0], 46, 12, "rate"), text(RATE_BARS[0] + 18, 46, "tokens per second", "small")]


def draw_wait(wait: Wait, y: float, longest: float, highest: float) -> list[str]:
    """Draw the bars of one line, by the largest of those that have a scale in common."""
    lines, (x, length) = [text(16, y, wait.who)], WAIT_BARS
    for part in PARTS:
        width = wait.ms.get(part, 0.0) / 1000 / longest * length
        if width:
            lines.append(bar(x, y, width, part))
        x += width
    lines.append(text(x + 8, y, write_first_word(wait), "small"))
    x, length = RATE_BARS
    width = wait.rate / highest * length
    return [*lines, bar(x, y, width, "rate"), text(x + width + 8, y, f"{wait.rate:.3g}", "small")]


def draw_picture(waits: list[Wait]) -> str:
    """Draw the waits as an SVG."""
    lines, y, machine = draw_legend(), HEAD, None
    for wait in waits:
        if wait.machine != machine:
            lines.append(text(16, y + (0 if machine is None else 10), wait.machine, "head"))
            y, machine = y + LINE + (0 if machine is None else 10), wait.machine
        alike = [other for other in waits if other.kind == wait.kind]
        lines += draw_wait(wait, y, max(each.first_word for each in alike), max(each.rate for each in alike))
        y += LINE
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="Wait for the first word, and rate">'
    card = f'<rect width="{WIDTH}" height="{y}" rx="6" class="card"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", card, *lines, "</svg>", ""])
