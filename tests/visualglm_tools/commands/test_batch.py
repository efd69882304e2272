"""The batch door: every row once, in its order, with the answer it has alone, whatever happens on the way."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import batch, run, script
from tests.json_lines import read_lines, write_lines
from tests.paths import PICTURES, ROOT, SCRIPTS, TINY
from tests.serving_helpers import wait_until
from visualglm_hf.image_processing_visualglm import open_picture
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.prompts import conversation_messages
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.outputs import Output
from visualglm_tools.serving.questions import Asking, Pictures, Row, answer_rows, read_rows, seed_of


DOOR = SCRIPTS / "batch_infer.py"
QUESTIONS = ("描述这张图片。", "图片的背景是什么？", "What colour are the shapes?", "你好")


def many_rows(count: int) -> list[dict]:
    return [
        {"id": f"row {index}", "text": QUESTIONS[index % 4], "image": str(PICTURES[index % 3]) if index % 4 < 3 else ""}
        for index in range(count)
    ]


def run_apart(*options: object, code: int = 0) -> str:
    """Run the command in a process of its own; returns what it says on stderr."""
    said = script(DOOR.name, *options, "--device", "cpu", code=code).stderr
    assert "Traceback" not in said
    return said


def answer_all(loaded, rows: list[Row], settings: Settings, folder: Path = ROOT, **options) -> list:
    with Engine(*loaded, Limits(**options)) as engine:
        return list(answer_rows(engine, rows, Pictures(folder, False), Asking(settings)))


def test_each_row_has_the_answer_that_it_has_alone(loaded):
    rows = [Row(number, content) for number, content in enumerate(many_rows(12), 1)]
    settings = Settings(temperature=5.0, top_p=1, max_new_tokens=12)  # hardly ever the likeliest token
    together = answer_all(loaded, rows, settings, max_batch_size=5, max_waiting=100)
    assert [row for row, _ in together] == rows
    with Engine(*loaded) as engine:
        for row, completion in together[:6]:
            picture = open_picture(row.content["image"]) if row.content["image"] else None
            prompt = engine.prepare(conversation_messages((), row.content["text"], picture))
            alone = Settings(temperature=5.0, top_p=1, max_new_tokens=12, seed=seed_of(row, 0))
            assert engine.submit(prompt, alone).result() == completion


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_and_doubles_nothing(loaded, tmp_path):
    rows = many_rows(200)
    source, output = write_lines(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    options = [source, output, "--batch-size", "2", "--temperature", "3"]
    command = [sys.executable, str(DOOR), *map(str, options), "--device", "cpu"]
    for _ in range(2):
        before = output.stat().st_size if output.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda before=before: output.exists() and output.stat().st_size > before + 2000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(output, "a", encoding="utf-8") as file:
            file.write('{"id": "row 1", "te')  # as if killed while writing
    interrupted = len(output.read_text(encoding="utf-8").splitlines()) - 1
    assert 0 < interrupted < len(rows)
    assert f"/{len(rows) - interrupted} " in run_apart(*options)  # the bar counts what is left
    answers = read_lines(output)
    assert [{name: answer[name] for name in rows[0]} for answer in answers] == rows
    in_order = [Row(number, content) for number, content in enumerate(rows, 1)]
    uninterrupted = answer_all(loaded, in_order, Settings(max_length=2048, temperature=3), max_waiting=200)
    assert [answer["answer"] for answer in answers] == [completion.text for _, completion in uninterrupted]


def test_bad_rows_are_listed_by_number_and_the_rest_is_answered(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = [
        '{"id": 1, "text": "你好"}',
        "{no JSON",
        '{"id": 3, "text": "你好", "image": "nowhere.png"}',
        '{"id": 4, "text": "你好", "image": "broken.png"}',
        "",
        '{"id": 6}',
        '{"text": "你好"}',
        '{"id": 8, "text": "你好", "image": "http://127.0.0.1/a.png"}',
        json.dumps({"id": 9, "text": "你好 " * 3000}),
        '{"id": 10, "text": "<img>/etc/hostname</img>", "image": null, "mine": [1]}',
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    said = run_apart(source, output, code=1)
    assert [answer["id"] for answer in read_lines(output)] == [1, 10]
    assert read_lines(output)[1]["mine"] == [1]
    problems = read_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [problem["line"] for problem in problems] == [2, 3, 4, 6, 7, 8, 9, 11]
    by_line = {problem["line"]: problem["error"] for problem in problems}
    assert "nowhere.png" in by_line[3] and '"text"' in by_line[6] and '"id"' in by_line[7]
    assert "--allow-urls" in by_line[8] and "Shorten" in by_line[9]
    assert "2 of 10 rows are answered" in said and "out.jsonl.errors.jsonl" in said
    # Once they are right, the same command answers what is missing; the order stays that of the input.
    write_lines(source, *({"id": number, "text": "你好"} for number in range(1, 11)))
    run_apart(source, output)
    assert [answer["id"] for answer in read_lines(output)] == list(range(1, 11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "in.jsonl", "out.jsonl"]


@pytest.mark.slow
def test_two_processes_share_the_rows(tmp_path):
    rows = many_rows(21)
    source, output = write_lines(tmp_path / "in.jsonl", *rows, {"id": "bad"}), tmp_path / "out.jsonl"
    write_lines(tmp_path / "out.jsonl.part7", {**rows[20], "answer": "from a run that was stopped"})
    # Without --multi_gpu accelerate's launcher takes processes on a CPU for a matter of MPI.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command += [DOOR, source, output, "--device", "cpu", "--temperature", "0"]
    finished = run(*command, code=1)  # the bad row
    assert finished.stderr.count("Loading " + str(TINY)) == 2
    answers = read_lines(output)
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    assert answers[20]["answer"] == "from a run that was stopped"
    assert [problem["line"] for problem in read_lines(tmp_path / "out.jsonl.errors.jsonl")] == [22]
    alone = tmp_path / "alone.jsonl"
    run_apart(write_lines(source, *rows[:20]), alone, "--temperature", "0")
    assert read_lines(alone) == answers[:20]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone.jsonl",
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.errors.jsonl",
    ]


def test_the_command_of_the_readme_answers_the_examples(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = [line for line in readme.splitlines() if line.startswith("visualglm batch")]
    command = command.replace("path/to/prepared", str(TINY)).replace("answers.jsonl", str(tmp_path / "answers.jsonl"))
    run_apart(*command.split()[2:])
    answers = [answer["answer"] for answer in read_lines(tmp_path / "answers.jsonl")]
    for answer, expected in zip(answers, ("红色", "夜空", "Three", "你好"), strict=True):
        assert expected in answer


def test_pictures_are_found_beside_the_file_or_in_the_working_directory_but_never_guessed(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    pictures = Pictures(beside, allow_urls=False)
    (beside / "a.png").write_bytes(PICTURES[0].read_bytes())
    (here / "b.png").write_bytes(PICTURES[1].read_bytes())
    assert pictures.open("a.png").tobytes() == open_picture(PICTURES[0]).tobytes()
    assert pictures.open("b.png").tobytes() == open_picture(PICTURES[1]).tobytes()
    assert pictures.open(str(PICTURES[2])).size
    (here / "a.png").write_bytes(PICTURES[1].read_bytes())
    with pytest.raises(ValueError, match="ambiguous"):
        pictures.open("a.png")
    with pytest.raises(ValueError, match="no picture"):
        pictures.open("c.png")


def test_ids_must_differ_and_an_output_of_other_rows_is_left_alone(tmp_path):
    twice = write_lines(
        tmp_path / "twice.jsonl", {"id": 1, "text": "a"}, {"id": "1", "text": "b"}, {"id": 1, "text": "c"}
    )
    rows, [problem] = read_rows(twice)
    assert [row.number for row in rows] == [1, 2] and problem.number == 3
    assert "The id 1 is in line 1 already" in problem.error
    rows, problems = read_rows(write_lines(tmp_path / "rows.jsonl", {"id": 1, "text": "a"}))
    assert problems == []
    for other in ({"id": 2, "answer": "b"}, {"id": 1}, [1]):
        output = write_lines(tmp_path / "other.jsonl", other)
        before = output.read_bytes()
        with pytest.raises(ValueError, match="line 1"):
            Output(output, rows).start([])
        assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.jsonl", "out.jsonl"), "cannot read 'nowhere.jsonl': No such file or directory"),
        (("pictures", "out.jsonl"), "'pictures' is a folder. Give a file with one JSON object in each line"),
        (("pictures/a.png", "out.jsonl"), "'pictures/a.png' is a picture. Give a file with one JSON object in each"),
        (("pictures/a.jpg", "out.jsonl"), "'pictures/a.jpg' is a picture."),
        (("pictures/a.webp", "out.jsonl"), "'pictures/a.webp' is a picture."),
        (("in.jsonl", "in.jsonl"), "another file"),
        (("in.jsonl", "no/such/out.jsonl"), "no folder"),
        (("in.jsonl", "out.jsonl", "--model", "nowhere"), "no checkpoint"),
        (("in.jsonl", "out.jsonl", "--top-p", "2"), "from 0 to 1"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "in.jsonl", {"id": 1, "text": "a"})
    (tmp_path / "pictures").mkdir()
    for ending in ("png", "jpg", "webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"a.{ending}")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):  # argparse's way to say 2
        assert batch(*arguments, "--device", "cpu") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_that_is_one_list_says_where_its_objects_belong(indent, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"id": 1, "text": "a"}], indent=indent), encoding="utf-8")
    rows, problems = read_rows(tmp_path / "list.json")
    assert rows == []
    assert "line of its own" in problems[0].error
