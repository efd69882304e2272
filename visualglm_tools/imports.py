"""Imports that take seconds: torch, transformers and what is built on them.

Not here: what is imported, which stands where it is needed; and what to do if it is missing (`packages.py`).
"""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Have no garbage looked for while libraries are first imported; afterwards again, also if an import has failed.

    Hundreds of thousands of objects are made, and nearly all of them stay: they are not looked through again later
    either. In a process that has torch already nothing is changed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
