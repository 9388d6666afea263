"""Instructions of the native loop that are not rows of `alu.TABLE`: memory, control flow, lane exchange, mma.sync.

Each function turns one family into a record for `native/interp.c`; the section of the PTX ISA 9.0 stands in its docstring.
"""

from __future__ import annotations

from fa4_backend.emulator import alu
from fa4_backend.emulator.builder import Builder, immediate_bits
from fa4_backend.emulator.errors import UnsupportedInstruction
from fa4_backend.emulator.global_races import SEM_ACQUIRE, SEM_CTA, SEM_NON_COHERENT, SEM_RELEASE, SEM_STRONG
from fa4_backend.emulator.lowered_program import LOCAL_WINDOW, SHARED_WINDOW, SINK_SLOT
from fa4_backend.emulator.opcodes import Modifiers, NativeMaker, register_native
from fa4_backend.emulator.syntax import TYPE_BYTES, Immediate, Instruction, Not, Pair, Register, Sink, Symbol, Vector

SPACES = {"": 0, "global": 1, "const": 1, "shared": 2, "shared::cta": 2, "shared::cluster": 3, "local": 4, "param": 5, "param::entry": 5}
_IGNORED_MEMORY = frozenset(
    "weak relaxed acquire release acq_rel volatile mmio nc ca cg cs lu cv wb wt cta cluster gpu sys noftz "
    "L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate "
    "L2::64B L2::128B L2::256B L2::cache_hint L2::evict_last L2::evict_normal L2::evict_first".split()
)


def _semantics(mods: Modifiers) -> int:
    """Ordering of a memory instruction; caching hints have no meaning here. PTX ISA 8 (memory consistency model)."""
    sem = 0
    if "acquire" in mods.parts or "acq_rel" in mods.parts:
        sem |= SEM_ACQUIRE
    if "release" in mods.parts or "acq_rel" in mods.parts:
        sem |= SEM_RELEASE
    if sem or {"relaxed", "volatile", "mmio"} & set(mods.parts):
        sem |= SEM_STRONG
    if "cta" in mods.parts:
        sem |= SEM_CTA
    if "nc" in mods.parts:
        sem |= SEM_NON_COHERENT
    mods.parts = [p for p in mods.parts if p not in _IGNORED_MEMORY]
    return sem


def _load_store(b: Builder, ins: Instruction, mods: Modifiers) -> bool | None:
    """ld 9.7.9.8, ld.global.nc 9.7.9.9, st 9.7.9.11"""
    is_store = ins.opcode.startswith("st.")
    if ins.opcode.startswith(("st.async", "st.bulk")):
        return False
    sem = _semantics(mods)
    space = mods.one(*SPACES, default="")
    vector = int(mods.one("v2", "v4", "v8", default="v1")[1:])
    kind = mods.parts.pop()
    mods.done()
    if kind not in TYPE_BYTES or kind == "pred":
        raise UnsupportedInstruction(f"{ins.opcode}: type .{kind}")
    data, where = (ins.operands[1], ins.operands[0]) if is_store else (ins.operands[0], ins.operands[1])
    items = data.items if isinstance(data, Vector) else (data,)
    if len(items) != vector:
        raise UnsupportedInstruction(f"{ins.opcode} with {len(items)} registers")
    slots = []
    for item in items:
        if isinstance(item, Register):
            size = TYPE_BYTES[item.type]
            slots.append(b.register_slots[item.index] << 4 | (3 if size == 8 else 1 if size == 2 else 2))
        elif isinstance(item, Sink) and not is_store:
            slots.append(SINK_SLOT << 4 | (3 if TYPE_BYTES[kind] == 8 else 2))
        elif isinstance(item, Immediate) and is_store:
            size = TYPE_BYTES[kind]
            wide = size == 8
            bits = immediate_bits(item, {"f32": "f32", "f64": "f64"}.get(kind, "u64" if wide else "u32"))
            slots.append(b.const(bits, 8 if wide else 4) << 4 | (3 if wide else 2))
        else:
            raise UnsupportedInstruction(f"{ins.opcode}: operand {item!r}")
    slot, offset, wide_address = b.address(where)
    fields = {"a": slot, "imm": offset, "b": SPACES[space], "c": TYPE_BYTES[kind], "count": vector, "target": b.list_slots(slots), "f": sem}
    unused = sum(1 << i for i, item in enumerate(items) if isinstance(item, Sink) or b.is_unused(item))
    if is_store or unused == (1 << vector) - 1:
        unused = 0  # a load that nothing uses at all is taken as it stands
    b.emit("STORE" if is_store else "LOAD", e=int(kind[0] == "s") | (2 if wide_address else 0), d=unused, **fields)
    return None


_ATOMIC_OPS = ("add", "min", "max", "inc", "dec", "exch", "cas", "and", "or", "xor")
_ATOMIC_TYPES = ("u32", "s32", "u64", "s64", "f32", "f64", "b32", "b64", "f16x2", "bf16x2", "f16", "bf16", "b16")


def _atomic(b: Builder, ins: Instruction, mods: Modifiers) -> bool | None:
    """atom 9.7.13.5, red 9.7.13.6"""
    if ins.opcode.startswith("red.async"):
        return False
    returns = ins.opcode.startswith("atom.")
    sem = _semantics(mods) | SEM_STRONG
    space = mods.one("global", "shared", "shared::cta", "shared::cluster", default="")
    vector = int(mods.one("v2", "v4", "v8", default="v1")[1:])
    operation = _ATOMIC_OPS.index(mods.one(*_ATOMIC_OPS))
    kind = mods.one(*_ATOMIC_TYPES)
    mods.done()
    if vector > 1 and returns:
        raise UnsupportedInstruction(f"{ins.opcode}: vector atom with a result")
    half = kind in ("f16x2", "bf16x2", "f16", "bf16")
    if (operation > 2 and (half or kind in ("f32", "f64"))) or (kind in ("f32", "f64") and operation != 0 and kind == "f64"):
        raise UnsupportedInstruction(ins.opcode)
    container = (
        "u64" if kind in ("u64", "s64", "f64", "b64") else "f32" if kind == "f32" else "u16" if kind in ("f16", "bf16", "b16") else "u32"
    )
    where, values = (ins.operands[1], ins.operands[2:]) if returns else (ins.operands[0], ins.operands[1:])
    items = values[0].items if isinstance(values[0], Vector) else values
    slot, offset, wide = b.address(where)
    fields = {"a": slot, "imm": offset, "b": SPACES[space], "c": operation, "f": _ATOMIC_TYPES.index(kind), "count": vector}
    d = b.dest(ins.operands[0], container) if returns else 0
    b.emit("ATOMIC", d=d, e=(2 if wide else 0) | sem << 4, target=b.list_slots([b.source(v, container) for v in items]), **fields)
    return None


def _branch(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """bra 9.7.12.3. `.uni` is a promise of the compiler; divergence works either way."""
    mods.has("uni")
    mods.done()
    b.emit("BRANCH", target=b.target(ins, ins.operands[0]))


def _branch_table(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """brx.idx 9.7.12.4"""
    mods.one("idx")
    mods.has("uni")
    mods.done()
    table = ins.operands[1]
    if not isinstance(table, Symbol) or table.name not in b.kernel.branch_tables:
        raise UnsupportedInstruction("brx.idx without a .branchtargets list")
    targets = [b.target(ins, Symbol(name)) for name in b.kernel.branch_tables[table.name]]
    b.emit("BRANCH_TABLE", a=b.u32(ins.operands[0]), target=b.list_slots(targets), count=len(targets))


def _exit(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """ret 9.7.12.6, exit 9.7.12.7: kernels are never called, so both end the thread."""
    mods.has("uni")
    mods.done()
    b.emit("EXIT")


def _shuffle(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """shfl.sync 9.7.9.6"""
    mods.one("sync")
    mode = ("up", "down", "bfly", "idx").index(mods.one("up", "down", "bfly", "idx"))
    mods.one("b32")
    mods.done()
    dst, value, lane, clamp, members = ins.operands
    flag = 0
    if isinstance(dst, Pair):
        flag, dst = b.dest(dst.second, "pred"), dst.first
    fields = {"a": b.u32(value), "b": b.u32(lane), "c": b.u32(clamp), "e": b.u32(members)}
    b.emit("SHUFFLE", d=b.dest(dst, "u32"), f=flag, imm=mode, **fields)


def _vote(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """vote.sync 9.7.13.9"""
    mods.one("sync")
    mode = ("all", "any", "uni", "ballot").index(mods.one("all", "any", "uni", "ballot"))
    kind = mods.one("pred", "b32")
    mods.done()
    dst, value, members = ins.operands
    negated = isinstance(value, Not)
    source = b.source(value.operand if isinstance(value, Not) else value, "pred")
    b.emit("VOTE", d=b.dest(dst, "u32" if kind == "b32" else "pred"), a=source, c=int(negated), e=b.u32(members), imm=mode)


def _match(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """match.sync 9.7.13.10"""
    is_all = mods.one("any", "all") == "all"
    mods.one("sync")
    wide = mods.one("b32", "b64") == "b64"
    mods.done()
    dst, value, members = ins.operands
    flag = 0
    if isinstance(dst, Pair):
        flag, dst = b.dest(dst.second, "pred"), dst.first
    source = b.source(value, "u64" if wide else "u32")
    b.emit("MATCH", d=b.dest(dst, "u32"), f=flag, a=source, c=int(wide), e=b.u32(members), imm=int(is_all))


_REDUX = {
    ("add", "u32"): 0, ("add", "s32"): 0, ("min", "u32"): 1, ("max", "u32"): 2, ("min", "s32"): 3, ("max", "s32"): 4,
    ("and", "b32"): 5, ("or", "b32"): 6, ("xor", "b32"): 7, ("min", "f32"): 8, ("max", "f32"): 9,
}  # fmt: skip


def _redux(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """redux.sync 9.7.13.12"""
    mods.one("sync")
    operation = mods.one("add", "min", "max", "and", "or", "xor")
    absolute, keep_nan = mods.has("abs"), mods.has("NaN")
    kind = mods.one("u32", "s32", "b32", "f32")
    mods.done()
    if (operation, kind) not in _REDUX or (kind != "f32" and (absolute or keep_nan)):
        raise UnsupportedInstruction(ins.opcode)
    dst, value, members = ins.operands
    source = b.source(value, "f32" if kind == "f32" else "u32")
    b.emit("REDUX", d=b.dest(dst, "u32"), a=source, e=b.u32(members), imm=_REDUX[operation, kind] + (2 if keep_nan else 0), c=int(absolute))


def _elect(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """elect.sync 9.7.13.15: the lowest member is the leader (which lane leads is not specified)."""
    mods.one("sync")
    mods.done()
    dst, members = ins.operands
    if not isinstance(dst, Pair):
        raise UnsupportedInstruction("elect.sync without a predicate")
    b.emit("ELECT", d=b.dest(dst.first, "u32"), f=b.dest(dst.second, "pred"), a=b.u32(members))


def _activemask(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """activemask 9.7.13.11"""
    mods.one("b32")
    mods.done()
    b.emit("ACTIVEMASK", d=b.dest(ins.operands[0], "u32"))


def _cvta(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """cvta 9.7.9.20: global and parameter addresses are generic addresses; shared and local ones lie in windows."""
    to = mods.has("to")
    space = mods.one("shared::cluster", "shared::cta", "shared", "local", "global", "const", "param::entry", "param")
    mods.one("u64")
    mods.done()
    window = SHARED_WINDOW if space.startswith("shared") else LOCAL_WINDOW if space == "local" else 0
    operation = "and.b64" if to else "or.b64"
    dst, src = ins.operands
    mask = b.const(SHARED_WINDOW - 1 if window else -1, 8) if to else b.const(window, 8)
    b.emit(alu.OPCODES[operation], d=b.dest(dst, "u64"), a=b.u64(src), b=mask)


def _nop(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """Hints without architectural effect: prefetchu 9.7.9.15, discard, applypriority 9.7.9.17, nanosleep 9.7.18.2, pmevent."""
    b.emit("NOP")


def _trap(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """trap 9.7.18.4, brkpt 9.7.18.1"""
    b.emit("TRAP")


def _create_policy(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """createpolicy 9.7.9.18: cache policies are opaque and have no functional effect."""
    b.emit(alu.OPCODES["mov.b64"], d=b.dest(ins.operands[0], "u64"), a=b.const(0, 8))


def _warp_sync(b: Builder, ins: Instruction, mods: Modifiers) -> bool | None:
    """bar.warp.sync 9.7.13.2"""
    if ins.opcode != "bar.warp.sync":
        return False
    b.emit("WARP_SYNC", a=b.u32(ins.operands[0]))
    return None


_MMA_KINDS = ("f16", "bf16", "e4m3", "e5m2")


def _mma_sync(b: Builder, ins: Instruction, mods: Modifiers) -> None:
    """mma.sync.aligned 9.7.14.5.14, dense, float32 accumulators"""
    mods.one("sync")
    mods.one("aligned")
    shape = mods.one("m16n8k16", "m16n8k8", "m16n8k32")
    mods.has("kind::f8f6f4")
    if mods.parts[:2] != ["row", "col"] or len(mods.parts) != 6 or mods.parts[2] != "f32" or mods.parts[5] != "f32":
        raise UnsupportedInstruction(ins.opcode)
    a_kind, b_kind = mods.parts[3], mods.parts[4]
    if a_kind not in _MMA_KINDS or b_kind not in _MMA_KINDS:
        raise UnsupportedInstruction(ins.opcode)
    k, size = int(shape[6:]), 2 if a_kind in ("f16", "bf16") else 1
    counts = (4, k * size // 8, k * size // 16, 4)
    if k * size not in (16, 32) or (size == 2) != (b_kind in ("f16", "bf16")):
        raise UnsupportedInstruction(ins.opcode)
    slots = []
    for operand, count, kind in zip(ins.operands, counts, ("f32", "u32", "u32", "f32"), strict=True):
        items = operand.items if isinstance(operand, Vector) else (operand,)
        if len(items) != count:
            raise UnsupportedInstruction(f"{ins.opcode} with {len(items)} registers, expected {count}")
        slots += [b.source(item, kind) for item in items]
    b.emit("MMA_SYNC", a=_MMA_KINDS.index(a_kind), b=_MMA_KINDS.index(b_kind), c=k, target=b.list_slots(slots))


_CARRY_OPS = {"add": 0, "addc": 0, "sub": 1, "subc": 1, "mad.lo": 2, "madc.lo": 2, "mad.hi": 3, "madc.hi": 3}


def _carry(b: Builder, ins: Instruction, mods: Modifiers) -> bool | None:
    """Extended-precision integer arithmetic, 9.7.2: the carry flag has a hidden register."""
    parts = ins.opcode.split(".")
    name = ".".join(parts[:2]) if parts[0] in ("mad", "madc") else parts[0]
    if "cc" not in parts and not name.startswith(("addc", "subc", "madc")):
        return False
    kind = mods.parts.pop()
    writes = mods.has("cc")
    mods.has("lo", "hi")
    mods.done()
    if name not in _CARRY_OPS or kind not in ("u32", "s32", "u64", "s64") or (name[:3] == "mad" and name.endswith("hi") and kind[0] == "s"):
        raise UnsupportedInstruction(ins.opcode)
    width = f"u{kind[1:]}"
    fields = {field: b.source(operand, width) for field, operand in zip("abc", ins.operands[1:], strict=False)}
    flags = int(name.split(".")[0].endswith("c")) | (2 if writes else 0)
    fields |= {"d": b.dest(ins.operands[0], width), "e": b.carry_slot(), "imm": _CARRY_OPS[name], "count": flags, "f": int(width == "u64")}
    b.emit("CARRY", **fields)
    return None


_NATIVE: dict[str, NativeMaker] = {
    "ld": _load_store,
    "ldu": _load_store,
    "st": _load_store,
    "atom": _atomic,
    "red": _atomic,
    "bra": _branch,
    "brx": _branch_table,
    "ret": _exit,
    "exit": _exit,
    "shfl": _shuffle,
    "vote": _vote,
    "match": _match,
    "redux": _redux,
    "elect": _elect,
    "activemask": _activemask,
    "cvta": _cvta,
    "prefetchu": _nop,
    "discard": _nop,
    "applypriority": _nop,
    "nanosleep": _nop,
    "pmevent": _nop,
    "trap": _trap,
    "brkpt": _trap,
    "createpolicy": _create_policy,
    "bar": _warp_sync,
    "mma": _mma_sync,
    **dict.fromkeys(("add", "addc", "sub", "subc", "mad", "madc"), _carry),
}


register_native(_NATIVE)
