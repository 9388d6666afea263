"""Problems to fuzz: every head dimension, dtype, ratio, page size and mask feature of a kernel at least once."""

from __future__ import annotations

from dataclasses import replace

from fa4_backend.problem import FP8, RAGGED, SAME_AS_Q
from tests.support.fuzz import FuzzSetup
from tests.support.paged_case import PagedCase
from tests.support.problems import make_problem

IN_PIECES = (
    "d128 page 16", "d128 MHA page 32", "d128 both windows page 128", "d128 soft cap, sinks, ALiBi", "d128 left window, invariant",
    "d64 ratio 3 page 16", "d96 page 16", "d192/128 page 64", "d256 page 16 soft cap", "d256 page 784", "d128 page 16, out FP8",
    "d64 ratio 3 page 16 sinks, out FP8",
)  # fmt: skip


def case_of(setup: FuzzSetup, query_lens: tuple[int, ...], kv_lens: tuple[int, ...], layout: str = "separate") -> PagedCase:
    """One poisoned case of a setup's problem, with the same compile keys."""
    p = setup.problem
    return PagedCase(
        query_lens, kv_lens, num_q_heads=p.num_q_heads, num_kv_heads=p.num_kv_heads, head_dim=p.head_dim, head_dim_v=p.head_dim_v,
        dtype=p.dtype, kv_dtype=p.kv_dtype, out_dtype=p.out_dtype, per_head_scales=setup.per_head_scales, page_size=p.page_size,
        arch=p.arch, is_causal=p.mask.is_causal, window_left=70 if p.mask.has_window_left else None,
        window_right=9 if p.mask.has_window_right else None, softcap=20.0 if p.mask.has_softcap else 0.0, sinks=p.mask.has_sinks,
        alibi=p.mask.has_alibi, layout=layout, batch_invariant=p.batch_invariant, decode_query_len=setup.decode_query_len,
        converts=setup.converts, decode_alone=setup.is_narrow, counts_prefill_keys=setup.has_messages,
    )  # fmt: skip


def prefill_setups(arch: str, kv_dtype: str = SAME_AS_Q) -> list[FuzzSetup]:
    """Problems that cover every head dimension, dtype, ratio, page size and mask feature of the prefill kernel at least once."""

    def setup(
        name: str, heads: tuple[int, int], dims: tuple[int, int], page: int, dtype: str = "bfloat16", **flags: bool | str
    ) -> FuzzSetup:
        problem = make_problem(*heads, *dims, dtype, page, arch, kv_dtype=kv_dtype, has_lse=True, **flags)
        return FuzzSetup(name, problem, prefill_only=True, per_head_scales=page != 64)

    def parts(whole: FuzzSetup) -> FuzzSetup:
        return replace(whole, name=f"{whole.name} in parts", min_part_blocks=1, max_seqs=4, max_kv=1200)

    def invariant(whole: FuzzSetup) -> FuzzSetup:
        return replace(whole, name=f"{whole.name}, long rows, invariant", problem=replace(whole.problem, batch_invariant=True))

    setups = [
        setup("d128 page 16", (8, 2), (128, 128), 16),
        setup("d128 page 64 fp16", (8, 2), (128, 128), 64, "float16"),
        setup("d128 MHA page 32", (3, 3), (128, 128), 32),
        setup("d128 ratio 7 page 48", (14, 2), (128, 128), 48),
        setup("d128 ratio 8 page 256 left window", (8, 1), (128, 128), 256, has_window_left=True),
        setup("d128 non-causal page 16", (8, 2), (128, 128), 16, is_causal=False),
        setup("d128 both windows page 128", (8, 2), (128, 128), 128, is_causal=False, has_window_left=True, has_window_right=True),
        setup("d128 soft cap, sinks, ALiBi", (8, 2), (128, 128), 16, has_softcap=True, has_sinks=True, has_alibi=True),
        setup("d128 sinks, left window page 528", (8, 2), (128, 128), 528, has_sinks=True, has_window_left=True),
        setup("d128 left window, invariant", (8, 2), (128, 128), 16, has_window_left=True, batch_invariant=True),
        setup("d64 ratio 3 page 16", (9, 3), (64, 64), 16),
        setup("d64 ratio 8 sinks fp16", (16, 2), (64, 64), 16, "float16", has_sinks=True, has_window_left=True),
        setup("d96 page 16", (4, 2), (96, 96), 16),
        setup("d192/128 page 64", (4, 1), (192, 128), 64),
        setup("d256 page 16 soft cap", (4, 2), (256, 256), 16, has_softcap=True),
        setup("d256 page 784", (4, 2), (256, 256), 784),
        setup("d128 page 16, out FP8", (8, 2), (128, 128), 16, out_dtype=FP8),
        setup("d64 ratio 3 page 16 sinks, out FP8", (9, 3), (64, 64), 16, out_dtype=FP8, has_sinks=True),
        setup("d192/128 page 64 fp16, out FP8", (4, 1), (192, 128), 64, "float16", out_dtype=FP8),
        setup("d256 page 16, out FP8", (4, 2), (256, 256), 16, out_dtype=FP8),
    ]
    if arch.endswith("sm_90a") and kv_dtype == SAME_AS_Q:
        # Whose weights are bounded for every V (`wgmma_fragment.py`, Note [Fixed references]).
        capped = next(s for s in setups if s.name == "d256 page 16 soft cap")
        setups.append(replace(capped, name="d256 page 16 soft cap, end to end", is_extreme=True))
        # Tiles of other height, of which tokens fill more (`fa4_backend/prompt_tiles.py`).
        setups.append(setup("d128 48 heads page 16", (48, 1), (128, 128), 16))
        setups.append(setup("d128 48 heads page 64 fp16, cap, sinks", (48, 1), (128, 128), 64, "float16", has_softcap=True, has_sinks=True))
        setups.append(setup("d128 96 heads left window", (96, 1), (128, 128), 16, has_window_left=True))
    # The same kernels where few tiles are cut along KV: into parts of single blocks, and as the plan cuts long rows.
    cut = [parts(s) for s in setups if not s.problem.batch_invariant]
    long_rows = {"max_seqs": 3, "max_query": 60, "max_kv": 9000}
    long = [replace(setups[0], name="d128 page 16, long rows", **long_rows)]
    if arch.endswith("sm_90a"):
        # Rows of several pieces (`sm90/tile_pieces.py`), in the CTA that has the tile or in others.
        long += [replace(invariant(s), **long_rows) for s in setups if s.name in IN_PIECES]
    drawn = [*setups, *cut, *long]
    if kv_dtype != FP8 or not arch.endswith("sm_90a"):
        return drawn
    once = [s for s in drawn if not s.problem.batch_invariant]
    return [*drawn, *(replace(s, name=f"once a call: {s.name}", prefill_only=False, converts=True) for s in once)]


def ragged_setups(arch: str, kv_dtype: str = SAME_AS_Q) -> list[FuzzSetup]:
    """Problems of the prefill kernel over K and V without pages: head dimensions, masks, and tiles cut along KV."""

    def setup(name: str, heads: tuple[int, int], dims: tuple[int, int], dtype: str = "bfloat16", **flags: bool) -> FuzzSetup:
        problem = make_problem(*heads, *dims, dtype, 1, arch, kv_dtype=kv_dtype, kv_source=RAGGED, has_lse=True, **flags)
        return FuzzSetup(name, problem)

    setups = [
        setup("d192/128 causal", (4, 4), (192, 128)),
        setup("d192/128 full", (4, 4), (192, 128), is_causal=False),
        setup("d192/128 both windows fp16", (4, 2), (192, 128), "float16", is_causal=False, has_window_left=True, has_window_right=True),
        setup("d128 causal", (8, 2), (128, 128)),
        setup("d128 full, invariant", (8, 2), (128, 128), is_causal=False, batch_invariant=True),
        setup(
            "d128 left window, sinks, soft cap, ALiBi",
            (6, 2),
            (128, 128),
            has_window_left=True,
            has_sinks=True,
            has_softcap=True,
            has_alibi=True,
        ),
        setup("d64 ratio 3", (9, 3), (64, 64)),
        setup("d96", (4, 2), (96, 96)),
    ]
    if arch.endswith("sm_90a"):
        setups.append(setup("d256 soft cap", (4, 2), (256, 256), has_softcap=True))
    cut = [
        replace(s, name=f"{s.name} in parts", min_part_blocks=1, max_seqs=4, max_kv=1200) for s in setups if not s.problem.batch_invariant
    ]
    return [*setups, *cut]
