"""Two kernels that the compiler launches with programmatic stream serialization: what the second reads before its wait is a race."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fa4_backend import emulator
from fa4_backend.compile import link_shared
from fa4_backend.emulator.kernels import load_object

pytestmark = pytest.mark.emulated


def compile_pair(waits: bool, programmatic: bool, dumps: Path) -> Any:
    """y = x + 1 by one kernel, then z = y + 1 by the next."""
    emulator.install()
    import cutlass.cute as cute
    from cuda.bindings.driver import CUstream
    from cutlass import Float32, const_expr
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

    @cute.kernel
    def first(x: cute.Tensor, y: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        cute.arch.griddepcontrol_launch_dependents()
        y[thread] = x[thread] + Float32(1.0)

    @cute.kernel
    def second(y: cute.Tensor, z: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        if const_expr(waits):
            cute.arch.griddepcontrol_wait()
        z[thread] = y[thread] + Float32(1.0)

    @cute.jit
    def host(x: cute.Tensor, y: cute.Tensor, z: cute.Tensor, stream: CUstream):
        first(x, y).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)
        second(y, z).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream, use_pdl=programmatic)

    tensors = [make_fake_tensor(Float32, (32,), stride=(1,), assumed_align=16) for _ in range(3)]
    options = f"--enable-tvm-ffi --gpu-arch sm_90a --keep-ptx --keep-cubin --dump-dir {dumps}"
    compiled = cute.compile(host, *tensors, make_fake_stream(use_tvm_ffi_env_stream=True), options=options)
    emulator.register_program(compiled.artifacts.PTX, compiled.artifacts.CUBIN)
    compiled.export_to_c(str(dumps / "pair.o"), function_name="pair")
    link_shared([dumps / "pair.o"], dumps / "pair.so")
    return load_object(dumps / "pair.so")["pair"]


@pytest.mark.parametrize(("waits", "programmatic", "races"), [(False, True, True), (True, True, False), (False, False, False)])
def test_what_is_read_before_the_wait_races(waits: bool, programmatic: bool, races: bool, tmp_path: Path) -> None:
    pair = compile_pair(waits, programmatic, tmp_path)
    x, y, z = torch.arange(32.0), torch.zeros(32), torch.zeros(32)
    with emulator.session(arch="sm_90a", num_sms=1) as session:
        session.run(pair, x, y, z)
    assert torch.equal(z, x + 2)
    assert len(session.report.kernels) == 2
    assert ("griddepcontrol.wait" in session.report.opcodes()) == waits
    assert bool(session.report.races) == races, session.report.races
