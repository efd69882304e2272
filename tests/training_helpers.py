"""What tests of training share: the example's rows, a run that learns nearly nothing, and what happens during it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from tests.commands import command
from tests.paths import ROOT, TINY
from visualglm_tools.training.settings import Settings


EXAMPLE = ROOT / "examples" / "background"
ROWS, HELD_OUT = EXAMPLE / "dataset.json", EXAMPLE / "held_out.json"


def short_run(folder: Path, **changes: Any) -> Settings:
    """LoRA on two layers of the tiny model for four steps of two rows."""
    usual = {"method": "lora", "model": TINY, "train_data": (ROWS,), "layer_range": ("0", "3"), "lr": 1e-2}
    steps = {"train_iters": 4, "batch_size": 2, "log_interval": 1, "keep": "none"}
    return Settings(save=folder, **{**usual, **steps, **changes})


def silent(line: str) -> None:
    """Takes what a run says, and says nothing."""


def train(options: str, folder: Path) -> int:
    """Run `visualglm finetune` in a folder of its own; returns its exit code, whoever ended it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            return command("finetune", *options.split())
        except SystemExit as end:
            return end.code


def adapter_in(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    """The trained tensors in a folder of results: of the end, or of a checkpoint."""
    return load_file(folder / name / "adapter_model.safetensors")


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class At(TrainerCallback):
    """Does something when so many steps are done and the next one begins."""

    def __init__(self, step: int, action: Callable[[], None]):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def interrupt() -> None:
    """Ctrl-C outside of what hears it."""
    raise KeyboardInterrupt


def send(*numbers: int) -> Callable[[], None]:
    """Signals to this process, one after the other."""

    def action() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return action


def run_out_of_memory() -> None:
    """What a GPU says that has too little."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")


# ---------------------------------------------------------------- TRL's trainers


def trl_trainer(
    method: str,
    folder: Path,
    rows: list[dict],
    checkpoint: Path,
    processor,
    adapter,
    kind: type | None = None,
    reward: Callable | None = None,
    **options,
) -> Trainer:
    """TRL's trainer of a method ("SFT", "DPO", …), or a `kind` of it, for a checkpoint in float32 on the CPU."""
    from transformers import AutoModelForImageTextToText

    from visualglm_hf import register

    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    register()
    usual = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    usual |= {"max_length": None} if reward is None else {}
    return (kind or getattr(trl, f"{method}Trainer"))(
        model=AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32),
        args=getattr(trl, f"{method}Config")(output_dir=str(folder), logging_steps=1, **{**usual, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapter,
        **({} if reward is None else {"reward_funcs": reward}),
    )
