"""The key that clients must send, as whoever runs a server gives it. Standard library only: doors ask first."""

import os


KEY_VARIABLE = "VISUALGLM_API_KEY"


def read_key(given: str | None = None) -> str | None:
    """The key that was `given`, or else that of the environment; None for none. Raises as `check_key`."""
    key = os.environ.get(KEY_VARIABLE) if given is None else given
    return None if key is None else check_key(key)


def check_key(key: str) -> str:
    """The key without blanks and line breaks around it, which files and variables often have.

    Raises:
        ValueError: an empty key, or one that no client could send.
    """
    key = key.strip()
    if not key:
        raise ValueError("the API key is empty. Give one, or none at all (unset the variable) for a server without.")
    if not key.isprintable() or " " in key:
        raise ValueError("the API key has blanks or control characters in it, which no client can send. Give another.")
    return key
