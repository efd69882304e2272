"""The HTTP application: every route on one engine. Doors put a server around it (`api_hf.py`, `ray_app.py`)."""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers

from . import errors, legacy_api, openai_api
from .engine import Engine, EngineClosed
from .errors import ApiError


OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # without a key


@dataclass(frozen=True)
class ApiOptions:
    """What whoever runs the server decides.

    Args:
        model_name: as `GET /v1/models` lists it and requests name it.
        api_key: that clients must send as `Authorization: Bearer KEY`; None for no key.
        allow_urls: whether pictures may be http(s) addresses, public ones only.
        max_body_bytes: of a request.
        cors_origins: web pages that may call from a browser; "*" for all.
        max_choices: the largest `n`.
    """

    model_name: str
    api_key: str | None = None
    allow_urls: bool = False
    max_body_bytes: int = 32 * 2**20
    cors_origins: Sequence[str] = ()
    max_choices: int = 8


class LoadingEngine:
    """An engine that is loaded in the background; calling it gives the engine.

    Args:
        load: makes the engine.
        on_failure: called when `load` has failed; a `ValueError` is then `error`.
    """

    def __init__(self, load: Callable[[], Engine], on_failure: Callable[[], None]):
        self.load, self.on_failure = load, on_failure
        self.engine: Engine | None = None
        self.error: ValueError | None = None
        self.thread = threading.Thread(target=self._load, name="loading", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def _load(self) -> None:
        try:
            self.engine = self.load()
        except ValueError as error:
            self.error = error
        finally:
            if self.engine is None:  # after other errors too, which the thread reports
                self.on_failure()

    def __call__(self) -> Engine:
        if self.engine is None:
            raise EngineClosed("The model is being loaded; try again in a few seconds.")
        return self.engine

    def close(self) -> None:
        """Answer what was asked, then stop. A model that is still being loaded ends with the process."""
        if self.engine is not None:
            self.engine.close()


def create_app(get_engine: Callable[[], Engine], options: ApiOptions, lifespan: Callable | None = None) -> FastAPI:
    """The application.

    Args:
        get_engine: gives the engine, or raises `EngineClosed` as long as there is none.
        options: what whoever runs the server decides.
        lifespan: FastAPI's.
    """
    app = FastAPI(
        title="VisualGLM-6B",
        description="Answers questions about pictures, in Chinese and English.",
        lifespan=lifespan,
        redoc_url=None,
    )
    errors.install(app)
    app.include_router(legacy_api.create_router(get_engine))
    app.include_router(openai_api.create_router(get_engine, options))
    add_status_routes(app, get_engine, options)
    # The last one added sees a request first.
    app.add_middleware(LimitBody, max_bytes=options.max_body_bytes)
    if options.api_key:
        app.add_middleware(RequireKey, key=options.api_key)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def add_status_routes(app: FastAPI, get_engine: Callable[[], Engine], options: ApiOptions) -> None:
    @app.get("/health", responses={503: {"description": "Not now"}}, tags=["status"])
    async def health() -> JSONResponse:
        """200 when requests are taken; 503 while the model is loaded, after a failure, and at the end."""
        try:
            get_engine().check_alive()
        except EngineClosed as error:
            return JSONResponse({"status": "unavailable", "reason": str(error)}, 503)
        return JSONResponse({"status": "ok", "model": options.model_name})

    @app.get("/metrics", response_class=Response, responses=errors.responses(401, 503), tags=["status"])
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(get_engine().metrics.as_text(), media_type=CONTENT_TYPE_LATEST)


class RequireKey:
    """Middleware: no request without the key gets further, whatever its size."""

    def __init__(self, app, key: str):
        self.app, self.expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self.expected):
                message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
                await ApiError(401, message, code="invalid_api_key").as_response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class LimitBody:
    """Middleware: stop reading a request that is too large, whatever it says about its size."""

    def __init__(self, app, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = ApiError(413, f"The request is too large; the limit is {self.max_bytes} bytes.", code="too_large")
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            await too_large.as_response()(scope, receive, send)
            return
        received = 0

        async def receive_limited():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise too_large
            return message

        await self.app(scope, receive_limited, send)
