"""TRL's trainers take the processor also for data that is text alone."""

import math

import pytest

from tests.helpers import assistant, user
from tests.training_helpers import trl_trainer


peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
pytest.importorskip("datasets")


QUESTIONS = ["你好", "<sop>是什么？"]
ROWS = {
    "SFT": [{"prompt": [user(query)], "completion": [assistant("您好<eop>！")]} for query in QUESTIONS],
    "DPO": [
        {"prompt": [user(query)], "chosen": [assistant("您好")], "rejected": [assistant("再见")]} for query in QUESTIONS
    ],
    "KTO": [
        {"prompt": [user(query)], "completion": [assistant("您好！")], "label": label}
        for query, label in zip(QUESTIONS, (True, False), strict=True)
    ],
}


@pytest.fixture
def trainer_of(tiny_original, processor, tmp_path):
    def trainer_of(method, rows):
        adapter = peft.LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
        options = {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False}
        return trl_trainer(method, tmp_path, rows, tiny_original, processor, adapter, **options)

    return trainer_of


@pytest.mark.parametrize("method", ROWS)
def test_a_trainer_takes_text_alone(method, trainer_of):
    if not hasattr(trl, f"{method}Trainer"):
        pytest.skip(f"this trl has no {method}")
    trainer = trainer_of(method, ROWS[method])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 1
    assert math.isfinite(losses[0])


def test_what_is_trained_is_the_conversation_of_chat(model, tokenizer, processor, trainer_of):
    [batch] = list(trainer_of("SFT", ROWS["SFT"]).get_train_dataloader())
    rows = {
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    answer = processor.tokenizer("您好<eop>！", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    prompts = [model.prepare_turn(tokenizer, query, None, None).inputs["input_ids"][0].tolist() for query in QUESTIONS]
    assert rows == {(*prompt, *answer, tokenizer.eos_token_id) for prompt in prompts}
