"""The arguments of a launch are stated once; host functions take them under the same names, in the same order."""

from __future__ import annotations

import inspect

import pytest

from fa4_backend.kernels.launch_abi import ConvertArguments, DecodeArguments, MlaDecodeArguments, PrefillArguments, ScheduleArguments


def parameters(host_function: object) -> list[str]:
    return [name for name in inspect.signature(host_function).parameters if name not in ("self", "stream")]  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["sm90", "sm100"])
def test_prefill_takes_what_a_call_passes(arch: str) -> None:
    module = __import__(f"fa4_backend.kernels.{arch}.kernel", fromlist=["PrefillKernel"])
    assert parameters(module.PrefillKernel.__call__) == list(PrefillArguments._fields)


def test_the_schedule_takes_what_a_call_passes() -> None:
    from fa4_backend.kernels.schedule.kernel import ScheduleKernel

    assert parameters(ScheduleKernel.__call__) == list(ScheduleArguments._fields)


def test_decode_takes_what_a_call_passes() -> None:
    from fa4_backend.kernels.decode.kernel import DecodeKernel

    assert parameters(DecodeKernel.__call__) == list(DecodeArguments._fields)


def test_the_conversion_takes_what_a_call_passes() -> None:
    from fa4_backend.kernels.convert_kv.kernel import ConvertKernel

    assert parameters(ConvertKernel.__call__) == list(ConvertArguments._fields)


def test_latent_decode_takes_what_a_call_passes() -> None:
    from fa4_backend.kernels.mla_decode.kernel import MlaDecodeKernel

    assert parameters(MlaDecodeKernel.__call__) == list(MlaDecodeArguments._fields)
