"""`scripts/selftest.py`: it passes what is whole and names what is not."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from tests.commands import check
from tests.damage import (
    EMBEDDINGS,
    FIRST,
    LAST,
    change_config,
    change_shard,
    cut_shard,
    cut_tokenizer,
    promise_quantization,
    remove_config,
    remove_shard,
    remove_tokenizer,
    shrink_vocabulary,
)


NUM_CHECKS = 10


@pytest.fixture(scope="module")
def checks():
    """The module with the checks."""
    return importlib.import_module("visualglm_tools.checkpoints.checks")


@pytest.fixture
def folder(tiny_original, tmp_path) -> Path:
    """A copy of the tiny original, to be damaged."""
    return Path(shutil.copytree(tiny_original, tmp_path / "checkpoint"))


class RealTokenizer:
    """Gives exactly the ids that the real tokenizer was seen to give."""

    bos_token_id = 130004

    def __init__(self, known: dict):
        self.texts = {case["text"]: case["ids"] for case in known["encode_no_special"]}
        self.pieces = dict(known["vocab"])
        self.suffix = known["encode_special_suffix"]

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.texts.get(text, []) + (list(self.suffix) if add_special_tokens else [])}

    def convert_tokens_to_ids(self, piece):
        return self.pieces.get(piece, 0)


@pytest.fixture
def known(checks) -> dict:
    return json.loads(checks.KNOWN_IDS.read_text(encoding="utf-8"))


def verdicts(output: str) -> dict[str, str]:
    """Check -> verdict, read off the printed table."""
    rows = [line for line in output.splitlines() if line[17:26].strip() in ("ok", "FAILED", "skipped")]
    return {line[:17].strip(): line[17:26].strip() for line in rows}


def test_whole_checkpoint_passes(tiny_original, capsys):
    assert check(str(tiny_original)) == 0
    output = capsys.readouterr().out
    assert set(verdicts(output).values()) == {"ok"}
    assert f"All {NUM_CHECKS} checks passed." in output


def test_it_answers_when_asked_to(tiny_original, capsys):
    assert check(str(tiny_original), "--generate") == 0
    assert verdicts(capsys.readouterr().out)["answer"] == "ok"


def test_kernels_are_reported_when_asked_for(tiny_original, folder, capsys):
    assert check(str(tiny_original), "--kernels") == 0
    output = capsys.readouterr().out
    assert verdicts(output)["kernels"] == "ok"
    assert "\ndecode step " in output
    (folder / "config.json").unlink()
    assert check(str(folder), "--kernels") == 1
    assert verdicts(capsys.readouterr().out)["kernels"] == "skipped"


def put_nan(folder):
    change_shard(folder, FIRST, lambda tensors: tensors[EMBEDDINGS][7, :3].fill_(float("nan")))
    change_shard(folder, LAST, lambda tensors: tensors["lm_head.weight"][7, :3].fill_(float("nan")))


def put_infinity(folder):
    change_shard(folder, LAST, lambda tensors: tensors["image_encoder.glm_proj.bias"].fill_(float("inf")))


def remove_key(folder):
    change_shard(folder, LAST, lambda tensors: tensors.pop("image_encoder.glm_proj.bias"))


def untie(folder):
    change_shard(folder, FIRST, lambda tensors: tensors.update({EMBEDDINGS: tensors[EMBEDDINGS] * 2}))


def promise_three_bits(folder):
    change_config(folder, quantization_bit=3)


def move_special_token(folder):
    change_config(folder, gmask_token_id=1102)


def name_missing_code(folder):
    change_config(folder, auto_map={"AutoModel": "modeling_visualglm.VisualGLMForConditionalGeneration"})


@pytest.mark.parametrize(
    ("damage", "failed", "message"),
    [
        (put_nan, "values", f"{EMBEDDINGS} (3 of 102,400 values, in {FIRST})"),
        (put_infinity, "values", "image_encoder.glm_proj.bias (64 of 64 values"),
        (remove_key, "keys and shapes", "1 keys are missing: image_encoder.glm_proj.bias"),
        (untie, "tied embeddings", "Set tie_word_embeddings to false"),
        (remove_shard, "weight files", f"lacks {LAST}"),
        (cut_shard, "weight files", "truncated"),
        (promise_quantization, "quantization", "quantization_bit 4, but 0 weights are integers"),
        (promise_three_bits, "configuration", "quantization_bit must be 0, 4 or 8"),
        (remove_config, "configuration", "has no config.json"),
        (remove_tokenizer, "tokenizer file", "Copy the one of the original visualglm-6b there"),
        (cut_tokenizer, "tokenizer file", "ice_text.model"),
        (move_special_token, "vocabulary", "[gMASK] is 1101 instead of 1102"),
        (shrink_vocabulary, "keys and shapes", "1,600 rows, config.json says vocab_size 1,500"),
        (name_missing_code, "remote code", "modeling_visualglm.py"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_found_by_its_check(folder, capsys, damage, failed, message):
    damage(folder)
    assert check(str(folder)) == 1
    output = capsys.readouterr().out
    assert verdicts(output)[failed] == "FAILED"
    assert message in output
    assert "checks FAILED." in output


def test_checks_that_cannot_run_are_skipped_and_the_others_still_run(folder, capsys):
    remove_shard(folder)
    assert check(str(folder)) == 1
    found = verdicts(capsys.readouterr().out)
    assert found["values"] == found["keys and shapes"] == "skipped"
    assert found["vocabulary"] == "ok"
    assert len(found) == NUM_CHECKS


def test_nan_in_the_weights_is_also_seen_in_the_answer(folder, capsys):
    put_nan(folder)
    change_shard(folder, FIRST, lambda tensors: tensors[EMBEDDINGS].fill_(float("nan")))
    change_shard(folder, LAST, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    assert check(str(folder), "--generate") == 1
    assert verdicts(capsys.readouterr().out)["answer"] == "FAILED"


def test_missing_folder_is_a_usage_error(tmp_path, capsys):
    assert check(tmp_path / "nowhere") == 2
    assert "is no folder" in capsys.readouterr().err


# ---- the ids of the real tokenizer, which is not at hand: a double gives them


def test_real_ids_pass(checks, known):
    subject = checks.Subject(Path(), tokenizer=RealTokenizer(known))
    assert "6 texts give the ids of the real tokenizer" in checks.check_known_ids(subject)


def test_other_ids_are_named(checks, known):
    tokenizer = RealTokenizer(known)
    tokenizer.texts["你好"] = [5, 6]
    tokenizer.pieces["[gMASK]"] = 7
    with pytest.raises(ValueError, match=r"2 differences .*'\[gMASK\]' is 7 instead of 130001.*ice_text\.model"):
        checks.check_known_ids(checks.Subject(Path(), tokenizer=tokenizer))


def test_ids_that_were_never_observed_prove_nothing(checks, known):
    tokenizer = RealTokenizer(known)
    tokenizer.pieces.update({"<0x00>": 130100, "<|blank_80|>": 130099})
    assert checks.compare_ids(tokenizer, known) == []
