"""Requests as a busy server gets them: shared prefixes of all lengths, repeats, short and long answers, users who leave."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from tests.engines.tiny_models import VOCAB

NUM_PREFIXES = 8


@dataclass(frozen=True)
class DrawnRequest:
    """What a user asks."""

    prompt: list[int]
    new_tokens: int
    leaves_after: int | None  # tokens of the answer after which the user is gone; None: who waits for all of it


class RandomLoad:
    """A source of requests; the same for the same seed.

    Args:
        longest_prompt, longest_answer: in tokens; prompts are log-uniform, so most are short and some are cut into chunks.
        leaving: share of users who leave early.
    """

    def __init__(self, seed: int, longest_prompt: int, longest_answer: int, leaving: float = 0.1) -> None:
        self.draw = random.Random(seed)
        self.longest_prompt, self.longest_answer, self.leaving = longest_prompt, longest_answer, leaving
        self.prefixes = [self._tokens(longest_prompt // 2) for _ in range(NUM_PREFIXES)]
        self.asked: deque[list[int]] = deque(maxlen=64)

    def next(self) -> DrawnRequest:
        """One more request: a prefix of the pool and words of its own, words of its own alone, or what was asked before."""
        length = round(2 * (self.longest_prompt / 2) ** self.draw.random())
        kind = self.draw.random()
        if kind < 0.1 and self.asked:
            prompt = self.draw.choice(self.asked)
        elif kind < 0.6:
            shared = self.draw.choice(self.prefixes)[: length // 2]
            prompt = shared + self._tokens(length - len(shared))
        else:
            prompt = self._tokens(length)
        self.asked.append(prompt)
        new_tokens = self.draw.randint(1, self.longest_answer)
        leaves_after = self.draw.randrange(new_tokens) if self.draw.random() < self.leaving else None
        return DrawnRequest(prompt, new_tokens, leaves_after)

    def arrivals(self, mean: float) -> int:
        """How many requests come at once: none most of the time, a crowd now and then."""
        return min(int(self.draw.expovariate(1 / mean)), 16)

    def _tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(2, VOCAB) for _ in range(count)]
