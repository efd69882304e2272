"""What the options of `visualglm finetune` mean, before any model is loaded; and settings of earlier versions."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import python
from tests.training_helpers import ROWS, At, adapter_in, interrupt, is_same, short_run, silent, train
from visualglm_tools.commands.finetune import Options
from visualglm_tools.options import describe_obsolete, parse, part, words
from visualglm_tools.training.output import SETTINGS_FILE, as_begun, check_same_run
from visualglm_tools.training.run import finetune
from visualglm_tools.training.settings import Settings


# The original's command line, of its fine-tuning scripts, without the launcher.
ORIGINAL_OPTIONS = (
    "--experiment-name finetune-visualglm-6b --model-parallel-size 1 --mode finetune --train-iters 300 "
    "--resume-dataloader --max_source_length 64 --max_target_length 256 --lora_rank 10 --layer_range 0 14 "
    "--pre_seq_len 4 --train-data dataset.json --valid-data dataset.json --distributed-backend nccl "
    "--lr-decay-style cosine --warmup .02 --checkpoint-activations --save-interval 300 --eval-interval 10000 "
    "--save ./checkpoints --split 1 --eval-iters 10 --eval-batch-size 8 --zero-stage 1 --lr 0.0001 --batch-size 4 "
    "--skip-init --fp16 --use_lora"
)
FULL_SIZE = {"num_layers": 28, "has_gpu": False}


def read(options: str) -> Options:
    return parse(Options, options.split(), "visualglm finetune", "")


# ---------------------------------------------------------------- the command line


def test_the_originals_command_line_is_understood_and_what_means_nothing_is_said():
    options = read(ORIGINAL_OPTIONS)
    options.check()
    settings = Settings(
        method="lora",
        train_data=(Path("dataset.json"),),
        valid_data=(Path("dataset.json"),),
        lora_rank=10,
        layer_range=("0", "14"),
        checkpoint_activations=True,
        eval_iters=10,
        precision="float16",
        batch_size=4,
        lr=1e-4,
    )
    assert part(options, Settings) == settings
    assert sorted(line.split()[0] for line in describe_obsolete(options)) == [
        "--distributed-backend",
        "--experiment-name",
        "--resume-dataloader",
        "--skip-init",
        "--split",
        "--zero-stage",
    ]
    on_gpu, said = settings.resolved(28, has_gpu=True)
    assert on_gpu == replace(settings, gradient_accumulation_steps=1, keep="self") and said == []
    on_cpu, said = settings.resolved(28, has_gpu=False)
    assert on_cpu == replace(on_gpu, precision="float32")
    assert said == ["--fp16 has no effect: a CPU trains in float32 (or --bf16)."]


def test_what_replaces_an_obsolete_option_is_said_before_training(tmp_path, capsys):
    options = f"--use_lora --zero-stage 1 --local_rank=0 --skip_init --train-data {ROWS} --train-iters 1"
    assert train(options, tmp_path) == 0
    said = capsys.readouterr().err.splitlines()
    assert (
        "--zero-stage has no effect: ZeRO is set in accelerate's DeepSpeed configuration, see docs/finetuning.md."
        in said
    )
    assert "--local-rank has no effect: read from the launcher's environment." in said
    assert "--skip-init has no effect: weights are never initialised before they are loaded." in said


def test_either_spelling_of_an_option_will_do():
    one = read(
        "--use_lora --train-data a --lora_rank 3 --layer_range 1 2 --train-iters 7 --from_pretrained b --skip-init"
    )
    other = read("--use-lora --train_data a --lora-rank 3 --layer-range 1 2 --train_iters 7 --model b --skip_init")
    assert one == other and one.skip_init


@pytest.mark.parametrize(("method", "batches"), [("lora", (4, 1)), ("ptuning", (4, 1)), ("qlora", (1, 4))], ids=str)
def test_batches_are_those_of_the_originals_script_unless_they_are_given(method, batches):
    settings, _ = Settings(method=method).resolved(**FULL_SIZE)
    assert (settings.batch_size, settings.gradient_accumulation_steps) == batches
    settings, _ = Settings(method=method, batch_size=3, gradient_accumulation_steps=2).resolved(**FULL_SIZE)
    assert (settings.batch_size, settings.gradient_accumulation_steps) == (3, 2)


def test_a_prefix_keeps_its_activations_and_that_is_said():
    settings, said = Settings(method="ptuning", checkpoint_activations=True).resolved(**FULL_SIZE)
    assert not settings.checkpoint_activations
    assert said == ["--checkpoint-activations has no effect: PEFT's prefixes need the activations."]


@pytest.mark.parametrize(("language", "english"), [("auto", None), ("zh", False), ("en", True)])
def test_the_language_of_prompts_is_the_questions_or_the_chosen_one(language, english):
    assert read(f"--prompt_language {language}").english is english


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train-data a", "choose what to train"),
        ("--use_lora", "--train-data is missing"),
        ("--use_lora --use_ptuning --train-data a", "not allowed with"),
        ("--use_lora --memory", "--memory trains nothing"),
        ("--use_lora --train-data a --fp16 --bf16", "argument --bf16: not allowed with argument --fp16"),
        ("--use_lora --train-data a --model-parallel-size 2", "divided among GPUs by FSDP or DeepSpeed"),
        ("--use_lora --train-data a --bits 4", "--bits belongs to --use_qlora"),
        ("--use_lora --train-data a --lr -1", "must be above 0, found '-1'"),
        ("--use_lora --train-data a --batch-size 0", "must be a whole number, 1 or more"),
        ("--use_lora --train-data a --mode pretrain", "invalid choice"),
        ("--use_lora --train-data a --train-itres 3", "unrecognized arguments"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, message, tmp_path, capsys):
    assert train(options, tmp_path) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and message in said


def test_python_callers_are_told_of_contradictions_too(tmp_path):
    with pytest.raises(ValueError, match="--lora_dropout belongs to --use_lora and --use_qlora"):
        finetune(short_run(tmp_path / "out", method="ptuning", lora_dropout=0.1), silent)
    with pytest.raises(ValueError, match="choose what to train"):
        finetune(short_run(tmp_path / "out", method="lara"), silent)


def test_an_error_is_said_in_words_without_a_traceback(tmp_path, capsys):
    rows = [{"img": "gone.png", "prompt": "x", "label": "y"}] * 2
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    assert train("--use_lora --layer_range 0 --train-data bad.json --save out", tmp_path) == 2
    said = capsys.readouterr().err
    assert "error: 2 bad row(s)" in said and "Traceback" not in said
    assert all(f"\n  bad.json, row {number}: there is no picture 'gone.png'" in said for number in (1, 2))


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in [
        name for name in sys.modules if name in ("visualglm_tools.training.run", "visualglm_tools.training.adapters")
    ]:
        monkeypatch.delitem(sys.modules, name)
    assert train(f"--use_lora --train-data {ROWS}", tmp_path) == 2
    assert "peft is missing: pip install 'visualglm-hf[train]'" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import sys; from visualglm_tools.__main__ import open_command\n"
    code += (
        "open_command('finetune')[1].format_help(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    python("-c", code)


VALUES = {
    "train_data": st.lists(st.sampled_from([Path("a.json"), Path("b c.jsonl")]), max_size=2).map(tuple),
    "layer_range": st.sampled_from([None, ("all",), ("0", "27")]),
    "method": st.sampled_from([None, "lora", "qlora", "ptuning"]),
    "precision": st.sampled_from(["float32", "float16", "bfloat16"]),
    "prompt_language": st.sampled_from(["auto", "zh", "en"]),
    "bits": st.sampled_from([None, 4, 8]),
    "lr": st.floats(1e-12, 1e12),
    "warmup": st.floats(0, 1, exclude_max=True),
    "eval_iters": st.none() | st.integers(1, 2**63 - 1),
    "keep": st.integers(1, 2**63 - 1),
    "strict": st.booleans(),
    "save": st.sampled_from([Path("checkpoints"), Path("-out"), Path("a=b_c")]),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_all_settings_can_be_said_on_the_command_line(values):
    settings = Settings(**values)
    assert parse(Settings, words(settings), "visualglm finetune", "") == settings


# ---------------------------------------------------------------- what a run writes down


def test_what_is_written_down_is_every_setting_and_no_more():
    record = read("--use_lora --train-data a --skip-init").as_json()
    assert list(record) == [field.name for field in fields(Settings)]
    assert record == json.loads(json.dumps(record))


def in_earlier_names(file: Path) -> None:
    """Write the settings of a run as they were written before the prompt's language was a setting of its own."""
    record = json.loads(file.read_text(encoding="utf-8"))
    record["english"] = {"auto": None, "zh": False, "en": True}[record.pop("prompt_language")]
    file.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    "language", ["auto", *(pytest.param(language, marks=pytest.mark.slow) for language in ("zh", "en"))]
)
def test_a_run_that_an_earlier_version_began_is_resumed_and_is_the_same_run(language, tmp_path):
    settings = short_run(tmp_path / "out", save_interval=2, prompt_language=language)
    whole = replace(settings, save=tmp_path / "whole")
    finetune(whole, silent)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, silent, [At(3, interrupt)])
    in_earlier_names(settings.save / SETTINGS_FILE)
    others = {"auto": "en", "zh": "auto", "en": "zh"}
    with pytest.raises(ValueError, match=f"prompt_language was '{language}' and is '{others[language]}'"):
        finetune(replace(settings, resume=True, prompt_language=others[language]), silent)
    finetune(replace(settings, resume=True), silent)
    assert is_same(adapter_in(settings.save), adapter_in(whole.save))


# As the code before this file was written has left it: `visualglm finetune --use_qlora --prompt_language zh …`.
EARLIER = """
{"model": "model", "train_data": ["examples/background/dataset.json"], "method": "qlora", "save": "before",
 "valid_data": [], "old_data": [], "resume": false, "lora_rank": 10, "lora_alpha": 1.0, "lora_dropout": 0.0,
 "layer_range": ["0", "2"], "train_qformer": false, "train_projection": false, "bits": null,
 "qlora_backend": "lowbit", "pre_seq_len": 4, "max_source_length": 64, "max_target_length": 256, "english": false,
 "strict": false, "train_iters": 4, "batch_size": 1, "gradient_accumulation_steps": 4, "lr": 0.01,
 "lr_decay_style": "cosine", "warmup": 0.02, "weight_decay": 0.01, "clip_grad": 1.0, "checkpoint_activations": false,
 "precision": "float32", "save_interval": 300, "eval_interval": 10000, "eval_iters": null, "eval_batch_size": 8,
 "log_interval": 1, "keep": 3, "answers": 100, "num_workers": 0, "tensorboard": false, "cpu": true, "seed": 5,
 "processes": 1}
"""


def test_the_command_of_an_earlier_run_gives_the_settings_that_it_wrote_down(tmp_path):
    (tmp_path / SETTINGS_FILE).write_text(EARLIER, encoding="utf-8")
    command = "--use_qlora --prompt_language zh --cpu --seed 5 --lr 0.01 --train-iters 4 --log-interval 1 --resume "
    command += "--train-data examples/background/dataset.json --model model"
    settings, _ = as_begun(replace(read(command), save=tmp_path)).resolved(num_layers=4, has_gpu=False)
    assert (settings.keep, settings.keep_checkpoints) == ("none", 3)
    check_same_run(tmp_path, settings.as_json())
    assert json.loads(EARLIER).keys() - settings.as_json().keys() == {"english", "processes"}
    for name, value in {"prompt_language": "auto", "batch_size": 2, "layer_range": ("0",), "lr": 0.02}.items():
        with pytest.raises(ValueError, match=f"but {name} was"):
            check_same_run(tmp_path, replace(settings, **{name: value}).as_json())


@pytest.mark.parametrize(("name", "before", "other"), [("lr", 0.01, 0.5), ("lora_rank", 10, 3)])
def test_a_resumed_run_has_what_it_had_if_nothing_else_is_said(name, before, other, tmp_path):
    (tmp_path / SETTINGS_FILE).write_text(EARLIER, encoding="utf-8")
    resumed = Settings(method="qlora", save=tmp_path, resume=True)
    assert getattr(as_begun(resumed), name) == before
    assert getattr(as_begun(replace(resumed, **{name: other})), name) == other
    assert getattr(as_begun(replace(resumed, resume=False)), name) is None
    (tmp_path / SETTINGS_FILE).write_text("{", encoding="utf-8")
    assert as_begun(resumed) == resumed
