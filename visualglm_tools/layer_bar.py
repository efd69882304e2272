"""A bar that counts how often the layers of a decoder have computed.

Not here: when there is one, and what it is called (`prompt_bar.py`, `calibration/codes.py`, and for the page in the
browser `serving/engine/engine.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


PATIENCE = 2.0  # seconds after which people want to know


@contextmanager
def counted_layers(model, bar) -> Iterator[Callable[[], None]]:
    """Advance a bar by one for each layer that computes, with `update()` as of tqdm; what is given stops it early."""

    def count(*_) -> None:  # what a hook returns would be the layer's output
        bar.update()

    hooks = [layer.register_forward_hook(count) for layer in model.get_decoder().layers]

    def stop() -> None:
        while hooks:
            hooks.pop().remove()

    try:
        yield stop
    finally:
        stop()
