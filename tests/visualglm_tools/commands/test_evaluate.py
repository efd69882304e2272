"""The exam door: asked once, judged as often as one likes, and nothing else is taken for an exam or for its answers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import command
from tests.json_lines import read_lines, write_lines
from tests.paths import COMMAND, ROOT, TINY
from visualglm_tools.checkpoints.loading import load_model
from visualglm_tools.commands.evaluate import Options
from visualglm_tools.serving import runs
from visualglm_tools.serving.engine.engine import Engine


EXAM = ROOT / "examples" / "exam.jsonl"
OPEN_KINDS = {"describe", "shape", "count", "position"}  # that the tiny model was taught, and knows of these pictures
PICTURE = str(ROOT / "examples" / "red_circles_on_grass.png")
ROWS = [
    {"id": 1, "text": "图片中的图形是什么颜色？", "image": PICTURE, "reference": ["红色", "红"], "kind": "colour"},
    {"id": 2, "text": "What colour is it?", "image": PICTURE, "reference": "Red", "kind": "colour"},
    {"id": 3, "text": "What shape is it?", "image": PICTURE, "reference": "A square", "kind": "shape"},
    {"id": 4, "text": "谢谢", "image": "", "reference": "不客气", "kind": "talk"},
]
POPE = [{"question_id": 1, "image": PICTURE, "text": "Is there a dog?", "label": "no"}]


@pytest.fixture(scope="module")
def loaded():
    return load_model(TINY, device="cpu")


@pytest.fixture
def door(loaded, tmp_path, monkeypatch, capfd):
    """Runs the command in an empty folder, on a model that is there already; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "load", classmethod(lambda cls, folder, limits, **options: cls(*loaded, limits)))

    def run(*options) -> tuple[int, str, str]:
        return command("evaluate", *options, "--device", "cpu"), *capfd.readouterr()

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Lets loading a model fail the test."""

    def forbid() -> None:
        monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("a model was loaded"))

    return forbid


def answers(*texts: str, rows: list[dict] = ROWS) -> list[dict]:
    return [{**row, "answer": text, "finish_reason": "stop"} for row, text in zip(rows, texts, strict=False)]


def table_of(shown: str, number: int = 0) -> dict[tuple[str, str], list[str]]:
    lines = shown.split("\n\n")[number].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(kind, language): cells for kind, language, *cells in rows}


def test_an_exam_is_asked_and_judged(door):
    write_lines("exam.jsonl", *ROWS)
    code, shown, said = door("exam.jsonl", "answers.jsonl")
    assert code == 0 and "4 of 4 rows are answered." in said
    table = table_of(shown)
    assert list(table) == [
        ("colour", "zh"),
        ("colour", "en"),
        ("shape", "en"),
        ("talk", "zh"),
        ("all", "zh"),
        ("all", "en"),
        ("all", "all"),
    ]
    assert [cells[:3] for cells in table.values()] == [
        ["1", "1", "100.0 %"],
        ["1", "1", "100.0 %"],
        ["1", "0", "0.0 %"],  # it is a circle
        ["1", "1", "100.0 %"],
        ["2", "2", "100.0 %"],
        ["2", "1", "50.0 %"],
        ["4", "3", "75.0 %"],
    ]
    assert [row["id"] for row in read_lines("answers.jsonl")] == [1, 2, 3, 4]
    assert sorted(path.name for path in Path().iterdir()) == ["answers.jsonl", "exam.jsonl"]


def test_the_example_is_known_to_the_tiny_model_but_for_what_it_was_not_taught(door):
    code, shown, _ = door(EXAM, "answers.jsonl", "--report", "report.json")
    rows = json.loads(Path("report.json").read_text(encoding="utf-8"))["rows"]
    assert code == 0 and table_of(shown)["all", "all"][0] == str(len(rows))
    assert all(row["is_right"] for row in rows if row["kind"] in OPEN_KINDS)
    assert sum(row["is_right"] for row in rows if row["way"] == "exact") == 12


def test_complete_answers_are_judged_again_without_a_model_and_alike(door, no_model):
    write_lines("exam.jsonl", *ROWS)
    _, first, _ = door("exam.jsonl", "answers.jsonl", "--report", "one.json", "--chart", "one.png")
    before = Path("answers.jsonl").read_bytes()
    no_model()
    code, again, said = door(
        "exam.jsonl", "answers.jsonl", "--model", "nowhere", "--report", "two.json", "--chart", "2.png"
    )
    assert (code, again) == (0, first) and "no model is loaded" in said
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()
    assert Path("one.png").read_bytes() == Path("2.png").read_bytes()
    assert Path("one.png").read_bytes().startswith(b"\x89PNG") and Path("answers.jsonl").read_bytes() == before


def test_answers_are_judged_by_the_references_of_now(door, no_model):
    write_lines("answers.jsonl", *answers("红色。", "Red.", "A circle.", "不客气！"))
    no_model()
    write_lines("exam.jsonl", *({**row, "reference": "circle"} for row in ROWS))
    assert table_of(door("exam.jsonl", "answers.jsonl")[1])["all", "all"][1] == "0"
    assert table_of(door("exam.jsonl", "answers.jsonl", "--match", "contains")[1])["all", "all"][1] == "1"


def test_a_run_goes_on_where_it_was_and_judges_all(door):
    write_lines("exam.jsonl", *ROWS)
    write_lines("answers.jsonl", *answers("绿色。", "Red."))
    with open("answers.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": 3, "te')  # killed while it wrote
    code, shown, said = door("exam.jsonl", "answers.jsonl")
    assert code == 0 and "/2 " in said
    assert table_of(shown)["colour", "zh"][1] == "0"  # as it was answered then
    assert table_of(shown)["all", "all"][:2] == ["4", "2"]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_prints_no_table_and_goes_on(number, expected, door, monkeypatch):
    write_lines("exam.jsonl", *({**ROWS[3], "id": number} for number in range(40)))
    draw, drawn = runs.draw, []

    def draw_and_stop(progress, problem):
        draw(progress, problem)
        drawn.append(progress)
        if len(drawn) == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "draw", draw_and_stop)
        code, shown, said = door("exam.jsonl", "answers.jsonl", "--batch-size", "2")
    assert (code, shown) == (expected, "") and "Stopped" in said
    assert 2 <= len(read_lines("answers.jsonl")) < 40
    code, shown, _ = door("exam.jsonl", "answers.jsonl")
    assert code == 0 and table_of(shown)["talk", "zh"][:2] == ["40", "40"]


@pytest.mark.slow
def test_two_processes_share_an_exam_and_the_first_judges(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    words = [
        *launcher,
        "-m",
        "visualglm_tools",
        "evaluate",
        str(EXAM),
        str(tmp_path / "answers.jsonl"),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("Loading ") >= 2
    assert finished.stdout.count("| kind |") == 1
    alone = [*COMMAND, "evaluate", str(EXAM), str(tmp_path / "answers.jsonl"), "--model", "nowhere"]
    assert subprocess.run(alone, capture_output=True, text=True, timeout=300, cwd=ROOT).stdout == finished.stdout


def test_a_row_that_cannot_be_answered_is_counted_apart(door):
    write_lines("exam.jsonl", ROWS[3], {**ROWS[0], "image": "nowhere.png"})
    code, shown, said = door("exam.jsonl", "answers.jsonl")
    assert code == 1 and "nowhere.png" in said
    assert table_of(shown)["colour", "zh"] == ["1", "0", "", "", "1"]
    assert table_of(shown)["all", "zh"] == ["2", "1", "100.0 %", "20.7–100.0", "1"]


def test_where_nothing_could_be_answered_there_is_a_table_and_an_empty_chart(door):
    write_lines("exam.jsonl", {**ROWS[0], "image": "nowhere.png"})
    code, shown, _ = door("exam.jsonl", "answers.jsonl", "--chart", "a.png")
    assert code == 1 and table_of(shown) == {("colour", "zh"): ["1", "0", "", "", "1"]}
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_has_gone_is_no_news_and_the_report_is_written(tmp_path):
    write_lines(tmp_path / "exam.jsonl", *ROWS)
    write_lines(tmp_path / "answers.jsonl", *answers("a", "b", "c", "d"))
    words = [*COMMAND, "evaluate", "exam.jsonl", "answers.jsonl", "--report", "report.json"]
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with os.fdopen(writing, "wb") as output:
        finished = subprocess.run(
            words, stdout=output, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, timeout=300
        )
    assert finished.returncode == 1 and "rror" not in finished.stderr
    assert len(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]) == 4


def test_popes_files_are_asked_and_their_answers_judged(door, no_model):
    write_lines("coco_pope_random.json", *POPE)
    code, shown, _ = door("coco_pope_random.json", "answers.jsonl")
    (answer,) = read_lines("answers.jsonl")
    assert code == 0 and answer.items() >= {**POPE[0], "id": 1, "reference": "no"}.items()
    assert ("coco_pope_random", "en") in table_of(shown)
    no_model()
    write_lines("answers.jsonl", {**answer, "answer": "There is no dog in the image."})
    assert table_of(door("coco_pope_random.json", "answers.jsonl")[1])["coco_pope_random", "en"][:2] == ["1", "1"]


def test_two_settings_are_compared_row_by_row(door, no_model):
    write_lines("exam.jsonl", *ROWS)
    write_lines("answers.jsonl", *answers("红色。", "Red.", "A circle.", "不客气！"))
    write_lines("other.jsonl", *answers("蓝色。", "Blue.", "A square."))
    no_model()
    options = ("exam.jsonl", "answers.jsonl", "--against", "other.jsonl", "--report", "report.json")
    code, shown, _ = door(*options)
    assert code == 0
    assert table_of(shown, 1)["all", "all"] == ["3", "33.3 %", "66.7 %", "2", "1", "1"]
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert report["against"] == "other.jsonl"
    expected = {"rows": 3, "right": 2, "before": 1, "better": 2, "worse": 1, "p_value": 1.0}
    assert report["compared"][-1].items() >= expected.items()
    assert [row["other"] for row in report["rows"]] == ["蓝色。", "Blue.", "A square.", None]


def test_an_exam_is_greedy_and_without_a_penalty():
    options = Options(input=EXAM, output=Path("answers.jsonl"))
    assert (options.temperature, options.repetition_penalty) == (0, 1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("nowhere.jsonl", "a.jsonl"), "cannot read 'nowhere.jsonl'"),
        (("empty.jsonl", "a.jsonl"), "'empty.jsonl' has no questions"),
        (("bad.jsonl", "a.jsonl"), 'line 2: "reference" must be the right answer'),
        (("twice.jsonl", "a.jsonl"), "line 2: The id 1 is in line 1 already"),
        (("exam.jsonl", "others.jsonl"), "'others.jsonl' has answers to other questions"),
        (("exam.jsonl", "strangers.jsonl"), "line 1: no answer to a row of the input"),
        (("exam.jsonl", "exam.jsonl"), "another file than the input"),
        (("exam.jsonl", "-"), "Give plain files"),
        (("-", "a.jsonl"), "Give plain files"),
        (("exam.jsonl", os.devnull), "Give plain files"),
        (("exam.jsonl", "no/a.jsonl"), "no folder 'no'"),
        (("exam.jsonl", "a.jsonl", "--against", "others.jsonl"), "'others.jsonl' has answers to other questions"),
        (("exam.jsonl", "a.jsonl", "--against", "strangers.jsonl"), "no answer to a row"),
        (("exam.jsonl", "a.jsonl", "--against", "empty.jsonl"), "has no answers to these questions"),
        (("exam.jsonl", "a.jsonl", "--against", "nowhere.jsonl"), "no file 'nowhere.jsonl'"),
        (("exam.jsonl", "a.jsonl", "--against", "a.jsonl"), "another file than the answers"),
        (("exam.jsonl", "a.jsonl", "--report", "exam.jsonl"), "would be written over 'exam.jsonl'"),
        (("exam.jsonl", "a.jsonl", "--report", "a.jsonl"), "another file than the answers"),
        (("exam.jsonl", "a.jsonl", "--report", "a.jsonl.errors.jsonl"), "another file than the answers"),
        (("exam.jsonl", "a.jsonl", "--report", "no/a.json"), "no folder 'no'"),
        (("exam.jsonl", "a.jsonl", "--report", "."), "folder or a device"),
        (("exam.jsonl", "a.jsonl", "--chart", "a.pdf"), "must be the name of a .png file"),
        (("exam.jsonl", "a.jsonl", "--report", "a.png", "--chart", "a.png"), "would be written over 'a.png'"),
        (("exam.jsonl", "a.jsonl", "--match", "yes-no"), "must be a yes or a no"),
        (("exam.jsonl", "a.jsonl", "--model", "nowhere"), "no checkpoint in 'nowhere'"),
        (("exam.jsonl", "numbers.jsonl"), '"answer" must be a text, found 3'),
    ],
)
def test_what_cannot_be_judged_is_one_line_before_a_model_is_loaded(options, complaint, door, no_model):
    write_lines("exam.jsonl", *ROWS)
    write_lines("empty.jsonl")
    write_lines("bad.jsonl", ROWS[0], {"id": 2, "text": "a"})
    write_lines("twice.jsonl", ROWS[0], ROWS[0])
    write_lines("others.jsonl", *({**row, "text": "?"} for row in answers("a", "b")))
    write_lines("strangers.jsonl", {"id": "stranger", "text": "a", "answer": "b"})
    write_lines("numbers.jsonl", *({**row, "answer": 3} for row in ROWS))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    no_model()
    code, shown, said = door(*options)
    assert (code, shown) == (2, "") and complaint in said
    assert len(said.splitlines()) == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_what_draws_is_asked_for_before_anything_is_answered(door, no_model, monkeypatch):
    write_lines("exam.jsonl", *ROWS)
    no_model()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, said = door("exam.jsonl", "a.jsonl", "--chart", "a.png")
    assert code == 2 and said == "error: matplotlib is missing: pip install 'visualglm-hf[train]'\n"
