"""What OpenAI's routes share of one server: its engine, its options, and the checks before anything is done.

Not here: the routes, and what is done with an engine (`answering.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel

from visualglm_tools.serving.engine.answers import Completion, EngineClosed
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.http.errors import ApiError
from visualglm_tools.serving.http.intake import Intake
from visualglm_tools.serving.http.public_urls import download_public


DOWNLOADS = 16  # at a time; they wait for others' servers
STREAMS = {200: {"content": {"text/event-stream": {}}}}  # events of several shapes


class Service:
    """One server, as its routes see it.

    Args:
        get_engine: gives the engine, or raises `EngineClosed` as long as there is none.
        intake: takes in bodies.
        options: `app.ApiOptions`.
    """

    def __init__(self, get_engine: Callable[[], Engine], intake: Intake, options):
        self.get_engine, self.intake, self.options = get_engine, intake, options
        self.downloads = ThreadPoolExecutor(DOWNLOADS, "downloads")

    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; None while the model is loaded."""
        try:
            return self.get_engine().context_length
        except EngineClosed:
            return None

    def check_model(self, name: str) -> None:
        if name != self.options.model_name:
            message = f"There is no model {name[:100]!r}; this server has {self.options.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_choices(self, number: int, engine: Engine) -> None:
        most = min(self.options.max_choices, engine.capacity)
        if number > most:
            raise ApiError(400, f"n is {number}; this server gives at most {most}.", param="n")

    def check_addresses(self, urls: Iterable[str]) -> None:
        for url in urls:
            check_address(url, self.options.allow_urls)

    def fetch_for(self, engine: Engine) -> Callable[[str], Awaitable[bytes]] | None:
        """What reads a picture behind an http(s) address; None where nothing is fetched."""
        if not self.options.allow_urls:
            return None
        return lambda url: fetch(url, engine.limits.max_picture_bytes, self.downloads)


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


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(completions: Sequence[Completion], n: int) -> Usage:
    """Of `n` answers to each prompt, which counts once, whatever their number."""
    prompts = sum(each.prompt_tokens for each in completions) // n
    answers = sum(each.completion_tokens for each in completions)
    return Usage(prompt_tokens=prompts, completion_tokens=answers, total_tokens=prompts + answers)


def body_of(name: str) -> dict:
    """What a route says in the OpenAPI schema about a body that it reads itself."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
