"""Package list, and the wheel's name. `integration/` is installed as `fa4_integration`, so that its top level has a name of its own."""

import os
import platform
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

backend = find_packages(include=["fa4_backend", "fa4_backend.*"])
integration = ["fa4_integration", *(f"fa4_integration.{name}" for name in find_packages("integration"))]
HAS_KERNELS = any(Path("fa4_backend/prebuilt").glob("*/*/*/kernel.so"))  # put there by scripts/build_wheel.py


class Wheel(bdist_wheel):
    """A wheel that carries compiled kernels is for one machine, whatever the Python; one without is for all."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not HAS_KERNELS

    def get_tag(self) -> tuple[str, str, str]:
        if not HAS_KERNELS:
            return super().get_tag()
        # Kernels call the launch runtime alone, no C library: the oldest manylinux that the compiler's own wheels know.
        return "py3", "none", f"manylinux_2_28_{os.environ.get('FA4_WHEEL_MACHINE', platform.machine())}"


setup(
    cmdclass={"bdist_wheel": Wheel},
    packages=backend + integration,
    package_dir={"fa4_integration": "integration"},
    package_data={
        "fa4_backend": ["py.typed", "prebuilt/*/*/*/*"],
        "fa4_backend.emulator": ["README.md", "native/*.c", "native/*.h"],  # compiled where the emulator first runs
        "fa4_integration": ["py.typed"],
    },
)
