"""ALiBi slopes on the device, and what keeps them right: an engine may discard device memory while it sleeps, and never reloads them."""

from __future__ import annotations

import torch


class DeviceSlopes:
    """Slopes at a fixed address, which captured graphs hold, and the engine's list on the host, which no sleep touches."""

    def __init__(self, slopes: tuple[float, ...], device: torch.device) -> None:
        pin = device.type == "cuda"  # the copy of a step is then asynchronous
        self.given = torch.tensor(slopes, dtype=torch.float32, device="cpu", pin_memory=pin)
        self.tensor = torch.empty(len(slopes), dtype=torch.float32, device=device)  # (num_q_heads,)
        self.restore()

    def restore(self) -> None:
        """Write them in place; before every step, so that no way of losing them has to be known. No sync, no allocation."""
        self.tensor.copy_(self.given, non_blocking=True)
