"""Options as fields of dataclasses: each is declared once, with its default and its help.

    @dataclass(frozen=True, kw_only=True)
    class Options(ModelOptions):
        source: Path = argument("folder with the full weights", metavar="SRC")
        bits: int = option("bits per weight", choices=(4, 8))
        greedy: bool = option("always take the likeliest token", False)

    options = parse(Options, argv, prog="visualglm quantize", description="…")

Parsers (`build_parser`), the tables of the documentation (`describe`), options as names and values (`from_values`),
the command lines of child processes (`words`) and what a run writes down come from there. An option is called as its
field is, with `-` or with `_`. It is argparse underneath: what typer, tyro and jsonargparse offer beyond it is not
needed here, each takes a tenth of a second and more to import, and their errors fill a screen.

Not here: what the options mean (the commands), and which commands there are (`__main__.py`).
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NoReturn

from visualglm_tools.printing import one_line, shortened


KEY = "option"  # of a field's metadata
HOUSE = Path(__file__).resolve().parents[1]  # defaults in it are shown as seen from there
LONGEST_VALUE, LONGEST_ERROR = 60, 400  # characters
TOO_LARGE = 2**63  # for the integers of torch
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Option:
    """What a field's metadata says of its option.

    Args:
        help: the rest of a sentence; the default is added to it.
        name: what it is called, without the dashes; as its field, if that is not said.
        names: other names, such as the original's.
        parse: text to value; an `argparse.ArgumentTypeError` says what was expected. None: by the field's type.
        choices: the values there are.
        metavar: what stands for the value in the help.
        group: the title under which it is listed.
        flags: for a field that is set by one of several flags: their names, the value of each, and its help.
        is_positional: whether its place tells what it is, and not a name.
        is_repeated: of a field with several values: whether each has the option's name before it, not all of them once.
        is_obsolete: whether it is taken for the sake of old command lines alone; the help is why it has no effect.
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
    is_repeated: bool = False
    is_obsolete: bool = False
    unset: str = ""


def option(help: str, default: Any = MISSING, **details: Any) -> Any:
    """A field that is an option; without a default it must be given. `details` are those of `Option`."""
    return dataclasses.field(default=default, metadata={KEY: Option(help, **details)})


def argument(help: str, default: Any = MISSING, **details: Any) -> Any:
    """A field that is told by its place on the command line."""
    return option(help, default, is_positional=True, **details)


def one_of(flags: Mapping[str, tuple[Any, str]], default: Any = MISSING, **details: Any) -> Any:
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
            raise argparse.ArgumentTypeError(f"must be {expected}, found {shortened(text, LONGEST_VALUE)!r}")
        return value

    return parse


def path(text: str) -> Path:
    """A `parse` for paths: an empty text would mean the folder one stands in."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, found an empty text")
    return Path(text)


COUNT = number(int, lambda value: 1 <= value < TOO_LARGE, "a whole number, 1 or more, below 2**63")
COUNT_OR_NONE = number(int, lambda value: 0 <= value < TOO_LARGE, "a whole number, 0 or more, below 2**63")
PROBABILITY = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
SHARE = number(float, lambda value: 0 <= value < 1, "from 0 to below 1")
AMOUNT = number(float, lambda value: 0 <= value < math.inf, "0 or more")
POSITIVE = number(float, lambda value: 0 < value < math.inf, "above 0")
PORT = number(int, lambda value: 0 <= value <= 65_535, "a port, 0 to 65535")


# ---------------------------------------------------------------- the parser


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line, and whose options may be spelled with `_`."""

    option_names: frozenset[str] = frozenset()  # with their dashes

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)  # no word after it is an option
        return super().parse_known_args([*map(self.with_dashes, words[:end]), *words[end:]], namespace)

    def with_dashes(self, word: str) -> str:
        """The name of one of our options with `-` in it instead of `_`; anything else, such as a value, as it is."""
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        return name + equals + value if name in self.option_names else word

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {shortened(one_line(message), LONGEST_ERROR)} ({self.prog} -h lists the options)\n")


def build_parser(options: type, prog: str, description: str, usage: str | None = None) -> Parser:
    """A parser for the fields of a dataclass."""
    parser = Parser(
        prog=prog,
        description=description,
        usage=escaped(usage or usage_of(options, prog)),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.option_names = frozenset(name for each in fields_of(options) for name in names_of(*each))
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


def from_values(options: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of names and values, which may be texts; several are one text with commas.

    Raises:
        ValueError: a name that is no option's, one that is missing, or a value that it cannot have.
    """
    fields = {field.name: (field, details) for field, details in fields_of(options)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"there is no option {unknown[0]!r}; there are {', '.join(fields)}.")
    needed = {name for name, (field, _) in fields.items() if field.default is MISSING}
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"the option {missing[0]!r} is missing.")
    read = {}
    for name, value in values.items():
        try:
            read[name] = read_value(options, *fields[name], value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{name}: {error}") from error
    return options(**read)


def read_value(options: type, field: dataclasses.Field, details: Option, value: Any) -> Any:
    """One value of `from_values`; a `ValueError` says what was expected."""
    if value is None and field.default is None:
        return None
    kind, is_several = kind_of(options, field)
    if is_several:
        texts = value.split(",") if isinstance(value, str) else map(str, value)
        return tuple(read_text(kind, details, text) for text in texts if text)
    return read_text(kind, details, str(value))


def read_text(kind: type, details: Option, text: str) -> Any:
    """A text as one value of a field."""
    if kind is bool or details.flags:
        known = TRUTHS if kind is bool else {name: value for name, (value, _) in details.flags.items()}
        return known[checked(text.lower(), known)]
    value = parse_of(kind, details)(text)
    return checked(value, details.choices) if details.choices else value


def checked(value: Any, choices: Collection) -> Any:
    """`value`, if it is one of these."""
    if value not in choices:
        raise ValueError(f"must be one of {', '.join(map(str, choices))}, found {value!r}")
    return value


def kind_of(options: type, field: dataclasses.Field) -> tuple[type, bool]:
    """The type of one value of a field, and whether it has several: `tuple[Path, ...]` is (Path, True)."""
    hint = typing.get_type_hints(options)[field.name] if isinstance(field.type, str) else field.type
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def parse_of(kind: type, details: Option) -> Callable[[str], Any]:
    """What makes a value of a text."""
    return details.parse or (path if kind is Path else kind)


def add_field(target: Any, field: dataclasses.Field, details: Option, kind: type, is_several: bool) -> None:
    """Add what a field stands for to a parser or to one of its groups."""
    has_default = field.default is not MISSING
    if details.flags:
        exclusive = target.add_mutually_exclusive_group(required=not has_default)
        for name, (value, help) in details.flags.items():
            keywords = {"dest": field.name, "action": "store_const", "const": value, "help": escaped(help)}
            exclusive.add_argument(f"--{name}", **keywords, **({"default": field.default} if has_default else {}))
        return
    keywords: dict[str, Any] = {"help": argparse.SUPPRESS if details.is_obsolete else escaped(help_of(field, details))}
    if has_default:
        keywords |= {"default": list(field.default) if details.is_repeated else field.default}
    if kind is bool:
        keywords |= {"action": "store_true"}
    else:
        keywords |= {
            "type": parse_of(kind, details),
            "metavar": details.metavar,
            "choices": details.choices or None,
        }
        if details.is_repeated:
            keywords |= {"action": "append"}
        elif is_several:
            keywords |= {"nargs": "+"}
    if details.is_positional:
        target.add_argument(field.name, **keywords, **({"nargs": "?"} if has_default else {}))
    else:
        target.add_argument(*names_of(field, details), dest=field.name, required=not has_default, **keywords)


def names_of(field: dataclasses.Field, details: Option) -> list[str]:
    """What an option is called, its own name first; of one that is set by flags, these."""
    return ["--" + name.replace("_", "-") for name in details.flags or (details.name or field.name, *details.names)]


def help_of(field: dataclasses.Field, details: Option) -> str:
    """The help with the default, if that says anything."""
    default = default_of(field, details)
    return f"{details.help} (default: {default})".strip() if default else details.help


def escaped(text: str) -> str:
    """Text as argparse takes it, for which % is a placeholder's."""
    return text.replace("%", "%%")


def default_of(field: dataclasses.Field, details: Option) -> str:
    """The default in words; "" where there is none, or where it is that nothing is done."""
    if field.default is MISSING or field.default is False or field.default == ():
        return ""
    if field.default is None:
        return details.unset
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    return " ".join(map(shown, values))


def shown(value: Any) -> str:
    """A value in words; a path of the house wherever the house is."""
    return str(value.relative_to(HOUSE) if isinstance(value, Path) and value.is_relative_to(HOUSE) else value)


def usage_of(options: type, prog: str) -> str:
    """What must be given, and that there is more: `visualglm quantize SRC DST --bits {4,8} [options]`."""
    places, names = [], []
    for field, details in fields_of(options):
        is_needed = field.default is MISSING
        value = placeholder(options, field, details)
        if details.is_positional:
            places.append(value if is_needed else f"[{value}]")
        elif details.flags and is_needed:
            names.append(f"({' | '.join('--' + name for name in details.flags)})")
        elif is_needed:
            names.append(f"{names_of(field, details)[0]} {value}")
    return " ".join((prog, *places, *names, "[options]"))


def placeholder(options: type, field: dataclasses.Field, details: Option) -> str:
    """What stands for the value in a usage: `N`, `{4,8}`, `FILE …`; "" for a flag."""
    kind, is_several = kind_of(options, field)
    if kind is bool or details.flags:
        return ""
    of_choices = "{" + ",".join(map(str, details.choices)) + "}" if details.choices else field.name.upper()
    return (details.metavar or of_choices) + " …" * (is_several and not details.is_repeated)


# ---------------------------------------------------------------- the documentation


def describe(options: type) -> list[tuple[str, str, str]]:
    """What a table of the options says, in the order of the help: how one is called, its default, its help."""
    rows = []
    groups = list(dict.fromkeys((None, *(details.group for _, details in fields_of(options)))))
    for field, details in sorted(
        fields_of(options), key=lambda each: (not each[1].is_positional, groups.index(each[1].group))
    ):
        if details.is_obsolete:
            continue
        if details.flags:
            rows += [(f"--{name}", "", help) for name, (_, help) in details.flags.items()]
            continue
        value = placeholder(options, field, details)
        names = [] if details.is_positional else [", ".join(names_of(field, details))]
        is_needed = field.default is MISSING and not details.is_positional
        default = "must be given" if is_needed else default_of(field, details)
        rows.append((" ".join(filter(None, (*names, value))), default, details.help))
    return rows


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
    places, named = [], []
    for field, details in fields_of(type(options)):
        if is_given(options, field.name):
            value = getattr(options, field.name)
            if details.is_positional:
                places.append(str(value))
            else:
                named += words_of(field, details, value)
    return [*named, "--", *places] if any(word.startswith("-") for word in places) else [*places, *named]


def words_of(field: dataclasses.Field, details: Option, value: Any) -> list[str]:
    """The command line's words for one option."""
    names = names_of(field, details)
    if details.flags:
        names = [name for name, (stored, _) in zip(names, details.flags.values(), strict=True) if stored == value]
    if names and (details.flags or value is True):
        return names[:1]
    values = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
    is_apart = details.is_repeated or not isinstance(value, tuple)  # each value has the name before it
    begins_with_dash = any(each.startswith("-") for each in values)
    if (
        not names
        or value is None
        or value is False
        or not values
        or "--" in values  # argparse drops that
        or (begins_with_dash and not is_apart)
    ):
        raise ValueError(f"No command line has the value {value!r} of {field.name}.")
    if is_apart:
        return [word for each in values for word in ([f"{names[0]}={each}"] if each[:1] == "-" else [names[0], each])]
    return [names[0], *values]
