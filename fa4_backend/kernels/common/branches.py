"""Branches and loops of the device around values that MLIR holds, where `@cute.jit` would make selects or refuse a vector."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from cutlass import Boolean
from cutlass._mlir import ir
from cutlass._mlir.dialects import scf

from fa4_backend.kernels.common import vector_ops as vectors

Change = Callable[[list[ir.Value]], list[ir.Value]]  # values to others of the same types


def either(
    condition: Boolean, types: Sequence[ir.Type], then: Callable[[], list[ir.Value]], otherwise: Callable[[], list[ir.Value]]
) -> list[ir.Value]:
    """What `then` returns where `condition` holds, else what `otherwise` does: a branch, not selects. Both return values of `types`."""
    branch = scf.IfOp(Boolean(condition).ir_value(), list(types), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(then())
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(otherwise())
    return list(branch.results)


def when(condition: Boolean, values: Sequence[ir.Value], change: Change) -> list[ir.Value]:
    """`change(values)` where `condition` holds, else `values`: a branch, not selects."""
    return either(condition, [v.type for v in values], lambda: change(list(values)), lambda: list(values))


def when_scalars(condition: Boolean, values: Sequence[ir.Value], change: Change) -> list[ir.Value]:
    """`when` for float32 vectors whose elements join one by one.

    LLVM would join pairs of registers, which ptxas cannot keep where a TMEM load has put them: it then copies them.
    """
    lengths = [ir.VectorType(v.type).shape[0] for v in values]

    def apart(flat: list[ir.Value]) -> list[ir.Value]:
        ends = list(itertools.accumulate(lengths))
        return [vectors.from_elements(flat[end - n : end]) for n, end in zip(lengths, ends, strict=True)]

    def change_flat(flat: list[ir.Value]) -> list[ir.Value]:
        return [x for v in change(apart(flat)) for x in vectors.elements(v)]

    return apart(when(condition, [x for v in values for x in vectors.elements(v)], change_flat))


def repeat_once(
    one_pass: Callable[..., tuple[Boolean, list[ir.Value]]], flag: Boolean, values: Sequence[ir.Value], results: Sequence[ir.Type]
) -> list[ir.Value]:
    """A do-while loop: `one_pass(flag, *values)` returns (again, results); when repeated, flag is true and values are the first results."""
    inits = [Boolean(flag).ir_value(), *values]
    loop = scf.WhileOp(list(results), inits)
    body = loop.before.blocks.append(*[v.type for v in inits])
    with ir.InsertionPoint(body):
        again, produced = one_pass(*body.arguments)
        scf.condition(Boolean(again).ir_value(), produced)
    step = loop.after.blocks.append(*results)
    with ir.InsertionPoint(step):
        scf.yield_([Boolean(True).ir_value(), *list(step.arguments)[: len(values)]])
    return list(loop.results)
