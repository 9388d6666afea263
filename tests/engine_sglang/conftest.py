"""SGLang beside this project, in an environment of its own: `make test-sglang`. Elsewhere nothing here is collected."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
collect_ignore_glob = [] if HAS_SGLANG else ["test_*.py"]


def pytest_report_header() -> str | None:
    """Say what is left out."""
    return None if HAS_SGLANG else "tests/engine_sglang: left out, SGLang is not installed here (make test-sglang)"


@pytest.fixture(scope="session")
def kit() -> Any:
    """SGLang's own tests of dense attention, which look a backend up by its name; its plugins are loaded as an engine loads them."""
    import torch
    from sglang.srt.plugins import load_plugins
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention

    from fa4_integration.sglang_backend import plugin

    load_plugins()
    torch.set_grad_enabled(False)  # the CPU's write into a pool is an assignment by index
    # The kit wants each backend to say which keys a window means in a decode step: here those of an extend step.
    dense_attention._SWA_DECODE_EXTEND_WINDOW |= {plugin.NAME}
    return dense_attention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of every call of our operator in a test, which has to make some."""
    from fa4_integration.sglang_backend import backend

    made: list[dict[str, Any]] = []
    operator = backend.paged_attention

    def count(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(backend, "paged_attention", count)
    yield made
    assert made, "our operator did not run"


@pytest.fixture
def fp8(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's cache, layer and reference in FP8."""
    from tests.engine_sglang import pools

    for name, cls in (
        ("MHATokenToKVPool", pools.Fp8Pool),
        ("MockModelRunner", pools.Fp8Runner),
        ("ProjectedDenseAttention", pools.Fp8Attention),
        ("ReferenceDenseAttention", pools.Fp8Reference),
    ):
        monkeypatch.setattr(kit, name, cls)
