"""VisualGLM in the terminal: ask about a picture, watch the answer being typed, ask on.

    visualglm chat                                          # asks for a picture, then for questions
    visualglm chat --image photo.jpg --query "图里有什么？"   # prints one answer and ends

In the conversation `clear` starts over and `stop` (or Ctrl-D) ends. Ctrl-C stops an answer; what was shown of it stays
in the conversation as the answer, so that the next question can refer to it. At a prompt, Ctrl-C twice ends.

This door parses options, reads lines and types answers; the model's `chat` and `stream_chat` do the rest.
"""

import argparse
import contextlib
import importlib
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from visualglm_tools.checkpoints.folder import check_folder
from visualglm_tools.commands.options import DEFAULT_MODEL, number
from visualglm_tools.printing import printable, report
from visualglm_tools.serving.engine.text import stable_part


# torch, transformers and the model are imported in `open_model`: `-h` and typing errors shall not wait for them.


WELCOME = {
    "zh": "欢迎使用 VisualGLM-6B 模型，输入图像URL或本地路径读图，继续输入内容对话，clear 重新开始，stop 终止程序\n"
    "(Type 'clear' to start over, 'stop' to end the program; --english for answers in English only.)",
    "en": "Welcome to the VisualGLM-6B model. Enter an image URL or local file path to load an image. Continue "
    "inputting text to engage in a conversation. Type 'clear' to start over, or 'stop' to end the program.",
}
ASK_PICTURE = {
    "zh": "请输入图像路径或URL（回车进入纯文本对话）/ Picture path or URL (Enter: text only)：",
    "en": "Please enter the image path or URL (press Enter for plain text conversation): ",
}
ASK_QUESTION = {"zh": "用户：", "en": "User: "}
ANSWER_LABEL = {"zh": "VisualGLM-6B：", "en": "VisualGLM-6B: "}
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description="Talk with VisualGLM-6B about pictures, in Chinese and English."
    )
    add = parser.add_argument
    tokens = number(int, lambda value: value >= 1, "a whole number of tokens, 1 or more")
    probability = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
    positive = number(float, lambda value: 0 < value < math.inf, "above 0 (for no randomness use --greedy)")
    count = number(int, lambda value: value >= 0, "a whole number, 0 or more")
    seed = number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1")

    add(
        "--model",
        "--from_pretrained",
        "--from-pretrained",
        default=DEFAULT_MODEL,
        type=Path,
        metavar="FOLDER",
        help="checkpoint folder (default: models/visualglm-tiny of this checkout)",
    )
    add("--adapter", type=Path, metavar="FOLDER", help="what finetune_visualglm.py has trained on the checkpoint")
    add("--image", metavar="PATH_OR_URL", help="picture to begin with; together with --query, print one answer and end")
    add("--query", metavar="TEXT", help="question to answer on stdout, without a conversation")
    add("--english", action="store_true", help="answer in English only")
    add(
        "--prompt_zh",
        "--prompt-zh",
        default="描述这张图片。",
        metavar="TEXT",
        help="first question about each picture (default: %(default)s)",
    )
    add(
        "--prompt_en",
        "--prompt-en",
        default="Describe the image.",
        metavar="TEXT",
        help="the same with --english (default: %(default)s)",
    )
    add(
        "--max_length",
        "--max-length",
        type=tokens,
        default=2048,
        metavar="N",
        help="of the whole conversation and the answer, in tokens (default: %(default)s)",
    )
    add(
        "--top_p",
        "--top-p",
        type=probability,
        default=0.4,
        metavar="P",
        help="choose among the likeliest tokens that together have this probability (default: %(default)s)",
    )
    add(
        "--top_k",
        "--top-k",
        type=count,
        default=100,
        metavar="K",
        help="choose among this many likeliest tokens, 0 for all (default: %(default)s)",
    )
    add("--temperature", type=positive, default=0.8, metavar="T", help="randomness (default: %(default)s)")
    add("--greedy", action="store_true", help="always take the likeliest token: no randomness")
    add("--seed", type=seed, metavar="N", help="makes the random choices repeatable")
    add("--quant", type=int, choices=(8, 4), help="quantize the language model to 8 or 4 bits")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="number format; auto: float16, on a CPU float32 if it fits, else bfloat16",
    )
    faster = parser.add_mutually_exclusive_group()
    faster.add_argument(
        "--compile",
        action="store_true",
        help="compile the model for faster answers: the first one waits for the compiler, a minute or more",
    )
    faster.add_argument(
        "--record",
        action="store_true",
        help="on an NVIDIA GPU, record a CUDA graph for each answer: faster, and no wait",
    )
    return parser


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
        return url2pathname(urlsplit(text).path)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif os.name == "posix" and "\\" in text and not os.path.exists(text):
        text = ESCAPED.sub(r"\1", text)
    return os.path.expanduser(text)


def open_source(source: str | None):
    """The picture at a path or an address; None for none. A `ValueError` if it cannot be opened."""
    from visualglm_hf.fetching import fetch_picture
    from visualglm_hf.image_processing_visualglm import open_picture

    return open_picture(fetch_picture(clean_path(source))) if source else None


def report_or_stop(error: BaseException, hint: str = "") -> None:
    """One line on stderr that says what went wrong."""
    if isinstance(error, KeyboardInterrupt):
        print("(stopped)", file=sys.stderr)
    else:
        report(f"{error} {hint}")


class Conversation:
    """One picture, or none, and what was said about it; `clear` makes a new one."""

    def __init__(self, model, tokenizer, options: dict, language: str):
        self.model, self.tokenizer, self.options, self.language = model, tokenizer, options, language
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
            stream = self.model.stream_chat(
                self.tokenizer,
                None if self.history else self.picture,  # the history remembers it from the first answer on
                query,
                history=self.history,
                stopping_criteria=[is_pressed],
                **self.options,
            )
            with contextlib.closing(stream), pressed_by_interrupt(button):
                self.show(stream)
        except (ValueError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
            report_or_stop(error, "Type 'clear' to start over." if self.history else "")

    def show(self, stream: Iterable) -> None:
        typewriter, response, history = Typewriter(), "", self.history
        print(ANSWER_LABEL[self.language], end="", flush=True)
        try:
            for shown in stream:
                response, history = shown
                typewriter.show(stable_part(response))
        finally:
            typewriter.finish(response)
        if response:  # an answer that was stopped before its first word is no turn
            self.history = history


def converse(model, tokenizer, options: dict, arguments: argparse.Namespace) -> None:
    """Talk until the user leaves, which raises `Stop`."""
    edit_lines()
    language = "en" if arguments.english else "zh"
    first_query = arguments.prompt_en if arguments.english else arguments.prompt_zh
    print(WELCOME[language])
    picture = arguments.image
    while True:
        conversation = Conversation(model, tokenizer, options, language)
        conversation.choose_picture(picture)
        picture = None  # only the first conversation is about the option's
        if conversation.picture is not None:
            print(ASK_QUESTION[language] + first_query)
            conversation.answer(first_query)
        while (query := read_line(ASK_QUESTION[language])) != "clear":
            if query:
                conversation.answer(query)


def open_model(arguments: argparse.Namespace) -> tuple:
    """Load the model, with progress bars but without the libraries' warnings."""
    warnings.filterwarnings("ignore")
    import torch
    from transformers.utils import logging

    from visualglm_hf.compilation import resolve_compile_config
    from visualglm_tools.checkpoints.loading import choose_device, load_model

    logging.set_verbosity_error()
    compile = choose_compilation(arguments)
    if compile:
        resolve_compile_config(compile, choose_device(arguments.device))  # a compiler is missing now or not at all
    model, tokenizer = load_model(
        arguments.model, arguments.device, arguments.dtype, arguments.quant, arguments.adapter
    )
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    return model, tokenizer


def choose_compilation(arguments: argparse.Namespace):
    """What `chat` takes as `compile`: a bool, or a CompileConfig of transformers."""
    if not arguments.record:
        return arguments.compile
    from transformers import CompileConfig

    from visualglm_hf.compilation import GRAPHS_ALONE

    return CompileConfig(backend=GRAPHS_ALONE)


def answer_options(arguments: argparse.Namespace, tokenizer) -> dict:
    """The keywords of `chat` and `stream_chat`."""
    options = {
        "max_length": arguments.max_length,
        "do_sample": not arguments.greedy,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "temperature": arguments.temperature,
        "compile": choose_compilation(arguments),
    }
    if arguments.english:
        options.update(english=True, suppress_tokens=english_only_token_ids(tokenizer.get_vocab()))
    return options


def run(arguments: argparse.Namespace) -> None:
    check_folder(arguments.model)
    picture = open_source(arguments.image) if arguments.query is not None else None  # before the model is loaded
    model, tokenizer = open_model(arguments)
    options = answer_options(arguments, tokenizer)
    if arguments.query is None:
        with contextlib.suppress(Stop):
            converse(model, tokenizer, options, arguments)
    else:
        response, _ = model.chat(tokenizer, picture, arguments.query, **options)
        print(printable(response) if sys.stdout.isatty() else response, flush=True)


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show Chinese shall not end the conversation
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except ValueError as error:
        report(error)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130  # as shells say it
    except BrokenPipeError:  # the reader of the answer is gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
