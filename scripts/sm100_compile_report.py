"""What compiling costs and gives: the Blackwell prefill keys beside upstream flash-attn-4's kernels, compiled here without a GPU.

    python -m scripts.sm100_compile_report > docs/data/sm100_compile.json

Every kernel is compiled in a process of its own. `cpu_seconds` is user + system time of compile and export with every module imported
before; `cold` ones include the compiler's first use in the process (about 1.5 s, once), `warm` ones follow another compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from fa4_backend.compile import compile_to_object, cpu_seconds
from fa4_backend.kernel_facts import find_cuda_tool, resource_usage
from fa4_backend.kernel_stamp import make_stamp
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.problem import FP8
from tests.support.paged_case import PagedCase

ROOT = Path(__file__).parents[1]
BASE = PagedCase((1,), (1,), num_q_heads=4, num_kv_heads=1, head_dim=128, page_size=16, arch="emulated-sm_100a")
OURS = {
    "causal d128": BASE,
    "full attention d128": replace(BASE, is_causal=False),
    "causal d64": replace(BASE, head_dim=64),
    "causal d96": replace(BASE, head_dim=96),
    "causal d192 and 128": replace(BASE, num_q_heads=1, head_dim=192, head_dim_v=128),
    "causal d256 (CTA pairs)": replace(BASE, head_dim=256),
    "causal d256 (CTA pairs), all score features": replace(BASE, head_dim=256, window_left=100, softcap=30.0, sinks=True, alibi=True),
    "causal d128 fp16": replace(BASE, dtype="float16"),
    "causal d128 window": replace(BASE, window_left=100),
    "causal d128 softcap": replace(BASE, softcap=30.0),
    "causal d128 sinks": replace(BASE, sinks=True),
    "causal d128 alibi": replace(BASE, alibi=True),
    "causal d128 all score features": replace(BASE, window_left=100, softcap=30.0, sinks=True, alibi=True),
    "causal d128 sm_103a": replace(BASE, arch="emulated-sm_103a"),
    "causal d128 CTA pairs": BASE,
    "causal d192 and 128 one CTA": replace(BASE, num_q_heads=1, head_dim=192, head_dim_v=128),
    "FP8 K and V, causal d128 (CTA pairs)": replace(BASE, kv_dtype=FP8),
    "FP8 K and V, causal d128 all score features": replace(BASE, kv_dtype=FP8, window_left=100, softcap=30.0, sinks=True, alibi=True),
    "FP8 K and V, causal d128 fp16": replace(BASE, kv_dtype=FP8, dtype="float16"),
    "FP8 K and V, causal d64": replace(BASE, kv_dtype=FP8, head_dim=64),
    "FP8 K and V, causal d96": replace(BASE, kv_dtype=FP8, head_dim=96),
    "FP8 K and V, causal d192 and 128 (CTA pairs)": replace(BASE, kv_dtype=FP8, num_q_heads=1, head_dim=192, head_dim_v=128),
    "FP8 K and V, causal d256 (CTA pairs)": replace(BASE, kv_dtype=FP8, head_dim=256),
    "FP8 K and V, causal d128 one CTA": replace(BASE, kv_dtype=FP8),
}
# Where another than the tuned one is asked for.
CTA_GROUPS = {"causal d128 CTA pairs": 2, "causal d192 and 128 one CTA": 1, "FP8 K and V, causal d128 one CTA": 1}
UPSTREAM: dict[str, dict[str, int]] = {
    "causal d128": {},
    "causal d128 varlen paged 128": {"paged": 128},
    "causal d64": {"head_dim": 64},
}
OPCODES = ("MUFU", "FFMA2", "FADD2", "FMUL2", "FMNMX3", "F2FP", "UTCHMMA", "LDTM", "STTM", "UTMALDG", "R2UR", "IMAD", "SYNCS")


def sass_facts(cubin: Path) -> dict[str, Any]:
    """What a cubin's SASS says: registers that roles are given (setmaxnreg, softmax first), the highest one used, and opcodes."""
    tool = find_cuda_tool("cuobjdump")
    if tool is None:
        return {}
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, flags=re.M)
    counts = Counter(re.sub(r"^@!?U?P\w+ ", "", line).split(maxsplit=1)[0].split(".")[0] for line in code)
    given = [int(found[1], 16) for line in code if (found := re.search(r"USETMAXREG.* (0x[0-9a-f]+)", line))]
    used = max(int(number) for line in code for number in re.findall(r"\bR(\d+)\b", line))
    sass = {"total": len(code), **{name: counts[name] for name in OPCODES}}
    return {"setmaxnreg": given, "highest_register": used, "sass": sass}


def our_key(name: str) -> Sm100Config:
    """Compile key of one of OURS."""
    key = OURS[name].plan().kernels.prefill
    return key.with_tuning(cta_group=CTA_GROUPS.get(name, key.tuning.cta_group))


def compile_ours(name: str) -> dict[str, Any]:
    """Compile one key cold, then once more warm."""
    import cutlass.cute  # noqa: F401
    import torch  # noqa: F401
    import tvm_ffi  # noqa: F401

    from fa4_backend.kernels.sm100.kernel import O_STAGE
    from fa4_backend.kernels.sm100.storage import Storage
    from fa4_backend.kernels.sm100.tmem_layout import TmemLayout

    key = our_key(name)
    with tempfile.TemporaryDirectory() as folder:
        cold = compile_to_object(key, Path(folder) / "cold")
        warm = compile_to_object(key, Path(folder) / "warm")
        usage = resource_usage(Path(folder) / "warm.cubin")
        facts = sass_facts(Path(folder) / "warm.cubin")
    return {
        "key": key.name,
        "cold_cpu_seconds": cold.cpu_seconds,
        "warm_cpu_seconds": warm.cpu_seconds,
        "registers": usage.get("REG"),
        "spill_bytes": usage.get("STACK"),
        "smem_bytes": Storage.of(key, O_STAGE).num_bytes,
        "tmem_columns": TmemLayout.of(key).end,
        "ptx_instructions": warm.ptx_instructions,
        **facts,
    }


def compile_upstream(name: str) -> dict[str, Any]:
    """Compile one of upstream's kernels in a fresh process."""
    from fa4_backend.emulator import flash_attention

    flash_attention.prepare("sm_100a")
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    options = UPSTREAM[name]
    head_dim, page = options.get("head_dim", 128), options.get("paged")
    with tempfile.TemporaryDirectory() as folder:
        import os

        os.environ["CUTE_DSL_DUMP_DIR"] = folder
        with flash_attention._patched({}) as interface, FakeTensorMode():
            make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda")  # noqa: E731
            before = cpu_seconds()
            if page is None:
                q, kv = make(1, 512, 4, head_dim), make(1, 512, 1, head_dim)
                interface._flash_attn_fwd(q, kv, kv, causal=True, return_lse=True)
            else:
                lengths = make(3, dtype=torch.int32)
                pages = make(16, page, 1, head_dim)
                interface._flash_attn_fwd(
                    make(64, 4, head_dim), pages, pages, cu_seqlens_q=lengths, seqused_k=make(2, dtype=torch.int32),
                    page_table=make(2, 8, dtype=torch.int32), max_seqlen_q=64, causal=True, return_lse=True,
                )  # fmt: skip
            cpu = cpu_seconds() - before
        cubins = [path for path in Path(folder).rglob("*.cubin") if "Forward" in path.name or "flash" in path.name.lower()]
        cubin = max(cubins, key=lambda path: path.stat().st_size)
        usage, facts = resource_usage(cubin), sass_facts(cubin)
    return {"cold_cpu_seconds": round(cpu, 3), "registers": usage.get("REG"), "spill_bytes": usage.get("STACK"), **facts}


def main() -> int:
    """Print the report, or one child's result."""
    if sys.argv[1:]:
        side, name = sys.argv[1:]
        print(json.dumps(compile_ours(name) if side == "ours" else compile_upstream(name)))
        return 0
    report: dict[str, dict[str, Any]] = {"ours": {}, "upstream": {}}
    for side, names in (("ours", OURS), ("upstream", UPSTREAM)):
        for name in names:
            done = subprocess.run(
                [sys.executable, "-m", "scripts.sm100_compile_report", side, name], capture_output=True, text=True, cwd=ROOT
            )
            report[side][name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-300:]}
            print(side, name, report[side][name], file=sys.stderr, flush=True)
    json.dump({"stamp": make_stamp("compiler", ("sm100",)), **report}, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
