"""SGLang's arguments where our backend is chosen: the page size, and what is refused before a model loads.

SGLang resolves its arguments once, in the launching process, and lets plugins wrap the steps.
"""

from __future__ import annotations

import logging
from typing import Any

from fa4_backend.problem import UnsupportedProblem
from fa4_backend.support import PAGE_MULTIPLE
from fa4_integration.sglang_backend.names import NAME, served_names

STEP = "handle_attention_backend_compatibility"  # SGLang's step that settles backend and page size
# Tokens. Results do not depend on it and decode hardly (docs/benchmarks.md, pages of 16 and 64), while the radix cache shares whole pages
# only, and SGLang's host work grows with their number.
DEFAULT_PAGE_SIZE = 64

logger = logging.getLogger("sglang.srt.fa4_plugin")


def install() -> None:
    """Wrap SGLang's step, once a process."""
    from sglang.srt.arg_groups import resolution_hooks

    if resolve not in resolution_hooks._HOOKS.get(STEP, ()):
        resolution_hooks.register_resolution_hook(STEP)(resolve)


def resolve(server_args: Any, previous: Any) -> None:
    """SGLang's step, then ours.

    Raises:
        UnsupportedProblem: arguments or model that the backend does not serve.
    """
    from sglang.srt.arg_groups.overrides import attention_backends_of, declare_resolution, resolved_view, use_mla_backend

    wanted = resolved_view(server_args).page_size
    previous(server_args)
    view = resolved_view(server_args)
    ours = [name in served_names() for name in attention_backends_of(view)]  # prefill, decode
    if not any(ours):
        return
    if use_mla_backend(view) and ours[0]:
        raise UnsupportedProblem(
            f"prefill of a model with MLA: expected another backend, got {NAME}, which serves its decode steps; "
            f"use --decode-attention-backend {NAME} beside another --prefill-attention-backend"
        )
    # SGLang forces pages of 128 on its own fa4; whose name we may have. Where the other phase is not ours its wish stands.
    page_size = (wanted or DEFAULT_PAGE_SIZE) if all(ours) else (view.page_size or DEFAULT_PAGE_SIZE)
    check_page_size(page_size)
    if page_size != view.page_size:
        logger.info("%s: pages of %d tokens.", NAME, page_size)
        declare_resolution(server_args, NAME, page_size=page_size)


def check_page_size(page_size: int) -> None:
    """Check a page size before an engine is built on it.

    Raises:
        UnsupportedProblem: it is not a power of two that the kernels serve.
    """
    # A power of two is what SGLang's own kernel that writes page tables takes.
    if page_size % PAGE_MULTIPLE or page_size & (page_size - 1):
        raise UnsupportedProblem(f"--page-size: expected 16, 32, 64, 128 or a larger power of two, got {page_size}")
