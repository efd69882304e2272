"""`/v1/completions`: what comes after a text as it stands, without `问：` and `答：` around it and without clean-up.

The model was trained to answer behind its context: what comes after a text is an answer to it, not its next words.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from visualglm_tools.serving.engine.answers import Answer
from visualglm_tools.serving.engine.sampling import TokenLogprob
from visualglm_tools.serving.engine.vocabulary import Vocabulary
from visualglm_tools.serving.http.answering import ask_texts, complete, grammar_of, refusing
from visualglm_tools.serving.http.errors import ASKING, ApiError, responses
from visualglm_tools.serving.http.events import DONE, EventStream, error_event, event, pieces, with_errors
from visualglm_tools.serving.http.fields import (
    Choosing,
    NoLooking,
    NoTools,
    ResponseFormat,
    Streaming,
    TakenAsTheyAre,
    refused,
)
from visualglm_tools.serving.http.intake import check_count
from visualglm_tools.serving.http.logprobs import CompletionLogprobs, Words
from visualglm_tools.serving.http.service import STREAMS, Service, Usage, body_of, usage


MAX_TOKENS = 16  # of an answer, where nobody says, as OpenAI has it
MAX_LOGPROBS = 5
SUFFIX = "this model does not fill in what is between two texts; leave suffix out"


def as_texts(prompt: Any) -> Any:
    """The prompts of a request: one text is one."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not all(isinstance(each, str) for each in check_count(prompt)):
        raise ValueError("must be a text or a list of texts; token ids are not taken")
    return prompt


class CompletionRequest(Choosing, Streaming, NoTools, NoLooking, TakenAsTheyAre):
    model: str
    prompt: Annotated[list[str], BeforeValidator(as_texts, json_schema_input_type=str | list[str])] = Field(
        min_length=1, description="several are answered one by one"
    )
    max_tokens: int = Field(MAX_TOKENS, ge=1, description="of each answer")
    n: int = Field(1, ge=1)
    response_format: ResponseFormat = ResponseFormat()
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = Field(
        None, description="how many of the likeliest tokens to tell beside each chosen one"
    )
    echo: bool = Field(False, description="put the prompt before its answer")
    suffix: Annotated[Literal[""], refused(SUFFIX, but="")] = ""

    @model_validator(mode="after")
    def check_echo(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs do not go together: how likely a prompt was is not told. Leave one out")
        return self

    @model_validator(mode="after")
    def check_limit(self) -> "CompletionRequest":
        self.check_least("max_tokens", self.response_format.schema_of_answer())
        return self


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


def create_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        responses={**STREAMS, **responses(*ASKING, 404)},
        openapi_extra=body_of("CompletionRequest"),
    )
    async def completions(request: Request):
        """Answer texts as they stand; with `stream` as server-sent events."""
        engine, asked_at = service.get_engine(), time.monotonic()
        async with service.intake.read(request, CompletionRequest) as asked:
            service.check_model(asked.model)
            service.check_choices(asked.n, engine)
            check_prompts(asked, engine.capacity)
            schema = asked.response_format.schema_of_answer()
            grammar = await grammar_of(engine, schema, asked_at, "response_format")
            more = {"max_new_tokens": asked.max_tokens, "top_logprobs": asked.logprobs, "is_raw": True}
            with refusing("logit_bias"):
                settings = asked.choosing(asked.n, engine.vocabulary, grammar, **more)
            answers = await ask_texts(engine, asked.prompt, settings, asked_at)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return EventStream(answers, with_errors(stream(answers, engine.vocabulary, head, asked), error_event))
        found = await complete(request, answers)
        choices = [
            TextChoice(
                index=index,
                text=echoed(asked, index) + each.text,
                finish_reason=each.finish_reason,
                logprobs=told(Words(engine.vocabulary), each.logprobs, asked),
            )
            for index, each in enumerate(found)
        ]
        return CompletionResponse(**head, choices=choices, usage=usage(found, asked.n))

    return router


def check_prompts(asked: CompletionRequest, most: int) -> None:
    if (number := len(asked.prompt) * asked.n) > most:
        message = f"{number} answers were asked for; this server gives at most {most} at a time."
        raise ApiError(400, message, param="prompt")


def echoed(asked: CompletionRequest, index: int) -> str:
    """What stands before an answer: its prompt, if that was wanted."""
    return asked.prompt[index // asked.n] if asked.echo else ""


def told(words: Words, tokens: Sequence[TokenLogprob], asked: CompletionRequest) -> CompletionLogprobs | None:
    return None if asked.logprobs is None else words.lists(tokens)


async def stream(
    answers: Sequence[Answer], vocabulary: Vocabulary, head: dict, asked: CompletionRequest
) -> AsyncIterator[str]:
    includes_usage, completions = asked.stream_options.include_usage, {}
    more = {"object": "text_completion", **({"usage": None} if includes_usage else {})}
    words = [Words(vocabulary) for _ in answers]

    def chunk(index: int, text: str, tokens: Sequence[TokenLogprob] = (), reason: str | None = None) -> str:
        likely = told(words[index], tokens, asked) if tokens else None
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": likely and likely.model_dump()}
        return event({**head, **more, "choices": [choice]})

    for index in range(len(answers)) if asked.echo else ():
        yield chunk(index, echoed(asked, index))
    async for piece in pieces(answers, vocabulary):
        if piece.completion is not None:
            completions[piece.index] = piece.completion
        yield chunk(piece.index, piece.text, piece.tokens, piece.completion and piece.completion.finish_reason)
    if includes_usage:
        spent = usage(list(completions.values()), asked.n)
        yield event({**head, **more, "choices": [], "usage": spent.model_dump()})
    yield DONE
