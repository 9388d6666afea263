"""Decode of multi-head latent attention, over latents that are K and V at once: here on Hopper, in `sm100/` on Blackwell."""
