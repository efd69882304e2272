"""Options as fields of dataclasses: each is declared once, with its default and its help.

    @dataclass(frozen=True, kw_only=True)
    class Options(ModelOptions):
        source: Path = argument("folder with the full weights", metavar="SRC")
        bits: int = option("bits per weight", choices=(4, 8))
        greedy: bool = option("always take the likeliest token", False)

    options = parse(Options, argv, prog="visualglm quantize", description="…")

Parsers (`build_parser`), the tables of the documentation (`describe`) and what a run writes down come from there. An
option is called as its field is, with `-` or with `_`. It is argparse underneath: what typer, tyro and jsonargparse
offer beyond it is not needed here, each takes a tenth of a second and more to import, and their errors fill a screen.

Not here: what the options mean (the commands), and which commands there are (`__main__.py`).
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn


KEY = "option"  # of a field's metadata


@dataclass(frozen=True)
class Option:
    """What a field's metadata says of its option.

    Args:
        help: the rest of a sentence; the default is added to it.
        name: what it is called, without the dashes; as its field, if that is not said.
        names: other names, such as the original's.
        parse: text to value; a `ValueError` says what was expected. None: by the field's type.
        choices: the values there are.
        metavar: what stands for the value in the help.
        group: the title under which it is listed.
        flags: for a field that is set by one of several flags: their names, the value of each, and its help.
        is_positional: whether its place tells what it is, and not a name.
        unset: what the help says where the default is None.
    """

    help: str
    name: str | None = None
    names: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    choices: tuple = ()
    metavar: str | None = None
    group: str | None = None
    flags: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    is_positional: bool = False
    unset: str = ""


def option(help: str, default: Any = MISSING, **details: Any) -> Any:
    """A field that is an option; without a default it must be given. `details` are those of `Option`."""
    return dataclasses.field(default=default, metadata={KEY: Option(help, **details)})


def argument(help: str, default: Any = MISSING, **details: Any) -> Any:
    """A field that is told by its place on the command line."""
    return option(help, default, is_positional=True, **details)


def one_of(flags: Mapping[str, tuple[Any, str]], default: Any, **details: Any) -> Any:
    """A field that is set by one of several flags that exclude each other: {name: (value, help)}."""
    return option("", default, flags=flags, **details)


# ---------------------------------------------------------------- values


def number(kind: type, is_valid: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """A `parse` for numbers: a `kind` that `is_valid`; the error names the value and what was `expected`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, found {text!r}")
        return value

    return parse


COUNT = number(int, lambda value: value >= 1, "a whole number, 1 or more")
COUNT_OR_NONE = number(int, lambda value: value >= 0, "a whole number, 0 or more")
PROBABILITY = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
SHARE = number(float, lambda value: 0 <= value < 1, "from 0 to below 1")
AMOUNT = number(float, lambda value: 0 <= value < math.inf, "0 or more")
POSITIVE = number(float, lambda value: 0 < value < math.inf, "above 0")
PORT = number(int, lambda value: 0 <= value <= 65_535, "a port, 0 to 65535")


# ---------------------------------------------------------------- the parser


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line, and whose options may be spelled with `_`."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args(
            [with_dashes(word) for word in (sys.argv[1:] if args is None else args)], namespace
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} ({self.prog} -h lists the options)\n")


def with_dashes(word: str) -> str:
    """An option's name with `-` in it instead of `_`; anything else as it is."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def build_parser(options: type, prog: str, description: str, usage: str | None = None) -> Parser:
    """A parser for the fields of a dataclass."""
    parser = Parser(
        prog=prog,
        description=description,
        usage=usage,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str | None, Any] = {None: parser}
    for field, details in fields_of(options):
        if details.group not in groups:
            groups[details.group] = parser.add_argument_group(details.group)
        add_field(groups[details.group], field, details, *kind_of(options, field))
    return parser


def parse(options: type, argv: Sequence[str] | None, prog: str, description: str, usage: str | None = None) -> Any:
    """The dataclass as the command line says it; ends the process with one line where that cannot be read."""
    return from_namespace(options, build_parser(options, prog, description, usage).parse_args(argv))


def from_namespace(options: type, namespace: argparse.Namespace) -> Any:
    """The dataclass of what a parser of `build_parser` has read; lists become tuples."""
    read = {field.name: getattr(namespace, field.name) for field, _ in fields_of(options)}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in read.items()})


def fields_of(options: type) -> Iterator[tuple[dataclasses.Field, Option]]:
    """The fields of a dataclass that are options, with what is said of them."""
    for field in dataclasses.fields(options):
        if KEY in field.metadata:
            yield field, field.metadata[KEY]


def kind_of(options: type, field: dataclasses.Field) -> tuple[type, bool]:
    """The type of one value of a field, and whether it has several: `tuple[Path, ...]` is (Path, True)."""
    hint = typing.get_type_hints(options)[field.name] if isinstance(field.type, str) else field.type
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def add_field(target: Any, field: dataclasses.Field, details: Option, kind: type, is_several: bool) -> None:
    """Add what a field stands for to a parser or to one of its groups."""
    has_default = field.default is not MISSING
    if details.flags:
        exclusive = target.add_mutually_exclusive_group(required=not has_default)
        for name, (value, help) in details.flags.items():
            keywords = {"dest": field.name, "action": "store_const", "const": value, "help": escaped(help)}
            exclusive.add_argument(f"--{name}", **keywords, **({"default": field.default} if has_default else {}))
        return
    keywords: dict[str, Any] = {"help": escaped(help_of(field, details))}
    if has_default:
        keywords |= {"default": field.default}
    if kind is bool:
        keywords |= {"action": "store_true"}
    else:
        keywords |= {"type": details.parse or kind, "metavar": details.metavar, "choices": details.choices or None}
        if is_several:
            keywords |= {"nargs": "+"}
    if details.is_positional:
        target.add_argument(field.name, **keywords, **({"nargs": "?"} if has_default else {}))
    else:
        target.add_argument(*names_of(field, details), dest=field.name, required=not has_default, **keywords)


def names_of(field: dataclasses.Field, details: Option) -> list[str]:
    """What an option is called, its own name first."""
    return ["--" + name.replace("_", "-") for name in (details.name or field.name, *details.names)]


def help_of(field: dataclasses.Field, details: Option) -> str:
    """The help with the default, if that says anything."""
    default = default_of(field, details)
    return f"{details.help} (default: {default})".strip() if default else details.help


def escaped(help: str) -> str:
    """Help as argparse takes it, for which % is a placeholder's."""
    return help.replace("%", "%%")


def default_of(field: dataclasses.Field, details: Option) -> str:
    """The default in words; "" where there is none, or where it is that nothing is done."""
    if field.default is MISSING or field.default is False or field.default == ():
        return ""
    if field.default is None:
        return details.unset
    return " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)


# ---------------------------------------------------------------- the documentation


def describe(options: type) -> list[tuple[str, str, str]]:
    """What a table of the options says, row by row: how one is called, its default, its help."""
    rows = []
    for field, details in fields_of(options):
        if details.flags:
            rows += [(f"--{name}", "", help) for name, (_, help) in details.flags.items()]
            continue
        kind, is_several = kind_of(options, field)
        value = details.metavar or ("{" + ",".join(map(str, details.choices)) + "}" if details.choices else "")
        value = "" if kind is bool else value or field.name.upper()
        name = value if details.is_positional else " ".join(filter(None, (", ".join(names_of(field, details)), value)))
        rows.append((f"{name} …" if is_several else name, default_of(field, details), details.help))
    return rows
