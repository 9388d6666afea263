"""The drafter's side of speculative decoding: one backend for each step of a chain of drafts.

SGLang picks a drafter's backend from tables inside of two functions, which plugins reach by a hook around the look-up only.
"""

from __future__ import annotations

from typing import Any

from fa4_backend.problem import UnsupportedProblem
from fa4_integration.sglang_backend.factory import create_backend
from fa4_integration.sglang_backend.names import served_names

LOOK_UP = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"


def extend_draft_backends() -> None:
    """Let SGLang find this backend for its drafter too, once a process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if all(hook is not add_ours for _, hook, _ in HookRegistry._hooks.get(LOOK_UP, ())):
        HookRegistry.register(LOOK_UP, add_ours, HookType.AROUND)


def add_ours(
    look_up: Any, factory: Any, backend_name: str, backend_map: dict[str, Any], error_template: str, stamps_children: bool = False
) -> Any:
    """SGLang's look-up with our names in the table: the several steps of a chain, or the step after a verification."""
    runner, steps, topk = factory.draft_model_runner, factory.speculative_num_steps, factory.topk

    def create(name: str) -> Any:
        return name, (DraftSteps(runner, topk, steps) if stamps_children else create_backend(runner))

    ours = {name: lambda name=name: create(name) for name in served_names()}
    return look_up(factory, backend_name, {**backend_map, **ours}, error_template, stamps_children)


class DraftSteps:
    """A backend for each step of a chain of drafts. All share one batch, whose lengths count the verified tokens.

    Raises:
        UnsupportedProblem: at construction, for a tree of drafts or a drafter whose sliding-window layers have a pool of their own.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, topk: int, num_steps: int) -> None:
        from fa4_integration.sglang_backend.backend import FA4Backend

        # The last step's token is verified, never read back.
        self.attn_backends = [FA4Backend(runner, draft_step=step) for step in range(num_steps - 1)]
        if any(backend.slots.window_pool is not None for backend in self.attn_backends):
            raise UnsupportedProblem(
                "drafter: expected one KV pool for all its layers, got one of its own for sliding windows; "
                "use another --speculative-draft-attention-backend"
            )
        self.attn_backend_list = self.attn_backends
        self.kv_index_translator = runner.kv_index_translator
        self.topk, self.speculative_num_steps = topk, num_steps
        self.forward_metadata = None

    def init_forward_metadata(self, batch: Any) -> None:
        """Take over a batch of drafts, outside of graphs."""
        for backend in self.attn_backends:
            backend.init_forward_metadata(batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make what captured graphs read."""
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        """The host's part of a captured or replayed batch of drafts."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode, build_inner_fb_view

        view = build_inner_fb_view(batch, bs=batch.batch_size, forward_mode=ForwardMode.DECODE, encoder_lens=batch.encoder_lens)
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(view, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, batch: Any) -> None:
        """The device's part, recorded in the graph."""
        for backend in self.attn_backends:
            backend.init_forward_metadata_in_graph(batch)
