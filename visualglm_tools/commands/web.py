"""VisualGLM in the browser: give it a picture, read its description, ask on.

    visualglm web --model path/to/prepared        # then open http://127.0.0.1:8080

Several people can use it at a time, each with a picture of their own. Ctrl-C ends it.
"""

import importlib
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import option
from visualglm_tools.serving.listening import find_port, tell_openness
from visualglm_tools.serving.options import AddressOptions, LimitOptions, NameOptions, SpeedOptions
from visualglm_tools.serving.page.accounts import VARIABLE, read_accounts
from visualglm_tools.shipped import EXAMPLES


# torch, transformers, gradio and the model are imported in `run`: `-h` and typing errors shall not wait for them.
# The page is in `serving/page/`.

EXTRA = "web"


@dataclass(frozen=True, kw_only=True)
class Options(LimitOptions, NameOptions, AddressOptions, SpeedOptions):
    share: bool = option("a public link through a tunnel of gradio's makers", False, group="server")
    auth: tuple[str, ...] = option(
        f"who may log in; may be given several times; better set {VARIABLE}, which other users do not see",
        (),
        metavar="USER:PASSWORD",
        is_repeated=True,
        group="server",
    )
    auth_file: Path | None = option(
        "who may log in, a USER:PASSWORD in each line", None, metavar="FILE", group="server"
    )


def run(options: Options) -> None:
    """Serve until the process is asked to end."""
    options.check()
    accounts = read_accounts(options.auth, options.auth_file)
    port = find_port(options.host, options.port)
    if not accounts:
        tell_openness(options.host, f"nobody has to log in. {VARIABLE}=USER:PASSWORD changes that.")
    from visualglm_tools.serving.page.uploads import own_uploads

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or uploads would stay
    own_uploads()  # before gradio is imported, or it makes a folder of its own
    with heavy_imports():
        importlib.import_module("gradio")  # or that it is missing would be said when the model is loaded
        from transformers.utils import logging

        from visualglm_tools.serving.engine.engine import Engine, Limits
        from visualglm_tools.serving.page.page import create_page, launch

    logging.set_verbosity_error()
    limits = Limits(**options.limiting())
    options.check_compiling()
    with Engine.load(options.model, limits, options.compiling(), **options.loading()) as engine:
        engine.start_decoders()
        page = create_page(engine, EXAMPLES)
        hosts = options.allowed_hosts
        launch(page, options.host, port, limits.max_picture_bytes, options.share, hosts, accounts)
        print(f"The page is at {page.local_url}", file=sys.stderr)
        page.block_thread()  # until Ctrl-C
