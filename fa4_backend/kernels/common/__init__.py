"""What the chips' kernels share: block, mask and row arithmetic, paged loads, stores. Nothing here knows an MMA instruction."""
