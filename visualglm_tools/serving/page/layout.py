"""What the page is built of: each part with its place in `style.css`, and which files it takes.

Not here: what happens when somebody uses it (`page.py`), and its texts (`words.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import gradio as gr

from visualglm_tools.serving.engine.prompts import QUESTIONS
from visualglm_tools.serving.page.uploads import Upload, Uploads
from visualglm_tools.serving.page.words import TEXTS


AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # of an event
SPOKEN = '<div role="status"></div>'  # what `page.js` lets screen readers say


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


@dataclass(frozen=True)
class Parts:
    """What of the page has events, or shows what became of them."""

    language: gr.Button
    picture: gr.Image
    chat: gr.Chatbot
    question: gr.Textbox
    buttons: dict[str, gr.Button]
    first_question: gr.Radio
    controls: list[gr.Slider | gr.Checkbox]  # sliders and switches
    look: gr.HTML


def add_parts(uploads: Uploads, examples: Sequence[Path]) -> Parts:
    """Build the page, from its top to its bottom: in this order it is read and reached by the keyboard."""
    with gr.Row(elem_id="head"):
        gr.Markdown("# VisualGLM-6B")
        language = gr.Button(TEXTS("other_language"), size="sm", elem_id="language")
    with gr.Row(elem_id="page"):
        gr.Markdown(TEXTS("notes"), elem_id="notes")
        picture = add_picture(uploads)
        with gr.Column(elem_id="talk"):
            chat = add_chat()
            gr.HTML(SPOKEN, elem_id="spoken", padding=False)
            question = add_question()
            buttons = add_buttons()
        with gr.Column(elem_id="settings"):
            add_examples(picture, examples)
            first_question = gr.Radio(
                QUESTIONS, value=QUESTIONS[0], label=TEXTS("first_question"), elem_id="first_question"
            )
            controls = [*add_sliders(), *add_switches()]
            look = gr.HTML("", elem_id="look")
    return Parts(language, picture, chat, question, buttons, first_question, controls, look)


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


def add_question() -> gr.Textbox:
    return gr.Textbox(
        label=TEXTS("question"), show_label=False, placeholder=TEXTS("question"), max_lines=8, elem_id="question"
    )


def add_buttons() -> dict[str, gr.Button]:
    with gr.Row(elem_id="buttons"):
        return {
            name: gr.Button(
                TEXTS(name), variant="primary" if name == "submit" else "secondary", min_width=50, elem_id=name
            )
            for name in ("submit", "stop", "retry", "clear", "export")
        }


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
        buttons=["copy"],
        editable="user",
        elem_id="chat",
    )


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
