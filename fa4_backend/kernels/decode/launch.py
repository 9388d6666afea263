"""Launch of the decode kernel over the step's decode list. Imports no compiler."""

from __future__ import annotations

from collections.abc import Callable

from fa4_backend.arguments import AttentionArguments
from fa4_backend.kernels.schedule.work_list import WorkLists


def launch_decode(kernel: Callable[..., None], arguments: AttentionArguments, work: WorkLists) -> None:
    """Run a compiled decode kernel; partial results go through `work`'s split-KV slots."""
    a = arguments
    kernel(
        a.q, a.k_cache, a.v_cache, a.page_table, a.out, a.lse,
        work.decode_tiles, work.decode_first, work.slots, work.arrivals,
        None if a.sinks is None else a.sinks.float(),
        None if a.alibi_slopes is None else a.alibi_slopes.float(),
        a.softmax_scale, a.softcap, a.window_left or 0, a.window_right or 0, work.shape.split_blocks,
    )  # fmt: skip
