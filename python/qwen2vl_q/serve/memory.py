"""Memory that pictures have taken goes back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE = 2**22


def return_large_blocks() -> None:
    """Has glibc map every large block apart. It would learn from the first freed ones, up to 32 MB, to keep
    them, in an arena of each thread: some gigabytes after pictures of many megapixels. Elsewhere nothing."""
    with suppress(OSError, TypeError, AttributeError):  # no such C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
