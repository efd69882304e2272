"""What the scripts here are older names of, run with the words that they were given."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn


CHECKOUT = Path(__file__).resolve().parents[1]
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes, as `visualglm` has them


def run_command(name: str) -> NoReturn:
    """End as `visualglm NAME` does, or with one line where that is not installed."""
    try:
        from visualglm_tools.__main__ import main
    except ModuleNotFoundError as error:
        if error.name != "visualglm_tools":
            raise
        print(f"error: visualglm is not installed here: {sys.executable} -m pip install -e {CHECKOUT}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.argv.insert(1, name)
    sys.exit(main())


def run_tool(module: str) -> NoReturn:
    """End as `python -m MODULE` does in the checkout: `tools` is there, and is not installed."""
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    try:
        sys.exit(subprocess.call(command, env={**os.environ, "PYTHONPATH": path}))
    except KeyboardInterrupt:  # which the tool has had, too
        sys.exit(INTERRUPTED)
