"""The web demo's page: what people do with it, on a phone, in a hurry, without eyes, and what strangers send to it."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.commands import SECONDS
from tests.commands import web as web_command
from tests.paths import CIRCLES, PICTURES, ROOT, STAR
from tests.picture_files import encoded
from tests.serving_helpers import EngineByHand, wait_until
from visualglm_tools.serving.engine.engine import Engine


pytest.importorskip("gradio", reason="the web demo needs gradio")
pytest.importorskip("selenium", reason="the web demo is tested through selenium")

import gradio

from tests.browser import change_of_picture, patiently
from visualglm_tools.serving.engine.prompts import OpenedPicture
from visualglm_tools.serving.page import gate as web_gate
from visualglm_tools.serving.page import page as web
from visualglm_tools.serving.page.layout import add_picture
from visualglm_tools.serving.page.uploads import LOCK, PREFIX, Uploads, own_uploads


CONTROLS = (2048, 0.4, 0.8, False, False, False)
PHONE = {"width": 390, "height": 664, "deviceScaleFactor": 1, "mobile": True}  # 844 without the browser's bars
WITHIN = """
    const {top, bottom, left, right} = arguments[0].getBoundingClientRect();
    return top >= 0 && left >= 0 && bottom <= window.innerHeight && right <= window.innerWidth && window.scrollY == 0;
"""
HAVE_NAMES = {"button", "textbox", "slider", "spinbutton", "radio", "log", "heading"}


def noise(side: int, shade: int = 0) -> bytes:
    """A picture of so many bytes and some more."""
    return encoded(Image.frombytes("L", (side, side), os.urandom(side * side - 1) + bytes([shade])), "BMP")


def form(content: bytes, head: str = 'name="files"; filename="picture.png"') -> bytes:
    return f"--edge\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n--edge--\r\n"


def send(url: str, path: str, body: bytes | None = None, headers: dict | None = None) -> tuple[int, str]:
    """Status and text of the answer."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url + path, body, headers or {}), timeout=SECONDS
        ) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def upload(url: str, content: bytes, **form_options) -> tuple[int, str]:
    content_type = {"Content-Type": "multipart/form-data; boundary=edge"}
    return send(url, "/gradio_api/upload", form(content, **form_options), content_type)


def uploaded_files() -> set[Path]:
    uploads = own_uploads()
    return {path for path, _ in uploads.newest_first()}


def change_picture(url: str, picture) -> dict:
    """What becomes of the event that a new picture makes, sent by a program."""
    config = json.loads(send(url, "/config")[1])
    body = {
        "data": [None, picture, "描述这张图片。", *CONTROLS],
        "fn_index": change_of_picture(config),
        "session_hash": os.urandom(8).hex(),
    }
    status, _ = send(url, "/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"})
    assert status == 200
    lines = send(url, f"/gradio_api/queue/data?session_hash={body['session_hash']}")[1].splitlines()
    return next(m for m in (json.loads(line[6:]) for line in lines if line) if m["msg"] == "process_completed")


def test_an_example_is_shown_wherever_the_server_was_started(page_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = json.loads(send(page_url, "/config")[1])
    [gallery] = [each["id"] for each in config["components"] if each["type"] == "dataset"]
    [number] = [each["id"] for each in config["dependencies"] if [gallery, "click"] in each["targets"]]
    body = {"data": [PICTURES.index(CIRCLES)], "fn_index": number, "session_hash": "example"}
    headers = {"Content-Type": "application/json"}
    status, answer = send(page_url, "/gradio_api/run/predict", json.dumps(body).encode(), headers)
    assert status == 200 and CIRCLES.name in answer, answer


# What is uploaded


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_every_kind_of_picture_that_is_read_can_be_uploaded(page_url, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this PIL writes no {kind}")
    status, answer = upload(page_url, encoded(Image.new("RGB", (8, 8), "red"), kind))
    assert status == 200, answer
    [path] = json.loads(answer)
    assert Path(path).is_relative_to(own_uploads().folder)


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (b"", {}),
        (b"just text " * 100, {}),
        (b"<html><script>alert(1)</script>", {}),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {}),
        (b"\x7fELF" + bytes(100), {}),
        (b"%PDF-1.7 " + bytes(100), {}),
        (b"P", {}),
        (encoded(Image.new("RGB", (8, 8))), {"head": 'name="files"'}),  # a field of the form, no file
    ],
)
def test_what_is_no_picture_is_refused_and_not_kept(page_url, content, options):
    before = uploaded_files()
    status, answer = upload(page_url, content, **options)
    assert status == 415 and "picture" in answer
    assert uploaded_files() == before


def test_a_picture_that_is_too_large_is_refused_before_it_is_read(page_url, engine):
    before = uploaded_files()
    status, answer = upload(
        page_url, encoded(Image.new("RGB", (8, 8))) + bytes(engine.limits.max_picture_bytes + 2**17)
    )
    assert status == 413 and str(engine.limits.max_picture_bytes + web_gate.MAX_FORM_BYTES) in answer
    assert uploaded_files() == before


def test_an_upload_says_how_long_it_is(page_url):
    connection = http.client.HTTPConnection(page_url.removeprefix("http://"), timeout=30)
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    connection.request("POST", "/gradio_api/upload", iter([form(noise(8))]), headers, encode_chunked=True)
    assert connection.getresponse().status == 411


def test_uploads_never_fill_the_disk_and_the_newest_stay(page_url, monkeypatch):
    uploads = own_uploads()
    monkeypatch.setattr(uploads, "max_bytes", 10**6)
    monkeypatch.setattr(uploads, "max_files", 8)
    paths = [Path(json.loads(upload(page_url, noise(500, shade))[1])[0]) for shade in range(6)]
    wait_until(lambda: [path.exists() for path in paths] == [False] * 3 + [True] * 3)
    paths = [Path(json.loads(upload(page_url, noise(10, shade))[1])[0]) for shade in range(20)]
    wait_until(lambda: [path.exists() for path in paths] == [False] * 12 + [True] * 8)
    assert all(path.exists() for path in uploads.ours)  # the examples
    assert all(any(folder.iterdir()) for folder in uploads.folder.iterdir() if folder.is_dir())


def test_uploads_that_never_come_make_room_for_others(page_url, monkeypatch):
    monkeypatch.setattr(web_gate, "MAX_ARRIVING", 2)
    stalled = [http.client.HTTPConnection(page_url.removeprefix("http://"), timeout=30) for _ in range(2)]
    body = form(noise(200))
    for connection in stalled:
        connection.putrequest("POST", "/gradio_api/upload")
        connection.putheader("Content-Type", "multipart/form-data; boundary=edge")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[: len(body) // 2])
    assert [upload(page_url, noise(10, shade))[0] for shade in range(3)] == [200] * 3
    for connection in stalled:
        connection.send(body[len(body) // 2 :])
    assert 408 in [connection.getresponse().status for connection in stalled]


def test_the_picture_of_a_chat_that_is_cleared_or_gets_another_is_deleted(tmp_path):
    uploads = Uploads()
    engine = EngineByHand()
    engine.decode_picture = lambda data, name, **looking: OpenedPicture(Image.new("RGB", (4, 4)))
    handlers, session = web.Handlers(engine), web.Session()

    def come(name: str):
        path = uploads.folder / name
        path.write_bytes(name.encode())
        return uploads.find(str(path))

    async def choose(picture):
        updates = handlers.change_picture(session, picture, "?", *CONTROLS)
        assert [await anext(updates) for _ in range(3)][-1][-1]["content"] == "one"

    first, second, third = (come(name) for name in ("first", "second", "third"))
    asyncio.run(choose(first))
    assert first.path.exists()
    asyncio.run(choose(second))
    assert not first.path.exists()
    os.utime(come("second").path, ns=(0, 1))  # another tab has sent the same picture since
    asyncio.run(choose(third))
    assert second.path.exists()
    asyncio.run(handlers.clear(session))
    assert not third.path.exists()
    uploads.close()


def test_a_picture_is_not_needed_again_when_it_has_been_asked_about(page_url, engine):
    uploads, session, handlers = own_uploads(), web.Session(), web.Handlers(engine)
    [path] = json.loads(upload(page_url, STAR.read_bytes())[1])

    async def last(updates):
        return [update async for update in updates][-1]

    asyncio.run(last(handlers.change_picture(session, uploads.find(path), "Describe the image.", *CONTROLS)))
    Path(path).unlink()
    assert session.picture.image.size == (224, 224)  # of which a server can keep many
    chat, unanswered = asyncio.run(last(handlers.ask(session, "图片的背景是什么？", (), *CONTROLS)))
    assert "夜" in chat[-1]["content"] and unanswered != "图片的背景是什么？"


def test_the_page_zooms_and_shows_where_the_model_looked_for_the_last_answer(page_url, engine, small_star):
    uploads, session, handlers = own_uploads(), web.Session(), web.Handlers(engine)
    [path] = json.loads(upload(page_url, encoded(small_star, "PNG"))[1])

    async def last(updates):
        return [update async for update in updates][-1]

    def ask(question: str, zoom: bool, is_shown: bool) -> tuple[str, str]:
        chat, _ = asyncio.run(last(handlers.ask(session, question, (), 2048, 0.4, 0, False, zoom, is_shown)))
        return chat[-1]["content"], asyncio.run(handlers.show_look(session))

    asyncio.run(last(handlers.change_picture(session, uploads.find(path), "Describe the image.", *CONTROLS)))
    answer, look = ask("What color is it?", True, True)
    assert answer == "White." and look.startswith("<figure>") and "White." in look
    answer, look = ask("And the shape?", True, False)
    assert (answer, look) == ("A star.", "")
    assert "<figure>" in ask("What shape is it?", False, True)[1]
    asyncio.run(handlers.clear(session))
    assert asyncio.run(handlers.show_look(session)) == ""


def test_pictures_that_take_long_hold_up_no_question_and_too_many_are_refused_in_words(monkeypatch):
    said, are_opened = [], threading.Event()
    monkeypatch.setattr(web.gr, "Warning", lambda message, **kwargs: said.append(message))
    engine = EngineByHand()
    opened = OpenedPicture(Image.new("RGB", (4, 4)))
    engine.decode_picture = lambda data, name, **looking: are_opened.wait(2 * SECONDS) and opened
    handlers = web.Handlers(engine)

    async def choose():
        session, upload = web.Session(), SimpleNamespace(read=bytes, path=Path("a.png"))
        async for _ in handlers.change_picture(session, upload, "?", *CONTROLS):
            session.stop()

    async def flood():
        flood = [asyncio.create_task(choose()) for _ in range(web.MAX_OPENING)]
        await asyncio.sleep(0.1)
        await asyncio.wait_for(choose(), SECONDS)
        updates = handlers.ask(web.Session(), "Hello", (), *CONTROLS)
        assert [await asyncio.wait_for(anext(updates), SECONDS) for _ in range(2)][1][0][-1]["content"] == "one"
        are_opened.set()
        await asyncio.gather(*flood)

    try:
        asyncio.run(flood())
    finally:
        are_opened.set()
    assert said == [f"{web.MAX_OPENING} requests are waiting already. Try again in {web.OPENING_SECONDS} s."]


# Where uploads lie when the server has ended

HOLD = "from visualglm_tools.serving.page.uploads import own_uploads; print(own_uploads().folder, flush=True); input()"


@pytest.fixture
def start_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    processes = []

    def start() -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        folder = Path(process.stdout.readline().strip())
        (folder / "picture.png").write_bytes(b"a picture")
        return process, folder

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_killed_servers_pictures_are_removed_by_the_next_and_nobody_elses(start_process, tmp_path):
    (killed, left), (_, in_use) = start_process(), start_process()
    (foreign := tmp_path / f"{PREFIX}notes").mkdir()
    (foreign / "mine.txt").write_text("not an upload")
    assert left.stat().st_mode & 0o077 == 0
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (left / LOCK).exists()
    next_one, folder = start_process()
    assert not left.exists()
    assert (in_use / "picture.png").exists() and (foreign / "mine.txt").exists()
    next_one.communicate("\n", timeout=SECONDS)
    assert not folder.exists()


# What strangers send


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        f"file={CIRCLES}",
        "file=http://example.org/picture.png",
        "file=https://127.0.0.1/",
        "file/etc/passwd",
        "proxy=http://example.org/",
        "process_recording",
        "component_server",
        "call/predict",
        "api/predict",
        "deep_link",
        "stream/abc",
        "vibe-edit",
        "runs",
        "openapi.json",
        "custom_component/a/b/c/d",
    ],
)
def test_what_the_page_does_not_ask_for_is_not_there(page_url, path):
    assert send(page_url, f"/gradio_api/{path}")[0] == 404
    assert send(page_url, f"/gradio_api/{path}", b"{}", {"Content-Type": "application/json"})[0] == 404


@pytest.mark.parametrize("path", ["/docs", "/monitoring", "/login", "/logout", "/etc/passwd", "/static/../config.py"])
def test_only_the_page_is_served(page_url, path):
    assert send(page_url, path)[0] in (403, 404)


def test_a_file_beside_the_uploads_is_not_served(page_url):
    folder = own_uploads().folder
    (beside := Path(f"{folder}-beside.png")).write_bytes(noise(8))
    try:
        assert send(page_url, f"/gradio_api/file={beside}")[0] == 404
        assert send(page_url, f"/gradio_api/file={folder}/../{beside.name}")[0] == 404
    finally:
        beside.unlink()


def to_name(url: str, name: str) -> str:
    return name.replace("PORT", url.rpartition(":")[2])


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:PORT", None, 200),
        ("127.0.0.1:PORT", "http://127.0.0.1:PORT", 200),
        ("localhost:PORT", "http://localhost:PORT", 200),
        ("[::1]:PORT", "http://[::1]:PORT", 200),
        ("127.0.0.1:PORT", "http://example.org", 403),
        ("127.0.0.1:PORT", "http://127.0.0.1:1", 403),  # another server of this machine
        ("127.0.0.1:PORT", "http://127.0.0.1:PORT.example.org", 403),
        ("127.0.0.1:PORT", "null", 403),  # a page in a frame that hides where it is from
        ("127.0.0.1:PORT", "", 403),
        ("example.org:PORT", "http://example.org:PORT", 403),  # a stranger's name that leads to this machine
        ("localhost.example.org", None, 403),
    ],
)
@pytest.mark.parametrize("path", ["/config", "/gradio_api/queue/join"])
def test_pages_of_others_do_not_reach_the_server(page_url, path, host, origin, status):
    headers = {"Host": to_name(page_url, host), **({} if origin is None else {"Origin": to_name(page_url, origin)})}
    if path == "/config":
        assert send(page_url, path, headers=headers)[0] == status
    else:  # as a page sends it without asking first; what is let in, gradio refuses by its content
        found = send(page_url, path, b"{}", {"Content-Type": "text/plain", **headers})[0]
        assert found == status or status == 200 and found in (400, 422)


FILE = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "picture",
    [
        {"path": "/etc/passwd", "is_stream": True, **FILE},
        {"path": "../../../../etc/passwd", **FILE},
        {"path": str(CIRCLES)},
        {"path": "", "url": f"file://{CIRCLES}", **FILE},
        {"path": "FOLDER", **FILE},
        {"path": "FOLDER/no/such.png", **FILE},
        {"path": f"FOLDER/../{'../' * 9}{CIRCLES}", **FILE},
        {"path": "FOLDER/\0.png", **FILE},
        {"path": None, "url": "data:image/png;base64,AAAA"},
        {"url": "http://127.0.0.1/", **FILE},
        {"path": ["FOLDER"], **FILE},
        {"path": "x" * 100_000, **FILE},
        "/etc/passwd",
        ["/etc/passwd"],
        7,
    ],
)
def test_no_hand_made_picture_opens_a_file(page_url, picture):
    if isinstance(picture, dict) and isinstance(picture.get("path"), str):
        picture = {**picture, "path": picture["path"].replace("FOLDER", str(own_uploads().folder))}
    assert change_picture(page_url, picture)["success"] is False
    assert send(page_url, "/")[0] == 200


def test_gradio_is_given_uploads_alone_to_delete_in_the_end():
    uploads = own_uploads()
    with gradio.Blocks():
        picture = add_picture(uploads)
    for path in (uploads.folder, uploads.folder / "none.png", uploads.folder / LOCK, CIRCLES):
        with pytest.raises(gradio.Error, match="is not here"):
            asyncio.run(picture.async_move_resource_to_block_cache(str(path)))
    assert not picture.temp_files


@pytest.mark.parametrize("question", ["a" * 5_000_000, [[]] * 100_000, [{}] * 100_000], ids=["text", "[]", "{}"])
def test_a_question_that_would_keep_the_server_busy_is_refused_in_words(page_url, question):
    body = json.dumps({"data": [None, question], "fn_index": 0, "session_hash": "a"}).encode()
    status, answer = send(page_url, "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    assert status == 413 and "shorter" in json.loads(answer)["detail"].lower()


def test_a_question_of_many_thousand_characters_is_refused_in_words(engine, monkeypatch):
    said = []
    monkeypatch.setattr(web.gr, "Warning", lambda message, **kwargs: said.append(message))
    monkeypatch.setattr(engine, "prepare", lambda messages: pytest.fail("it was tokenized"))
    question = "图" * (web.MAX_CHARACTERS + 1)

    async def updates():
        return [update async for update in web.Handlers(engine).ask(web.Session(), question, (), *CONTROLS)]

    assert asyncio.run(updates())[-1] == ([], question)
    assert len(said) == 1 and str(len(question)) in said[0] and "Shorten it" in said[0]


# What people do


@pytest.mark.parametrize("action", ["ask", "retry"])
def test_a_conversation_that_the_server_has_forgotten_is_not_gone_on_with(action, monkeypatch):
    said = []
    monkeypatch.setattr(web.gr, "Warning", lambda message, **kwargs: said.append(message))
    question = ("And the sky?",) if action == "ask" else ()
    shown = [{"role": "user", "content": "Describe the image."}, {"role": "assistant", "content": "A star."}]

    async def updates():
        handlers = web.Handlers(SimpleNamespace())  # which answers nothing
        return [update async for update in getattr(handlers, action)(web.Session(), *question, shown, *CONTROLS)]

    [update] = asyncio.run(updates())
    assert update == ((gradio.skip(), *question) if question else gradio.skip())  # what is shown stays
    assert len(said) == 1 and "choose the picture again" in said[0]


def test_on_a_phone_an_answer_is_seen_without_scrolling(open_tab):
    tab = open_tab("en")
    tab.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        tab.upload(CIRCLES)
        tab.wait_for("Describe the image.", "circles")
        for selector in ("#picture img", "#chat [data-testid=bot]", "#question textarea", "#submit", "#clear"):
            wait_until(lambda s=selector: tab.browser.execute_script(WITHIN, tab.find(s)[-1]))
        tab.ask("What colour are the shapes?")
        tab.wait_for("Describe the image.", "circles", "What colour", "Red")
        wait_until(lambda: tab.browser.execute_script(WITHIN, tab.find("#chat [data-testid=bot]")[-1]))
        assert tab.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        tab.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_what_is_typed_after_enter_stays_and_so_does_a_question_that_comes_too_early(open_tab):
    tab = open_tab("en")
    slow = {"offline": False, "latency": 700, "downloadThroughput": -1, "uploadThroughput": -1}
    tab.browser.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        tab.ask("Hello")
        wait_until(lambda: tab.question == "")
        assert tab.messages == []  # the server has not heard of it yet
        tab.ask("And you?")
        tab.wait_for("Hello", "")
        assert tab.question == "And you?"
        patiently(lambda: tab.find("#question textarea")[0].send_keys(" Well?"))
    finally:
        normal = {**slow, "latency": 0}
        tab.browser.execute_cdp_cmd("Network.emulateNetworkConditions", normal)
    wait_until(lambda: tab.question == "And you? Well?")
    tab.ask("")
    tab.wait_for("Hello", "", "And you? Well?", "")
    assert tab.question == ""


def test_a_question_that_is_not_answered_comes_back_in_front_of_what_was_typed(open_tab, engine, monkeypatch):
    tab = open_tab("en")
    slow = {"offline": False, "latency": 500, "downloadThroughput": -1, "uploadThroughput": -1}
    monkeypatch.setattr(engine, "prepare", refuse)
    tab.browser.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        tab.ask("First")
        wait_until(lambda: tab.question == "")
        patiently(lambda: tab.find("#question textarea")[0].send_keys("Second"))
        wait_until(lambda: "no answer today" in tab.warnings)
    finally:
        tab.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**slow, "latency": 0})
    wait_until(lambda: tab.question == "First\nSecond")
    tab.wait_for()


def refuse(messages):
    raise ValueError("There is no answer today.")


def test_a_pasted_text_of_megabytes_is_refused_in_words_and_stays(open_tab):
    tab = open_tab("en")
    script = """
        const box = document.querySelector("#question textarea");
        box.value = "a".repeat(2_000_000);
        box.dispatchEvent(new Event("input", {bubbles: true}));
    """
    tab.browser.execute_script(script)
    tab.click("submit")
    wait_until(lambda: "too much" in tab.warnings)
    length = "return document.querySelector('#question textarea').value.length"
    wait_until(lambda: tab.browser.execute_script(length) == 2_000_000)


@pytest.mark.parametrize(("language", "box"), [("en", "Your question"), ("zh-CN", "输入问题")])
def test_everything_to_use_has_a_name_for_screen_readers_and_is_reached_by_the_keyboard(open_tab, language, box):
    tab = open_tab(language)
    wait_until(lambda: tab.find(".gallery-item img[alt]"))
    assert_named(tab, box)
    tab.click_example(STAR)
    tab.wait_for("", "")
    wait_until(lambda: not tab.find("#chat button:disabled"))  # questions are edited when there is an answer
    assert_named(tab, box)
    assert tab.find("#picture img")[0].get_attribute("alt") == "yellow star at night"


def assert_named(tab, box: str) -> None:
    nodes = [
        node
        for node in tab.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        if node.get("role", {}).get("value") in HAVE_NAMES
    ]
    names = [(node["role"]["value"], node["name"]["value"]) for node in nodes]
    assert [name for role, name in names if role == "textbox"] == [box]
    assert [name for name in names if not name[1] or "__" in name[1]] == []
    unreachable = [
        node["name"]["value"]
        for node in nodes
        if node["role"]["value"] not in ("log", "heading")
        and not any(each["name"] == "focusable" for each in node["properties"])
    ]
    assert unreachable == []


@pytest.mark.parametrize(
    ("language", "question"),
    [
        ("en-GB", "Describe the image."),
        ("fr", "Describe the image."),
        ("zh-TW", "描述这张图片。"),
        ("zh", "描述这张图片。"),
    ],
)
def test_the_first_question_is_asked_in_the_browsers_language(open_tab, language, question):
    tab = open_tab(language)
    tab.click_example(CIRCLES)
    tab.wait_for(question, "")


def test_a_missing_package_is_said_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("visualglm_tools.serving.page.uploads.own_uploads", lambda: None)
    monkeypatch.setattr(Engine, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert web_command("--port", 0) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "error: gradio is missing: pip install 'visualglm-hf[web]'\n" in capsys.readouterr().err
