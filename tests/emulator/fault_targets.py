"""Kernels that faults are planted in, each with one case, and how a fault gets into a launch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fa4_backend import emulator
from fa4_backend.emulator.host_calls import handles
from fa4_backend.emulator.programs import LoadedKernel, forget_programs
from fa4_backend.kernel_stamp import families_of
from fa4_backend.problem import FP8, SAME_AS_Q

if TYPE_CHECKING:
    from tests.support.paged_case import BuiltCase


@dataclass(frozen=True)
class Target:
    """A kernel with one case: `run(seed)` gives its output tensors and the emulator's report."""

    name: str
    ptx: str  # as it was compiled
    run: Callable[[int | None], tuple[list[torch.Tensor], emulator.Report]]
    families: tuple[str, ...] = ()  # of `kernel_stamp.FAMILIES`, of which the kernel is
    plain: Callable[[], emulator.Report] | None = None  # another target's run of the same kernel: only lines that run more often here count
    sample: int | None = None  # faults of each class; None: all
    second: Target | None = None  # the same kernel with another case, for faults that the first does not show

    def __post_init__(self) -> None:
        assert self.second is None or self.second.ptx == self.ptx, f"{self.name}: the second case is of another kernel"

    @property
    def kernel(self) -> str:
        """Name of the kernel in the PTX."""
        match = re.search(r"\.entry\s+([\w$]+)", self.ptx)
        assert match
        return match.group(1)


MOVING = 6.0  # a factor on queries with which maxima move: some rows of a warp are rescaled and others are not


def own_prefill(
    name: str, arch: str, num_kv_heads: int, head_dim: int, peaked: float = 1.0, kv_dtype: str = SAME_AS_Q, is_second: bool = False
) -> Target:
    """This package's prefill kernel for `arch`: sequences over pages, causal.

    `is_second`: the other case, with queries whose maxima move. Before the second batch, and before one more with CTAs that have no tile
    but rows to zero, a kernel writes Q, K, V and results and lets its dependents start before. The last batch is as in a step with decode
    rows, behind a kernel that is still busy elsewhere.

    One CTA (or pair) has all tiles of the first batch, so that every ring wraps, that of the numbers of tiles too; of the short sequences
    with a single KV tile each, only the epilogue's own barriers order one behind the other. Two CTAs share the second, tiny batch: who
    comes last readies the queue for the next launch. It asked for its last tile before the other did, its long one's ring being full.
    """
    emulator.install()  # before the compiler is imported: objects bind to the first launch functions they find
    from fa4_backend.compile_cache import ensure_object
    from tests.emulator.engine_kernel import busy, written_late
    from tests.support.emulated_prefill import Cuts, run_built
    from tests.support.paged_case import PagedCase

    case = PagedCase(
        query_lens=(300, 200, 70, 3, 1, 2, 4),
        kv_lens=(500, 450, 128, 40, 1, 130, 17),
        num_q_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=128,
        page_size=64,
        arch=f"emulated-{arch}",
        peaked=MOVING if is_second else peaked,
        kv_dtype=kv_dtype,
    )
    built, plain = case.build(), replace(case, peaked=1.0).build()
    tiny = replace(case, query_lens=(3, 1), kv_lens=(900, 40)).build()
    key = case.plan(num_sms=1).kernels.prefill
    library = ensure_object(key)

    batches: list[tuple[BuiltCase, int, dict[str, Any]]] = [(built, 1, {}), (tiny, 2, {})]
    if is_second:
        padded = replace(tiny.case, padding_rows=16).build()
        batches = [(built, 1, {}), (tiny, 2, {"before": written_late(tiny)}), (padded, 5, {"before": written_late(padded)})]
        batches.append((tiny, 2, {"before": busy, "cuts": Cuts((1,) * len(tiny.case.query_lens), is_all_taken=True)}))

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        outputs, total = [], emulator.Report()
        for batch, num_ctas, how in batches:
            result = run_built(batch, num_ctas=num_ctas, seed=seed, key=key, **how)
            outputs += [result.out.clone(), result.lse.clone(), result.work.prefill_queue]
            total.add(result.report)
        return outputs, total

    reach = (lambda: run_built(plain, num_ctas=1, key=key).report) if peaked != 1.0 else None
    second = None if is_second else own_prefill(name, arch, num_kv_heads, head_dim, peaked, kv_dtype, is_second=True)
    return Target(name, library.with_suffix(".ptx").read_text(), run, ("sm90" if arch == "sm_90a" else "sm100",), reach, second=second)


def own_parts(is_second: bool = False) -> Target:
    """Hopper's prefill kernel with tiles cut along KV, taken from a queue: parts go through memory and are added up by who comes last.

    `is_second`: with queries whose maxima move, behind a kernel that writes Q, K, V and results and lets its dependents start before; and
    once more as in a step with decode rows, behind a kernel that is still busy elsewhere.
    """
    emulator.install()
    from fa4_backend.compile_cache import ensure_object
    from tests.emulator.engine_kernel import busy, written_late
    from tests.support.emulated_prefill import Cuts, run_built
    from tests.support.paged_case import PagedCase

    case = PagedCase((17, 0, 3, 40), (700, 30, 0, 90), num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, arch="emulated-sm_90a")
    case = replace(case, peaked=MOVING) if is_second else case
    built = case.build()
    key = case.plan(num_sms=3).kernels.prefill
    assert key.part_floats, key
    library = ensure_object(key)

    launches: list[dict[str, Any]] = [{"cuts": Cuts((3, 1, 1, 1))}]
    if is_second:
        launches[0]["before"] = written_late(built)
        launches.append({"cuts": Cuts((3, 1, 1, 1), is_all_taken=True), "before": busy})

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        outputs, total = [], emulator.Report()
        for how in launches:
            result = run_built(built, num_ctas=3, seed=seed, **how)
            outputs += [result.out.clone(), result.lse.clone(), result.work.part_arrivals, result.work.prefill_queue]
            total.add(result.report)
        return outputs, total

    second = None if is_second else own_parts(is_second=True)
    return Target("sm_90a prefill, parts", library.with_suffix(".ptx").read_text(), run, ("sm90",), second=second)


def own_mla(is_second: bool = False) -> Target:
    """Hopper's decode of latent attention: rows split between CTAs, drafts, two tiles of rows, few CTAs.

    `is_second`: with queries whose maxima move.
    """
    emulator.install()
    from fa4_backend.compile_cache import ensure_object
    from tests.support.emulated_mla import MlaCase, run_mla

    case = MlaCase((3, 1, 2), (400, 65, 3), num_heads=32, decode_query_len=3, peaked=MOVING if is_second else 1.0)
    arguments = case.build()
    decode = case.kernels(3).decode
    assert decode is not None
    library = ensure_object(decode)

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        result = run_mla(case, num_sms=3, seed=seed, arguments=arguments)
        return [*(rows.clone() for rows in result.rows), result.work.arrivals.clone()], result.reports[1]

    second = None if is_second else own_mla(is_second=True)
    return Target("sm_90a MLA decode", library.with_suffix(".ptx").read_text(), run, ("mla_decode",), second=second)


def own_decode(arch: str, batch_invariant: bool = False, kv_dtype: str = SAME_AS_Q) -> Target:
    """This package's decode kernel for `arch`: rows split between CTAs over global memory, several KV tiles a CTA, two entries in one.

    `batch_invariant`: entries have pieces, and there are many rows of unequal length.
    """
    emulator.install()
    from fa4_backend.compile_cache import ensure_object
    from tests.support.emulated_decode import run_decode
    from tests.support.paged_case import PagedCase

    # More entries a CTA than the ring of entries holds, and more tiles of one than a page table look-up covers; maxima that move.
    case = PagedCase(
        (4, 1, 3) + (1, 2) * 6, (1300, 65, 300) + (17, 64) * 6, num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=48,
        decode_query_len=4, arch=f"emulated-{arch}", kv_dtype=kv_dtype, peaked=8.0,
    )  # fmt: skip
    if batch_invariant:
        case = replace(
            case, query_lens=(1, 2, 1, 1, 2, 1, 1), kv_lens=(1300, 65, 300, 17, 640, 0, 129), decode_query_len=2, batch_invariant=True
        )
    plan = case.plan(num_sms=3)
    key = plan.kernels.decode
    assert key is not None, case
    library = ensure_object(key)

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        result = run_decode(case, seed=seed)
        return [*(rows.clone() for rows in result.rows), result.work.arrivals.clone()], result.reports[1]

    name = f"{arch} decode{', pieces' * batch_invariant}{', FP8 K and V' * (kv_dtype == FP8)}"
    return Target(name, library.with_suffix(".ptx").read_text(), run, ("decode",))


def own_latent_decode(kv_dtype: str = SAME_AS_Q) -> Target:
    """This package's latent decode kernel of Blackwell: rows split between pairs, drafts, a tail within a box, references that move."""
    emulator.install()
    from fa4_backend.compile_cache import ensure_object
    from tests.support.emulated_mla import MlaCase, run_mla

    case = MlaCase(
        (4, 1, 3), (650, 65, 300), num_heads=32, decode_query_len=4, kv_dtype=kv_dtype, page_size=16, one_q=True, peaked=8.0, arch="sm_100a"
    )  # fmt: skip
    library = ensure_object(case.kernels(4).decode)

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        result = run_mla(case, num_sms=4, seed=seed)
        return [*(rows.clone() for rows in result.rows), result.work.arrivals.clone()], result.reports[1]

    name = "sm_100a latent decode, CTA pairs" + ", FP8 latents" * (kv_dtype == FP8)
    return Target(name, library.with_suffix(".ptx").read_text(), run, ("mla_decode/sm100",))


def own_schedule() -> Target:
    """The kernel that makes the work lists: steps of few CTAs and of many, with rows in one warp, in all and in one of the odd ones."""
    emulator.install()
    from fa4_backend.compile_cache import ensure_object
    from fa4_backend.kernels.schedule.config import ScheduleConfig
    from fa4_backend.kernels.schedule.work_list import TOTAL_Q, WorkShape
    from tests.support.emulated_decode import empty_lists, run_schedule

    few = WorkShape(2, 12, 24, 32, 128, 4, 64, 520, 0, 1, 1000, 12, 20, 5, 1 << 17, 8192)
    many = replace(few, prefill_groups=70, decode_num_ctas=140, num_sms=70, max_num_tokens=1 << 15)
    parts = replace(few, prefill_groups=40, decode_num_ctas=80, num_sms=40, part_floats=8, min_part_blocks=2)
    steps = [
        # More decode rows of unequal length than there are threads, and few prefill rows.
        (few, [1 + i % 4 for i in range(600)] + [300, 0, 70], [100 + 7 * i * (i % 5) % 900 for i in range(600)] + [700, 90, 70]),
        # Cuts at fixed pieces, for CTAs of several warps; prefill rows in every warp.
        (replace(many, split_blocks=3), [1] * 90 + [5 + i for i in range(150)], [3000 - 13 * i for i in range(240)]),
        # Decode rows that are equal but for one, which an odd warp reads.
        (many, [1] * 60, [1000] * 40 + [500] + [1000] * 19),
        # Few tiles over long KV, of unlike lengths in an odd warp, are cut along it, beside equal decode rows.
        (parts, [17] + [1] * 36 + [40, 9], [9000] + [640] * 36 + [5000, 700]),
        (parts, [7 + i % 3 for i in range(70)], [200] * 45 + [8000] + [200] * 24),
        # Two lines of row groups, where whole rows are weighed against equal parts, which are taken; and where whole rows are.
        (replace(many, decode_lines=2, decode_part_quarters=10), [1] * 90, [900 + 61 * i % 1900 for i in range(90)]),
        (replace(many, decode_lines=2, decode_part_quarters=10), [1] * 70, [1000 + 37 * i % 120 for i in range(70)]),
    ]
    key = ScheduleConfig("sm_90a", 1024)
    library = ensure_object(key)

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        outputs, total = [], emulator.Report()
        for shape, query_lens, kv_lens in steps:
            work = empty_lists(shape, len(kv_lens))
            total.add(run_schedule("sm_90a", key, work, query_lens, kv_lens, seed=seed))
            outputs += [work.arrivals, work.part_arrivals, work.prefill_queue, work.prefill_tiles]
            outputs += [entries[:, : TOTAL_Q + 1] for entries in (work.decode_first, work.decode_tiles)]
        return outputs, total

    return Target("schedule", library.with_suffix(".ptx").read_text(), run, ("schedule",))


def own_step(arch: str, plant_in_decode: bool, is_second: bool = False) -> Target:
    """A step of both kinds: decode, then prefill launched programmatically beside it; the faults are in one of the two.

    `is_second`: with queries whose maxima move, and more decode rows than the CTAs' rings of entries hold.
    """
    emulator.install()
    from fa4_backend.compile_cache import ensure_object
    from tests.support.emulated_mixed import run_mixed
    from tests.support.paged_case import PagedCase

    case = PagedCase(
        (1, 200, 2, 70), (300, 333, 129, 70), num_q_heads=4, num_kv_heads=2, head_dim=128, page_size=64, decode_query_len=2,
        arch=f"emulated-{arch}",
    )  # fmt: skip
    if is_second:
        case = replace(case, query_lens=case.query_lens + (1, 2) * 8, kv_lens=case.kv_lens + (40, 130) * 8, peaked=MOVING)
    built, kernels = case.build(), case.plan(num_sms=3).kernels
    library = ensure_object(kernels.decode if plant_in_decode else kernels.prefill)

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        result = run_mixed(case, num_sms=3, seed=seed, built=built)
        a, work = built.arguments, result.work
        return [a.out.clone(), a.lse.clone(), work.arrivals.clone(), work.part_arrivals.clone(), work.prefill_queue.clone()], result.report

    name = f"{arch} step, {'decode' if plant_in_decode else 'prefill'}"
    second = None if is_second else own_step(arch, plant_in_decode, is_second=True)
    return Target(name, library.with_suffix(".ptx").read_text(), run, families_of(arch), second=second)


def upstream(name: str, folder: Path) -> Target:
    """A kernel of flash-attn-4, from the objects that `tests.device.upstream_sm90 compile` wrote."""
    from fa4_backend.emulator.kernels import load_object
    from tests.device.upstream_sm90 import ARCH, CASES, FUNCTION, NUM_SMS, arguments, tensors

    # Long enough for the rings of two K and two V tiles to wrap twice.
    stem, case = folder / name, replace(CASES[name], query_lens=(640,), kv_lens=(640,), num_q_heads=1, num_kv_heads=1)
    ptx, cubin = stem.with_suffix(".ptx").read_text(), stem.with_suffix(".cubin").read_bytes()
    emulator.register_program(ptx, cubin)
    function = load_object(stem.with_suffix(".so"))[FUNCTION]

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        data = tensors(case)
        with emulator.session(arch=ARCH, num_sms=NUM_SMS, seed=seed) as session:
            session.run(function, *arguments(case, data))
        return [data["out"], data["lse"]], session.report

    return Target(f"flash-attn-4 sm90 {name}", ptx, run)


OWN_TARGETS: dict[str, Callable[[], Target]] = {
    "sm100_prefill": lambda: own_prefill("sm_100a prefill", "sm_100a", num_kv_heads=1, head_dim=128),
    # The head dimension that runs as pairs.
    "sm100_pair": lambda: own_prefill("sm_100a prefill, CTA pairs", "sm_100a", num_kv_heads=1, head_dim=192),
    # Staged tiles, the convert warps and their turns with the correction, as pairs.
    "sm100_fp8": lambda: own_prefill("sm_100a prefill, FP8 K and V", "sm_100a", num_kv_heads=1, head_dim=128, kv_dtype=FP8),
    # 128 tokens a tile: with two heads packed, every key after the 64th of the second masked tile is masked.
    "sm90_prefill": lambda: own_prefill("sm_90a prefill", "sm_90a", num_kv_heads=2, head_dim=128),
    "sm90_fp8": lambda: own_prefill("sm_90a prefill, FP8 K and V", "sm_90a", num_kv_heads=2, head_dim=128, kv_dtype=FP8),
    "sm90_parts": own_parts,
    "sm90_decode": lambda: own_decode("sm_90a"),
    "sm90_decode_fp8": lambda: own_decode("sm_90a", kv_dtype=FP8),
    "sm90_mla": own_mla,
    "sm100_decode": lambda: own_decode("sm_100a", batch_invariant=True),
    # Queries so large that a row's maximum moves block after block: O is rescaled. Hopper's kernel rescales it in any case.
    "sm100_peaked": lambda: own_prefill("sm_100a prefill, peaked", "sm_100a", num_kv_heads=1, head_dim=128, peaked=20.0),
    "sm100_mla": own_latent_decode,
    "sm100_mla_fp8": lambda: own_latent_decode(FP8),
    "schedule": own_schedule,
    "step_prefill": lambda: own_step("sm_90a", plant_in_decode=False),
    "step_decode": lambda: own_step("sm_100a", plant_in_decode=True),
}


# Of these every fault is planted, of their relatives a sample: time is what limits.
WHOLE = ("sm100_prefill", "sm100_pair", "sm90_prefill", "sm90_decode", "schedule")
SAMPLE = 2


def load_target(name: str, folder: Path) -> Target:
    """A kernel of ours by its name, or one of flash-attn-4 from a folder of its objects."""
    if name not in OWN_TARGETS:
        return upstream(name.removeprefix("upstream_"), folder)
    return OWN_TARGETS[name]() if name in WHOLE else replace(OWN_TARGETS[name](), sample=SAMPLE)


@contextmanager
def planted(target: Target, ptx: str) -> Iterator[None]:
    """Launches of the target's kernel run `ptx` inside; it must have run before, so that its image is loaded."""
    loaded = [h for h in handles if isinstance(h, LoadedKernel) and h.ptx == target.ptx]
    assert loaded, f"{target.name}: no loaded kernel has this PTX"
    for kernel in loaded:
        kernel.ptx = ptx
    try:
        yield
    finally:
        for kernel in loaded:
            kernel.ptx = target.ptx
        # Parsed programs are kept for the life of the process: too many for hundreds of mutants.
        forget_programs()
