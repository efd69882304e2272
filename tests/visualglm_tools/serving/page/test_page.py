"""The web demo in a real browser."""

import asyncio
import functools
import json
import socket
import threading
import time
import urllib.request

import pytest

from tests.commands import SECONDS, script
from tests.commands import web as web_command
from tests.paths import CIRCLES, ROOT, STAR, TINY
from tests.serving_helpers import CAPTION, EngineByHand, is_idle, open_door, sample, wait_until
from visualglm_tools.serving.engine.answers import QueueFull
from visualglm_tools.serving.engine.batching import Row
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.prompt_cache import PromptCache
from visualglm_tools.serving.engine.sampling import Settings


pytest.importorskip("gradio", reason="the web demo needs gradio")
pytest.importorskip("selenium", reason="the web demo is tested through selenium")

from tests.browser import Tab, change_of_picture, patiently
from visualglm_tools.serving.page import page as web


# Its first pictures are black.
WEBCAM_SHOWS = "return [...document.querySelectorAll('#picture video')].some(each => each.currentTime > 0.5)"


@pytest.fixture
def long_answers(monkeypatch):
    """Each answer takes minutes: whoever stops one does so before its end, on a busy machine too.

    After `monkeypatch.undo()` new answers have their usual length; those on their way keep theirs.
    """
    accept = Row.accept

    def accept_slowly(row: Row, token_id: int) -> None:
        time.sleep(0.1)
        accept(row, token_id)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Row, "accept", accept_slowly)
        monkeypatch.setattr(web, "Settings", functools.partial(Settings, min_new_tokens=1500))
        yield


def cancelled(engine: Engine) -> int:
    """How many answers were ended before their end."""
    return int(sample(engine, "requests_total", outcome="cancelled"))


def test_a_conversation_through_the_door(browser, tmp_path, monkeypatch):
    """Upload a picture, read how it is described, ask on, clear: with the README's command. Nothing of it stays."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [command] = [line for line in readme.splitlines() if line.startswith("visualglm web")]
    options = command.replace("path/to/prepared", str(TINY)).split()[2:]
    with open_door(*options, script="web_demo_hf.py") as (url, process, log):
        tab = Tab(browser, url)
        tab.upload(CIRCLES)
        tab.wait_for("描述这张图片。", CAPTION)
        seen = tab.seen
        assert all(seen[-1].startswith(text) for text in seen if "%" not in text)  # a slow machine shows a bar first
        tab.ask("What colour are the shapes?")
        tab.wait_for("描述这张图片。", "红色", "What colour are the shapes?", "Red")
        tab.click("clear")
        tab.wait_for()
        wait_until(lambda: tab.find("#picture input[type=file]"))
        tab.ask("Hello")
        tab.wait_for("Hello", "")
        tab.close()
        assert "Traceback" not in log.read_text()
        assert [path for path in tmp_path.glob("visualglm-web-*/*/*") if path.name == CIRCLES.name]
        process.terminate()
        assert process.wait(SECONDS) == 0
        assert list(tmp_path.iterdir()) == []


def test_tabs_share_nothing_but_the_engine(open_tab):
    first = open_tab()
    first.upload(CIRCLES)
    first.wait_for("描述", "红色")
    second = open_tab()
    assert second.messages == []
    second.upload(STAR)
    second.wait_for("描述", "黄色")
    first.focus()
    first.ask("图片的背景是什么？")
    first.wait_for("描述", "红色", "背景", "草地")
    second.focus()
    second.ask("图片的背景是什么？")
    second.wait_for("描述", "黄色", "背景", "夜")


def test_another_picture_begins_a_new_conversation_in_the_language_that_was_chosen(open_tab):
    tab = open_tab()
    tab.upload(CIRCLES)
    tab.wait_for("描述", "红色")
    patiently(lambda: tab.find("input[type=radio]")[1].click())
    tab.upload(STAR)
    tab.wait_for("Describe the image.", "yellow star")


def test_an_example_and_the_webcam_are_pictures_too(open_tab):
    tab = open_tab("en")
    tab.click_example(STAR)
    tab.wait_for("Describe", "yellow")
    tab.click("clear")
    tab.wait_for()
    tab.click_labelled("Capture from camera")
    tab.click_labelled("Click to Access Webcam")
    wait_until(lambda: tab.browser.execute_script(WEBCAM_SHOWS))
    tab.click_labelled("capture photo")
    tab.wait_for("Describe", "green")


def test_a_picture_can_be_pasted(open_tab):
    tab = open_tab("en")
    tab.copy(STAR)
    tab.click_labelled("Paste from clipboard")
    tab.wait_for("Describe", "yellow")
    tab.ask("图片的背景是什么？")
    tab.wait_for("Describe", "yellow", "背景", "夜")


def test_texts_are_shown_as_they_are(open_tab):
    tab = open_tab()
    question = "**bold** <img src=nowhere.png onerror=alert(1)> $$x$$ &amp; [a](http://example.org) ![b](nowhere.png)"
    tab.ask(question)
    tab.wait_for(question, "")
    assert not tab.find("#chat [data-testid=user] :is(img, a, strong, math)")


def test_stop_keeps_what_was_said_and_retry_answers_again(open_tab, engine, long_answers, monkeypatch):
    tab = open_tab()
    tab.upload(CIRCLES)
    wait_until(lambda: len(tab.seen) > 3 and len(tab.seen[-1]) > 30)
    before = cancelled(engine)
    tab.click("stop")
    wait_until(lambda: cancelled(engine) == before + 1)
    time.sleep(0.5)  # nobody clicks sooner
    first = tab.messages[1]
    assert first.startswith(CAPTION)
    monkeypatch.undo()
    tab.click("retry")
    wait_until(lambda: tab.messages == ["描述这张图片。", CAPTION])


def test_while_a_long_prompt_is_read_a_bar_says_how_far_it_is(open_tab, engine, monkeypatch):
    monkeypatch.setattr(web, "PATIENCE", 0.1)
    monkeypatch.setattr(engine, "_known", PromptCache(0))  # or it would not be read again
    layers = engine.model.get_decoder().layers
    hooks = [layer.register_forward_pre_hook(lambda *_: time.sleep(0.3)) for layer in layers]
    tab = open_tab()
    try:
        tab.upload(CIRCLES)
        wait_until(lambda: any("50%" in text for text in tab.seen))
    finally:
        for hook in hooks:
            hook.remove()
    tab.wait_for("描述这张图片。", CAPTION)
    bars = [text for text in tab.seen if "%" in text]
    assert bars == sorted(bars, key=lambda text: text.count("█")) and len(bars) > 1
    assert "%" not in "".join(tab.messages)


def test_a_prompt_that_is_read_at_once_has_no_bar(open_tab, monkeypatch):
    monkeypatch.setattr(web, "PATIENCE", 600)
    tab = open_tab()
    tab.upload(CIRCLES)
    tab.wait_for("描述这张图片。", CAPTION)
    assert not any("%" in text for text in tab.seen)


def test_only_one_thread_changes_a_conversation(open_tab, monkeypatch):
    threads = {}

    def record(name: str) -> None:
        method = getattr(web.Session, name)

        def recorded(session, *arguments):
            threads.setdefault(name, set()).add(threading.get_ident())
            return method(session, *arguments)

        monkeypatch.setattr(web.Session, name, recorded)

    for name in ("begin", "settle", "stop"):
        record(name)
    tab = open_tab()
    tab.ask("Hello")
    tab.wait_for("Hello", "")
    tab.click("stop")
    tab.click("clear")
    tab.wait_for()
    wait_until(lambda: threads.keys() == {"begin", "settle", "stop"})
    assert len(set.union(*threads.values())) == 1


@pytest.mark.parametrize("action", ["clear", "retry", "change_picture"])
def test_an_answer_draws_nothing_over_what_was_begun_after_it(action):
    controls = (2048, 0.4, 0.8, False, False, False)
    arguments = {"clear": (), "retry": ((), *controls), "change_picture": (b"", "?", *controls)}[action]

    async def act_during_the_answer():
        handlers, session = web.Handlers(EngineByHand()), web.Session()
        updates = handlers.ask(session, "Hello", (), *controls)
        assert [await anext(updates), await anext(updates)][1][0][-1]["content"] == "one"
        begun = getattr(handlers, action)(session, *arguments)
        await (begun if action == "clear" else anext(begun))
        return [update async for update in updates]

    assert asyncio.run(act_during_the_answer()) == []


def test_clear_and_a_new_picture_end_the_answer_on_its_way(open_tab, engine, long_answers, monkeypatch):
    tab = open_tab()
    tab.upload(CIRCLES)
    wait_until(lambda: len(tab.seen) > 3)
    before = cancelled(engine)
    tab.click("clear")
    wait_until(lambda: cancelled(engine) == before + 1 and is_idle(engine))
    tab.wait_for()
    tab.upload(CIRCLES)
    wait_until(lambda: not is_idle(engine))
    monkeypatch.undo()
    tab.upload(STAR)
    tab.wait_for("描述", "黄色")
    assert cancelled(engine) == before + 2


def test_closing_the_tab_ends_its_answer(open_tab, engine, long_answers):
    tab = open_tab()
    tab.upload(CIRCLES)
    wait_until(lambda: len(tab.seen) > 3)
    before = cancelled(engine)
    tab.close()
    wait_until(lambda: cancelled(engine) == before + 1)


def test_what_cannot_be_used_is_one_message_and_nothing_is_lost(open_tab, tmp_path):
    no_picture = tmp_path / "broken.png"
    no_picture.write_bytes(b"\x89PNG, but not really")
    tab = open_tab()
    tab.upload(no_picture)
    wait_until(lambda: "picture" in tab.warnings.lower())
    tab.wait_for()
    tab.remove_picture()
    question = "a b c d " * 700 + "?"
    tab.browser.execute_script(
        "const box = document.querySelector('#question textarea'); box.value = arguments[0];"
        "box.dispatchEvent(new Event('input', {bubbles: true}))",
        question,
    )
    tab.click("submit")
    wait_until(lambda: "Shorten it" in tab.warnings)
    wait_until(lambda: tab.question == question)
    tab.wait_for()


def test_labels_speak_the_language_of_the_browser(open_tab):
    for language, label in (("zh-CN", "清空对话"), ("en-GB", "Clear History"), ("fr", "Clear History")):
        tab = open_tab(language)
        wait_until(lambda tab=tab, label=label: patiently(lambda: tab.find("#clear")[0].text) == label)
        tab.close()


def test_the_page_asks_nobody_but_its_server(browser, open_tab):
    browser.get_log("performance")  # forget the tests before
    tab = open_tab()
    tab.ask("Hello")
    tab.wait_for("Hello", "")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert addresses
    assert {
        address for address in addresses if not address.startswith(("http://127.0.0.1:", "data:", "chrome:"))
    } == set()


@pytest.mark.parametrize("path", [str(CIRCLES), "/etc/hostname", "http://example.org/picture.png"])
def test_only_uploads_are_opened_whatever_a_program_sends(page_url, path):
    config = json.load(urllib.request.urlopen(page_url + "/config"))
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {
        "data": [None, picture, "描述这张图片。", 2048, 0.4, 0.8],
        "fn_index": change_of_picture(config),
        "session_hash": "me",
    }
    request = urllib.request.Request(
        page_url + "/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(page_url + "/gradio_api/queue/data?session_hash=me") as response:
        messages = [json.loads(line[6:]) for line in response if line.startswith(b"data: ")]
    [completed] = [message for message in messages if message["msg"] == "process_completed"]
    assert not completed["success"]


def test_a_full_queue_says_so_and_keeps_the_question(engine, monkeypatch):
    def refuse(requests=1):
        raise QueueFull(64, 7)

    said = []
    monkeypatch.setattr(engine, "check_room", refuse)
    monkeypatch.setattr(web.gr, "Warning", lambda message, **kwargs: said.append(message))

    async def ask():
        return [update async for update in web.Handlers(engine).ask(web.Session(), "Hello", (), 2048, 0.4, 0.8)]

    updates = asyncio.run(ask())
    assert updates[-1] == ([], "Hello")
    assert "64 requests are waiting already. Try again in 7 s." in said


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--model", "nowhere"), "no checkpoint in 'nowhere'"), (("--quant", "3"), "3"), (("--port", "70000"), "port")],
)
def test_the_door_refuses_wrong_options_in_one_line(options, message):
    finished = script("web_demo_hf.py", *options, code=2)
    assert message in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with open_door("--port", str(taken.getsockname()[1]), script="web_demo_hf.py") as (_, process, log):
            assert process.wait(SECONDS) == 2
            assert log.read_text().splitlines()[-1].startswith("error: cannot listen at '127.0.0.1', port ")
            assert "Loading" not in log.read_text()


@pytest.mark.parametrize("options", [(), ("--share",)])
def test_only_the_option_makes_a_public_link(monkeypatch, options):
    def launch(page, **arguments):
        launched.append(arguments)
        raise OSError("launched")

    launched = []
    monkeypatch.setattr(web.gr.Blocks, "launch", launch)
    monkeypatch.setenv("GRADIO_SHARE", "True")  # would decide if we left it to gradio
    assert web_command("--port", 0, "--model", TINY, "--device", "cpu", *options) == 2
    [arguments] = launched
    assert arguments["share"] is bool(options)
    assert arguments["server_name"] == "127.0.0.1"
