"""Compile key of the schedule. Imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """Compile key of the schedule: one kernel serves every problem of an arch."""

    arch: str
    max_num_seqs: int  # a power of two

    @property
    def builder(self) -> str:
        """Where the kernel is: see `fa4_backend.compile`."""
        return "fa4_backend.kernels.schedule.kernel:build"

    @property
    def name(self) -> str:
        """Short name for people and file names."""
        return f"schedule-s{self.max_num_seqs}"


def schedule_config(arch: str, max_num_seqs: int) -> ScheduleConfig:
    """The schedule for batches of up to `max_num_seqs`; few sizes, so that plans share it."""
    return ScheduleConfig(arch, max(256, 1 << (max_num_seqs - 1).bit_length()))
