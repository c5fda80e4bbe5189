"""Wheels carry train.py and conf/ inside the package; the rest of the build is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies train.py and conf/ into charlm/, where `charlm.home` finds them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "charlm")
            shutil.copy("train.py", package)
            shutil.copytree("conf", package / "conf", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPy})
