"""The model card of an adapter."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.training_helpers import EXAMPLE, HELD_OUT, short_run, silent
from visualglm_tools.checkpoints.cards import Origin
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.training.card import describe_adapter
from visualglm_tools.training.run import finetune


MEASURED = {
    "held out": {"examples": 5, "before": {"right": 0, "loss": 7.0}, "after": {"right": 4, "loss": 0.1}},
    "kept answers": {
        "examples": 9,
        "before": {"right": 9, "loss": 0.2},
        "after": {"right": 7, "loss": 0.3},
        "changed": [{"question": "What?\n# no heading", "before": "A cat.", "after": "A dog."}],
    },
}
REPORT = {
    "steps": 300,
    "best_checkpoint": None,
    "measured": MEASURED,
    "data": ["rows.json: 15 rows, the original's layout."],
}


TINY_ORIGIN = Origin("tiny")


def card_of(report=REPORT, origin=TINY_ORIGIN, **changes):
    settings = replace(short_run(Path("out")), train_data=(Path("/home/somebody/rows.json"),), **changes)
    return describe_adapter(settings.resolved(4, False)[0], origin, report)


def test_the_adapters_folder_has_a_card_that_a_hub_understands_and_loads_as_before(tmp_path):
    settings = short_run(tmp_path / "out", train_iters=1, valid_data=(HELD_OUT,), old_data=(EXAMPLE / "dataset.json",))
    finetune(settings, silent)
    card = ModelCard.load(tmp_path / "out" / "adapter" / "README.md")
    known = card.data.to_dict()
    assert (known["library_name"], known["pipeline_tag"]) == ("peft", "image-text-to-text")
    assert (known["base_model"], known["base_model_relation"]) == ("visualglm-tiny", "adapter")
    assert known["license"] == "apache-2.0"  # as the card of the tiny model says
    assert "lora" in known["tags"] and known["language"] == ["zh", "en"]
    assert "| held out | 5 | 0 | 0 |" in card.text and "trained for 1 steps" in card.text
    assert str(tmp_path) not in card.text
    load_model(settings.model, "cpu", "float32", adapter=tmp_path / "out" / "adapter")


def test_a_card_says_what_was_learned_and_what_was_forgotten():
    _, text = card_of()
    assert "| held out | 5 | 0 | 4 | 7.000 | 0.100 |" in text
    assert "Of 9 kept answers that were right before, 7 are right after training." in text
    assert "- What? # no heading was answered “A cat.”, and is now answered “A dog.”." in text
    assert "rows.json: 15 rows" in text and "/home/somebody" not in text


def test_a_card_says_which_checkpoint_it_is_where_that_is_not_the_last_one():
    assert "best of" not in card_of()[1]
    _, text = card_of(REPORT | {"best_checkpoint": "checkpoint-60"})
    assert "trained for 300 steps with `visualglm finetune`. It is the best of the evaluated checkpoints, " in text
    assert "evaluated checkpoints, checkpoint-60." in text


def test_a_card_of_low_bits_says_how_many(tmp_path):
    finetune(short_run(tmp_path / "out", method="qlora", train_iters=1, answers=0), silent)
    assert "| `--bits` | 4 |" in (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_card_says_that_nothing_was_measured():
    _, text = card_of(REPORT | {"measured": {}})
    assert "No answers were measured." in text and "It was not measured" in text


@pytest.mark.parametrize(
    ("method", "own", "others"),
    [
        ("lora", {"lora-rank", "layer-range"}, {"bits", "pre-seq-len"}),
        ("qlora", {"lora-rank", "qlora-backend"}, {"pre-seq-len"}),
        ("ptuning", {"pre-seq-len"}, {"lora-rank", "layer-range", "qlora-backend"}),
    ],
)
def test_a_card_has_the_settings_of_its_method(method, own, others):
    data, text = card_of(method=method, layer_range=None)
    shown = {line.split("`")[1].removeprefix("--") for line in text.splitlines() if line.startswith("| `--")}
    assert own | {"lr", "train-iters", "seed", "keep"} <= shown and not others & shown
    assert method in data["tags"]


def test_a_licence_that_is_known_is_named_and_one_that_is_not_is_not_guessed():
    fields = {"base_model": "THUDM/visualglm-6b", "license": "other", "license_name": "its-own"}
    data, text = card_of(origin=Origin("prepared", fields))
    assert (data["base_model"], data["license"], data["license_name"]) == ("THUDM/visualglm-6b", "other", "its-own")
    assert "its-own" in text
    data, text = card_of()
    assert "license" not in data and data["base_model"] == "tiny"
    assert "which have no card that names it" in text
