"""Where an engine on two GPUs spends its start, or hangs: one step after the other, each timed and ended in time.

    python -m tests.device.two_gpus [--seconds 100] [--logs FOLDER]

1 the host: variables of collectives, /dev/shm, how long its own name takes to resolve
2 two processes: a gloo and an NCCL group, all-reduces of 4 B to 64 MiB
3 vLLM's import in two processes at once
4 an engine of FLASH_ATTN, tensor parallel 2, eager, a small random model, with NCCL's own log

A step that does not end in time prints where each of its threads stood. Once all pass, `tests.device.serve_matrix --groups two_gpus`
has the engines on FA4. NVLink multicast stays off: see `serve_matrix.NO_MULTICAST`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from tests.device.engine_groups import EAGER, TP_2
from tests.device.engine_lane import Engine, run_process, write_request
from tests.device.serve_matrix import NO_MULTICAST
from tests.engines.tiny_models import write_llama

MEBI = 1 << 20


def all_reduce(rank: int, port: int) -> None:
    """One of the two processes of step 2; says how long each part takes."""
    import torch
    import torch.distributed as dist

    def say(what: str, begin: float) -> None:
        print(f"rank {rank}: {what} {time.perf_counter() - begin:.2f} s", flush=True)

    begin = time.perf_counter()
    torch.cuda.set_device(rank)
    torch.ones(1, device="cuda")
    say("CUDA", begin)
    begin = time.perf_counter()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dist.barrier()
    say("gloo group and a barrier", begin)
    begin = time.perf_counter()
    group = dist.new_group(backend="nccl")
    first = torch.ones(1, device="cuda")
    dist.all_reduce(first, group=group)
    assert first.item() == 2
    say(f"NCCL {torch.cuda.nccl.version()} group and its first all-reduce", begin)
    for size in (4, MEBI, 64 * MEBI):
        data = torch.ones(size // 4, device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            dist.all_reduce(data, group=group)
        torch.cuda.synchronize()
        say(f"ten all-reduces of {size} B", begin)
    assert data[0].item() == 2.0**10
    dist.destroy_process_group()


def host() -> None:
    """Step 1."""
    begin = time.perf_counter()
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        address = str(error)
    print(f"{socket.gethostname()} is {address}, after {time.perf_counter() - begin:.2f} s", flush=True)
    shm = shutil.disk_usage("/dev/shm")
    print(f"/dev/shm: {shm.free // MEBI} MiB free; {os.cpu_count()} cores; interfaces {[name for _, name in socket.if_nameindex()]}")
    names = ("NCCL", "TORCH_SYMM", "NVSHMEM", "GLOO", "VLLM", "CUDA_VISIBLE")
    print({name: value for name, value in os.environ.items() if name.startswith(names)}, flush=True)


def in_two_processes(arguments: list[str], log: Path, seconds: float) -> bool:
    """The same command in two processes, whose only difference is RANK."""
    both = " & ".join(f"RANK={rank} {' '.join(arguments)}" for rank in (0, 1))
    return run_process(["bash", "-c", f"{both} & wait"], NO_MULTICAST, log, seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    """Run the steps; 1 at the first that does not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100, help="for the engine of step 4")
    parser.add_argument("--logs", type=Path, default=None)
    parser.add_argument("--all-reduce", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.all_reduce:
        all_reduce(int(os.environ["RANK"]), options.all_reduce)
        return 0
    folder = options.logs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    host()
    again = [sys.executable, "-m", "tests.device.two_gpus", "--all-reduce", str(free_port())]
    model = write_llama(folder / "model")
    engine = Engine("FLASH_ATTN, TP 2", "FLASH_ATTN", {**EAGER, **TP_2})
    lane = [sys.executable, "-m", "tests.device.engine_lane", "--request"]
    request = write_request(folder / "lane", model, [engine], [[5, 6, 7], list(range(2, 40)), list(range(2, 40)), [9] * 30])
    told = {**NO_MULTICAST, "NCCL_DEBUG": "INFO", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    told["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it would be compiled at the first start
    timed = "'import time; begin = time.perf_counter(); import vllm.v1.worker.gpu_worker; print(time.perf_counter() - begin)'"
    steps = {
        "2 all-reduce": lambda log: in_two_processes(again, log, 40),
        "3 import": lambda log: in_two_processes([sys.executable, "-c", timed], log, 60),
        "4 engine": lambda log: run_process([*lane, str(request)], told, log, options.seconds),
    }
    for name, step in steps.items():
        log, begin = folder / f"{name.replace(' ', '_')}.log", time.perf_counter()
        is_done = step(log)
        text = log.read_text(errors="replace")
        print(f"== {name}: {'done' if is_done else 'NOT DONE'} after {time.perf_counter() - begin:.1f} s", flush=True)
        print("\n".join(text.splitlines()[-12 if is_done else -80 :])[-6000:], flush=True)
        if not is_done or "Traceback" in text:
            return 1
    (answer,) = [json.loads(line) for line in (folder / "lane" / "answers.jsonl").read_text().splitlines()]
    print({key: answer.get(key) for key in ("failed", "config", "start_seconds", "ask_seconds", "slow_parts")}, flush=True)
    return int("failed" in answer)


if __name__ == "__main__":
    raise SystemExit(main())
