"""Engines run inside the test process, so that a test can count our operator's calls; `test_serve.py` has the real server."""

from __future__ import annotations

import os

# Before vLLM is imported: one process, no compiler, nothing from the network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_CI_ENV="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)
