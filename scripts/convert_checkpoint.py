"""Checkpoints prepared: `visualglm convert` under the name that it had."""

import sys

from visualglm_tools.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
