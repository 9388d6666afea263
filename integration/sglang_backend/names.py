"""Our backend's names on SGLang's command line."""

from fa4_backend import envs

NAME = "fa4_plugin"
STOCK_NAME = "fa4"  # SGLang's own backend of this family, on its lists of backends that a model or a drafter may have


def served_names() -> tuple[str, ...]:
    """Names of `--attention-backend` that mean this backend."""
    return (NAME, STOCK_NAME) if envs.sglang_override_fa4() else (NAME,)
