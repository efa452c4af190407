"""The allocator of a CPU learner's process."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameter numbers of glibc's ``mallopt`` (malloc.h)."""

MMAP_ABOVE = 32 << 20
"""Bytes; glibc accepts no more. Smaller blocks come from the heap and return to it."""
KEEP = 256 << 20
"""Free bytes at the end of the heap that are kept for the next pass."""
GROW = 16 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system; False where there is no glibc.

    Each pass allocates and frees the same activations. Returned to the system, every one of their pages is zeroed and
    mapped anew in the next pass: thousands of page faults a step, all of which this saves.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        logger.info("no glibc: freed memory is kept or returned as the allocator likes")
        return False
    settings = {M_MMAP_THRESHOLD: MMAP_ABOVE, M_TRIM_THRESHOLD: KEEP, M_TOP_PAD: GROW}
    return all(mallopt(number, value) == 1 for number, value in settings.items())
