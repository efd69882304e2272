"""What a client sends, on its way in: bounded by bytes and counts before anything is built of it, parsed beside the
event loop, and never so much at a time that many clients together fill the memory.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from visualglm_tools.serving.http.errors import ApiError, client_has_left, of_validation


SMALL_BYTES = 2**18  # of a body without a picture: not counted, and parsed at once
BODIES_HELD = 3  # of the largest size, in memory at a time
BODY_SECONDS = 120  # for a body to arrive
UNDISTURBED_SECONDS = 5  # after which one that is still arriving makes room for others, if there is none
# `{`, `[` and `,` in a body: of each, a value becomes up to 150 bytes. A text of commas as long as the context is less.
MAX_MARKS = 2**17
MAX_ENTRIES = 2048  # of a list or an object: each message and part takes at least a token

Asked = TypeVar("Asked", bound=BaseModel)


class Intake:
    """Takes in the bodies of requests.

    Args:
        max_bytes: of one body.
        refuses_unknown: whether unknown fields are an error.
    """

    def __init__(self, max_bytes: int, refuses_unknown: bool = False):
        self.max_bytes, self.refuses_unknown = max_bytes, refuses_unknown
        self.free_bytes = BODIES_HELD * max_bytes
        self.arriving: dict[Held, asyncio.Task] = {}  # the one that is longest on its way first
        self.large_ones = ThreadPoolExecutor(1, "large-bodies")  # one by one: parsing takes a body's memory twice
        self.small_ones = ThreadPoolExecutor(2, "small-bodies")

    @contextlib.asynccontextmanager
    async def read(self, request: Request, model: type[Asked], strict: bool = True) -> AsyncIterator[Asked]:
        """What was asked, checked; its bytes count as held until the context ends.

        Unknown fields are noted for `guards.NameIgnored`, or refused.

        Args:
            request: whose body has not been read.
            model: what it must be.
            strict: refuse line breaks within strings, as JSON does.

        Raises:
            ApiError: 400 for no JSON, 408 for a body that does not come, 413 for too many bytes or values, 415 for a
                compressed one, 422 for no such request, 429 when too many bytes of others are held.
        """
        held = Held(self)
        try:
            asked, unknown = await self.parsed(await self.received(request, held), model, strict)
            if unknown and self.refuses_unknown:
                message = f"{unknown[0]}: this server knows no such field, and was started with --strict."
                raise ApiError(422, message, param=unknown[0], code="unknown_field")
            request.state.ignored_fields = unknown
            yield asked
        finally:
            held.release()

    async def received(self, request: Request, held: "Held") -> bytearray:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "A compressed body is not read; send the JSON itself.", code="unsupported_encoding")
        self.arriving[held] = asyncio.create_task(self.receive(request, held))
        try:
            return await asyncio.wait_for(self.arriving[held], BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"The body was not complete after {BODY_SECONDS} s.", code="timeout") from error
        except asyncio.CancelledError:
            if not held.is_given_up:
                raise
            raise ApiError(408, "The body came too slowly, and others needed its room.", code="timeout") from None
        except ClientDisconnect as error:
            raise client_has_left() from error
        finally:
            del self.arriving[held]

    def make_room(self, size: int) -> None:
        """Give up bodies that may never come until `size` bytes are free, or there are no such bodies."""
        latest = time.monotonic() - UNDISTURBED_SECONDS
        for held, task in self.arriving.items():
            if self.free_bytes >= size or held.began_at > latest:
                return
            if held.size and task.cancel():
                held.is_given_up = True
                held.release()

    def parsed(self, body: bytearray, model: type[Asked], strict: bool) -> Awaitable[tuple[Asked, list[str]]]:
        threads = self.small_ones if len(body) <= SMALL_BYTES else self.large_ones
        return asyncio.get_running_loop().run_in_executor(threads, parse, body, model, strict)

    async def receive(self, request: Request, held: "Held") -> bytearray:
        too_large = ApiError(413, f"The request is too large; the limit is {self.max_bytes} bytes.", code="too_large")
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > self.max_bytes:
                raise too_large
            body += chunk
            held.grow(len(body))
        return body


class Held:
    """How much of an intake's bytes one body takes."""

    def __init__(self, intake: Intake):
        self.intake, self.size = intake, 0
        self.began_at, self.is_given_up = time.monotonic(), False

    def grow(self, size: int) -> None:
        """Count `size` bytes from now on, unless that is little; an `ApiError` if there are not so many."""
        more = size - self.size
        if size <= SMALL_BYTES:
            return
        self.intake.make_room(more)
        if more > self.intake.free_bytes:
            self.release()  # at once, or all that are on their way might be refused together
            message = "Other requests take all the room there is for large ones. Try again in a second."
            raise ApiError(429, message, code="too_many_bytes", retry_after=1)
        self.intake.free_bytes -= more
        self.size = size

    def release(self) -> None:
        self.intake.free_bytes += self.size
        self.size = 0


def check_count(values):
    """Return `values` unless it is a list or an object with more entries than a conversation can have."""
    if isinstance(values, (list, dict)) and len(values) > MAX_ENTRIES:
        raise ValueError(f"has {len(values)} entries, of which no more than {MAX_ENTRIES} fit into a conversation")
    return values


def parse(body: bytearray, model: type[Asked], strict: bool) -> tuple[Asked, list[str]]:
    """What the JSON of a body asks for, and the fields that are unknown, which a `model` notes in the context of its
    validation; an `ApiError` for too many values, for no JSON, and for what is no `model`.
    """
    marks = sum(map(body.count, (b"{", b"[", b",")))
    if marks > MAX_MARKS:
        message = f"The body has more than {MAX_MARKS:,} values or commas, more than any conversation that fits."
        raise ApiError(413, message, code="too_large")
    try:
        content = json.loads(body, strict=strict)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is no valid JSON: {error}.", code="invalid_json") from error
    body.clear()  # whoever still holds it, it takes no memory
    unknown: dict[str, None] = {}
    try:
        return model.model_validate(content, context=unknown), list(unknown)
    except ValidationError as error:
        raise of_validation(error) from error
