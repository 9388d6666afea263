"""How fast a warp's arithmetic runs beside matrix products of warpgroups: what the timing model takes for `wgmma` kernels, measured.

    python -m tests.device.measure_pipes --json FILE                      (a Hopper GPU; the driver assembles the PTX)
    python -m tests.device.measure_pipes --dump FOLDER                    (only writes the programs)

One CTA on every SM. Two kinds of programs, in cycles of the SM's counter:

* **beside**: one warpgroup runs products without a pause, others run one operation over 64 registers a thread, again and again. What the
  operation costs beside them, over what it costs alone, is what a unit loses to the tensor core's use of the registers.
* **attention**: every warpgroup runs the loop of an attention kernel, Q K of the next block, P V of the last, the softmax between their
  waits, without copies and barriers; and the loop's arithmetic alone, and its products alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VALUES = 64  # registers a thread that the arithmetic runs over: the scores of 64 rows and 128 keys
A_BYTES, B_BYTES = 8192, 16384  # 64 and 128 rows of 64 16-bit values, swizzled over 128 bytes
WARPGROUP = 128
ROUNDS = 200


def registers(name: str, count: int) -> list[str]:
    """%name0 to %name<count - 1>."""
    return [f"%{name}{i}" for i in range(count)]


def product(keys: int, accumulators: str, step: int, a: list[str] | None, adds: bool = True) -> str:
    """One wgmma of 64 rows, `keys` columns and 16 terms; `a`: its four registers, or none where A is in shared memory."""
    out = ", ".join(registers(accumulators, keys // 2))
    first = "{" + ", ".join(a) + "}" if a else "%da"
    more = "1, 1, 0" if a else "1, 1, 0, 0"
    plus = f"add.s64 %db, %b, {2 * (step % 4)};" + ("" if a else f"\nadd.s64 %da, %a, {2 * (step % 4)};")
    opcode = f"wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.bf16.bf16"
    return f"{plus}\n{opcode} {{{out}}}, {first}, %db, {'%yes' if adds else '%no'}, {more};"


def products(keys: int, accumulators: str, count: int, from_registers: bool, adds: bool = True) -> str:
    """A group of products over one accumulator; with `from_registers`, A is P's packed weights."""
    packed = registers("p", VALUES // 2)
    lines = [
        product(keys, accumulators, i, packed[4 * (i % 8) : 4 * (i % 8) + 4] if from_registers else None, adds or i > 0)
        for i in range(count)
    ]
    return "\n".join(["wgmma.fence.sync.aligned;", *lines, "wgmma.commit_group.sync.aligned;"])


# A product warpgroup's groups: name -> (columns, products, whether A is in registers).
GROUPS = {"ss n128": (128, 8, False), "rs n128": (128, 8, True), "ss n64": (64, 16, False), "rs n64": (64, 16, True)}
X = registers("x", VALUES)
PAIRS = list(zip(X[::2], X[1::2], strict=True))
# One round of each operation: one instruction for each register, in place, so that nothing can be left out or taken out of the loop.
OPERATIONS = {
    "fma": [f"fma.rn.f32 {x}, {x}, %c0, %c1;" for x in X],
    "add": [f"add.f32 {x}, {x}, %c1;" for x in X],
    "mul": [f"mul.f32 {x}, {x}, %c0;" for x in X],
    "max": [f"max.f32 {x}, {x}, {y};" for x, y in zip(X, X[1:] + X[:1], strict=True)],
    "ex2": [f"ex2.approx.ftz.f32 {x}, {x};" for x in X],
    "cvt": [f"cvt.rn.bf16x2.f32 {x}, {x}, {y};" for x, y in zip(X, X[1:] + X[:1], strict=True)],
    "fma ex2": [line for x in X for line in (f"fma.rn.f32 {x}, {x}, %c0, %c1;", f"ex2.approx.ftz.f32 {x}, {x};")],
    "max add": [line for x, y in PAIRS for line in (f"max.f32 {x}, {x}, {y};", f"add.f32 {y}, {y}, %c1;")],
}


def softmax(row: int) -> str:
    """Maximum, factor and weights of one of a thread's two rows; its maximum is %m<row>, its sum %l<row>."""
    mine = [x for i, x in enumerate(registers("s", VALUES)) if i // 2 % 2 == row]
    lines = [f"mov.f32 %t0, %m{row};", *(f"max.f32 %m{row}, %m{row}, {x};" for x in mine)]
    for lane in (1, 2):
        lines += [f"shfl.sync.bfly.b32 %t1, %m{row}, {lane}, 31, -1;", f"max.f32 %m{row}, %m{row}, %t1;"]
    lines += [f"mul.f32 %t1, %m{row}, %c0;", "neg.f32 %t1, %t1;", "fma.rn.f32 %t0, %t0, %c0, %t1;", f"ex2.approx.ftz.f32 %f{row}, %t0;"]
    lines += [line for x in mine for line in (f"fma.rn.f32 {x}, {x}, %c0, %t1;", f"ex2.approx.ftz.f32 {x}, {x};")]
    lines += [f"mul.f32 %l{row}, %l{row}, %f{row};", *(f"add.f32 %l{row}, %l{row}, {x};" for x in mine)]
    return "\n".join(lines)


def round_of_attention(dim: int, has_products: bool, has_arithmetic: bool) -> str:
    """One block of 64 rows and 128 keys: Q K and P V under way, softmax behind Q K's wait, the rest behind P V's."""
    s, p, o = registers("s", VALUES), registers("p", VALUES // 2), registers("o", dim // 2)
    begin = [products(128, "s", dim // 16, False, adds=False), products(dim, "o", 8, True)] if has_products else []
    first, second = (["wgmma.wait_group.sync.aligned 1;"], ["wgmma.wait_group.sync.aligned 0;"]) if has_products else ([], [])
    weights = [softmax(row) for row in (0, 1)] if has_arithmetic else []
    rest = [f"cvt.rn.bf16x2.f32 {packed}, {s[2 * i + 1]}, {s[2 * i]};" for i, packed in enumerate(p)]
    rest += [f"mul.f32 {x}, {x}, %f{i // 2 % 2};" for i, x in enumerate(o)]
    if not has_products:  # the next block's scores depend on this one's weights, or nothing would be computed
        rest += [f"mov.b32 {x}, {packed};" for x, packed in zip(s, p, strict=False)]
    return "\n".join([*begin, *first, *weights, *second, *(rest if has_arithmetic else [])])


@dataclass(frozen=True)
class Case:
    """A program: the loop of the warpgroups that run products alone (`beside`), and of the others."""

    name: str
    loop: str
    warpgroups: int = 1
    beside: str = ""  # of GROUPS
    instructions: int = 0  # of the operation in a round

    @property
    def threads(self) -> int:
        return WARPGROUP * (self.warpgroups + bool(self.beside))


def cases() -> Iterator[Case]:
    """Everything that is measured."""
    for operation, lines in OPERATIONS.items():
        for count in (1, 2):
            for beside in ("", *GROUPS):
                yield Case(f"{operation} x{count} beside {beside or 'nothing'}", "\n".join(lines), count, beside, len(lines))
    for dim, most in ((64, 3), (128, 2)):
        for count in range(1, most + 1):
            for name, flags in (("both", (True, True)), ("products", (True, False)), ("arithmetic", (False, True))):
                yield Case(f"attention d{dim} x{count} {name}", round_of_attention(dim, *flags), count)


def ptx(case: Case) -> str:
    """The whole program. Warpgroup 0 runs products where there is a `beside`; each warp's lane 0 stores two stamps."""
    floats = [*X, *registers("s", VALUES), *registers("o", VALUES)]
    used = [r for r in floats if f"{r}," in case.loop + "," or f"{r}}}" in case.loop or f"{r};" in case.loop]
    used += registers("s", 64) if case.beside else []
    packed = registers("p", VALUES // 2)
    begin = [f"add.f32 {r}, %c1, 0f{0x3F800000 + i:08X};" for i, r in enumerate(dict.fromkeys(used))]
    end = [f"add.f32 %t0, %t0, {r};" for r in dict.fromkeys(used)]
    outer = ""
    if case.beside:
        keys, count, from_registers = GROUPS[case.beside]
        # A number of groups that outlasts the others; the second group of two is under way while the first is waited for.
        group = products(keys, "s", count, from_registers)
        outer = f"""
setp.ge.u32 %q, %thread, {WARPGROUP};
@%q bra others;
mov.u64 %begin, %clock64;
more:
{group}
wgmma.wait_group.sync.aligned 1;
sub.u32 %n, %n, 1;
setp.ne.u32 %q, %n, 0;
@%q bra more;
wgmma.wait_group.sync.aligned 0;
mov.u64 %end, %clock64;
bra done;
others:"""
    return f""".version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 bytes[];
.visible .entry pipes(.param .u64 out, .param .u32 rounds, .param .u32 groups)
.reqntid {case.threads}
{{
.reg .pred %q, %yes, %no, %lane0, %again;
.reg .u32 %thread, %n, %i, %smem, %r<8>;
.reg .u64 %begin, %end, %out, %a, %b, %da, %db, %d<4>;
.reg .b32 %x<{VALUES}>, %s<{VALUES}>, %o<{VALUES}>, %p<{VALUES // 2}>, %c<2>, %m<2>, %l<2>, %f<2>, %t<4>;
mov.u32 %thread, %tid.x;
mov.u32 %smem, bytes;
ld.param.u64 %out, [out];
ld.param.u32 %i, [rounds];
ld.param.u32 %n, [groups];
mov.u32 %r1, %thread;
clear:
mad.lo.u32 %r2, %r1, 4, %smem;
st.shared.u32 [%r2], 0;
add.u32 %r1, %r1, {case.threads};
setp.lt.u32 %q, %r1, {(A_BYTES + B_BYTES) // 4};
@%q bra clear;
fence.proxy.async.shared::cta;
shr.u32 %r3, %smem, 4;
cvt.u64.u32 %a, %r3;
or.b64 %a, %a, {1 << 62 | 64 << 32 | 1 << 16};
add.s64 %b, %a, {A_BYTES // 16};
setp.eq.u32 %yes, 0, 0;
setp.ne.u32 %no, 0, 0;
and.b32 %r4, %thread, 31;
setp.eq.u32 %lane0, %r4, 0;
cvt.rn.f32.u32 %c0, %thread;
mul.f32 %c1, %c0, 0f39800000;
ex2.approx.ftz.f32 %c0, %c1;
{chr(10).join(f"mov.f32 %{name}{i}, %c1;" for name in "mlf" for i in (0, 1))}
{chr(10).join(f"xor.b32 {r}, %c1, {i};" for i, r in enumerate(packed))}
{chr(10).join(begin)}
bar.sync 0;{outer}
mov.u64 %begin, %clock64;
loop:
{case.loop}
sub.u32 %i, %i, 1;
setp.ne.u32 %again, %i, 0;
@%again bra loop;
mov.u64 %end, %clock64;
done:
mov.f32 %t0, %c0;
{chr(10).join(end)}
{chr(10).join(f"xor.b32 %t0, %t0, {r};" for r in packed)}
{chr(10).join(f"add.f32 %t0, %t0, %{name}{i};" for name in "mlf" for i in (0, 1))}
mov.u32 %r5, %ctaid.x;
shr.u32 %r6, %thread, 5;
mad.lo.u32 %r5, %r5, {case.threads // 32}, %r6;
mul.wide.u32 %d1, %r5, 32;
add.u64 %out, %out, %d1;
@%lane0 st.global.u64 [%out], %begin;
@%lane0 st.global.u64 [%out+8], %end;
st.global.b32 [%out+16], %t0;
ret;
}}
"""


def run(case: Case, num_ctas: int) -> dict[str, float]:
    """Cycles a round, and of a product beside it: medians over the warps of all CTAs.

    Raises:
        RuntimeError: the products ended before what they are to stand beside.
    """
    from tests.device import cuda_driver

    function = cuda_driver.get_function(cuda_driver.load_module(ptx(case)), "pipes", 0)
    stamps = np.zeros((num_ctas, case.threads // 32, 4), np.uint64)
    out = cuda_driver.upload(stamps)
    groups = 100
    for rounds in (2, ROUNDS, ROUNDS):  # the first brings the code, the second says how long the products must last
        arguments = [out, ctypes.c_uint32(rounds), ctypes.c_uint32(groups)]
        cuda_driver.launch(function, num_ctas, case.threads, A_BYTES + B_BYTES, arguments)
        found = cuda_driver.download(out, stamps)[:, :, :2].astype(np.int64)
        cycles = found[:, :, 1] - found[:, :, 0]
        if rounds == ROUNDS and case.beside and groups == 100:
            groups = int(100 * 2 * cycles[:, 4:].max() / cycles[:, :4].min()) + 1
    cuda_driver.free(out)
    first = 4 if case.beside else 0
    if case.beside and (found[:, first:, 1].max(axis=1) > found[:, :4, 1].min(axis=1)).any():
        raise RuntimeError(f"{case.name}: expected products that outlast the arithmetic, got {groups} groups that do not")
    result = {"round": float(np.median(cycles[:, first:])) / ROUNDS}
    if case.instructions:
        result["an instruction"] = result["round"] / case.instructions
    if case.beside:
        # Products run beside arithmetic for half of their time, alone for the other.
        result["a product"] = float(np.median(cycles[:, :4])) / groups / GROUPS[case.beside][1]
    return result


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--dump", type=Path, help="write the programs and stop")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in case.name]
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
        for case in chosen:
            (options.dump / f"{case.name.replace(' ', '_')}.ptx").write_text(ptx(case))
        return
    from tests.device import cuda_driver

    device = cuda_driver.open_device()
    print(device, flush=True)
    rows: list[dict[str, Any]] = []
    for case in chosen:
        rows.append({"case": case.name} | {key: round(value, 3) for key, value in run(case, 132).items()})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        stamp = {"date": time.strftime("%Y-%m-%d"), "device": device.split(" (")[0], "kernels": {}}
        found = {"stamp": stamp, "device": device, "driver": cuda_driver.driver_version(), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
