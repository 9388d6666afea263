"""What the adapters share, whatever the engine: which kernels serve a device, and what happens when an engine starts.

No engine is imported here: adapters translate their engine's words and call this.
"""
