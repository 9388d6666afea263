"""vLLM on a GPU with K and V in FP8, FA4 beside FLASH_ATTN: the engines of `serve_tokens --kv-cache-dtype fp8`, several in a process.

    python -m tests.device.serve_fp8 --out fp8.json --logs FOLDER --seconds 150
    python -m tests.device.serve_fp8 --all --without sleep --per-lane 7 --side-by-side 8    # one wave of lanes

Lanes, prompts and what each engine has to show are `serve_matrix`'s; the judgement is that of `serve_tokens` (K and V in FP8). By default
the runs that issue-sized proofs need; `--all` takes every run of the suite.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fa4_backend import AttentionProblem, BatchLimits, MaskFeatures, plan_attention
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.problem import FP8, SAME_AS_Q
from tests.device.compiling import compile_lacking
from tests.device.engine_groups import Group, rehearsed
from tests.device.engine_lane import COMMON, Engine
from tests.device.serve_matrix import arch, lanes, report, run_lane, warm_imports, without_answers
from tests.device.serve_options import serve_parser
from tests.device.serve_tokens import DRAFTS, FP8_RUNS, SUITES, WRITE, compare, judge

SUITE = SUITES["fp8"]
LATER = ("sleep", "pages of 64", "skipped")
GRAPHS = {"full graphs": "FULL", "decode graphs": "FULL_DECODE_ONLY"}
FEWEST_DRAFTS = DRAFTS["speculative_config"]["num_speculative_tokens"]


def engine_of(run: str) -> Engine:
    """A run of the suite as a lane's engine, strict where ours: a compile after warm-up would end it."""
    backend, arguments = FP8_RUNS[run]
    is_ours = backend == "FA4"
    graphs = next((mode for words, mode in GRAPHS.items() if words in run), None)
    return Engine(
        run, backend, dict(arguments), scale_error=SUITE.planted if "off" in run else 1.0,
        environment={"FA4_BACKEND_STRICT": "1"} if is_ours else {}, graphs=graphs,
        drafts="drafts" in run, converts=is_ours and "long chunks" in run, is_alone="sleep" in run,
    )  # fmt: skip


def groups_of(models: list[str], has_all: bool, wanted: list[str], without: str = "") -> dict[str, Group]:
    """The runs of each model, or those `wanted`, in the suite's order: the reference, the yardstick, ours.

    Args:
        without: a word that no name may have; empty: any.
    """
    groups = {}
    for model in models:
        runs = SUITE.runs_of[model]
        chosen = [r for r in runs if r in wanted or (not wanted and (has_all or not any(word in r for word in LATER)))]
        chosen = [run for run in chosen if not without or without not in run]
        # Those that draft come last in their process: what a drafter imports breaks the next start on vLLM's CPU build.
        chosen.sort(key=lambda run: "drafts" in run)
        groups[model] = Group(WRITE[model], tuple(engine_of(run) for run in chosen), per_lane=3)
    return groups


def plans(groups: dict[str, Group], folder: Path, target: str) -> Iterator[Any]:
    """Plans as the engines make them: with and without drafts, each mask, FP8 and where layers are skipped 16 bits."""
    for name, group in groups.items():
        config = json.loads((folder / name / "config.json").read_text())
        cap = MaskFeatures(has_softcap="attn_logit_softcapping" in config)
        masks = [cap, replace(cap, has_window_left=True)] if config.get("sliding_window") else [cap]
        drafts = {FEWEST_DRAFTS if engine.drafts else 0 for engine in group.engines}
        pages = {engine.arguments.get("block_size", 16) for engine in group.engines}
        dtypes = {FP8, SAME_AS_Q} if any("skipped" in engine.name for engine in group.engines) else {FP8}
        heads, head_dim = (config["num_attention_heads"], config["num_key_value_heads"]), config["head_dim"]
        for mask, num, page, kv_dtype in ((m, n, p, d) for m in masks for n in drafts for p in pages for d in dtypes):
            problem = AttentionProblem(*heads, head_dim, head_dim, "bfloat16", page, target, mask=mask, kv_dtype=kv_dtype)
            limits = BatchLimits(COMMON["max_num_seqs"], COMMON["max_num_batched_tokens"], COMMON["max_model_len"], 1 + num, convert_keys=1)
            yield plan_attention(problem, limits)


def compile_kernels(groups: dict[str, Group], folder: Path, target: str) -> None:
    """Our kernels of all models, side by side, before engines ask for them one by one."""
    compile_lacking(key for plan in plans(groups, folder, target) for key in plan.keys)


def run_lanes(requests: list[tuple[str, Path]], options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """What all engines answered, "model: run" -> result, compared once all of a model's are there; written as lanes end."""
    results: dict[str, Any] = {}
    with ThreadPoolExecutor(options.side_by_side) as pool:
        for (model, request), answers in zip(requests, pool.map(lambda lane: run_lane(lane[1], deadline), requests), strict=True):
            if options.logs:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{request.parent.name}.log").write_bytes(request.with_name("log").read_bytes())
            # The reference may be in a later lane than its yardstick.
            results |= {f"{model}: {answer.pop('name')}": answer for answer in answers}
            reference = results.get(f"{model}: {SUITE.runs_of[model][0]}", {"failed": "not there"})
            for run, answer in results.items():
                if run.startswith(f"{model}: ") and "failed" not in answer and "failed" not in reference:
                    answer["against_flash_attn"] = compare(answer, reference)
            if options.out:
                stamp = None if options.rehearse else gpu_stamp()
                options.out.write_text(json.dumps({"stamp": stamp, "runs": without_answers(results)}, indent=1) + "\n")
    for run, answer in results.items():
        report(run, answer)
    return results


def main() -> int:
    """Run the engines, print a line each, write the JSON; 1 when one failed, was far away or did not show what it has to."""
    parser = serve_parser(__doc__, runs="lanes", side_by_side=4, seconds=150)
    parser.add_argument("--models", default=",".join(SUITE.runs_of), help="an apart by commas: of the suite")
    parser.add_argument("--all", action="store_true", help="sleep, pages of 64 and skipped layers too")
    parser.add_argument("--runs", default="", help="names of runs, a semicolon between them")
    parser.add_argument("--without", default="", help="a word: runs that have it in their name are left out")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on vLLM's CPU build; distances are not judged")
    parser.add_argument("--per-lane", type=int, help="engines in one process")
    parser.add_argument("--compile-only", metavar="ARCH", help="fill the cache for ARCH and stop; needs neither GPU nor vLLM")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    groups = groups_of(options.models.split(","), options.all, [run for run in options.runs.split(";") if run], options.without)
    if options.rehearse:
        groups = {name: rehearsed(group) for name, group in groups.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = lanes(groups, folder, options.per_lane)
        imports = None if options.compile_only else warm_imports(groups, folder)
        if not options.rehearse:
            compile_kernels(groups, folder, options.compile_only or arch())
        if imports is None:
            return 0
        with suppress(Exception):  # lanes then import by themselves
            imports.wait(60)
        results = run_lanes(requests, options, deadline)
    wrong = [f"{run} failed" for run, answer in results.items() if "failed" in answer]
    if not options.rehearse:
        wrong = judge(results, SUITE)
    wrong += [f"{run}: {fault}" for run, answer in results.items() for fault in answer.get("wrong", [])]
    print("\n".join(wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
