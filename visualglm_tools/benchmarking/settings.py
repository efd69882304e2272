"""What a benchmark measures, and how: each option declared once, for one model and for several in turns.

Not here: what only the command line has (`commands/bench.py`), and what is done (`run.py`).
"""

from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.options import COUNT, POSITIVE, option


# torch, transformers and the model are not imported: `-h` and typing errors shall not wait for them.

DTYPES = ("float32", "float16", "bfloat16")
GEOMETRIES = ("full", "tiny")
PARTS = ("load", "encode", "prefill", "decode")
CACHES = ("dynamic", "static", "compiled", "recorded")

SUBJECT = {"group": "what is measured"}
HOW = {"group": "how"}
ORIGINAL = {"group": "beside the original"}
TURNS = {"group": "several in one run"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured in one process: a model, and the original's code beside it."""

    geometry: str = option("random weights of this size", "full", choices=GEOMETRIES, **SUBJECT)
    model: Path | None = option("a checkpoint instead of random weights", None, metavar="FOLDER", **SUBJECT)
    dtype: str = option("of weights and activations", "bfloat16", choices=DTYPES, **SUBJECT)
    device: str = option("cpu, cuda, cuda:1, …, auto", "cpu", **SUBJECT)
    quant: int | None = option("quantize the decoder to that many bits", None, choices=(4, 8), **SUBJECT)
    quant_image_encoder: bool = option("the image encoder too, to 8 bits", False, **SUBJECT)
    attn: str = option("attention implementation", "sdpa", choices=("sdpa", "eager"), **SUBJECT)
    cache: tuple[str, ...] = option("in `generate`", ("dynamic",), choices=CACHES, **SUBJECT)

    parts: tuple[str, ...] = option("the model is always loaded", PARTS, choices=PARTS, **HOW)
    contexts: tuple[int, ...] = option(
        "of prompts and before decode steps, in tokens", (64, 1024), parse=COUNT, metavar="N", **HOW
    )
    batch: tuple[int, ...] = option("rows, each with a picture", (1,), parse=COUNT, metavar="B", **HOW)
    new_tokens: int = option("decode samples per context", 16, parse=COUNT, metavar="N", **HOW)
    repeats: int = option("encode and prefill samples", 3, parse=COUNT, metavar="N", **HOW)
    row_seconds: float = option("that one measurement may take", 600.0, parse=POSITIVE, metavar="S", **HOW)
    threads: int | None = option("CPU threads", None, parse=COUNT, metavar="N", unset="torch's choice", **HOW)
    bandwidth_gib: float = option("buffer that is read for the limit", 1.25, parse=POSITIVE, metavar="GIB", **HOW)
    bandwidth_repeats: int = option("how often it is read", 5, parse=COUNT, metavar="N", **HOW)

    against: str | None = option("the original's way on the same weights", None, choices=("formulation",), **ORIGINAL)
    reference: Path | None = option("the folder of the original's code", None, metavar="PATH", **ORIGINAL)
    reference_python: str | None = option(
        "the interpreter that can import it", None, metavar="PYTHON", unset="this one", **ORIGINAL
    )
    layers: int = option("blocks compared with --reference", 4, parse=COUNT, metavar="N", **ORIGINAL)

    def check(self) -> None:
        """Raise a `ValueError` for options that cannot be."""
        if self.quant_image_encoder and not self.quant:
            raise ValueError("--quant-image-encoder goes with --quant 4 or --quant 8.")
        if self.reference and not (self.reference / "modeling_chatglm.py").is_file():
            raise ValueError(f"--reference: {str(self.reference)!r} has no modeling_chatglm.py.")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """A whole run: with several variants or peers, each is measured by itself, by the `Settings` of this one.

    The original's code is beside the first variant alone.
    """

    variants: tuple[str, ...] = option(
        "weights to measure in turns, such as bf16 int8 int4 int4-torch", (), metavar="WEIGHTS", **TURNS
    )
    peer: tuple[str, ...] = option(
        "another program, which prints llama-bench's JSON; may be given several times",
        (),
        is_repeated=True,
        metavar="NAME=COMMAND",
        **TURNS,
    )
    rounds: int = option("how often each has its turn", 1, parse=COUNT, metavar="N", **TURNS)
    save: Path | None = option("write the report there, too", None, metavar="FILE", **TURNS)

    def check(self) -> None:
        super().check()
        if self.variants and self.quant:
            raise ValueError("--quant is for one model; name its weights in --variants instead.")
