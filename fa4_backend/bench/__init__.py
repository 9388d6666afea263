"""Benchmarks behind `fa4 bench`: our kernels and the peers that are installed, in one run."""
