"""Decode kernel of multi-head latent attention on Hopper: packed heads by wgmma over latents that are K and V at once."""
