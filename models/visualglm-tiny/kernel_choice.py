# SPDX-License-Identifier: Apache-2.0
"""Whether kernels of our own are used: found, compiled and checked once, else torch's operators do the work.

Not here: kernels, and what they are used for (`lowbit_products.py`, `cpu_attention.py`, `cpu_decoder.py`).

What keeps something from the faster way is its *obstacle*: a few words for people, or None.

Kernels have to agree with the torch way on a few small problems before they are used; if they do not, there is one
warning, and torch does the work. The environment variable VISUALGLM_KERNELS says otherwise: "torch" never uses kernels,
"cpu" or "cuda" make it an error if those of that device cannot be used; "auto" is the default.
"""

import os
import threading
import warnings
from abc import ABC, abstractmethod
from typing import Any


CHOICES = ("auto", "cpu", "cuda", "torch")


class KernelError(RuntimeError):
    """The kernels cannot be compiled, loaded or launched, or compute something else."""


class NoKernelsError(KernelError):
    """There are no kernels for this machine, or what they are made with is not installed: nothing to warn of."""


def name_of(dtype: object) -> str:
    """What people call a dtype of torch."""
    return str(dtype).removeprefix("torch.")


def read_choice() -> str:
    """What VISUALGLM_KERNELS says; a `ValueError` if that is none of `CHOICES`."""
    choice = os.environ.get("VISUALGLM_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"VISUALGLM_KERNELS is {choice!r}; it can be {', '.join(CHOICES)}.")
    return choice


class KernelUser(ABC):
    """What has a fast way with kernels, which are made and checked when a device first asks for them, and a torch way.

    `choice` is what VISUALGLM_KERNELS says to make it an error if they cannot be used, `name` what people call them.
    """

    choice: str
    name: str

    def __init__(self):
        self.lock = threading.Lock()
        self.found: dict[Any, Any | None] = {}  # by device
        self.reasons: dict[Any, str] = {}  # of the devices that have none
        self.has_warned = False

    @abstractmethod
    def make(self, device: Any) -> Any:
        """Make the kernels of a device.

        Raises:
            NoKernelsError: there are none for it, or a package is missing.
            OSError, RuntimeError, AttributeError: they cannot be made.
        """

    @abstractmethod
    def check(self, kernels: Any) -> None:
        """Compare the kernels with the torch way on a few small problems.

        Raises:
            KernelError: they disagree.
        """

    def find(self, device: Any = None) -> Any | None:
        """The kernels of a device, or None for the torch way."""
        if device not in self.found:
            with self.lock:
                if device not in self.found:
                    self.found[device] = self.prepare(device)
        return self.found[device]

    def obstacle(self, device: Any = None) -> str | None:
        """Why a device takes the torch way; None if it has kernels."""
        return None if self.find(device) is not None else self.reasons[device]

    def prepare(self, device: Any) -> Any | None:
        choice = read_choice()
        if choice == "torch":
            self.reasons[device] = "VISUALGLM_KERNELS is torch"
            return None
        try:
            kernels = self.make(device)
            self.check(kernels)
        except NoKernelsError as error:
            if choice == self.choice:
                raise KernelError(f"The {self.name} cannot be used: {error}.") from error
            self.reasons[device] = str(error)
            return None
        except (OSError, RuntimeError, AttributeError) as error:
            self.give_up(device, error)
            return None
        return kernels

    def give_up(self, device: Any, error: Exception) -> None:
        """Use the torch way on this device from now on, and say so once."""
        if read_choice() == self.choice:
            raise KernelError(f"The {self.name} do not work: {error}") from error
        self.reasons[device] = str(error)
        self.found[device] = None
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"The {self.name} do not work, torch's operators are used instead, which are slower. Set "
                f"VISUALGLM_KERNELS=torch to do without this message. Reason: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
