"""Who may use the page, as whoever runs it says. Standard library only: the command asks first.

A password on a command line is seen by every user of the machine; a variable and a file are not.
"""

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path


VARIABLE = "VISUALGLM_WEB_AUTH"
REMEDY = "Give USER:PASSWORD"
REFUSAL_SECONDS = 1.0  # for whoever tries one password after the other


def read_accounts(given: Sequence[str] = (), file: Path | None = None) -> dict[str, str]:
    """Passwords by user: those that were `given`, those in a `file`, a line each, and those of the environment.

    Raises:
        ValueError: one that is no USER:PASSWORD, or is there twice; a file that is not there, or that others may read.
    """
    lines = [*given, *os.environ.get(VARIABLE, "").splitlines(), *(lines_of(file) if file else ())]
    accounts: dict[str, str] = {}
    for line in filter(None, map(str.strip, lines)):
        user, colon, password = line.partition(":")
        if not (user.strip() and password):
            raise ValueError(f"{REMEDY} for --auth, found {'no password' if colon else 'no colon'} for a user.")
        if user in accounts:
            raise ValueError(f"there are two passwords for the user {user!r}. {REMEDY} once for each.")
        accounts[user] = password
    if not accounts and (file or VARIABLE in os.environ):
        raise ValueError(f"there is no user in {file or VARIABLE}. {REMEDY}, or leave it out for a page without login.")
    return accounts


def lines_of(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the users in '{file}': {error}. {REMEDY} in each of its lines.") from error
    if os.name == "posix" and mode & 0o077:
        raise ValueError(f"others may read the passwords in '{file}'. Forbid it: chmod 600 {file}")
    return [line for line in lines if not line.startswith("#")]


def login_of(accounts: Mapping[str, str]) -> Callable[[str, str], Awaitable[bool]] | None:
    """Says whether a user has given the right password; None if there are no accounts."""
    if not accounts:
        return None

    async def is_right(user: str, password: str) -> bool:
        known = accounts.get(user, "")  # that no password is equal to
        if secrets.compare_digest(password.encode(), known.encode()) and known:
            return True
        await asyncio.sleep(REFUSAL_SECONDS)
        return False

    return is_right
