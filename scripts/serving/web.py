"""The page of the web demo: a picture on the left, the talk about it on the right.

Each tab has a `Session` of its own on the server. What the browser may send is a picture's data, texts and numbers; of
the conversation it only sees a copy.
"""

import asyncio
import contextlib
import html
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import gradio as gr

from .engine import Answer, Engine, EngineError
from .prompts import conversation_messages
from .sampling import Settings


FIRST_QUESTIONS = ("描述这张图片。", "Describe the image.")  # about a new picture; the original has the first

# Options of events. The engine, not the page's queue, decides how many are answered at a time.
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
ANSWERING = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

TEXTS = gr.I18n(
    en={
        "notes": "Choose a picture, and it is described at once; then ask on. A new picture begins a new conversation. "
        "The model sees 224×224 pixels, reads no Chinese text in pictures, and invents things in long descriptions. "
        "Large pictures take time to upload; if the connection fails, try without a proxy.",
        "picture": "Picture",
        "first_question": "First question",
        "chat": "Conversation",
        "question": "Your question",
        "submit": "Submit",
        "stop": "Stop",
        "retry": "Retry",
        "clear": "Clear History",
        "max_length": "Maximum length",
        "top_p": "Top P",
        "temperature": "Temperature",
        "examples": "Examples",
    },
    zh={
        "notes": "选择一张图片，模型会立即描述它，然后可以继续提问；换一张图片即开始新的对话。"
        "模型只能看到224×224像素，不能识别图中的中文文字，较长的描述可能包含虚构的内容。"
        "较大的图片上传需要时间；如果连接出错，请关闭代理后再试。",
        "picture": "图片",
        "first_question": "首个问题",
        "chat": "对话",
        "question": "输入问题",
        "submit": "提交",
        "stop": "停止",
        "retry": "重新回答",
        "clear": "清空对话",
        "max_length": "最大长度",
        "top_p": "Top P",
        "temperature": "温度",
        "examples": "示例",
    },
)


class Superseded(Exception):
    """The user has gone on to something else."""


class Session:
    """One tab: its picture, the turns that are complete, and the one on its way.

    All events of the page run in one event loop, and nothing here may be called from another thread.
    """

    def __init__(self):
        self.picture: bytes | str | None = None
        self.turns: list[tuple[str, str]] = []
        self.answer: Answer | None = None
        self.turn = ("", "")  # that `answer` belongs to, as far as it was shown
        self.number = 0  # of what was begun

    def begin(self, picture: bytes | str | None) -> None:
        """Forget everything; talk about `picture` from now on."""
        self.settle()
        self.picture, self.turns = picture, []

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

    async def ask(self, engine: Engine, question: str, settings: Settings) -> AsyncIterator[str]:
        """The growing answer; in the end it is one of the `turns`.

        Raises:
            ValueError: the picture, the question or the settings cannot be used.
            EngineError: there is no answer now.
            Superseded: meanwhile something else was begun.
        """
        self.settle()
        number = self.number
        engine.check_room()  # before the picture is opened
        messages = conversation_messages(self.turns, question, self.picture)
        prompt = await asyncio.to_thread(engine.prepare, messages)
        self.check_current(number)
        self.answer, self.turn = engine.submit(prompt, settings), (question, "")
        answer = self.answer
        try:
            async for text in answer:
                self.check_current(number)
                self.turn = (question, text)
                yield text
            self.check_current(number)  # what follows an answer's end shall not be drawn over what was begun
        finally:  # also when the tab was closed
            answer.cancel()
            if number == self.number:
                self.settle()

    def check_current(self, number: int) -> None:
        if number != self.number:
            raise Superseded


def take_uploads_as_they_are(picture: gr.Image) -> None:
    """Let `picture` give data for the engine to check and to open, and of files take uploads only.

    A subclass would say it better, but for each gradio writes a .pyi file beside its source. Handlers may give it new
    values, but no new properties: for these gradio makes a new component of the class.
    """
    move_to_cache = picture.async_move_resource_to_block_cache

    def preprocess(payload) -> bytes | str | None:
        if payload is None or (payload.url or "").startswith("data:"):
            return payload and payload.url
        return Path(payload.path).read_bytes()

    async def move_uploads_to_cache(url_or_file_path):
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Upload the picture; addresses are not opened here.")
        return await move_to_cache(url_or_file_path)

    picture.preprocess = preprocess
    picture.async_move_resource_to_block_cache = move_uploads_to_cache


class Handlers:
    """What happens on the page's events. Those that answer yield what the chat and the question box show.

    All are coroutines, since gradio runs functions in threads.
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    async def ask(self, session: Session, question: str, *sliders):
        if question := question.strip():
            async for update in self.answer(session, question, sliders):
                yield update

    async def retry(self, session: Session, *sliders):
        session.settle()
        if session.turns:
            *session.turns, (question, _) = session.turns
            async for update in self.answer(session, question, sliders):
                yield update

    async def change_picture(self, session: Session, picture: bytes | str | None, question: str, *sliders):
        if picture is None and session.picture is None:  # `clear` has removed it
            return
        session.begin(picture)
        yield []
        if picture is not None:
            async for chat, _ in self.answer(session, question, sliders):
                yield chat  # and what was typed meanwhile stays

    async def stop(self, session: Session) -> None:
        session.stop()

    async def clear(self, session: Session):
        """The emptied picture, chat and question."""
        session.begin(None)
        return None, [], ""

    async def answer(self, session: Session, question: str, sliders: Sequence[float]):
        yield displayed([*session.turns, (question, "")]), ""
        try:
            max_length, top_p, temperature = sliders
            settings = Settings(max_length=max_length, top_p=top_p, temperature=temperature)
            async with contextlib.aclosing(session.ask(self.engine, question, settings)) as texts:
                async for text in texts:
                    yield displayed([*session.turns, (question, text)]), gr.skip()
        except Superseded:
            return
        except (ValueError, EngineError) as error:
            gr.Warning(html.escape(str(error)), title="")
        is_answered = bool(session.turns) and session.turns[-1][0] == question
        yield displayed(session.turns), gr.skip() if is_answered else question


def displayed(turns: Sequence[tuple[str, str]]) -> list[dict]:
    """The turns as the chat takes them: without markdown, it still takes `<img src=...>` for a picture to load."""
    return [
        {"role": role, "content": html.escape(text, quote=False)}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
        if text
    ]


def create_page(engine: Engine, examples: Sequence[Path]) -> gr.Blocks:
    """The page.

    Args:
        engine: answers for all tabs together.
        examples: pictures to click on.
    """
    with gr.Blocks(title="VisualGLM-6B", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown("# VisualGLM-6B")
        gr.Markdown(TEXTS("notes"))
        with gr.Row():
            with gr.Column(scale=2):
                picture, first_question = add_picture(examples)
                sliders = add_sliders()
            with gr.Column(scale=4):
                chat = add_chat()
                question = gr.Textbox(show_label=False, placeholder=TEXTS("question"), max_lines=8, elem_id="question")
                with gr.Row():
                    submit, stop, retry, clear = (
                        gr.Button(TEXTS(name), variant="primary" if name == "submit" else "secondary", elem_id=name)
                        for name in ("submit", "stop", "retry", "clear")
                    )
        session = gr.State(Session())
        handlers, display = Handlers(engine), [chat, question]
        asked = gr.on(
            [submit.click, question.submit], handlers.ask, [session, question, *sliders], display, **ANSWERING
        )
        retried = retry.click(handlers.retry, [session, *sliders], display, **ANSWERING)
        changed = picture.change(
            handlers.change_picture,
            [session, picture, first_question, *sliders],
            chat,
            trigger_mode="multiple",  # a new picture need not wait for the last one's answer
            **ANSWERING,
        )
        stop.click(handlers.stop, session, **AT_ONCE)
        gr.on(
            [clear.click, chat.clear],
            handlers.clear,
            session,
            [picture, *display],
            cancels=[asked, retried, changed],  # or what was sent before might arrive after
            **AT_ONCE,
        )
    return page


def launch(page: gr.Blocks, host: str, port: int, max_picture_bytes: int, share: bool = False) -> None:
    """Serve the page from threads of its own until `page.close()`, with `share` to the whole world.

    Raises:
        OSError: the port is taken.
    """
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=max_picture_bytes,
        i18n=TEXTS,
        footer_links=[],
        run_history=False,  # the browser would keep pictures and answers
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
    )


def add_picture(examples: Sequence[Path]) -> tuple[gr.Image, gr.Radio]:
    picture = gr.Image(
        image_mode=None,
        type="filepath",
        sources=["upload", "clipboard", "webcam"],
        label=TEXTS("picture"),
        height=300,
        buttons=[],
        elem_id="picture",
    )
    take_uploads_as_they_are(picture)
    if examples:
        gallery = gr.Dataset(
            components=[picture], samples=[[str(path)] for path in examples], type="index", label=TEXTS("examples")
        )
        gallery.click(lambda index: str(examples[index]), gallery, picture, **AT_ONCE)
    return picture, gr.Radio(FIRST_QUESTIONS, value=FIRST_QUESTIONS[0], label=TEXTS("first_question"))


def add_sliders() -> list[gr.Slider]:
    """Maximum length, top-p and temperature, as in the original."""
    return [
        gr.Slider(0, 4096, 2048, step=1, label=TEXTS("max_length"), elem_id="max_length"),
        gr.Slider(0, 1, 0.4, step=0.01, label=TEXTS("top_p"), elem_id="top_p"),
        gr.Slider(0, 1, 0.8, step=0.01, label=TEXTS("temperature"), elem_id="temperature"),
    ]


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
