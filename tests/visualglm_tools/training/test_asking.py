"""What is kept if nobody says what: the questions, the answers, the time they take, and what a run says of it."""

import base64
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.paths import ROOT, TINY
from tests.training_helpers import EXAMPLE, HELD_OUT, ROWS, At, interrupt, short_run, silent
from visualglm_hf import VisualGLMConfig
from visualglm_hf.image_processing_visualglm import open_picture
from visualglm_tools.checkpoints.loading import load_model, load_processor
from visualglm_tools.training import asking
from visualglm_tools.training.dataset import read_dataset
from visualglm_tools.training.encoding import Encoder
from visualglm_tools.training.rehearsal import rehearse
from visualglm_tools.training.run import finetune
from visualglm_tools.training.settings import what_to_keep


TAUGHT = json.loads(ROWS.read_text(encoding="utf-8"))[0]["prompt"]


@pytest.fixture(scope="module")
def trained():
    encoder = Encoder(load_processor(TINY, VisualGLMConfig.from_pretrained(TINY)), 64, 256, 2048)
    return [row[0] for row in read_dataset([ROWS], encoder)]


@pytest.fixture
def settings(tmp_path):
    return short_run(tmp_path / "out", keep=None, answers=0)


def rows_in(folder):
    return [json.loads(line) for line in (folder / "kept" / "answers.jsonl").read_text("utf-8").splitlines()]


def picture_of(row):
    [name] = [part["image"] for part in row["messages"][0]["content"] if part["type"] == "image"] or [None]
    return base64.b64decode(name) if name and not name.startswith(str(ROOT)) else name


def question_of(row) -> str:
    return row["messages"][0]["content"][-1]["text"]


def test_ordinary_questions_are_in_both_languages_about_every_picture_and_not_what_is_taught(trained):
    asked = asking.ordinary_questions(trained)
    about_trained = [each for each in asked if each.pictures and isinstance(each.pictures[0], Path)]
    assert TAUGHT not in {each.question for each in about_trained}
    assert {each.pictures for each in about_trained[: len(trained)]} == {each.pictures for each in trained}
    assert len({(each.question, each.pictures) for each in asked}) == len(asked)
    for language in (str.isascii, lambda text: not text.isascii()):
        assert sum(map(language, (each.question for each in asked))) > 0.4 * len(asked)


def test_what_is_taught_is_asked_about_pictures_that_show_nothing(trained):
    drawn = [each for each in asking.ordinary_questions(trained) if isinstance((*each.pictures, None)[0], bytes)]
    assert {each.question for each in drawn} == {TAUGHT}
    assert len({each.pictures for each in drawn}) == len(drawn) == asking.DRAWN
    assert drawn == [each for each in asking.ordinary_questions(trained) if each in drawn]  # the same each time
    assert open_picture(drawn[0].pictures[0]).size == (224, 224)


def test_rows_in_words_ask_in_words(trained):
    words = [replace(example, pictures=(), conversation=asking.conversation_of(None, "你好")) for example in trained]
    assert [each.question for each in asking.ordinary_questions(words)] == list(asking.IN_WORDS[1:])


def test_a_run_asks_the_model_itself_and_keeps_what_it_says(settings):
    finetune(replace(settings, keep_questions=14), silent)
    rows = rows_in(settings.save)
    model, tokenizer = load_model(TINY, "cpu", "float32")
    assert len(rows) == 14
    for row in rows:
        picture = picture_of(row)
        answer, _ = model.chat(tokenizer, picture, question_of(row), do_sample=False, repetition_penalty=1.0)
        assert row["messages"][1]["content"][0]["text"] == answer


def test_as_many_questions_are_asked_as_take_a_quarter_of_the_time_and_that_is_said_before(settings, monkeypatch):
    monkeypatch.setattr(asking, "estimate_seconds", lambda *run: 1000.0)
    monkeypatch.setattr(asking, "perf_counter", iter(range(0, 1000, 100)).__next__)  # eight take 100 s
    said = []
    finetune(settings, said.append)
    assert len(rows_in(settings.save)) == 20
    assert any("20 ordinary questions" in line and "at most 250 s" in line and "--keep none" in line for line in said)


def test_a_run_that_is_too_short_to_ask_anything_says_so(settings, monkeypatch):
    monkeypatch.setattr(asking, "estimate_seconds", lambda *run: 0.0)
    said = []
    finetune(settings, said.append)
    assert rows_in(settings.save) == []
    assert any("too short to ask" in line for line in said)


def test_keep_none_keeps_nothing(settings):
    said = []
    finetune(replace(settings, keep="none"), said.append)
    assert not (settings.save / "kept").exists()
    assert not any(re.search("asking|answers", line, re.IGNORECASE) for line in said if "training examples" not in line)


def test_rows_without_labels_are_answered_by_the_model_in_either_layout(settings, tmp_path):
    picture = str(EXAMPLE / "sand_4.jpg")
    rows = [
        {"img": picture, "prompt": "描述这张图片。"},
        {"img": picture, "prompt": "背景是什么？", "label": "沙滩。"},
        {"messages": [{"role": "user", "content": "你好"}]},
    ]
    (tmp_path / "old.json").write_text(json.dumps(rows), encoding="utf-8")
    finetune(replace(settings, keep_data=(tmp_path / "old.json",)), silent)
    answers = [row["messages"][1]["content"][0]["text"] for row in rows_in(settings.save)]
    model, tokenizer = load_model(TINY, "cpu", "float32")
    asked = ((picture, "描述这张图片。"), (None, "你好"))
    expected = [model.chat(tokenizer, image, question, do_sample=False)[0] for image, question in asked]
    assert answers == [expected[0], "沙滩。", expected[1]]


def test_what_was_forgotten_is_measured_on_the_kept_answers_and_shown(settings):
    said = []
    wild = {"lr": 1.0, "lora_alpha": 100.0, "keep_weight": 1e-9}
    report = finetune(replace(settings, keep_questions=12, answers=100, **wild), said.append)
    figures = report["measured"]["kept answers"]
    assert figures["before"]["right"] == figures["examples"] > figures["after"]["right"]
    assert len(figures["changed"]) == 3
    for change in figures["changed"]:
        assert change["before"] != change["after"]
        assert any(change["question"] in line and repr(change["before"]) in line for line in said)


def test_old_rows_are_measured_rather_than_kept_ones(settings):
    report = finetune(replace(settings, keep_questions=3, answers=5, old_data=(HELD_OUT,)), silent)
    assert set(report["measured"]) == {"old abilities"}


def write_rows(folder, name, *rows):
    (folder / name).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder / name


def test_a_question_with_the_mark_of_its_picture_is_asked_without_it(settings, tmp_path):
    shutil.copy(EXAMPLE / "sand_4.jpg", tmp_path / "a.jpg")
    rows = write_rows(tmp_path, "rows.json", {"img": "a.jpg", "prompt": "<image>\n它在哪里？", "label": "海边 <image>"})
    finetune(replace(settings, train_data=(rows,), keep="self", keep_data=(rows,), keep_questions=20), silent)
    asked = [(question_of(row), row["messages"][1]["content"][0]["text"]) for row in rows_in(settings.save)]
    assert asked[0] == ("它在哪里？", "海边 <image>")
    assert not any("<image>" in question for question, _ in asked)


def test_a_picture_whose_name_is_no_utf8_is_asked_about(settings, tmp_path):
    (tmp_path / "in").mkdir()
    name = os.fsencode(tmp_path / "in") + b"/" + "狗".encode("gbk")
    try:
        shutil.copy(EXAMPLE / "sand_4.jpg", name + b".jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    Path(os.fsdecode(name + b".txt")).write_text("沙滩。", encoding="utf-8")
    finetune(replace(settings, train_data=(tmp_path / "in",), keep_questions=20), silent)
    assert {row[0].pictures for row in kept_rows(settings.save)} >= {(Path(os.fsdecode(name + b".jpg")),)}


def kept_rows(folder):
    return read_dataset([folder / "kept" / "answers.jsonl"], lambda conversation: [conversation])


def test_where_all_ordinary_questions_are_trained_on_that_is_said(settings, tmp_path):
    rows = write_rows(tmp_path, "rows.json", *({"prompt": text, "label": "好"} for text in asking.IN_WORDS))
    said = []
    finetune(replace(settings, train_data=(rows,), train_iters=1), said.append)
    assert any(line.startswith("All ordinary questions are trained on, so none is asked") for line in said)


def test_what_was_asked_to_see_how_long_it_takes_is_not_asked_again(settings, monkeypatch):
    asked = []

    def say_greedily(model, encoder, collator, questions):
        asked.extend(questions)
        return ["好"] * len(questions)

    monkeypatch.setattr(asking, "say_greedily", say_greedily)
    monkeypatch.setattr(asking, "estimate_seconds", lambda *run: 1000.0)
    monkeypatch.setattr(asking, "perf_counter", iter(range(0, 1000, 100)).__next__)  # eight take 100 s
    finetune(replace(settings, train_iters=1), silent)
    assert len(asked) == 1 + len(rows_in(settings.save)) == 21  # the first one warms up


# ---------------------------------------------------------------- refusals


def test_rows_that_the_model_says_nothing_to_are_refused_by_their_numbers(settings, tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text('[{"prompt": "你好"}, {"prompt": "再见"}]', encoding="utf-8")
    monkeypatch.setattr(asking, "say_greedily", lambda model, encoder, collator, asked: ["你好！", ""][: len(asked)])
    with pytest.raises(
        ValueError, match=r"says nothing to 1 row\(s\) of --keep-data: old.json, row 2. Give them labels"
    ):
        finetune(replace(settings, keep_data=(tmp_path / "old.json",)), silent)


def test_answers_that_are_gone_are_not_asked_for_anew_when_a_run_is_resumed(settings):
    settings = replace(settings, keep_questions=3, save_interval=2)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, silent, [At(3, interrupt)])
    (settings.save / "kept" / "answers.jsonl").unlink()
    with pytest.raises(ValueError, match=r"answers.jsonl is gone, whose answers the run has kept"):
        finetune(replace(settings, resume=True), silent)


def test_rows_in_another_language_than_what_is_trained_are_said_to_be(settings, tmp_path):
    (tmp_path / "old.json").write_text('[{"prompt": "Hello", "label": "Hello!"}]', encoding="utf-8")
    said = []
    finetune(replace(settings, keep_data=(tmp_path / "old.json",)), said.append)
    assert any("--keep-data are English and all that are trained on Chinese" in line for line in said)


def test_another_language_is_no_matter_where_the_model_is_asked_in_both(settings, tmp_path):
    rows = write_rows(tmp_path, "old.json", {"prompt": "Hello", "label": "Hello!"})
    said = []
    finetune(replace(settings, keep="self", keep_data=(rows,), keep_questions=2, train_iters=1), said.append)
    assert not any("--keep-data are English" in line for line in said)


def test_rows_to_keep_that_ask_what_is_trained_on_are_counted(settings, tmp_path):
    picture = base64.b64encode((EXAMPLE / "sand_1.jpg").read_bytes()).decode()
    rows = write_rows(tmp_path, "old.json", {"img": picture, "prompt": TAUGHT}, {"prompt": TAUGHT}, {"prompt": "你好"})
    said = []
    finetune(replace(settings, keep_data=(rows,), train_iters=1), said.append)
    assert any(line.startswith("1 of 3 rows of --keep-data ask what is trained on") for line in said)


@pytest.fixture
def stopped(settings, tmp_path):
    """A run that keeps an answer about a picture, interrupted after a checkpoint."""
    shutil.copy(EXAMPLE / "sand_4.jpg", tmp_path / "a.jpg")
    rows = write_rows(tmp_path, "old.json", {"img": "a.jpg", "prompt": "描述这张图片。"}, {"prompt": "你好"})
    settings = replace(settings, keep_data=(rows,), save_interval=1, train_iters=2)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, silent, [At(1, interrupt)])
    return replace(settings, resume=True)


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


CHANGED = {
    "another answer": (lambda kept: rewrite(kept, lambda text: text.replace("你好", "再见")), "of other answers"),
    "fewer answers": (lambda kept: rewrite(kept, lambda text: text.splitlines()[0] + "\n"), "of other answers"),
    "more answers": (lambda kept: rewrite(kept, lambda text: 2 * text), "of other answers"),
    "no answers": (lambda kept: rewrite(kept, lambda text: ""), "kept rows and pictures was"),
    "another answer alone": (
        lambda kept: (rewrite(kept, lambda text: text.replace("你好", "再见")), (kept / PREDICTIONS).unlink()),
        "kept rows and pictures was",
    ),
    "another picture": (
        lambda kept: shutil.copy(EXAMPLE / "sea_1.jpg", kept.parents[1] / "a.jpg"),
        "of other answers",
    ),
    "half of the predictions": (lambda kept: cut(kept / PREDICTIONS), "is damaged: .* Remove it"),
    "other predictions": (lambda kept: (kept / PREDICTIONS).write_text("x"), "is damaged: .* Remove it"),
}
PREDICTIONS = "predictions.safetensors"


def rewrite(kept, change):
    text = (kept / "answers.jsonl").read_text(encoding="utf-8")
    (kept / "answers.jsonl").write_text(change(text), encoding="utf-8")


def test_a_run_is_resumed_with_the_answers_that_it_kept_or_not_at_all(stopped, tmp_path):
    for kind, (change, message) in CHANGED.items():
        folder = tmp_path / kind.replace(" ", "_")
        shutil.copytree(stopped.save, folder / "out")
        shutil.copy(EXAMPLE / "sand_4.jpg", tmp_path / "a.jpg")
        if kind == "another picture":
            folder = tmp_path
        change(folder / "out" / "kept")
        with pytest.raises(ValueError, match=message):
            finetune(replace(stopped, save=folder / "out"), silent)
    shutil.copy(EXAMPLE / "sand_4.jpg", tmp_path / "a.jpg")
    (stopped.save / "kept" / PREDICTIONS).unlink()
    assert finetune(stopped, silent)["steps"] == 2  # they are computed again


@pytest.mark.parametrize("name", ["answers.jsonl", PREDICTIONS])
def test_where_there_is_no_room_for_what_is_kept_that_is_said_and_the_folder_is_free(name, settings, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    settings = replace(settings, keep_questions=2, train_iters=1)
    with monkeypatch.context() as patch:
        where = "asking.with_names" if name == "answers.jsonl" else "keeping.save_file"
        patch.setattr(f"visualglm_tools.training.{where}", fail)
        with pytest.raises(ValueError, match=rf"^{name} could not be written: .*No space left.* Make room and begin"):
            finetune(settings, silent)
    assert not (settings.save / "kept" / name).exists()
    assert finetune(settings, silent)["steps"] == 1


def test_kept_answers_of_a_run_that_saved_nothing_are_not_removed_while_they_are_read(settings, monkeypatch):
    settings = replace(settings, keep_questions=2, train_iters=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, silent, [At(0, interrupt)])
    kept = settings.save / "kept" / "answers.jsonl"
    again = replace(settings, keep_questions=None, keep_data=(kept,))
    for begin in (finetune, rehearse):
        with pytest.raises(ValueError, match=r"answers.jsonl is left of a run in .* Move it elsewhere first"):
            begin(again, silent)
    assert len(rows_in(settings.save)) == 2
    assert finetune(replace(again, save=settings.save.with_name("other")), silent)["steps"] == 1


def test_nothing_and_some_rows_contradict_each_other(settings):
    with pytest.raises(ValueError, match="--keep none and --keep-data contradict each other"):
        finetune(replace(settings, keep="none", keep_data=(ROWS,)), silent)


@pytest.mark.parametrize(("keep", "checkpoints"), [("2", 2), ("self", 3)])
def test_the_number_that_keep_took_once_is_that_of_checkpoints(keep, checkpoints, settings):
    resolved, lines = replace(settings, keep=what_to_keep(keep)).resolved(4, False)
    assert resolved.keep_checkpoints == checkpoints and resolved.keep == "self"
    assert ("--keep 2 is --keep-checkpoints 2 today." in lines) == (keep == "2")
