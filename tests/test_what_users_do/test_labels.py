"""Whatever labels are given, by whatever door, the model learns answers and never its context."""

import pytest
import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from transformers.utils import logging

from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error
from visualglm_hf.conversation import ANSWER_MARK
from visualglm_hf.glm_positions import build_glm_position_ids


ROW = [20, 21, 22, 1101, 1104, 700, 701, 702, 1105]  # three words, [gMASK], <sop>, three words, <eop>
SHORT = [20, 1101, 1104, 700, 1105]
TRAINER = {"use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def trained(tiny_original):
    """A model that tests may train a little; without dropout, so that two passes are the same."""
    model = load_float32(tiny_original).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What transformers' logger says."""
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    return caplog


def batch_of(rows: list[list[int]], pad_id: int, on_the_left: bool) -> dict:
    """Rows of ids padded to the longest."""
    width = max(map(len, rows))
    padding = [[pad_id] * (width - len(row)) for row in rows]
    ids = [pad + row if on_the_left else row + pad for pad, row in zip(padding, rows, strict=True)]
    mask = [[0] * len(pad) + [1] * len(row) for pad, row in zip(padding, rows, strict=True)]
    mask = mask if on_the_left else [row[::-1] for row in mask]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def only_answers(batch: dict) -> torch.Tensor:
    """The ids from `<sop>` on."""
    is_answer = ((batch["input_ids"] == 1104).cumsum(-1) > 0) & (batch["attention_mask"] > 0)
    return batch["input_ids"].masked_fill(~is_answer, -100)


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    """All gradients of a loss in one row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


# The loss of the model


@pytest.mark.parametrize("on_the_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("door", ["ids", "embeddings", "position_ids", "glm_position_ids", "shift_labels"])
def test_labels_on_the_context_and_on_padding_do_not_count(trained, door, on_the_left):
    batch = batch_of([ROW, SHORT], 3, on_the_left)
    wanted, labels = only_answers(batch), batch["input_ids"]
    expected = trained(**batch, labels=wanted).loss
    inputs, extra = dict(batch), {}
    if door == "embeddings":
        inputs["inputs_embeds"] = trained.get_input_embeddings()(inputs.pop("input_ids"))
    elif door == "shift_labels":
        extra["shift_labels"] = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    elif door != "ids":
        inputs[door] = build_glm_position_ids(*batch.values(), trained.config.text_config)
    loss = trained(**inputs, labels=labels, **extra).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert relative_error(gradients(trained, loss), gradients(trained, expected)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("kind", ["prefix", "virtual tokens"])
def test_labels_on_the_context_do_not_count_through_peft(tiny_original, kind):
    peft = pytest.importorskip("peft")
    base = load_float32(tiny_original)
    name = {"prefix": "PrefixTuningConfig", "virtual tokens": "PromptTuningConfig"}[kind]
    tuned = peft.get_peft_model(base, getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    batch = batch_of([ROW, SHORT], 3, on_the_left=True)
    with torch.no_grad():
        expected, loss = (tuned(**batch, labels=labels).loss for labels in (only_answers(batch), batch["input_ids"]))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_labels_of_an_answer_after_a_cached_context_count(model):
    ids = torch.tensor([ROW])
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    with torch.no_grad():
        expected = model(ids, labels=ids.masked_fill(torch.arange(9) < 5, -100)).loss
        cache = model(ids[:, :4], position_ids=positions[..., :4], use_cache=True).past_key_values
        loss = model(ids[:, 4:], labels=ids[:, 4:], position_ids=positions[..., 4:], past_key_values=cache).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_labels_that_do_not_count_are_reported_once(tiny_original, warnings):
    model = load_float32(tiny_original)
    batch = batch_of([ROW, SHORT], 3, on_the_left=True)
    model(**batch, labels=only_answers(batch))
    assert "do not count" not in warnings.text
    for _ in range(2):
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    assert warnings.text.count("do not count") == 1
    assert "5 of the 13 labels of this batch are before <sop> or padding" in warnings.text


@pytest.mark.parametrize(
    ("ids", "labels", "complaint"),
    [
        (ROW[:5], [*ROW[:4], -100], "No label counts: of 3 that are not -100, all are before <sop>"),
        (ROW, [-100] * 9, "No label counts: of 0 that are not -100"),
        ([*ROW, *ROW], [*ROW, *ROW], "more than one <sop>"),
        (ROW[:4], ROW[:4], "Every sequence needs"),
    ],
    ids=["context", "none", "packed", "no start"],
)
def test_labels_of_which_nothing_is_learned_are_refused(model, ids, labels, complaint):
    with pytest.raises(ValueError, match=complaint):
        model(torch.tensor([ids]), labels=torch.tensor([labels]))


def test_a_part_of_a_batch_may_have_no_labels(model):
    loss = model(torch.tensor([ROW]), labels=torch.full((1, 9), -100), num_items_in_batch=torch.tensor(7)).loss
    assert loss.item() == 0


@pytest.mark.parametrize("count", [8, torch.tensor(8)], ids=["number", "tensor"])
def test_labels_that_do_not_count_do_not_divide_the_loss(model, count):
    """`num_items_in_batch` is the Trainer's: of labels from the second on."""
    ids = torch.tensor([ROW])
    expected = model(ids, labels=ids).loss
    assert model(ids, labels=ids, num_items_in_batch=count).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    answers = ids.masked_fill(torch.arange(9) < 4, -100)
    assert model(ids, labels=answers, num_items_in_batch=10).loss.item() == pytest.approx(expected.item() / 2, rel=1e-6)


# Losses that others compute


@pytest.mark.parametrize("door", ["logits", "states"])
def test_what_the_context_predicts_gives_no_gradients_whoever_computes_the_loss(trained, door):
    def losses() -> torch.Tensor:
        """Of all tokens but the first, through our head or around it, as `compute_loss_func` and trainers do."""
        if door == "logits":
            logits = trained(ids).logits
        else:
            logits = trained.base_model(input_ids=ids).last_hidden_state @ trained.lm_head.weight.detach().T
        return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")

    ids = torch.tensor([ROW])
    everything, answer = gradients(trained, losses().sum()), gradients(trained, losses()[3:].sum())
    assert relative_error(everything, answer) < FLOAT32_TOLERANCE
    assert answer.abs().max() > 0


def test_logits_of_the_context_are_the_same_in_training(trained):
    ids = torch.tensor([ROW])
    with torch.no_grad():
        expected = trained.eval()(ids).logits
    assert relative_error(trained.train()(ids).logits.detach(), expected) < FLOAT32_TOLERANCE


def test_label_smoothing_of_the_trainer_is_warned_of(trained, warnings):
    trained(torch.tensor([ROW]), num_items_in_batch=torch.tensor(5))
    assert "does not shift the labels" in warnings.text


# Trainers


def test_the_collator_for_language_modeling_teaches_answers(trained, tokenizer, tmp_path):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [{"input_ids": row} for row in (ROW, SHORT, ROW)]
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, learning_rate=0.0, **TRAINER)
    trainer = Trainer(model=trained, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    batch = batch_of([ROW, SHORT, ROW], 3, on_the_left=True)
    expected = trained(**batch, labels=only_answers(batch)).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def sft_trainer(model, rows, folder, processor, peft_config=None, **options):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    return trl.SFTTrainer(
        model=model,
        processing_class=processor,
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.SFTConfig(output_dir=str(folder), **{"max_length": None, **TRAINER, **options}),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("adapter", ["LoRA", "prompt tuning", None])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_messages_in_trl_teach_answers_alone(tiny_original, processor, pictures, tmp_path, adapter, loss_type):
    peft = pytest.importorskip("peft")
    configs = {
        "LoRA": peft.LoraConfig(target_modules=r"transformer\..*query_key_value", r=2, init_lora_weights=False),
        "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        None: None,
    }
    base = load_float32(tiny_original)
    texts = [("这是什么？", "一只猫。"), ("描述这张图片。", "图片中有两个圆形。")]
    rows = [
        {
            "images": [picture],
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }
        for (question, answer), picture in zip(texts, pictures, strict=False)
    ]
    trainer = sft_trainer(base, rows, tmp_path, processor, configs[adapter], loss_type=loss_type)
    model = trainer.model.eval()
    [batch] = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    is_context = (batch["input_ids"] == 1104).cumsum(-1) == 0
    assert (batch["labels"] != -100)[is_context & (batch["attention_mask"] == 1)].all()  # that is what TRL asks for
    theirs = trainer.compute_loss(model, dict(batch))
    wanted = batch["labels"].masked_fill(is_context, -100)
    ours = trainer.compute_loss(model, {**batch, "labels": wanted})
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
    assert relative_error(gradients(model, theirs), gradients(model, ours)) < FLOAT32_TOLERANCE


def test_log_probabilities_of_sampled_answers_may_be_asked_whatever_was_sampled(tiny_original, processor, tmp_path):
    """`<sop>` and `<unk>` among them, and nothing at all, as in TRL's GRPO."""
    row = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}
    model = load_float32(tiny_original)
    model = sft_trainer(model, [row], tmp_path, processor.tokenizer).model.eval()  # which gives it a fused head
    ids = torch.tensor([[*ROW[:5], 700, 0, 1104, 702, 1105]])
    labels = ids.masked_fill(torch.arange(10) < 5, -100)
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][:, 4:]
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
        nothing = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert relative_error(found.log_probs[:, 4:], expected) < FLOAT32_TOLERANCE
    assert not nothing.log_probs.any()


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 64}, {"padding_free": True}], ids=" ".join)
def test_packing_in_trl_is_refused_in_words(tiny_original, tokenizer, tmp_path, options):
    model = load_float32(tiny_original)
    row = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}
    trainer = sft_trainer(model, [row] * 4, tmp_path, tokenizer, per_device_train_batch_size=2, **options)
    with pytest.raises(ValueError, match="packing=False and padding_free=False"):
        trainer.train()


LAYOUTS = {
    "strings": {"prompt": "问：你好\n答：", "completion": "你好！"},
    "text": {"text": "问：你好\n答：你好！"},
    "strings with a mark": {"prompt": f"问：你好\n答：{ANSWER_MARK}", "completion": "你好！"},
    "messages": {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_in_front_of_their_mark_are_not_learned_as_empty(tiny_original, tokenizer, tmp_path, layout):
    model = load_float32(tiny_original)
    trainer = sft_trainer(model, [LAYOUTS[layout]] * 2, tmp_path, tokenizer)
    if layout in ("strings", "text"):
        with pytest.raises(ValueError, match="U[+]FFF9 where the answer begins"):
            trainer.train()
    else:
        trainer.train()


def test_the_state_of_the_last_token_passes_gradients_on_to_a_value_head(trained):
    batch = batch_of([ROW, SHORT], pad_id=3, on_the_left=False)
    states = trained.base_model(**batch).last_hidden_state
    weight = trained.transformer.layers[0].mlp.dense_4h_to_h.weight
    for row, length in enumerate((len(ROW), len(SHORT))):
        assert torch.autograd.grad(states[row, length - 1].sum(), weight, retain_graph=True)[0].any()
