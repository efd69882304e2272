"""The HTTP application on several engines: a Ray Serve deployment, one engine per replica, on one machine or a cluster.

    serve run visualglm_tools.serving.http.ray_app:create_service \\
        model=path/to/prepared max_replicas=2 gpus_per_replica=1

Routes are those of `visualglm serve`, at http://127.0.0.1:8000 unless Ray Serve is told another place. Requests go to
the replica that has fewer; each batches its own. Ray asks each replica whether it is well, and replaces those that are
not.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from visualglm_tools.options import AMOUNT, COUNT, from_values, option
from visualglm_tools.serving.engine.answers import Limits
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.http.api_key import read_key
from visualglm_tools.serving.http.app import ApiOptions, create_app
from visualglm_tools.serving.options import ApiOptions as ServedOptions
from visualglm_tools.serving.options import LimitOptions, NameOptions, SpeedOptions


PACKAGES = Path(__file__).resolve().parents[3]  # on each machine of a cluster, at the same path
FOLDERS = ("model", "adapter")


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(LimitOptions, ServedOptions, NameOptions, SpeedOptions):
    """What `serve run` may be given as name=value; the limits are a replica's, and again for requests before them."""

    min_replicas: int = option("that there are always", 1, parse=COUNT)
    max_replicas: int = option("started as requests begin to wait", 1, parse=COUNT)
    gpus_per_replica: float = option("that Ray reserves", 0, parse=AMOUNT)
    cpus_per_replica: float = option("that Ray reserves", 1, parse=AMOUNT)


class Replica:
    """One engine. Ray closes it with its process."""

    def __init__(self, options: ServiceOptions):
        options.check_compiling()
        limits = Limits(**options.limiting())
        self.engine = Engine.load(options.model, limits, options.compiling(), **options.loading())

    def check_health(self) -> None:
        self.engine.check_alive()


def create_service(values: dict[str, Any]) -> Application:
    """The application that `serve run` deploys; `values` are those of `ServiceOptions`, or texts that say them.

    Raises:
        ValueError: a name that is none of theirs, a value that cannot be, or more replicas at least than at most.
    """
    options = from_values(ServiceOptions, values)
    if options.min_replicas > options.max_replicas:
        raise ValueError(f"min_replicas={options.min_replicas} is more than max_replicas={options.max_replicas}.")
    folders = {name: folder.expanduser().resolve() for name in FOLDERS if (folder := getattr(options, name))}
    options = replace(options, **folders)  # a replica has another working directory
    api = ApiOptions(
        model_name=options.served_model_name or options.model.name,
        api_key=read_key(),
        allow_urls=options.allow_urls,
        strict=options.strict,
        allowed_hosts=options.allowed_hosts,
    )

    def build_app():
        return create_app(lambda: serve.get_replica_context().servable_object.engine, api)

    deployment = serve.deployment(
        serve.ingress(build_app)(Replica),
        name="VisualGLM",
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.max_batch_size,
        },
        max_ongoing_requests=options.max_batch_size + options.max_waiting,
        max_queued_requests=options.max_waiting,  # before the replicas; beyond, Ray answers 503
        ray_actor_options={
            "num_gpus": options.gpus_per_replica,
            "num_cpus": options.cpus_per_replica,
            "runtime_env": {"env_vars": {"PYTHONPATH": str(PACKAGES)}},  # where a replica finds this module
        },
        graceful_shutdown_timeout_s=Limits().timeout,  # open requests are answered
    )
    return deployment.bind(options)
