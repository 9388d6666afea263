"""Kernels: one folder a chip family, `common` for what they share, and the torch kernel that serves CPUs."""
