"""`/v1/chat/completions` and `/v1/models`: what clients of OpenAI's API expect, streaming included.

Not here: what other routes of OpenAI's have too (`fields.py`, `service.py`, `events.py`, `logprobs.py`).
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from visualglm_tools.serving.engine.answers import Answer
from visualglm_tools.serving.engine.grammar import Grammar
from visualglm_tools.serving.engine.sampling import Settings, TokenLogprob
from visualglm_tools.serving.engine.vocabulary import Vocabulary
from visualglm_tools.serving.http.answering import ask, complete, grammar_of, refusing
from visualglm_tools.serving.http.errors import ASKING, responses
from visualglm_tools.serving.http.events import DONE, EventStream, error_event, event, pieces, with_errors
from visualglm_tools.serving.http.fields import (
    Choosing,
    Fields,
    Ignored,
    Nothing,
    NoTools,
    ResponseFormat,
    Streaming,
    TakenAsTheyAre,
    Tools,
    TopLogprobs,
    Zoom,
)
from visualglm_tools.serving.http.intake import check_count
from visualglm_tools.serving.http.logprobs import ChatLogprobs, Words
from visualglm_tools.serving.http.service import STREAMS, Service, Usage, body_of, usage
from visualglm_tools.serving.http.transformers_api import with_generation_config


class ImageUrl(Fields):
    place = "messages[].content[].image_url."
    url: str = Field(description="a data: URI; an http(s) URL only where the server allows it")
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description="no effect: see --image-size")


def as_image_url(value: Any) -> Any:
    """Some clients send the URL without the object around it."""
    return {"url": value} if isinstance(value, str) else value


class Part(Fields):
    """A part of a message: a text or a picture."""

    place = "messages[].content[]."
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[ImageUrl | None, BeforeValidator(as_image_url, json_schema_input_type=str | ImageUrl)] = None
    cache_control: Ignored = Field(None, description="has no effect")

    @model_validator(mode="after")
    def check_content(self) -> "Part":
        given = [name for name in ("image_url", "text") if getattr(self, name) is not None]
        if given != [self.type]:
            found = " and ".join(given) or "neither"
            raise ValueError(f"a part of type {self.type!r} has a {self.type} and nothing else, found {found}")
        return self


def as_parts(content: Any) -> Any:
    """The parts of a message's content; a text is one of them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"must be a text or a list of parts, found {type(content).__name__}")
    return check_count(content)


class Message(Fields):
    place = "messages[]."
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(as_parts, json_schema_input_type=str | list[Part])]
    name: str | None = Field(None, description="has no effect")
    # What answers of OpenAI's have too, and clients send back.
    refusal: str | None = Field(None, description="of an assistant that said nothing else: what it said")
    tool_calls: list = Field([], max_length=0)
    annotations: Annotated[list | None, BeforeValidator(check_count)] = Field(None, description="has no effect")
    cache_control: Ignored = Field(None, description="has no effect")

    @model_validator(mode="before")
    @classmethod
    def fill_content(cls, values: Any) -> Any:
        """An assistant's content may be missing: then its refusal is what it said."""
        if not isinstance(values, dict) or values.get("content") is not None:
            return values
        if values.get("role") != "assistant":
            raise ValueError("content is missing or null; ask something")
        return {**values, "content": values.get("refusal") or ""}

    def for_engine(self) -> dict:
        role = "system" if self.role == "developer" else self.role
        parts = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image", "image": part.image_url.url}
            for part in self.content
        ]
        return {"role": role, "content": parts}

    def picture_urls(self) -> list[str]:
        return [part.image_url.url for part in self.content if part.type == "image_url"]


class ChatRequest(Choosing, Streaming, NoTools, TakenAsTheyAre):
    model: str
    messages: Annotated[list[Message], BeforeValidator(check_count)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="of the answer; by default, until it ends")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    n: int = Field(1, ge=1)
    response_format: ResponseFormat = ResponseFormat()
    logprobs: bool = False
    top_logprobs: TopLogprobs = Field(0, description="with logprobs: how many of the likeliest tokens to tell")
    read_text: bool = Field(False, description="an extension: read the text in pictures and put it before the question")
    zoom: Zoom = Field(
        False, description="an extension: answer from the part of the last picture that matters; or how often to look"
    )
    functions: Tools = Field([], max_length=0)
    function_call: Literal["none", "auto"] = "none"
    audio: Nothing = None
    web_search_options: Nothing = None
    modalities: Annotated[list[Literal["text"]], BeforeValidator(check_count)] = ["text"]
    reasoning_effort: Literal["none"] = "none"
    verbosity: Literal["medium"] = "medium"
    echo: Literal[False] = False
    store: bool | None = Field(None, description="has no effect")
    prediction: Ignored = Field(None, description="has no effect: it makes others' answers faster")

    @model_validator(mode="before")
    @classmethod
    def take_generation_config(cls, values: Any) -> Any:
        return with_generation_config(values)

    @model_validator(mode="after")
    def check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, which needs logprobs: true")
        return self

    @model_validator(mode="after")
    def check_limits(self) -> "ChatRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens are one limit with two values; leave one out")
        for name in ("max_tokens", "max_completion_tokens"):
            self.check_least(name, self.response_format.schema_of_answer())
        return self

    def settings(self, vocabulary: Vocabulary, grammar: Grammar | None) -> list[Settings]:
        """One for each choice; a `ValueError` for a bias of what is no token."""
        return self.choosing(
            self.n,
            vocabulary,
            grammar,
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=self.top_logprobs if self.logprobs else None,
        )


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ReadChatResponse(ChatResponse):
    """The answer to a request with `read_text`."""

    readings: list[str] = Field(description="what was read in each picture; empty for nothing")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "visualglm-hf"
    max_model_len: int | None = Field(
        description="tokens of prompt and answer together; null while the model is loaded"
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def create_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"])
    created = int(time.time())

    def model() -> Model:
        return Model(id=service.options.model_name, created=created, max_model_len=service.context_length())

    @router.get("/models", responses=responses(401, 403))
    async def models() -> ModelList:
        return ModelList(data=[model()])

    @router.get("/models/{name:path}", responses=responses(401, 403, 404))
    async def one_model(name: str) -> Model:
        service.check_model(name)
        return model()

    @router.post(
        "/chat/completions",
        response_model=ReadChatResponse | ChatResponse,
        responses={**STREAMS, **responses(*ASKING, 404)},
        openapi_extra=body_of("ChatRequest"),
    )
    async def chat(request: Request):
        """Answer a conversation; with `stream` as server-sent events."""
        engine, asked_at = service.get_engine(), time.monotonic()
        async with service.intake.read(request, ChatRequest) as asked:
            service.check_model(asked.model)
            service.check_choices(asked.n, engine)
            service.check_addresses(url for message in asked.messages for url in message.picture_urls())
            schema = asked.response_format.schema_of_answer()
            grammar = await grammar_of(engine, schema, asked_at, "response_format")
            with refusing("logit_bias"):
                settings = asked.settings(engine.vocabulary, grammar)
            messages = [message.for_engine() for message in asked.messages]
            looking = {"read_text": asked.read_text, "zoom": asked.zoom}
            answers = await ask(engine, messages, settings, asked_at, fetch=service.fetch_for(engine), **looking)
            del asked.messages[:], messages[:]  # pictures are not kept while the model answers
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        readings = {"readings": list(answers[0].prompt.readings)} if asked.read_text else {}
        if asked.stream:
            events = stream(answers, engine.vocabulary, head, readings, asked)
            return EventStream(answers, with_errors(events, error_event))
        completions = await complete(request, answers)
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(content=each.text),
                finish_reason=each.finish_reason,
                logprobs=told(Words(engine.vocabulary), each.logprobs) if asked.logprobs else None,
            )
            for index, each in enumerate(completions)
        ]
        answer = {**head, **readings, "choices": choices, "usage": usage(completions, n=asked.n)}
        return ReadChatResponse(**answer) if asked.read_text else ChatResponse(**answer)

    return router


async def stream(
    answers: Sequence[Answer], vocabulary: Vocabulary, head: dict, first: dict, asked: ChatRequest
) -> AsyncIterator[str]:
    """The events; the first chunk has `first` beside the rest."""
    includes_usage, completions = asked.stream_options.include_usage, {}
    more = {"object": "chat.completion.chunk", **({"usage": None} if includes_usage else {})}
    words = [Words(vocabulary) for _ in answers]

    def chunk(index: int, delta: dict, logprobs: ChatLogprobs | None = None, reason: str | None = None) -> str:
        likely = logprobs and logprobs.model_dump()
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": likely}
        return event({**head, **more, **first, "choices": [choice]})

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
        first = {}
    async for piece in pieces(answers, vocabulary):
        likely = told(words[piece.index], piece.tokens) if piece.tokens else None
        if piece.completion is None:
            yield chunk(piece.index, {"content": piece.text}, likely)
        else:
            completions[piece.index] = piece.completion
            yield chunk(piece.index, {}, likely, piece.completion.finish_reason)
    if includes_usage:
        spent = usage(list(completions.values()), n=len(answers))
        yield event({**head, **more, "choices": [], "usage": spent.model_dump()})
    yield DONE


def told(words: Words, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(content=words.chosen(tokens))
