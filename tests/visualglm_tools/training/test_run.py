"""`visualglm finetune` as users run it: results, resuming, refusals."""

import json
import math
import resource
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from tests.commands import run as run_program
from tests.helpers import load_float32
from tests.paths import COMMAND, ROOT, TINY
from tests.training_helpers import (
    EXAMPLE,
    HELD_OUT,
    ROWS,
    At,
    adapter_in,
    interrupt,
    is_same,
    short_run,
    silent,
)
from visualglm_tools.checkpoints.adapters import attach_adapter
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.checkpoints.manifest import verify
from visualglm_tools.training.output import complete_checkpoints
from visualglm_tools.training.run import finetune


QUESTION = "这张图片的背景里有什么内容？"
PICTURE = EXAMPLE / "sand_4.jpg"


@pytest.fixture
def settings(tmp_path):
    return short_run(tmp_path / "out", save_interval=2)


# ---------------------------------------------------------------- results


def test_a_run_writes_an_adapter_curves_and_a_report(settings):
    settings = replace(settings, valid_data=(HELD_OUT,), eval_interval=2, seed=0)
    report = finetune(settings, silent)
    assert sorted(path.name for path in (settings.save / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
        "manifest.json",
    ]
    assert verify(settings.save / "adapter").problems == ()
    assert len({path.stat().st_mode for path in (settings.save / "adapter").iterdir()}) == 1  # for a server's user, too
    assert (settings.save / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((settings.save / "report.json").read_text(encoding="utf-8")) == report
    losses = {entry["step"]: entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry}
    assert sorted(losses) == [2, 4]
    best = min(losses, key=losses.get)
    assert report["best_checkpoint"] == f"checkpoint-{best}"
    assert is_same(adapter_in(settings.save), adapter_in(settings.save, f"checkpoint-{best}"))


def test_warm_up_and_cosine_are_the_originals(settings):
    report = finetune(replace(settings, train_iters=10, warmup=0.2, save_interval=10), silent)
    rates = [entry["learning_rate"] / settings.lr for entry in report["log"] if "learning_rate" in entry]
    expected = [step / 2 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 8) for step in range(10)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "qlora", "bits": 4},
        {"method": "qlora", "bits": 8},
        {"method": "qlora", "qlora_backend": "nf4"},
        {"method": "ptuning"},
        {"checkpoint_activations": True, "precision": "bfloat16"},
        {"train_qformer": True, "train_projection": True, "gradient_accumulation_steps": 2},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "lora",
)
def test_every_way_trains_its_adapter_alone_and_loads_again(changes, settings):
    if changes.get("qlora_backend"):
        pytest.importorskip("bitsandbytes")
    settings = replace(settings, train_iters=1, save_interval=1, **changes)
    finetune(settings, silent)
    stored = adapter_in(settings.save)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    parts = {"qformer" if ".qformer." in name else "glm_proj" if "glm_proj" in name else "decoder" for name in stored}
    assert not any(".vit." in name for name in stored)
    assert parts == ({"decoder", "qformer", "glm_proj"} if changes.get("train_qformer") else {"decoder"})
    layers = {
        int(name.split(".layers.")[1].split(".")[0])
        for name in stored
        if name.startswith("base_model.model.transformer")
    }
    assert layers == (set() if changes.get("method") == "ptuning" else {0, 3})

    base = load_float32(TINY)
    adapted = PeftModel.from_pretrained(base, settings.save / "adapter").eval()
    attached = attach_adapter(load_float32(TINY), settings.save / "adapter")
    text = base.config.text_config
    input_ids = torch.tensor([[7, 8, text.gmask_token_id, text.bos_token_id]])
    with torch.no_grad():
        assert torch.allclose(adapted(input_ids=input_ids).logits, attached(input_ids=input_ids).logits, atol=1e-4)


def test_checkpointed_activations_change_no_gradient(settings, tmp_path):
    plain = finetune(settings, silent)
    checkpointed = finetune(replace(settings, checkpoint_activations=True, save=tmp_path / "other"), silent)
    for one, other in zip(plain["log"][:-1], checkpointed["log"][:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_the_originals_folder_is_trained_on_as_it_is(settings, tiny_original):
    report = finetune(replace(settings, model=tiny_original, train_iters=1, max_source_length=96), silent)
    assert report["steps"] == 1 and (settings.save / "adapter").is_dir()


def test_doors_answer_with_the_adapter(settings, capsys):
    settings = replace(settings, layer_range=("all",), train_iters=120, batch_size=4, save_interval=120)
    finetune(settings, silent)
    answers = []
    for options in ({}, {"adapter": settings.save / "adapter"}, {"adapter": settings.save / "adapter", "quant": 8}):
        model, tokenizer = load_model(TINY, "cpu", "float32", **options)
        answers.append(model.chat(tokenizer, str(PICTURE), QUESTION, do_sample=False)[0])
    assert not answers[0].startswith("这张图片的背景是")
    assert all(answer.startswith("这张图片的背景是") for answer in answers[1:])


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_an_interrupted_run_resumes_to_the_same_adapter(method, settings, tmp_path):
    settings = replace(settings, method=method, lora_dropout=0.1 if method == "lora" else 0.0)
    uninterrupted = finetune(settings, silent)
    interrupted = replace(settings, save=tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        finetune(interrupted, silent, [At(3, interrupt)])
    resumed = finetune(replace(interrupted, resume=True), silent)
    assert is_same(adapter_in(settings.save), adapter_in(interrupted.save))
    assert [entry.get("loss") for entry in resumed["log"]] == [entry.get("loss") for entry in uninterrupted["log"]]


def test_another_seed_is_another_run_and_the_same_seed_the_same(settings, tmp_path):
    runs = [
        replace(settings, train_iters=2, save=tmp_path / name, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    for run in runs:
        finetune(run, silent)
    assert is_same(adapter_in(runs[0].save), adapter_in(runs[1].save))
    assert not is_same(adapter_in(runs[0].save), adapter_in(runs[2].save))


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(settings):
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, silent, [At(3, interrupt)])
    half = settings.save / "checkpoint-3"
    half.mkdir()
    (half / "trainer_state.json").write_text("{", encoding="utf-8")
    report = finetune(replace(settings, resume=True), silent)
    assert report["steps"] == 4 and not half.exists()


class FillDisk(TrainerCallback):
    """From the first checkpoint on, no file can grow beyond a kilobyte."""

    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.slow
def test_when_the_disk_fills_the_last_good_checkpoint_survives(settings):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            ValueError, match="checkpoint-4 could not be written: .* go on from checkpoint-2 with --resume"
        ):
            finetune(settings, silent, [FillDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in complete_checkpoints(settings.save)] == ["checkpoint-2"]
    assert not list(settings.save.glob("checkpoint-4"))
    assert finetune(replace(settings, resume=True), silent)["steps"] == 4


def test_a_loss_that_is_no_number_ends_the_run(settings):
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) at step \d: .*Lower --lr"):
        finetune(replace(settings, lr=1e30, clip_grad=0.0, lora_alpha=1e20, save_interval=4), silent)


class Spoil(TrainerCallback):
    """What the last step makes of the adapter: values that are no numbers, or that are too large to compute with."""

    def __init__(self, value):
        self.value = value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(self.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "The adapter has values that are no numbers after step 1: .*Lower --lr"),
        (float("inf"), "The adapter has values that are no numbers after step 1"),
        (1e38, "The loss of what is held out is nan after training: .*Lower --lr"),
    ],
    ids=str,
)
def test_an_adapter_that_the_last_step_has_spoiled_is_no_result(value, message, settings):
    with pytest.raises(ValueError, match=message):
        finetune(replace(settings, train_iters=1, valid_data=(HELD_OUT,)), silent, [Spoil(value)])
    assert not (settings.save / "adapter").exists()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_range": ("0", "14")}, "there is no layer '14', the decoder has layers 0 to 3"),
        ({"layer_range": ("-1",)}, "there is no layer '-1'"),
        ({"lora_rank": 0}, "--lora_rank must be 1 or more, found 0"),
        ({"method": "ptuning", "pre_seq_len": 0}, "--pre_seq_len must be 1 or more, found 0"),
        ({"max_target_length": 2}, "leaves no token to train on"),
        ({"strict": True, "max_target_length": 5}, "15 target.* of 15 examples are too long"),
        ({"model": ROOT / "docs"}, "no checkpoint in .*docs"),
        ({"method": "qlora", "qlora_backend": "nf4", "bits": 8}, "nf4 has 4 bits, not 8"),
        ({"eval_interval": 3, "valid_data": (HELD_OUT,)}, "must be a multiple of --eval-interval 3"),
        ({"train_data": (EXAMPLE / "sea_1.jpg",)}, "sea_1.jpg is a picture"),
        ({"resume": True}, "has no complete checkpoint to resume from"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_is_refused_before_the_weights_are_loaded(changes, message, settings, monkeypatch):
    if "nf4" not in message:
        monkeypatch.setattr(
            "visualglm_tools.training.run.load_base", lambda *arguments: pytest.fail("the weights were loaded")
        )
    with pytest.raises(ValueError, match=message):
        finetune(replace(settings, **changes), silent)


def test_an_output_folder_in_use_is_refused(settings):
    settings.save.mkdir()
    (settings.save / "adapter").mkdir()
    with pytest.raises(ValueError, match="is in use: it holds adapter. Choose another --save, or go on with --resume"):
        finetune(settings, silent)


def test_a_run_that_was_refused_leaves_its_folder_free(settings):
    with pytest.raises(ValueError, match="too long"):
        finetune(replace(settings, strict=True, max_target_length=5), silent)
    assert finetune(replace(settings, train_iters=1), silent)["steps"] == 1


def test_two_runs_cannot_share_an_output_folder(settings, tmp_path):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="in use by another run"):
                finetune(replace(settings, resume=True), silent)
            control.should_training_stop = True

    finetune(settings, silent, [Second()])


def test_resuming_with_other_options_is_refused(settings):
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, silent, [At(3, interrupt)])
    with pytest.raises(ValueError, match="lora_rank was 32 and is 3"):
        finetune(replace(settings, resume=True, lora_rank=3), silent)


def test_an_adapter_of_another_base_model_is_refused(settings, tmp_path, tiny_original):
    finetune(replace(settings, train_iters=1), silent)
    adapter = settings.save / "adapter"
    other = load_float32(tiny_original)
    with pytest.raises(ValueError, match="was trained on another base model"):
        attach_adapter(other, adapter)
    (adapter / "base_model.json").unlink()  # as other programs write adapters: the shapes must do
    with pytest.raises(ValueError, match="does not fit this model"):
        attach_adapter(other, adapter)
    same_shapes = load_float32(TINY)
    with torch.no_grad():
        same_shapes.transformer.word_embeddings.weight.mul_(1.5)
    finetune(replace(settings, train_iters=1, save=tmp_path / "again"), silent)
    with pytest.raises(ValueError, match="word_embeddings.weight differs"):
        attach_adapter(same_shapes, tmp_path / "again" / "adapter")


def test_a_damaged_or_missing_adapter_is_one_error(settings, tmp_path, model):
    with pytest.raises(ValueError, match=r"there is no adapter_config\.json"):
        attach_adapter(model, tmp_path)
    finetune(replace(settings, train_iters=1), silent)
    weights = settings.save / "adapter" / "adapter_model.safetensors"
    base = load_float32(TINY)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="does not fit this model"):
        attach_adapter(base, settings.save / "adapter")


# ---------------------------------------------------------------- command line


def test_tensorboard_gets_events_if_asked(settings):
    pytest.importorskip("tensorboard")
    finetune(replace(settings, train_iters=1, tensorboard=True), silent)
    assert list(settings.save.rglob("events.out.tfevents*"))


# ---------------------------------------------------------------- several processes


def launch_two(options: str):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *COMMAND[1:]]
    return run_program(*launch, "finetune", *options.split(), environment={"CUDA_VISIBLE_DEVICES": ""})


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-4), name


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(settings, tmp_path):
    one = replace(settings, train_iters=2, save_interval=2, batch_size=4, save=tmp_path / "one")
    finetune(one, silent)
    options = (
        f"--use_lora --layer_range 0 3 --train-iters 2 --save-interval 2 --batch-size 2 --lr 0.01 --cpu --keep none "
        f"--train-data {ROWS} --save {tmp_path / 'two'}"
    )
    finished = launch_two(options)
    assert finished.stderr.count("The adapter is in") == 1
    assert_close(adapter_in(tmp_path / "one"), adapter_in(tmp_path / "two"))


OLD_ABILITIES = EXAMPLE / "old_abilities.json"
WITH_OLD = {"keep": None, "keep_data": (OLD_ABILITIES,), "keep_weight": 10.0}  # answers of different lengths


@pytest.fixture(scope="module")
def kept_by_one(tmp_path_factory):
    """The adapter of one process that learns four rows and keeps four in a step."""
    run = short_run(tmp_path_factory.mktemp("one"), train_iters=3, batch_size=4, **WITH_OLD)
    finetune(run, silent)
    return adapter_in(run.save)


def test_answers_are_kept_alike_in_a_batch_and_in_two_halves_of_it(kept_by_one, tmp_path):
    halves = short_run(tmp_path / "out", train_iters=3, batch_size=2, gradient_accumulation_steps=2, **WITH_OLD)
    finetune(halves, silent)
    assert_close(kept_by_one, adapter_in(halves.save))


@pytest.mark.slow
def test_two_processes_keep_answers_as_one_with_twice_the_rows(kept_by_one, tmp_path):
    options = (
        f"--use_lora --layer_range 0 3 --train-iters 3 --batch-size 2 --lr 0.01 --cpu --keep-data {OLD_ABILITIES} "
        f"--keep-weight 10 --keep-rows 2 --train-data {ROWS} --save {tmp_path / 'two'}"
    )
    finished = launch_two(options)
    assert finished.stderr.count("Keeping 52 answers") == 1
    assert_close(kept_by_one, adapter_in(tmp_path / "two"))


def test_a_model_that_is_divided_keeps_nothing_and_says_so(settings, monkeypatch):
    for room in ("run", "asking"):
        monkeypatch.setattr(f"visualglm_tools.training.{room}.is_divided", lambda trainer: True)
    said = []
    finetune(replace(settings, keep="self"), said.append)
    assert "No answers are kept: the model is divided among processes." in said
    assert not (settings.save / "kept").exists()
