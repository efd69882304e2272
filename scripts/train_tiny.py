"""The tiny model, trained and measured: `python -m tools.tiny` under the name that it had."""

import os
import subprocess
import sys
from pathlib import Path


CHECKOUT = Path(__file__).resolve().parents[1]  # `tools` is there, and is not installed


if __name__ == "__main__":
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tools.tiny", *sys.argv[1:]]
    sys.exit(subprocess.call(command, env={**os.environ, "PYTHONPATH": path}))
