"""Middleware that a request passes before any route: what HTTP leaves open is made one, and strangers stay outside."""

import ipaddress
import secrets
from collections.abc import Sequence
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers

from visualglm_tools.serving.http.errors import ApiError


OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # without a key
ANY = "*"
IGNORED_FIELDS = "X-Ignored-Fields"
NAMED_FIELDS, LONGEST_NAME = 20, 80  # characters, before what is no letter is escaped


class Normalize:
    """Answers HEAD as GET without the body, and a path with a slash at its end as the one without."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"

        async def send_head(message):
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        path = scope["path"].rstrip("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if is_head else scope["method"]}
        await self.app(scope, receive, send_head if is_head else send)


class NameIgnored:
    """Names the fields of a body that were ignored, as `intake.parse` has noted them, in a header of the response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        state = scope.setdefault("state", {})

        async def send_named(message):
            if message["type"] == "http.response.start" and (ignored := state.get("ignored_fields")):
                message = {
                    **message,
                    "headers": [*message["headers"], (IGNORED_FIELDS.lower().encode(), told(ignored))],
                }
            await send(message)

        await self.app(scope, receive, send_named)


def told(fields: Sequence[str]) -> bytes:
    """Names from a body as the value of a header: some, each not too long, without what headers cannot have.

    A name of no letters is `""`: a value that ends in a blank is none, and the server would close the connection.
    """
    names = [quote(name[:LONGEST_NAME], safe="[]", errors="replace") or '""' for name in fields[:NAMED_FIELDS]]
    more = [f"({len(fields) - NAMED_FIELDS} more)"] if len(fields) > NAMED_FIELDS else []
    return ", ".join([*names, *more]).encode()


class RequireKey:
    """No request without the key gets further, whatever its size."""

    def __init__(self, app, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self.has_key(Headers(scope=scope)):
            message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            await ApiError(401, message, code="invalid_api_key").as_response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(given.strip(), self.key)


class RefuseOtherPages:
    """For a server without a key: no web page but its own, and those that it names, makes a browser ask it.

    A browser sends a page's origin along. A page that gave its own host name this server's address (DNS rebinding) is
    of one origin with it, so the name must be one that strangers cannot own: an address, `localhost`, a name without a
    dot, or a name that whoever runs the server has given.
    """

    def __init__(self, app, origins: Sequence[str], hosts: Sequence[str]):
        self.app = app
        self.origins, self.hosts = set(origins), {host.lower() for host in hosts}

    async def __call__(self, scope, receive, send) -> None:
        error = self.error(Headers(scope=scope)) if scope["type"] == "http" and scope["path"] != "/health" else None
        if error is not None:
            await error.as_response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def error(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_own(host):
            message = f"This server is not called {host!r}. Name it with --allowed-host, or give the server a key."
            return ApiError(403, message, code="host_not_allowed")
        if origin is not None and not self.may_call(origin, host):
            message = f"Pages of {origin!r} may not call this server. Name them with --cors-origin."
            return ApiError(403, message, code="origin_not_allowed")
        return None

    def is_own(self, host: str) -> bool:
        name = host_name(host)
        if ANY in self.hosts or name in self.hosts or is_address(name):
            return True
        return "." not in name or name.endswith(".localhost")

    def may_call(self, origin: str, host: str) -> bool:
        return ANY in self.origins or origin in self.origins or origin.lower().partition("://")[2] == host.lower()


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case; "" for none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host.lower()


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
