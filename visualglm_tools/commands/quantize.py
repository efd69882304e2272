"""Quantize a checkpoint to 4 or 8 bits on disk, shard by shard.

    visualglm quantize SRC DST --bits 4
    visualglm quantize SRC DST --bits 4 --calibrate pictures --measure

SRC is a folder that `visualglm convert` made, or an original one. DST will be the same model with the decoder's linear
layers in low bits, ready to load with `trust_remote_code=True`; the full weights are never built, but to be calibrated.
Each of SRC's weight files becomes one of DST, so that one of them is in memory at a time. Everything is checked before
anything is written, and DST appears when it is complete or not at all.
"""

from dataclasses import dataclass
from pathlib import Path

from visualglm_tools.checkpoints.folder import check_new, check_source
from visualglm_tools.commands.options import READY, describe_command, target_argument, tokenizer_option
from visualglm_tools.imports import heavy_imports
from visualglm_tools.options import argument, option


# torch, transformers and what is built on them are imported in `run`: `-h` and typing errors shall not wait for them.


@dataclass(frozen=True, kw_only=True)
class Options:
    source: Path = argument("folder with the full weights", metavar="SRC")
    target: Path = target_argument()
    bits: int = option("bits per weight", choices=(4, 8))
    group_size: int | None = option(
        "columns that share a scale, of 4 bits; -1: per row", None, metavar="N", unset="64 for 4 bits"
    )
    quant_image_encoder: bool = option("quantize the image encoder too, to 8 bits", False)
    tokenizer: Path | None = tokenizer_option()
    calibrate: Path | None = option(
        "pictures, or rows of text and image as visualglm batch reads them, to find better codes with (4 bits; 32 are "
        "enough; takes minutes and the memory of the full weights)",
        None,
        metavar="FOLDER_OR_JSONL",
    )
    measure: bool = option("hold out a quarter of these prompts, and say how large the error is", False)

    def check(self) -> None:
        """Raise a `ValueError` for options that do not go together."""
        if self.calibrate is not None and self.bits == 8:
            raise ValueError("8 bits gain nothing from calibration: their error is small. Leave out --calibrate.")
        if self.measure and self.calibrate is None:
            raise ValueError("There are no prompts to measure with. Give some with --calibrate FOLDER_OR_JSONL.")


def run(options: Options) -> None:
    """Write DST; a `ValueError` says why it cannot be written."""
    options.check()
    check_source(options.source, "the original checkpoint")
    check_new(options.target)
    with heavy_imports():
        from visualglm_tools.calibration.codes import Calibration
        from visualglm_tools.checkpoints.files import readable
        from visualglm_tools.checkpoints.quantizing import quantize_checkpoint

    def choose_codes(checkpoint) -> dict:
        calibration = Calibration(options.source, checkpoint, options.calibrate, options.measure)
        codes, errors = calibration.choose_codes(options.group_size, options.quant_image_encoder)
        if errors is not None:
            print(errors)
        return codes

    with readable():
        quantize_checkpoint(
            options.source,
            options.target,
            options.bits,
            options.group_size,
            options.tokenizer,
            choose_codes if options.calibrate is not None else None,
            options.quant_image_encoder,
            describe_command("quantize", options),
        )
    print(READY.format(options.target))
