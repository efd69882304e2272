"""What stands between the page's server and whoever reaches it: an ASGI middleware in front of gradio's application.

It lets in what the page itself asks for, of a size that the page would send. Gradio has many more routes: they open
addresses, keep files, or do what this page has no need of. Pages of others are kept out by `serving/http/guards.py`.
"""

import collections
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import anyio
from PIL import Image
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response

from visualglm_hf.picture_reading import FORMATS
from visualglm_tools.serving.page.uploads import Uploads


Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API = "/gradio_api/"
UPLOAD, FILE = f"{API}upload", f"{API}file="
EVENTS = ("startup-events", "info", "app_id", "theme.css", "queue/join", "queue/data", "cancel", "reset")
PATHS = ("/", "/config", "/theme.css", "/manifest.json", "/favicon.ico", "/robots.txt", UPLOAD, f"{UPLOAD}_progress")
PATHS += tuple(API + name for name in EVENTS)
LOGIN_PATHS = ("/login", "/logout")
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}heartbeat/", f"{API}run/")

MAX_EVENT_BYTES = 2**19  # a conversation is less: the model reads 2,048 tokens
MAX_BRACKETS = 10_000  # a question with as many has more than 2,048 tokens
MAX_DISCARDED_BYTES, DISCARDING_SECONDS = 64 * 2**20, 30
MAX_DIGITS = 15
MAX_FORM_BYTES = 2**16  # of an upload beside its picture
START_BYTES = 2**14  # of a form, in which its head ends and its picture begins
MAGIC_BYTES = 16  # by which PIL knows what a file is
MAX_ARRIVING = 32  # uploads at a time
UPLOAD_SECONDS = 600


class Refusal(Exception):
    """A request that goes no further.

    Args:
        status: of HTTP.
        message: what was found, and what would do.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status

    def response(self, path: str) -> Response:
        """As the page expects it of this path, to show it."""
        message = str(self)
        if path.startswith(API) and path != UPLOAD:
            return JSONResponse({"detail": message, "error": message}, self.status)
        return PlainTextResponse(message, self.status)


class Gate:
    """See the module's docstring.

    Args:
        app: gradio's application.
        uploads: where it puts what is uploaded.
        max_picture_bytes: of one upload.
        has_login: whether there are users with passwords.
    """

    def __init__(self, app: Callable, uploads: Uploads, max_picture_bytes: int, has_login: bool = False):
        self.app, self.uploads, self.max_picture_bytes = app, uploads, max_picture_bytes
        self.paths = PATHS + LOGIN_PATHS if has_login else PATHS
        self.arriving: dict[anyio.CancelScope, None] = {}  # the uploads on their way, the first one first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = Body(receive)
        try:
            self.check(scope)
            if scope["path"] == UPLOAD:
                return await self.take_upload(scope, body, send)
            check_event(await body.peek(MAX_EVENT_BYTES))
            return await self.app(scope, body.receive, send)
        except Refusal as refusal:
            await body.discard()
            return await refusal.response(scope["path"])(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raise a `Refusal` if the request's head is enough to say so."""
        if not self.is_asked_by_the_page(scope["path"]):
            raise Refusal(404, "There is no such page.")
        if scope["method"] == "POST":
            is_upload = scope["path"] == UPLOAD
            check_length(
                Headers(scope=scope), self.max_picture_bytes + MAX_FORM_BYTES if is_upload else MAX_EVENT_BYTES
            )

    def is_asked_by_the_page(self, path: str) -> bool:
        if path.startswith(FILE):
            return Path(os.path.normpath(path.removeprefix(FILE))).is_relative_to(self.uploads.folder)
        return path in self.paths or path.startswith(FOLDERS)

    async def take_upload(self, scope: Scope, body: "Body", send: Send) -> None:
        """Take one picture. Beyond `MAX_ARRIVING`, the one that is longest on its way has to go: it may never come."""
        if len(self.arriving) >= MAX_ARRIVING:
            next(iter(self.arriving)).cancel()
        with anyio.move_on_after(UPLOAD_SECONDS) as limit:
            self.arriving[limit] = None
            try:
                check_form(await body.peek(START_BYTES))
                await self.app(scope, body.receive, send)
            finally:
                del self.arriving[limit]
                self.uploads.trim()
        if limit.cancelled_caught:
            raise Refusal(408, "The upload took too long. Try again.")


class Body:
    """A request's body as it comes."""

    def __init__(self, receive: Receive):
        self.receive_next = receive
        self.peeked: collections.deque[Message] = collections.deque()
        self.is_complete = False
        self.num_bytes = 0

    async def receive(self) -> Message:
        return self.peeked.popleft() if self.peeked else await self.receive_new()

    async def receive_new(self) -> Message:
        message = await self.receive_next()
        self.is_complete = not message.get("more_body", False)
        self.num_bytes += len(message.get("body", b""))
        return message

    async def peek(self, num_bytes: int) -> bytes:
        """Its beginning, of so many bytes or more; all of it, if it has less."""
        while not self.is_complete and self.num_bytes < num_bytes:
            self.peeked.append(await self.receive_new())
        return b"".join(message.get("body", b"") for message in self.peeked)

    async def discard(self) -> None:
        """Read what is left: a browser looks for an answer when it has sent all, and not before."""
        with anyio.move_on_after(DISCARDING_SECONDS):
            while not self.is_complete and self.num_bytes < MAX_DISCARDED_BYTES:
                await self.receive_new()


def check_length(headers: Headers, most: int) -> None:
    length = headers.get("content-length", "")
    if not length.isdecimal():
        raise Refusal(411, "The length of what is sent must be known.")
    if len(length) > MAX_DIGITS or int(length) > most:
        raise Refusal(413, f"{length[:MAX_DIGITS]} bytes are too much; at most {most} are taken. Make it shorter.")


def check_event(body: bytes) -> None:
    """Raise a `Refusal` of more lists and objects than any event has: gradio goes through all of them."""
    if sum(map(body.count, (b"[", b"{"))) > MAX_BRACKETS:
        raise Refusal(413, f"More than {MAX_BRACKETS} brackets are too much. Make it shorter.")


def check_form(start: bytes) -> None:
    """Raise a `Refusal` unless a form begins with a file, and the file as a picture does."""
    head, _, content = start.partition(b"\r\n\r\n")
    if b"filename=" not in head or not begins_as_picture(content):
        raise Refusal(415, f"This is no picture, or of another format than {', '.join(FORMATS)}.")


def begins_as_picture(content: bytes) -> bool:
    """Whether PIL would look for a picture of one of our formats there."""
    Image.init()  # makes all formats known
    magic = content[:MAGIC_BYTES].ljust(MAGIC_BYTES, b"\0")
    verdicts = (Image.OPEN[name][1](magic) for name in FORMATS if name in Image.OPEN)
    return any(verdict and not isinstance(verdict, str) for verdict in verdicts)  # a text says what PIL lacks
