"""Options of whatever answers questions: each is declared here, once, for the commands and for Ray Serve.

Not here: how options are declared (`options.py` of the package), and those that one command has for itself.
"""

import argparse
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from visualglm_tools.checkpoints.folder import check_adapter, check_folder
from visualglm_tools.options import (
    AMOUNT,
    COUNT,
    COUNT_OR_NONE,
    PORT,
    POSITIVE,
    PROBABILITY,
    argument,
    is_given,
    number,
    one_of,
    option,
)
from visualglm_tools.shipped import DEFAULT_MODEL


SIZE = number(float, lambda value: 0 < value < 2**40, "above 0, below 2**40")


def origin(text: str) -> str:
    """A `parse` for pages as browsers name them; with a path behind it none would ever match."""
    if text != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", text):
        raise argparse.ArgumentTypeError(f"must be like https://page.example, without a path, or *, found {text!r}")
    return text.lower()


def host(text: str) -> str:
    """A `parse` for names of a server; with a port behind it none would ever match."""
    if not re.fullmatch(r"[^/\s:?#@]+", text):
        raise argparse.ArgumentTypeError(f"must be a name like api.example, without a port, or *, found {text!r}")
    return text.lower()


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the commands that answer questions load."""

    model: Path = option(
        "checkpoint folder", DEFAULT_MODEL, metavar="FOLDER", names=("from_pretrained",), group="model"
    )
    adapter: Path | None = option("what visualglm finetune has trained on it", None, metavar="FOLDER", group="model")
    quant: int | None = option("quantize the language model to 8 or 4 bits", None, choices=(8, 4), group="model")
    quant_image_encoder: bool = option("with --quant, quantize the image encoder too, to 8 bits", False, group="model")
    device: str = option("auto, cuda, cuda:1, mps or cpu", "auto", group="model")
    dtype: str = option(
        "number format; auto: float16, on a CPU what fits of float32 and bfloat16, and is multiplied faster",
        "auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        group="model",
    )
    image_size: int | None = option(
        "pixels a side at which pictures are shown, a multiple of 14",
        None,
        parse=COUNT,
        metavar="PIXELS",
        unset="what the model or its adapter was trained with, 224",
        group="model",
    )

    def check(self) -> None:
        """Raise a `ValueError` if these folders cannot be loaded: now, and not when libraries and weights are."""
        if self.quant_image_encoder and self.quant is None:
            raise ValueError("--quant-image-encoder goes with --quant 8 or --quant 4.")
        check_folder(self.model)
        if self.adapter is not None:
            check_adapter(self.adapter)

    def loading(self) -> dict[str, Any]:
        """The keywords of `load_model`."""
        names = ("device", "dtype", "quant", "quant_image_encoder", "adapter", "image_size")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(ModelOptions):
    """How the step from token to token is made faster."""

    speed_up: str | None = one_of(
        {
            "compile": ("compile", "compile the model: faster, but the first answer waits a minute or more"),
            "record": ("record", "on an NVIDIA GPU, record CUDA graphs: faster, and no wait"),
        },
        None,
        group="answers",
    )

    def compiling(self):
        """What `generate` takes as `compile`: a bool, or a CompileConfig of transformers."""
        if self.speed_up != "record":
            return self.speed_up == "compile"
        from transformers import CompileConfig

        from visualglm_hf.compilation import GRAPHS_ALONE

        return CompileConfig(backend=GRAPHS_ALONE)

    def check_compiling(self) -> None:
        """Raise a `ValueError` if this cannot be done on the device, or its compiler is missing."""
        if self.speed_up is not None:
            from visualglm_hf.compilation import resolve_compile_config
            from visualglm_tools.checkpoints.loading import choose_device

            device = choose_device(self.device)
            if self.speed_up == "record" and device.type != "cuda":
                kind = repr(device.type)
                raise ValueError(f"--record is for an NVIDIA GPU, and the model will be on {kind}. Leave it out.")
            resolve_compile_config(self.compiling(), device)


@dataclass(frozen=True, kw_only=True)
class NameOptions:
    """Under which names a server may be reached."""

    allowed_hosts: tuple[str, ...] = option(
        "another name of this server, such as its proxy's, where clients have no key; may be given several times",
        (),
        name="allowed_host",
        parse=host,
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
    strict: bool = option(
        "refuse fields of requests that are not known, instead of ignoring and naming them", False, group="server"
    )


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What an engine takes on."""

    max_batch_size: int = option("answers generated at a time", 8, parse=COUNT, metavar="N", group="limits")
    max_waiting: int = option("requests that may wait; more are refused", 64, parse=COUNT, metavar="N", group="limits")
    prompt_cache_mib: float = option(
        "of what was computed for the last prompts, so that the same are not read again; 0 for none",
        256,
        parse=AMOUNT,
        metavar="MIB",
        group="limits",
    )

    def limiting(self) -> dict[str, int]:
        """The keywords of `Limits`."""
        prompt_cache_bytes = int(self.prompt_cache_mib * 2**20)
        return {
            "max_batch_size": self.max_batch_size,
            "max_waiting": self.max_waiting,
            "prompt_cache_bytes": prompt_cache_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class ServerOptions(LimitOptions, ApiOptions, NameOptions, SpeedOptions):
    """What servers over HTTP have in common, one process or several."""

    cors_origins: tuple[str, ...] = option(
        "web page that may call; may be given several times",
        (),
        name="cors_origin",
        parse=origin,
        metavar="ORIGIN",
        is_repeated=True,
        group="server",
    )
    max_new_tokens: int | None = option(
        "of an answer", None, parse=COUNT, metavar="N", unset="the context's", group="limits"
    )
    max_pictures: int = option("of a conversation", 8, parse=COUNT, metavar="N", group="limits")
    max_picture_mib: float = option("of an encoded picture", 20, parse=SIZE, metavar="MIB", group="limits")
    max_body_mib: float = option("of a request", 32, parse=SIZE, metavar="MIB", group="limits")
    timeout: float = option("for an answer, waiting included", 300, parse=POSITIVE, metavar="S", group="limits")
    drain_seconds: float = option("for open requests at the end", 300, parse=POSITIVE, metavar="S", group="server")


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


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures are looked at: each option is a keyword, of the same name, of `chat`, `Engine.prepare` and
    `Engine.decode_picture`."""

    read_text: bool = option(
        "read the text in pictures, with the extra ocr, and put it before the question", False, group="pictures"
    )
    zoom: int = one_of(
        {
            "zoom": (1, "answer from the part of the picture that matters to the question, in its full pixels"),
            "zoom-twice": (2, "look into that part once more"),
        },
        0,
        group="pictures",
    )

    def looking(self) -> dict[str, Any]:
        """The keywords for what was given; none where pictures are looked at as ever."""
        return {each.name: getattr(self, each.name) for each in fields(PictureOptions) if is_given(self, each.name)}

    def check_looking(self) -> None:
        """Raise a `ValueError` if what reads text is missing: now, and not when the model is loaded."""
        if self.read_text:
            from visualglm_hf.text_in_pictures import import_reader

            import_reader()

    def looking_switches(self) -> list[str]:
        """The same as they are typed, such as ["--read-text", "--zoom"]."""
        given = {"--read-text": self.read_text, "--zoom": self.zoom == 1, "--zoom-twice": self.zoom > 1}
        return [switch for switch, is_on in given.items() if is_on]


def limit_option(default: int | None) -> Any:
    """How long an answer may become."""
    unset = "what the context leaves"
    return option("of an answer", default, parse=COUNT, metavar="N", unset=unset, group="answers")


def temperature_option(default: float) -> Any:
    """How freely the tokens of an answer are chosen."""
    return option("0: always the likeliest token", default, parse=AMOUNT, metavar="T", group="answers")


def penalty_option(default: float) -> Any:
    """How unlikely tokens become that were there before, those of the question among them."""
    return option("1 for none", default, parse=POSITIVE, metavar="R", group="answers")


def path_or_standard(text: str) -> Path | None:
    """A path, or None for `-`, the standard stream."""
    return None if text == "-" else Path(text)


@dataclass(frozen=True, kw_only=True)
class FileOptions(SamplingOptions, PictureOptions, ModelOptions):
    """What it takes to answer a file of questions."""

    input: Path | None = argument(
        'rows of {"id", "text", "image"} or {"id", "messages"}, JSON Lines or parquet; -: standard input',
        parse=path_or_standard,
        metavar="INPUT",
    )
    output: Path | None = argument(
        "where a run goes on if there are answers already, .parquet for a table; -: standard output",
        parse=path_or_standard,
        metavar="OUTPUT",
    )
    batch_size: int = option("rows answered at a time", 8, parse=COUNT, metavar="N")
    allow_urls: bool = option("fetch pictures from http(s) addresses", False)
    system: str | None = option(
        "system message of the rows that have none of their own", None, metavar="TEXT", group="answers"
    )
    max_new_tokens: int | None = limit_option(None)
    temperature: float = temperature_option(0.8)
    repetition_penalty: float = penalty_option(1.2)
    seed: int = option("from which each row has its own", 0, parse=COUNT_OR_NONE, metavar="N", group="answers")
