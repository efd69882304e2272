"""`/v1/responses`, thinly: text and pictures in, text out, streamed by the names of OpenAI's events. Nothing is stored.

Source: OpenAI's reference of responses and of their streaming events, as its Python client has them.
"""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from visualglm_tools.serving.engine.answers import Answer, Completion
from visualglm_tools.serving.engine.vocabulary import Vocabulary
from visualglm_tools.serving.http.answering import ask, complete, grammar_of, refusing
from visualglm_tools.serving.http.errors import ASKING, ApiError, responses
from visualglm_tools.serving.http.events import EventStream, event, pieces, with_errors
from visualglm_tools.serving.http.fields import (
    Choosing,
    Fields,
    Ignored,
    JsonSchema,
    NoLooking,
    NoTools,
    ResponseFormat,
    TakenAsTheyAre,
    TopLogprobs,
    refused,
)
from visualglm_tools.serving.http.intake import check_count
from visualglm_tools.serving.http.logprobs import ChosenToken, Words
from visualglm_tools.serving.http.service import STREAMS, Service, body_of


STORED = "this server stores nothing; send the whole conversation as input, and leave this out"
NO_FILES = "this server has no files; send the picture as image_url: data:image/png;base64,..."
ONE_CHOICE = "there is one answer on this route; /v1/chat/completions gives several"
OTHER_LIMIT = "it is called max_output_tokens here"
OTHER_FORMAT = "it is called text.format here"
LOGPROBS = "message.output_text.logprobs"  # of `include`
Includable = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]


# As OpenAI bounds what is told back; pydantic reads a text of a given length as UTF-8.
MetadataName = Annotated[str, Field(max_length=64)]
MetadataText = Annotated[str, Field(max_length=512)]


class InputPart(Fields):
    """A part of a message: a text, of either side, or a picture."""

    place = "input[].content[]."
    type: Literal["input_text", "output_text", "input_image"]
    text: str | None = None
    image_url: str | None = Field(None, description="a data: URI; an http(s) URL only where the server allows it")
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description="no effect: see --image-size")
    file_id: Annotated[None, refused(NO_FILES, but=None)] = None
    annotations: Annotated[list | None, BeforeValidator(check_count)] = Field(None, description="has no effect")
    logprobs: Annotated[list | None, BeforeValidator(check_count)] = Field(None, description="has no effect")

    @model_validator(mode="after")
    def check_content(self) -> "InputPart":
        wanted = "image_url" if self.type == "input_image" else "text"
        given = [name for name in ("image_url", "text") if getattr(self, name) is not None]
        if given != [wanted]:
            raise ValueError(f"a part of type {self.type!r} has {wanted} and nothing else, found {given or 'neither'}")
        return self

    def for_engine(self) -> dict:
        if self.type == "input_image":
            return {"type": "image", "image": self.image_url}
        return {"type": "text", "text": self.text}


def as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"must be a text or a list of parts, found {type(content).__name__}")
    return check_count(content)


class InputMessage(Fields):
    place = "input[]."
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[InputPart], BeforeValidator(as_parts, json_schema_input_type=str | list[InputPart])]
    id: str | None = Field(None, description="has no effect")
    status: str | None = Field(None, description="has no effect")

    def for_engine(self) -> dict:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": [part.for_engine() for part in self.content]}


def as_messages(given: Any) -> Any:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ValueError(f"must be a text or a list of messages, found {type(given).__name__}")
    return check_count(given)


class TextFormat(JsonSchema):
    """Chat's `response_format`, whose schema here has no frame of its own."""

    place = "text.format."
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON schema, which the answer keeps to")

    def as_response_format(self) -> ResponseFormat:
        frame = {} if self.schema_ is None else {"json_schema": {"schema": self.schema_}}
        return ResponseFormat(type=self.type, **frame)

    @model_validator(mode="after")
    def check_frame(self) -> "TextFormat":
        self.as_response_format()
        return self


class TextOptions(Fields):
    place = "text."
    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] = "medium"


class Reasoning(Fields):
    place = "reasoning."
    effort: Literal["none"] = "none"
    summary: str | None = Field(None, description="has no effect: there is nothing to sum up")


class ResponsesRequest(Choosing, NoTools, NoLooking, TakenAsTheyAre):
    model: str
    input: Annotated[
        list[InputMessage], BeforeValidator(as_messages, json_schema_input_type=str | list[InputMessage])
    ] = Field(min_length=1)
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(None, ge=1, description="by default, until the answer ends")
    text: TextOptions = TextOptions()
    include: Annotated[list[Includable], BeforeValidator(check_count)] = Field(
        [], description=f"{LOGPROBS!r}: how likely the tokens were; of the others there is nothing here"
    )
    top_logprobs: TopLogprobs = Field(0, description="how many of the likeliest tokens to tell beside each chosen one")
    stream: bool = False
    stream_options: Ignored = Field(None, description="has no effect")
    metadata: dict[MetadataName, MetadataText] | None = Field(None, max_length=16, description="is told back")
    reasoning: Reasoning = Reasoning()
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    n: Annotated[Literal[1], refused(ONE_CHOICE, but=1)] = 1
    max_tokens: Annotated[None, refused(OTHER_LIMIT, but=None)] = None
    max_completion_tokens: Annotated[None, refused(OTHER_LIMIT, but=None)] = None
    response_format: Annotated[None, refused(OTHER_FORMAT, but=None)] = None
    store: Annotated[bool, refused(STORED, but=False)] = Field(False, json_schema_extra={"const": False})
    previous_response_id: Annotated[None, refused(STORED, but=None)] = None
    conversation: Annotated[None, refused(STORED, but=None)] = None
    prompt: Annotated[None, refused(STORED, but=None)] = None
    max_tool_calls: int | None = Field(None, description="has no effect: there are no tools")

    @model_validator(mode="after")
    def check_limit(self) -> "ResponsesRequest":
        self.check_least("max_output_tokens", self.text.format.as_response_format().schema_of_answer())
        return self

    @property
    def tells_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in self.include

    def messages(self) -> list[dict]:
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return [*system, *(message.for_engine() for message in self.input)]

    def picture_urls(self) -> list[str]:
        return [part.image_url for message in self.input for part in message.content if part.type == "input_image"]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list = []
    logprobs: list[ChosenToken] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputDetails(BaseModel):
    cached_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponsesUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponsesResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    tool_choice: Literal["none"] = "none"
    tools: list = Field([], max_length=0)
    top_p: float
    usage: ResponsesUsage | None = None


class Telling:
    """What is told of one request, from its beginning to its end.

    Args:
        asked: the request.
    """

    def __init__(self, asked: ResponsesRequest):
        self.id, self.message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created_at = int(time.time())
        names = ("instructions", "max_output_tokens", "metadata", "model", "temperature", "top_p")
        self.echoed = {name: getattr(asked, name) for name in names}

    def response(self, status: str, output: Sequence[OutputMessage] = (), **more) -> ResponsesResponse:
        head = {"id": self.id, "created_at": self.created_at, "status": status, "output": list(output)}
        return ResponsesResponse(**head, **self.echoed, **more)

    def message(self, status: str, *parts: OutputText) -> OutputMessage:
        return OutputMessage(id=self.message_id, status=status, content=list(parts))

    def whole(self, completion: Completion, part: OutputText) -> ResponsesResponse:
        """The response with its answer."""
        is_cut = completion.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        prompt, answer = completion.prompt_tokens, completion.completion_tokens
        return self.response(
            status,
            [self.message(status, part)],
            incomplete_details=Incomplete() if is_cut else None,
            usage=ResponsesUsage(input_tokens=prompt, output_tokens=answer, total_tokens=prompt + answer),
        )


def create_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/responses",
        response_model=ResponsesResponse,
        responses={**STREAMS, **responses(*ASKING, 404)},
        openapi_extra=body_of("ResponsesRequest"),
    )
    async def respond(request: Request):
        """Answer a conversation; with `stream` as server-sent events. Nothing is stored."""
        engine, asked_at = service.get_engine(), time.monotonic()
        async with service.intake.read(request, ResponsesRequest) as asked:
            service.check_model(asked.model)
            service.check_addresses(asked.picture_urls())
            schema = asked.text.format.as_response_format().schema_of_answer()
            grammar = await grammar_of(engine, schema, asked_at, "text.format")
            more = {
                "max_new_tokens": asked.max_output_tokens,
                "top_logprobs": asked.top_logprobs if asked.tells_logprobs else None,
            }
            with refusing("logit_bias"):
                settings = asked.choosing(1, engine.vocabulary, grammar, **more)
            messages = asked.messages()
            answers = await ask(engine, messages, settings, asked_at, fetch=service.fetch_for(engine))
            telling = Telling(asked)
            del asked.input[:], messages[:]  # pictures are not kept while the model answers
        if asked.stream:
            return event_stream(answers, engine.vocabulary, telling)
        [completion] = await complete(request, answers)
        logprobs = Words(engine.vocabulary).chosen(completion.logprobs)
        return telling.whole(completion, OutputText(text=completion.text, logprobs=logprobs))

    return router


def event_stream(answers: Sequence[Answer], vocabulary: Vocabulary, telling: Telling) -> EventStream:
    numbers = itertools.count()

    def numbered(name: str, **fields) -> str:
        told = {
            key: value.model_dump(by_alias=True) if isinstance(value, BaseModel) else value
            for key, value in fields.items()
        }
        return event({"type": name, "sequence_number": next(numbers), **told}, name)

    def failed(error: ApiError) -> str:
        told = error.as_json()["error"]
        return numbered("error", code=told["code"], message=told["message"], param=told["param"])

    return EventStream(answers, with_errors(stream(answers, vocabulary, telling, numbered), failed))


async def stream(answers: Sequence[Answer], vocabulary: Vocabulary, telling: Telling, numbered) -> AsyncIterator[str]:
    """The events of one answer; `numbered` writes one."""
    words, likely = Words(vocabulary), []
    item = {"item_id": telling.message_id, "output_index": 0}
    part = {**item, "content_index": 0}
    begun = telling.response("in_progress")
    yield numbered("response.created", response=begun)
    yield numbered("response.in_progress", response=begun)
    yield numbered("response.output_item.added", output_index=0, item=telling.message("in_progress"))
    yield numbered("response.content_part.added", **part, part=OutputText(text=""))
    async for piece in pieces(answers, vocabulary):
        new = words.chosen(piece.tokens)
        likely += new
        if piece.text or new:
            told = [each.model_dump() for each in new]
            yield numbered("response.output_text.delta", **part, delta=piece.text, logprobs=told)
    completion = piece.completion
    text = OutputText(text=completion.text, logprobs=likely)
    whole = telling.whole(completion, text)
    told = [each.model_dump() for each in likely]
    yield numbered("response.output_text.done", **part, text=completion.text, logprobs=told)
    yield numbered("response.content_part.done", **part, part=text)
    yield numbered("response.output_item.done", output_index=0, item=whole.output[0])
    yield numbered(f"response.{whole.status}", response=whole)
