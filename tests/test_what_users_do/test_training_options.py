"""Options of the fine-tuning command: defaults that work, advice that works, and nothing taken that does nothing."""

import json
import re
from dataclasses import replace

import pytest

from tests.paths import TINY
from tests.training_helpers import (
    HELD_OUT,
    ROWS,
    At,
    adapter_in,
    is_same,
    run_out_of_memory,
    short_run,
    silent,
    train,
)
from visualglm_hf import VisualGLMConfig
from visualglm_tools.options import parse
from visualglm_tools.training.adapters import choose_bits
from visualglm_tools.training.run import finetune
from visualglm_tools.training.settings import Settings, usual_layers, usual_rank, usual_rate


LORA_OPTIONS = ("lora_rank", "layer_range")  # of the original's


@pytest.fixture
def settings(tmp_path):
    """A short run with rows to evaluate on."""
    return short_run(tmp_path / "out", valid_data=(HELD_OUT,), train_iters=2, batch_size=1)


def losses(report, key="eval_loss"):
    return {entry["step"]: entry[key] for entry in report["log"] if key in entry}


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize("method", ["qlora", "ptuning"])
def test_the_shortest_command_works_from_any_folder(method, tmp_path, capsys):
    assert train(f"--use_{method} --train-data {ROWS} --train-iters 1", tmp_path) == 0
    assert (tmp_path / "checkpoints" / "adapter" / "adapter_model.safetensors").is_file()
    assert "The adapter is in checkpoints/adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "original", "tiny"), [("lora", 1e-4, 2e-2), ("qlora", 1e-4, 2e-2), ("ptuning", 2e-2, 0.1)]
)
def test_each_method_has_its_own_learning_rate_which_is_higher_for_a_small_model(method, original, tiny):
    assert usual_rate(method, 4096) == usual_rate(method, 8192) == original
    assert usual_rate(method, 128) == usual_rate(method, 64) == tiny
    rates = [usual_rate(method, width) for width in (128, 256, 1024, 2048, 4096)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
    given, _ = Settings(method=method, lr=0.5).resolved(28, False)
    assert given.lr == 0.5 and Settings(method=method).resolved(28, False)[0].lr == original


def test_the_rank_is_the_originals_and_more_for_a_small_model():
    assert usual_rank(4096) == usual_rank(8192) == 10
    assert usual_rank(128) == usual_rank(64) == 32
    ranks = [usual_rank(width) for width in (128, 256, 1024, 2048, 4096)]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) == len(ranks)
    assert Settings(method="lora", lora_rank=3).resolved(28, False, width=128)[0].lora_rank == 3
    assert Settings(method="qlora").resolved(28, False)[0].lora_rank == 10


def test_a_learning_rate_of_lora_is_said_to_be_low_for_a_prefix():
    _, said = Settings(method="ptuning", lr=0.01).resolved(4, False, width=128)
    assert said == ["--lr 0.01 is low for P-tuning, which may learn nothing; without --lr it is 0.1."]
    assert Settings(method="ptuning", lr=0.05).resolved(4, False, width=128)[1] == []


def test_layers_are_in_the_originals_places_whatever_their_number(tmp_path, capsys):
    assert usual_layers(28) == ("0", "14") and usual_layers(1) == ("0",)
    assert train(f"--use_lora --train-data {ROWS} --train-iters 1", tmp_path) == 0
    report = json.loads((tmp_path / "checkpoints" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["layer_range"] == ["0", "2"]
    assert "LoRA on layers 0 and 2 of 4" in capsys.readouterr().err
    assert train(f"--use_lora --train-data {ROWS} --layer_range 0 14 --save out", tmp_path) == 2
    assert "there is no layer '14', the decoder has layers 0 to 3" in capsys.readouterr().err


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("steps", "evaluated"), [(1, [0, 1]), (11, [0, 2, 4, 6, 8, 10, 11])], ids=str)
def test_held_out_rows_are_evaluated_several_times_without_being_asked(steps, evaluated, settings):
    report = finetune(replace(settings, train_iters=steps), silent)
    assert sorted(losses(report)) == evaluated
    assert report["best_checkpoint"] is None and report["steps"] == steps


@pytest.mark.parametrize("eval_batch_size", [1, 2])
def test_the_loss_of_held_out_rows_is_per_token_whatever_the_batches(eval_batch_size, settings, tmp_path):
    rows = tmp_path / "rows.json"
    labels = ("好", "这张图片的背景是红色的沙滩。" * 5, "海")
    rows.write_text(json.dumps([{"prompt": "x", "label": label} for label in labels]), encoding="utf-8")
    report = finetune(
        replace(settings, valid_data=(rows,), train_iters=1, eval_batch_size=eval_batch_size, eval_iters=3), silent
    )
    measured = report["measured"]["held out"]
    assert losses(report)[0] == pytest.approx(measured["before"]["loss"], rel=1e-5)
    assert losses(report)[1] == pytest.approx(measured["after"]["loss"], rel=1e-5)


def test_the_interval_of_saving_that_is_advised_is_taken(settings):
    settings = replace(settings, eval_interval=2, save_interval=5)
    with pytest.raises(ValueError, match="must be a multiple of --eval-interval 2, such as (4)"):
        finetune(settings, silent)
    assert finetune(replace(settings, save_interval=4), silent)["steps"] == 2


def test_an_interval_that_does_not_divide_the_run_ends_with_an_evaluation(settings):
    report = finetune(replace(settings, train_iters=5, eval_interval=2), silent)
    assert sorted(losses(report)) == [2, 4, 5]


def test_the_best_of_all_evaluations_is_the_result_whatever_the_interval_of_saving(settings):
    report = finetune(
        replace(settings, train_iters=5, eval_interval=1, lr=1.0, lr_decay_style="constant", keep_checkpoints=1), silent
    )
    best = min(losses(report), key=losses(report).get)
    assert best < 5 and report["best_checkpoint"] == f"checkpoint-{best}"
    assert is_same(adapter_in(settings.save), adapter_in(settings.save, f"checkpoint-{best}"))


def test_evaluating_on_rows_that_are_trained_on_changes_nothing_and_is_said(settings, tmp_path):
    said = []
    with_curve = finetune(replace(settings, valid_data=(ROWS,)), said.append)
    without = finetune(replace(settings, valid_data=(), save=tmp_path / "other"), silent)
    assert losses(with_curve, "loss") == losses(without, "loss")
    assert "15 of 15 held-out examples are trained on too: their loss says nothing of new ones." in said


# ---------------------------------------------------------------- batches


def test_accumulated_batches_are_one_batch_also_where_the_rows_run_out(settings, tmp_path):
    settings = replace(settings, train_iters=2, valid_data=())
    whole = finetune(replace(settings, batch_size=16), silent)  # of 15 rows
    parts = replace(settings, batch_size=4, gradient_accumulation_steps=4, save=tmp_path / "parts")
    assert losses(finetune(parts, silent), "loss") == pytest.approx(losses(whole, "loss"), rel=1e-4)


# ---------------------------------------------------------------- advice


def test_the_lengths_that_strict_advises_are_taken_at_once_for_all_files(settings, tmp_path):
    def write(name, row):
        (tmp_path / name).write_text(json.dumps([row]), encoding="utf-8")
        return (tmp_path / name,)

    settings = replace(
        settings,
        train_data=write("a.json", {"prompt": "海" * 300, "label": "x"}),
        valid_data=write("b.json", {"prompt": "x", "label": "海" * 400}),
        strict=True,
        train_iters=1,
    )
    with pytest.raises(ValueError, match=r"1 source\(s\) and 1 target\(s\) of 2 examples are too long") as caught:
        finetune(settings, silent)
    lengths = {name: int(value) for name, value in re.findall(r"--(max_\w+) (\d+)", str(caught.value))}
    assert finetune(replace(settings, **lengths), silent)["steps"] == 1


def test_after_too_little_memory_the_same_folder_takes_the_remedy(settings):
    with pytest.raises(ValueError, match="--checkpoint-activations takes .* less"):
        finetune(settings, silent, [At(0, run_out_of_memory)])
    assert finetune(replace(settings, checkpoint_activations=True), silent)["steps"] == 2


# ---------------------------------------------------------------- options that would do nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--use_ptuning --lora_alpha 8", "--lora_alpha belongs to --use_lora and --use_qlora"),
        ("--use_ptuning --lora_dropout 0.1", "--lora_dropout belongs to"),
        ("--use_ptuning --train_qformer", "--train_qformer belongs to"),
        ("--use_ptuning --train_projection", "--train_projection belongs to"),
        ("--use_lora --qlora_backend nf4", "--qlora_backend belongs to --use_qlora"),
        ("--use_lora --bits 8", "--bits belongs to --use_qlora"),
    ],
)
def test_an_option_of_another_method_is_refused(options, message, tmp_path, capsys):
    assert train(f"{options} --train-data {ROWS}", tmp_path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--use_lora --lora_rank 10 --layer_range 0 1 --pre_seq_len 4", []),
        ("--use_lora --pre_seq_len 8", ["--pre_seq_len belongs to --use_ptuning, and has no effect."]),
        (
            "--use_ptuning --lora_rank 8 --layer_range 0 1",
            [f"--{name} belongs to --use_lora and --use_qlora, and has no effect." for name in LORA_OPTIONS],
        ),
        ("--use_ptuning --eval-iters 3", ["--eval-iters has no effect: there is no --valid-data."]),
        ("--use_ptuning --eval-interval 3", ["--eval-interval has no effect: there is no --valid-data."]),
    ],
)
def test_an_option_of_the_originals_scripts_is_taken_and_said_to_do_nothing(options, said):
    settings = parse(Settings, [*options.split(), "--train-data", str(ROWS)], "visualglm finetune", "")
    settings.check()
    _, lines = settings.resolved(num_layers=28, has_gpu=False)
    assert [line for line in lines if "effect" in line] == said


@pytest.mark.parametrize("changes", [{"bits": 8}, {"qlora_backend": "nf4"}], ids=str)
def test_other_bits_than_a_checkpoint_has_are_refused(changes, settings):
    config = VisualGLMConfig.from_pretrained(TINY)
    config.quantization_bit = 4
    settings = replace(settings, method="qlora")
    assert choose_bits(settings, config) is None and choose_bits(replace(settings, bits=4), config) is None
    with pytest.raises(ValueError, match="has 4 bits already"):
        choose_bits(replace(settings, **changes), config)
