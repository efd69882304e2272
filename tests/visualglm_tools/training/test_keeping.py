"""Kept answers: how far a model is from them, which come when, and what cannot be kept."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import log_softmax
from transformers import Trainer, TrainingArguments

from tests.helpers import load_float32
from tests.paths import ROOT, TINY
from tests.training_helpers import EXAMPLE, At, adapter_in, interrupt, is_same, short_run, silent, trl_trainer
from visualglm_hf import VisualGLMConfig
from visualglm_tools.checkpoints.loading import load_processor
from visualglm_tools.training.adapters import add_adapter, lora_config, prefix_config
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import IGNORED, Collator, Encoder
from visualglm_tools.training.keeping import (
    KeepAnswers,
    KeptAnswers,
    Predictions,
    check_switchable,
    count_answer,
    predict_without_adapter,
)
from visualglm_tools.training.run import finetune


OLD = EXAMPLE / "old_abilities.json"
ADAPTERS = {"lora": lora_config(4, range(4)), "ptuning": prefix_config(4, VisualGLMConfig.from_pretrained(TINY))}


SIZES = {"lora": 0.1, "ptuning": 1.0}  # of what `changed_model` adds


class KeepingTrainer(KeepAnswers, Trainer):
    pass


@pytest.fixture(scope="module")
def processor():
    return load_processor(TINY, VisualGLMConfig.from_pretrained(TINY))


@pytest.fixture(scope="module")
def examples(processor):
    return [row[0] for row in read_dataset([OLD], Encoder(processor, 64, 256, 2048))]


@pytest.fixture
def kept(examples, processor):
    return KeptAnswers(examples[:6], Collator(processor), count=3, weight=1.0, seed=0)


def changed_model(method: str):
    """The tiny model with an adapter that says something."""
    model = add_adapter(load_float32(TINY), ADAPTERS[method]).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += SIZES[method] * torch.randn(parameter.shape, generator=generator)
    return model


# ---------------------------------------------------------------- the divergence


def test_an_adapter_that_says_nothing_yet_is_no_distance_away(kept):
    model = add_adapter(load_float32(TINY), lora_config(4, [0]))
    assert abs(kept.divergence(model, model, [0, 1, 2]).item()) < 1e-6


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_divergence_is_that_of_the_definition(method, kept):
    model, base = changed_model(method), load_float32(TINY)
    total, tokens = 0.0, 0
    for number in (4, 1, 3):
        batch = kept.batch([number], torch.device("cpu"))
        labels = batch.pop("labels")
        with torch.no_grad():
            wanted, found = (log_softmax(each(**batch).logits[0].double(), -1) for each in (base, model))
        for place in range(labels.shape[1] - 1):
            if labels[0, place + 1] != IGNORED:
                total += (wanted[place].exp() * (wanted[place] - found[place])).sum().item()
                tokens += 1
    assert kept.divergence(model, model, [4, 1, 3]).item() == pytest.approx(total / tokens, rel=1e-3)


@pytest.mark.parametrize("method", ADAPTERS)
def test_stored_predictions_are_those_that_a_step_would_compute(method, kept, tmp_path):
    model = changed_model(method)
    kept.predictions = Predictions(tmp_path / "new" / "predictions.safetensors", model, kept)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["predictions.safetensors"]
    stored = kept.predictions.of([5, 0], torch.device("cpu")).float()
    computed = predict_without_adapter(model, kept.batch([5, 0], torch.device("cpu")))
    assert torch.allclose(stored, computed, rtol=1e-3, atol=1e-3)
    assert model.training


def test_what_is_computed_for_the_base_leaves_the_model_as_it_was(kept):
    model = changed_model("lora")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    kept.divergence(model, model, [0, 1]).backward()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, is_trained in before.items() if is_trained
    }


# ---------------------------------------------------------------- which come when


@pytest.mark.parametrize(("count", "processes"), [(1, 1), (3, 1), (4, 2), (6, 3)])
def test_each_answer_comes_once_before_any_comes_again(count, processes, examples, processor):
    kept = KeptAnswers(examples[:12], Collator(processor), count, 1.0, seed=3)
    drawn = [
        number for step in range(24) for process in range(processes) for number in kept.draw(step, processes, process)
    ]
    rounds = [drawn[first : first + 12] for first in range(0, len(drawn) - 11, 12)]
    assert all(sorted(numbers) == list(range(12)) for numbers in rounds)
    assert len({tuple(numbers) for numbers in rounds}) > 1


def test_a_step_without_weight_on_it_is_the_step_without_keeping(tmp_path):
    plain, weightless = short_run(tmp_path / "plain"), short_run(tmp_path / "kept")
    finetune(plain, silent)
    finetune(replace(weightless, keep=None, keep_data=(OLD,), keep_weight=1e-38), silent)
    assert is_same(adapter_in(plain.save), adapter_in(weightless.save))


@pytest.mark.parametrize(
    "way",
    [
        "qlora",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("lora", "ptuning", "accumulating", "checkpointing")),
    ],
)
def test_an_interrupted_run_that_keeps_answers_resumes_to_the_same_adapter(way, tmp_path):
    changes = {"method": way} if way in ("lora", "ptuning", "qlora") else {}
    changes |= {"gradient_accumulation_steps": 2} if way == "accumulating" else {}
    changes |= {"checkpoint_activations": True} if way == "checkpointing" else {}
    settings = short_run(tmp_path / "whole", keep="self", keep_questions=6, save_interval=2, **changes)
    finetune(settings, silent)
    interrupted = replace(settings, save=tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        finetune(interrupted, silent, [At(3, interrupt)])
    finetune(replace(interrupted, resume=True), silent)
    assert is_same(adapter_in(settings.save), adapter_in(interrupted.save))


# ---------------------------------------------------------------- in the hands of others


def lost(model, examples, processor) -> float:
    """How far a model's answers are from those of the model without its adapter."""
    kept = KeptAnswers(examples, Collator(processor), len(examples), 1.0, 0)
    with torch.no_grad():
        return kept.divergence(model, model, range(len(examples))).item()


def test_the_mixin_works_in_a_plain_trainer(examples, processor, tmp_path):
    options = {"remove_unused_columns": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    rows = [row[0] for row in read_dataset([EXAMPLE / "dataset.json"], Encoder(processor, 64, 256, 2048))]
    distances = []
    for is_kept in (False, True):
        trainer = KeepingTrainer(
            model=add_adapter(load_float32(TINY), lora_config(4, range(4), alpha=16)),
            args=TrainingArguments(
                str(tmp_path), max_steps=12, learning_rate=1e-2, logging_steps=4, use_cpu=True, **options
            ),
            train_dataset=rows,
            data_collator=Collator(processor),
        )
        if is_kept:
            trainer.keep_answers(examples[:8], Collator(processor))
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(("keep_loss" in entry) == is_kept for entry in logged) and len(logged) == 3
        distances.append(lost(trainer.model, examples[:8], processor))
    assert distances[1] < 0.5 * distances[0]


def test_the_mixin_works_in_trls_trainer(examples, processor, tmp_path):
    trl = pytest.importorskip("trl")

    class KeepingSFTTrainer(KeepAnswers, trl.SFTTrainer):
        pass

    rows = [
        {
            "prompt": [{"role": "user", "content": example.conversation.question}],
            "completion": [{"role": "assistant", "content": "好的。"}],
        }
        for example in examples
        if not example.pictures
    ]
    adapter = LoraConfig(r=4, target_modules=r"transformer\.layers\.\d+\.attention\.(query_key_value|dense)")
    trainer = trl_trainer("SFT", tmp_path, rows, TINY, processor, adapter, kind=KeepingSFTTrainer, max_steps=3)
    trainer.keep_answers(examples[:8], Collator(processor), rows=2, file=tmp_path / "predictions.safetensors")
    trainer.train()
    logged = [entry["keep_loss"] for entry in trainer.state.log_history if "keep_loss" in entry]
    assert len(logged) == 3 and all(abs(value) < 0.01 for value in logged)  # at TRL's rate it learns little


def test_the_documented_lines_keep_answers_in_trls_trainer(processor, tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    document = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n([^`]*KeepAnswers[^`]*)```", document)
    monkeypatch.chdir(tmp_path)
    Path("old.jsonl").write_text('{"prompt": "你好", "label": "你好！请给我一张图片。"}\n', encoding="utf-8")
    row = {"role": "user", "content": "谢谢"}, {"role": "assistant", "content": "好的。"}
    options = {"max_length": None, "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1}
    names = {
        "processor": processor,
        "model": load_float32(TINY),
        "dataset": datasets.Dataset.from_list([{"prompt": [row[0]], "completion": [row[1]]}] * 4),
        "args": trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, **options),
        "peft_config": LoraConfig(r=4, target_modules=r"transformer\.layers\.\d+\.attention\.dense"),
    }
    exec(lines, names)
    assert sum("keep_loss" in entry for entry in names["trainer"].state.log_history) == 2


# ---------------------------------------------------------------- refusals


def adapted(**changes):
    usual = {"r": 2, "target_modules": r"transformer\.layers\.0\.attention\.dense"}
    return add_adapter(load_float32(TINY), LoraConfig(**{**usual, **changes}))


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_an_adapter_that_can_be_switched_off_is_taken(changes):
    check_switchable(adapted(**changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_float32(TINY), "this one has none: its own weights are trained"),
        (lambda: adapted(bias="all"), r"trained weights are not switched off with the adapter, such as '.*bias'"),
        (lambda: adapted(bias="lora_only"), "are not switched off with the adapter"),
    ],
)
def test_a_model_that_does_not_become_again_what_it_was_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        check_switchable(make())


def test_no_rows_to_keep_is_an_error(processor, tmp_path):
    trainer = KeepingTrainer(model=adapted(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.raises(ValueError, match="there are no answers to keep"):
        trainer.keep_answers([], Collator(processor))


def test_predictions_of_other_rows_or_of_another_model_are_refused(examples, processor, tmp_path):
    file = tmp_path / "predictions.safetensors"
    trainer = KeepingTrainer(model=adapted(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.keep_answers(examples[:2], Collator(processor), file=file)
    trainer.keep_answers(examples[:2], Collator(processor), file=file)
    with pytest.raises(ValueError, match="has what was predicted of other answers, or by another model. Remove it"):
        trainer.keep_answers(examples[1:3], Collator(processor), file=file)
    with torch.no_grad():
        trainer.model.get_base_model().transformer.word_embeddings.weight.mul_(1.5)
    with pytest.raises(ValueError, match="or by another model"):
        trainer.keep_answers(examples[:2], Collator(processor), file=file)


def test_a_model_that_is_divided_among_processes_keeps_nothing(examples, processor, tmp_path):
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer = KeepingTrainer(model=adapted(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
        setattr(trainer, name, True)
        with pytest.raises(ValueError, match="a model that FSDP or DeepSpeed divides"):
            trainer.keep_answers(examples[:2], Collator(processor))


def test_too_many_predictions_for_the_disk_are_computed_in_each_step(examples, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("visualglm_tools.training.keeping.STORED_AT_MOST", 100)
    trainer = KeepingTrainer(model=adapted(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.keep_answers(examples[:2], Collator(processor), file=tmp_path / "predictions.safetensors")
    assert trainer.kept.predictions is None and not (tmp_path / "predictions.safetensors").exists()
    assert count_answer(examples[0]) == len([label for label in examples[0].labels if label != IGNORED])
