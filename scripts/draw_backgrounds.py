"""The drawings of the fine-tuning example: `python -m tools.tiny.backgrounds` under the name that it had."""

from older_names import run_tool


if __name__ == "__main__":
    run_tool("tools.tiny.backgrounds")
