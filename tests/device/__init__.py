"""Programs and kernels on a real GPU: results are committed as data."""
