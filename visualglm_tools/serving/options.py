"""Options of whatever answers questions: each is declared here, once, for the commands and for Ray Serve.

Not here: how options are declared (`options.py` of the package), and those that one command has for itself.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualglm_tools.checkpoints.folder import check_adapter, check_folder
from visualglm_tools.options import COUNT, COUNT_OR_NONE, PORT, PROBABILITY, option
from visualglm_tools.shipped import DEFAULT_MODEL


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the commands that answer questions load."""

    model: Path = option(
        "checkpoint folder", DEFAULT_MODEL, metavar="FOLDER", names=("from_pretrained",), group="model"
    )
    adapter: Path | None = option("what visualglm finetune has trained on it", None, metavar="FOLDER", group="model")
    quant: int | None = option("quantize the language model to 8 or 4 bits", None, choices=(8, 4), group="model")
    device: str = option("auto, cuda, cuda:1, mps or cpu", "auto", group="model")
    dtype: str = option(
        "number format; auto: float16, on a CPU float32 if it fits, else bfloat16",
        "auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        group="model",
    )

    def check(self) -> None:
        """Raise a `ValueError` if these folders cannot be loaded: now, and not when libraries and weights are."""
        check_folder(self.model)
        if self.adapter is not None:
            check_adapter(self.adapter)

    def loading(self) -> dict[str, Any]:
        """The keywords of `load_model`."""
        return {name: getattr(self, name) for name in ("device", "dtype", "quant", "adapter")}


@dataclass(frozen=True, kw_only=True)
class NameOptions:
    """Under which names a server may be reached."""

    allowed_hosts: tuple[str, ...] = option(
        "another name of this server, such as its proxy's, where clients have no key; may be given several times",
        (),
        name="allowed_host",
        metavar="NAME",
        is_repeated=True,
        group="server",
    )


@dataclass(frozen=True, kw_only=True)
class AddressOptions:
    """Where a server listens."""

    host: str = option("address to listen at; 0.0.0.0 to be reachable from other machines", "127.0.0.1", group="server")
    port: int = option("0 for any that is free", 8080, parse=PORT, group="server")


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """What clients of the API see of a server."""

    served_model_name: str | None = option(
        "what clients call the model", None, metavar="NAME", unset="the folder's name", group="server"
    )
    allow_urls: bool = option("fetch pictures from public http(s) addresses", False, group="server")


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What an engine takes on."""

    max_batch_size: int = option("answers generated at a time", 8, parse=COUNT, metavar="N", group="limits")
    max_waiting: int = option("requests that may wait; more are refused", 64, parse=COUNT, metavar="N", group="limits")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the tokens of an answer are chosen; the defaults are the original's."""

    max_length: int = option(
        "of the whole conversation and the answer, in tokens", 2048, parse=COUNT, metavar="N", group="answers"
    )
    top_p: float = option(
        "choose among the likeliest tokens that together have this probability",
        0.4,
        parse=PROBABILITY,
        metavar="P",
        group="answers",
    )
    top_k: int = option(
        "choose among this many likeliest tokens, 0 for all", 100, parse=COUNT_OR_NONE, metavar="K", group="answers"
    )
