"""What the bodies of OpenAI's routes have in common: how unknown fields are taken, how answers are chosen, what they
must be, and what is refused with its reason.

A field that this server does not know is ignored and named in a header of the response (`guards.NameIgnored`), or
refused with `--strict`. One that would change the answer and cannot be honoured is always refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from visualglm_tools.serving.engine.grammar import ANY_OBJECT, Grammar
from visualglm_tools.serving.engine.sampling import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    Settings,
)
from visualglm_tools.serving.engine.vocabulary import Vocabulary
from visualglm_tools.serving.http.intake import check_count


TOOLS = "this model was never trained to call tools, and 2,048 tokens have little room for them; leave them out"
TEXT_ALONE = "this model reads pictures and writes text; it has no audio and searches nothing; leave it out"


class Fields(BaseModel):
    """An object of a body: null means that a field was not given, and unknown fields are noted, see `intake.parse`."""

    model_config = ConfigDict(extra="ignore", populate_by_name=False)
    place: ClassVar[str] = ""  # in the body, as it is named to the client

    @model_validator(mode="before")
    @classmethod
    def take_known(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        check_count(values)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if info.context is not None:
            info.context.update(dict.fromkeys(f"{cls.place}{name}" for name in values if name not in known))
        return {name: value for name, value in values.items() if name in known and value is not None}


def refused(reason: str, *, but: Any) -> BeforeValidator:
    """For a field that is refused with its reason, unless it says what holds anyway."""

    def check(value: Any) -> Any:
        if value != but:
            raise ValueError(reason)
        return value

    return BeforeValidator(check)


def check_zoom(value: Any, handler: ValidatorFunctionWrapHandler) -> bool | int:
    """What is neither a truth nor a whole number is told both that it may be; how many looks there may be, later."""
    try:
        return handler(value)
    except ValidationError as error:
        raise ValueError("must be true, false or a whole number of looks") from error


Zoom = Annotated[bool | int, WrapValidator(check_zoom)]
Ignored = Annotated[dict | None, BeforeValidator(check_count)]
Tools = Annotated[list, refused(TOOLS, but=[])]
Nothing = Annotated[None, refused(TEXT_ALONE, but=None)]
# What vLLM's clients say of an answer's form or tokens.
Form = Annotated[None, refused("an answer's form is said by response_format here: a JSON schema", but=None)]
TokenSet = Annotated[None, refused("tokens are forbidden or favoured by logit_bias here", but=None)]
Looking = Annotated[bool, refused("only /v1/chat/completions does that; ask there, or leave it out", but=False)]


class TakenAsTheyAre(Fields):
    """What clients of OpenAI's and of other servers send that changes nothing here, with the values that do not."""

    min_p: float = Field(0, ge=0, le=0)
    length_penalty: float = Field(1, ge=1, le=1)
    best_of: int = Field(1, ge=1, le=1)
    use_beam_search: Literal[False] = False
    ignore_eos: Literal[False] = False
    stop_token_ids: list = Field([], max_length=0)
    guided_json: Form = None
    guided_regex: Form = None
    guided_choice: Form = None
    guided_grammar: Form = None
    structured_outputs: Form = None
    allowed_token_ids: TokenSet = None
    bad_words: TokenSet = None
    continue_final_message: Literal[False] = False
    user: str | None = Field(None, description="has no effect")
    safety_identifier: str | None = Field(None, description="has no effect")
    prompt_cache_key: str | None = Field(None, description="has no effect")
    prompt_cache_retention: str | None = Field(None, description="has no effect")
    service_tier: str | None = Field(None, description="has no effect")
    metadata: Ignored = Field(None, description="has no effect")


class NoTools(Fields):
    """What clients that could call tools send; a list of some is refused."""

    tools: Tools = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool | None = Field(None, description="has no effect: there are no tools")


class NoLooking(Fields):
    """Of routes that have no extensions for pictures: what those are called."""

    read_text: Looking = Field(False, json_schema_extra={"const": False})
    zoom: Looking = Field(False, json_schema_extra={"const": False})


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else check_count(value)


class Choosing(Fields):
    """How the tokens of answers are chosen; what is not given is as the original's `chat` has it."""

    min_tokens: int = Field(0, ge=0, description="an extension: of the answer, before which it does not end")
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.4, ge=0, le=1)
    top_k: int = Field(100, ge=-1, description="an extension: 0 or -1 for all tokens")
    repetition_penalty: float = Field(
        1.2, ge=0.01, le=100, description="an extension: 1 for none, as for answers that must be JSON if not given"
    )
    presence_penalty: float = Field(0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float = Field(0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(check_count)] = Field(
        {}, description="by the ids of tokens, or by texts that are one token each, behind a blank or not"
    )
    seed: int | None = Field(
        None, ge=-MAX_SEED - 1, le=MAX_SEED, description="makes the answer repeatable; -1 for a new one each time"
    )
    stop: Annotated[list[Stop], BeforeValidator(as_list, json_schema_input_type=Stop | list[Stop])] = Field(
        [], max_length=MAX_STOPS
    )

    def choosing(self, number: int, vocabulary: Vocabulary, grammar: Grammar | None, **more: Any) -> list[Settings]:
        """So many settings, whose seeds count on from the request's.

        Args:
            vocabulary: of the model.
            grammar: what the answers must be, if anything.
            more: of `Settings`.

        Raises:
            ValueError: a bias for what is no token, or two for one.
        """
        is_penalized = grammar is None or "repetition_penalty" in self.model_fields_set
        more = {
            "min_new_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(0, self.top_k),
            # JSON says its marks again and again.
            "repetition_penalty": self.repetition_penalty if is_penalized else 1,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.biases(vocabulary),
            "stop": tuple(self.stop),
            "grammar": grammar,
            **more,
        }
        is_seeded = self.seed is not None and self.seed != -1
        seeds = [(self.seed + index) % (MAX_SEED + 1) if is_seeded else None for index in range(number)]
        return [Settings(seed=seed, **more) for seed in seeds]

    def check_least(self, most: str, schema: Mapping | None) -> None:
        """Raise a `ValueError` if an answer of a schema, or with the limit of the field `most`, cannot be so long."""
        limit = getattr(self, most) if most in self.model_fields_set else None
        if self.min_tokens and schema is not None:
            raise ValueError("min_tokens: an answer that must be JSON ends where that is complete. Leave one out")
        if limit is not None and self.min_tokens > limit:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than {most}, {limit}")

    def biases(self, vocabulary: Vocabulary) -> dict[int, float]:
        """Of tokens, by their ids; a `ValueError` for what is no token, and for a token with two of them."""
        found: dict[int, tuple[float, str]] = {}
        for name, value in self.logit_bias.items():
            for token_id in vocabulary.token_ids(name):
                other, whose = found.setdefault(token_id, (value, name))
                if other != value:
                    raise ValueError(f"logit_bias: {whose[:60]!r} and {name[:60]!r} mean the same token, {token_id}.")
        return {token_id: value for token_id, (value, _) in found.items()}


class JsonSchema(Fields):
    """OpenAI's frame around a schema."""

    place = "response_format.json_schema."
    name: str | None = Field(None, description="has no effect")
    description: str | None = Field(None, description="has no effect")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema, which the answer keeps to")
    strict: bool | None = Field(None, description="has no effect: the answer keeps to the schema anyway")


class ResponseFormat(Fields):
    """What an answer must be."""

    place = "response_format."
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("a json_schema, with a schema in it, belongs to the type 'json_schema' and to no other")
        return self

    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """None for a text."""
        if self.type == "json_schema":
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


class StreamOptions(Fields):
    place = "stream_options."
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="has no effect")


class Streaming(Fields):
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
