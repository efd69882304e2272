"""Answers that must be JSON: every complete one is what its schema says, and no schema costs others their time."""

import contextlib
import json
import random
import sys
import time

import jsonschema
import pytest
import torch

from tests.commands import SECONDS
from tests.serving_helpers import nested_schema
from visualglm_tools.serving.engine import grammar
from visualglm_tools.serving.engine.grammar import ANY_OBJECT, GrammarCompiler, GrammarTooComplex, check_schema
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.engine.vocabulary import Vocabulary


pytest.importorskip("llguidance", reason="needs pip install 'visualglm-hf[json]'")

WORDS = ("颜色", "shape", "数量", "a b", 'quoted "word"', "x\ny", "\\", "🙂")


@pytest.fixture(scope="module")
def compiler(loaded):
    model, tokenizer = loaded
    return GrammarCompiler(Vocabulary(tokenizer), model.config.text_config.eos_token_id)


@pytest.fixture(scope="module")
def prompt(engine):
    return engine.prepare([{"role": "user", "content": "你好"}])


def random_schema(choice: random.Random, depth: int = 0) -> dict:
    """A schema of bounded texts, lists and numbers: a model that has learned no JSON would not end others."""
    kinds = ["text", "pattern", "date", "integer", "number", "enum", "const", "boolean", "null"]
    kind = choice.choice(kinds if depth >= 3 else [*kinds, "any of", "list", "tuple", *["object"] * 4])

    def below() -> dict:
        return random_schema(choice, depth + 1)

    if kind == "object":
        names = choice.sample(WORDS, choice.randint(0, 4))
        schema = {"type": "object", "properties": {name: below() for name in names}, "additionalProperties": False}
        return {**schema, "required": [name for name in names if choice.random() < 0.7]}
    if kind == "list":
        least = choice.randint(0, 2)
        return {"type": "array", "items": below(), "minItems": least, "maxItems": least + choice.randint(0, 2)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [below(), below()], "items": False, "minItems": 2}
    if kind == "any of":
        return {"anyOf": [below(), below()]}
    if kind == "integer":
        least = choice.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + choice.randint(0, 1000)}
    return {
        "text": {"type": "string", "minLength": choice.randint(0, 2), "maxLength": choice.randint(2, 8)},
        "pattern": {"type": "string", "pattern": choice.choice(["^[a-f]{2,4}$", "^[红绿蓝]色$", r"^\d+:\d\d?$"])},
        "date": {"type": "string", "format": "date"},
        "number": {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.25},
        "enum": {"enum": choice.sample([*WORDS, 1, 2.5, None, True, [1, "a"], {"b": []}], 3)},
        "const": {"const": choice.choice(WORDS)},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
    }[kind]


@pytest.mark.parametrize("number", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_every_complete_answer_is_what_its_random_schema_says_beside_rows_without_one(engine, compiler, prompt, number):
    choice, plain = random.Random(number), Settings(seed=3, temperature=1.5, top_p=1, max_new_tokens=60)
    alone = engine.submit(prompt, plain).result(SECONDS).text
    complete = 0
    for begin in range(0, number, 50):
        schemas = [random_schema(choice) for _ in range(min(50, number - begin))]
        answers = []
        for index, schema in enumerate(schemas):
            how = choice.choice([{"temperature": 0}, {"temperature": 1}, {"temperature": 2, "top_p": 1, "top_k": 0}])
            how |= {"seed": index, "repetition_penalty": choice.choice([1, 1.2]), "max_new_tokens": 300}
            answers.append(engine.submit(prompt, Settings(grammar=compiler.compile(schema), **how)))
        beside = [engine.submit(prompt, plain) for _ in range(5)]
        for schema, answer in zip(schemas, answers, strict=True):
            completion = answer.result(SECONDS)
            if completion.finish_reason == "stop":
                found = json.loads(completion.text)
                jsonschema.validate(found, schema, format_checker=jsonschema.FormatChecker())
                complete += 1
            else:
                assert (completion.finish_reason, completion.completion_tokens) == ("length", 300)
        assert {answer.result(SECONDS).text for answer in beside} == {alone}
    assert complete > 0.95 * number


DATE = {"type": "string", "format": "date"}


@pytest.mark.parametrize(
    "schema",
    [
        DATE,
        DATE | {"pattern": "9$"},
        {"format": "date-time", "type": ["string", "null"]},
        {"$defs": {"default": DATE}, "$ref": "#/$defs/default"},
        {"anyOf": [{"type": "null"}, DATE | {"pattern": "29$", "allOf": [{"minLength": 10}]}]},
    ],
    ids=str,
)
def test_a_date_is_a_day_that_exists(compiler, schema):
    days = {"2024-02-29": True, "2023-02-29": False, "1900-02-29": False, "2000-02-29": True, "0000-12-29": False}
    days |= {"8179-02-29": False, "2023-12-29": True, "0004-02-29": True, "2023-01-29": True}
    time = "T23:59:59Z" if schema.get("format") == "date-time" else ""
    masked = compiler.compile(schema)
    for day, exists in days.items():
        matcher = masked.matcher.deep_copy()
        text = json.dumps(day + time).encode()
        tokens = [compiler.vocabulary.token_bytes.index(text[index : index + 1]) for index in range(len(text))]
        assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == exists, day


def test_what_a_schema_gives_as_a_value_is_no_part_of_it(compiler):
    value = {"format": "date", "properties": {"x": DATE}}
    schema = {"enum": [value], "default": value}
    assert json.loads(check_schema(schema)) | schema == json.loads(check_schema(schema))


def test_exactly_the_tokens_may_come_with_which_the_text_can_still_become_an_allowed_one(compiler):
    vocabulary, values = compiler.vocabulary, ["红色", "red", "re d", 12, {"a": [True, None]}]
    texts = [begin + json.dumps(value, ensure_ascii=False) for value in values for begin in ("", " ")]
    masked, choice = compiler.compile({"enum": values}), random.Random(0)
    for _ in range(20):
        row, tokens = masked.start(0), [0]
        row.read = 1  # no prompt
        while True:
            begun = vocabulary.bytes_of(tokens[1:], is_begin=False)
            expected = {
                index
                for index, text in enumerate(vocabulary.token_bytes)
                if text and index not in vocabulary.control_ids
                if any(each.encode().startswith(begun + text) for each in texts)
            }
            expected |= {compiler.eos_token_id} if begun.decode(errors="replace") in texts else set()
            scores = row(torch.tensor([tokens]), torch.zeros(1, len(vocabulary)))
            assert set(scores[0].isfinite().nonzero().flatten().tolist()) == expected
            tokens.append(choice.choice(sorted(expected)))
            if tokens[-1] == compiler.eos_token_id:
                break


def test_no_blanks_stand_between_the_parts_but_those_of_json_dumps(engine, compiler, prompt):
    layout = {"x-guidance": {"whitespace_flexible": True}}  # a client's own wish
    schema = {"type": "array", "items": {"enum": [1, {"a": 2}]}, "minItems": 3, "maxItems": 5, **layout}
    for seed in range(5):
        hot = Settings(grammar=compiler.compile(schema), seed=seed, temperature=2, top_p=1, top_k=0)
        text = engine.submit(prompt, hot).result(SECONDS).text
        assert text == json.dumps(json.loads(text))


def test_an_answer_that_must_be_json_is_not_cleaned_up_and_streams_as_it_is(engine, compiler, prompt):
    schema = {"const": {"颜色,是": "红 .色! [[训练时间]] n't"}}
    constrained = Settings(grammar=compiler.compile(schema), temperature=0)
    answer = engine.submit(prompt, constrained)
    shown = list(answer)
    assert shown[-1] == answer.result().text == json.dumps(schema["const"], ensure_ascii=False)
    assert all(shown[-1].startswith(text) for text in shown) and len(shown) > 5


def test_a_limit_ends_json_in_the_middle_and_a_minimum_does_not_go_beyond_its_end(engine, compiler, prompt):
    schema = {"const": "很长的一句话"}
    cut = engine.submit(prompt, Settings(grammar=compiler.compile(schema), max_new_tokens=3)).result(SECONDS)
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 3)
    assert json.dumps(schema["const"], ensure_ascii=False).startswith(cut.text)
    longer = Settings(grammar=compiler.compile(schema), min_new_tokens=200)
    whole = engine.submit(prompt, longer).result(SECONDS)
    assert (whole.finish_reason, json.loads(whole.text)) == ("stop", schema["const"])


def test_several_answers_follow_one_grammar_each_for_itself(engine, compiler, prompt):
    shared = compiler.compile({"enum": ["红色", "绿色", "蓝色", "a"]})
    settings = [Settings(grammar=shared, seed=seed, temperature=2, top_p=1, top_k=0) for seed in range(8)]
    texts = [answer.result(SECONDS).text for answer in engine.submit_all(prompt, settings)]
    assert {json.loads(text) for text in texts} <= {"红色", "绿色", "蓝色", "a"} and len(set(texts)) > 1


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "string", "pattern": "(["}, "used: unclosed character class"),
        ({"type": "string", "pattern": "a(?=b)"}, "used: look-around, including look-ahead"),
        ({"$ref": "http://127.0.0.1:1/x"}, "does not fetch"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"const": float("nan")}, "cannot be used"),
        ({"const": "\ud800"}, "cannot be used"),
    ],
    ids=str,
)
def test_a_bad_schema_is_refused_with_what_is_wrong(compiler, schema, found):
    with pytest.raises(ValueError, match=found):
        compiler.compile(schema)


COSTLY = {
    "too long": ({"enum": ["x" * 40_000]}, "characters"),
    "too many": ({"enum": list(range(40_000))}, "values"),
    "too deep": (nested_schema(40), "deep"),
    "many patterns": ({"allOf": [{"pattern": f".*a.{{{index}}}b"} for index in range(9)]}, "9 different patterns"),
    "long patterns": ({"pattern": "a?" * 600}, "1200 characters"),
    "patterns of names": ({"patternProperties": {f"{index}.*": {} for index in range(9)}}, "9 different patterns"),
    "many remainders": ({"allOf": [{"multipleOf": each} for each in (97, 89, 83)]}, "multipleOf"),
    "one large remainder": ({"type": "number", "multipleOf": 1.000003}, "multipleOf"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_schema_that_would_cost_others_their_time_is_refused_before_it_is_compiled(name, monkeypatch):
    schema, found = COSTLY[name]
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=found):
        check_schema(schema)


def test_what_passes_the_bounds_is_compiled_soon(compiler):
    patterns = [{"type": "string", "pattern": f".*a.{{{20 + index}}}b"} for index in range(8)]
    deep = nested_schema(10)
    for schema in (
        {"allOf": patterns},
        {"anyOf": patterns},
        {"type": "integer", "multipleOf": 9973},
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "maxItems": 10**6, "items": deep}},
        {"type": "string", "minLength": 10**6, "maxLength": 10**9},
        {"type": "object", "properties": {f"p{index}": {"type": "integer"} for index in range(500)}},
    ):
        begin = time.process_time()
        with contextlib.suppress(ValueError):
            compiler.compile(schema).start(0).allowed()
        assert time.process_time() - begin < 2  # of a processor; others have theirs


def test_a_schema_that_turns_out_too_complex_fails_its_row_alone(engine, compiler, prompt, monkeypatch):
    monkeypatch.setitem(grammar.LIMITS, "step_lexer_fuel", 10)
    monkeypatch.setitem(grammar.LIMITS, "step_max_items", 1)
    beside = engine.submit(prompt, Settings(temperature=0))
    with pytest.raises(GrammarTooComplex, match="too complex"):
        engine.submit(prompt, Settings(grammar=compiler.compile(ANY_OBJECT))).result(SECONDS)
    assert beside.result(SECONDS).text


def test_without_llguidance_the_remedy_is_said(compiler, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'visualglm-hf\[json\]'"):
        compiler.compile(ANY_OBJECT)
