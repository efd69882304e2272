"""A drawing of the tiny world and its captions: `python -m tools.tiny.world` under the name that it had."""

from older_names import run_tool


if __name__ == "__main__":
    run_tool("tools.tiny.world")
