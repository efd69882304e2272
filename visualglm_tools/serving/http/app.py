"""The HTTP application: every route on one engine. Doors put a server around it (`commands/serve.py`, `ray_app.py`)."""

import functools
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema

from visualglm_tools.serving.engine.answers import EngineClosed
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.http.api_key import check_key
from visualglm_tools.serving.http.guards import IGNORED_FIELDS, NameIgnored, Normalize, RefuseOtherPages, RequireKey
from visualglm_tools.serving.http.intake import Intake
from visualglm_tools.serving.http.service import Service

from . import completions_api, errors, legacy_api, openai_api, responses_api, tokenize_api, transformers_api


# What routes read themselves, so that FastAPI does not know of it.
BODIES = (
    legacy_api.LegacyRequest,
    openai_api.ChatRequest,
    completions_api.CompletionRequest,
    responses_api.ResponsesRequest,
    tokenize_api.TokenizeRequest,
)

UNSENDABLE = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode


@dataclass(frozen=True)
class ApiOptions:
    """What whoever runs the server decides.

    Args:
        model_name: as `GET /v1/models` lists it and requests name it.
        api_key: that clients must send as `Authorization: Bearer KEY`; None for no key. Without, requests of other
            pages and under other names are refused: see `guards.RefuseOtherPages`.
        allow_urls: whether pictures may be http(s) addresses, public ones only.
        max_body_bytes: of a request.
        cors_origins: web pages that may call from a browser; "*" for all.
        max_choices: the largest `n`.
        allowed_hosts: names of this server, where it has no key; "*" for any.
        strict: whether unknown fields are refused; else they are ignored, and named in a header of the response.

    Raises:
        ValueError: a name or a key that is empty or that no client could send.
    """

    model_name: str
    api_key: str | None = None
    allow_urls: bool = False
    max_body_bytes: int = 32 * 2**20
    cors_origins: Sequence[str] = ()
    max_choices: int = 8
    allowed_hosts: Sequence[str] = ()
    strict: bool = False

    def __post_init__(self):
        if not is_sendable(self.model_name):
            message = f"no client could name the model {self.model_name!r}. Give another name: --served-model-name NAME"
            raise ValueError(message)
        if self.api_key is not None:
            check_key(self.api_key)


def is_sendable(name: str) -> bool:
    """Whether `name` has letters and no control characters, line breaks or bytes that are not UTF-8 (half pairs)."""
    return bool(name) and not any(unicodedata.category(each) in UNSENDABLE for each in name)


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
    intake = Intake(options.max_body_bytes, options.strict)
    app.include_router(legacy_api.create_router(get_engine, intake))
    service = Service(get_engine, intake, options)
    app.include_router(openai_api.create_router(service))
    app.include_router(completions_api.create_router(service))
    app.include_router(responses_api.create_router(service))
    app.include_router(tokenize_api.create_router(service))
    app.include_router(transformers_api.create_router(get_engine, intake, options.model_name))
    add_status_routes(app, get_engine, options)
    app.openapi = functools.partial(describe, app)
    # The last one added sees a request first.
    app.add_middleware(NameIgnored)
    if options.api_key is None:
        app.add_middleware(RefuseOtherPages, origins=options.cors_origins, hosts=options.allowed_hosts)
    else:
        app.add_middleware(RequireKey, key=check_key(options.api_key))
    app.add_middleware(Normalize)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[IGNORED_FIELDS],
        )
    return app


def describe(app: FastAPI) -> dict:
    """The OpenAPI schema: FastAPI's, and the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        bodies = [(body, "validation") for body in BODIES]
        _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"].update(definitions["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema


def add_status_routes(app: FastAPI, get_engine: Callable[[], Engine], options: ApiOptions) -> None:
    @app.get("/health", responses={503: {"description": "Not now"}}, tags=["status"])
    async def health() -> JSONResponse:
        """200 when requests are taken; 503 while the model is loaded, after a failure, and at the end."""
        try:
            get_engine().check_alive()
        except EngineClosed as error:
            return JSONResponse({"status": "unavailable", "reason": str(error)}, 503)
        return JSONResponse({"status": "ok", "model": options.model_name})

    @app.get("/metrics", response_class=Response, responses=errors.responses(401, 403, 503), tags=["status"])
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(get_engine().metrics.as_text(), media_type=CONTENT_TYPE_LATEST)
