"""Hopper kernels: wgmma with accumulators in registers, TMA loads, producer and consumer warpgroups."""
