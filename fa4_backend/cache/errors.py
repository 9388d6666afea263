"""What can be wrong with the cache, each with its own name."""

from __future__ import annotations


class CacheError(RuntimeError):
    """Base class of the cache's errors."""


class UntrustedCacheError(CacheError):
    """A file or folder whose content others decide: no native code is loaded from it."""


class CacheWriteError(CacheError):
    """An entry could not be written: a full disk, a read-only folder, a limit."""


class BrokenObjectError(CacheError):
    """A compiled object is missing or damaged and cannot be compiled here, or the loader refuses it."""
