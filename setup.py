"""What pyproject.toml has no words for: the tiny model and the example pictures go into the wheel, beside the tools.

They land in `visualglm_tools/shipped`, where `visualglm_tools/shipped.py` looks for them. The model's code there is
files, whatever has become of the links in `models/visualglm-tiny`. An editable install uses the checkout's.
"""

from pathlib import Path
from shutil import copyfile

from setuptools import setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "visualglm_hf"
SHIPPED = Path("visualglm_tools", "shipped")
PATTERNS = ("models/visualglm-tiny/[!.]*", "examples/*.png")


def shipped_files() -> list[Path]:
    """What goes into a wheel, as it is called in the checkout."""
    return sorted(path.relative_to(ROOT) for pattern in PATTERNS for path in ROOT.glob(pattern) if path.suffix)


class BuildWithModel(build_py):
    """Python files and package data as ever, and then what is shipped."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in shipped_files():
            code = PACKAGE / file.name
            target = Path(self.build_lib, SHIPPED, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(code if code.is_file() else ROOT / file, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        shipped = [] if self.editable_mode else [str(Path(self.build_lib, SHIPPED, file)) for file in shipped_files()]
        return [*super().get_outputs(include_bytecode), *shipped]

    def get_source_files(self) -> list[str]:
        """What a source distribution needs for a wheel to be built from it."""
        return [*super().get_source_files(), *map(str, shipped_files())]


setup(cmdclass={"build_py": BuildWithModel})
