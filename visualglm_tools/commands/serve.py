"""VisualGLM over HTTP: the original's `POST /` and OpenAI's `/v1/chat/completions`, for several clients at a time.

    visualglm serve --model path/to/prepared
    curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" -d \\
        '{"model": "prepared", "messages": [{"role": "user", "content": "Hello"}]}'

This door parses options and runs the server; routes and engine are in `serving/`. On SIGTERM or Ctrl-C it takes no more
requests, completes those it has, and ends.
"""

import argparse
import math
import os
import socket
import sys
from contextlib import asynccontextmanager

from visualglm_tools.checkpoints.folder import check_folder
from visualglm_tools.commands.options import COUNT, add_model_options, loading_options, number
from visualglm_tools.printing import report
from visualglm_tools.serving.http.api_key import KEY_VARIABLE, read_key


# torch, transformers, FastAPI and the model are imported in `run`: `-h` and typing errors shall not wait for them.

MIB = 2**20
SWITCH_SECONDS = 0.0005


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Serve VisualGLM-6B over HTTP: the original's API and OpenAI's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=None,
    )
    port = number(int, lambda value: 0 <= value <= 65_535, "a port, 0 to 65535")
    amount = number(float, lambda value: 0 < value < math.inf, "a number above 0")
    add_model_options(parser)
    parser.add_argument("--served-model-name", metavar="NAME", help="for clients; the folder's name if not given")

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reachable from other machines")
    server.add_argument("--port", type=port, default=8080, help="0 for any that is free")
    server.add_argument("--api-key", metavar="KEY", help=f"that clients must send; better set {KEY_VARIABLE}")
    server.add_argument("--allow-urls", action="store_true", help="fetch pictures from public http(s) addresses")
    server.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="web page that may call")
    server.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="of this server, where it has no key"
    )
    server.add_argument("--drain-seconds", type=amount, default=300, metavar="S", help="for open requests at the end")

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch-size", type=COUNT, default=8, metavar="N", help="answers generated at a time")
    limits.add_argument("--max-waiting", type=COUNT, default=64, metavar="N", help="requests that may wait; more: 429")
    limits.add_argument("--max-new-tokens", type=COUNT, metavar="N", help="of an answer; the context's if not given")
    limits.add_argument("--max-pictures", type=COUNT, default=8, metavar="N", help="of a conversation")
    limits.add_argument("--max-picture-mib", type=amount, default=20, metavar="MIB", help="of an encoded picture")
    limits.add_argument("--max-body-mib", type=amount, default=32, metavar="MIB", help="of a request")
    limits.add_argument("--timeout", type=amount, default=300, metavar="S", help="for an answer, waiting included")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is asked to end; returns its exit code."""
    check_folder(arguments.model)
    key = read_key(arguments.api_key)
    sockets = listen(arguments.host, arguments.port)
    print(f"Listening at {address_of(sockets[0])}", file=sys.stderr)  # uvicorn is silent about others' sockets
    import uvicorn
    from transformers.utils import logging

    from visualglm_tools.serving.engine.engine import Engine, Limits
    from visualglm_tools.serving.http.app import ApiOptions, LoadingEngine, create_app

    logging.set_verbosity_error()
    # The model's thread lets go of Python only when it must: others, such as a refusal, shall not wait 5 ms each time.
    sys.setswitchinterval(SWITCH_SECONDS)
    limits = Limits(
        max_batch_size=arguments.max_batch_size,
        max_waiting=arguments.max_waiting,
        max_new_tokens=arguments.max_new_tokens,
        max_pictures=arguments.max_pictures,
        max_picture_bytes=int(arguments.max_picture_mib * MIB),
        timeout=arguments.timeout,
    )
    options = ApiOptions(
        model_name=arguments.served_model_name or arguments.model.absolute().name,
        api_key=key,
        allow_urls=arguments.allow_urls,
        max_body_bytes=int(arguments.max_body_mib * MIB),
        cors_origins=arguments.cors_origin,
        allowed_hosts=[arguments.host, *arguments.allowed_host],
    )

    def stop_serving() -> None:
        server.should_exit = True

    def load() -> Engine:
        engine = Engine.load(arguments.model, limits, **loading_options(arguments))
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
            create_app(engine, options, lifespan),
            timeout_graceful_shutdown=int(arguments.drain_seconds),
        )
    )
    server.run(sockets)
    if engine.error is not None:
        raise engine.error
    return 0 if engine.engine is not None else 1


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets at all addresses of `host`, so that nothing is loaded in vain; a `ValueError` if there can be none."""
    sockets = []
    try:
        for family, kind, protocol, _, (address, _, *more) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sockets.append(socket.socket(family, kind, protocol))
            if os.name == "posix":  # elsewhere it lets two servers have one port
                sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sockets[-1].bind((address, port, *more))
            port = port or sockets[0].getsockname()[1]  # the same for all addresses
    except (OSError, UnicodeError) as error:  # UnicodeError: a name with an empty or an overlong part
        for each in sockets:
            each.close()
        raise ValueError(f"cannot listen at {host!r}, port {port}: {error}. Give another --host or --port.") from error
    return sockets


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'visualglm-hf[api]'", file=sys.stderr)
        return 2
    except ValueError as error:
        report(error)
        return 2
    except KeyboardInterrupt:  # uvicorn passes it on after it has drained
        return 130


if __name__ == "__main__":
    sys.exit(main())
