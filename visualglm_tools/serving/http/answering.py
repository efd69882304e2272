"""What the routes have in common: from a request's messages to answers, for as long as the client is there."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from fastapi import Request

from visualglm_tools.serving.engine.answers import Answer, Completion, EngineClosed, EngineError
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.grammar import Grammar
from visualglm_tools.serving.engine.prompts import PictureTooLarge, Prompt
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http.errors import ApiError, client_has_left, of_answer


async def ask(
    engine: Engine,
    messages: Sequence[Mapping],
    settings: Sequence[Settings],
    asked_at: float,
    english: bool | None = None,
    fetch: Callable[[str], Awaitable[bytes]] | None = None,
    read_text: bool = False,
    zoom: bool | int = False,
) -> list[Answer]:
    """Submit a conversation once for each of the `settings`; an `ApiError` for whatever is wrong with it.

    Args:
        engine, messages, english, fetch, read_text, zoom: see `Engine.prepare_in_time`.
        settings: of each answer.
        asked_at: when the request came, by `time.monotonic`: its time counts from then on.
    """
    with refusing():
        with engine.room_for(len(settings)):  # before anything is done for it
            prompt = await engine.prepare_in_time(messages, asked_at, english, fetch, read_text, zoom)
        return engine.submit_all(prompt, settings, asked_at)


async def ask_texts(
    engine: Engine, texts: Sequence[str], settings: Sequence[Settings], asked_at: float
) -> list[Answer]:
    """Submit each of the `texts`, as it stands, once for each of the `settings`; all are taken or none."""
    answers: list[Answer] = []
    with refusing():
        with engine.room_for(len(texts) * len(settings)):
            prompts = [await engine.prepare_text_in_time(text, asked_at) for text in texts]
        try:
            for prompt in prompts:
                answers += engine.submit_all(prompt, settings, asked_at)
        except (EngineError, ValueError):
            for answer in answers:
                answer.cancel()
            raise
    return answers


async def prepare(
    engine: Engine, messages: Sequence[Mapping], asked_at: float, fetch: Callable[[str], Awaitable[bytes]] | None
) -> Prompt:
    """The prompt of a conversation that is not to be answered; an `ApiError` for whatever is wrong with it."""
    with refusing(), engine.room_for(1):
        return await engine.prepare_in_time(messages, asked_at, fetch=fetch)


async def prepare_text(engine: Engine, text: str, asked_at: float, is_context: bool) -> Prompt:
    """The tokens of a text, which need not leave room for an answer; an `ApiError` for whatever is wrong with it."""
    with refusing(), engine.room_for(1):
        return await engine.prepare_text_in_time(text, asked_at, is_context=is_context, fits=False)


async def grammar_of(engine: Engine, schema: Mapping | None, asked_at: float, param: str) -> Grammar | None:
    """What an answer must be to be JSON of the schema that `param` has; an `ApiError` if that cannot be."""
    if schema is None:
        return None
    try:
        with engine.room_for(1):
            return await engine.compile_in_time(schema, asked_at)
    except ValueError as error:
        raise ApiError(422, f"{param}: {error}", param=param, code="invalid_schema") from error


@contextlib.contextmanager
def refusing(param: str | None = None) -> Iterator[None]:
    """What is wrong with a request as an `ApiError`."""
    try:
        yield
    except PictureTooLarge as error:
        raise ApiError(413, str(error), code="picture_too_large") from error
    except ValueError as error:
        raise ApiError(400, str(error), param=param, code="invalid_request") from error


async def complete(request: Request, answers: Sequence[Answer]) -> list[Completion]:
    """Wait for all `answers`; cancel them when the client leaves, who then gets no response."""
    done = asyncio.gather(*(answer.completion() for answer in answers))
    gone = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        is_gone = not done.done()
    finally:
        gone.cancel()
        for answer in answers:
            answer.cancel()
    try:
        completions = await done  # of cancelled answers within a token
    except ValueError as error:
        raise of_answer(error) from error
    if is_gone:
        raise client_has_left()
    return [check_complete(completion) for completion in completions]


def check_complete(completion: Completion) -> Completion:
    """An answer that the engine cancelled, because it was closed, is none."""
    if completion.finish_reason == "cancelled":
        raise EngineClosed("The server was stopped before the answer was complete.")
    return completion


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
