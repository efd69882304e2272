"""TRL's supervised fine-tuning takes the model and the processor as they are."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.helpers import assistant, user
from tests.paths import TINY
from tests.training_helpers import EXAMPLE, ROWS, trl_trainer
from visualglm_hf import register
from visualglm_tools.training.adapters import lora_config
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import Collator, Encoder
from visualglm_tools.training.report import measure


pytest.importorskip("trl")
pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def parts():
    register()
    return AutoProcessor.from_pretrained(TINY), json.loads(ROWS.read_text(encoding="utf-8"))


def prompt_and_completion(row, images):
    return {"images": images, "prompt": [user(row["prompt"])], "completion": [assistant(row["label"])]}


def messages(row, images):
    return {"images": images, "messages": [user(row["prompt"]), assistant(row["label"])]}


def trainer_for(parts, rows, folder, adapter=None, **options):
    usual = {"per_device_train_batch_size": 3, "learning_rate": 1e-2}
    adapter = adapter or lora_config(8, range(4), alpha=8)
    return trl_trainer("SFT", folder, rows, TINY, parts[0], adapter, **{**usual, **options})


@pytest.mark.parametrize("layout", [prompt_and_completion, messages])
def test_sft_trainer_learns_from_pictures(layout, parts, tmp_path):
    rows = [layout(row, [Image.open(EXAMPLE / row["img"])]) for row in parts[1][:3]]
    trainer = trainer_for(parts, rows, tmp_path, max_steps=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_sft_trainer_computes_the_models_own_loss_on_answers(parts, tmp_path):
    processor, source = parts
    rows = [prompt_and_completion(row, [Image.open(EXAMPLE / row["img"])]) for row in source[:2]]
    rows.append(prompt_and_completion({"prompt": "你好", "label": "你好！请给我一张图片。"}, []))
    trainer = trainer_for(parts, rows, tmp_path, max_steps=1)
    trainer.model.eval()
    [batch] = list(trainer.get_train_dataloader())
    answers = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert sorted(answers) == sorted(row["completion"][0]["content"].replace("！", "!") for row in rows)
    with torch.no_grad():
        theirs, ours = trainer.compute_loss(trainer.model, dict(batch)), trainer.model.get_base_model()(**batch).loss
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [prompt_and_completion, messages])
def test_either_layout_teaches_the_example_and_keeps_old_abilities(layout, parts, tmp_path):
    """As the example of docs/finetuning.md is trained."""
    processor, source = parts
    rows = [layout(row, [Image.open(EXAMPLE / row["img"])]) for row in source]
    options = {"per_device_train_batch_size": 4, "lr_scheduler_type": "cosine", "warmup_steps": 6, "weight_decay": 0.01}
    torch.manual_seed(1)
    trainer = trainer_for(
        parts, rows, tmp_path, lora_config(10, range(4), alpha=1), max_steps=300, seed=1, data_seed=1, **options
    )
    trainer.train()
    right = {}
    for name in ("held_out", "old_abilities"):
        found = read_dataset([EXAMPLE / f"{name}.json"], Encoder(processor, 64, 256, 2048))
        examples = [example for examples in found for example in examples]
        right[name] = measure(trainer.model, Collator(processor), examples, 8).figures["right"]
    print(layout.__name__, right)
    assert right["held_out"] == 5
    assert right["old_abilities"] >= 38
