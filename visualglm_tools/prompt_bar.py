"""A bar in the terminal while a long prompt is read: the first word of an answer waits for all layers.

Not here: the answer, which is typed when the bar is gone (`commands/chat.py`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


PATIENCE = 2.0  # seconds after which people want to know


@contextmanager
def prompt_bar(model) -> Iterator[Callable[[], None]]:
    """Show on stderr, if that is a terminal and it takes long, how many layers have read the prompt.

    What is given takes the bar away, and the hooks with which it counts: to be called when the answer begins, since a
    layer with a hook computes its decode steps by itself. It may be called again.
    """
    from tqdm import tqdm

    layers = model.get_decoder().layers
    bar = tqdm(
        total=len(layers),
        desc="reading",
        unit="layer",
        delay=PATIENCE,
        leave=False,
        disable=not sys.stderr.isatty(),
    )

    def count(*_) -> None:  # what a hook returns would be the layer's output
        bar.update()

    hooks = [] if bar.disable else [layer.register_forward_hook(count) for layer in layers]

    def end() -> None:
        while hooks:
            hooks.pop().remove()
        bar.close()

    try:
        yield end
    finally:
        end()
