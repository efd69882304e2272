"""VisualGLM in the browser: give it a picture, read its description, ask on.

    visualglm web --model path/to/prepared        # then open http://127.0.0.1:8080

This door parses options, loads the model and serves the page; the page is in `serving/web.py`.
"""

import argparse
import importlib
import signal
import socket
import sys
from pathlib import Path

from visualglm_tools.checkpoints.folder import check_folder
from visualglm_tools.commands.options import COUNT, add_model_options, loading_options, number
from visualglm_tools.printing import report


# torch, transformers, gradio and the model are imported in `run`: `-h` and typing errors shall not wait for them.

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.png"))
PORT = number(int, lambda value: 0 < value < 65536, "a port from 1 to 65535")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Talk with VisualGLM-6B about pictures in the browser, in Chinese and English.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_options(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reachable from other machines")
    server.add_argument("--port", type=PORT, default=8080)
    server.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="of this server, such as its proxy's"
    )
    server.add_argument("--share", action="store_true", help="a public link through a tunnel of gradio's makers")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch-size", type=COUNT, default=8, metavar="N", help="answers generated at a time")
    limits.add_argument("--max-waiting", type=COUNT, default=64, metavar="N", help="questions that may wait")
    return parser


def check_port(host: str, port: int) -> None:
    """Raise an `OSError` if somebody listens there already: now, and not when a large model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is asked to end; returns its exit code."""
    check_folder(arguments.model)
    check_port(arguments.host, arguments.port)
    from visualglm_tools.serving.page.uploads import own_uploads

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or uploads would stay
    own_uploads()  # before gradio is imported, or it makes a folder of its own
    importlib.import_module("gradio")  # or that it is missing would be said when the model is loaded
    from transformers.utils import logging

    from visualglm_tools.serving.engine.engine import Engine, Limits
    from visualglm_tools.serving.page.page import create_page, launch

    logging.set_verbosity_error()
    limits = Limits(max_batch_size=arguments.max_batch_size, max_waiting=arguments.max_waiting)
    with Engine.load(arguments.model, limits, **loading_options(arguments)) as engine:
        engine.start_decoders()
        page = create_page(engine, EXAMPLES)
        launch(
            page,
            arguments.host,
            arguments.port,
            limits.max_picture_bytes,
            share=arguments.share,
            hosts=arguments.allowed_host,
        )
        print(f"VisualGLM-6B is at {page.local_url}", file=sys.stderr)
        page.block_thread()  # until Ctrl-C
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'visualglm-hf[web]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # OSError: the port is taken
        report(error)
        return 2
    except KeyboardInterrupt:  # while the model was being loaded
        return 130


if __name__ == "__main__":
    sys.exit(main())
