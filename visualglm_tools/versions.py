"""Which version this is, and which ones of the libraries it computes with: nothing of them is imported."""

from importlib.metadata import PackageNotFoundError, version


OWN = "visualglm-hf"


def version_of(package: str) -> str:
    """What is installed of a package."""
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is on the path, and not installed
        return "not installed"


def versions() -> dict[str, str]:
    """By which versions something is made that is written now."""
    return {package: version_of(package) for package in (OWN, "transformers", "torch")}
