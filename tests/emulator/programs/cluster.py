"""Thread-block clusters: distributed shared memory, remote mbarriers, copies between CTAs, multicast. PTX ISA 5.1.5, 9.7.9.24, 9.7.13."""

from __future__ import annotations

import numpy as np

from tests.emulator.programs.bulk import WAIT, copy_out
from tests.emulator.programs.program import Buffer, Program, output
from tests.emulator.programs.tensor_copy import image, packed_map

RNG = np.random.default_rng(91)
WORDS = RNG.integers(0, 1 << 32, 512, dtype=np.uint32)

RANK = (
    "mov.u32 %r40, %cluster_ctarank;\nmov.u32 %r41, %cluster_nctarank;\nmov.u32 %r0, smem;\nmov.u32 %r42, %ctaid.x;\n"
    "mad.lo.u32 %r43, %r42, 32, %t;\n"
)
SYNC = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"


def _distributed() -> list[Program]:
    out = []
    data = WORDS[:128]
    rotated = np.roll(data.reshape(4, 32), -1, 0).reshape(-1)
    load = "mad.wide.u32 %d0, %r43, 4, %p0;\nld.global.b32 %r1, [%d0];\nmad.wide.u32 %d1, %r43, 4, %p1;\nmad.lo.u32 %r2, %t, 4, %r0;\n"
    peer = "add.u32 %r3, %r40, 1;\nand.b32 %r3, %r3, 3;\n"
    args = (Buffer("a", data), output("d", rotated))
    body = (
        RANK
        + load
        + "st.shared.b32 [%r2], %r1;\n"
        + SYNC
        + peer
        + "mapa.shared::cluster.u32 %r4, %r2, %r3;\nld.shared::cluster.b32 %r5, [%r4];\nst.global.b32 [%d1], %r5;\n"
        + SYNC
    )
    out.append(Program("mapa and ld.shared::cluster", "9.7.9.24", body, args, grid=4, cluster=4, smem_bytes=1024))
    # Writing to the peer: CTA r writes what CTA r - 1 ... so that each reads its own memory.
    body = (
        RANK + load + "add.u32 %r3, %r40, 3;\nand.b32 %r3, %r3, 3;\nmapa.shared::cluster.u32 %r4, %r2, %r3;\n" + SYNC
        + "st.shared::cluster.b32 [%r4], %r1;\n" + SYNC + "ld.shared.b32 %r5, [%r2];\nst.global.b32 [%d1], %r5;"
    )  # fmt: skip
    out.append(Program("st.shared::cluster", "9.7.9.24", body, args, grid=4, cluster=4, smem_bytes=1024))
    # Through generic addresses.
    body = (
        RANK + load + "st.shared.b32 [%r2], %r1;\n" + SYNC + peer
        + "cvt.u64.u32 %d2, %r2;\ncvta.shared.u64 %d2, %d2;\nmapa.u64 %d3, %d2, %r3;\nld.b32 %r5, [%d3];\n"
        "st.global.b32 [%d1], %r5;\n" + SYNC
    )  # fmt: skip
    out.append(Program("mapa of a generic address", "9.7.9.24", body, args, grid=4, cluster=4, smem_bytes=1024))
    body = (
        RANK + "mov.u32 %r1, 0;\nsetp.eq.u32 %q0, %t, 0;\n@%q0 st.shared.u32 [%r0], %r1;\n" + SYNC
        + "mov.u32 %r3, 2;\nmapa.shared::cluster.u32 %r4, %r0, %r3;\nadd.u32 %r5, %r40, 1;\n"
        "atom.shared::cluster.add.u32 %r6, [%r4], %r5;\n" + SYNC
        + "setp.eq.u32 %q1, %r40, 2;\nand.pred %q1, %q1, %q0;\n@!%q1 bra end;\nld.shared.u32 %r7, [%r0];\nst.global.u32 [%p0], %r7;\nend:"
    )  # fmt: skip
    out.append(
        Program(
            "atom.shared::cluster",
            "9.7.13.13",
            body,
            (output("d", np.array([32 * (1 + 2 + 3 + 4)], np.uint32)),),
            grid=4,
            cluster=4,
            smem_bytes=1024,
        )
    )
    return out


def _registers() -> list[Program]:
    body = (
        RANK + "mov.u32 %r1, %clusterid.x;\nmov.u32 %r2, %nclusterid.x;\nmov.u32 %r3, %cluster_ctaid.x;\nmov.u32 %r4, %cluster_nctaid.x;\n"
        "mov.pred %q0, %is_explicit_cluster;\n"
        "selp.u32 %r5, 1, 0, %q0;\nsetp.ne.u32 %q1, %t, 0;\n@%q1 bra end;\nmad.wide.u32 %d0, %r42, 32, %p0;\n"
        "st.global.v4.u32 [%d0], {%r1, %r2, %r3, %r4};\n"
        "st.global.v4.u32 [%d0+16], {%r40, %r41, %r5, %r42};\nend:"
    )
    want = np.array([[c // 2, 3, c % 2, 2, c % 2, 2, 1, c] for c in range(6)], np.uint32)
    special = Program("cluster special registers", "10", body, (output("d", want),), grid=6, cluster=2, smem_bytes=1024)
    body = (
        RANK + "mov.u32 %r1, 1;\nmapa.shared::cluster.u32 %r2, %r0, %r1;\ngetctarank.shared::cluster.u32 %r3, %r2;\n"
        "getctarank.shared::cluster.u32 %r4, %r0;\n"
        "setp.ne.u32 %q1, %t, 0;\n@%q1 bra end;\nmad.wide.u32 %d0, %r42, 8, %p0;\nst.global.v2.u32 [%d0], {%r3, %r4};\nend:\n" + SYNC
    )
    want = np.array([[1, c] for c in range(2)], np.uint32)
    ranks = Program("getctarank", "9.7.9.25", body, (output("d", want),), grid=2, cluster=2, smem_bytes=1024)
    return [special, ranks]


def _barriers() -> list[Program]:
    out = []
    data = WORDS[:64]
    swapped = data.reshape(2, 32)[::-1].reshape(-1).copy()
    load = "mad.wide.u32 %d0, %r43, 4, %p0;\nld.global.b32 %r1, [%d0];\nmad.wide.u32 %d1, %r43, 4, %p1;\nmad.lo.u32 %r2, %t, 4, %r0;\n"
    init = (
        "setp.ne.u32 %q0, %t, 0;\n@%q0 bra made;\nmbarrier.init.shared.b64 [%r0], {count};\nfence.mbarrier_init.release.cluster;\nmade:\n"
        + "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
    )
    peer = "xor.b32 %r3, %r40, 1;\nmapa.shared::cluster.u32 %r4, %r0, %r3;\n"
    wait = "spin:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %q1, [%r0], 0;\n@!%q1 bra spin;\n"
    for name, arrive in {
        "mbarrier.arrive.shared::cluster": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4];\n",
        "mbarrier.arrive.shared::cluster with count": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4], 2;\n",
    }.items():
        count = 64 if "count" in name else 32
        body = (
            RANK + load + init.format(count=count) + peer + "mad.lo.u32 %r5, %t, 4, %r4;\n"
            "st.shared::cluster.b32 [%r5+64], %r1;\n" + arrive + wait
            + "ld.shared.b32 %r6, [%r2+64];\nst.global.b32 [%d1], %r6;\n" + SYNC
        )  # fmt: skip
        out.append(Program(name, "9.7.13.15.13", body, (Buffer("a", data), output("d", swapped)), grid=2, cluster=2, smem_bytes=1024))
    # st.async writes the peer's memory and completes 4 bytes of its barrier.
    body = (
        RANK + load + init.format(count=1) + "@%q0 bra armed;\nmbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], 128;\narmed:\n" + peer
        + "mad.lo.u32 %r5, %t, 4, %r4;\nadd.u32 %r5, %r5, 64;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r5], %r1, [%r4];\n" + wait
        + "ld.shared.b32 %r6, [%r2+64];\nst.global.b32 [%d1], %r6;\n" + SYNC
    )  # fmt: skip
    out.append(Program("st.async", "9.7.9.12", body, (Buffer("a", data), output("d", swapped)), grid=2, cluster=2, smem_bytes=1024))
    # A bulk copy from this CTA's shared memory to the peer's.
    body = (
        RANK + load + init.format(count=1) + "st.shared.b32 [%r2+128], %r1;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n" + peer
        + "@%q0 bra armed;\nmbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], 128;\nadd.u32 %r5, %r4, 256;\nadd.u32 %r6, %r0, 128;\n"
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r5], [%r6], 128, [%r4];\narmed:\n" + wait
        + "ld.shared.b32 %r6, [%r2+256];\nst.global.b32 [%d1], %r6;\n" + SYNC
    )  # fmt: skip
    out.append(
        Program(
            "cp.async.bulk to a peer", "9.7.9.25.4.1", body, (Buffer("a", data), output("d", swapped)), grid=2, cluster=2, smem_bytes=1024
        )
    )
    body = (
        RANK + load + "st.shared.b32 [%r2], %r1;\nbarrier.cluster.arrive.aligned;\nadd.u32 %r9, %r1, 0;\nbarrier.cluster.wait.aligned;\n"
        "xor.b32 %r3, %r40, 1;\nmapa.shared::cluster.u32 %r4, %r2, %r3;\nld.shared::cluster.b32 %r5, [%r4];\nst.global.b32 [%d1], %r5;\n"
        + SYNC
    )
    out.append(
        Program("barrier.cluster split", "9.7.13.2", body, (Buffer("a", data), output("d", swapped)), grid=2, cluster=2, smem_bytes=1024)
    )
    return out


def _multicast() -> list[Program]:
    out = []
    init = (
        "mov.u32 %r40, %cluster_ctarank;\nmov.u32 %r1, smem;\nadd.u32 %r0, %r1, 2048;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra made;\n"
        "mbarrier.init.shared.b64 [%r0], 1;\nfence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], 1024;\nmade:\n" + SYNC
    )
    dump = "mov.u32 %r42, %ctaid.x;\nmad.wide.u32 %d15, %r42, 1024, %p{0};\nmov.u64 %p{0}, %d15;\n"
    # CTA 0 sends to both; each waits on its own barrier.
    data = RNG.integers(0, 256, 1024, dtype=np.uint8)
    body = (
        init + "setp.ne.u32 %q3, %r40, 0;\nor.pred %q3, %q3, %q0;\n@%q3 bra started;\nmov.u16 %h1, 3;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%p0], 1024, [%r0], %h1;\n"
        "started:\n" + WAIT
        + dump.format(1) + copy_out(1024, 1) + SYNC
    )  # fmt: skip
    out.append(
        Program(
            "cp.async.bulk multicast",
            "9.7.9.25.4.1",
            body,
            (Buffer("a", data), output("d", np.concatenate([data, data]))),
            block=64,
            grid=2,
            cluster=2,
            smem_bytes=4096,
        )
    )
    # Each CTA loads half of the box and sends it to both.
    tensor, memory = packed_map("bf16", (64, 32), (64, 4), swizzle="128B")
    body = (
        init + "@%q0 bra started;\nmov.u16 %h1, 3;\nmad.lo.u32 %r31, %r40, 4, 8;\nmov.u32 %r30, 0;\nmad.lo.u32 %r3, %r40, 512, %r1;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%r3], [%p0, {%r30, %r31}], [%r0], %h1;\n"
        "started:\n" + WAIT + dump.format(2) + copy_out(1024, 2) + SYNC
    )
    # The two halves are placed 512 bytes apart, inside one swizzle pattern of 1024 bytes: rows 0..7 of the box.
    from dataclasses import replace

    whole = image(replace(tensor, box=(64, 8)), memory, (0, 8), 1024)
    out.append(
        Program(
            "tensor multicast",
            "9.7.9.27.1.2",
            body,
            (tensor, Buffer("a", memory), output("d", np.concatenate([whole, whole]))),
            block=64,
            grid=2,
            cluster=2,
            smem_bytes=4096,
        )
    )
    return out


PROGRAMS = [*_distributed(), *_registers(), *_barriers(), *_multicast()]
