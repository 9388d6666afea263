"""The kernel of an engine that runs before attention in its stream, and lets attention start early: it writes Q, K and V late."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fa4_backend.emulator.session import Session
from fa4_backend.emulator.tensors import extent
from tests.support.paged_case import BuiltCase

BLOCK, PIECE = 128, 16  # threads; bytes that each writes at once
HEAD = """
.version 8.6
.target {arch}
.address_size 64
.visible .entry engine_{count}({parameters})
.reqntid {block}
{{
.reg .pred %p;
.reg .b32 %r<8>;
.reg .b64 %rd<3>;
griddepcontrol.launch_dependents;
"""
WRITE = """
ld.param.u64 %rd1, [data{i}];
ld.param.u32 %r1, [pieces{i}];
mov.u32 %r2, %tid.x;
more{i}:
setp.ge.u32 %p, %r2, %r1;
@%p bra done{i};
mad.wide.u32 %rd2, %r2, {piece}, %rd1;
ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd2];
st.global.v4.b32 [%rd2], {{%r3, %r4, %r5, %r6}};
add.u32 %r2, %r2, {block};
bra more{i};
done{i}:
"""


def write_late(session: Session, tensors: list[torch.Tensor]) -> None:
    """Launch it: dependents may start before it writes the tensors, which get the values that they have."""
    parameters = ", ".join(f".param .u64 data{i}, .param .u32 pieces{i}" for i in range(len(tensors)))
    parts = [WRITE.format(i=i, piece=PIECE, block=BLOCK) for i in range(len(tensors))]
    text = HEAD.format(arch=session.arch, count=len(tensors), parameters=parameters, block=BLOCK) + "".join(parts) + "ret;\n}\n"
    arguments = [value for tensor in tensors for value in (tensor, extent(tensor)[1] // PIECE)]
    session.launch(text, 1, BLOCK, arguments)


def written_late(built: BuiltCase) -> Callable[[Session], None]:
    """The kernel before attention that writes what a batch's call reads and writes: all that it has to wait for."""
    a = built.arguments
    tensors = [tensor for tensor in (a.q, a.k_cache, a.v_cache, a.out, a.lse) if tensor is not None]
    return lambda session: write_late(session, tensors)


def busy(session: Session) -> None:
    """The kernel before attention where it is one that attention need not wait for, but whoever waits for attention does."""
    write_late(session, [torch.zeros(64)])
