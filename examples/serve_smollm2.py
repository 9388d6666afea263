"""Serve SmolLM2-135M with vLLM on the FA4 backend, ask it something over HTTP, print the answer, the kernel that ran and the speed.

make demo                          # or: python -m examples.serve_smollm2
make demo PROMPT="Why is the sky blue?"
"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from examples.server import Server, ServerError
from examples.smollm2 import ModelError, smollm2
from fa4_backend import envs

PROMPT = "In two sentences: what does the attention mechanism of a language model do?"

# `--enforce-eager`: torch.compile needs a C++ compiler and half a minute at each start, for a model this small a few percent.
ARGUMENTS = ["--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16", "--disable-uvicorn-access-log"]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take half of the machine's memory
    "HF_HUB_OFFLINE": "1",  # the model is a folder: nothing to look up
    "VLLM_NO_USAGE_STATS": "1",
}

console = Console()


def main(
    prompt: Annotated[str, typer.Option(help="what to ask")] = PROMPT,
    port: Annotated[int, typer.Option(help="port of the server")] = 8471,
    max_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 120,
    backend: Annotated[str, typer.Option(help="vLLM's attention backend; CPU_ATTN is vLLM's own, to compare with")] = "FA4",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
) -> None:
    """Start the server, ask, print, stop."""
    try:
        model = smollm2()
        log = envs.cache_dir() / "demo-server.log"
        arguments = ["--attention-backend", backend, "--dtype", dtype, *ARGUMENTS]
        console.print(f"[dim]vllm serve {model} {' '.join(arguments)}[/dim]", soft_wrap=True)
        with Server(model, port, log, arguments, ENVIRONMENT) as server:
            with console.status("the server starts"):
                seconds = server.wait_until_ready()
            console.print(f"[dim]ready after {seconds:.0f} s[/dim]\n\n[bold]{prompt}[/bold]\n", soft_wrap=True)
            ask(server, prompt, max_tokens)
            report_kernel(server, backend)
    except (ModelError, ServerError) as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    except OSError as error:
        console.print(f"[red]{error}. Is the disk full? FA4_BACKEND_CACHE_DIR names another folder.[/red]", soft_wrap=True)
        raise typer.Exit(1) from error


def ask(server: Server, prompt: str, max_tokens: int) -> None:
    """Stream one chat answer to the terminal; then its timing."""
    begin = time.monotonic()
    first = last = begin
    num_tokens = 0
    request = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    for event in server.stream("/v1/chat/completions", request):
        text = event["choices"][0]["delta"].get("content") if event["choices"] else None
        if text:
            last = time.monotonic()
            first = last if first == begin else first
            sys.stdout.write(text)
            sys.stdout.flush()
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    speed = (num_tokens - 1) / (last - first) if last > first else float("nan")
    console.print(f"\n\n{num_tokens} tokens, first after {first - begin:.2f} s, then {speed:.1f} tokens/s", highlight=False)


def report_kernel(server: Server, backend: str) -> None:
    """Which kernel ran, from the server's own log. An FA4 server in which ours did not run is a failure."""
    kernel = server.kernel()
    if kernel is None and backend.upper() == "FA4":
        raise ServerError(f"The server answered, but no FA4 kernel ran: see {server.log}")
    console.print(kernel or f"{backend}: vLLM's own attention", highlight=False, style="bold")


if __name__ == "__main__":
    typer.run(main)
