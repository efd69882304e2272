"""VisualGLM over HTTP: the original's `POST /` and OpenAI's routes, for several clients at a time.

    visualglm serve --model path/to/prepared
    curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" -d \\
        '{"model": "prepared", "messages": [{"role": "user", "content": "Hello"}]}'

On SIGTERM or Ctrl-C it takes no more requests, completes those it has, and ends.
"""

import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass

from visualglm_tools.options import COUNT, POSITIVE, number, option
from visualglm_tools.serving.http.api_key import KEY_VARIABLE, read_key
from visualglm_tools.serving.listening import address_of, listen
from visualglm_tools.serving.options import AddressOptions, ApiOptions, LimitOptions, ModelOptions, NameOptions


# torch, transformers, FastAPI and the model are imported in `run`: `-h` and typing errors shall not wait for them.
# Routes and engine are in `serving/`.

EXTRA = "api"
MIB = 2**20
SIZE = number(float, lambda value: 0 < value < 2**40, "above 0, below 2**40")
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True, kw_only=True)
class Options(LimitOptions, ApiOptions, NameOptions, AddressOptions, ModelOptions):
    api_key: str | None = option(
        f"that clients must send; better set {KEY_VARIABLE}", None, metavar="KEY", group="server"
    )
    cors_origins: tuple[str, ...] = option(
        "web page that may call; may be given several times",
        (),
        name="cors_origin",
        metavar="ORIGIN",
        is_repeated=True,
        group="server",
    )
    drain_seconds: float = option("for open requests at the end", 300, parse=POSITIVE, metavar="S", group="server")
    max_new_tokens: int | None = option(
        "of an answer", None, parse=COUNT, metavar="N", unset="the context's", group="limits"
    )
    max_pictures: int = option("of a conversation", 8, parse=COUNT, metavar="N", group="limits")
    max_picture_mib: float = option("of an encoded picture", 20, parse=SIZE, metavar="MIB", group="limits")
    max_body_mib: float = option("of a request", 32, parse=SIZE, metavar="MIB", group="limits")
    timeout: float = option("for an answer, waiting included", 300, parse=POSITIVE, metavar="S", group="limits")


def run(options: Options) -> int:
    """Serve until the process is asked to end; returns its exit code."""
    options.check()
    key = read_key(options.api_key)
    import uvicorn  # that it is missing is said before anything else

    sockets = listen(options.host, options.port)
    print(f"Listening at {address_of(sockets[0])}", file=sys.stderr)  # uvicorn is silent about others' sockets
    from transformers.utils import logging

    from visualglm_tools.serving.engine.engine import Engine
    from visualglm_tools.serving.http.app import LoadingEngine, create_app

    logging.set_verbosity_error()
    # The model's thread lets go of Python only when it must: others, such as a refusal, shall not wait 5 ms each time.
    sys.setswitchinterval(SWITCH_SECONDS)
    limits = limits_of(options)

    def stop_serving() -> None:
        server.should_exit = True

    def load() -> Engine:
        engine = Engine.load(options.model, limits, **options.loading())
        engine.start_decoders()
        return engine

    engine = LoadingEngine(load, stop_serving)

    @asynccontextmanager
    async def lifespan(app):
        engine.start()
        yield
        engine.close()

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, api_of(options, key), lifespan),
            timeout_graceful_shutdown=int(options.drain_seconds),
        )
    )
    server.run(sockets)
    if engine.error is not None:
        raise engine.error
    return 0 if engine.engine is not None else 1


def limits_of(options: Options):
    """What the engine takes on."""
    from visualglm_tools.serving.engine.engine import Limits

    return Limits(
        max_batch_size=options.max_batch_size,
        max_waiting=options.max_waiting,
        max_new_tokens=options.max_new_tokens,
        max_pictures=options.max_pictures,
        max_picture_bytes=int(options.max_picture_mib * MIB),
        timeout=options.timeout,
    )


def api_of(options: Options, key: str | None):
    """What clients see."""
    from visualglm_tools.serving.http.app import ApiOptions

    return ApiOptions(
        model_name=options.served_model_name or options.model.absolute().name,
        api_key=key,
        allow_urls=options.allow_urls,
        strict=options.strict,
        max_body_bytes=int(options.max_body_mib * MIB),
        cors_origins=options.cors_origins,
        allowed_hosts=[options.host, *options.allowed_hosts],
    )
