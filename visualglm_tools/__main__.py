"""The command `visualglm`: looks up what was asked for, and imports that alone.

A command is a module of `commands/`. It has `Options`, a dataclass of options; `run(options)`, which returns the exit
code or None for 0; its docstring, which is what `-h` says; and, where it needs more packages than the model, `EXTRA`,
what `pip install` calls them. Errors are told here, in one line: bad input and unreadable files end with 2, a reader of
the output that is gone with 1.
"""

import sys


INTERRUPTED = 130  # as shells say it

try:
    import argparse
    import codecs
    import importlib
    import io
    import os
    from collections.abc import Sequence
    from types import ModuleType

    from visualglm_tools.options import Parser, build_parser, from_namespace
    from visualglm_tools.packages import missing
    from visualglm_tools.printing import report
    from visualglm_tools.versions import OWN, version_of
except KeyboardInterrupt:  # a tenth of a second in which nothing has begun
    sys.exit(INTERRUPTED)


COMMANDS = {
    "chat": "talk about a picture in the terminal",
    "serve": "answer over HTTP: OpenAI's API and the original's",
    "web": "a page in the browser",
    "batch": "answer a file of questions",
    "finetune": "train an adapter on your own pictures",
    "merge": "fold an adapter into the weights",
    "convert": "prepare the original's checkpoint, or bring one from or to SAT",
    "quantize": "write a checkpoint in 8 or 4 bits",
    "check": "check a checkpoint, and tell which kernels this machine uses",
    "bench": "measure speed and memory",
    "evaluate": "ask an exam, and judge the answers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; returns its exit code."""
    try:
        if argv is None:
            leave_ascii()
        words = list(sys.argv[1:] if argv is None else argv)
        prepare_streams()
        return run(words)
    except KeyboardInterrupt:
        return INTERRUPTED


def run(words: Sequence[str]) -> int:
    """Run a command, and tell its errors; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        complete(os.environ.get("COMP_LINE", "").split())
    if not words or words[0] not in COMMANDS:
        return list_commands(words)
    command = None
    try:
        check_working_directory()
        command, parser = open_command(words[0])
        return command.run(from_namespace(command.Options, parser.parse_args(words[1:]))) or 0
    except ImportError as error:
        report(missing(str(error.name), *filter(None, [getattr(command, "EXTRA", None)])))
        return 2
    except BrokenPipeError:  # the reader of the output is gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        report(error)
        return 2


def leave_ascii() -> None:
    """Start again in Python's UTF-8 mode where the locale knows ASCII alone: questions and names of files are Chinese.

    Python does so itself in the locale C, unless it is told not to.
    """
    is_ascii = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if os.name == "posix" and is_ascii and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def check_working_directory() -> None:
    """Raise a `ValueError` if it has been deleted: libraries say so in other words, or end the process."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ValueError("the working directory has been deleted; change to one that is there.") from error


def prepare_streams() -> None:
    """Let nothing end because a terminal cannot show Chinese, or because output was closed that nobody will read."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8")  # in which ASCII is the same


def list_commands(words: Sequence[str]) -> int:
    """What there is, where no command was named; returns the exit code, or ends the process as argparse does."""
    parser = list_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        parser.error(f"the command comes before its options, found {words[0]!r} first")
    parser.parse_args(words)  # -h, --version, or an error
    return 0


def open_command(name: str) -> tuple[ModuleType, Parser]:
    """A command's module and its parser."""
    command = importlib.import_module(f"visualglm_tools.commands.{name}")
    return command, build_parser(command.Options, f"visualglm {name}", command.__doc__)


def list_parser() -> Parser:
    """A parser of the command's name alone, which can list them all."""
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:{width}}{what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="visualglm",
        usage="visualglm COMMAND [options]",
        description="VisualGLM-6B on today's transformers: talk about pictures in Chinese and English.",
        epilog=f"commands:\n{listed}\n\nvisualglm COMMAND -h lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=version_of(OWN))
    return parser


def complete(words: Sequence[str]) -> None:
    """Answer a shell that asks what one of these words could become, and end; see argcomplete."""
    import argcomplete

    parser = Parser(prog="visualglm")
    commands = parser.add_subparsers()
    for name, what in COMMANDS.items():
        known = [open_command(name)[1]] if name in words else []
        commands.add_parser(name, help=what, parents=known, add_help=not known)
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    sys.exit(main())
