"""Options declared once: what is read, what is written down, and the command line that says it again."""

from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visualglm_tools.options import (
    COUNT,
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
    table,
    words,
)


@dataclass(frozen=True, kw_only=True)
class Shared:
    source: Path = argument("what is read", metavar="SRC")
    row_count: int = option("rows", 3, parse=COUNT, metavar="N", names=("number_of_rows",))
    files: tuple[Path, ...] = option("more | of it", (), metavar="FILE")
    title: str | None = option("of the page", None, unset="its name")
    is_quiet: bool = option("say nothing", False, name="quiet")
    size: str | None = one_of({"size_s": ("small", "little"), "size_l": ("large", "much")}, None)


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    peers: tuple[str, ...] = option("beside it", (), name="peer", is_repeated=True)
    old_way: bool = obsolete("there is but one way", False)
    old_place: str | None = obsolete("it is found")


def read(*argv: str, kind: type = Options):
    return parse(kind, argv, "program", "")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
SHARED = {
    "source": st.sampled_from([Path("a"), Path("b c")]),
    "row_count": st.integers(1),
    "files": st.lists(st.sampled_from([Path("x_y"), Path("=")])).map(tuple),
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
    "changes", [{"row_count": None}, {"size": "middling"}, {"files": (Path("a"), Path("-b"))}], ids=str
)
def test_what_no_command_line_says_is_refused(changes):
    with pytest.raises(ValueError, match="No command line has"):
        words(Options(source=Path("a"), **changes))


def test_a_part_has_the_values_of_the_whole():
    options = read("a", "--row-count", "4", "--peer", "b")
    assert part(options, Shared) == Shared(source=Path("a"), row_count=4)


def test_a_repeated_option_keeps_all_of_its_values_and_every_run_begins_with_none():
    assert read("a", "--peer", "b", "--peer", "c").peers == ("b", "c")
    assert read("a", "--peer", "d").peers == ("d",)


def test_an_option_is_given_if_it_is_not_as_by_default():
    options = read("a", "--row-count", "3", "--title", "t")
    assert [name for name in ("row_count", "title", "files") if is_given(options, name)] == ["title"]
    assert is_given(options, "source") and not is_given(replace(options, title=None), "title")


def test_either_spelling_and_either_name_of_an_option_will_do():
    assert read("a", "--number_of_rows=7", "--size_s") == read("a", "--row-count", "7", "--size-s")


def test_obsolete_options_are_taken_said_and_not_listed():
    options = read("a", "--old_way", "--old-place=x")
    assert describe_obsolete(options) == [
        "--old-way has no effect: there is but one way.",
        "--old-place has no effect: it is found.",
    ]
    assert describe_obsolete(read("a")) == []
    assert "old" not in build_parser(Options, "program", "").format_help()
    assert not any("old" in name for name, _, _ in describe(Options))


def test_the_helps_first_line_has_what_must_be_there():
    @dataclass(kw_only=True)
    class Needed:
        source: Path = argument("x", metavar="SRC")
        target: Path = argument("x", Path("."), metavar="DST")
        bits: int = option("x", choices=(4, 8))
        how: str = one_of({"by_hand": ("hand", "x"), "by-foot": ("foot", "x")}, MISSING)

    usage = build_parser(Needed, "program", "").format_usage()
    assert usage.strip() == "usage: program SRC [DST] --bits {4,8} (--by-hand | --by-foot) [options]"


def test_the_table_is_markdown_and_survives_a_bar_in_a_text():
    lines = table(Options).splitlines()
    assert all(line.replace(r"\|", "").count("|") == 4 for line in lines)
    assert r"| `--files FILE …` |  | more \| of it |" in lines
    assert "| `--row-count, --number-of-rows N` | `3` | rows |" in lines
