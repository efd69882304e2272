"""The HTTP application on several engines: a Ray Serve deployment, one engine per replica, on one machine or a cluster.

    serve run visualglm_tools.serving.http.ray_app:create_service \\
        model=path/to/prepared max_replicas=2 gpus_per_replica=1

Routes are those of `api_hf.py`, at http://127.0.0.1:8000 unless Ray Serve is told another place. Requests go to the
replica that has fewer; each batches its own. Ray asks each replica whether it is well, and replaces those that are not.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from visualglm_tools.commands.options import DEFAULT_MODEL
from visualglm_tools.serving.engine.engine import Engine, Limits
from visualglm_tools.serving.http.api_key import read_key
from visualglm_tools.serving.http.app import ApiOptions, create_app


PACKAGES = Path(__file__).resolve().parents[3]  # on each machine of a cluster, at the same path


class ServiceOptions(BaseModel):
    """What `serve run` may be given as name=value; see `api_hf.py -h` for those that it has too."""

    model_config = ConfigDict(extra="forbid")

    model: Path = DEFAULT_MODEL
    adapter: Path | None = None
    quant: int | None = Field(None, description="4 or 8")
    device: str = "auto"
    dtype: str = "auto"
    served_model_name: str | None = None
    allow_urls: bool = False
    allowed_hosts: str = Field("", description="names of this service where it has no key, with commas between them")
    max_batch_size: int = Field(8, ge=1, description="answers that a replica generates at a time")
    max_waiting: int = Field(64, ge=1, description="requests that may wait at a replica, and again before all of them")
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1, description="started as requests begin to wait")
    gpus_per_replica: float = Field(0, ge=0)
    cpus_per_replica: float = Field(1, ge=0)


class Replica:
    """One engine. Ray closes it with its process."""

    def __init__(self, options: ServiceOptions):
        limits = Limits(max_batch_size=options.max_batch_size, max_waiting=options.max_waiting)
        loading = options.model_dump(include={"device", "dtype", "quant", "adapter"})
        self.engine = Engine.load(options.model, limits, **loading)

    def check_health(self) -> None:
        self.engine.check_alive()


def create_service(options: ServiceOptions) -> Application:
    """The application that `serve run` deploys.

    Raises:
        ValueError: more replicas at least than at most.
    """
    if options.min_replicas > options.max_replicas:
        raise ValueError(f"min_replicas={options.min_replicas} is more than max_replicas={options.max_replicas}.")
    options.model = options.model.expanduser().resolve()  # a replica has another working directory
    api = ApiOptions(
        model_name=options.served_model_name or options.model.name,
        api_key=read_key(),
        allow_urls=options.allow_urls,
        allowed_hosts=[host for host in options.allowed_hosts.split(",") if host],
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
