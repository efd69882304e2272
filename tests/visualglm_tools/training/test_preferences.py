"""TRL's trainers of preferences take the model and the processor as they are: what they compute is what the model says.

Every score that `DPOTrainer` and `GRPOTrainer` ask for, of the adapter and of the model without it, is asked for again
token by token: one row, no padding, no cache, no labels, this row's pictures.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor

from tests.helpers import FLOAT32_TOLERANCE, assistant, load_float32, relative_error, user
from tests.paths import ROOT, TINY
from tests.training_helpers import EXAMPLE, trl_trainer
from tools.tiny import pictures, questions
from visualglm_hf import register
from visualglm_hf.conversation import clean_response
from visualglm_tools.training.adapters import lora_config
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import Collator, Encoder
from visualglm_tools.training.keeping import KeepAnswers


peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl", minversion="1.16")  # whose trainers ask for scores by one keyword
datasets = pytest.importorskip("datasets")

DRAWN = [pictures.sample_picture(number, "contradicting", "new") for number in range(4)]
SHOWN = [[DRAWN[0]], [], [DRAWN[1], DRAWN[2]], [DRAWN[3]]]  # one picture, none, two, one
ASKED = ["描述这张图片。", "你好", "What do you see?", "Describe the image."]  # of different lengths
BETA, TEMPERATURE = 0.3, 0.7


@pytest.fixture(scope="module")
def processor():
    register()
    return AutoProcessor.from_pretrained(TINY)


def some_lora() -> "peft.LoraConfig":
    """An adapter that changes answers, and what is seen of pictures, from the beginning."""
    adapter = lora_config(2, range(4), alpha=2, train_qformer=True)
    adapter.init_lora_weights = False
    return adapter


def prompts() -> list[dict]:
    drawn = [[picture.draw() for picture in each] for each in SHOWN]
    return [{"images": images, "prompt": [user(asked)]} for images, asked in zip(drawn, ASKED, strict=True)]


def pairs() -> list[dict]:
    texts = [(questions.answer(DRAWN[0], "describe", "zh"), "一个。"), ("你好！请给我一张图片。", "再见！")]
    texts += [(questions.answer(DRAWN[number], "describe", "en"), "One.") for number in (2, 3)]
    return [
        row | {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        for row, (chosen, rejected) in zip(prompts(), texts, strict=True)
    ]


def ask_token_by_token(model, processor, row: dict, answer: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The logarithm of the probability of each token of an answer, [N]."""
    content = [{"type": "image", "image": image} for image in row["images"]]
    content.append({"type": "text", "text": row["prompt"][0]["content"]})
    inputs = processor.apply_chat_template(
        [user(content)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids, found = inputs["input_ids"], []
    for token in answer:
        logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits[0, -1] / temperature
        found.append(logits.log_softmax(-1)[token])
        ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
    return torch.stack(found)


@contextmanager
def scores_of(model) -> Iterator[list]:
    """What a trainer asks of a model and gets: inputs, and the log-probabilities of all tokens but the first."""
    asked = []

    def note(module, args, kwargs, outputs) -> None:
        if kwargs.get("fused_lm_head"):
            asked.append(SimpleNamespace(inputs=kwargs, found=outputs.log_probs))

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield asked
    finally:
        hook.remove()


def tokens_of(labels: torch.Tensor) -> list[int]:
    return labels[labels != -100].tolist()


# ---------------------------------------------------------------- DPO


@pytest.fixture(scope="module")
def dpo(processor, tmp_path_factory):
    """A trainer, its only batch and what it asked of the model for it."""
    folder = tmp_path_factory.mktemp("dpo")
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "bf16": False, "beta": BETA}
    trainer = trl_trainer("DPO", folder, pairs(), TINY, processor, some_lora(), **options)
    trainer.model.eval()
    batch = dict(trainer.data_collator([trainer.train_dataset[number] for number in range(4)]))
    with scores_of(trainer.model) as asked, torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    return SimpleNamespace(trainer=trainer, batch=batch, asked=asked, loss=loss)


@torch.no_grad()
def dpo_scores(model, processor, rows: list[dict]) -> torch.Tensor:
    """The log-probability of each whole answer, those that are chosen first, [2 * rows]."""
    sums = []
    for side in ("chosen", "rejected"):
        for row in rows:
            answer = processor.tokenizer(row[side][0]["content"], add_special_tokens=False)["input_ids"]
            sums.append(ask_token_by_token(model, processor, row, [*answer, processor.tokenizer.eos_token_id]).sum())
    return torch.stack(sums)


def test_dpo_asks_for_answers_alone(dpo, processor):
    for asked in dpo.asked:
        found = [processor.tokenizer.decode(tokens_of(labels)) for labels in asked.inputs["labels"]]
        wanted = [row[side][0]["content"] for side in ("chosen", "rejected") for row in pairs()]
        assert found == [text.translate({ord("，"): ",", ord("！"): "!"}) for text in wanted]


def test_dpo_scores_answers_as_the_model_does_token_by_token(dpo, processor):
    model, rows = dpo.trainer.model, pairs()
    of_adapter, of_base = (asked.found.sum(1) for asked in dpo.asked)
    with_adapter = dpo_scores(model, processor, rows)
    with model.disable_adapter():
        without = dpo_scores(model, processor, rows)
    assert relative_error(of_adapter, with_adapter) < FLOAT32_TOLERANCE
    assert relative_error(of_base, without) < FLOAT32_TOLERANCE
    chosen, rejected = (BETA * (with_adapter - without)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    assert dpo.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_dpo_shows_each_row_its_own_pictures(dpo, processor):
    """With the pictures of two rows exchanged, the scores of these change, as those of such rows do."""
    trainer, rows = dpo.trainer, pairs()
    examples = [trainer.train_dataset[number] for number in range(4)]
    for swapped in (rows, examples):
        swapped[0]["images"], swapped[3]["images"] = swapped[3]["images"], swapped[0]["images"]
    with scores_of(trainer.model) as asked, torch.no_grad():
        trainer.compute_loss(trainer.model, dict(trainer.data_collator(examples)))
    found, before = asked[0].found.sum(1), dpo.asked[0].found.sum(1)
    changed = (found - before).abs() > 0.01
    assert changed.tolist() == [True, False, False, True] * 2
    assert relative_error(found[changed], dpo_scores(trainer.model, processor, rows[::3])) < FLOAT32_TOLERANCE


# ---------------------------------------------------------------- GRPO


@pytest.fixture(scope="module")
def grpo(processor, tmp_path_factory):
    """A trainer after two steps at a rate of 0, what it asked of the model, and what the reward was told.

    Two steps share their answers, which are shuffled and divided between them, with their pictures.
    """
    told = []

    def count_letters(prompts, completions, completion_ids, images, truth, **others) -> list[float]:
        told.append(
            SimpleNamespace(prompts=prompts, completions=completions, ids=completion_ids, images=images, truth=truth)
        )
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [row | {"truth": number} for number, row in enumerate(prompts())]
    options = {"max_steps": 2, "steps_per_generation": 2, "learning_rate": 0.0, "bf16": False}
    options |= {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8}
    trainer = trl_trainer(
        "GRPO",
        tmp_path_factory.mktemp("grpo"),
        rows,
        TINY,
        processor,
        some_lora(),
        reward=count_letters,
        beta=BETA,
        temperature=TEMPERATURE,
        **options,
    )
    with scores_of(trainer.model) as asked:
        trainer.train()
    return SimpleNamespace(trainer=trainer, asked=asked, told=told)


def test_grpo_tells_the_reward_whose_answers_and_pictures_they_are(grpo, processor):
    [told] = grpo.told
    rows = prompts()
    assert sorted(told.truth) == [0, 0, 1, 1, 2, 2, 3, 3]
    for number, prompt, images in zip(told.truth, told.prompts, told.images, strict=True):
        assert prompt[-1]["content"][-1]["text"] == ASKED[number]
        assert [each.tobytes() for each in images] == [each.tobytes() for each in rows[number]["images"]]
    texts = [completion[0]["content"] for completion in told.completions]
    assert texts == processor.batch_decode(told.ids, skip_special_tokens=True)
    assert processor.post_process_image_text_to_text(told.ids) == [clean_response(text) for text in texts]


def test_grpo_scores_answers_as_the_model_does_token_by_token(grpo, processor):
    """The old scores and those of the model without its adapter, in parts; then those that each step learns from."""
    model, rows, asked = grpo.trainer.model.eval(), prompts(), grpo.asked
    assert len(asked) == 6
    for number, each in enumerate(asked):
        for ids, labels, found in zip(each.inputs["input_ids"], each.inputs["labels"], each.found, strict=True):
            [row] = [row for row in rows if row["prompt"][0]["content"] in processor.decode(ids).replace("<unk>", "")]
            with torch.no_grad():
                if number in (2, 3):
                    with model.disable_adapter():
                        expected = ask_token_by_token(model, processor, row, tokens_of(labels), TEMPERATURE)
                else:
                    expected = ask_token_by_token(model, processor, row, tokens_of(labels), TEMPERATURE)
            assert found[labels[1:] != -100].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


def test_grpo_samples_from_what_it_scores(grpo, processor):
    """No option of the checkpoint's own holds beside TRL's, nor may what is suppressed matter."""
    trainer = grpo.trainer
    row = prompts()[0]
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": ASKED[0]}]
    inputs = processor.apply_chat_template(
        [user(content)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = trainer.model.eval()
    output = model.generate(
        **inputs, generation_config=trainer.generation_config, output_scores=True, return_dict_in_generate=True
    )
    answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    scores = [score[0].log_softmax(-1)[token] for score, token in zip(output.scores, answer, strict=True)]
    with torch.no_grad():
        expected = ask_token_by_token(model, processor, row, answer, TEMPERATURE)
    assert torch.stack(scores).tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


def test_the_documented_lines_train_from_a_reward(processor, tmp_path):
    document = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n([^`]*GRPOTrainer[^`]*)```", document)
    rows = [row | {"objects": ["圆形", "爱心"]} for row in prompts()]
    options = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    names = {
        "processor": processor,
        "model": load_float32(TINY),
        "dataset": datasets.Dataset.from_list(rows),
        "options": {**options, "bf16": False, "logging_steps": 1},
    }
    exec(lines.replace("batch_size=16", "batch_size=8"), names)
    [logged] = [entry for entry in names["trainer"].state.log_history if "reward" in entry]
    assert 0 <= logged["reward"] <= 2 and math.isfinite(logged["loss"])
    answers = [[{"role": "assistant", "content": text}] for text in ("一个圆形。", "一个圆形和一个爱心。")]
    assert names["reward"](answers, [["圆形", "爱心"]] * 2) == [1.0, 2.0]


# ---------------------------------------------------------------- beside what there is, and what is refused


class KeepingDPOTrainer(KeepAnswers, trl.DPOTrainer):
    pass


def test_dpo_may_keep_answers(processor, tmp_path):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "learning_rate": 1e-3}
    trainer = trl_trainer("DPO", tmp_path, pairs(), TINY, processor, some_lora(), kind=KeepingDPOTrainer, **options)
    old = read_dataset([EXAMPLE / "old_abilities.json"], Encoder(processor, 64, 256, 2048))
    trainer.keep_answers([example for row in old for example in row][-4:], Collator(processor), weight=10.0)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < second["keep_loss"] < first["keep_loss"] / 2
    assert math.isfinite(second["loss"])


def test_a_prefix_is_not_trained_with_checkpointed_activations():
    """TRL's trainers checkpoint by default, and the cache with the prefix would be filled twice."""
    model = peft.get_peft_model(
        load_float32(TINY), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    text = model.train().config.text_config
    ids = torch.tensor([[20, text.gmask_token_id, text.bos_token_id, 30]])
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be filled twice.*gradient_checkpointing=False"):
        model(input_ids=ids, labels=ids)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_scores_are_not_computed_from_the_codes_of_a_quantized_head():
    """TRL multiplies tiles of the head's weight itself."""
    head = load_float32(TINY).quantize(8, lm_head=True).get_output_embeddings()
    with pytest.raises(ValueError, match="for TRL without lm_head=True"):
        torch.mm(torch.ones(1, head.in_features), head.weight[:8].to(torch.float32).t())
