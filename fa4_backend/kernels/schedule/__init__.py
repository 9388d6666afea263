"""The work lists of a step, made on the device: what they hold, the kernel that writes them, and its launch."""
