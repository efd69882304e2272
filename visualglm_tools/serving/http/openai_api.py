"""`/v1/chat/completions` and `/v1/models`: what clients of OpenAI's API expect, streaming included.

Fields that would change the answer and that this model cannot honour are refused, not ignored.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from visualglm_tools.serving.engine.answers import Answer, Completion, EngineError
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.sampling import MAX_SEED, MAX_STOP_CHARACTERS, MAX_STOPS, Settings
from visualglm_tools.serving.http.answering import ask, check_complete, complete
from visualglm_tools.serving.http.errors import ASKING, ApiError, of_engine, responses
from visualglm_tools.serving.http.intake import Intake, check_count
from visualglm_tools.serving.http.public_urls import download_public
from visualglm_tools.serving.http.transformers_api import with_generation_config


DOWNLOADS = 16  # at a time; they wait for others' servers


class Strict(BaseModel):
    """Refuses unknown fields; null means that a field was not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        check_count(values)
        return {name: value for name, value in values.items() if value is not None}


class ImageUrl(Strict):
    url: str = Field(description="a data: URI; an http(s) URL only where the server allows it")
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description="no effect: see --image-size")


def as_image_url(value: Any) -> Any:
    """Some clients send the URL without the object around it."""
    return {"url": value} if isinstance(value, str) else value


Ignored = Annotated[dict | None, BeforeValidator(check_count)]


class Part(Strict):
    """A part of a message: a text or a picture."""

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


class Message(Strict):
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


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="has no effect")


class TextFormat(Strict):
    type: Literal["text"] = "text"


class TakenAsTheyAre(Strict):
    """What clients of OpenAI's and of other servers send that changes nothing here, with the values that do not."""

    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    logprobs: Literal[False] = False
    top_logprobs: int = Field(0, ge=0, le=0)
    logit_bias: dict[str, float] = Field({}, max_length=0)
    tools: list = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool | None = Field(None, description="has no effect: there are no tools")
    functions: list = Field([], max_length=0)
    function_call: Literal["none", "auto"] = "none"
    response_format: TextFormat = TextFormat()
    modalities: Annotated[list[Literal["text"]], BeforeValidator(check_count)] = ["text"]
    reasoning_effort: Literal["none"] = "none"
    verbosity: Literal["medium"] = "medium"
    min_p: float = Field(0, ge=0, le=0)
    length_penalty: float = Field(1, ge=1, le=1)
    best_of: int = Field(1, ge=1, le=1)
    use_beam_search: Literal[False] = False
    ignore_eos: Literal[False] = False
    echo: Literal[False] = False
    stop_token_ids: list = Field([], max_length=0)
    user: str | None = Field(None, description="has no effect")
    safety_identifier: str | None = Field(None, description="has no effect")
    prompt_cache_key: str | None = Field(None, description="has no effect")
    prompt_cache_retention: str | None = Field(None, description="has no effect")
    service_tier: str | None = Field(None, description="has no effect")
    metadata: Ignored = Field(None, description="has no effect")
    store: bool | None = Field(None, description="has no effect")
    prediction: Ignored = Field(None, description="has no effect: it makes others' answers faster")


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else check_count(value)


class ChatRequest(TakenAsTheyAre):
    model: str
    messages: Annotated[list[Message], BeforeValidator(check_count)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="of the answer; by default, until it ends")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    min_tokens: int = Field(0, ge=0, description="an extension: of the answer, before which it does not end")
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.4, ge=0, le=1)
    top_k: int = Field(100, ge=-1, description="an extension: 0 or -1 for all tokens")
    repetition_penalty: float = Field(1.2, ge=0.01, le=100, description="an extension: 1 for none")
    n: int = Field(1, ge=1)
    read_text: bool = Field(False, description="an extension: read the text in pictures and put it before the question")
    zoom: bool | int = Field(
        False, description="an extension: answer from the part of the last picture that matters; or how often to look"
    )
    seed: int | None = Field(
        None, ge=-MAX_SEED - 1, le=MAX_SEED, description="makes the answer repeatable; -1 for a new one each time"
    )
    stop: Annotated[list[Stop], BeforeValidator(as_list, json_schema_input_type=Stop | list[Stop])] = Field(
        [], max_length=MAX_STOPS
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def take_generation_config(cls, values: Any) -> Any:
        return with_generation_config(values)

    def settings(self) -> list[Settings]:
        """One for each choice; their seeds count on from the request's."""
        is_seeded = self.seed is not None and self.seed != -1
        return [
            Settings(
                max_new_tokens=self.max_completion_tokens or self.max_tokens,
                min_new_tokens=self.min_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=max(0, self.top_k),
                repetition_penalty=self.repetition_penalty,
                seed=(self.seed + index) % (MAX_SEED + 1) if is_seeded else None,
                stop=tuple(self.stop),
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


class ReadChatResponse(ChatResponse):
    """The answer to a request with `read_text`."""

    readings: list[str] = Field(description="what was read in each picture; empty for nothing")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "visualglm-hf"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def create_router(get_engine: Callable[[], Engine], intake: Intake, options) -> APIRouter:
    """The routes; `options` are `app.ApiOptions`."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    model = Model(id=options.model_name, created=int(time.time()))
    downloads = ThreadPoolExecutor(DOWNLOADS, "downloads")
    body = {"schema": {"$ref": "#/components/schemas/ChatRequest"}}

    @router.get("/models", responses=responses(401, 403))
    async def models() -> ModelList:
        return ModelList(data=[model])

    @router.get("/models/{name:path}", responses=responses(401, 403, 404))
    async def one_model(name: str) -> Model:
        check_model(name)
        return model

    @router.post(
        "/chat/completions",
        response_model=ReadChatResponse | ChatResponse,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            **responses(*ASKING, 404),
        },
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": body}}},
    )
    async def chat(request: Request):
        """Answer a conversation; with `stream` as server-sent events."""
        engine, asked_at = get_engine(), time.monotonic()
        async with intake.read(request, ChatRequest) as asked:
            check_model(asked.model)
            check_choices(asked.n, engine)
            check_addresses(asked.messages)
            messages = [message.for_engine() for message in asked.messages]
            looking = {"read_text": asked.read_text, "zoom": asked.zoom}
            answers = await ask(engine, messages, asked.settings(), asked_at, fetch=fetch_for(engine), **looking)
            del asked.messages[:], messages[:]  # pictures are not kept while the model answers
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return EventStream(answers, head, asked.stream_options.include_usage, asked.read_text)
        completions = await complete(request, answers)
        choices = [
            Choice(index=index, message=AnswerMessage(content=each.text), finish_reason=each.finish_reason)
            for index, each in enumerate(completions)
        ]
        answer = {**head, "choices": choices, "usage": usage(completions)}
        readings = answers[0].prompt.readings
        return ReadChatResponse(**answer, readings=list(readings)) if asked.read_text else ChatResponse(**answer)

    def check_model(name: str) -> None:
        if name != options.model_name:
            message = f"There is no model {name[:100]!r}; this server has {options.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_choices(number: int, engine: Engine) -> None:
        most = min(options.max_choices, engine.capacity)
        if number > most:
            raise ApiError(400, f"n is {number}; this server gives at most {most}.", param="n")

    def check_addresses(messages: Sequence[Message]) -> None:
        for url in (url for message in messages for url in message.picture_urls()):
            check_address(url, options.allow_urls)

    def fetch_for(engine: Engine) -> Callable[[str], Awaitable[bytes]] | None:
        """What reads a picture behind an http(s) address; None where nothing is fetched."""
        if not options.allow_urls:
            return None
        return lambda url: fetch(url, engine.limits.max_picture_bytes, downloads)

    return router


def check_address(url: str, allow_urls: bool) -> None:
    """An `ApiError` unless `url` is a `data:` URI, or an http(s) URL where those are allowed."""
    if url[:5].lower() == "data:":
        return
    if not url[:8].lower().startswith(("http://", "https://")):
        raise ApiError(400, "image_url must be a data: URI: data:image/png;base64,...", param="messages")
    if not allow_urls:
        message = "This server fetches no pictures. Send the picture itself: data:image/png;base64,..."
        raise ApiError(400, message, param="messages", code="urls_not_allowed")


async def fetch(url: str, max_bytes: int, threads: ThreadPoolExecutor) -> bytes:
    """The up to `max_bytes` behind a public http(s) URL; an `ApiError` if it cannot be read."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, download_public, url, max_bytes)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="picture_not_fetched") from error


def usage(completions: Sequence[Completion]) -> Usage:
    """The prompt counts once, whatever the number of choices."""
    prompt, answers = completions[0].prompt_tokens, sum(each.completion_tokens for each in completions)
    return Usage(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers)


class EventStream(StreamingResponse):
    """Server-sent events of `answers`, which are cancelled when the client leaves."""

    def __init__(self, answers: Sequence[Answer], head: dict, include_usage: bool, tell_readings: bool = False):
        first = {"readings": list(answers[0].prompt.readings)} if tell_readings else {}
        events = stream(answers, head, include_usage, first)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self.answers:
                answer.cancel()


async def stream(answers: Sequence[Answer], head: dict, include_usage: bool, first: dict) -> AsyncIterator[str]:
    """The events; the first chunk has `first` beside the rest."""
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
                yield event({**head, **first, "choices": [choice], **({"usage": None} if include_usage else {})})
                first = {}
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
