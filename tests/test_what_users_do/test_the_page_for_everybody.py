"""The web demo's page for everybody: in two languages, by keyboard, by ear, on a phone, after a reload, logged in."""

import asyncio
import gc
import threading
import zipfile
from types import SimpleNamespace

import httpx
import pytest

from tests.paths import CIRCLES, PICTURES, ROOT, STAR
from tests.serving_helpers import free_port, wait_until
from visualglm_tools.serving.engine.answers import EngineError


pytest.importorskip("gradio", reason="the web demo needs gradio")
pytest.importorskip("selenium", reason="the web demo is tested through selenium")

from tests.browser import Tab, patiently
from visualglm_tools.serving.page import accounts as web_accounts
from visualglm_tools.serving.page import page as web


AXE = ROOT / "tests/axe/node_modules/axe-core/axe.min.js"
JUDGE = """
    const [done] = arguments;
    axe.run({resultTypes: ["violations"]}).then(({violations}) => done(
        violations.filter(({impact}) => ["serious", "critical"].includes(impact))
            .map(({id, nodes}) => [id, ...nodes.map(({html}) => html.slice(0, 200))])
    ));
"""
AT_ONCE = """
    const style = document.createElement("style");
    style.textContent = "* { transition: none !important; animation: none !important }";
    document.head.append(style);
"""  # or axe would judge colours that are on their way
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
TOPS = "return arguments[0].map(each => document.querySelector(each).getBoundingClientRect().top)"
SPOKEN = "return [...document.querySelectorAll('#spoken p')].map(each => [each.lang, each.textContent])"
FOCUSED = "const found = document.activeElement; return found.id || found.closest('[id]').id"
PASTED = "navigator.clipboard.readText().then(arguments[0])"
ENTER, SHIFT, TAB, NOTHING = "\ue007", "\ue008", "\ue004", "\ue000"


def judge(tab: Tab) -> list:
    return tab.browser.execute_async_script(JUDGE)


def spoken(tab: Tab) -> list:
    return tab.browser.execute_script(SPOKEN)


def is_spoken(tab: Tab) -> bool:
    """Whether screen readers have been told the whole last answer, once."""
    text = "".join(text for _, text in spoken(tab))
    return bool(text) and "".join(text.split()) == "".join(tab.messages[-1].split())


def begin_to_edit(tab: Tab, number: int, name: str) -> None:
    """Open the box for a question, which is there when the answer is complete."""
    wait_until(lambda: not tab.find("#chat button:disabled"))
    patiently(lambda: tab.find(f"#chat button[aria-label={name}]")[number].click())
    wait_until(lambda: tab.find("#chat textarea[aria-label]"))


def is_chosen(tab: Tab, question: str) -> bool:
    return tab.browser.execute_script("return document.querySelector('#first_question :checked').value") == question


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: npm ci --prefix tests/axe")
def test_axe_finds_nothing_serious_in_light_and_in_dark_empty_and_with_a_conversation(open_tab):
    tab = open_tab()
    tab.browser.execute_script(AXE.read_text(encoding="utf-8"))
    tab.browser.execute_script(AT_ONCE)
    for is_empty in (True, False):
        if not is_empty:
            tab.upload(CIRCLES)
            tab.wait_for("描述", "红色")
            wait_until(lambda: is_spoken(tab))
            begin_to_edit(tab, 0, "编辑")
        for theme in ("light", "dark"):
            tab.browser.execute_script("document.body.classList.toggle('dark', arguments[0])", theme == "dark")
            assert judge(tab) == [], (theme, is_empty)


def test_the_language_is_switched_with_all_that_was_said_and_typed_and_stays(open_tab):
    tab = open_tab("en-GB")
    tab.upload(CIRCLES)
    tab.wait_for("Describe the image.", "circles")
    tab.ask("What colour are the shapes?")
    said = ("Describe the image.", "circles", "What colour", "Red")
    tab.wait_for(*said)
    patiently(lambda: tab.find("#show_look input")[0].click())
    patiently(lambda: tab.find("#question textarea")[0].send_keys("图片的背景"))
    tab.click("language")
    wait_until(lambda: patiently(lambda: tab.find("#clear")[0].text) == "清空对话")
    tab.wait_for(*said)
    wait_until(lambda: tab.find("#picture img") and is_chosen(tab, "描述这张图片。"))
    assert tab.browser.execute_script("return document.documentElement.lang") == "zh-CN"
    assert tab.question == "图片的背景" and patiently(lambda: tab.find("#show_look input")[0].is_selected())
    tab.ask("是什么？")  # of the same picture
    tab.wait_for(*said, "图片的背景是什么？", "草地")
    wait_until(lambda: tab.find("#look figure"))
    other = open_tab("en-GB")
    wait_until(lambda: patiently(lambda: other.find("#clear")[0].text) == "清空对话")
    assert other.messages == [] and other.question == ""


def test_what_is_typed_or_not_answered_yet_is_there_again_after_a_reload_and_in_the_next_tab(
    open_tab, engine, monkeypatch
):
    goes_on, prepare = threading.Event(), engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda messages, **looking: goes_on.wait() and prepare(messages, **looking))
    tab = open_tab("en")
    try:
        tab.ask("First")
        wait_until(lambda: tab.messages == ["First"])  # and no answer
        patiently(lambda: tab.find("#question textarea")[0].send_keys("Second"))
        tab.browser.refresh()
        wait_until(lambda: tab.find("#question textarea") and tab.question == "First\nSecond")
    finally:
        goes_on.set()
    tab.browser.get("about:blank")
    following = open_tab("en")
    wait_until(lambda: following.question == "First\nSecond")
    assert open_tab("en").question == ""  # one of them has it


def test_a_question_is_copied_and_asked_in_other_words_as_it_was_typed(open_tab):
    tab = open_tab("en")
    tab.click_example(STAR)
    tab.wait_for("Describe", "star")
    question = "What <b>shape</b> &amp; size?"
    tab.ask(question)
    tab.wait_for("Describe", "star", question, "")
    wait_until(lambda: is_spoken(tab))
    tab.allow_clipboard()
    patiently(lambda: tab.find("#chat button[aria-label='Copy message']")[2].click())
    wait_until(lambda: ["en", "Copied."] in spoken(tab))
    assert tab.browser.execute_async_script(PASTED) == question
    begin_to_edit(tab, 1, "Edit")
    box = tab.find("#chat textarea")[0]
    assert box.get_attribute("value") == question
    box.clear()
    box.send_keys("What color is it?")
    patiently(lambda: tab.find("#chat button[aria-label=Submit]")[0].click())
    tab.wait_for("Describe", "star", "What color is it?", "")


def test_enter_sends_and_shift_enter_begins_a_line_and_the_box_keeps_the_focus(open_tab):
    tab = open_tab("en")
    box = patiently(lambda: tab.find("#question textarea")[0])
    box.send_keys("What can", SHIFT + ENTER + NOTHING, "you do?")
    assert tab.question == "What can\nyou do?"
    box.send_keys(ENTER)
    tab.wait_for("What can\nyou do?", "")
    assert tab.browser.execute_script("return document.activeElement.matches('#question textarea')")
    wait_until(lambda: is_spoken(tab))
    box.send_keys("x", TAB)
    order = []
    for _ in range(5):
        order.append(tab.browser.execute_script(FOCUSED))
        tab.browser.switch_to.active_element.send_keys(TAB)
    assert order == ["submit", "stop", "retry", "clear", "export"]


def test_on_a_phone_the_conversation_and_the_question_come_before_the_settings(open_tab):
    tab = open_tab("en")
    tab.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        chat, question, settings, notes = tab.browser.execute_script(
            TOPS, ["#chat", "#question", "#settings", "#notes"]
        )
        assert chat < question < PHONE["height"] and question < settings < notes
    finally:
        tab.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_conversation_is_exported_with_its_picture(open_tab, tmp_path):
    tab = open_tab("en")
    tab.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    tab.upload(CIRCLES)
    tab.wait_for("Describe the image.", "circles")
    tab.click("export")
    wait_until((tmp_path / "visualglm.zip").exists)
    with zipfile.ZipFile(tmp_path / "visualglm.zip") as archive:
        assert archive.read("picture.png") == CIRCLES.read_bytes()
        text = archive.read("conversation.md").decode()
    assert text.startswith(
        "# VisualGLM-6B\n\n![red circles on grass](picture.png)\n\n**Question**\n\nDescribe the image\\."
    )


# Without a browser


def last(updates) -> tuple:
    """The last of what a handler of the page yields."""

    async def exhaust():
        return [update async for update in updates][-1]

    return asyncio.run(exhaust())


def texts(chat: list[dict]) -> list[str]:
    return [message["content"] for message in chat]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings that the page shows."""
    said = []
    monkeypatch.setattr(web.gr, "Warning", lambda message, **kwargs: said.append(message))
    return said


@pytest.fixture
def talk(engine):
    """The page's handlers, and a session with two turns and something that was read in its picture."""
    handlers, session = web.Handlers(engine), web.Session()
    session.number, session.told = 1, "It says 7."
    session.turns = [("Hello", "Hi."), ("Are you there?", "Yes.")]
    return handlers, session


def edit(talk, index, value) -> tuple:
    handlers, session = talk
    return last(handlers.edit(session, [{}], SimpleNamespace(index=index, value=value), 2048, 0.4, 0))


def test_an_edited_question_takes_the_place_of_all_that_came_after_it(talk):
    _, session = talk
    chat, unanswered = edit(talk, 1, " What can you do? ")
    assert texts(chat)[0] == "What can you do?" and len(chat) == 2
    assert [question for question, _ in session.turns] == ["What can you do?"]
    assert unanswered != "What can you do?"


@pytest.mark.parametrize(
    ("index", "value"), [(0, "a"), (2, "a"), (9, "a"), (-1, "a"), ([1], "a"), (3, "  "), (3, None)]
)
def test_only_questions_are_edited_and_into_questions(talk, index, value):
    turns = talk[1].turns
    chat, _ = edit(talk, index, value)
    assert len(chat) == 5 and talk[1].turns == turns


@pytest.mark.parametrize("action", ["edit", "retry"])
def test_what_was_said_stays_where_there_is_no_other_answer(talk, said, engine, monkeypatch, action):
    (handlers, session), turns = talk, talk[1].turns
    monkeypatch.setattr(engine, "check_room", refuse)
    if action == "edit":
        assert edit(talk, 3, "Are you sure?")[1] == "Are you sure?"  # it comes back to the box
    else:
        last(handlers.retry(session, [{}], 2048, 0.4, 0))
    assert session.turns == turns and said == ["There is no room."]


def refuse():
    raise EngineError("There is no room.")


def resume(handlers, session, token: str, user: str | None = None):
    return asyncio.run(handlers.resume(session, token, SimpleNamespace(username=user)))


def test_a_conversation_goes_on_with_its_token_alone_and_for_its_user_alone(engine):
    handlers, first, others = web.Handlers(engine), web.Session(), [web.Session() for _ in range(4)]
    token, *_ = resume(handlers, first, "", "ming")
    first.number, first.turns = 1, [("Hello", "Hi.")]
    for session, given, user in zip(
        others, ("", token + "x", token, None), ("ming", "ming", "li", "ming"), strict=True
    ):
        own, *rest = resume(handlers, session, given, user)
        assert session.turns == [] and own != token and rest == [web.gr.skip()] * 3
    again = web.Session()
    own, chat, look, path = resume(handlers, again, token, "ming")
    assert own != token and (texts(chat), look, path) == (["Hello", "Hi."], "", "")
    again.turns = []
    assert first.turns  # a copy of a tab is a conversation of its own


def test_a_conversation_that_is_forgotten_is_not_kept_for_its_token():
    handlers, session = web.Handlers(SimpleNamespace()), web.Session()
    token, *_ = resume(handlers, session, "")
    del session
    gc.collect()
    assert token not in handlers.sessions


def test_an_export_of_nothing_says_so(talk, said):
    handlers, _ = talk
    assert asyncio.run(handlers.export(web.Session(), [], "en")) == ""
    assert asyncio.run(handlers.export(web.Session(), [{}], "en")) == ""
    assert said == [web.NOTHING_SAID, web.FORGOTTEN]


# With a password


@pytest.fixture
def guarded_url(engine, monkeypatch):
    """The page with a user `ming`, whose password is `a:b`."""
    monkeypatch.setattr(web_accounts, "REFUSAL_SECONDS", 0)
    page, port = web.create_page(engine, PICTURES), free_port()
    web.launch(page, "127.0.0.1", port, engine.limits.max_picture_bytes, accounts={"ming": "a:b"})
    yield f"http://127.0.0.1:{port}"
    page.close()


def test_without_the_password_nothing_is_shown_taken_or_answered(guarded_url):
    requests = [
        ("GET", "/config"),
        ("GET", "/gradio_api/info"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/run/predict"),
    ]

    def statuses(client: httpx.Client) -> list[int]:
        return [
            client.request(method, path, json={} if method == "POST" else None).status_code for method, path in requests
        ]

    with httpx.Client(base_url=guarded_url, timeout=60) as client:
        assert statuses(client) == [401] * len(requests)
        assert client.get("/gradio_api/queue/data?session_hash=a").status_code == 401
        picture = {"files": ("a.png", CIRCLES.read_bytes())}
        assert client.post("/gradio_api/upload", files=picture).status_code == 401
        assert "circles" not in client.get("/").text  # of the examples
        for user, password in (("ming", "a"), ("ming", ""), ("Ming", "a:b"), ("", ""), ("x", "a:b")):
            found = client.post("/login", data={"username": user, "password": password}).status_code
            assert found in (400, 422)
        assert statuses(client) == [401] * len(requests)
        assert client.post("/login", data={"username": "ming", "password": "a:b"}).status_code == 200
        assert 401 not in statuses(client)
        assert "circles" in client.get("/").text


def test_a_user_logs_in_and_asks(browser, guarded_url):
    browser.switch_to.new_window("tab")
    browser.get(guarded_url)
    name, password = patiently(lambda: browser.find_elements("css selector", "input")[:2] or [][0])
    name.send_keys("ming")
    password.send_keys("a:b" + ENTER)
    wait_until(lambda: browser.find_elements("css selector", "#question textarea"))
    browser.close()
    browser.switch_to.window(browser.window_handles[0])
