"""Prompts for comparing engines on the small models."""

from __future__ import annotations

import random

from tests.engines.tiny_models import VOCAB

SHARED_PREFIX = 256


def make_prompts() -> list[list[int]]:
    """Ten prompts of 5 to 700 tokens: chunked prefill (over 256), a shared prefix, a repeat, and patterns that n-gram drafts hit."""
    rng = random.Random(0)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(length)] for length in (5, 17, 64, 130, 300, 511, 700)]
    pattern = [rng.randrange(2, VOCAB) for _ in range(6)]
    prompts.append(pattern * 8)
    prompts.append(prompts[4][:SHARED_PREFIX] + [rng.randrange(2, VOCAB) for _ in range(20)])
    prompts.append(prompts[3])
    return prompts
