"""From one of SGLang's model runners to the backend that serves it."""

from __future__ import annotations

from typing import Any

from fa4_integration.sglang_backend.names import NAME


def create_backend(runner: Any) -> Any:
    """The backend of one of SGLang's model runners. What is heavy is imported here.

    Raises:
        RuntimeError: something that the backend needs cannot be imported.
        UnsupportedProblem: no kernel here serves the model.
    """
    try:
        from fa4_integration.sglang_backend.backend import FA4Backend
        from fa4_integration.sglang_backend.latent import FA4LatentBackend
    except ImportError as error:
        raise RuntimeError(f"{NAME}: expected an importable backend (`fa4 doctor` looks for what is missing), got {error}") from error
    return FA4LatentBackend(runner) if runner.use_mla_backend else FA4Backend(runner)
