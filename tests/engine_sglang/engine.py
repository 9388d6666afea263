"""An engine of SGLang on this machine's CPU: tokens of a model, greedily, as JSON. Run in a process of its own, as its launcher is.

python -m tests.engine_sglang.engine BACKEND MODEL_FOLDER OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE_SIZE = 16
NEW_TOKENS = 24
# Around a page's edge and beyond a chunk of a prompt; the second round's prompts begin as the first's, whose pages the radix cache holds.
FIRST = [[5 + index % 7 for index in range(90)], [17, 3, 90], list(range(100, 116))]
SECOND = [[*FIRST[0], 44, 45, 46], [*FIRST[2], 7]]


def generate(backend: str, folder: Path) -> list[list[int]]:
    """Tokens for both rounds of prompts."""
    import sglang

    engine = sglang.Engine(
        model_path=str(folder),
        device="cpu",
        attention_backend=backend,
        page_size=PAGE_SIZE,
        dtype="float32",
        skip_tokenizer_init=True,
        chunked_prefill_size=64,
        enable_mixed_chunk=True,
        max_total_tokens=4096,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
    )
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    try:
        return [
            answer["output_ids"] for prompts in (FIRST, SECOND) for answer in engine.generate(input_ids=prompts, sampling_params=sampling)
        ]
    finally:
        engine.shutdown()


if __name__ == "__main__":
    # Spawned processes import this module again and must not start an engine.
    Path(sys.argv[3]).write_text(json.dumps(generate(sys.argv[1], Path(sys.argv[2]))))
