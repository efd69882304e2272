"""The page of the web demo: a picture on the left, the talk about it on the right.

Each tab has a `Session` of its own on the server. What the browser may send is an uploaded picture, texts and numbers;
of the conversation it only sees a copy. Not here: what runs in the browser (`client.py`), what it may ask the
server for (`gate.py`), and where uploads lie (`uploads.py`).
"""

import asyncio
import contextlib
import html
import os
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from visualglm_hf.conversation import describe_reading, is_english
from visualglm_hf.looking import Look
from visualglm_tools.layer_bar import PATIENCE
from visualglm_tools.serving.engine.answers import Answer, EngineError, QueueFull
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.picture_pool import DecoderNotStarted, PoolClosed
from visualglm_tools.serving.engine.prompts import QUESTIONS, OpenedPicture, Prompt, conversation_messages
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http.guards import ANY, RefuseOtherPages
from visualglm_tools.serving.page.client import (
    CHOOSE_FIRST_QUESTION,
    GIVE_BACK,
    NAME_PICTURES,
    SEND,
    STYLE,
    TEXTS,
    UNSEND,
)
from visualglm_tools.serving.page.gate import Gate
from visualglm_tools.serving.page.uploads import Upload, Uploads, own_uploads


OPENED_AT_A_TIME, MAX_OPENING, OPENING_SECONDS = 4, 20, 10  # uploads, uploads, seconds after which to try again
MAX_CHARACTERS = 20_000  # of a question: milliseconds of tokenizing, and more than the model takes
MAX_SESSIONS = 1000  # that the server remembers, each with 150 kB of a picture
BAR = 20  # characters
UPLOAD_SECONDS = 3600  # that an uploaded file is kept, unless its tab lets it go

# Options of events. The engine, not the page's queue, decides how many are answered at a time.
IN_THE_BROWSER = {"fn": None, "show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
ANSWERING = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

FORGOTTEN = (
    "The server does not know this conversation any more: it was restarted, or this page was away for too long. "
    "Clear the history, or choose the picture again."
)


class Superseded(Exception):
    """The user has gone on to something else."""


@dataclass(frozen=True)
class Switches:
    """How a picture is looked at, in the order of the page's switches."""

    read_text: bool = False
    zoom: bool = False
    show_look: bool = False

    @property
    def looks_into(self) -> bool:
        """Whether its own pixels are needed when it is asked about."""
        return self.zoom or self.show_look


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


def take_uploads_as_they_are(picture: gr.Image, uploads: Uploads) -> None:
    """Let `picture` give an upload, for the engine to check and to open, and nothing else.

    A subclass would say it better, but for each gradio writes a .pyi file beside its source. Handlers may give it new
    values, but no new properties: for these gradio makes a new component of the class.
    """
    move_to_cache = picture.async_move_resource_to_block_cache

    def find(path: str) -> Upload:
        try:
            return uploads.find(path)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def preprocess(payload) -> Upload | None:
        return payload and find(payload.path or "")

    async def move_uploads_to_cache(url_or_file_path):
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Upload the picture; addresses are not opened here.")
        find(url_or_file_path)  # gradio deletes in the end what it has taken, or fails to
        return await move_to_cache(url_or_file_path)

    picture.preprocess = preprocess
    picture.async_move_resource_to_block_cache = move_uploads_to_cache


class Handlers:
    """What happens on the page's events. Those that answer yield what the chat and the question box show.

    All are coroutines, since gradio runs functions in threads.
    """

    def __init__(self, engine: Engine):
        self.opener = Opener(engine)

    async def ask(self, session: Session, question: str, shown: Sequence, *controls):
        """`shown` is what the browser has of the conversation; `controls` are the values of sliders and switches."""
        if question := question.strip():
            if shown and session.is_new:
                gr.Warning(FORGOTTEN, title="")
                yield gr.skip(), question
                return
            async for update in self.answer(session, question, controls):
                yield update

    async def retry(self, session: Session, shown: Sequence, *controls):
        if shown and session.is_new:
            gr.Warning(FORGOTTEN, title="")
            return
        session.settle()
        if session.turns:
            *session.turns, (question, _) = session.turns
            async for update in self.answer(session, question, controls):
                yield update

    async def change_picture(self, session: Session, upload: Upload | None, question: str, *controls):
        if upload is None and session.upload is None:  # `clear` has removed it
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

    async def answer(self, session: Session, question: str, controls: Sequence):
        text = ""
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
        yield displayed(session.turns, session.told), gr.skip() if text else question


def bar(share: float) -> str:
    """How much of a prompt has been read, to be shown in the answer's place until there is one."""
    return f"{'█' * round(BAR * share):░<{BAR}} {share:.0%}"


def displayed(turns: Sequence[tuple[str, str]], told: str = "") -> list[dict]:
    """The turns as the chat takes them: without markdown, it still takes `<img src=...>` for a picture to load.

    What was read in the picture stands in front, in brackets: nobody has said it.
    """
    said = [("user", f"[{told}]")] if told else []
    said += [each for turn in turns for each in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": html.escape(text, quote=False)} for role, text in said if text]


def create_page(engine: Engine, examples: Sequence[Path]) -> gr.Blocks:
    """The page.

    Args:
        engine: answers for all tabs together.
        examples: pictures to click on.
    """
    uploads = own_uploads()
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # the browser would keep pictures and answers
    with gr.Blocks(
        title="VisualGLM-6B",
        analytics_enabled=False,
        fill_height=True,
        delete_cache=(UPLOAD_SECONDS // 10, UPLOAD_SECONDS),
    ) as page:
        gr.Markdown("# VisualGLM-6B")
        with gr.Row(elem_id="page"):  # its layout is `STYLE`'s
            gr.Markdown(TEXTS("notes"), elem_id="notes")
            picture = add_picture(uploads)
            with gr.Column(elem_id="talk"):
                chat = add_chat()
                question = gr.Textbox(
                    label=TEXTS("question"),
                    show_label=False,
                    placeholder=TEXTS("question"),
                    max_lines=8,
                    elem_id="question",
                )
                buttons = add_buttons()
            with gr.Column(elem_id="settings"):
                add_examples(picture, examples)
                first_question = gr.Radio(QUESTIONS, value=QUESTIONS[0], label=TEXTS("first_question"))
                controls = [*add_sliders(), *add_switches()]
                look = gr.HTML("", elem_id="look")
        page.load(js=CHOOSE_FIRST_QUESTION, outputs=first_question, **IN_THE_BROWSER)
        page.load(js=NAME_PICTURES, **IN_THE_BROWSER)
        connect(Handlers(engine), picture, first_question, controls, chat, question, buttons, look)
    return page


def connect(handlers: Handlers, picture, first_question, controls, chat, question, buttons, look) -> None:
    """Say which events of the page are whose."""
    submit, stop, retry, clear = buttons
    session = gr.State(Session())
    sent, unanswered = (gr.Textbox(visible="hidden") for _ in range(2))
    boxes, display = [question, sent, unanswered], [chat, unanswered]
    gr.on([submit.click, question.submit], js=SEND, inputs=[question, sent], outputs=[question, sent], **IN_THE_BROWSER)
    asked = gr.on([submit.click, question.submit], handlers.ask, [session, sent, chat, *controls], display, **ANSWERING)
    asked.then(js=GIVE_BACK, inputs=boxes, outputs=boxes, **IN_THE_BROWSER)
    asked.failure(js=UNSEND, inputs=boxes, outputs=boxes, **IN_THE_BROWSER)
    retried = retry.click(handlers.retry, [session, chat, *controls], display, **ANSWERING)
    retried.then(js=GIVE_BACK, inputs=boxes, outputs=boxes, **IN_THE_BROWSER)
    changed = picture.change(
        handlers.change_picture,
        [session, picture, first_question, *controls],
        chat,
        trigger_mode="multiple",  # a new picture need not wait for the last one's answer
        **ANSWERING,
    )
    for answered in (asked, retried, changed):
        answered.then(handlers.show_look, session, look, **AT_ONCE)
    stop.click(handlers.stop, session, **AT_ONCE)
    gr.on(
        [clear.click, chat.clear],
        handlers.clear,
        session,
        [picture, chat, look],
        cancels=[asked, retried, changed],  # or what was sent before might arrive after
        **AT_ONCE,
    )


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    max_picture_bytes: int,
    share: bool = False,
    hosts: Sequence[str] = (),
) -> None:
    """Serve the page from threads of its own until `page.close()`, with `share` to the whole world.

    Args:
        hosts: names that lead here; addresses, `localhost` and `host` need not be given.

    Raises:
        OSError: the port is taken.
    """
    uploads = own_uploads()
    uploads.keep_all()  # the examples
    own_names = [ANY] if share else [host, *hosts]  # gradio's makers choose the name of the public link
    middleware = [
        Middleware(RefuseOtherPages, origins=[], hosts=own_names),
        Middleware(Gate, uploads=uploads, max_picture_bytes=max_picture_bytes),
    ]
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=max_picture_bytes,
        i18n=TEXTS,
        footer_links=[],
        css=STYLE,
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


def add_picture(uploads: Uploads) -> gr.Image:
    picture = gr.Image(
        image_mode=None,
        type="filepath",
        sources=["upload", "clipboard", "webcam"],
        label=TEXTS("picture"),
        height=300,
        buttons=[],
        elem_id="picture",
    )
    take_uploads_as_they_are(picture, uploads)
    return picture


def add_examples(picture: gr.Image, paths: Sequence[Path]) -> None:
    if paths:
        gallery = gr.Dataset(
            components=[picture], samples=[[str(path)] for path in paths], type="index", label=TEXTS("examples")
        )
        copies = [sample["path"] for [sample] in gallery.samples]  # gradio opens no others from another folder
        gallery.click(lambda index: copies[index], gallery, picture, **AT_ONCE)


def add_buttons() -> list[gr.Button]:
    with gr.Row(elem_id="buttons"):
        return [
            gr.Button(TEXTS(name), variant="primary" if name == "submit" else "secondary", min_width=60, elem_id=name)
            for name in ("submit", "stop", "retry", "clear")
        ]


def add_sliders() -> list[gr.Slider]:
    """Maximum length, top-p and temperature, as in the original."""
    return [
        gr.Slider(0, 4096, 2048, step=1, label=TEXTS("max_length"), elem_id="max_length"),
        gr.Slider(0, 1, 0.4, step=0.01, label=TEXTS("top_p"), elem_id="top_p"),
        gr.Slider(0, 1, 0.8, step=0.01, label=TEXTS("temperature"), elem_id="temperature"),
    ]


def add_switches() -> list[gr.Checkbox]:
    """Those of `Switches`."""
    return [gr.Checkbox(False, label=TEXTS(each.name), elem_id=each.name) for each in fields(Switches)]


def add_chat() -> gr.Chatbot:
    """A chat that shows texts as they are: markdown would let an answer load pictures, and hide what it says."""
    return gr.Chatbot(
        label=TEXTS("chat"),
        height="55vh",
        render_markdown=False,
        allow_tags=False,
        latex_delimiters=[],
        feedback_options=None,
        buttons=[],
        elem_id="chat",
    )
