"""Options as fields: each kind of field is read, refused in one line, and described, as it was declared."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visualglm_tools.options import (
    AMOUNT,
    COUNT,
    COUNT_OR_NONE,
    HOUSE,
    PORT,
    POSITIVE,
    PROBABILITY,
    SHARE,
    argument,
    build_parser,
    describe,
    from_values,
    one_of,
    option,
    parse,
)


@dataclass(frozen=True, kw_only=True)
class Shared:
    top_p: float = option("of the likeliest, 100 % for all", 0.4, parse=PROBABILITY, metavar="P", group="answers")
    folder: Path = option("with the weights", HOUSE / "models" / "tiny", names=("from_pretrained",), group="model")


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    source: Path = argument("what is read", metavar="SRC")
    target: Path | None = argument("what is written", None, metavar="DST", unset="nothing")
    bits: int = option("per weight", choices=(4, 8))
    layers: tuple[int, ...] = option("that are changed", (0, 14), metavar="N")
    allowed_hosts: tuple[str, ...] = option("a name", (), name="allowed_host", metavar="NAME", is_repeated=True)
    greedy: bool = option("no randomness", False)
    seed: int | None = option("of the random numbers", None, parse=COUNT_OR_NONE)
    text: str | None = option("a question", None, metavar="TEXT")
    speed_up: str | None = one_of({"compile": ("compile", "with a compiler"), "record": (None, "100 % faster")}, "slow")
    not_an_option: int = 3


NEEDED = ("here", "--bits", "4")


def read(*words: str, options: type = Options) -> Options:
    return parse(options, words, "visualglm try", "A try.")


def refusal(capsys, *words: str, options: type = Options) -> str:
    """The line that refuses these words."""
    with pytest.raises(SystemExit) as stop:
        read(*words, options=options)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("(visualglm try -h lists the options)")
    return line


def help_of(options: type = Options) -> str:
    """The help as one line."""
    return " ".join(build_parser(options, "visualglm try", "A try, 100 % sure.").format_help().split())


def test_what_is_not_said_has_its_default():
    assert read(*NEEDED) == Options(source=Path("here"), bits=4)


def test_each_kind_of_field_is_read():
    words = "here there --bits 8 --layers 1 2 3 --allowed-host a --allowed-host b --greedy --seed 0 --text a --compile"
    assert read(*words.split(), "--top-p", "1", "--folder", "x") == Options(
        source=Path("here"),
        target=Path("there"),
        bits=8,
        layers=(1, 2, 3),
        allowed_hosts=("a", "b"),
        greedy=True,
        seed=0,
        text="a",
        speed_up="compile",
        top_p=1.0,
        folder=Path("x"),
    )


def test_reading_twice_does_not_gather_what_is_repeated():
    parser = build_parser(Options, "visualglm try", "")
    for _ in range(2):
        assert parser.parse_args([*NEEDED, "--allowed-host", "a"]).allowed_hosts == ["a"]


def test_a_flag_sets_its_value_and_excludes_the_others(capsys):
    assert [read(*NEEDED, *flag).speed_up for flag in ((), ("--compile",), ("--record",))] == ["slow", "compile", None]
    assert "not allowed with argument --compile" in refusal(capsys, *NEEDED, "--compile", "--record")


def test_of_flags_without_a_default_one_must_be_given(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Methods:
        method: str = one_of({"use-lora": ("lora", "LoRA"), "use-ptuning": ("ptuning", "prefixes")})

    assert read("--use_lora", options=Methods).method == "lora"
    assert "one of the arguments --use-lora --use-ptuning is required" in refusal(capsys, options=Methods)
    assert help_of(Methods).startswith("usage: visualglm try (--use-lora | --use-ptuning) [options]")


@pytest.mark.parametrize("name", ["--from_pretrained", "--from-pretrained", "--folder"])
@pytest.mark.parametrize("form", ["{} x_y", "{}=x_y"])
def test_a_name_may_be_spelled_with_underscores_and_other_names_mean_the_same(name, form):
    assert read(*NEEDED, *form.format(name).split()).folder == Path("x_y")


@given(st.text(st.sampled_from("-_=x y"), max_size=8).filter(lambda text: text != "--"))  # argparse drops that
def test_no_value_is_damaged(text):
    assert read(*NEEDED, f"--text={text}").text == text
    assert read("--bits", "4", "--", f"--{text}").source == Path(f"--{text}")


@pytest.mark.parametrize("text", ["--x_y is", "--x_y=a b", "x_y", "_", "-", ""])
def test_a_value_that_only_looks_like_a_name_is_no_name(text):
    assert read(*NEEDED, "--text", text).text == text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--bits", "4"), "the following arguments are required: SRC"),
        (("here",), "the following arguments are required: --bits"),
        (("here", "--bits", "3"), "--bits: invalid choice: 3 (choose from"),
        ((*NEEDED, "--no_such"), "unrecognized arguments: --no_such"),
        ((*NEEDED, "--gree"), "unrecognized arguments: --gree"),  # abbreviations would change with every new option
        ((*NEEDED, "--top_p", "1.5"), "--top-p: must be from 0 to 1, found '1.5'"),
        ((*NEEDED, "--layers"), "--layers: expected at least one argument"),
        ((*NEEDED, "--layers", "one"), "--layers: invalid int value: 'one'"),
        ((*NEEDED, "--seed", "a\nb\x1b[2J"), "found 'a\\nb\\x1b[2J'"),
        ((*NEEDED, "a\nb\x1b[2J"), "unrecognized arguments: a b[2J"),
    ],
)
def test_what_cannot_be_read_is_one_line(capsys, words, complaint):
    assert complaint in refusal(capsys, *words)


@pytest.mark.parametrize("name", ["--seed", "--layers", "--bits"])
def test_a_number_of_thousands_of_digits_is_a_short_line(capsys, name):
    assert len(refusal(capsys, "here", "--bits", "4", name, "9" * 5000)) < 500


@pytest.mark.parametrize(
    ("parse", "taken", "refused"),
    [
        (COUNT, {"1": 1, "9223372036854775807": 2**63 - 1}, ["0", "-1", "1e3", "", "nan", "9223372036854775808"]),
        (COUNT_OR_NONE, {"0": 0, "7": 7}, ["-1", "0.5"]),
        (PROBABILITY, {"0": 0, "1": 1, "0.5": 0.5}, ["1.01", "-0.1", "nan", "inf"]),
        (SHARE, {"0": 0, "0.99": 0.99}, ["1", "nan"]),
        (AMOUNT, {"0": 0, "1e3": 1000}, ["-1", "inf", "nan"]),
        (POSITIVE, {"0.1": 0.1}, ["0", "inf", "nan"]),
        (PORT, {"0": 0, "65535": 65535}, ["65536", "-1", "http"]),
    ],
)
def test_numbers_have_their_limits(capsys, parse, taken, refused):
    @dataclass(frozen=True, kw_only=True)
    class Number:
        value: float = option("a number", 1, parse=parse)

    assert {text: read("--value", text, options=Number).value for text in taken} == taken
    for text in refused:
        assert f"found {text!r}" in refusal(capsys, f"--value={text}", options=Number)
        with pytest.raises(ValueError, match="value: must be"):
            from_values(Number, {"value": text})


def test_help_says_what_must_be_given_and_the_defaults_that_say_something():
    text = help_of()
    assert text.startswith("usage: visualglm try SRC [DST] --bits {4,8} [options] A try, 100 % sure.")
    assert "--top-p P of the likeliest, 100 % for all (default: 0.4)" in text
    assert "--record 100 % faster" in text
    assert "--layers N [N ...] that are changed (default: 0 14)" in text
    assert "DST what is written (default: nothing)" in text
    assert "with the weights (default: models/tiny)" in text  # wherever the house is
    assert "None" not in text and "False" not in text and "()" not in text and "not_an_option" not in text


def test_groups_are_listed_under_their_titles():
    text = help_of()
    assert text.index("options:") < text.index("--bits {4,8} per") < text.index("answers:") < text.index("--top-p P of")
    assert text.index("answers:") < text.index("model:") < text.index("--from-pretrained FOLDER with")


def test_the_description_has_each_option_once_in_the_order_of_the_help():
    assert describe(Options) == [
        ("SRC", "", "what is read"),
        ("DST", "nothing", "what is written"),
        ("--bits {4,8}", "must be given", "per weight"),
        ("--layers N …", "0 14", "that are changed"),
        ("--allowed-host NAME", "", "a name"),
        ("--greedy", "", "no randomness"),
        ("--seed SEED", "", "of the random numbers"),
        ("--text TEXT", "", "a question"),
        ("--compile", "", "with a compiler"),
        ("--record", "", "100 % faster"),
        ("--top-p P", "0.4", "of the likeliest, 100 % for all"),
        ("--folder, --from-pretrained FOLDER", "models/tiny", "with the weights"),
    ]


def test_names_and_values_are_read_as_a_command_line_is():
    values = {"source": "here", "bits": "8", "layers": "1,2", "allowed_hosts": "a,b,", "greedy": "True", "seed": "3"}
    words = "here --bits 8 --layers 1 2 --allowed-host a --allowed-host b --greedy --seed 3 --compile"
    expected = read(*words.split())
    assert from_values(Options, {**values, "speed_up": "compile"}) == expected
    typed = {"source": Path("here"), "bits": 8, "layers": [1, 2], "allowed_hosts": ["a", "b"], "greedy": True}
    assert from_values(Options, {**typed, "seed": 3, "speed_up": "compile", "target": None}) == expected
    assert from_values(Options, {"source": "here", "bits": 4}) == read(*NEEDED)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"no_such": 1}, "there is no option 'no_such'; there are top_p, folder, source"),
        ({"not_an_option": 1}, "there is no option 'not_an_option'"),
        ({"bits": 3}, "bits: must be one of 4, 8, found 3"),
        ({"bits": None}, "bits: invalid literal"),
        ({"layers": "1,one"}, "layers: invalid literal"),
        ({"greedy": "perhaps"}, "greedy: must be one of true, yes, 1, false, no, 0, found 'perhaps'"),
        ({"speed_up": "magic"}, "speed_up: must be one of compile, record, found 'magic'"),
        ({"top_p": 2}, "top_p: must be from 0 to 1, found '2'"),
    ],
)
def test_a_name_or_a_value_that_cannot_be_is_refused(changed, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        from_values(Options, {"source": "here", "bits": 4, **changed})


def test_a_missing_value_is_refused():
    with pytest.raises(ValueError, match="the option 'bits' is missing"):
        from_values(Options, {"source": "here"})
