"""Where the tiny model and the pictures are that come with the tools: in the checkout, or in the installed package."""

from pathlib import Path


INSTALLED = Path(__file__).resolve().parent / "shipped"  # a wheel has them there, see setup.py
ROOT = INSTALLED if INSTALLED.is_dir() else Path(__file__).resolve().parents[1]
DEFAULT_MODEL = ROOT / "models" / "visualglm-tiny"
EXAMPLES = sorted((ROOT / "examples").glob("*.png"))
