"""The GPU that these tests run on; they are skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from fa4_backend.arch import arch_of_capability


@pytest.fixture(scope="module")
def arch() -> str:
    """Arch of the GPU present."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = arch_of_capability(*torch.cuda.get_device_capability())
    if found is None:
        pytest.skip("no kernels for this GPU")
    return found
