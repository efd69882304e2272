# Copyright 2026 The visualglm-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Whether kernels of our own are used: found, compiled and checked once, else torch's operators do the work.

Not here: kernels, and which products they take (`lowbit_products`' ways).

Kernels have to agree with the torch way on a few small problems before they are used; if they do not, there is one
warning, and torch does the work. The environment variable VISUALGLM_KERNELS says otherwise: "torch" never uses kernels,
"cpu" or "cuda" make it an error if those of that device cannot be used; "auto" is the default.
"""

import os
import threading
import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any


CHOICES = ("auto", "cpu", "cuda", "torch")


class KernelError(RuntimeError):
    """The kernels cannot be compiled, or compute something else."""


class KernelUser(ABC):
    """What has a fast way with kernels, which are made and checked when they are first asked for, and a torch way."""

    def __init__(self):
        self.lock = threading.Lock()

    @abstractmethod
    def make(self) -> Any | None:
        """Make the kernels; None if what they are made with is not installed.

        Raises:
            KernelError, RuntimeError, OSError, AttributeError: they cannot be made here.
        """

    @abstractmethod
    def check(self, kernels: Any) -> None:
        """Compare the kernels with the torch way on a few small problems.

        Raises:
            KernelError: they disagree.
        """

    @property
    def kernels(self) -> Any | None:
        """The kernels, or None for the torch way."""
        with self.lock:
            return self.checked_kernels

    @cached_property
    def checked_kernels(self) -> Any | None:
        choice = os.environ.get("VISUALGLM_KERNELS", "auto")
        if choice not in CHOICES:
            raise ValueError(f"VISUALGLM_KERNELS is {choice!r}; it can be {', '.join(CHOICES)}.")
        if choice == "torch":
            return None
        try:
            kernels = self.make()
            if kernels is not None:
                self.check(kernels)
        except (OSError, RuntimeError, AttributeError) as error:
            if choice == "cpu":
                raise KernelError(f"The CPU kernels do not work: {error}") from error
            warnings.warn(
                "The CPU kernels do not work, torch's operators are used instead, which are slower. Set "
                f"VISUALGLM_KERNELS=torch to do without this message. Reason: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        if kernels is None and choice == "cpu":
            raise KernelError("The CPU kernels need the package llvmlite. Get it with: pip install llvmlite")
        return kernels
