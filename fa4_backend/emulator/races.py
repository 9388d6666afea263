"""Happens-before race detector."""

from __future__ import annotations


class Races:
    pass


class Access:
    pass
