"""Blackwell kernels (sm_100a, sm_103a); see docs/sm100.md."""
