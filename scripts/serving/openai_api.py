"""`/v1/chat/completions` and `/v1/models`: what clients of OpenAI's API expect, streaming included.

Fields that would change the answer and that this model cannot honour are refused, not ignored.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .answering import ask, check_complete, complete
from .engine import Answer, Completion, Engine, EngineError
from .errors import ApiError, of_engine, responses
from .public_urls import download_public
from .sampling import MAX_SEED, MAX_STOP_CHARACTERS, MAX_STOPS, Settings


class Strict(BaseModel):
    """Refuses unknown fields; null means that a field was not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(description="a data: URI; an http(s) URL only where the server allows it")
    detail: Literal["auto", "low", "high"] = Field("auto", description="the model always sees 224 x 224 pixels")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = Field(None, description="has no effect")


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="has no effect")


class TextFormat(Strict):
    type: Literal["text"] = "text"


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatRequest(Strict):
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="of the answer; by default, until it ends")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    min_tokens: int = Field(0, ge=0, description="an extension: of the answer, before which it does not end")
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.4, ge=0, le=1)
    top_k: int = Field(100, ge=0, description="an extension: 0 for all tokens")
    repetition_penalty: float = Field(1.2, ge=0.01, le=100, description="an extension: 1 for none")
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="makes the answer repeatable")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = Field([])
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # Sent by many clients; these values change nothing.
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    logprobs: Literal[False] = False
    logit_bias: dict[str, float] = Field({}, max_length=0)
    tools: list = Field([], max_length=0)
    response_format: TextFormat = TextFormat()
    user: str | None = Field(None, description="has no effect")
    metadata: dict | None = Field(None, description="has no effect")
    store: bool | None = Field(None, description="has no effect")

    def settings(self) -> list[Settings]:
        """One for each choice; their seeds count on from the request's."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return [
            Settings(
                max_new_tokens=self.max_completion_tokens or self.max_tokens,
                min_new_tokens=self.min_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
                seed=None if self.seed is None else (self.seed + index) % (MAX_SEED + 1),
                stop=tuple(stop),
            )
            for index in range(self.n)
        ]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "visualglm-hf"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def create_router(get_engine: Callable[[], Engine], options) -> APIRouter:
    """The routes; `options` are `app.ApiOptions`."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    model = Model(id=options.model_name, created=int(time.time()))

    @router.get("/models", responses=responses(401))
    async def models() -> ModelList:
        return ModelList(data=[model])

    @router.get("/models/{name:path}", responses=responses(401, 404))
    async def one_model(name: str) -> Model:
        check_model(name)
        return model

    @router.post(
        "/chat/completions",
        response_model=ChatResponse,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            **responses(400, 401, 404, 413, 422, 429, 500, 503, 504),
        },
    )
    async def chat(asked: ChatRequest, request: Request):
        """Answer a conversation; with `stream` as server-sent events."""
        engine = get_engine()
        check_model(asked.model)
        if asked.n > options.max_choices:
            raise ApiError(400, f"n is {asked.n}; this server gives at most {options.max_choices}.", param="n")
        engine.check_room(asked.n)  # before pictures are fetched
        max_bytes = engine.limits.max_picture_bytes if options.allow_urls else None
        messages = [await to_engine(message, max_bytes) for message in asked.messages]
        answers = await ask(engine, messages, asked.settings())
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return EventStream(answers, head, asked.stream_options.include_usage)
        completions = await complete(request, answers)
        choices = [
            Choice(index=index, message=AnswerMessage(content=each.text), finish_reason=each.finish_reason)
            for index, each in enumerate(completions)
        ]
        return ChatResponse(**head, choices=choices, usage=usage(completions))

    def check_model(name: str) -> None:
        if name != options.model_name:
            message = f"There is no model {name!r}; this server has {options.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    return router


async def to_engine(message: Message, max_bytes: int | None) -> dict:
    """A message as the engine takes it, its pictures fetched; see `fetch`."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": await fetch(part.image_url.url, max_bytes)}
        for part in message.content
    ]
    return {"role": role, "content": parts}


async def fetch(url: str, max_bytes: int | None) -> str | bytes:
    """The up to `max_bytes` behind an http(s) URL, None for no such URLs; a `data:` URI is for the engine to read."""
    if url[:5].lower() == "data:":
        return url
    if not url.lower().startswith(("http://", "https://")):
        raise ApiError(400, "image_url must be a data: URI: data:image/png;base64,...", param="messages")
    if max_bytes is None:
        message = "This server fetches no pictures. Send the picture itself: data:image/png;base64,..."
        raise ApiError(400, message, param="messages", code="urls_not_allowed")
    try:
        return await run_in_threadpool(download_public, url, max_bytes)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="picture_not_fetched") from error


def usage(completions: Sequence[Completion]) -> Usage:
    """The prompt counts once, whatever the number of choices."""
    prompt, answers = completions[0].prompt_tokens, sum(each.completion_tokens for each in completions)
    return Usage(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers)


class EventStream(StreamingResponse):
    """Server-sent events of `answers`, which are cancelled when the client leaves."""

    def __init__(self, answers: Sequence[Answer], head: dict, include_usage: bool):
        events = stream(answers, head, include_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self.answers:
                answer.cancel()


async def stream(answers: Sequence[Answer], head: dict, include_usage: bool) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk"}
    chunks: asyncio.Queue[dict | None] = asyncio.Queue()
    tasks = [asyncio.create_task(feed(index, answer, chunks)) for index, answer in enumerate(answers)]
    running = len(tasks)
    try:
        while running:
            choice = await chunks.get()
            if choice is None:
                running -= 1
            else:
                yield event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})
        completions = [task.result() for task in tasks]
        if include_usage:
            yield event({**head, "choices": [], "usage": usage(completions).model_dump()})
        yield "data: [DONE]\n\n"
    except EngineError as error:
        yield event(of_engine(error).as_json())
    except ValueError as error:  # NaN
        yield event(ApiError(500, str(error), code="model_failed").as_json())
    finally:
        for task in tasks:
            task.cancel()


async def feed(index: int, answer: Answer, chunks: asyncio.Queue) -> Completion:
    """Put the chunks of one answer into the queue, and None at the end."""

    def put(delta: dict, finish_reason: str | None = None) -> None:
        chunks.put_nowait({"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None})

    try:
        put({"role": "assistant", "content": ""})
        shown = ""
        async for text in answer:
            put({"content": text[len(shown) :]})
            shown = text
        completion = check_complete(await answer.completion())
        put({}, completion.finish_reason)
        return completion
    finally:
        chunks.put_nowait(None)


def event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
