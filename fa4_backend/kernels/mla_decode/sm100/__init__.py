"""Latent decode on Blackwell (sm_100a, sm_103a); see docs/mla.md."""
