"""The tiny model, trained and measured: `python -m tools.tiny` under the name that it had."""

from older_names import run_tool


if __name__ == "__main__":
    run_tool("tools.tiny")
