"""The model card of a trained adapter: its base model, data and settings, what it has brought, and what was forgotten.

Not here: how a card is written, and what is known of the base model (`visualglm_tools/checkpoints/cards.py`).
"""

from collections.abc import Sequence

from visualglm_tools.checkpoints.cards import COMMON, LOADING, PEFT, Origin, describe_licence
from visualglm_tools.printing import one_line
from visualglm_tools.training.report import HELD_OUT
from visualglm_tools.training.settings import LORA, Settings
from visualglm_tools.versions import version_of, versions


NAMES = {"lora": "LoRA", "qlora": "QLoRA", "ptuning": "P-tuning"}
OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "layer_range", "train_qformer", "train_projection")
OF_KEEPING = ("keep", "keep_rows", "keep_weight")
OF_ALL = (
    "train_iters",
    "lr",
    "lr_decay_style",
    "warmup",
    "weight_decay",
    "batch_size",
    "gradient_accumulation_steps",
    "precision",
    "max_source_length",
    "max_target_length",
    "prompt_language",
    "image_size",
    "seed",
)


def describe_adapter(settings: Settings, origin: Origin, report: dict) -> tuple[dict, str]:
    """The card of an adapter.

    Args:
        settings: of the run, resolved.
        origin: of the base model.
        report: of the run, see `report.json`.

    Returns:
        The fields for programs, and the text.
    """
    base = origin.data.get("base_model", origin.name)
    data = {**COMMON, **origin.data, "base_model": base, "base_model_relation": "adapter", "library_name": PEFT}
    data["tags"] = [*COMMON["tags"], settings.method]
    made_by = ", ".join(
        f"{package} {version}" for package, version in {**versions(), "peft": version_of("peft")}.items()
    )
    parts = [
        f"# {NAMES[settings.method]} on {origin.name}",
        f"An adapter for a VisualGLM, trained for {report['steps']} steps with `visualglm finetune`."
        f"{describe_best(report['best_checkpoint'])} It needs its base model, {base}.",
        f"## How to use it\n\n{LOADING[PEFT]}",
        f"## Results\n\n{describe_results(report['measured'])}",
        f"## What was forgotten\n\n{describe_forgotten(report['measured'])}",
        f"## Data\n\n{describe_data(settings, report['data'])}",
        f"## Settings\n\n{describe_settings(settings)}\n\nMade by {made_by}.",
        f"## Licence of the weights\n\n{describe_licence(origin)}",
    ]
    return data, "\n\n".join(parts)


def describe_best(checkpoint: str | None) -> str:
    return f" It is the best of the evaluated checkpoints, {checkpoint}." if checkpoint else ""


def describe_results(measured: dict[str, dict]) -> str:
    if not measured:
        return "No answers were measured."
    lines = ["| | examples | right before | right after | loss before | loss after |", "|---|---|---|---|---|---|"]
    for name, figures in measured.items():
        before, after = figures["before"], figures["after"]
        cells = (figures["examples"], before["right"], after["right"], f"{before['loss']:.3f}", f"{after['loss']:.3f}")
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", "An answer is right if it is exactly the wanted one; losses are per token."])


def describe_forgotten(measured: dict[str, dict]) -> str:
    """How many of the old answers are left, with some that are not."""
    lines = []
    for name, figures in measured.items():
        if name != HELD_OUT:
            left, before = figures["after"]["right"], figures["before"]["right"]
            lines.append(f"Of {before} {name} that were right before, {left} are right after training.")
            changed = [{key: one_line(text) for key, text in change.items()} for change in figures["changed"]]
            lines += [
                "- {question} was answered “{before}”, and is now answered “{after}”.".format(**c) for c in changed
            ]
    return "\n".join(lines) or "It was not measured: `--old-data` or `--keep` does."


def describe_data(settings: Settings, notes: Sequence[str]) -> str:
    files = {"trained on": settings.train_data, "held out": settings.valid_data, "old": settings.old_data}
    files |= {"kept": settings.keep_data}
    named = [f"{name}: {', '.join(one_line(file.name) for file in given)}" for name, given in files.items() if given]
    return "\n".join(f"- {one_line(line)}" for line in [*named, *notes])


def describe_settings(settings: Settings) -> str:
    names = [*(OF_LORA if settings.method in LORA else ["pre_seq_len"])]
    names += ["bits", "qlora_backend"] if settings.method == "qlora" else []
    names += [*OF_ALL, *(OF_KEEPING if settings.keeps_answers else ["keep"])]
    values = {name: getattr(settings, name) for name in names}
    shown = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in values.items()}
    lines = [f"| `--{name.replace('_', '-')}` | {value} |" for name, value in shown.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])
