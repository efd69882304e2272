"""Packages that a command needs beyond the model's own: one advice wherever one of them is missing."""


def install(*extras: str) -> str:
    """The command that gets what these extras of ours need; without any, what all commands need."""
    return f"pip install 'visualglm-hf[{','.join(extras)}]'" if extras else "pip install visualglm-hf"


def missing(package: str, *extras: str) -> str:
    """That it is missing, and how to get it."""
    return f"{package} is missing: {install(*extras)}"
