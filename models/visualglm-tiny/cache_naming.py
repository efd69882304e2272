# SPDX-License-Identifier: Apache-2.0
"""The name of the cache of keys and values: `past_key_values` in transformers until 5.23, `cache` since.

Our own code says `cache`. Callers may say either, whatever is installed; notebooks and PEFT know the older one.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from transformers.modeling_outputs import BaseModelOutputWithPast


OLD_NAME = "past_key_values"
# Of the installed transformers, in what it passes to a model and in what it reads from its output.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD_NAME


def takes_cache(method: Callable) -> Callable:
    """Let the parameter `cache` of a method be given by its older name, too.

    The signature shows it by the name that the installed transformers looks for.

    Raises:
        ValueError: from the method, if both names were given.
    """

    @wraps(method)
    def call(*args, **kwargs):
        old = kwargs.pop(OLD_NAME, None)
        if old is not None and kwargs.get("cache") is not None:
            raise ValueError(f"Give the cache once, as cache or as {OLD_NAME}, not both.")
        return method(*args, **(kwargs if old is None else {**kwargs, "cache": old}))

    signature = inspect.signature(method)
    parameters = [
        parameter.replace(name=CACHE_NAME) if parameter.name == "cache" else parameter
        for parameter in signature.parameters.values()
    ]
    call.__signature__ = signature.replace(parameters=parameters)
    return call
