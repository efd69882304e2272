"""Answers that are JSON, and JSON of a schema: which tokens may come next, as one more logits processor of a row.

A schema is what a stranger wrote, so it is bounded before llguidance sees it, and llguidance by its own limits after.
Not here: how the other tokens are chosen among (`sampling.py`).
"""

import asyncio
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers.generation import LogitsProcessor

from visualglm_tools.packages import missing
from visualglm_tools.serving.engine.vocabulary import Vocabulary


ANY_OBJECT = {"type": "object"}
MAX_CHARACTERS = 32_768  # of a schema
MAX_DEPTH = 32
MAX_PATTERNS = 8  # of a schema, different formats among them: where one text must match all, they are multiplied
MAX_PATTERN_CHARACTERS = 1000  # of all of them together
MAX_REMAINDERS = 10_000  # least common multiple of all `multipleOf`: each remainder is a state, of some microseconds
# Nothing between the parts of JSON but what `json.dumps` writes: a model could go on with blanks for ever.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# llguidance's dates have a 29th of February in every year, and a year 0, which are no dates to those who read them.
YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
DAYS_THAT_EXIST = f"^(?:{YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01][0-9]|2[0-8]))|{LEAP_YEAR}-02-29)"
FORMATS_OF_DAYS = ("date", "date-time")
VALUES, NAMED = ("const", "default", "enum", "examples"), ("$defs", "definitions", "patternProperties", "properties")
# What llguidance may spend; its own limits allow a second for each token, and half a gigabyte.
LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_items_in_row": 1_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
# Each token that fits may come, however the tokenizer would cut the text; before the first word it has a blank.
GRAMMAR = '%llguidance {{"no_forcing": true}}\nstart: / ?/ json\njson: %json {}'


class GrammarTooComplex(ValueError):
    """A schema that takes too long to follow, found out while an answer follows it."""


class Grammar:
    """What an answer must be; made by `GrammarCompiler.compile`, and followed by any number of answers."""

    def __init__(self, matcher, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def start(self, prompt_length: int) -> "GrammarMask":
        """What one answer behind a prompt of so many tokens needs to follow it."""
        return GrammarMask(self.matcher.deep_copy(), prompt_length, self.vocab_size)


class GrammarMask(LogitsProcessor):
    """Leaves one row the tokens with which its answer still can become what it must be.

    Args:
        matcher: of llguidance, at the beginning.
        prompt_length: tokens before the answer.
        vocab_size: of the tokenizer.
    """

    def __init__(self, matcher, prompt_length: int, vocab_size: int):
        self.matcher, self.read, self.vocab_size = matcher, prompt_length, vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for token_id in input_ids[0, self.read :].tolist():
            self.matcher.consume_token(token_id)
        self.read = input_ids.shape[1]
        allowed = self.allowed().to(scores.device)
        masked = scores.masked_fill(~allowed, -torch.inf)
        if masked.isneginf().all():  # the end, which other settings forbid: there is nothing else
            return torch.zeros_like(scores).masked_fill_(~allowed, -torch.inf)
        return masked

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, [V]; a `GrammarTooComplex` if that takes too long to say."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise GrammarTooComplex(f"The schema is too complex to be followed: {told(self.matcher.get_error())}.")
        return torch.from_numpy(np.unpackbits(bits, count=self.vocab_size, bitorder="little")).bool()


class GrammarCompiler:
    """Makes grammars of schemas for one vocabulary; what llguidance needs of it is computed once, for the first.

    Args:
        vocabulary: of the model.
        eos_token_id: ends an answer.
    """

    def __init__(self, vocabulary: Vocabulary, eos_token_id: int):
        self.vocabulary, self.eos_token_id = vocabulary, eos_token_id
        self.thread = ThreadPoolExecutor(1, "grammars")  # one by one, so that they leave others their time

    @cached_property
    def tokenizer(self):
        """The vocabulary as llguidance wants it."""
        llguidance = load_llguidance()
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens(self.vocabulary, self.eos_token_id)))

    def compile(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of all JSON that `schema` allows, in milliseconds; not in an event loop.

        Raises:
            ValueError: llguidance is missing; a schema that is too large, is none, or says what cannot be held to.
        """
        llguidance = load_llguidance()
        text = check_schema(schema)
        source = llguidance.LLMatcher.grammar_from_lark(GRAMMAR.format(text))
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self.tokenizer, source, limits=limits, log_level=0)
        if matcher.is_error():
            raise ValueError(f"The schema cannot be used: {told(matcher.get_error())}.")
        return Grammar(matcher, len(self.vocabulary))

    async def compile_async(self, schema: Mapping[str, Any]) -> Grammar:
        """`compile` beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.compile, schema)

    def close(self) -> None:
        self.thread.shutdown(wait=False)


class Tokens:
    """A vocabulary with the names that llguidance asks for."""

    def __init__(self, vocabulary: Vocabulary, eos_token_id: int):
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self.special_token_ids = sorted(vocabulary.control_ids)
        self.tokens = [text or b"\xff" for text in vocabulary.token_bytes]

    def __call__(self, text: bytes) -> list[int]:
        """How a text is cut into tokens: for forced ones, of which `GRAMMAR` has none."""
        return []


def load_llguidance():
    """The package; a `ValueError` if it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(f"Answers that must be JSON need a package: {missing('llguidance', 'json')}") from error
    return llguidance


def told(error: str) -> str:
    """What llguidance says is wrong, without the grammar around it."""
    first, *more = error.split("failed to compile JSON schema: ", 1)[-1].splitlines()
    # Of a pattern, the first line tells only that it cannot be read.
    reason = next((line for line in more if line.startswith("error: ")), first) if first.endswith(":") else first
    return reason.removeprefix("error: ")[:300].rstrip(". ")


# ---------------------------------------------------------------- bounds


def check_schema(schema: Mapping[str, Any]) -> str:
    """The schema as llguidance takes it, in our layout; a `ValueError` for one that might cost others their time."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"The schema must be an object, found {type(schema).__name__}.")
    patterns, remainders = set(), 1
    for name, value in keywords_of(schema):
        if name == "multipleOf":
            remainders = math.lcm(remainders, digits_of(value))
        elif name in ("pattern", "format") and isinstance(value, str):
            patterns.add(value)
        elif name == "patternProperties" and isinstance(value, Mapping):
            patterns.update(value)
    if len(patterns) > MAX_PATTERNS or sum(map(len, patterns)) > MAX_PATTERN_CHARACTERS:
        raise ValueError(
            f"The schema has {len(patterns)} different patterns and formats of {sum(map(len, patterns))} characters; "
            f"at most {MAX_PATTERNS} of {MAX_PATTERN_CHARACTERS} are taken. Leave some out."
        )
    if remainders > MAX_REMAINDERS:
        raise ValueError(f"The schema's multipleOf have more than {MAX_REMAINDERS} as their least common multiple.")
    text = json.dumps(schema)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The schema has {len(text)} characters; at most {MAX_CHARACTERS} are read. Shorten it.")
    return json.dumps({**with_days_that_exist(schema), "x-guidance": LAYOUT})  # a client's own layout gives way


def with_days_that_exist(schema: Any) -> Any:
    """A schema, or what stands in one, whose dates are days that exist."""
    if isinstance(schema, list):
        return [with_days_that_exist(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for name, value in schema.items():
        if name in NAMED and isinstance(value, Mapping):
            found[name] = {each: with_days_that_exist(below) for each, below in value.items()}
        else:
            found[name] = value if name in VALUES else with_days_that_exist(value)
    if schema.get("format") not in FORMATS_OF_DAYS:
        return found
    days, others = {"pattern": DAYS_THAT_EXIST}, found.get("allOf", [])
    if "pattern" not in found:
        return found | days
    return found | {"allOf": [*others, days] if isinstance(others, list) else others}


def keywords_of(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All names and values in a schema, wherever they stand; a `ValueError` for one that is too deep or too large."""
    level, seen = [schema], 0
    for _ in range(MAX_DEPTH):
        below = []
        for each in level:
            pairs = each.items() if isinstance(each, Mapping) else (("", value) for value in each)
            for name, value in pairs:
                seen += 1
                if seen > MAX_CHARACTERS:
                    raise ValueError(f"The schema has more than {MAX_CHARACTERS} values. Shorten it.")
                yield name, value
                if isinstance(value, (Mapping, list)):
                    below.append(value)
        level = below
    if level:
        raise ValueError(f"The schema is nested more than {MAX_DEPTH} deep. Make it flatter, or name parts by $ref.")


def digits_of(number: Any) -> int:
    """The digits of a number that is not 0 as a whole number, without zeros around them: 25 for 0.025; else 1."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or not number:
        return 1  # none that llguidance takes
    digits = "".join(map(str, Decimal(str(number)).as_tuple().digits)).strip("0")
    return int(digits[:20])
