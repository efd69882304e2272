"""Options as fields of dataclasses: each is declared once, with its default and its help.

    @dataclass(frozen=True, kw_only=True)
    class Options(ModelOptions):
        source: Path = argument("folder with the full weights", metavar="SRC")
        bits: int = option("bits per weight", choices=(4, 8))
        greedy: bool = option("always take the likeliest token", False)

    options = parse(Options, argv, prog="visualglm quantize", description="…")

Parsers (`build_parser`), the tables of the documentation (`describe`, `table`), the command lines of child processes
(`words`) and what a run writes down come from there. An option is called as its field is, with `-` or with `_`. It is
argparse underneath: what typer, tyro and jsonargparse offer beyond it is not needed here, each takes a tenth of a
second and more to import, and their errors fill a screen.

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
        is_repeated: whether it is given once for each of its values, and not once with all of them.
        is_obsolete: whether it is taken for the sake of old command lines alone; the help is why it has no effect.
        unset: what the help says of the default where that is None, or would say too little or too much.
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
    is_repeated: bool = False
    is_obsolete: bool = False
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


def obsolete(reason: str, default: Any = None, **details: Any) -> Any:
    """A field for an option that is taken and has no effect, for a reason that `describe_obsolete` tells."""
    return option(reason, default, is_obsolete=True, **details)


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
        usage=usage or f"%(prog)s {' '.join(needed_words(options))}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str | None, Any] = {None: parser}
    for field, details in fields_of(options):
        if details.group not in groups:
            groups[details.group] = parser.add_argument_group(details.group)
        add_field(groups[details.group], field, details, *kind_of(options, field))
    return parser


def needed_words(options: type) -> list[str]:
    """What a command line has at least, in the help's first line: each option is listed below it."""
    found = []
    for field, details in fields_of(options):
        value = escaped(value_of(field, details))
        if details.is_positional:
            found.append(value if field.default is MISSING else f"[{value}]")
        elif field.default is MISSING:
            names = names_of(field, details)
            found.append(f"({' | '.join(names)})" if details.flags else f"{names[0]} {value}")
    return [*found, "[options]"]


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
            exclusive.add_argument(dashed(name), **keywords, **({"default": field.default} if has_default else {}))
        return
    keywords: dict[str, Any] = {"help": argparse.SUPPRESS if details.is_obsolete else escaped(help_of(field, details))}
    if has_default:
        keywords |= {"default": field.default}
    if kind is bool:
        keywords |= {"action": "store_true"}
    else:
        keywords |= {"type": details.parse or kind, "metavar": details.metavar, "choices": details.choices or None}
        if details.is_repeated:
            keywords |= {"action": "append", "default": list(field.default)}
        elif is_several:
            keywords |= {"nargs": "+"}
    if details.is_positional:
        target.add_argument(field.name, **keywords, **({"nargs": "?"} if has_default else {}))
    else:
        target.add_argument(*names_of(field, details), dest=field.name, required=not has_default, **keywords)


def names_of(field: dataclasses.Field, details: Option) -> list[str]:
    """What an option is called, its own name first; the flags of a field that has several."""
    return [dashed(name) for name in details.flags or (details.name or field.name, *details.names)]


def value_of(field: dataclasses.Field, details: Option) -> str:
    """What stands for the value, where there is one."""
    return details.metavar or (
        "{" + ",".join(map(str, details.choices)) + "}" if details.choices else field.name.upper()
    )


def dashed(name: str) -> str:
    """A name as the command line has it."""
    return "--" + name.replace("_", "-")


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
    if field.default is None or details.unset:
        return details.unset
    return " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)


# ---------------------------------------------------------------- the documentation


def describe(options: type) -> list[tuple[str, str, str]]:
    """What a table of the options says, row by row: how one is called, its default, its help."""
    rows = []
    for field, details in fields_of(options):
        if details.is_obsolete:
            continue
        if details.flags:
            rows += [(dashed(name), "", help) for name, (_, help) in details.flags.items()]
            continue
        kind, is_several = kind_of(options, field)
        value = "" if kind is bool else value_of(field, details)
        name = value if details.is_positional else " ".join(filter(None, (", ".join(names_of(field, details)), value)))
        rows.append((f"{name} …" if is_several else name, default_of(field, details), details.help))
    return rows


def table(options: type) -> str:
    """The options as the documentation shows them, in Markdown."""
    rows = [(f"`{name}`", default and f"`{default}`", help) for name, default, help in describe(options)]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in [("option", "default", ""), ("---",) * 3, *rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


# ---------------------------------------------------------------- what has been read


def part(options: Any, kind: type) -> Any:
    """What a dataclass has of one that it is built on, such as the options that a child process shares."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def is_given(options: Any, name: str) -> bool:
    """Whether an option has another value than its default."""
    return getattr(options, name) != type(options).__dataclass_fields__[name].default


def describe_obsolete(options: Any) -> list[str]:
    """A line for each option that was given and has no effect any more."""
    return [
        f"{names_of(field, details)[0]} has no effect: {details.help}."
        for field, details in fields_of(type(options))
        if details.is_obsolete and is_given(options, field.name)
    ]


def words(options: Any) -> list[str]:
    """The command line that is read as these options; what is as by default is not in it.

    Raises:
        ValueError: a value that no command line has, such as None where the default is a number.
    """
    positional: list[str] = []
    named: list[str] = []
    for field, details in fields_of(type(options)):
        if not is_given(options, field.name):
            continue
        value = getattr(options, field.name)
        if details.is_positional:
            positional += map(str, value if isinstance(value, tuple) else (value,))
        else:
            named += words_of(field, details, value)
    return [*positional, *named]


def words_of(field: dataclasses.Field, details: Option, value: Any) -> list[str]:
    """The command line's words for one option."""
    flags = [name for name, (stored, _) in details.flags.items() if stored == value]
    if flags or value is True:
        return [dashed(flags[0]) if flags else names_of(field, details)[0]]
    if details.flags or value is None or value is False or value == ():
        raise ValueError(f"No command line has the value {value!r} of {names_of(field, details)[0]}.")
    name, values = names_of(field, details)[0], list(map(str, value)) if isinstance(value, tuple) else [str(value)]
    if details.is_repeated or not isinstance(value, tuple):
        return [word for each in values for word in ([f"{name}={each}"] if each.startswith("-") else [name, each])]
    if any(each.startswith("-") for each in values):
        raise ValueError(f"No command line has values of {name} that begin with a dash, as in {' '.join(values)!r}.")
    return [name, *values]
