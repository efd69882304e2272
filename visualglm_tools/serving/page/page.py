"""The page of the web demo: a picture on the left, the talk about it on the right.

Each tab has a `Session` of its own on the server. What the browser may send is an uploaded picture, texts and numbers;
of the conversation it only sees a copy. Not here: what the page is built of (`layout.py`), what runs in the browser
(`client.py`), what it may ask the server for (`gate.py`), and where uploads lie (`uploads.py`).
"""

import asyncio
import base64
import contextlib
import html
import os
import secrets
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from visualglm_hf.conversation import describe_reading, is_english
from visualglm_hf.looking import Look
from visualglm_tools.layer_bar import PATIENCE
from visualglm_tools.serving.engine.answers import Answer, EngineError, QueueFull
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.picture_pool import DecoderNotStarted, PoolClosed
from visualglm_tools.serving.engine.prompts import OpenedPicture, Prompt, conversation_messages
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http.guards import ANY, RefuseOtherPages
from visualglm_tools.serving.page import client
from visualglm_tools.serving.page.accounts import login_of
from visualglm_tools.serving.page.export import pack
from visualglm_tools.serving.page.gate import Gate
from visualglm_tools.serving.page.head import AddToHead
from visualglm_tools.serving.page.layout import AT_ONCE, Parts, Switches, add_parts
from visualglm_tools.serving.page.uploads import Upload, own_uploads
from visualglm_tools.serving.page.words import TEXTS, words_of


OPENED_AT_A_TIME, MAX_OPENING, OPENING_SECONDS = 4, 20, 10  # uploads, uploads, seconds after which to try again
MAX_CHARACTERS = 20_000  # of a question: milliseconds of tokenizing, and more than the model takes
MAX_SESSIONS = 1000  # that the server remembers, each with 150 kB of a picture
BAR = 20  # characters
UPLOAD_SECONDS = 3600  # that an uploaded file is kept, unless its tab lets it go

# Options of events. The engine, not the page's queue, decides how many are answered at a time.
IN_THE_BROWSER = {"fn": None, "show_progress": "hidden", "api_visibility": "private"}
ANSWERING = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

FORGOTTEN = (
    "The server does not know this conversation any more: it was restarted, or this page was away for too long. "
    "Clear the history, or choose the picture again."
)
NOTHING_SAID = "There is no conversation yet that could be exported."


class Superseded(Exception):
    """The user has gone on to something else."""


class Session:
    """One tab: its picture, the turns that are complete, and the one on its way.

    All events of the page run in one event loop, and nothing here may be called from another thread.
    """

    def __init__(self):
        self.upload: Upload | None = None
        self.picture: OpenedPicture | None = None  # what the model sees of it; the file need not stay, nor its pixels
        self.told = ""  # what was read in the picture, for the user; "" where that was not asked for
        self.look = ""  # where the model looked for the last answer, as HTML
        self.turns: list[tuple[str, str]] = []
        self.answer: Answer | None = None
        self.turn = ("", "")  # that `answer` belongs to, as far as it was shown
        self.number = 0  # of what was begun
        self.user: str | None = None  # who has logged in

    def resume(self, session: "Session") -> None:
        """Go on with the conversation of another tab, or of this one before its page was loaded again."""
        session.settle()
        for name in ("upload", "picture", "told", "look", "turns"):
            setattr(self, name, getattr(session, name))
        self.number += 1

    def begin(self, upload: Upload | None) -> None:
        """Forget everything; talk about the picture of `upload` from now on."""
        self.settle()
        if self.upload:
            self.upload.delete()
        self.upload, self.picture, self.turns = upload, None, []
        self.told = self.look = ""

    def stop(self) -> None:
        if self.answer is not None:
            self.answer.cancel()

    def settle(self) -> None:
        """End the turn on its way; what was shown of its answer stays in the conversation."""
        self.stop()
        if self.answer is not None and self.turn[1]:
            self.turns = [*self.turns, self.turn]
        self.answer = None
        self.number += 1

    async def ask(
        self, opener: "Opener", question: str, settings: Settings, switches: Switches
    ) -> AsyncIterator[tuple[str, float]]:
        """The growing answer of the opener's engine, as `Answer.watch` gives it; in the end it is one of the `turns`.

        Raises:
            ValueError: the picture, the question or the settings cannot be used.
            EngineError: there is no answer now.
            Superseded: meanwhile something else was begun.
        """
        self.settle()
        number = self.number
        engine = opener.engine
        engine.check_room()  # before the picture is opened
        try:
            prompt = await self.prepare(opener, question, switches)
        except (ValueError, EngineError):
            self.check_current(number)  # the picture may have been deleted for the next one
            raise
        self.check_current(number)
        self.answer, self.turn, self.look = engine.submit(prompt, settings), (question, ""), ""
        answer = self.answer
        try:
            async for text, share_read in answer.watch(PATIENCE):
                self.check_current(number)
                self.turn = (question, text)
                yield text, share_read
            self.check_current(number)  # what follows an answer's end shall not be drawn over what was begun
            if answer.attention_map is not None:
                self.look = Look(answer.attention_map, text, [], prompt.picture).to_html()
        finally:  # also when the tab was closed
            answer.cancel()
            if number == self.number:
                self.settle()

    async def prepare(self, opener: "Opener", question: str, switches: Switches) -> Prompt:
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"The question has {len(question)} characters, more than {MAX_CHARACTERS}. Shorten it.")
        picture = await self.open(opener, switches) if self.upload else None
        self.told = describe_reading(picture.reading, is_english(question)) if picture and switches.read_text else ""
        if picture and not switches.read_text:
            picture = replace(picture, reading=None)
        looking = {"zoom": switches.zoom, "is_shown": switches.show_look} if picture and switches.looks_into else {}
        messages = conversation_messages(self.turns, question, picture)
        return await asyncio.to_thread(opener.engine.prepare, messages, **looking)

    async def open(self, opener: "Opener", switches: Switches) -> OpenedPicture:
        """The picture with all that the switches ask for; of that, what is small is kept."""
        upload, kept = self.upload, self.picture
        is_unread = switches.read_text and (kept is None or kept.reading is None)
        if kept and not is_unread and not switches.looks_into:
            return kept
        picture = await opener.open(upload, switches)
        if self.upload is upload:
            reading = kept.reading if kept and picture.reading is None else picture.reading
            self.picture = replace(picture, reading=reading, whole=None)
        return picture

    @property
    def said(self) -> list[tuple[str, str]]:
        """The turns, also the one on its way as far as it was shown."""
        return [*self.turns, self.turn] if self.answer is not None and self.turn[1] else self.turns

    def check_current(self, number: int) -> None:
        if number != self.number:
            raise Superseded

    @property
    def is_new(self) -> bool:
        return self.number == 0


class Opener:
    """Opens uploads with the engine, a few at a time: some take long, and each is up to 20 MiB in memory."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.threads = ThreadPoolExecutor(OPENED_AT_A_TIME, "uploads")  # others, with other questions, do not wait
        self.number = 0  # of those that are being opened or wait for it

    async def open(self, upload: Upload, switches: Switches) -> OpenedPicture:
        """What the model sees of it, and what else the switches ask for.

        Raises:
            ValueError: it cannot be used.
            EngineError: as many are waiting as may, or nothing decodes pictures now.
        """
        if self.number >= MAX_OPENING:
            raise QueueFull(self.number, OPENING_SECONDS)
        self.number += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, self.open_now, upload, switches)
        finally:
            self.number -= 1

    def open_now(self, upload: Upload, switches: Switches) -> OpenedPicture:
        try:
            looking = {"read_text": switches.read_text, "zoom": switches.looks_into}
            return self.engine.decode_picture(upload.read(), repr(upload.path.name), **looking)
        except (DecoderNotStarted, PoolClosed) as error:
            raise EngineError(str(error)) from error


class Handlers:
    """What happens on the page's events. Those that answer yield what the chat and the question box show.

    All are coroutines, since gradio runs functions in threads.
    """

    def __init__(self, engine: Engine):
        self.opener = Opener(engine)
        self.sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()  # by their tokens

    async def resume(self, session: Session, token: str, request: gr.Request):
        """The session's own token, and of the one whose `token` the tab has kept the chat, the map and the picture."""
        session.user = request.username
        before = self.sessions.get(token) if isinstance(token, str) else None
        self.sessions[own := secrets.token_urlsafe()] = session
        if before in (None, session) or before.user != session.user or before.is_new or not session.is_new:
            return own, *[gr.skip()] * 3
        session.resume(before)
        upload = session.upload
        path = str(upload.path) if upload and upload.path.exists() else ""
        return own, displayed(session.turns, session.told), session.look, path

    async def show_picture(self, path: str) -> str:
        """The picture again, for its box; the box is given nothing but values (`take_uploads_as_they_are`)."""
        return path

    async def ask(self, session: Session, question: str, shown: Sequence, *controls):
        """`shown` is what the browser has of the conversation; `controls` are the values of sliders and switches."""
        if question := question.strip():
            if is_forgotten(session, shown):
                yield gr.skip(), question
                return
            async for update in self.answer(session, question, controls):
                yield update

    async def retry(self, session: Session, shown: Sequence, *controls):
        if is_forgotten(session, shown):
            yield gr.skip()
            return
        session.settle()
        if session.turns:
            question, _ = session.turns[-1]
            async for chat, _ in self.answer(session, question, controls, len(session.turns) - 1):
                yield chat

    async def edit(self, session: Session, shown: Sequence, edited: gr.EditData, *controls):
        """Ask an earlier question in other words; the answer takes the place of all that came after it."""
        question = edited.value.strip() if isinstance(edited.value, str) else ""
        if is_forgotten(session, shown):
            yield gr.skip(), question
            return
        session.settle()
        said = messages(session.turns, session.told)
        asked = {place: number for place, (role, _, number) in enumerate(said) if role == "user"}
        number = asked.get(edited.index) if isinstance(edited.index, int) else None
        if number is None or not question:  # nobody has said what was read in the picture
            yield displayed(session.turns, session.told), gr.skip()
            return
        async for update in self.answer(session, question, controls, number):
            yield update

    async def change_picture(self, session: Session, upload: Upload | None, question: str, *controls):
        if upload == session.upload:  # `clear` has removed it, or `resume` has shown it again
            yield gr.skip()  # or the chat would be emptied
            return
        session.begin(upload)
        yield []
        if upload is not None:
            async for chat, _ in self.answer(session, question, controls):
                yield chat  # and what was typed meanwhile stays

    async def stop(self, session: Session) -> None:
        session.stop()

    async def clear(self, session: Session):
        """The emptied picture, chat and map."""
        session.begin(None)
        return None, [], ""

    async def show_look(self, session: Session) -> str:
        """Where the model looked for the last answer, if that was asked for."""
        return session.look

    async def export(self, session: Session, shown: Sequence, language: str) -> str:
        """The conversation with its pictures, as an archive in base64; "" if there is none."""
        if is_forgotten(session, shown):
            return ""
        if not session.said:
            gr.Warning(NOTHING_SAID, title="")
            return ""
        upload, view = session.upload, session.picture and session.picture.image
        archive = await asyncio.to_thread(
            pack, session.said, session.told, upload, view, session.look, words_of(str(language))
        )
        return base64.b64encode(archive).decode()

    async def answer(self, session: Session, question: str, controls: Sequence, number: int | None = None):
        """With a `number` of a turn: in its place and that of all after it, which stay if there is no answer."""
        replaced, text = session.turns, ""
        session.turns = replaced[:number]
        yield displayed([*session.turns, (question, text)], session.told), ""
        try:
            max_length, top_p, temperature, *switches = controls
            settings = Settings(max_length=max_length, top_p=top_p, temperature=temperature)
            asked = session.ask(self.opener, question, settings, Switches(*map(bool, switches)))
            async with contextlib.aclosing(asked) as texts:
                async for text, share_read in texts:
                    said = [*session.turns, (question, text or bar(share_read))]
                    yield displayed(said, session.told), gr.skip()
        except Superseded:
            return
        except (ValueError, EngineError) as error:
            gr.Warning(html.escape(str(error)), title="")
            if not text:
                session.turns = replaced
        yield displayed(session.turns, session.told), gr.skip() if text else question


def is_forgotten(session: Session, shown: Sequence) -> bool:
    """Whether the browser shows a conversation that this server does not know; then that is said."""
    if shown and session.is_new:
        gr.Warning(FORGOTTEN, title="")
        return True
    return False


def bar(share: float) -> str:
    """How much of a prompt has been read, to be shown in the answer's place until there is one."""
    return f"{'█' * round(BAR * share):░<{BAR}} {share:.0%}"


def messages(turns: Sequence[tuple[str, str]], told: str = "") -> Iterator[tuple[str, str, int | None]]:
    """What the chat shows, one after the other: who has said it, what, and in which turn.

    What was read in the picture stands in front, in brackets: nobody has said it.
    """
    if told:
        yield "user", f"[{told}]", None
    for number, turn in enumerate(turns):
        for role, text in zip(("user", "assistant"), turn, strict=True):
            if text:
                yield role, text, number


def displayed(turns: Sequence[tuple[str, str]], told: str = "") -> list[dict]:
    """The turns as the chat takes them: without markdown, it still takes `<img src=...>` for a picture to load."""
    return [{"role": role, "content": html.escape(text, quote=False)} for role, text, _ in messages(turns, told)]


def create_page(engine: Engine, examples: Sequence[Path]) -> gr.Blocks:
    """The page.

    Args:
        engine: answers for all tabs together.
        examples: pictures to click on.
    """
    uploads = own_uploads()
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # the browser would keep pictures and answers
    with gr.Blocks(
        title=client.TITLE,
        analytics_enabled=False,
        fill_height=True,
        delete_cache=(UPLOAD_SECONDS // 10, UPLOAD_SECONDS),
    ) as page:
        parts, session = add_parts(uploads, examples), gr.State(Session())
        handlers = Handlers(engine)
        connect_conversation(handlers, session, parts)
        connect_browser(handlers, session, parts, page)
    return page


def connect_conversation(handlers: Handlers, session: gr.State, parts: Parts) -> None:
    """Say which events of the conversation are whose."""
    chat, controls, buttons = parts.chat, parts.controls, parts.buttons
    sent, unanswered = (gr.Textbox(visible="hidden") for _ in range(2))
    boxes, display = [parts.question, sent, unanswered], [chat, unanswered]
    triggers = [buttons["submit"].click, parts.question.submit]
    gr.on(triggers, js=client.SEND, inputs=boxes[:2], outputs=boxes[:2], **IN_THE_BROWSER)
    asked = gr.on(triggers, handlers.ask, [session, sent, chat, *controls], display, **ANSWERING)
    edited = chat.edit(handlers.edit, [session, chat, *controls], display, **ANSWERING)
    asked.failure(js=client.UNSEND, inputs=boxes, outputs=boxes, **IN_THE_BROWSER)
    for answered in (asked, edited):
        answered.then(js=client.GIVE_BACK, inputs=boxes, outputs=boxes, **IN_THE_BROWSER)
    retried = buttons["retry"].click(handlers.retry, [session, chat, *controls], chat, **ANSWERING)
    changed = parts.picture.change(
        handlers.change_picture,
        [session, parts.picture, parts.first_question, *controls],
        chat,
        trigger_mode="multiple",  # a new picture need not wait for the last one's answer
        **ANSWERING,
    )
    for answered in (asked, edited, retried, changed):
        answered.then(js=client.FINISH, **IN_THE_BROWSER)
        answered.then(handlers.show_look, session, parts.look, **AT_ONCE)
    buttons["stop"].click(handlers.stop, session, **AT_ONCE)
    gr.on(
        [buttons["clear"].click, chat.clear],
        handlers.clear,
        session,
        [parts.picture, chat, parts.look],
        cancels=[asked, edited, retried, changed],  # or what was sent before might arrive after
        **AT_ONCE,
    )


def connect_browser(handlers: Handlers, session: gr.State, parts: Parts, page: gr.Blocks) -> None:
    """Say what happens when the page is loaded, and what the browser does or keeps by itself."""
    token, path, archive, language = (gr.Textbox(visible="hidden") for _ in range(4))
    settings, shown = [parts.first_question, *parts.controls], [parts.chat, parts.look, path]
    page.load(js=client.RECALL, inputs=parts.question, outputs=parts.question, **IN_THE_BROWSER)
    page.load(js=client.SETTINGS, inputs=settings, outputs=settings, **IN_THE_BROWSER)
    page.load(js=client.ATTEND, **IN_THE_BROWSER)
    resumed = page.load(handlers.resume, [session, token], [token, *shown], js=client.RESUME, **AT_ONCE)
    path.change(handlers.show_picture, path, parts.picture, **AT_ONCE)
    resumed.then(js=client.KEEP_TOKEN, inputs=token, **IN_THE_BROWSER)
    parts.first_question.input(js=client.KEEP_FIRST, inputs=parts.first_question, **IN_THE_BROWSER)
    for control in parts.controls:
        control.change(js=client.KEEP_SETTINGS, inputs=settings, **IN_THE_BROWSER)
    parts.language.click(js=client.OTHER_LANGUAGE, **IN_THE_BROWSER)
    exported = parts.buttons["export"].click(
        handlers.export, [session, parts.chat, language], archive, js=client.NAME_LANGUAGE, **AT_ONCE
    )
    exported.then(js=client.SAVE, inputs=archive, outputs=archive, **IN_THE_BROWSER)


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    max_picture_bytes: int,
    share: bool = False,
    hosts: Sequence[str] = (),
    accounts: Mapping[str, str] | None = None,
) -> None:
    """Serve the page from threads of its own until `page.close()`, with `share` to the whole world.

    Args:
        hosts: names that lead here; addresses, `localhost` and `host` need not be given.
        accounts: passwords of the users that may see it; without any, whoever reaches it may.

    Raises:
        OSError: the port is taken.
    """
    uploads = own_uploads()
    uploads.keep_all()  # the examples
    own_names = [ANY] if share else [host, *hosts]  # gradio's makers choose the name of the public link
    middleware = [
        Middleware(RefuseOtherPages, origins=[], hosts=own_names),
        Middleware(Gate, uploads=uploads, max_picture_bytes=max_picture_bytes, has_login=bool(accounts)),
        Middleware(AddToHead, markup=client.HEAD),
    ]
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=login_of(accounts or {}),
        max_file_size=max_picture_bytes,
        i18n=TEXTS,
        footer_links=[],
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={"middleware": middleware},
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
    )
