"""What pyproject.toml cannot say: which files outside the package an installed program needs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "studies", "launch", "slurm")
OF_A_CHECKOUT = ("demo.sh",)
"""Makes .venv first, and is of no use in another environment."""


class BuildWithShippedFiles(build_py):
    """Also put configurations, studies and scripts into `dist_train/share`, unless it is an editable build."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            target = Path(self.build_lib, "dist_train", "share", folder)
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*OF_A_CHECKOUT), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
