"""Puts what must run before gradio into the head of its page: an ASGI middleware.

Gradio's own way, `launch(head=...)`, comes after it has chosen the language of its texts, and not before a login.
"""

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import MutableHeaders


HEAD = b"<head>"


class AddToHead:
    """See the module's docstring.

    Args:
        app: gradio's application.
        markup: HTML for the beginning of the head.
    """

    def __init__(self, app: Callable, markup: str):
        self.app, self.markup = app, markup.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            return await self.app(scope, receive, send)
        held = []  # the response's start, until it is known how long it is

        async def add(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                held.append(message)
                return
            body = message.get("body", b"")
            while held:
                start = held.pop()
                if HEAD in body:
                    message = {**message, "body": body.replace(HEAD, HEAD + self.markup, 1)}
                    headers = MutableHeaders(scope=start)
                    headers["content-length"] = str(int(headers["content-length"]) + len(self.markup))
                await send(start)
            await send(message)

        return await self.app(scope, receive, add)
