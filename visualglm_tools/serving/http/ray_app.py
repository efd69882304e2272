"""The HTTP application on several engines: a Ray Serve deployment, one engine per replica, on one machine or a cluster.

    visualglm serve --ray --replicas 2 --model path/to/prepared
    serve run visualglm_tools.serving.http.ray_app:create_service \\
        model=path/to/prepared max_replicas=2 gpus_per_replica=1

Routes are those of `visualglm serve`. Requests go to the replica that has fewer; each batches its own. Ray asks each
replica whether it is well, and replaces those that are not.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application

from visualglm_tools.options import AMOUNT, COUNT, from_values, option
from visualglm_tools.printing import first_line
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.http.api_key import read_key
from visualglm_tools.serving.http.app import create_app
from visualglm_tools.serving.http.settings import api_of, limits_of
from visualglm_tools.serving.options import ServerOptions


PACKAGES = Path(__file__).resolve().parents[3]  # on each machine of a cluster, at the same path
FOLDERS = ("model", "adapter")
NAME = "VisualGLM"


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(ServerOptions):
    """What `serve run` may be given as name=value; the limits are a replica's, and again for requests before them."""

    min_replicas: int = option("that there are always", 1, parse=COUNT)
    max_replicas: int = option("started as requests begin to wait", 1, parse=COUNT)
    gpus_per_replica: float | None = option(
        "that Ray reserves", None, parse=AMOUNT, unset="1 where the model is on one, else 0"
    )
    cpus_per_replica: float = option("that Ray reserves", 1, parse=AMOUNT)


class Replica:
    """One engine. Ray closes it with its process."""

    def __init__(self, options: ServiceOptions):
        options.check_compiling()
        self.engine = Engine.load(options.model, limits_of(options), options.compiling(), **options.loading())
        self.engine.start_decoders()

    def check_health(self) -> None:
        self.engine.check_alive()


def create_service(values: dict[str, Any]) -> Application:
    """The application that `serve run` deploys; `values` are those of `ServiceOptions`, or texts that say them.

    Raises:
        ValueError: a name that is none of theirs, a value that cannot be, or more replicas at least than at most.
    """
    return service_of(from_values(ServiceOptions, values), read_key())


def service_of(options: ServiceOptions, key: str | None, *hosts: str) -> Application:
    """The application with these options; `hosts` as in `api_of`."""
    if options.min_replicas > options.max_replicas:
        raise ValueError(f"min_replicas={options.min_replicas} is more than max_replicas={options.max_replicas}.")
    folders = {name: folder.expanduser().resolve() for name in FOLDERS if (folder := getattr(options, name))}
    options = replace(options, **folders)  # a replica has another working directory
    api = api_of(options, key, *hosts)

    def build_app():
        return create_app(lambda: serve.get_replica_context().servable_object.engine, api)

    deployment = serve.deployment(
        serve.ingress(build_app)(Replica),
        name=NAME,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.max_batch_size,
        },
        max_ongoing_requests=options.max_batch_size + options.max_waiting,
        max_queued_requests=options.max_waiting,  # before the replicas; beyond, Ray answers 503
        ray_actor_options={
            "num_gpus": gpus_of(options),
            "num_cpus": options.cpus_per_replica,
            "runtime_env": {"env_vars": {"PYTHONPATH": str(PACKAGES)}},  # where a replica finds this module
        },
        graceful_shutdown_timeout_s=options.drain_seconds,  # open requests are answered
    )
    return deployment.bind(options)


def gpus_of(options: ServiceOptions) -> float:
    """What a replica reserves: one that reserves nothing is shown no GPU by Ray, and would answer on the CPU."""
    if options.gpus_per_replica is not None:
        return options.gpus_per_replica
    wants_one = options.device.partition(":")[0] in ("auto", "cuda")
    return float(wants_one and torch.cuda.is_available())


def serve_replicas(options: ServiceOptions, key: str | None, host: str, port: int) -> int:
    """Serve until the process is asked to end; returns its exit code.

    Raises:
        ValueError: the replicas cannot be started.
    """
    application = service_of(options, key, host)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers else
    ray.init(namespace="serve")
    with asked_to_end() as ending:  # only now: Ray has handlers of its own
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(application, name=NAME, route_prefix="/")
            print(f"{options.min_replicas} replicas answer at http://{host}:{port}", file=sys.stderr)
            ending.wait()
        except RuntimeError as error:  # Ray's, when a replica ends while it starts
            raise ValueError(f"the replicas cannot be started: {first_line(error)} Ray's log says why.") from error
        finally:
            serve.shutdown()
            ray.shutdown()
    return 0


@contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """What is set by SIGTERM and Ctrl-C."""
    ending = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous:
        signal.signal(number, lambda number, frame: ending.set())
    try:
        yield ending
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
