"""What the routes have in common: from a request's messages to answers, for as long as the client is there."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from fastapi import Request

from visualglm_tools.serving.engine.answers import Answer, Completion, EngineClosed
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.prompts import PictureTooLarge
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http.errors import ApiError, client_has_left


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
    try:
        with engine.room_for(len(settings)):  # before anything is done for it
            prompt = await engine.prepare_in_time(messages, asked_at, english, fetch, read_text, zoom)
        return engine.submit_all(prompt, settings, asked_at)
    except PictureTooLarge as error:
        raise ApiError(413, str(error), code="picture_too_large") from error
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_request") from error


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
    except ValueError as error:  # NaN
        raise ApiError(500, str(error), code="model_failed") from error
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
