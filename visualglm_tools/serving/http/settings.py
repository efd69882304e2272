"""The options of a server -> what its engine takes on, and what its clients see; for one process and for Ray Serve.

Not here: how options are declared (`options.py` of `serving`).
"""

import os

from visualglm_tools.serving.engine.engine import Limits
from visualglm_tools.serving.http.app import ApiOptions
from visualglm_tools.serving.options import ServerOptions


MIB = 2**20


def limits_of(options: ServerOptions) -> Limits:
    """What an engine takes on."""
    return Limits(
        **options.limiting(),
        max_new_tokens=options.max_new_tokens,
        max_pictures=options.max_pictures,
        max_picture_bytes=int(options.max_picture_mib * MIB),
        timeout=options.timeout,
    )


def api_of(options: ServerOptions, key: str | None, *hosts: str) -> ApiOptions:
    """What clients see; `hosts` are names of the server beside those that the options give."""
    return ApiOptions(
        model_name=options.served_model_name or os.path.basename(os.path.abspath(options.model)),
        api_key=key,
        allow_urls=options.allow_urls,
        strict=options.strict,
        max_body_bytes=int(options.max_body_mib * MIB),
        cors_origins=options.cors_origins,
        allowed_hosts=[*hosts, *options.allowed_hosts],
    )
