"""VisualGLM over HTTP: the original's `POST /` and OpenAI's `/v1/chat/completions`, for several clients at a time.

    python scripts/api_hf.py --model path/to/prepared
    curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" -d \\
        '{"model": "prepared", "messages": [{"role": "user", "content": "Hello"}]}'

This door parses options and runs the server; routes and engine are in `serving/`. On SIGTERM or Ctrl-C it takes no more
requests, completes those it has, and ends.
"""

import argparse
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path


# torch, transformers, FastAPI and the model are imported in `run`: `-h` and typing errors shall not wait for them.

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "models" / "visualglm-tiny"
KEY_VARIABLE = "VISUALGLM_API_KEY"
MIB = 2**20
SWITCH_SECONDS = 0.0005


def positive(kind: type):
    """An argparse type: a number above 0."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = "positive number"  # argparse says "invalid positive number value: '-1'"
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Serve VisualGLM-6B over HTTP: the original's API and OpenAI's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=None,
    )
    count, seconds, size = positive(int), positive(float), positive(float)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=DEFAULT_MODEL, type=Path, metavar="FOLDER", help="checkpoint folder")
    model.add_argument("--adapter", metavar="FOLDER", help="a fine-tuned adapter to load on top")
    model.add_argument("--quant", type=int, choices=(8, 4), help="quantize the language model to 8 or 4 bits")
    model.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    model.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    model.add_argument("--served-model-name", metavar="NAME", help="for clients; the folder's name if not given")

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reachable from other machines")
    server.add_argument("--port", type=int, default=8080)
    server.add_argument("--api-key", metavar="KEY", help=f"that clients must send; better set {KEY_VARIABLE}")
    server.add_argument("--allow-urls", action="store_true", help="fetch pictures from public http(s) addresses")
    server.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="web page that may call")
    server.add_argument("--drain-seconds", type=seconds, default=300, metavar="S", help="for open requests at the end")

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch-size", type=count, default=8, metavar="N", help="answers generated at a time")
    limits.add_argument("--max-waiting", type=count, default=64, metavar="N", help="requests that may wait; more: 429")
    limits.add_argument("--max-new-tokens", type=count, metavar="N", help="of an answer; the context's if not given")
    limits.add_argument("--max-pictures", type=count, default=8, metavar="N", help="of a conversation")
    limits.add_argument("--max-picture-mib", type=size, default=20, metavar="MIB", help="of an encoded picture")
    limits.add_argument("--max-body-mib", type=size, default=32, metavar="MIB", help="of a request")
    limits.add_argument("--timeout", type=seconds, default=300, metavar="S", help="for an answer, waiting included")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is asked to end; returns its exit code."""
    import uvicorn
    from serving.app import ApiOptions, LoadingEngine, create_app
    from serving.engine import Engine, Limits
    from transformers.utils import logging

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
    loading_options = {"device": arguments.device, "dtype": arguments.dtype, "quant": arguments.quant}
    if arguments.adapter:
        loading_options["adapter"] = arguments.adapter
    options = ApiOptions(
        model_name=arguments.served_model_name or arguments.model.absolute().name,
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE),
        allow_urls=arguments.allow_urls,
        max_body_bytes=int(arguments.max_body_mib * MIB),
        cors_origins=arguments.cors_origin,
    )

    def stop_serving() -> None:
        server.should_exit = True

    engine = LoadingEngine(lambda: Engine.load(arguments.model, limits, **loading_options), stop_serving)

    @asynccontextmanager
    async def lifespan(app):
        engine.start()
        yield
        engine.close()

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, options, lifespan),
            host=arguments.host,
            port=arguments.port,
            timeout_graceful_shutdown=int(arguments.drain_seconds),
        )
    )
    server.run()
    if engine.error is not None:
        raise engine.error
    return 0 if engine.engine is not None else 1


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        return run(arguments)
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'visualglm-hf[api]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # uvicorn passes it on after it has drained
        return 130


if __name__ == "__main__":
    sys.exit(main())
