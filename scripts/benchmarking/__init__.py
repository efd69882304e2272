"""What `benchmark.py` is made of."""

import sys
from pathlib import Path


# A checkout works without being installed; an installed visualglm_hf comes first.
sys.path.append(str(Path(__file__).resolve().parents[2]))
