"""What a step of the engine tells the kernels: device buffers with fixed addresses, refreshed once, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fa4_backend.kernels.launch_abi import schedule_arguments
from fa4_backend.kernels.schedule.work_list import NO_WINDOW
from fa4_backend.narrow_tiles import NarrowSteps
from fa4_backend.plan import AttentionPlan
from fa4_backend.problem import RAGGED, SAME_AS_Q
from fa4_backend.step_validation import Passed, check_bounds, check_plan_device, check_step

if TYPE_CHECKING:
    import torch

    from fa4_backend.convert_room import ConvertedKv
    from fa4_backend.kernels.loading import LoadedKernels
    from fa4_backend.kernels.schedule.work_list import WorkLists


class StepBounds(NamedTuple):
    """Host-side bounds of one step. In a captured graph they are the capture's, so kernels may use them only as bounds."""

    num_seqs: int
    max_seqlen_q: int  # longest query of the step
    max_seqlen_k: int  # longest KV of the step
    min_seqlen_q: int  # shortest query of the step's rows that have any
    converts: bool = False  # K and V of its prefill rows are brought from FP8 to 16 bits once a call
    is_narrow: bool = False  # all its rows are decode rows, served by the plan's narrow tiles
    has_messages: bool = False  # all its prefill rows are short, served by the plan's tiles for messages


@dataclass
class AttentionMetadata:
    """Buffers and loaded kernels of one plan on one device. `refresh` before the first layer of a step; then every layer may read them.

    Addresses never change after `allocate`, so a captured CUDA graph follows each replay's lengths.
    """

    plan: AttentionPlan
    device: torch.device
    kernels: LoadedKernels | None = None  # None on the reference
    work: WorkLists | None = None  # device-made work lists and split-KV workspace; None on the reference
    narrow: NarrowSteps | None = None  # what serves steps of decode rows alone in their place; None where the plan has nothing
    messages: NarrowSteps | None = None  # the same of steps whose prefill rows are all short
    bounds: StepBounds | None = None
    converted: ConvertedKv | None = None  # in the room of the process's plans on the device; None where no step converts
    kv_lens: torch.Tensor | None = None  # (max_num_seqs,) int32, KV tokens of the step where K and V have no pages
    unit_scale: torch.Tensor | None = None  # (1,) float32, one: the scale of K and V in FP8 where a call gives none
    window_left: int | None = None  # no layer that reads this sees more keys before the diagonal: others get no work; None: all seen
    passed: Passed = field(default_factory=dict)  # facts of steps and calls that need no second check
    is_announced: bool = False  # the plan's log line was written
    followers: list[AttentionMetadata] = field(default_factory=list)  # made by `sharing`

    @classmethod
    def allocate(cls, plan: AttentionPlan, device: torch.device | str) -> AttentionMetadata:
        """Make the buffers for every batch within `plan.limits` and load the kernels, compiling what the cache on disk lacks.

        The only allocation and the only place that compiles: from here on the plan's steps do neither.

        Raises:
            ValueError: the plan's kernels do not run on `device`.
            CompileError: a kernel could not be compiled or linked.
            CacheError: the cache on disk is not trusted, cannot be written, or lacks what cannot be compiled here.
            RuntimeError: strict mode, warm-up is over (`fa4_backend.compile_cache.seal`) and the cache lacks a kernel.
        """
        import torch

        device = torch.device(device)
        check_plan_device(plan, device)
        unit_scale = torch.ones(1, dtype=torch.float32, device=device) if plan.problem.has_kv_scales else None
        kv_lens = None
        if plan.problem.kv_source == RAGGED:
            kv_lens = torch.zeros(plan.limits.max_num_seqs, dtype=torch.int32, device=device)
        if plan.kernels is None:
            return cls(plan, device, kv_lens=kv_lens, unit_scale=unit_scale)
        from fa4_backend import convert_room
        from fa4_backend.kernels.loading import load_kernels
        from fa4_backend.kernels.schedule.work_list import WorkLists

        kernels = load_kernels(plan.kernels, emulated=plan.problem.is_emulated)
        work = WorkLists.allocate(plan.kernels.work, plan.limits, device)
        device = work.prefill_tiles.device  # "cuda" alone has become one GPU
        room = convert_room.reserve(plan, device)
        converted = None if room is None else room.views(plan)
        narrow, messages = (NarrowSteps.load(own, work, emulated=plan.problem.is_emulated) for own in (plan.narrow, plan.messages))
        return cls(plan, device, kernels, work, narrow, messages, converted=converted, kv_lens=kv_lens, unit_scale=unit_scale)

    def sharing(self, plan: AttentionPlan) -> AttentionMetadata:
        """The same steps for a plan of the same batches that differs in its dtype of out: kernels of its own, and these work lists.

        Refreshed with this one, and not by itself. Loads and compiles as `allocate` does, which says what is raised.
        """
        ours, theirs = ((replace(p.problem, out_dtype=SAME_AS_Q), p.limits, p.num_sms) for p in (self.plan, plan))
        if ours != theirs:
            raise ValueError(f"plan: expected one that differs in out_dtype alone from {self.plan.describe()}, got {plan.describe()}")
        kernels = narrow = messages = None
        if plan.kernels is not None:
            from fa4_backend.kernels.loading import load_kernels

            assert self.work is not None and self.plan.kernels is not None and self.plan.kernels.work == plan.kernels.work, f"{plan=}"
            for ours_own, own in ((self.plan.narrow, plan.narrow), (self.plan.messages, plan.messages)):
                assert (ours_own and ours_own.work) == (own and own.work), f"{plan=}"
            kernels = load_kernels(plan.kernels, emulated=plan.problem.is_emulated)
            emulated = plan.problem.is_emulated
            narrow, messages = (NarrowSteps.load(own, self.work, emulated=emulated) for own in (plan.narrow, plan.messages))
        follower = AttentionMetadata(
            plan,
            self.device,
            kernels,
            self.work,
            narrow,
            messages,
            converted=self.converted,
            kv_lens=self.kv_lens,
            unit_scale=self.unit_scale,
            window_left=self.window_left,
        )
        self.followers.append(follower)
        return follower

    def expect_short_queries(self) -> None:
        """Take back `min_seqlen_q` of the last refresh: before calls that are captured, whose replays may have decode rows."""
        if self.bounds is not None:
            assert not self.bounds.converts and not self.bounds.has_messages, f"{self.bounds=}: its lists are for one step"
            self.bounds = self.bounds._replace(min_seqlen_q=1)

    def refresh(
        self,
        *,
        cu_seqlens_q: torch.Tensor,
        seqused_k: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        min_seqlen_q: int = 1,
        prefill_keys: int | None = None,
        decode_alone: bool = False,
    ) -> None:
        """Take over the lengths of a step. Launches the scheduling kernel on a GPU; no sync, no allocation.

        Args:
            cu_seqlens_q: (batch + 1,) int32; padded batches repeat the last value.
            seqused_k: (batch,) int32, valid KV tokens; 0 for padding. Kernels clamp it to what the page table holds. Given exactly where
                K and V have pages.
            cu_seqlens_k: (batch + 1,) int32, exclusive prefix sum of KV tokens; given exactly where they have none.
            max_seqlen_q, max_seqlen_k: host upper bounds of the step's query and KV lengths.
            min_seqlen_q: host lower bound of the query lengths of rows that have queries. Above the plan's `decode_query_len` the decode
                kernel, which would find no row, is not launched (3 to 12 us on an H200). In a captured graph it must hold for every replay.
            prefill_keys: host upper bound of the KV tokens of all rows with more than `decode_query_len` queries, together. Where it is
                within the plan's `convert_keys`, and rows are long enough, each call brings K and V in FP8 to 16 bits once, in place of
                once a tile; page tables then hold `max_seqlen_k` tokens. Where all such rows are short enough, tiles of their height serve
                them. Lists are made for one way only, and a graph keeps the way of its capture: not to be given for a step that is captured
                or replayed.
            decode_alone: the host knows that no row has more than the plan's `decode_query_len` queries, which prefill tiles of their own
                height may then serve (`fa4_backend/narrow_tiles.py`). Lists are made for one way only: where the step is captured, it must
                hold for each replay, and be given for each.

        Raises:
            ValueError: the batch is larger than the plan's limits, or a tensor or bound is not what is expected. On CPU tensors also: a
                length is outside a host bound.
        """
        num_seqs = check_step(self.plan, self.device, self.passed, cu_seqlens_q, seqused_k, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        check_bounds(self.plan.limits, cu_seqlens_q, seqused_k, min_seqlen_q, max_seqlen_q, prefill_keys)
        converts = self._converts(max_seqlen_q, max_seqlen_k, prefill_keys)
        is_narrow = self._is_narrow(max_seqlen_q, decode_alone)
        has_messages = not converts and self._has_messages(max_seqlen_q, prefill_keys)
        self.bounds = StepBounds(num_seqs, max_seqlen_q, max_seqlen_k, min_seqlen_q, converts, is_narrow, has_messages)
        if self.kv_lens is not None and cu_seqlens_k is not None:
            import torch

            seqused_k = torch.sub(cu_seqlens_k[1:], cu_seqlens_k[:-1], out=self.kv_lens[:num_seqs])
        for follower in self.followers:
            follower.bounds, follower.window_left = self.bounds, self.window_left
        if self.work is not None and self.kernels is not None:
            left = NO_WINDOW if self.window_left is None else int(min(self.window_left, NO_WINDOW))
            right = 0 if self.plan.problem.mask.is_causal else NO_WINDOW
            own = self.narrow if is_narrow else self.messages if has_messages else None
            work = self.work if own is None else own.work
            shape = None
            if converts:
                assert self.plan.kernels is not None and self.plan.kernels.converted is not None
                shape = self.plan.kernels.converted.work
            self.kernels.schedule(*schedule_arguments(work, cu_seqlens_q, seqused_k, window_left=left, window_right=right, shape=shape))

    def _is_narrow(self, max_seqlen_q: int, decode_alone: bool) -> bool:
        """Whether narrow tiles serve the step."""
        most = self.plan.limits.decode_query_len
        if decode_alone and max_seqlen_q > most:
            raise ValueError(f"decode_alone: expected max_seqlen_q of at most {most}, the plan's decode_query_len, got {max_seqlen_q}")
        return decode_alone and self.narrow is not None

    def _has_messages(self, max_seqlen_q: int, prefill_keys: int | None) -> bool:
        """Whether tiles for messages serve the step's prefill rows: each fits one. Not in a step that may be captured or replayed."""
        if self.messages is None or prefill_keys is None:
            return False
        return self.plan.limits.decode_query_len < max_seqlen_q <= self.messages.work.shape.tokens_per_item

    def _converts(self, max_seqlen_q: int, max_seqlen_k: int, prefill_keys: int | None) -> bool:
        """Whether the step's K and V are converted once a call: they fit, and enough query blocks see a key of the longest row."""
        converted = None if self.plan.kernels is None else self.plan.kernels.converted
        limits = self.plan.limits
        if converted is None or prefill_keys is None or prefill_keys > limits.convert_keys or max_seqlen_q <= limits.decode_query_len:
            return False
        queries = max_seqlen_q  # that see a key, on average
        if self.plan.problem.mask.is_causal:
            queries -= queries * queries // (2 * max(max_seqlen_k, queries))
        if self.window_left is not None:
            queries = min(queries, self.window_left + 1)
        return queries >= converted.least_visits * converted.work.tokens_per_item
