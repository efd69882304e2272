"""A file of questions is answered to its end, whatever is in it and wherever the answers go."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests.json_lines import read_lines, write_lines
from tests.paths import PICTURES, ROOT, SCRIPTS, TINY
from visualglm_hf.image_processing_visualglm import open_picture
from visualglm_tools import output_files
from visualglm_tools.__main__ import main
from visualglm_tools.commands import finetune as finetune_visualglm
from visualglm_tools.output_files import locked
from visualglm_tools.printing import one_line
from visualglm_tools.serving import json_lines, runs
from visualglm_tools.serving import questions as batch
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.outputs import Output
from visualglm_tools.serving.questions import Asking, Pictures, Problem, Row, answer_rows, read_rows


DOOR = SCRIPTS / "batch_infer.py"
resource = pytest.importorskip("resource")  # not on Windows
GOOD = b'{"id": "good", "text": "\xe4\xbd\xa0\xe5\xa5\xbd"}\n'


@pytest.fixture
def door(batch_door):
    """Runs the command for answers of three tokens."""
    return partial(batch_door, "--max-new-tokens", "3")


def questions(count: int) -> list[dict]:
    return [{"id": number, "text": "你好"} for number in range(count)]


def question(**fields) -> bytes:
    return json.dumps({"id": "bad", "text": "你好", **fields}).encode() + b"\n"


def conversation(*messages: tuple[str, object], **fields) -> bytes:
    written = [{"role": role, "content": content} for role, content in messages]
    return json.dumps({"id": "bad", "messages": written, **fields}).encode() + b"\n"


TEXT = {"type": "text", "text": "a"}
BAD_LINES = {
    "half of a character as the text": question(text="\ud83d"),
    "half of a character as the id": question(id="\ude00"),
    "half of a character in another field": question(mine=[{"deep": "a\udfffb"}]),
    "half of a character as a name": question(**{"\ud83d": 1}),
    "half of a character as the picture": question(image="\ud83d.png"),
    "a name of more than 255 characters": question(image="x" * 300),
    "a path longer than paths are": question(image="folder/" * 5000 + "a.png"),
    "a NUL in the path": question(image="a\0b.png"),
    "a folder": question(image="folder"),
    "a device without an end": question(image="/dev/zero"),
    "a pipe": question(image="pipe"),
    "a link to itself": question(image="circle/a.png"),
    "the home of nobody": question(image="~nobody-of-this-name/a.png"),
    "an empty picture": question(image="empty.png"),
    "no picture": question(image="broken.png"),
    "base64 of no picture": question(image="QUJD" * 1000),
    "a data URI of no picture": question(image="data:image/png;base64,QUJD"),
    "a data URI without a comma": question(image="data:" + "A" * 10_000),
    "percents": question(image="data:," + "%" * 10_000),
    "an address": question(image="http://127.0.0.1:1/a.png"),
    "a file's address": question(image="file:///etc/hostname"),
    "a number as the picture": question(image=7),
    "a list as the picture": question(image=["a.png"]),
    "an object as the picture": question(image={"url": "a.png"}),
    "an empty text": question(text=""),
    "blanks": question(text=" \t\n"),
    "a number as the text": question(text=7),
    "a list as the text": question(text=["你好"]),
    "a long text": question(text="你好" * 10_000),
    "no id": b'{"text": "a"}\n',
    "no text": b'{"id": "bad"}\n',
    "null as the id": question(id=None),
    "true as the id": question(id=True),
    "a fraction as the id": question(id=1.5),
    "the id of another row": GOOD,
    "a list": b'["good", "a"]\n',
    "a number": b"7\n",
    "null": b"null\n",
    "a text": b'"a"\n',
    "no JSON": b"{id: 1}\n",
    "two objects": b'{"id": 1, "text": "a"} {"id": 2, "text": "b"}\n',
    "deep lists": b'{"id": "bad", "text": "a", "mine": ' + b"[" * 500 + b"]" * 500 + b"}\n",
    "deeper lists": b'{"id": "bad", "text": "a", "mine": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "brackets": b"[" * 2_000_000 + b"\n",
    "a number of 5000 digits": b'{"id": "bad", "text": "a", "mine": ' + b"9" * 5000 + b"}\n",
    "NaN": b'{"id": "bad", "text": "a", "mine": NaN}\n',
    "minus infinity": b'{"id": "bad", "text": "a", "mine": [-Infinity]}\n',
    "no UTF-8": b'{"id": "bad", "text": "\xff"}\n',
    "UTF-16": '{"id": "bad", "text": "a"}'.encode("utf-16") + b"\n",
    "NUL bytes": b"\0" * 100 + b"\n",
    "a text and messages": question(messages=[{"role": "user", "content": "a"}]),
    "no messages": conversation(),
    "messages that are none": b'{"id": "bad", "messages": "a"}\n',
    "an answer that asks": conversation(("user", "a"), ("assistant", "b")),
    "nobody's message": conversation(("judge", "a")),
    "an empty message": conversation(("user", " ")),
    "a picture of the model's": conversation(("assistant", [{"type": "image", "path": "a.png"}, TEXT]), ("user", "a")),
    "a part that is heard": conversation(("user", [{"type": "input_audio"}, TEXT])),
    "more places than pictures": conversation(("user", "<image><image>a"), images=["broken.png"]),
    "no picture in a conversation": conversation(("user", [{"type": "image_url", "image_url": "nowhere.png"}, TEXT])),
    "pictures in two fields": question(image="a.png", images=["b.png"]),
    "an answer": question(answer="mine"),
    "a reason to finish": question(finish_reason="mine"),
}


@pytest.fixture
def traps(door):
    """What rows may name in the folder of the run."""
    Path("folder").mkdir()
    Path("circle").symlink_to("circle")
    os.mkfifo("pipe")
    Path("empty.png").touch()
    Path("broken.png").write_bytes(b"\x89PNG no more")


def test_no_row_ends_a_run_and_each_bad_one_is_a_line_of_the_errors_file(door, traps):
    source = write_lines("in.jsonl", GOOD, *BAD_LINES.values(), {"id": "last", "text": "你好"})
    code, shown, said = door(source, "out.jsonl")
    assert (code, shown) == (1, "")
    assert [row["id"] for row in read_lines("out.jsonl")] == ["good", "last"]
    problems = read_lines("out.jsonl.errors.jsonl")
    assert [problem["line"] for problem in problems] == list(range(2, 2 + len(BAD_LINES)))
    assert all(problem["error"] for problem in problems)
    assert max(map(len, Path("out.jsonl.errors.jsonl").read_text(encoding="utf-8").split("\n"))) < 7000
    assert f"2 of {len(BAD_LINES) + 2} rows are answered." in said
    for problem, (kind, line) in zip(problems, BAD_LINES.items(), strict=True):
        assert f"line {problem['line']}: " in said, kind
        assert problem["id"] in ("bad", "good", None), kind
        if len(line) < 1000 and kind not in ("no UTF-8", "UTF-16", "NUL bytes"):
            assert problem["row"] + "\n" == line.decode(), kind


GOOD_LINES = [
    b'\xef\xbb\xbf{"id": 1, "text": "a"}\r\n',
    b" \t\r\n",
    '{"id": 2, "text": "a\u2028b\u2029c\u0085d"}\n'.encode(),
    b'{"text": "\\u4f60\\u597d", "id" : 3, "image": "", "big": 1e400, "exact": 0.10000000000000000001}\n',
    b"\n",
    b'{"id": 4, "text": "\\u0000\\u001b[2J", "image": null, "temperature": "hot", "history": 7, "seed": [[]] }\n',
    b'{"id": 123456789012345678901234567890, "text": "<|image|><sop>[gMASK]", "a": 1, "a": 2}\n',
    b'{"id": "1", "text": "a", "mine": "\\ud83d\\ude00"}',
]


def test_rows_come_out_as_they_were_written_with_their_answers_behind(door):
    assert door(write_lines("in.jsonl", *GOOD_LINES), "out.jsonl")[0] == 0
    lines = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in GOOD_LINES if line.strip()]
    written = Path("out.jsonl").read_bytes().split(b"\n")
    assert written.pop() == b""
    for line, before in zip(written, lines, strict=True):
        assert line.startswith(before[:-1].rstrip() + b', "answer": "')
        assert json.loads(line)["finish_reason"] in ("stop", "length")
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_line_of_any_length_is_read_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 100)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": 1, "text": "' + b"a" * 5_000_000 + b'"}\n' + GOOD)
    with open(path, "rb") as file:
        lines = list(json_lines.read_lines(file, 100))
    assert [len(line) for line in lines] == [101, len(GOOD)]
    with pytest.raises(ValueError, match="more than 100 bytes"):
        json_lines.parse_line(lines[0])
    monkeypatch.setattr(json_lines, "MAX_VALUES", 10)
    with pytest.raises(ValueError, match="more than 10 values"):
        json_lines.parse_line(b"[{},{},{},{},{},{}]")


def test_a_picture_may_be_the_text_of_one_in_base64(tmp_path):
    import base64

    data = PICTURES[0].read_bytes()
    pictures, text = Pictures(tmp_path, False), base64.b64encode(data).decode()
    assert len({pictures.open(source).tobytes() for source in (text, str(PICTURES[0]))}) == 1


def test_pictures_of_rows_are_decoded_in_another_process(door, monkeypatch):
    rows = [{"id": path.name, "text": "描述这张图片。", "image": str(path)} for path in PICTURES]
    source = write_lines("in.jsonl", *rows)
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", lambda *args, **options: pytest.fail("decoded here"))
        assert door(source, "out.jsonl")[0] == 0
    answers = [row["answer"] for row in read_lines("out.jsonl")]
    monkeypatch.setattr(Engine, "decode_picture", lambda self, data, name: open_picture(data))
    assert door(source, "again.jsonl")[0] == 0
    assert [row["answer"] for row in read_lines("again.jsonl")] == answers


def test_a_server_that_sends_a_byte_now_and_then_costs_its_row_only(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "DOWNLOAD_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                for _ in range(60):
                    connection.sendall(b"a")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(ValueError, match="took more than 0.3 s"):
            Pictures(tmp_path, True).open(f"http://127.0.0.1:{server.getsockname()[1]}/a.png")


def test_a_picture_beyond_any_memory_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="a.png' has more than"):
        Pictures(tmp_path, False).open("a.png")


def test_a_batch_that_fails_costs_only_the_row_that_is_too_much(loaded, monkeypatch):
    from visualglm_tools.serving.engine import batching as module

    def prefill(model, rows):
        if any(len(row.token_ids) > 30 for row in rows):
            raise RuntimeError("out of memory")
        return original(model, rows)

    original = module.prefill
    monkeypatch.setattr(module, "prefill", prefill)
    rows = [Row(number, {"id": number, "text": "a b c d e f " * (20 if number == 3 else 1)}) for number in range(1, 9)]
    with Engine(*loaded, Limits(max_batch_size=4, max_waiting=100)) as engine:
        outcomes = list(answer_rows(engine, rows, Pictures(ROOT, False), Asking(Settings(max_new_tokens=3))))
    assert [row.number for row, result in outcomes if isinstance(result, Problem)] == [3]
    assert sorted(row.number for row, _ in outcomes) == list(range(1, 9))


def test_a_row_whose_probabilities_are_broken_fails_alone(loaded, monkeypatch):
    from visualglm_tools.serving.engine.sampling import Chooser

    def choose(self, token_ids, scores):
        if token_ids.shape[1] > 30:
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")
        return original(self, token_ids, scores)

    original = Chooser.choose
    monkeypatch.setattr(Chooser, "choose", choose)
    rows = [Row(number, {"id": number, "text": "a b c d e f " * (20 if number == 2 else 1)}) for number in (1, 2, 3)]
    with Engine(*loaded, Limits(max_waiting=100)) as engine:
        outcomes = list(answer_rows(engine, rows, Pictures(ROOT, False), Asking(Settings(max_new_tokens=3))))
    assert [isinstance(result, Problem) for _, result in outcomes] == [False, True, False]


def test_a_second_run_on_one_output_is_refused_before_it_loads_anything(door, monkeypatch):
    source = write_lines("in.jsonl", *questions(3))
    Path("link.jsonl").symlink_to("out.jsonl")
    monkeypatch.setattr(runs, "answer_file", lambda *arguments: pytest.fail("it went on"))
    with locked(Path("out.jsonl").absolute()):
        for output in ("out.jsonl", "link.jsonl", Path("out.jsonl").absolute()):
            code, _, said = door(source, output)
            assert code == 2 and len(said.splitlines()) == 1
            assert "another run writes" in said


def test_a_lock_ends_with_its_process_however_that_ends(door):
    source = write_lines("in.jsonl", *questions(2))
    code = """
import pathlib
from visualglm_tools.output_files import locked

with locked(pathlib.Path("out.jsonl")):
    print(flush=True)
    input()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    with holder:
        assert holder.stdout.read(1)
        assert door(source, "out.jsonl")[0] == 2
        holder.send_signal(signal.SIGKILL)
    assert Path("out.jsonl.lock").exists()
    assert door(source, "out.jsonl")[0] == 0
    assert not Path("out.jsonl.lock").exists()


def test_a_lock_that_its_owner_removed_in_the_same_moment_is_not_taken_for_one(tmp_path, monkeypatch):
    lock, name, locks = output_files.lock, tmp_path / "out.jsonl.lock", []

    def lock_too_late(file, path):
        lock(file, path)
        if not locks:
            name.unlink()
        locks.append(file)

    monkeypatch.setattr(output_files, "lock", lock_too_late)
    with locked(tmp_path / "out.jsonl"):
        assert len(locks) == 2
        assert os.path.samestat(os.fstat(locks[1].fileno()), name.stat())
    assert list(tmp_path.iterdir()) == []


def test_what_is_reported_was_counted_in_the_file(door, monkeypatch):
    source = write_lines("in.jsonl", *questions(9))
    draw, drawn = runs.draw, []

    def draw_and_disturb(progress, result):
        draw(progress, result)
        drawn.append(progress)
        if len(drawn) == 5:
            os.truncate("out.jsonl", 0)

    monkeypatch.setattr(runs, "draw", draw_and_disturb)
    code, _, said = door(source, "out.jsonl")
    assert code == 1
    assert "4 of 9 rows are answered." in said and "5 answers were taken out" in said
    code, _, said = door(source, "out.jsonl")
    assert code == 0 and "9 of 9 rows are answered." in said and "/5 " in said
    assert [row["id"] for row in read_lines("out.jsonl")] == list(range(9))


def test_a_link_stays_a_link_and_its_target_is_written(door):
    source = write_lines("in.jsonl", *questions(2))
    Path("elsewhere").mkdir()
    for link, target in (("out.jsonl", "elsewhere/answers.jsonl"), ("again.jsonl", "out.jsonl")):
        Path(link).symlink_to(target)
    for _ in range(2):
        assert door(source, "again.jsonl")[0] == 0
        assert Path("again.jsonl").is_symlink() and Path("out.jsonl").is_symlink()
        assert len(read_lines("elsewhere/answers.jsonl")) == 2
    assert [path.name for path in Path("elsewhere").iterdir()] == ["answers.jsonl"]


def test_permissions_of_an_output_stay(door):
    source, output = write_lines("in.jsonl", *questions(2)), Path("out.jsonl")
    output.touch(0o640)
    assert door(source, output)[0] == 0
    assert output.stat().st_mode & 0o777 == 0o640


def test_devices_and_pipes_are_written_to_and_stay_what_they_are(door):
    source = write_lines("in.jsonl", *questions(2), b"7\n")
    null = os.stat(os.devnull)
    code, _, said = door(source, os.devnull)
    assert code == 1 and "2 of 3 rows are answered." in said and "named above" in said
    assert os.path.samestat(null, os.stat(os.devnull))
    os.mkfifo("pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_bytes()))
    reader.start()
    assert door(source, "pipe")[0] == 1
    reader.join(10)
    assert [json.loads(line)["id"] for line in received[0].splitlines()] == [0, 1]
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "pipe"]


def test_standard_input_and_output_are_used_and_nothing_else_is_on_it(door, monkeypatch):
    write_lines("in.jsonl", *questions(3))
    before = os.dup(0)
    with open("in.jsonl", "rb") as file:
        os.dup2(file.fileno(), 0)
    try:
        code, shown, said = door("-", "-")
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert code == 0
    assert [json.loads(line)["id"] for line in shown.splitlines()] == [0, 1, 2]
    assert "3 of 3 rows are answered." in said
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


def test_a_reader_that_has_gone_is_one_line(tmp_path):
    command = [sys.executable, str(DOOR), "-", "-", "--device", "cpu", "--model", str(TINY), "--max-new-tokens", "3"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        process.stdin.write(GOOD)
        process.stdin.close()
        said = process.stderr.read().decode()
    assert process.returncode == 2
    assert "Traceback" not in said and "Exception" not in said
    assert said.splitlines()[-1].startswith("error: Broken pipe")


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("in.jsonl", "in.jsonl", "another file"),
        ("in.jsonl", "link.jsonl", "another file"),
        ("in.jsonl", "second name.jsonl", "another file"),
        ("out.jsonl.errors.jsonl", "out.jsonl", "another file"),
        ("out.jsonl.part3", "out.jsonl", "another file"),
        ("in.jsonl", "folder", "folder or a device"),
        ("in.jsonl", "", "folder or a device"),
        ("in.jsonl", "folder/no/out.jsonl", "no folder"),
        ("in.jsonl", "in.jsonl/out.jsonl", "no folder"),
        ("in.jsonl", "x" * 250, "File name too long"),
        ("in.jsonl", "circle", "Too many levels"),
        ("in.jsonl", "taken", "no file but a folder"),
        ("folder", "out.jsonl", "is a folder. Give a file"),
        ("nowhere.jsonl", "out.jsonl", "No such file"),
        ("in.jsonl", "config.json", "line 1: no answer"),
        ("in.jsonl", "picture.png", "line 1: no answer"),
    ],
)
def test_paths_that_do_not_go_together_are_one_line_and_nothing_is_touched(source, output, message, door, monkeypatch):
    write_lines("in.jsonl", *questions(1))
    Path("link.jsonl").symlink_to("in.jsonl")
    Path("circle").symlink_to("circle")
    os.link("in.jsonl", "second name.jsonl")
    write_lines("out.jsonl.errors.jsonl", *questions(1))
    write_lines("out.jsonl.part3", *questions(1))
    write_lines("config.json", b'{"model_type": "chatglm"}')
    write_lines("picture.png", b"\x89PNG\r\n\x1a\x00")
    Path("folder").mkdir()
    Path("taken.errors.jsonl").mkdir()
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("it went on"))
    code, _, said = door(source, output)
    assert code == 2 and len(said.splitlines()) == 1 and message in said
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_several_processes_share_neither_standard_input_nor_a_stream(door, monkeypatch):
    write_lines("in.jsonl", *questions(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options in (("-", "out.jsonl"), ("in.jsonl", "-"), ("in.jsonl", os.devnull), ("/dev/stdin", "out.jsonl")):
        code, _, said = door(*options)
        assert code == 2 and "several processes" in said


def test_a_full_disk_is_one_line_and_what_is_written_is_gone_on_from(door):
    source = write_lines("in.jsonl", *({**row, "mine": "x" * 1000} for row in questions(5)))
    code, _, said = door(source, "/dev/full")
    assert code == 2 and said.splitlines()[-1].startswith("error: No space left on device")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, limits[1]))
    try:
        code, _, said = door(source, "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: File too large")
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.errors.jsonl"]
    code, _, said = door(source, "out.jsonl")
    assert code == 0 and "/2 " in said
    assert [row["id"] for row in read_lines("out.jsonl")] == list(range(5))


def test_a_folder_that_takes_no_files_is_one_line(door, monkeypatch):
    def refuse(file, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(file))

    source = write_lines("in.jsonl", *questions(1))
    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root
    code, _, said = door(source, "out.jsonl")
    assert code == 2 and said.startswith("error: Permission denied: '")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_many_are_there_and_goes_on(number, expected, door, monkeypatch):
    source, handler = write_lines("in.jsonl", *questions(60)), signal.getsignal(signal.SIGTERM)
    draw, drawn = runs.draw, []

    def draw_and_stop(progress, result):
        draw(progress, result)
        drawn.append(progress)
        if len(drawn) == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "draw", draw_and_stop)
        code, _, said = door(source, "out.jsonl")
    there = len(read_lines("out.jsonl"))
    assert code == expected and 3 <= there < 60
    assert f"Stopped: {there} of 60 rows are answered. The same command goes on from here." in said
    assert signal.getsignal(signal.SIGTERM) == handler
    code, _, said = door(source, "out.jsonl")
    assert code == 0 and f"/{60 - there} " in said


def test_killed_at_any_byte_a_run_goes_on_with_all_that_was_complete(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ['{"id": 1, "text": "你"}', '{"text":"a","id":"二"}']
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    rows, _ = read_rows(source)
    written = "".join(f'{line[:-1]}, "answer": "好"}}\n' for line in lines).encode()
    ends = [place for place in range(len(written)) if written[place : place + 1] == b"\n"]
    for length in range(len(written) + 1):
        output.write_bytes(written[:length])
        Output(output, rows).start([])
        complete = [end for end in ends if end <= length]  # its line end may be missing
        assert output.read_bytes() == written[: complete[-1] + 1 if complete else 0]


def test_an_answer_to_a_question_that_has_changed_is_asked_for_again(door):
    source = write_lines("in.jsonl", *questions(4))
    assert door(source, "out.jsonl")[0] == 0
    rows = questions(4)
    rows[1]["text"], rows[2]["image"], rows[3]["mine"] = "What is it?", str(PICTURES[0]), 7
    code, _, said = door(write_lines("in.jsonl", *rows), "out.jsonl")
    assert code == 0 and "2 rows have changed since they were answered" in said and "/2 " in said
    assert [(row["text"], row.get("image")) for row in read_lines("out.jsonl")] == [
        (row["text"], row.get("image")) for row in rows
    ]


def test_an_answer_whose_row_was_spoiled_later_stays_until_the_row_is_right_again(door):
    assert door(write_lines("in.jsonl", *questions(3)), "out.jsonl")[0] == 0
    before = Path("out.jsonl").read_bytes()
    spoiled = write_lines("in.jsonl", questions(3)[0], b"{typo\n", questions(3)[2])
    code, _, said = door(spoiled, "out.jsonl")
    assert code == 1 and "2 of 3 rows are answered." in said
    assert sorted(read_lines("out.jsonl"), key=lambda row: row["id"]) == [
        json.loads(line) for line in before.splitlines()
    ]
    assert door(write_lines("in.jsonl", *questions(3)), "out.jsonl")[0] == 0
    assert Path("out.jsonl").read_bytes() == before
    code, _, said = door(write_lines("in.jsonl", questions(3)[0], b"{typo\n"), "out.jsonl")
    assert code == 2 and "line 3: no answer to a row" in said
    assert Path("out.jsonl").read_bytes() == before


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f"


def test_no_escape_sequence_of_the_data_reaches_the_terminal_or_the_errors_file(door):
    lines = [question(id=f"{ESCAPES}{number}", **{field: ESCAPES}) for number, field in enumerate(("image", "text"))]
    lines += [
        ESCAPES.encode() + b"\n",
        question(id=ESCAPES, image=f"data:{ESCAPES},a"),
        b'{"' + ESCAPES.encode() + b'": 1}\n',
    ]
    source = write_lines("in.jsonl", *lines)
    Path(ESCAPES).mkdir()
    _, _, said = door(source, "out.jsonl")
    assert "title" in said
    listed = Path("out.jsonl.errors.jsonl").read_text(encoding="utf-8")
    for text in (said, listed, door(source, ESCAPES)[2]):
        assert not set("\x1b\x07\x9b\x7f") & set(text)


@pytest.mark.parametrize("command", ["merge", "convert", "quantize", "serve", "web"])
def test_errors_of_other_commands_are_clean_too(command, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [ESCAPES], "model_type": ESCAPES}))
    arguments = {
        "merge": [tmp_path, tmp_path / ESCAPES, tmp_path / "new"],
        "convert": [tmp_path / ESCAPES, tmp_path / "new"],
        "quantize": [tmp_path / ESCAPES, tmp_path / "new", "--bits", "4"],
    }.get(command, ["--model", tmp_path / ESCAPES])
    assert main([command, *map(str, arguments)]) == 2
    assert not set("\x1b\x07\x9b\x7f") & set(capsys.readouterr().err)


def test_what_training_says_of_its_rows_is_clean(capsys):
    finetune_visualglm.say(f"error: 2 bad rows\n  {ESCAPES}")
    said = capsys.readouterr().err
    assert "\n  ]0;title" in said and not set("\x1b\x07\x9b\x7f") & set(said)


def test_a_line_of_data_is_printable_and_bounded():
    assert one_line("a\x1b[31m\r\nb\ud83d\x85c") == "a[31m b c"
    assert len(one_line("x" * 10**6)) < 1100 and one_line("x" * 10**6 + " remedy").endswith("remedy")
