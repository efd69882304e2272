"""Options that were read: the command line that says them again, what others share of them, what has no effect."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visualglm_tools.options import (
    COUNT,
    COUNT_OR_NONE,
    argument,
    build_parser,
    describe,
    describe_obsolete,
    is_given,
    obsolete,
    one_of,
    option,
    parse,
    part,
    words,
)


@dataclass(frozen=True, kw_only=True)
class Shared:
    source: Path = argument("what is read", metavar="SRC")
    row_count: int = option("rows", 3, parse=COUNT, metavar="N", names=("number_of_rows",))
    files: tuple[Path, ...] = option("more of it", (), metavar="FILE")
    answers: int = option("none with 0", 1, parse=COUNT_OR_NONE)
    title: str | None = option("of the page", None, unset="its name")
    is_quiet: bool = option("say nothing", False, name="quiet")
    size: str | None = one_of({"size-s": ("small", "little"), "size-l": ("large", "much")}, None)


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    peers: tuple[str, ...] = option("beside it", (), name="peer", is_repeated=True)
    old_way: bool = obsolete("there is but one way", False)
    old_place: str | None = obsolete("it is found")


def read(*argv: str, kind: type = Options):
    return parse(kind, argv, "program", "")


TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("-=_"), min_size=1).filter(lambda text: text != "--")
SHARED = {
    "source": st.sampled_from([Path("a"), Path("b c"), Path("-d"), Path("--title")]),
    "row_count": st.integers(1, 2**63 - 1),
    "files": st.lists(st.sampled_from([Path("x_y"), Path("=")])).map(tuple),
    "answers": st.integers(0, 2),
    "title": st.none() | TEXT,
    "is_quiet": st.booleans(),
    "size": st.sampled_from([None, "small", "large"]),
}
OPTIONS = st.builds(Options, **SHARED, peers=st.lists(TEXT).map(tuple))


@given(OPTIONS)
def test_options_are_read_again_from_the_words_that_say_them(options):
    assert read(*words(options)) == options


def test_words_leave_out_what_is_as_by_default():
    assert words(Options(source=Path("a"))) == ["a"]
    options = Options(source=Path("a"), row_count=4, is_quiet=True, size="large", peers=("b=c d", "-e"))
    assert words(options) == ["a", "--row-count", "4", "--quiet", "--size-l", "--peer", "b=c d", "--peer=-e"]


@pytest.mark.parametrize(
    "changes",
    [
        {"row_count": None},
        {"is_quiet": None},
        {"size": "middling"},
        {"files": (Path("a"), Path("-b"))},
        {"title": "--"},
    ],
    ids=str,
)
def test_what_no_command_line_says_is_refused(changes):
    with pytest.raises(ValueError, match="No command line has"):
        words(Options(source=Path("a"), **changes))


def test_a_part_has_the_values_of_the_whole():
    options = read("a", "--row-count", "4", "--peer", "b")
    assert part(options, Shared) == Shared(source=Path("a"), row_count=4)


def test_an_option_is_given_if_it_is_not_as_by_default():
    options = read("a", "--row-count", "3", "--title", "t")
    assert [name for name in ("row_count", "title", "files") if is_given(options, name)] == ["title"]
    assert is_given(options, "source") and not is_given(replace(options, title=None), "title")


def test_obsolete_options_are_taken_said_and_not_listed():
    options = read("a", "--old_way", "--old-place=x")
    assert describe_obsolete(options) == [
        "--old-way has no effect: there is but one way.",
        "--old-place has no effect: it is found.",
    ]
    assert describe_obsolete(read("a")) == []
    assert "old" not in build_parser(Options, "program", "").format_help()
    assert not any("old" in name for name, _, _ in describe(Options))
