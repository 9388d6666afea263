"""Package list. `integration/` is installed as `fa4_integration`, so that its top level has a name of its own."""

from setuptools import find_packages, setup

backend = find_packages(include=["fa4_backend", "fa4_backend.*"])
integration = ["fa4_integration", *(f"fa4_integration.{name}" for name in find_packages("integration"))]

setup(
    packages=backend + integration,
    package_dir={"fa4_integration": "integration"},
    package_data={
        "fa4_backend": ["py.typed"],
        "fa4_backend.emulator": ["README.md", "native/*.c", "native/*.h"],  # compiled where the emulator first runs
        "fa4_integration": ["py.typed"],
    },
)
