"""The trials of cures: pictures with small subjects, and contrast with the conversation without its picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.paths import TINY
from tools.tiny import image_guidance, questions, small_subjects, world
from tools.tiny.image_guidance import ImageContrast, Setting, Trial, facts_in, from_drawings, from_exam, from_world
from visualglm_hf import VisualGLMProcessor, register
from visualglm_tools.evaluation.references import read_exam
from visualglm_tools.training.dataset import read_dataset


# ---------------------------------------------------------------- small subjects


def test_a_small_subject_is_small_and_inside_and_has_its_colour():
    for number in range(20):
        scene = small_subjects.sample_subject(number, "exam")
        ((x, y, radius),) = scene.objects
        assert 0.003 <= (2 * radius) ** 2 / small_subjects.CANVAS**2 <= 0.01
        assert radius < x < small_subjects.CANVAS - radius and radius < y < small_subjects.CANVAS - radius
        centre = np.asarray(small_subjects.draw(scene), dtype=int)[int(y), int(x)]
        assert np.abs(centre - world.COLOURS[scene.colour][1]).max() <= 20


def test_the_files_of_small_subjects_are_an_exam_and_a_dataset_of_other_pictures(tmp_path):
    assert small_subjects.main([str(tmp_path), "--trained", "2", "--examined", "3"]) == 0
    exam = read_exam(tmp_path / "exam.jsonl", "auto")
    assert {(each.kind, each.language) for each in exam} == {
        (kind, language) for kind in ("shape", "colour") for language in world.LANGUAGES
    }
    rows = list(read_dataset([tmp_path / "dataset.json"], lambda conversation: [conversation]))
    assert len(exam) == 12 and len(rows) == 8
    assert Image.open(tmp_path / "exam_0.png").size == (896, 896)


# ---------------------------------------------------------------- image guidance


@pytest.fixture(scope="module")
def tiny(loaded):
    model, _ = loaded
    register()
    return model, VisualGLMProcessor.from_pretrained(TINY)


@pytest.mark.parametrize("language", world.LANGUAGES)
@pytest.mark.parametrize("number", range(6))
def test_the_facts_of_a_caption_are_those_of_its_scene(language, number):
    scene = world.sample_scene(number, "new pictures")
    expected = {
        ("shape", scene.shape),
        ("colour", scene.colour),
        ("count", str(scene.count)),
        ("background", scene.background),
    }
    assert facts_in(world.answer(scene, "describe", language), language) == expected


def test_what_is_invented_and_what_is_told_add_up(tiny):
    trial = Trial(*tiny, from_world("new combinations", range(1)))
    truth = [row.answer for row in trial.dialogues]
    right = trial.judge(truth, 1.0)
    assert (right.invention, right.recall, right.right.all()) == (0, 1, True)
    wrong = trial.judge(["图片中有三个黑色的爱心，背景是大海。" if "图片" in each else "" for each in truth], 1.0)
    assert wrong.invention > 0.5 and wrong.recall < 0.5 and not wrong.right.any()


@pytest.mark.parametrize("against", image_guidance.OTHERS)
def test_the_other_conversation_is_continued_as_if_it_were_read_anew(tiny, against):
    """The cache and the positions of its steps give what the whole sequence gives."""
    model, processor = tiny
    trial = Trial(model, processor, from_world("new combinations", range(3)))
    other = trial.encode(trial.dialogues, against)
    embeds = other.pop("image_embeds")
    answers = torch.tensor([processor.tokenizer("红色的圆形。")["input_ids"][:4]]).expand(len(trial.dialogues), -1)
    contrast = ImageContrast(Setting(gamma=1.0), model, other, embeds, 0)
    with torch.inference_mode():
        for length in range(answers.shape[1] + 1):
            answer = answers[:, :length]
            ids = torch.cat((other["input_ids"], answer), dim=1)
            mask = torch.cat((other["attention_mask"], torch.ones_like(answer)), dim=1)
            whole = model(ids, attention_mask=mask, image_embeds=embeds).logits[:, -1].log_softmax(-1)
            torch.testing.assert_close(contrast.unseen(answer), whole, rtol=1e-4, atol=1e-4)


def test_the_gate_and_the_cut_off_hold(tiny):
    scores = torch.tensor([[0.98, 0.01, 0.01], [0.5, 0.4, 0.02]]).log()
    contrast = ImageContrast.__new__(ImageContrast)
    contrast.prompt_length = 0
    contrast.unseen = lambda answer: torch.tensor([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05]]).log()
    contrast.setting = Setting(gamma=1.0, gate=0.9, plausible=0.1)
    guided = contrast(torch.zeros(2, 0, dtype=torch.long), scores)
    assert guided[0].argmax() == 0 and torch.isinf(guided[0, 1:]).all()  # sure: not contrasted, others cut off
    assert guided[1].argmax() == 1 and torch.isinf(guided[1, 2])  # unsure: away from what is said blindly
    contrast.setting = Setting()
    assert torch.equal(contrast(torch.zeros(2, 0, dtype=torch.long), scores), scores.log_softmax(-1))


def test_contradicting_pictures_are_asked_as_often_for_what_is_there_as_for_what_was_expected():
    for image, asked in from_drawings(image_guidance.CONTRADICTING, range(3)):
        assert image.size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
        for language in world.LANGUAGES:
            kinds = [each.kind for each in asked if each.language == language]
            assert kinds == ["describe", "shape of", "absent", "presence", "presence"]
            answers = [each.answer for each in asked if (each.kind, each.language) == ("presence", language)]
            assert answers == list(questions.YES_NO[language][0])
            (caption,) = [each.answer for each in asked if (each.kind, each.language) == ("describe", language)]
            assert len(facts_in(caption, language)) >= 5  # two shapes, two colours, a background


def test_the_trial_reads_an_exam_and_prints_both_tables(tmp_path, capsys):
    rows = []
    for number in range(4):
        scene, name = world.sample_scene(number, "new pictures"), f"{number}.png"
        world.draw(scene).save(tmp_path / name)
        rows.append({"id": name, "text": "Describe the image.", "image": name, "kind": "describe", "language": "en"})
        rows[-1]["reference"] = world.answer(scene, "describe", "en")
    rows.append({"id": "yes", "text": "Is there a star?", "image": "0.png", "reference": "yes"})
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [len(asked) for _, asked in from_exam(exam)] == [2, 1, 1, 1]
    arguments = ["--model", str(TINY), "--exam", str(exam), "--choose-on", "2"]
    assert image_guidance.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Chosen on 2 pictures" in printed and "Reported on 2 others" in printed
    assert printed.count("| greedy |") == 2 and "| sampled, plausible ≥ 0.1 |" in printed
    assert image_guidance.main([*arguments[:-1], "4"]) == 2
