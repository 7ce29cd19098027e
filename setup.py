"""What pyproject.toml cannot say: the compiled kernels, and which files outside the package a program needs."""

import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "studies", "launch", "slurm")
OF_A_CHECKOUT = ("demo.sh",)
"""Makes .venv first, and is of no use in another environment."""

CPU_KERNELS = Extension(
    "dist_train.kernels._cpu",
    ["dist_train/kernels/_cpu.c"],
    # Not -ffast-math: the bits are to be the same everywhere.
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-fopenmp"],
    py_limited_api=True,
    optional=True,  # without a compiler, torch's operators are used instead
)


class BuildWithShippedFiles(build_py):
    """Also put configurations, studies and scripts into `dist_train/share`, unless it is an editable build."""

    def run(self) -> None:
        """Build the package, without what a former build left of modules and studies that are gone."""
        if self.editable_mode:
            super().run()
            return
        shutil.rmtree(Path(self.build_lib, "dist_train"), ignore_errors=True)
        super().run()
        for folder in SHIPPED:
            target = Path(self.build_lib, "dist_train", "share", folder)
            ignored = shutil.ignore_patterns(*OF_A_CHECKOUT)
            shutil.copytree(folder, target, ignore=ignored, ignore_dangling_symlinks=True)


# A free-threaded Python has no limited API before 3.15.
HAS_LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cmdclass={"build_py": BuildWithShippedFiles},
    ext_modules=[CPU_KERNELS] if HAS_LIMITED_API else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if HAS_LIMITED_API else {},
)
