"""A bar in the terminal while a long prompt is read: the first word of an answer waits for all layers.

Not here: the answer, which is typed when the bar is gone (`commands/chat.py`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from visualglm_tools.layer_bar import PATIENCE, counted_layers


@contextmanager
def prompt_bar(model) -> Iterator[Callable[[], None]]:
    """Show on stderr, if that is a terminal and it takes long, how many layers have read the prompt.

    What is given takes the bar away, and the hooks with which it counts: to be called when the answer begins, since a
    layer with a hook computes its decode steps by itself. It may be called again.
    """
    from tqdm import tqdm

    bar = tqdm(
        total=len(model.get_decoder().layers),
        desc="reading",
        unit="layer",
        delay=PATIENCE,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with bar, nullcontext(lambda: None) if bar.disable else counted_layers(model, bar) as stop_counting:

        def end() -> None:
            stop_counting()
            bar.close()

        yield end
