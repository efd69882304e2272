"""The command `visualglm`: looks up what was asked for, and imports that alone."""

import importlib
import sys


COMMANDS = {
    "chat": "talk about a picture in the terminal",
    "serve": "answer over HTTP: OpenAI's API and the original's",
    "web": "a page in the browser",
    "batch": "answer a file of questions",
    "finetune": "train an adapter on your own pictures",
    "merge": "fold an adapter into the weights",
    "convert": "prepare the original's checkpoint, or bring one from or to SAT",
    "quantize": "write a checkpoint in 8 or 4 bits",
    "check": "check a checkpoint, and tell which kernels this machine uses",
    "bench": "measure speed and memory",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` names; returns its exit code."""
    name, *rest = sys.argv[1:] if argv is None else argv
    return importlib.import_module(f"visualglm_tools.commands.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
