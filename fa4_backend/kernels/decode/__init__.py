"""The decode kernel: queries of a few tokens over a long KV, the KV split between CTAs. One source for Hopper and Blackwell."""
