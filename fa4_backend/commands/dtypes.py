"""Names of dtypes as a user types them."""

from __future__ import annotations

from fa4_backend.problem import FP8

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": FP8, "fp8_e4m3": FP8}
KV_DTYPE_HELP = "of K and V: fp8 (short for fp8_e4m3), or auto for the model's"
Q_DTYPE_HELP = "of q: fp8, beside K and V in fp8, or auto for the model's"


def full_dtype(name: str) -> str:
    """torch's name of a dtype, or `auto`; what is not a short name is left for the problem to accept or refuse."""
    return SHORT_NAMES.get(name, name)
