"""VisualGLM in the terminal: ask about a picture, watch the answer being typed, ask on.

    visualglm chat                                          # asks for a picture, then for questions
    visualglm chat --image photo.jpg --query "图里有什么？"   # prints one answer and ends

In the conversation `clear` starts over and `stop` (or Ctrl-D) ends. Ctrl-C stops an answer; what was shown of it stays
in the conversation as the answer, so that the next question can refer to it. At a prompt, Ctrl-C twice ends.

Options may be spelled as the original's were: --from_pretrained, --max_length, --prompt_zh.
"""

import contextlib
import importlib
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import COUNT_OR_NONE, number, option
from visualglm_tools.output_files import behind_links
from visualglm_tools.printing import printable, report
from visualglm_tools.prompt_bar import prompt_bar
from visualglm_tools.serving.engine.text import stable_part
from visualglm_tools.serving.options import PictureOptions, SamplingOptions, SpeedOptions


# torch, transformers and the model are imported in `open_model`: `-h` and typing errors shall not wait for them.
# Here lines are read and answers typed; the model's `chat` and `stream_chat` do the rest.


WELCOME = {
    "zh": "欢迎使用 {} 模型，输入图像URL或本地路径读图，继续输入内容对话，clear 重新开始，stop 终止程序\n"
    "(Type 'clear' to start over, 'stop' to end the program; --english for answers in English only.)",
    "en": "Welcome to the {} model. Enter an image URL or local file path to load an image. Continue "
    "inputting text to engage in a conversation. Type 'clear' to start over, or 'stop' to end the program.",
}
ASK_PICTURE = {
    "zh": "请输入图像路径或URL（回车进入纯文本对话）/ Picture path or URL (Enter: text only)：",
    "en": "Please enter the image path or URL (press Enter for plain text conversation): ",
}
ASK_QUESTION = {"zh": "用户：", "en": "User: "}
ANSWER_LABEL = {"zh": "{}：", "en": "{}: "}
SIZE_OF_6B = (28, 4096)  # layers, hidden size
HOW_TO_LEAVE = "(Type 'stop' or press Ctrl-C again to leave.)"

# Chinese, Japanese and Korean characters, without the punctuation that they share with English vocabularies.
CJK = re.compile(
    "[\u1100-\u11ff\u3005-\u3007\u3040-\u31ff\u3400-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# The first of the three bytes of U+3000 ... U+DFFF: these characters can also be spelled in bytes.
CJK_BYTE = re.compile("<0xE[3-9A-D]>")


ESCAPED = re.compile(r"\\(.)")  # in a path that a shell would read


class Stop(Exception):
    """The user wants to leave."""


TEMPERATURE = number(float, lambda value: 0.001 <= value < math.inf, "0.001 or more (for no randomness use --greedy)")


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions, PictureOptions, SpeedOptions):
    image: str | None = option(
        "picture to begin with; together with --query, print one answer and end", None, metavar="PATH_OR_URL"
    )
    query: str | None = option("question to answer on stdout, without a conversation", None, metavar="TEXT")
    look: Path | None = option("with --query: where the model looked, as a picture to write", None, metavar="FILE.png")
    english: bool = option("answer in English only", False)
    prompt_zh: str = option("first question about each picture", "描述这张图片。", metavar="TEXT")
    prompt_en: str = option("the same with --english", "Describe the image.", metavar="TEXT")
    temperature: float = option("randomness", 0.8, parse=TEMPERATURE, metavar="T", group="answers")
    greedy: bool = option("always take the likeliest token: no randomness", False, group="answers")
    seed: int | None = option(
        "makes the random choices repeatable", None, parse=COUNT_OR_NONE, metavar="N", group="answers"
    )


def english_only_token_ids(vocabulary: dict[str, int]) -> list[int]:
    """Ids of the tokens that can put a Chinese, Japanese or Korean character into an answer."""
    return sorted(token_id for piece, token_id in vocabulary.items() if CJK.search(piece) or CJK_BYTE.fullmatch(piece))


class Typewriter:
    """Types an answer that comes as ever longer versions of itself."""

    def __init__(self):
        self.typed = ""

    def show(self, response: str) -> None:
        """Type what `response` adds; nothing as long as it contradicts what is on the paper already."""
        if response.startswith(self.typed):
            print(printable(response[len(self.typed) :]), end="", flush=True)
            self.typed = response

    def finish(self, response: str) -> None:
        """Complete the line; an answer that did change in its typed part is typed again."""
        if not response.startswith(self.typed):
            print()
            self.typed = ""
        self.show(response)
        print()


@contextlib.contextmanager
def pressed_by_interrupt(button: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set `button`; a second one is a KeyboardInterrupt again."""
    previous = signal.getsignal(signal.SIGINT)

    def press(signal_number, frame):
        button.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def edit_lines() -> None:
    """Give `input` line editing, of Chinese too, and let pasted lines be one question, not one each."""
    with contextlib.suppress(ImportError):  # Windows has its own
        readline = importlib.import_module("readline")
        if "GNU" in readline.__doc__:
            readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off


def read_line(prompt: str) -> str:
    """A stripped line of input.

    Raises:
        Stop: the line is "stop", the input has ended, or Ctrl-C was pressed twice in a row.
    """
    interrupted = False
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            raise Stop from None
        except KeyboardInterrupt:
            print()
            if interrupted:
                raise Stop from None
            interrupted = True
            print(HOW_TO_LEAVE)
            continue
        if line == "stop":
            raise Stop
        return line


def clean_path(text: str) -> str:
    """A path as terminals and file managers paste it: in quotes, with escaped blanks, as a file:// URI, with `~`."""
    if text.lower().startswith("file://"):
        from urllib.parse import urlsplit
        from urllib.request import url2pathname  # takes as long to import as all of `-h`

        return url2pathname(urlsplit(text).path)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif os.name == "posix" and "\\" in text and not os.path.exists(text):
        text = ESCAPED.sub(r"\1", text)
    return os.path.expanduser(text)


def open_source(source: str | None):
    """The picture at a path or an address; None for none. A `ValueError` if it cannot be opened."""
    with heavy_imports():
        from visualglm_hf.fetching import fetch_picture
        from visualglm_hf.image_processing_visualglm import open_picture

    return open_picture(fetch_picture(clean_path(source))) if source else None


def looking_at(picture, looking: dict, model) -> dict:
    """The keywords of `chat` for a picture; a zoom that has nothing to gain from it is left out, and that is said."""
    if picture is None or not looking.get("zoom"):
        return looking
    from visualglm_hf.zooming import zoom_obstacle
    from visualglm_tools.checkpoints.picture_size import image_size_of

    obstacle = zoom_obstacle(picture.size, image_size_of(model.config))
    if obstacle is None:
        return looking
    print(f"({obstacle})", file=sys.stderr)
    return {name: value for name, value in looking.items() if name != "zoom"}


def report_or_stop(error: BaseException, hint: str = "") -> None:
    """One line on stderr that says what went wrong."""
    if isinstance(error, KeyboardInterrupt):
        print("(stopped)", file=sys.stderr)
    else:
        report(f"{error} {hint}")


class Conversation:
    """One picture, or none, and what was said about it; `clear` makes a new one."""

    def __init__(self, model, tokenizer, options: dict, language: str, looking: dict | None = None):
        self.model, self.tokenizer, self.options, self.language = model, tokenizer, options, language
        self.wanted = looking or {}  # keywords of `chat` for pictures
        self.looking = {}  # those for this picture
        self.picture, self.history = None, []

    def choose_picture(self, source: str | None) -> None:
        """Open `source`, or else ask until there is a picture that can be opened, or an empty line for none.

        Raises:
            ValueError: it cannot be opened, and nobody is there to correct it: the next line is a question.
        """
        while True:
            if source is None:
                source = read_line(ASK_PICTURE[self.language])
            try:
                self.picture = open_source(source)
                self.looking = looking_at(self.picture, self.wanted, self.model)
                return
            except (ValueError, KeyboardInterrupt) as error:
                if not sys.stdin.isatty():
                    raise
                report_or_stop(error)
                source = None

    def answer(self, query: str) -> None:
        """Type the answer and remember it; an error is one line and leaves the conversation as it was."""
        import torch

        button = threading.Event()

        def is_pressed(input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), button.is_set(), device=input_ids.device)

        try:
            # The history remembers it from the first answer on, but not its full pixels, which a zoom needs.
            picture = None if self.history and not self.looking.get("zoom") else self.picture
            stream = self.model.stream_chat(
                self.tokenizer,
                picture,
                query,
                history=self.history,
                stopping_criteria=[is_pressed],
                **self.options,
                **(self.looking if picture is not None else {}),
            )
            is_eager = not self.options.get("compile")  # what is compiled or recorded would be anew for a hook
            bar = prompt_bar(self.model) if is_eager else contextlib.nullcontext(lambda: None)
            with contextlib.closing(stream), pressed_by_interrupt(button), bar as end_bar:
                self.show(stream, end_bar)
        except (ValueError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
            report_or_stop(error, "Type 'clear' to start over." if self.history else "")

    def show(self, stream: Iterable, end_bar: Callable[[], None]) -> None:
        typewriter, response, history = Typewriter(), "", self.history
        label = ANSWER_LABEL[self.language].format(name_of(self.model))
        try:
            for shown in stream:
                response, history = shown
                end_bar()
                if label and not self.history and self.looking.get("read_text"):
                    tell_readings(history, sys.stdout)
                print(label, end="", flush=True)
                label = ""
                typewriter.show(stable_part(response))
        finally:
            end_bar()
            print(label, end="")
            typewriter.finish(response)
        if response:  # an answer that was stopped before its first word is no turn
            self.history = history


def tell_readings(history: list, file) -> None:
    """A line for each picture of the last question: what was read in it is not said by the model."""
    from visualglm_hf.conversation import describe_reading, is_english

    query, _ = history[-1]
    for reading in history[-1].readings:
        print(f"[{printable(describe_reading(reading, is_english(query)))}]", file=file, flush=True)


def name_of(model) -> str:
    """VisualGLM-6B, unless the model is of another size: the tiny one shall not be taken for it."""
    config = model.config.text_config
    is_6b = (config.num_hidden_layers, config.hidden_size) == SIZE_OF_6B
    return "VisualGLM-6B" if is_6b else "VisualGLM"


def converse(model, tokenizer, keywords: dict, options: Options) -> None:
    """Talk until the user leaves, which raises `Stop`."""
    edit_lines()
    language = "en" if options.english else "zh"
    first_query = options.prompt_en if options.english else options.prompt_zh
    print(WELCOME[language].format(name_of(model)))
    picture = options.image
    while True:
        conversation = Conversation(model, tokenizer, keywords, language, options.looking())
        conversation.choose_picture(picture)
        picture = None  # only the first conversation is about the option's
        if conversation.picture is not None:
            print(ASK_QUESTION[language] + first_query)
            conversation.answer(first_query)
        while (query := read_line(ASK_QUESTION[language])) != "clear":
            if query:
                conversation.answer(query)


def open_model(options: Options) -> tuple:
    """Load the model, with progress bars but without the libraries' warnings."""
    warnings.filterwarnings("ignore")
    with heavy_imports():
        import torch
        from transformers.utils import logging

        from visualglm_tools.checkpoints.loading import load_model

    logging.set_verbosity_error()
    options.check_compiling()  # a compiler is missing now or not at all
    model, tokenizer = load_model(options.model, **options.loading())
    if options.seed is not None:
        torch.manual_seed(options.seed)
    return model, tokenizer


def answer_keywords(options: Options, tokenizer) -> dict:
    """The keywords of `chat` and `stream_chat`."""
    keywords = {name: getattr(options, name) for name in ("max_length", "top_p", "top_k", "temperature")}
    keywords |= {"do_sample": not options.greedy, "compile": options.compiling()}
    if options.english:
        keywords |= {"english": True, "suppress_tokens": english_only_token_ids(tokenizer.get_vocab())}
    return keywords


def check_look(options: Options) -> None:
    """Raise a `ValueError` for a picture of where the model looks that cannot be made, before the model is loaded."""
    if options.look is None:
        return
    if options.query is None or options.image is None:
        raise ValueError("--look shows where one answer looked. Give --image and --query.")
    if options.zoom:
        raise ValueError("--look shows the whole picture, and --zoom answers from a part of it. Give one of them.")
    if options.look.suffix.lower() != ".png":
        raise ValueError(f"--look must be the name of a .png file, found {str(options.look)!r}.")
    if not options.look.parent.is_dir():
        raise ValueError(f"there is no folder {str(options.look.parent)!r} for {options.look.name!r}.")


def check_picture(options: Options) -> None:
    """Raise a `ValueError` if the one question that is asked has no picture to look at as the options say."""
    if options.query is not None and not options.image and (switches := options.looking_switches()):
        raise ValueError(
            f"{' and '.join(switches)} need a picture, and there is none. Give --image, or leave them out."
        )


def answer_once(model, tokenizer, picture, options: Options, keywords: dict) -> str:
    """The answer to the option's question; with --look, a picture of where it looked, too."""
    looking = looking_at(picture, options.looking(), model)
    if options.look is not None:
        look = model.look(tokenizer, picture, options.query, **keywords, **looking)
        look.overlay().save(behind_links(options.look), "PNG")
        response, history = look.response, look.history
    else:
        response, history = model.chat(tokenizer, picture, options.query, **keywords, **looking)
    if options.read_text:
        tell_readings(history, sys.stderr)  # standard output is for the answer
    return response


def run(options: Options) -> None:
    """Answer one question, or talk until the user leaves; a `ValueError` says why not."""
    options.check()
    check_look(options)
    check_picture(options)
    try:
        options.check_looking()
        picture = open_source(options.image) if options.query is not None else None  # before the model is loaded
        model, tokenizer = open_model(options)
        keywords = answer_keywords(options, tokenizer)
        if options.query is None:
            with contextlib.suppress(Stop):
                converse(model, tokenizer, keywords, options)
        else:
            response = answer_once(model, tokenizer, picture, options, keywords)
            print(printable(response) if sys.stdout.isatty() else response, flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal has shown ^C
        raise
