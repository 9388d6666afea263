"""The DSL's types of what tensors hold, by the names that configs use."""

from __future__ import annotations

import cutlass

ELEMENT_TYPES: dict[str, type[cutlass.Numeric]] = {
    "bfloat16": cutlass.BFloat16,
    "float16": cutlass.Float16,
    "float8_e4m3fn": cutlass.Float8E4M3FN,
    "float32": cutlass.Float32,
    "int32": cutlass.Int32,
}
