"""VisualGLM over HTTP: the original's `POST /` and OpenAI's routes, for several clients at a time.

    visualglm serve --model path/to/prepared
    curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" -d \\
        '{"model": "prepared", "messages": [{"role": "user", "content": "Hello"}]}'

On SIGTERM or Ctrl-C it takes no more requests, completes those it has, and ends. `--ray` serves from several engines,
on as many GPUs or machines as Ray has.
"""

import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields

from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import AMOUNT, COUNT, is_given, option
from visualglm_tools.packages import missing
from visualglm_tools.serving.http.api_key import KEY_VARIABLE, read_key
from visualglm_tools.serving.listening import address_of, find_port, listen, tell_openness
from visualglm_tools.serving.options import AddressOptions, ServerOptions


# torch, transformers, FastAPI and the model are imported in `run`: `-h` and typing errors shall not wait for them.
# Routes and engine are in `serving/`.

EXTRA = "api"
SWITCH_SECONDS = 0.0005
NO_KEY = f"there is no key. {KEY_VARIABLE} sets one."


@dataclass(frozen=True, kw_only=True)
class Options(ServerOptions, AddressOptions):
    api_key: str | None = option(
        f"that clients must send; better set {KEY_VARIABLE}", None, metavar="KEY", group="server"
    )
    ray: bool = option("serve from several engines, with the extra ray", False, group="several engines")
    replicas: int = option(
        "with --ray, engines with a model each", 1, parse=COUNT, metavar="N", group="several engines"
    )
    gpus_per_replica: float | None = option(
        "with --ray, what Ray reserves",
        None,
        parse=AMOUNT,
        metavar="N",
        unset="1 where the model is on one, else 0",
        group="several engines",
    )
    cpus_per_replica: float = option(
        "with --ray, what Ray reserves", 1, parse=AMOUNT, metavar="N", group="several engines"
    )

    def check(self) -> None:
        super().check()
        alone = [name for name in ("replicas", "gpus_per_replica", "cpus_per_replica") if is_given(self, name)]
        if alone and not self.ray:
            raise ValueError(f"--{alone[0].replace('_', '-')} goes with --ray.")


def run(options: Options) -> int:
    """Serve until the process is asked to end; returns its exit code."""
    options.check()
    key = read_key(options.api_key)
    if options.ray:
        return run_replicas(options, key)
    import uvicorn  # that it is missing is said before anything else

    sockets = listen(options.host, options.port)
    print(f"Listening at {address_of(sockets[0])}", file=sys.stderr)  # uvicorn is silent about others' sockets
    if key is None:
        tell_openness(options.host, NO_KEY)
    with heavy_imports():
        from transformers.utils import logging

        from visualglm_tools.serving.engine.engine import Engine
        from visualglm_tools.serving.http.app import LoadingEngine, create_app
        from visualglm_tools.serving.http.settings import api_of, limits_of

    logging.set_verbosity_error()
    # The model's thread lets go of Python only when it must: others, such as a refusal, shall not wait 5 ms each time.
    sys.setswitchinterval(SWITCH_SECONDS)
    limits = limits_of(options)
    options.check_compiling()

    def stop_serving() -> None:
        server.should_exit = True

    def load() -> Engine:
        engine = Engine.load(options.model, limits, options.compiling(), **options.loading())
        engine.start_decoders()
        print("The model is loaded: requests are answered.", file=sys.stderr)
        return engine

    engine = LoadingEngine(load, stop_serving)

    @asynccontextmanager
    async def lifespan(app):
        engine.start()
        yield
        engine.close()

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, api_of(options, key, options.host), lifespan),
            timeout_graceful_shutdown=int(options.drain_seconds),
        )
    )
    server.run(sockets)
    if engine.error is not None:
        raise engine.error
    return 0 if engine.engine is not None else 1


def run_replicas(options: Options, key: str | None) -> int:
    """Serve from several engines until the process is asked to end."""
    try:
        from visualglm_tools.serving.http.ray_app import ServiceOptions, serve_replicas
    except ImportError as error:
        raise ValueError(missing(str(error.name), "ray")) from error

    port = find_port(options.host, options.port)
    if key is None:
        tell_openness(options.host, NO_KEY)
    shared = {each.name: getattr(options, each.name) for each in fields(ServerOptions)}
    service = ServiceOptions(
        **shared,
        min_replicas=options.replicas,
        max_replicas=options.replicas,
        gpus_per_replica=options.gpus_per_replica,
        cpus_per_replica=options.cpus_per_replica,
    )
    return serve_replicas(service, key, options.host, port)
