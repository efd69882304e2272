"""Where things stand, for tests of every room."""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "models" / "visualglm-tiny"
COMMAND = [sys.executable, "-m", "visualglm_tools"]  # what `visualglm` runs
SCRIPTS = ROOT / "scripts"  # the commands under the names that they had
PICTURES = sorted((ROOT / "examples").glob("*.png"))
CIRCLES, STAR = (next(path for path in PICTURES if shape in path.name) for shape in ("circles", "star"))
