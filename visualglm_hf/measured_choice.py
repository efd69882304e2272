# SPDX-License-Identifier: Apache-2.0
"""Which of several ways is the fastest on this machine: measured once, and remembered in the user's cache folder.

Not here: what is measured. No list of a processor's features says how fast a library is on it.
"""

import math
import platform
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from .instruction_trial import find_memory, read_memory, remember


REPEATS = 4


def recall_choice(file: str, what: str, choices: Collection[str], measure: Callable[[], str]) -> str:
    """One of `choices`: as measured on this machine before, with this torch and so many threads; else it is measured.

    Args:
        file: name of the one in the cache folder.
        what: else decides about the answer; texts that differ are different questions.
        choices: what can be remembered.
        measure: finds the answer.
    """
    machine = (platform.node(), platform.machine())  # several machines may share a home
    key = "|".join((*machine, what, torch.__version__, f"{torch.get_num_threads()} threads"))
    try:
        path = find_memory().with_name(file)
    except RuntimeError:  # nobody's home
        return measure()
    name = read_memory(path).get(key)
    if name not in choices:
        name = measure()
        remember(path, key, name)
    return name


def measure_seconds(*calls: Callable[[], Any]) -> list[float]:
    """Seconds of each call, the shortest of a few; taken in turns, so that a noisy neighbour disturbs all alike."""
    best = [math.inf] * len(calls)
    for turn in range(1 + REPEATS):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn > 0:  # the first one sets things up
                best[index] = min(best[index], time.perf_counter() - start)
    return best
