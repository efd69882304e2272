"""Speed and memory measured: `visualglm bench` under the name that it had."""

import sys

from visualglm_tools.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
