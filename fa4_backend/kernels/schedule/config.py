"""Compile key of the schedule. Imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.kernels.schedule.limits import table_size


@dataclass(frozen=True)
class ScheduleConfig:
    """Compile key of the schedule: one kernel serves every problem of an arch."""

    arch: str
    max_num_seqs: int  # `limits.table_size`

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.schedule.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        return f"schedule-{self.arch}-s{self.max_num_seqs}"


def schedule_config(arch: str, max_num_seqs: int) -> ScheduleConfig:
    """The schedule for batches of up to `max_num_seqs`; few sizes, so that plans share it."""
    return ScheduleConfig(arch, table_size(arch, max_num_seqs))
