"""Engine to PTX without a GPU: vLLM serves the first layers of SmolLM2 with a GPU's compiled kernels on the emulator.

make demo-emulated                 # or: python -m examples.serve_emulated --kernel emulate-sm90

The same prompt is answered with the torch kernel first; the token ids must be equal. Two layers of 30 say nothing sensible, and seconds
a token are the price of executing every instruction: this shows that the path holds, not how fast a GPU is.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from examples.serve_smollm2 import ENVIRONMENT
from examples.server import Server, ServerError
from examples.smollm2 import ModelError, smollm2
from fa4_backend import envs

NUM_LAYERS = 2
ARGUMENTS = ["--attention-backend", "FA4", "--dtype", "bfloat16", "--enforce-eager", "--block-size", "16", "--max-model-len", "128"]
ARGUMENTS += ["--max-num-seqs", "2", "--disable-uvicorn-access-log"]

console = Console()


def main(
    prompt: Annotated[str, typer.Option(help="what to continue")] = "The capital of France is",
    port: Annotated[int, typer.Option(help="port of the server")] = 8472,
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 6,
    kernel: Annotated[str, typer.Option(help="emulate-sm100 or emulate-sm90")] = "emulate-sm100",
) -> None:
    """Serve twice, compare. Exits 1 when tokens differ or the emulated kernel did not run."""
    try:
        model = first_layers(smollm2(), envs.cache_dir() / "models" / f"smollm2-first-{NUM_LAYERS}-layers")
        reference = answer(model, "reference", prompt, port, max_tokens)
        emulated = answer(model, kernel, prompt, port, max_tokens)
    except (ModelError, ServerError) as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    if emulated != reference:
        console.print(f"[red]token ids differ: expected {reference}, got {emulated}[/red]", soft_wrap=True)
        raise typer.Exit(1)
    console.print(f"the same {len(emulated)} token ids from both")


def first_layers(model: Path, folder: Path) -> Path:
    """A copy of `model` with its first NUM_LAYERS layers, made once in `folder`."""
    from safetensors.torch import load_file, save_file

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(model / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("model.layers.") or int(name.split(".")[2]) < NUM_LAYERS}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for path in model.glob("*.json"):
        if path.name != "config.json":
            shutil.copy(path, folder / path.name)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": NUM_LAYERS}
    # Last: it marks the folder as whole.
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def answer(model: Path, kernel: str, prompt: str, port: int, max_tokens: int) -> list[int]:
    """Token ids that a server with `kernel` behind FA4 generates.

    Raises:
        ServerError: the server failed, or another kernel ran.
    """
    log = envs.cache_dir() / f"demo-{kernel}.log"
    with Server(model, port, log, ARGUMENTS, {**ENVIRONMENT, "FA4_BACKEND_CPU": kernel}) as server:
        with console.status(f"{kernel}: the server starts"):
            server.wait_until_ready()
        request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        begin = time.monotonic()
        with console.status(f"{kernel}: {max_tokens} tokens"):
            choice = server.post("/v1/completions", request)["choices"][0]
        seconds = time.monotonic() - begin
        ran = server.kernel() or "no FA4 kernel"
    expected = "torch reference" if kernel == "reference" else f"emulating {envs.EMULATED_ARCH[kernel]}"
    if expected not in ran:
        raise ServerError(f"FA4_BACKEND_CPU={kernel}: expected {expected}, got {ran}: see {log}")
    console.print(f"{ran}\n  {choice['token_ids']} {choice['text']!r} in {seconds:.1f} s", highlight=False, soft_wrap=True)
    return choice["token_ids"]


if __name__ == "__main__":
    typer.run(main)
