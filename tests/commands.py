"""Commands of `visualglm` as tests run them: in this process, which need not wait for another one to import torch."""

from functools import partial

from visualglm_tools.__main__ import main


def command(name: str, *arguments: object) -> int:
    """Run `visualglm NAME ARGUMENTS`; returns its exit code."""
    return main([name, *map(str, arguments)])


check, convert, merge, quantize = (partial(command, name) for name in ("check", "convert", "merge", "quantize"))
